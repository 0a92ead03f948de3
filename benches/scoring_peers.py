"""Scoring of choices beside transformers, in turns: HellaSwag rows on the OPT-125m shape, all cores.

    python3 benches/scoring_peers.py DIR DATA [--rounds N] [--rows N] [--batch N]

DIR has `bin/python` (torch 2.13, transformers 4.57.6) and `opt-125m-random`, a checkpoint of that shape with random weights
and OPT's tokenizer; DATA is a folder with hellaswag_val.jsonl. `cargo build --release -p opt-cli` first. The peer scores as
lm-evaluation-harness does: requests sorted by length, padded, one row of logits for each token. Prints questions per second
of each (loading and reading not counted), the ratio, and the largest difference of a log-likelihood.
"""
import argparse, json, statistics, subprocess, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPT = ROOT / "target/release/opt"

PEER = """
import json, sys, time, torch
import torch.nn.functional as F
from transformers import AutoTokenizer, OPTForCausalLM
path, samples, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(path)
model = OPTForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
pairs = json.load(open(samples))
start = time.perf_counter()
requests = []
for context, continuation in pairs:
    kept = context.rstrip()
    before = tokenizer(kept).input_ids
    whole = tokenizer(context + continuation).input_ids
    requests.append((before, whole[len(before):]))
order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0] + requests[i][1]))
found = [0.0] * len(requests)
with torch.no_grad():
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        inputs = [torch.tensor((requests[i][0] + requests[i][1])[:-1]) for i in some]
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        logits = F.log_softmax(model(padded).logits, dim=-1)
        for i, row, tokens in zip(some, logits, inputs):
            target = torch.tensor(requests[i][1])
            part = row[len(tokens) - len(target) : len(tokens)]
            found[i] = part.gather(1, target[:, None]).sum().item()
print(json.dumps({"seconds": time.perf_counter() - start, "found": found}))
"""


def ours(directory, data, rows, folder):
    output = folder / "out.json"
    subprocess.run([OPT, "eval", "--tasks", "hellaswag", "--data", data, "--limit", str(rows), "--model",
                    directory / "opt-125m-random", "--output", output, "--log-samples", "--quiet", "--json"],
                   check=True, stdout=subprocess.DEVNULL)
    samples = [json.loads(line) for line in (folder / "samples_hellaswag_out.jsonl").open()]
    pairs, found = [], []
    for sample in samples:
        pairs += [tuple(sample["arguments"][f"gen_args_{i}"][f"arg_{j}"] for j in (0, 1)) for i in range(4)]
        found += [float(one[0][0]) for one in sample["resps"]]
    return float(json.loads(output.read_text())["total_evaluation_time_seconds"]), pairs, found


def peer(directory, pairs, batch, folder):
    samples = folder / "pairs.json"
    samples.write_text(json.dumps(pairs))
    ran = subprocess.run([directory / "bin/python", "-c", PEER, directory / "opt-125m-random", samples, str(batch)],
                         capture_output=True, text=True, check=True)
    said = json.loads(ran.stdout.splitlines()[-1])
    return said["seconds"], said["found"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    rates, worst = ([], []), 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(args.rounds):
            seconds, pairs, found = ours(args.directory, args.data, args.rows, folder)
            theirs, expected = peer(args.directory, pairs, args.batch, folder)
            rates[0].append(args.rows / seconds)
            rates[1].append(args.rows / theirs)
            worst = max([worst, *(abs(a - b) / max(1.0, abs(b) / 50) for a, b in zip(found, expected))])
            print(f"ours {rates[0][-1]:.2f}, transformers {rates[1][-1]:.2f} questions/s", flush=True)
    ratios = [a / b for a, b in zip(*rates)]
    print(f"| HellaSwag, {args.rows} rows, f32 | {statistics.median(rates[0]):.2f} | {statistics.median(rates[1]):.2f} | "
          f"{statistics.median(ratios):.2f} | {worst:.1e} |")


if __name__ == "__main__":
    main()
