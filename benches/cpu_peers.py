"""The CPU backend beside transformers, CTranslate2 and llama.cpp, in turns, on random weights in OPT-125m's shape.

usage: python3 benches/cpu_peers.py DIR [--peers PEERS] [--rounds 3] [--only f32,bf16,int8,int4]

DIR is an environment of the peers, made and filled once by PEERS/setup.sh and PEERS/llama.sh; PEERS is the folder of
the scripts that measure them (run.sh, llama.sh; default ../shared/peers). Everything runs on all cores. A round runs
each program once, ours before or after those it is compared to by turns; what is printed are medians over the rounds,
and of the ratios within a round. The bandwidth limit is measured in the same rounds.
"""
import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time

# Our weights, and the peers that hold theirs alike.
KINDS = {
    "f32": ["ctranslate2-float32", "llama-f32", "transformers-float32"],
    "bf16": ["llama-bf16", "transformers-bfloat16"],
    "int8": ["ctranslate2-int8", "llama-q8_0"],
    "int4": ["llama-q4_0"],
}
# Bytes that decoding one token reads: 85.1 M weights of the layers, 38.6 M of the table, and scales (int4 keeps the
# table at int8).
BYTES = {"f32": 123.6e6 * 4, "bf16": 123.6e6 * 2, "int8": 123.6e6 * 34 / 32, "int4": 85.1e6 * 18 / 32 + 38.6e6 * 34 / 32}
# (row, our weights, peer, at least this ratio, more than one peer: the better of them)
ROWS = [
    ("decode 1", "f32", ["ctranslate2-float32", "llama-f32"], 1.15),
    ("decode 1", "bf16", ["llama-bf16"], 1.15),
    ("decode 1", "int8", ["llama-q8_0"], 1.25),
    ("decode 1", "int8", ["ctranslate2-int8"], 3.0),
    ("decode 1", "int4", ["llama-q4_0"], 1.4),
    ("decode 8", "int8", ["ctranslate2-int8"], 3.0),
    ("prefill 512", "f32", ["llama-f32"], 1.1),
    ("prefill 512", "bf16", ["llama-bf16"], 1.4),
    ("prefill 512 all", "int8", ["ctranslate2-int8"], 1.5),
    ("prefill 512", "int8", ["llama-q8_0"], 2.0),
    # Activations in a byte each, as these peers have them.
    ("decode 1 in bytes", "int8", ["llama-q8_0"], 1.25),
    ("decode 1 in bytes", "int4", ["llama-q4_0"], 1.4),
    ("decode 8 in bytes", "int8", ["ctranslate2-int8"], 3.0),
    ("prefill 512 all in bytes", "int8", ["ctranslate2-int8"], 1.5),
    ("prefill 512 in bytes", "int8", ["llama-q8_0"], 2.0),
    ("prefill 512 in bytes", "int4", ["llama-q4_0"], None),
    ("decode 1", "f32", ["transformers-float32"], None),
    ("decode 1", "bf16", ["transformers-bfloat16"], None),
    ("prefill 512 all", "f32", ["transformers-float32", "ctranslate2-float32"], None),
    ("prefill 512 all", "bf16", ["transformers-bfloat16"], None),
]

root = pathlib.Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("dir", type=pathlib.Path)
parser.add_argument("--peers", type=pathlib.Path, default=root.parent / "shared/peers")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--only", default=",".join(KINDS))
parser.add_argument("--json", type=pathlib.Path, help="write every figure of every round here")
options = parser.parse_args()
if not (options.peers / "run.sh").exists():
    sys.exit(f"{options.peers}: expected the peers' scripts run.sh and llama.sh there (--peers)")


def lines(*command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, cwd=root)
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def ours(kind):
    model, weights = options.dir / "opt-125m-random", ["--dtype", kind]
    if kind not in ("f32", "bf16"):
        # From a file of ours, as a user has it.
        model, weights = options.dir / f"opt-125m-random-{kind}", []
        if not model.exists():
            quantize = [root / "target/release/opt", "quantize", "--model", options.dir / "opt-125m-random"]
            subprocess.run([*quantize, "--method", "rtn", "--format", kind, "--output", model, "--quiet"], check=True)
    opt = [root / "target/release/opt", "bench", "--model", model, "--json", "--quiet", *weights]
    computes = {"": [], " in bytes": ["--compute", "int8"]} if kind in ("int8", "int4") else {"": []}
    figures = {}
    for suffix, compute in computes.items():
        (found,) = lines(*opt, *compute, "--prompt-tokens", "128,512", "--batch", "1,8")
        (whole,) = lines(*opt, *compute, "--prompt-tokens", "512", "--batch", "1", "--gen-tokens", "1", "--all-logits")
        figures |= {f"decode {row['batch']}{suffix}": row["tok_s"] for row in found["decode"]}
        figures |= {f"prefill {row['tokens']}{suffix}": row["tok_s"] for row in found["prefill"]}
        figures |= {f"prefill {row['tokens']} all{suffix}": row["tok_s"] for row in whole["prefill"]}
    # A process from its start to its end, with one token in between; and the memory of one that makes 64.
    started = time.perf_counter()
    one = [root / "target/release/opt", "generate", "--model", model, *weights, "--quiet", "--max-new-tokens", "1", "The"]
    subprocess.run(one, check=True, stdout=subprocess.DEVNULL)
    figures["first token s"] = time.perf_counter() - started
    (small,) = lines(*opt, "--prompt-tokens", "32", "--batch", "1", "--gen-tokens", "64")
    return figures | {"peak MB": small["peak_rss_mb"] * 2**20 / 1e6}


def peer(name):
    if name.startswith("llama-"):
        names = {"pp128": "prefill 128", "pp512": "prefill 512", "tg64": "decode 1"}
        rows = lines("bash", options.peers / "llama.sh", options.dir, name.removeprefix("llama-"))
        return {names[row["test"]]: row["tok_s"] for row in rows}
    rows = lines("bash", options.peers / "run.sh", options.dir, name)
    decode = {f"decode {row['decode_batch']}": row["tok_s"] for row in rows if "decode_batch" in row}
    return decode | {f"prefill {row['prefill']} all": row["tok_s"] for row in rows if "prefill" in row}


subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "opt-cli"], check=True, cwd=root)
subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "opt-benches", "--bin", "bandwidth"], check=True, cwd=root)
kinds = [kind for kind in KINDS if kind in options.only.split(",")]
rounds = []
for number in range(options.rounds):
    figures = {}
    (limit,) = lines(root / "target/release/bandwidth")
    figures["bandwidth"] = limit
    for kind in kinds:
        programs = [("ours-" + kind, lambda: ours(kind))] + [(name, lambda name=name: peer(name)) for name in KINDS[kind]]
        for name, run in programs if number % 2 == 0 else reversed(programs):
            figures[name] = run()
            print(f"round {number + 1}: {name}: {figures[name]}", file=sys.stderr, flush=True)
    rounds.append(figures)
if options.json:
    options.json.write_text(json.dumps(rounds, indent=1))

median = statistics.median
gbs = median(figures["bandwidth"]["gb_s"] for figures in rounds)
model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
print(f"{model}, {rounds[0]['bandwidth']['threads']} threads, memory read at {gbs:.1f} GB/s; {len(rounds)} rounds\n")
print("| | ours | theirs | ratio (median of rounds; all) | asked | 0.88 of the bandwidth limit | |")
print("|---|---|---|---|---|---|---|")
for what, kind, peers, asked in ROWS:
    if kind not in kinds:
        continue
    best = [max(figures[name][what.removesuffix(" in bytes")] for name in peers) for figures in rounds]
    mine = [figures["ours-" + kind][what] for figures in rounds]
    ratios = sorted(m / b for m, b in zip(mine, best))
    bound = 0.88 * gbs * 1e9 / BYTES[kind] if what.startswith("decode 1") else float("inf")
    limit = f"{bound:.0f}" if what.startswith("decode 1") else ""
    reached = asked is None or median(ratios) >= asked or median(mine) >= bound
    every = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"| {what}, {kind}, beside {' and '.join(peers)} | {median(mine):.0f} | {median(best):.0f} "
          f"| {median(ratios):.2f} ({every}) | {asked or ''} | {limit} | {'' if reached else 'not reached'} |")
print()
for kind in kinds:
    first = median(figures["ours-" + kind]["first token s"] for figures in rounds)
    peak = median(figures["ours-" + kind]["peak MB"] for figures in rounds)
    print(f"{kind}: {first:.2f} s from start to the end of a process that makes one token, {peak:.0f} MB at most")
