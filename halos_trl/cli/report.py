"""`halos-trl report RUN_DIR [RUN_DIR ...]`: an HTML report on a run, or a comparison of several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..report.page import page
from ..report.panels import panels_of
from ..report.pictures import as_png, as_svg, check_matplotlib, draw
from ..report.runs import Run, read_runs


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    flags = _parser().parse_args(argv)
    runs = read_runs(flags.run_dir)
    default = Path(flags.run_dir[0]) / ("report.html" if len(runs) == 1 else "comparison.html")
    output = Path(flags.output or default)
    for path in write_report(runs, output, png=flags.png):
        print(path)


def write_report(runs: Sequence[Run], output: Path, *, png: bool = False) -> list[Path]:
    """Write the report to `output`, and with `png` each chart as PNG next to it. Returns the paths.

    Raises ValueError if matplotlib is missing.
    """
    check_matplotlib()
    figures = {panel.key: draw(panel, runs) for panel in panels_of(runs)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs, {key: as_svg(figure) for key, figure in figures.items()}), "utf-8")
    written = [output]
    for key, figure in figures.items() if png else ():
        path = output.with_name(f"{output.stem}-{key}.png")
        path.write_bytes(as_png(figure))
        written.append(path)
    return written


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="halos-trl report",
        description="Write an HTML report on a run: findings, settings, data, charts, samples, final values. With "
        "several runs, compare them.",
    )
    parser.add_argument(
        "run_dir", nargs="+", metavar="RUN_DIR", help="The `output_dir` of a run, or a checkpoint of it."
    )
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="Defaults to `report.html` in the run's folder (`comparison.html` in the first).",
    )
    parser.add_argument("--png", action="store_true", help="Also write each chart as PNG next to the report.")
    return parser


__all__ = ["main", "write_report"]
