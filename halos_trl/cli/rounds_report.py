"""The results of rounds: a table, and a plot if matplotlib is installed."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def write_report(folder: Path, rounds: Sequence[dict[str, Any]]) -> None:
    """Write `rounds.json` and `rounds.csv`, and `rounds.png`, accuracy or mean score per round."""
    (folder / "rounds.json").write_text(json.dumps(list(rounds), indent=1) + "\n", "utf-8")
    names = list(dict.fromkeys(name for metrics in rounds for name in metrics))
    with (folder / "rounds.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rounds)
    print(f"Metrics of {len(rounds) - 1} rounds: {folder / 'rounds.json'}, {folder / 'rounds.csv'}")
    if not find_spec("matplotlib"):
        print(
            "No plot was drawn, because matplotlib is not installed. Install it with `pip install halos_trl[plots]`."
        )
        return
    accuracy = "accuracy" in rounds[0]
    name = "accuracy" if accuracy else "mean_score"
    label = "accuracy on held-out prompts" if accuracy else "mean score of the samples"
    points = [(metrics["round"], metrics[name]) for metrics in rounds if name in metrics]
    draw(folder / "rounds.png", {"": points}, label)
    print(f"Plot: {folder / 'rounds.png'}")


def draw(path: Path, lines: dict[str, list[tuple[int, float]]], label: str) -> None:
    """Plot values per round: one line per name, with `label` on the vertical axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name or None)
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend()
    figure.savefig(path)


__all__ = ["draw", "write_report"]
