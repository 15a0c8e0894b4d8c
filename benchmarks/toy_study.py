"""Held-out accuracy of the embedded task before and after alignment, per method and seed.

    python benchmarks/toy_study.py                                  # every method, three seeds
    python benchmarks/toy_study.py --methods kto dpo --humanline    # the same with humanline

A seed determines the supervised model, the feedback sampled from it, and the training order. The settings are those of
`examples/train_<method>.py` run without arguments. Prints a row per run and a Markdown table; `--output` appends the
rows as JSON Lines.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path

import datasets

import halos_trl
from halos_trl import cli, toy

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# method -> (trainer, config, feedback)
METHODS = {
    "kto": ("KTOTrainer", "KTOConfig", "unpaired"),
    "dpo": ("DPOTrainer", "DPOConfig", "paired"),
    "cdpo": ("CDPOTrainer", "CDPOConfig", "paired"),
    "ipo": ("IPOTrainer", "IPOConfig", "paired"),
    "simpo": ("SimPOTrainer", "SimPOConfig", "paired"),
    "slic": ("SLiCTrainer", "SLiCConfig", "paired"),
    "grpo": ("GRPOTrainer", "GRPOConfig", "scored"),
    "ppo": ("PPOTrainer", "PPOConfig", "scored"),
}


def toy_settings(method, humanline):
    """The settings that the method's example uses on the embedded task."""
    spec = importlib.util.spec_from_file_location(method, EXAMPLES / f"train_{method}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    under_humanline = getattr(module, "TOY_HUMANLINE", {}) | {"humanline": True} if humanline else {}
    return cli.TOY_DEFAULTS | module.TOY | under_humanline


def run(method, seed, *, humanline=False, overrides=None):
    """Run one alignment, and return a row with its results."""
    trainer_name, config_name, kind = METHODS[method]
    data = toy.load_feedback_data(kind, seed=seed, progress=False)
    settings = toy_settings(method, humanline) | {"seed": seed, "disable_tqdm": True, "logging_steps": 10_000}
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(halos_trl, config_name)(**(settings | {"output_dir": folder} | (overrides or {})))
        trainer = getattr(halos_trl, trainer_name)(
            toy.load_model_path(seed=seed, progress=False), args=args, train_dataset=data["train"]
        )
        before = toy.accuracy(trainer.model, trainer.processing_class)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = toy.accuracy(trainer.model, trainer.processing_class)
    return {
        "method": method, "humanline": humanline, "seed": seed, "before": before, "after": after, "seconds": seconds,
    }  # fmt: skip


def table(rows):
    """Markdown: mean over seeds, and each seed's pair."""
    lines = [
        "| method | humanline | before | after | gain (points) | per seed | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["method"], row["humanline"]) for row in rows):
        own = [row for row in rows if (row["method"], row["humanline"]) == key]
        before, after, seconds = (statistics.mean(row[name] for row in own) for name in ("before", "after", "seconds"))
        seeds = ", ".join(f"{row['before']:.3f} -> {row['after']:.3f}" for row in own)
        lines.append(
            f"| {key[0]} | {'yes' if key[1] else 'no'} | {before:.3f} | {after:.3f} | {100 * (after - before):+.1f} "
            f"| {seeds} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--humanline", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="override settings, e.g. beta=0.3")
    parser.add_argument("--output", type=Path, help="append the rows to this file, one JSON object per line")
    parser.add_argument("--table", type=Path, help="only print the table of the rows in such a file")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    overrides = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in options.set)}
    datasets.disable_progress_bars()
    rows = []
    for method in options.methods:
        for seed in options.seeds:
            row = run(method, seed, humanline=options.humanline, overrides=overrides)
            print(json.dumps(row), flush=True)
            rows.append(row)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
