"""Comparison of the samples of a run's first and last evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .runs import Row


class Pair(NamedTuple):
    """The policy's completions of a prompt at the first and at the last evaluation."""

    prompt: str
    before: str
    after: str
    score_before: float | None
    score_after: float | None

    @property
    def change(self) -> float:
        """Absolute change of the score; 0 if one is missing."""
        return 0.0 if None in (self.score_before, self.score_after) else abs(self.score_after - self.score_before)  # type: ignore[operator]


class Pairs(NamedTuple):
    """A selection of the pairs, and figures for all of them."""

    rows: list[Pair]
    total: int
    first: int
    last: int
    mean_before: float | None
    mean_after: float | None


def before_and_after(generations: Sequence[Row], most: int = 12) -> Pairs:
    """Prompts that occur in the first and in the last evaluation; at most `most`, with the largest score changes."""
    steps = sorted({row["step"] for row in generations if "step" in row})
    if not steps:
        return Pairs([], 0, 0, 0, None, None)
    before, after = (_by_prompt(generations, step) for step in (steps[0], steps[-1]))
    pairs = [
        Pair(prompt, row["completion"], after[prompt]["completion"], row.get("score"), after[prompt].get("score"))
        for prompt, row in before.items()
        if prompt in after
    ]
    shown = sorted(pairs, key=lambda pair: -pair.change)[:most]
    return Pairs(
        shown,
        len(pairs),
        steps[0],
        steps[-1],
        _mean([pair.score_before for pair in pairs]),
        _mean([pair.score_after for pair in pairs]),
    )


def _by_prompt(generations: Sequence[Row], step: int) -> dict[str, Row]:
    """The rows of a step by prompt; if an evaluation was repeated, the last one."""
    return {as_text(row.get("prompt", "")): row for row in generations if row.get("step") == step}


def as_text(prompt: Any) -> str:
    """A prompt as text; several turns are shown with their roles."""
    if not isinstance(prompt, list):
        return str(prompt)
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


__all__ = ["Pair", "Pairs", "before_and_after"]
