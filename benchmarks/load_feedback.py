"""Time and memory of `load_feedback` on generated files of feedback, by number of items.

    python benchmarks/load_feedback.py
    python benchmarks/load_feedback.py --items 10000 20000 --format scalar_feedback --for_ group

Each file is a JSON array as written by HALOs, with four completions per prompt, spread over the file. A separate
process loads it into a new cache. Its peak resident memory is reported by the operating system (`ru_maxrss`) and
includes Python, torch and the other libraries ("before": after the imports).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS = [f"word{i}" for i in range(1000)]
COMPLETIONS = 4


def items(count: int, form: str) -> Iterator[dict[str, Any]]:
    """Items of prompts with a few dozen words, in an order in which the items of a prompt are far apart."""
    prompts = -(-count // COMPLETIONS)
    draws = random.Random(0)
    for i in range(count):
        prompt, sample = i % prompts, i // prompts
        words = random.Random(prompt).choices(WORDS, k=20)
        turns = [{"role": "user", "content": f"{prompt} {' '.join(words)}"}]
        item: dict[str, Any] = {"prompt_id": prompt, "prompt": turns, "type": form}
        texts = [f"{sample} {side} {' '.join(draws.choices(WORDS, k=40))}" for side in "AB"]
        outputs = [[{"role": "assistant", "content": text}] for text in texts]
        score = draws.gauss(0, 1)
        if form == "pairwise_feedback":
            sides = {"output_A": outputs[0], "output_B": outputs[1], "reward_A": score, "reward_B": -score}
            yield item | sides | {"label": int(score > 0)}
        else:
            label = {"label": int(score > 0)} if form == "binary_feedback" else {}
            yield item | {"sample_id": sample, "output": outputs[0], "reward": score} | label


def write(path: Path, count: int, form: str) -> None:
    with path.open("w") as file:
        for i, item in enumerate(items(count, form)):
            file.write("[\n" if i == 0 else ",\n")
            json.dump(item, file, indent=2)
        file.write("\n]")


def load(path: str, for_: str, cache: str) -> None:
    """Runs in the measured process."""
    from halos_trl import load_feedback

    before = peak()
    start, cpu = time.perf_counter(), time.process_time()
    rows = load_feedback(path, for_, cache_dir=cache)  # type: ignore[arg-type]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"rows": len(rows), "seconds": seconds, "cpu": cpu, "before": before, "peak": peak()}))


def peak() -> float:
    """Peak resident memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    parser.add_argument("--format", default="binary_feedback", help="the `type` of the items")
    parser.add_argument("--for_", default="unpaired", help="the type of rows that `load_feedback` returns")
    args = parser.parse_args()
    print("| items | file, MB | rows | seconds | CPU seconds | items per CPU second | GB before | GB at peak |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for count in args.items:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "feedback.json"
            write(path, count, args.format)
            call = [sys.executable, __file__, "--load", str(path), args.for_, str(Path(folder) / "cache")]
            found = json.loads(subprocess.run(call, stdout=subprocess.PIPE, check=True, text=True).stdout)
            print(
                f"| {count:,} | {path.stat().st_size / 1e6:.0f} | {found['rows']:,} | {found['seconds']:.1f} "
                f"| {found['cpu']:.1f} | {count / found['cpu']:,.0f} | {found['before']:.2f} | {found['peak']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(*sys.argv[2:])
    else:
        main()
