"""OPT on LibTorch three ways: this project's backend, a hand-written loop that does the same maths, transformers.

usage: libtorch_loop.py MODEL_DIR [--opt PATH] [--dtype f32|bf16|f16] [--threads N] [--rounds N] [--cpu-time]

Prints tokens per second of each round, the three taking turns, and the median ratios of the backend to the others.
With --cpu-time it prints tokens per second of processor time on one thread, which other work on the machine changes
little; decoding is then measured as a difference between a long and a short run.

The loop makes the calls that the backend makes, in the same formats, with nothing between them but Python: weights
packed by oneDNN (f16: as they are), queries, keys and values as one product, caches written in place, fused
attention. Its batches are of equal length, so that their attention is one call a layer.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

PROMPT, STEPS, RUNS = 32, 64, 3
NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
CASES = ["prefill 128", "prefill 512", "decode 1", "decode 8"]


class Loop:
    def __init__(self, folder, dtype):
        from safetensors.torch import load_file

        config = json.load(open(f"{folder}/config.json"))
        self.heads, self.layers, self.dtype = config["num_attention_heads"], config["num_hidden_layers"], dtype
        weights = {name.split("decoder.")[-1]: w for name, w in load_file(f"{folder}/model.safetensors").items()}
        packed = dtype != torch.float16
        pack = (lambda w: torch.ops.mkldnn._reorder_linear_weight(w, 8)) if packed else (lambda w: w)
        pointwise = torch.ops.mkldnn._linear_pointwise
        plain = lambda x, w, b=None, then="none": F.linear(x, w, b) if then == "none" else F.linear(x, w, b).relu_()
        self.product = (lambda x, w, b=None, then="none": pointwise(x, w, b, then, [], "")) if packed else plain

        def linear(*names):
            weight = torch.cat([weights[f"{name}.weight"].to(dtype) for name in names])
            return pack(weight), torch.cat([weights[f"{name}.bias"].to(dtype) for name in names])

        def norm(name):
            return weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()

        self.tokens = weights["embed_tokens.weight"].to(dtype)
        self.head = pack(self.tokens)
        self.positions = weights["embed_positions.weight"].to(dtype)
        self.norm = norm("final_layer_norm")
        self.blocks = []
        for block in (f"layers.{i}" for i in range(self.layers)):
            attention = f"{block}.self_attn"
            qkv = linear(*(f"{attention}.{part}_proj" for part in "qkv"))
            norms = norm(f"{block}.self_attn_layer_norm"), norm(f"{block}.final_layer_norm")
            self.blocks.append((*norms, qkv, *map(linear, (f"{attention}.out_proj", f"{block}.fc1", f"{block}.fc2"))))

    def new_cache(self, batch, capacity):
        width = self.positions.shape[1] // self.heads
        return [torch.empty(2, batch, self.heads, capacity, width) for _ in range(self.layers)]

    def forward(self, ids, past, cache):
        """Logits of the last row of each sequence of ids [batch, rows]."""
        batch, rows = ids.shape
        flat = ids.flatten()
        places = torch.arange(past + 2, past + 2 + rows).repeat(batch)
        h = self.tokens.index_select(0, flat).float() + self.positions.index_select(0, places).float()
        width = h.shape[1]
        for layer, (norm1, norm2, qkv, out, fc1, fc2) in enumerate(self.blocks):
            x = F.layer_norm(h, (width,), *norm1).to(self.dtype)
            y = self.product(x, *qkv).view(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            cache[layer][:, :, :, past : past + rows].copy_(y[1:])
            keys, values = cache[layer][:, :, :, : past + rows]
            mixed = F.scaled_dot_product_attention(y[0].float(), keys, values, is_causal=rows > 1)
            mixed = mixed.transpose(1, 2).reshape(batch * rows, width)
            if layer + 1 == self.layers and rows > 1:
                last = slice(rows - 1, None, rows)
                mixed, h = mixed[last], h[last]
            h += self.product(mixed.to(self.dtype), *out)
            x = F.layer_norm(h, (width,), *norm2).to(self.dtype)
            h += self.product(self.product(x, *fc1, "relu"), *fc2)
        return self.product(F.layer_norm(h, (width,), *self.norm).to(self.dtype), self.head).float()

    def prefill(self, tokens):
        self.forward(prompt(1, tokens), 0, self.new_cache(1, tokens))

    def decode(self, batch, steps):
        cache = self.new_cache(batch, PROMPT + steps)
        ids = self.forward(prompt(batch, PROMPT), 0, cache).argmax(1, keepdim=True)
        started = clock()
        for step in range(steps):
            logits = self.forward(ids, PROMPT + step, cache)
            # What `opt bench` asks for: the most probable id, its logit, and log-sum-exp.
            logits.logsumexp(1).tolist()
            ids = logits.max(1, keepdim=True)[1]
        return clock() - started


class Transformers:
    def __init__(self, folder, dtype):
        from transformers import OPTForCausalLM

        self.model = OPTForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def prefill(self, tokens):
        self.model(prompt(1, tokens), logits_to_keep=1)

    def decode(self, batch, steps):
        ids = prompt(batch, PROMPT)
        times = []
        for new in (1, steps + 1):
            started = clock()
            self.model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False)
            times.append(clock() - started)
        return times[1] - times[0]


def prompt(batch, tokens):
    return torch.randint(4, 50000, (batch, tokens))


def median(run):
    """Seconds of the median of some runs after one to warm up; a run may time itself."""
    times = []
    for _ in range(1 + RUNS):
        started = clock()
        times.append(run() or clock() - started)
    return statistics.median(times[1:])


def child(options):
    global torch, F, clock
    import torch
    import torch.nn.functional as F

    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        model = {"loop": Loop, "transformers": Transformers}[options.child](options.model, getattr(torch, NAMES[options.dtype]))
        row = {f"prefill {n}": n / median(lambda: model.prefill(n)) for n in (128, 512)}
        row |= {f"decode {n}": n * STEPS / median(lambda: model.decode(n, STEPS)) for n in (1, 8)}
    print(json.dumps(row))


def backend(options):
    def bench(prompts="512", batches="1", steps=STEPS):
        """What `opt bench` prints, and the processor time it took."""
        arguments = ["--backend", "tch", "--dtype", options.dtype, "--threads", str(options.threads), "--json"]
        arguments += ["--prompt-tokens", prompts, "--batch", batches, "--gen-tokens", str(steps)]
        used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        before = used()
        done = subprocess.run([options.opt, "bench", "--model", options.model, *arguments], capture_output=True, check=True)
        return json.loads(done.stdout), used() - before

    if not options.cpu_time:
        report, _ = bench("128,512", "1,8")
        row = {f"prefill {part['tokens']}": part["tok_s"] for part in report["prefill"]}
        return row | {f"decode {part['batch']}": part["tok_s"] for part in report["decode"]}
    runs = 1 + RUNS
    rate = lambda tokens, longer, shorter: runs * tokens / (bench(**longer)[1] - bench(**shorter)[1])
    short, long = {"prompts": "1", "steps": 1}, {"prompts": "1", "steps": 1 + STEPS}
    # Loading takes as long as some prompts: enough of them that its jitter does not show.
    many = {128: 8, 512: 3}
    row = {f"prefill {n}": rate(k * n, short | {"prompts": ",".join(["1"] + [str(n)] * k)}, short) for n, k in many.items()}
    return row | {f"decode {n}": rate(n * STEPS, long | {"batches": str(n)}, short | {"batches": str(n)}) for n in (1, 8)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--opt", default="target/release/opt")
    parser.add_argument("--dtype", choices=NAMES, default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--child", choices=["loop", "transformers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu_time:
        options.threads = 1
    if options.child:
        return child(options)

    def script(which):
        done = subprocess.run([sys.executable, *sys.argv, "--child", which], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        return json.loads(done.stdout)

    rounds = []
    for _ in range(options.rounds):
        rounds.append({"backend": backend(options), "loop": script("loop"), "transformers": script("transformers")})
        for which, row in rounds[-1].items():
            print(f"{which:12}", "  ".join(f"{case} {row[case]:7.1f}" for case in CASES), flush=True)
    for other in ("loop", "transformers"):
        ratio = lambda case: statistics.median(one["backend"][case] / one[other][case] for one in rounds)
        print(f"to {other:9}", "  ".join(f"{case} {ratio(case):7.2f}" for case in CASES))


main()
