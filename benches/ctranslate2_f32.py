"""Tokens per second of CTranslate2 on two cores, measured as `opt bench --all-logits` measures. usage: ctranslate2_f32.py MODEL_DIR"""
import random
import statistics
import sys
import time

import ctranslate2

model = ctranslate2.Generator(sys.argv[1], device="cpu", intra_threads=2, compute_type="float32")


def prompt(length):
    return [f"t{random.randint(4, 50000)}" for _ in range(length)]


def seconds(run):
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def generate(prompts, new):
    model.generate_batch(prompts, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False)


for length in (128, 512):
    tokens = [prompt(length)]
    print(f"prefill {length}: {length / seconds(lambda: model.forward_batch(tokens)):.1f} tokens/s")
for batch in (1, 8):
    prompts = [prompt(32) for _ in range(batch)]
    taken = seconds(lambda: generate(prompts, 65)) - seconds(lambda: generate(prompts, 1))
    print(f"decode, batch {batch}: {batch * 64 / taken:.1f} tokens/s")
