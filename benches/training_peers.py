"""Training speed and memory beside torch and PEFT, in turns: OPT-125m shape, 4 x 128 tokens, all cores.

    python3 benches/training_peers.py DIR [--rounds N] [--only "full f32,LoRA f32"]

DIR has `bin/python` (torch 2.13, transformers 4.57.6, peft 0.21.2) and `opt-125m-random`, a checkpoint of that shape with
random weights and a tokenizer. `cargo build --release -p opt-cli` first. Prints medians and ratios of tokens per second, and
the largest peak of resident memory.
"""
import argparse, json, os, statistics, subprocess, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPT = ROOT / "target/release/opt"
STEPS = 6  # the first is not counted

PEER = """
import json, resource, sys, time, torch
from transformers import OPTForCausalLM
mode, path, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
model = OPTForCausalLM.from_pretrained(path, dtype=torch.float32).train()
if mode == "lora":
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
ids = torch.randint(4, 50000, (4, 128))
times = []
for _ in range(steps):
    start = time.perf_counter()
    opt.zero_grad(); model(input_ids=ids, labels=ids).loss.backward(); opt.step()
    times.append(time.perf_counter() - start)
rate = ids.numel() / sorted(times[1:])[len(times[1:]) // 2]
print(json.dumps({"tok_s": rate, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""

# name: (the peer's mode, our flags)
CASES = {
    "full f32": ("full", ["full"]),
    "LoRA f32": ("lora", ["lora"]),
    "LoRA bf16": ("lora", ["lora", "--dtype", "bf16"]),
    "QLoRA int8": ("lora", ["lora", "--quantize", "int8"]),
    "tch full f32": ("full", ["full", "--backend", "tch"]),
    "tch LoRA f32": ("lora", ["lora", "--backend", "tch"]),
}


def peer(mode, directory):
    ran = subprocess.run([directory / "bin/python", "-c", PEER, mode, directory / "opt-125m-random", str(STEPS)],
                         capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def ours(flags, directory):
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        line = lambda i: json.dumps({"ids": [4 + (i * 7919 + j * 104729) % 49990 for j in range(128)]})
        data.write_text("\n".join(map(line, range(4 * STEPS))) + "\n")
        command = [OPT, "tune", *flags, "--model", directory / "opt-125m-random", "--data", data, "--output",
                   Path(folder) / "out", "--batch-size", "4", "--max-steps", str(STEPS), "--seq-len", "128",
                   "--clip", "0", "--save-steps", "1000", "--json", "--quiet"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines = [json.loads(line) for line in process.stdout if line.startswith("{")]
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(map(str, command))}: {errors}")
        rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:]
        return {"tok_s": statistics.median(rates), "mb": usage.ru_maxrss / 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="names, comma-separated: " + ", ".join(CASES))
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(CASES)
    if unknown := [name for name in wanted if name not in CASES]:
        parser.error(f"--only: expected some of {', '.join(CASES)}, found {unknown[0]}")
    cases = {name: CASES[name] for name in wanted}
    found = {name: ([], []) for name in cases}
    for _ in range(args.rounds):
        for name, (mode, flags) in cases.items():
            found[name][0].append(peer(mode, args.directory))
            found[name][1].append(ours(flags, args.directory))
    print("| | peer, tokens/s | ours | ratio | peer, peak MB | ours |\n|---|---|---|---|---|---|")
    for name, (theirs, mine) in found.items():
        rate = [statistics.median(run["tok_s"] for run in runs) for runs in (theirs, mine)]
        peak = [max(run["mb"] for run in runs) for runs in (theirs, mine)]
        print(f"| {name} | {rate[0]:.0f} | {rate[1]:.0f} | {rate[1] / rate[0]:.2f} | {peak[0]:.0f} | {peak[1]:.0f} |")


if __name__ == "__main__":
    main()
