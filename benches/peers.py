"""Measures transformers and CTranslate2 as backends.rs measures this library's backends, on random OPT-125m weights.

usage: peers.py DIR     DIR: a Python environment with transformers and ctranslate2; models are made in it once

Prints a JSON line per figure: {"group": "decode, batch 1", "name": "transformers f32", "seconds": ..., "tokens": ...}.
Prefill asks for the logits of the last row only, as ours does.
"""
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

import ctranslate2
import torch
from transformers import OPTForCausalLM

root = pathlib.Path(sys.argv[1])
threads = len(os.sched_getaffinity(0))
torch.set_num_threads(threads)
model_dir, ct2_dir = root / "opt-125m-random", root / "ct2-float32"
if not model_dir.exists():
    subprocess.run([sys.executable, pathlib.Path(__file__).with_name("make_model.py"), model_dir], check=True)
if not ct2_dir.exists():
    convert = [root / "bin/ct2-transformers-converter", "--model", model_dir, "--output_dir", ct2_dir]
    subprocess.run([*convert, "--quantization", "float32"], check=True)


def seconds(run, times=5):
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def report(group, name, taken, tokens):
    print(json.dumps({"group": group, "name": name, "seconds": taken, "tokens": tokens}), flush=True)


def decode(group, name, batch, generate):
    """Generates 33 tokens and one: the difference is 32 steps behind a prompt of 32."""
    report(group, name, (seconds(lambda: generate(batch, 33)) - seconds(lambda: generate(batch, 1))) / 32, batch)


for short, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
    name = f"transformers {short}"
    load = lambda: OPTForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    report("load", name, seconds(load, 3), None)
    model = load()

    def ids(batch, length):
        return torch.randint(4, 50000, (batch, length))

    def generate(batch, new):
        prompt = ids(batch, 32)
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False)

    with torch.inference_mode():
        report("first token", name, seconds(lambda: generate(1, 1)), None)
        for length in (128, 512):
            prompt = ids(1, length)
            report(f"prefill {length}", name, seconds(lambda: model(prompt, logits_to_keep=1)), length)
        for batch in (1, 8):
            decode(f"decode, batch {batch}", name, batch, generate)
    del model

name = "CTranslate2 f32"
load = lambda: ctranslate2.Generator(str(ct2_dir), device="cpu", intra_threads=threads, compute_type="float32")
report("load", name, seconds(load, 3), None)
generator = load()


def translate(batch, new, length=32):
    prompts = [[f"t{random.randint(4, 50000)}" for _ in range(length)] for _ in range(batch)]
    generator.generate_batch(prompts, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False)


report("first token", name, seconds(lambda: translate(1, 1)), None)
for length in (128, 512):
    report(f"prefill {length}", name, seconds(lambda: translate(1, 1, length)), length)
for batch in (1, 8):
    decode(f"decode, batch {batch}", name, batch, translate)
