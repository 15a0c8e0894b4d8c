"""Grouping of metrics into panels, with units, and metrics computed from others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from .runs import Run, Series

_OF_GENERATIONS = {"eval_generation_score": "score", "eval_generation_length": "tokens"}
TOKENS_PER_SECOND, MEMORY = "tokens_per_second", "memory_gib"


@dataclass(frozen=True)
class Panel:
    """One chart: its metrics, title and unit."""

    key: str
    """Name of the chart's file and HTML anchor."""
    title: str
    unit: str
    metrics: dict[str, str] = field(default_factory=dict)
    """The metrics to draw, with labels; the evaluation metric has the prefix `eval_`."""
    limit: str = ""
    """A setting to draw as a horizontal line."""
    may_be_log: bool = False
    """Whether to use a logarithmic axis if values span more than two orders of magnitude."""
    share: bool = False
    """Whether values are between 0 and 1."""
    from_zero: bool = False
    """Whether the axis starts at 0."""


_SIDES = {"chosen": "chosen", "rejected": "rejected"}


def _sides(prefix: str) -> dict[str, str]:
    return {f"{prefix}/{side}": label for side, label in _SIDES.items()}


PANELS = (
    Panel("loss", "Loss", "", {"loss": ""}),
    Panel("rewards", "Rewards", "reward", _sides("rewards")),
    Panel("margins", "Margin of the rewards, chosen - rejected", "reward", {"rewards/margins": ""}),
    Panel("accuracy", "Pairs ranked correctly", "share", {"rewards/accuracies": "", "accuracy": ""}, share=True),
    Panel("logps", "Log-probs of the completions", "nats per completion", _sides("logps")),
    Panel("kl", "KL estimate", "nats", {"kl": ""}),
    Panel("scores", "Scores of the reward model", "score", {f"{x}_reward": x for x in ("min", "mean", "max")}),
    Panel("generation", "Score of the samples", "mean score", {"generation_score": ""}),
    Panel("win_rate", "Win rate against the start", "share", {"win_rate": ""}, share=True),
    Panel("generation_length", "Length of the samples", "tokens", {"generation_length": ""}),
    Panel("entropy", "Entropy of the policy", "nats per token", {"entropy": ""}),
    Panel("unclamped", "Unclamped tokens (humanline)", "share", {**_sides("unclamped"), "unclamped": ""}, share=True),
    Panel("clip", "Clipped tokens", "share", {"clip_fraction": ""}, share=True),
    Panel("grad_norm", "Gradient norm before clipping", "", {"grad_norm": ""}, limit="max_grad_norm", may_be_log=True),
    Panel("learning_rate", "Learning rate", "", {"learning_rate": ""}),
    Panel(TOKENS_PER_SECOND, "Throughput", "tokens per second", {TOKENS_PER_SECOND: ""}, from_zero=True),
    Panel(MEMORY, "Peak memory so far", "GiB", {MEMORY: ""}, from_zero=True),
)  # fmt: skip


def series(run: Run, metric: str) -> Series:
    """A metric of a run, logged or computed from its log lines."""
    if metric == TOKENS_PER_SECOND:
        return _tokens_per_second(run)
    if metric == MEMORY:
        steps, values = run.series("memory_bytes")
        return Series(steps, [value / 2**30 for value in values])
    if metric in _OF_GENERATIONS and run.generations:
        return _mean_of_generations(run, _OF_GENERATIONS[metric])
    return run.series(metric)


def _mean_of_generations(run: Run, field_name: str) -> Series:
    """Mean by step from the generations file, which, unlike the log, also covers step 0."""
    found: dict[int, dict[str, float]] = {}
    for row in run.generations:
        if isinstance(row.get(field_name), int | float):
            found.setdefault(row["step"], {})[str(row.get("prompt"))] = row[field_name]
    return Series(sorted(found), [sum(found[step].values()) / len(found[step]) for step in sorted(found)])


def _tokens_per_second(run: Run) -> Series:
    """Tokens divided by training time, between consecutive log lines. `num_tokens` may restart at 0 after a resume."""
    rows = [row for row in run.history if {"loss", "num_tokens", "seconds", "step"} <= row.keys()]
    rates = [
        (late["step"], (late["num_tokens"] - early["num_tokens"]) / (late["seconds"] - early["seconds"]))
        for early, late in pairwise(rows)
        if late["seconds"] > early["seconds"] and late["num_tokens"] > early["num_tokens"]
    ]
    return Series([step for step, _ in rates], [rate for _, rate in rates])


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The panels for which at least one run has a finite value. With several runs, each panel has one metric."""
    found = []
    for panel in PANELS:
        present = {
            metric: label
            for metric, label in panel.metrics.items()
            if any(series(run, name).finite.steps for run in runs for name in (metric, f"eval_{metric}"))
        }
        if "unclamped/chosen" in present:
            present.pop("unclamped", None)
        found += _split(panel, present, several=len(runs) > 1)
    return found


def _split(panel: Panel, present: dict[str, str], *, several: bool) -> list[Panel]:
    if not present:
        return []
    if several and len(panel.metrics) > 1 and all(present.values()):
        return [
            replace(panel, key=f"{panel.key}_{label}", title=f"{panel.title}: {label}", metrics={metric: label})
            for metric, label in present.items()
        ]
    return [replace(panel, metrics=present)]


def thinned(values: Series, most: int = 400) -> Series:
    """Reduce a series to at most `most` points, each the mean of consecutive values at their middle step."""
    values = values.finite
    size = math.ceil(len(values.steps) / most)
    if size <= 1:
        return values
    starts = range(0, len(values.steps), size)
    parts = [(values.steps[i : i + size], values.values[i : i + size]) for i in starts]
    return Series([steps[len(steps) // 2] for steps, _ in parts], [sum(v) / len(v) for _, v in parts])


__all__ = ["PANELS", "Panel", "panels_of", "series", "thinned"]
