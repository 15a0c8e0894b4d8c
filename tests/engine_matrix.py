"""Every method on every engine, in two CPU processes: training, evaluation, saving, loading, resuming.

    python tests/engine_matrix.py                                   # all cells, then the table in docs/scaling.md
    python tests/engine_matrix.py --engines zero2 --only PPO.full   # a part; prints and writes nothing

A cell passes where weights and logged numbers are those of one process (to 1e-6 and 1e-5), what was saved loads as the
trained weights, and a run that was resumed from its checkpoint ends in the same weights. Results are written to
benchmarks/results/engine_matrix.jsonl. `--out FOLDER` keeps what was run, and goes on from there.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from engine_cells import METHODS, STEPS, names, scorer
from launch import ENGINES, engine_command
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from halos_trl import toy
from halos_trl.value_head import NAME as VALUE_HEAD
from halos_trl.value_head import VALUE_HEAD_FILE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "engine_matrix.jsonl"
PAGE = ROOT / "docs" / "scaling.md"
MARKS = ("<!-- engine matrix: written by tests/engine_matrix.py -->", "<!-- end of the engine matrix -->")
TITLES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
WEIGHTS, RESUMED = 1e-6, 1e-6
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed")


# -- running -------------------------------------------------------------------------------------------------------


def result_file(folder, name):
    return folder / f"{name.replace('/', '-')}.pt"


def run_cells(folder, cells, engine=None):
    """Run the cells that have no result yet. If a launch dies, its current cell counts as failed."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [name for name in cells if not result_file(folder, name).exists()]
    while todo:
        listed = folder / "cells.json"
        listed.write_text(json.dumps(todo))
        command, environment = engine_command(Path(__file__).with_name("engine_cells.py"), [folder, listed], engine)
        log = folder / "log.txt"
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        todo = [name for name in todo if not result_file(folder, name).exists()]
        if todo and done.returncode == 0:
            raise RuntimeError(f"{engine}: the launch ended without {todo[0]}")
        if todo:
            torch.save({"failed": log.read_text()[-6000:], "seconds": 0.0}, result_file(folder, todo.pop(0)))


# -- comparing -----------------------------------------------------------------------------------------------------


def difference(some, others):
    """The largest one between tensors of the same names."""
    assert some.keys() == others.keys(), sorted(some.keys() ^ others.keys())[:4]
    return max((some[name] - others[name]).abs().max().item() for name in some)


def unequal_numbers(some, others):
    """Names of logged numbers that differ."""
    if some.keys() != others.keys():
        return sorted(some.keys() ^ others.keys())
    return [n for n in some if not math.isclose(some[n], others[n], rel_tol=1e-5, abs_tol=5e-6)]


def loaded(name, folder):
    """The tensors of a saved model, as a user gets them."""
    method, adapter = name.split("/")[:2]
    model_class = AutoModelForSequenceClassification if method == "BradleyTerry" else AutoModelForCausalLM
    if adapter == "full":
        model = model_class.from_pretrained(folder)
    else:
        base = toy.tiny_model(toy.build_tokenizer())
        model = PeftModel.from_pretrained(scorer(base) if method == "BradleyTerry" else base, folder)
    tensors = dict(model.named_parameters())
    if method == "PPO":
        before = "base_model.model." if adapter == "lora" else ""
        tensors |= {f"{before}{VALUE_HEAD}.{n}": t for n, t in load_file(folder / VALUE_HEAD_FILE).items()}
    return tensors


def judged(name, engine, one, two, folder):
    """A row of the results."""
    row = {"cell": name, "engine": engine, "seconds": round(two["seconds"], 1)}
    for verdict in ("failed", "refused"):
        if verdict in two or verdict in one:
            return row | {"verdict": verdict, "why": two.get(verdict) or f"in one process: {one[verdict]}"}
    policy = {n: t for n, t in two["weights"].items() if ".ref." not in n}
    row["weights"] = difference(two["weights"], one["weights"])
    row["reloaded"] = difference({n: t.detach() for n, t in loaded(name, folder).items()}, policy)
    row["resumed"] = difference(two["resumed"], two["weights"])
    pairs = [*zip(one["logs"], two["logs"], strict=True), (one["evaluated"], two["evaluated"])]
    unequal = sorted({metric for some, others in pairs for metric in unequal_numbers(some, others)})
    good = row["weights"] <= WEIGHTS and row["reloaded"] == 0 and row["resumed"] <= RESUMED and not unequal
    good = good and two["processes"] == 2 and len(two["logs"]) == STEPS and two["moved"] > 1e-4
    return row | {"verdict": "passed" if good else "differs"} | ({"unequal": unequal} if unequal else {})


# -- reporting -----------------------------------------------------------------------------------------------------


def about(rows):
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "minutes": round(sum(row["seconds"] for row in rows) / 60),
        "versions": versions,
    }


def summary(rows):
    """A table entry for some cells: how many passed, and the largest difference of their weights."""
    passed = [row for row in rows if row["verdict"] == "passed"]
    text = f"{len(passed)} of {len(rows)}"
    if passed:
        text += f", {max(row['weights'] for row in passed):.0e}"
    return text


def table(header, rows):
    engines = [engine for engine in ENGINES if any(row["engine"] == engine for row in rows)]
    passed = sum(row["verdict"] == "passed" for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [
        f"{passed} of {len(rows)} cells pass ({header['date']}; {versions}; {header['minutes']} minutes).",
        "",
        "| cells that pass, largest difference of a weight | " + " | ".join(TITLES[e] for e in engines) + " |",
        "|---" * (len(engines) + 1) + "|",
    ]
    for method in METHODS:
        of = [[r for r in rows if r["engine"] == e and r["cell"].split("/")[0] == method] for e in engines]
        if any(of):
            lines.append(f"| {method} | " + " | ".join(summary(cells) if cells else "" for cells in of) + " |")
    for row in rows:
        if row["verdict"] != "passed":
            why = row.get("why") or json.dumps(
                {k: v for k, v in row.items() if k not in ("cell", "engine", "seconds")}
            )
            lines.append(f"\n{TITLES[row['engine']]}, {row['cell']}: {row['verdict']}. {why.splitlines()[-1]}")
    return "\n".join(lines)


def write(header, rows):
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]))
    page = PAGE.read_text()
    inside = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    assert inside.search(page), f"{PAGE} has no {MARKS[0]}"
    PAGE.write_text(inside.sub(lambda _: f"{MARKS[0]}\n{table(header, rows)}\n{MARKS[1]}", page))


def matrix(out, cells, engines):
    run_cells(out / "one", cells)
    rows = []
    for engine in engines:
        run_cells(out / engine, cells, engine)
        for name in cells:
            one, two = (torch.load(result_file(out / kind, name), weights_only=False) for kind in ("one", engine))
            saved = out / engine / name.replace("/", "-") / "saved"
            rows.append(judged(name, engine, one, two, saved))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--only", default="", help="cells in whose name this regular expression is found")
    parser.add_argument("--out", type=Path, help="folder of the runs; what lies there is not run again")
    options = parser.parse_args(argv)
    cells = [name for name in names() if re.search(options.only, name)]
    rows = matrix(options.out or Path(tempfile.mkdtemp()), cells, options.engines)
    header = about(rows)
    if options.engines == ENGINES and not options.only:
        write(header, rows)
    print(table(header, rows))
    return sum(row["verdict"] not in ("passed", "refused") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
