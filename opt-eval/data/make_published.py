"""Published scores of the OPT models: published.json.

    python make_published.py FOLDER

FOLDER holds opt-125m.json .. opt-66b.json of EleutherAI/pythia, evals/opt. Only Python is needed. Numbers are rounded to
six significant digits. The scores of the Open LLM Leaderboard (its first version) stand below as the models' cards on
the hub give them.
"""

import json
import math
import re
import sys
from pathlib import Path

SIZES = ["125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b"]

# Percent, in the order of LEADERBOARD_TASKS.
LEADERBOARD = {
    "opt-125m": [22.87, 31.47, 26.02, 42.87, 51.62, 0.08],
    "opt-350m": [23.55, 36.73, 26.02, 40.83, 52.64, 0.30],
    "opt-1.3b": [29.52, 54.53, 24.96, 38.71, 59.75, 0.15],
    "opt-2.7b": [33.96, 61.43, 25.43, 37.43, 61.96, 0.23],
    "opt-30b": [43.26, 74.07, 26.66, 35.16, 70.64, 1.14],
    "opt-66b": [46.33, 76.25, 26.99, 35.43, 70.01, 1.14],
    "opt-iml-max-1.3b": [30.72, 53.81, 27.61, 38.34, 60.22, 0.53],
}
# Task and metric as lm-evaluation-harness 0.4 names them, and shots.
LEADERBOARD_TASKS = [
    ("arc_challenge", "acc_norm", 25),
    ("hellaswag", "acc_norm", 10),
    ("mmlu", "acc", 5),
    ("truthfulqa_mc2", "acc", 0),
    ("winogrande", "acc", 5),
    ("gsm8k", "exact_match", 5),
]

METRICS = {"ppl": "perplexity"}


def rounded(number):
    return float(f"{number:.6g}")


def task_name(name):
    return re.sub(r"^hendrycksTest-", "mmlu_", name)


def pythia(folder):
    scores = {}
    for size in SIZES:
        file = json.loads((folder / f"opt-{size}.json").read_text())
        assert file["config"]["num_fewshot"] == 0 and file["config"]["limit"] is None
        assert not any(file["versions"].values())
        tasks = {}
        for task, metrics in sorted(file["results"].items()):
            of = tasks[task_name(task)] = {}
            for metric in [m for m in metrics if not m.endswith("_stderr")]:
                of[METRICS.get(metric, metric)] = [0, rounded(metrics[metric]), rounded(metrics[f"{metric}_stderr"])]
        subjects = [m for task, m in file["results"].items() if task.startswith("hendrycksTest-")]
        assert len(subjects) == 57
        mean = sum(m["acc"] for m in subjects) / 57
        stderr = math.sqrt(sum(m["acc_stderr"] ** 2 for m in subjects)) / 57
        tasks["mmlu"] = {"acc": [0, rounded(mean), rounded(stderr)]}
        scores[f"opt-{size}"] = tasks
    return scores


def leaderboard():
    return {
        model: {
            task: {metric: [shots, rounded(value / 100), None]}
            for (task, metric, shots), value in zip(LEADERBOARD_TASKS, values, strict=True)
        }
        for model, values in LEADERBOARD.items()
    }


def main():
    folder = Path(sys.argv[1])
    sources = [
        {
            "name": "EleutherAI/pythia evals",
            "url": "https://github.com/EleutherAI/pythia/tree/main/evals/opt",
            "harness": "0.3",
            "bos": "without",
            "differs": {
                "mmlu": "an older prompt (hendrycksTest version 0)",
            },
            "macro": ["mmlu"],
            "scores": pythia(folder),
        },
        {
            "name": "Open LLM Leaderboard v1",
            "url": "https://huggingface.co/docs/leaderboards/open_llm_leaderboard/archive",
            "harness": "0.3 (b281b09)",
            "bos": "without",
            "differs": {},
            "macro": ["mmlu"],
            "scores": leaderboard(),
        },
    ]
    text = json.dumps({"sources": sources}, separators=(",", ":"))
    # A line for each model.
    text = re.sub(r'("opt-[^"]*":)', r"\n\1", text)
    (Path(__file__).parent / "published.json").write_text(text + "\n")


main()
