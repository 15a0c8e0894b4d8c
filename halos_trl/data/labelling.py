"""From scores to feedback: pure functions that return labels, and pairs and groups as positions in a list of samples.

Samples of a prompt have the same value in `groups` (any hashable id) and need not be adjacent. With the same seed, the
preferences and their order match HALOs' `train.label`.
"""

from __future__ import annotations

import math
import numbers
import random
import statistics
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, get_args

from .row_values import LARGEST_SCORE, shown

PairMode = Literal["random", "max", "min"]
PAIR_MODES: tuple[PairMode, ...] = get_args(PairMode)

_TOLERANCE = 1e-12  # HALOs' tolerance for differences of scores that should equal the threshold


class Preference(NamedTuple):
    """Two samples of a prompt, by their positions; the one with the higher score is preferred."""

    a: int
    b: int
    label: int
    """1 if `a` is preferred, 0 if `b` is."""
    difference: float
    """The preferred score minus the other, positive."""

    @property
    def chosen(self) -> int:
        return self.a if self.label else self.b

    @property
    def rejected(self) -> int:
        return self.b if self.label else self.a


def score_problem(score: Any) -> str | None:
    """The problem of a value as a score; None for a finite number that the trainers accept."""
    if score is None:
        return "it is missing"
    if isinstance(score, bool) or not isinstance(score, numbers.Real):
        return f"{score!r} is of type {type(score).__name__}, not a number"
    if abs(score) <= LARGEST_SCORE:  # type: ignore[operator]
        return None
    # `shown` shortens integers with many digits.
    return f"{shown(score)} is not a finite number of at most {LARGEST_SCORE:.0e} in absolute value"


def binary_threshold(scores: Sequence[float], threshold: float | str = "median") -> float:
    """The number that `threshold` stands for: the mean or median of all scores, or a number (also as a string)."""
    _check_scores(scores)
    if threshold == "mean":
        return statistics.fmean(scores)
    if threshold == "median":
        return float(statistics.median(scores))
    return _number(threshold, "`mean`, `median` or a number")


def binary_labels(scores: Sequence[float], threshold: float | str = "median") -> list[bool]:
    """Whether each score is at least the threshold (see `binary_threshold`), in order.

    Raises ValueError for a score that is not a finite number (by its position), no scores, and an unknown threshold.
    """
    bound = binary_threshold(scores, threshold)
    return [score >= bound for score in scores]


def group_positions(groups: Sequence[Hashable]) -> list[list[int]]:
    """The positions of each group's members, groups by first appearance."""
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    return list(members.values())


def preferences(
    scores: Sequence[float],
    groups: Sequence[Hashable],
    mode: PairMode = "max",
    threshold: float | str = 0.0,
    seed: int = 0,
) -> list[Preference]:
    """Pairs of samples of the same group, in which the one with the higher score is preferred.

    `mode` selects the pairs. `random` shuffles the samples of a group and pairs neighbours, so that each is in at most
    one pair. `max` pairs the best and the worst. `min` pairs the closest scores that are at least `threshold` apart:
    the pair with the smallest such difference, or all pairs with this difference, with each sample at most once as the
    better one. The scores of a pair in `random` or `max`, and the best and the worst score of a group in `min`, differ
    by more than `threshold`. Equal scores are never paired. `seed` determines the shuffles and which sample of a pair
    is `a` (with probability 1/2 each).

    Raises ValueError for a score that is not a finite number (by its position), an unknown mode, and a negative or
    non-finite threshold.
    """
    if len(scores) != len(groups):
        raise ValueError(f"There are {len(scores)} scores and {len(groups)} groups; expected one group per score.")
    if mode not in PAIR_MODES:
        raise ValueError(f"The pair mode is {mode!r}; expected one of {', '.join(PAIR_MODES)}.")
    bound = _number(threshold, "a number")
    if bound < 0:
        raise ValueError(
            f"The threshold for pairs is {threshold!r}. The difference of the scores of a pair must exceed it, so it "
            "cannot be negative."
        )
    _check_scores(scores)
    draws = random.Random(seed)
    found: list[Preference] = []
    for members in group_positions(groups):
        if len(members) < 2:
            continue
        if mode == "random":
            draws.shuffle(members)
            pairs = list(zip(members[0::2], members[1::2], strict=False))
        else:
            members.sort(key=lambda position: scores[position], reverse=True)
            pairs = [(members[0], members[-1])] if mode == "max" else _closest(members, scores, bound)
        if mode != "min":
            pairs = [(a, b) for a, b in pairs if abs(float(scores[a]) - float(scores[b])) > bound]
        found += [_in_random_order(a, b, scores, draws) for a, b in pairs]
    return found


def _closest(members: list[int], scores: Sequence[float], bound: float) -> list[tuple[int, int]]:
    """`members` are sorted from best to worst; each is compared with the first one that is far enough below it."""
    if scores[members[0]] - scores[members[-1]] <= bound:
        return []
    candidates, below = [], 0
    for better in members:
        while below < len(members) and not _far_enough(scores[better] - scores[members[below]], bound):
            below += 1
        if below < len(members):
            worse = members[below]
            candidates.append((scores[better] - scores[worse], better, worse))
    smallest = min(difference for difference, _, _ in candidates)
    return [(a, b) for difference, a, b in candidates if math.isclose(difference, smallest, abs_tol=_TOLERANCE)]


def _far_enough(difference: float, bound: float) -> bool:
    return difference > 0 and difference + _TOLERANCE >= bound


def _in_random_order(a: int, b: int, scores: Sequence[float], draws: random.Random) -> Preference:
    if draws.random() < 0.5:
        a, b = b, a
    difference = float(scores[a]) - float(scores[b])
    return Preference(a, b, int(difference > 0), abs(difference))


def _number(threshold: float | str, expected: str) -> float:
    try:
        if isinstance(threshold, bool):
            raise ValueError
        number = float(threshold)
    except (TypeError, ValueError):
        raise ValueError(f"The threshold is {threshold!r}; expected {expected}.") from None
    if not math.isfinite(number):
        raise ValueError(f"The threshold is {threshold!r}; expected {expected}, finite.")
    return number


def _check_scores(scores: Sequence[float]) -> None:
    if not scores:
        raise ValueError("There are no scores to derive feedback from.")
    for position, score in enumerate(scores):
        if problem := score_problem(score):
            raise ValueError(f"Score {position} of {len(scores)}: {problem}.")


__all__ = [
    "PAIR_MODES",
    "PairMode",
    "Preference",
    "binary_labels",
    "binary_threshold",
    "group_positions",
    "preferences",
    "score_problem",
]
