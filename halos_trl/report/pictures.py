"""The charts of a report, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from .panels import Panel, series, thinned
from .runs import Run, Series

_INK, _GREY = "#1f2933", "#8a94a0"
_SIDES = {"chosen": "#2166ac", "rejected": "#d6604d"}
_RUNS = ("#2166ac", "#d6604d", "#1b7837", "#9970ab", "#b8860b", "#35978f", "#c51b7d", "#5e4fa2")
_STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "halos_trl",
}


def check_matplotlib() -> None:
    """Raise ValueError with installation advice if matplotlib is missing."""
    if not find_spec("matplotlib"):
        raise ValueError(
            "The charts need matplotlib, which is not installed. Install it with `pip install matplotlib`, or "
            "together with this package: `pip install halos_trl[plots]`."
        )


def draw(panel: Panel, runs: Sequence[Run]) -> Any:
    """The figure of a panel: the metrics of one run, or one metric of several runs. Evaluation lines are dashed."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for metric, label in panel.metrics.items():
            for number, run in enumerate(runs):
                colour = _RUNS[number % len(_RUNS)] if len(runs) > 1 else _SIDES.get(label, _RUNS[0])
                name = run.name if len(runs) > 1 else label
                _line(axes, series(run, metric), colour, name or "training", dashed=False)
                _line(axes, series(run, f"eval_{metric}"), colour, f"{name}, evaluation" if name else "evaluation")
        _limits(axes, panel, runs)
        axes.set_title(panel.title)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        _scale(axes, panel)
        _legend(axes)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure


def _line(axes: Any, values: Series, colour: str, label: str, *, dashed: bool = True) -> None:
    steps, numbers = thinned(values)
    if not steps:
        return
    marker = {"marker": "o", "markersize": 3.2} if dashed or len(steps) <= 12 else {}
    axes.plot(steps, numbers, color=colour, linestyle="--" if dashed else "-", label=label or None, **marker)


def _limits(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    values = {run.settings.get(panel.limit) for run in runs} - {None} if panel.limit else set()
    for value in sorted(v for v in values if isinstance(v, int | float) and v > 0):
        axes.axhline(value, color=_GREY, linestyle=":", linewidth=1.2, label=f"{panel.limit} = {value:g}")


def _scale(axes: Any, panel: Panel) -> None:
    numbers = [float(y) for line in axes.lines for y in line.get_ydata()]
    low, high = min(numbers), max(numbers)
    unit = panel.unit
    if panel.may_be_log and 0 < 100 * low < high:
        axes.set_yscale("log")
        unit = f"{unit} (log scale)".strip()
    elif panel.share:
        axes.set_ylim(-0.03, 1.03)
    elif panel.from_zero:
        axes.set_ylim(0, 1.1 * high)
    elif high - low < 1e-9 * max(1.0, abs(high)):  # center a constant line
        room = 0.5 * abs(high) or 1.0
        axes.set_ylim(high - room, high + room)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel(unit)


def _legend(axes: Any) -> None:
    _, labels = axes.get_legend_handles_labels()
    if not labels or labels == ["training"]:
        return
    if len(labels) <= 4 and max(map(len, labels)) <= 28:
        axes.legend(fontsize=8.5, loc="best")
    else:  # no room next to the lines
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)


def as_svg(figure: Any) -> str:
    """The figure as SVG, with text as outlines, so that it does not depend on installed fonts."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "halos_trl"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def as_png(figure: Any) -> bytes:
    """The figure as PNG, 160 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def as_array(figure: Any) -> np.ndarray:
    """The figure as an array of pixels `(height, width, 3)`, uint8."""
    figure.set_dpi(130)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


__all__ = ["as_array", "as_png", "as_svg", "check_matplotlib", "draw"]
