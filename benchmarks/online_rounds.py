"""Online rounds compared with one offline pass over the same number of examples, on the embedded task: held-out
accuracy per seed.

    OMP_NUM_THREADS=1 python benchmarks/online_rounds.py                      # KTO, eight rounds, three seeds
    OMP_NUM_THREADS=1 python benchmarks/online_rounds.py --method dpo --set samples_per_prompt=4

Offline is a single round with the prompts of all rounds: the same prompts, samples, optimizer steps and schedule, but
all samples are from the initial model. A seed determines the model, the prompts, the samples and the training order.
Prints a Markdown table; `--output` appends a JSON line per run, `--picture` plots the accuracy after each round.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import datasets

from halos_trl.cli.rounds import read_run, run_rounds
from halos_trl.cli.rounds_flags import EMBEDDED
from halos_trl.cli.rounds_report import draw


def run(method, seed, rounds, total_prompts, settings):
    """The accuracy before training and after each round."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "output_dir": folder, "seed": seed, "rounds": rounds, "prompts_per_round": total_prompts // rounds,
            "disable_tqdm": True, "logging_steps": 10_000, **settings,
        }  # fmt: skip
        begun = time.perf_counter()
        found = run_rounds(
            read_run(method, [word for name, value in flags.items() for word in (f"--{name}", str(value))])
        )
    return {
        "method": method, "seed": seed, "rounds": rounds, "accuracy": [metrics["accuracy"] for metrics in found],
        "rows": sum(metrics.get("rows", 0) for metrics in found), "steps": found[-1]["total_steps"],
        "seconds": round(time.perf_counter() - begun),
    }  # fmt: skip


def table(runs):
    """Markdown: the mean over seeds, and each seed."""
    lines = ["| | examples | steps | before | after | per seed |", "|---|---|---|---|---|---|"]
    for rounds in sorted({run["rounds"] for run in runs}):
        own = [run for run in runs if run["rounds"] == rounds]
        before, after = (statistics.mean(run["accuracy"][i] for run in own) for i in (0, -1))
        name = "one offline pass" if rounds == 1 else f"{rounds} rounds"
        seeds = ", ".join(f"{run['accuracy'][-1]:.3f}" for run in own)
        rows, steps = ("-".join(sorted({str(run[key]) for run in own})) for key in ("rows", "steps"))
        lines.append(f"| {name} | {rows} | {steps} | {before:.3f} | {after:.3f} | {seeds} |")
    return "\n".join(lines)


def picture(runs, path):
    """Plot the accuracy after each round of all online runs, and that of the offline runs."""
    lines = {}
    for run in sorted(runs, key=lambda run: (-run["rounds"], run["seed"])):
        last = max(other["rounds"] for other in runs)
        name = f"{'offline' if run['rounds'] == 1 else 'rounds'}, seed {run['seed']}"
        numbers = range(last + 1) if run["rounds"] == last else (0, last)
        lines[name] = list(zip(numbers, run["accuracy"], strict=True))
    draw(path, lines, "accuracy on held-out prompts")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="kto")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=EMBEDDED["rounds"])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of both, e.g. beta=0.3")
    parser.add_argument("--output", type=Path, help="append a JSON line per run to this file; runs in it are kept")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    settings = dict(pair.split("=", 1) for pair in options.set)
    total = options.rounds * EMBEDDED["prompts_per_round"]
    runs = []
    if options.output and options.output.exists():
        runs = [json.loads(line) for line in options.output.read_text().splitlines()]
    for seed in options.seeds:
        for rounds in (options.rounds, 1):
            if any((found["seed"], found["rounds"]) == (seed, rounds) for found in runs):
                continue
            runs.append(run(options.method, seed, rounds, total, settings))
            print(json.dumps(runs[-1]), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    print(table(runs))
    if options.picture:
        picture(runs, options.picture)


if __name__ == "__main__":
    main()
