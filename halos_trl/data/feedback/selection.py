"""Selecting a subset of the rows: a maximum per prompt, or a fraction of the distinct completions."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import numpy as np

from .plan import Plan, Purpose
from .prompts import FeedbackIndex


class Selection(NamedTuple):
    """Limits on the rows to keep. None: no limit."""

    max_per_prompt: int | None = None
    frac_unique_desirable: float | None = None
    frac_unique_undesirable: float | None = None
    seed: int = 0


def check_selection(selection: Selection, for_: Purpose) -> None:
    """Raise ValueError for limits that select nothing, and for fractions of labels if rows have no labels."""
    limit = selection.max_per_prompt
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"`max_per_prompt` is {limit!r}; expected an integer of at least 1, or None for no limit.")
    for name in ("frac_unique_desirable", "frac_unique_undesirable"):
        fraction = getattr(selection, name)
        if fraction is None:
            continue
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise ValueError(f"`{name}` is {fraction!r}; expected a number from 0 to 1, or None for all rows.")
        if for_ not in ("unpaired", "csft"):
            raise ValueError(
                f"`{name}` selects labelled completions, but {for_!r} rows have no labels. Omit it, or limit the rows "
                "per prompt with `max_per_prompt`."
            )


def select_rows(plan: Plan, index: FeedbackIndex, selection: Selection, for_: Purpose) -> Plan:
    """The rows that `selection` keeps, in order. Random choices depend only on its seed."""
    draws = random.Random(selection.seed)
    if selection.max_per_prompt is not None:
        plan = (_shorter_groups if for_ == "group" else _fewer_rows)(plan, selection.max_per_prompt, draws)
    fractions = (selection.frac_unique_undesirable, selection.frac_unique_desirable)
    if fractions != (None, None):
        plan = plan.select(_unique_part(plan, index, fractions, draws))
    if not len(plan):
        raise ValueError(
            "No row is left after the selection. Raise `frac_unique_desirable` or `frac_unique_undesirable`."
        )
    return plan


def _fewer_rows(plan: Plan, limit: int, draws: random.Random) -> Plan:
    bounds = [0, *(np.flatnonzero(np.diff(np.asarray(plan.prompt))) + 1).tolist(), len(plan)]
    kept: list[int] = []
    for start, end in itertools.pairwise(bounds):
        rows = range(start, end)
        kept += rows if len(rows) <= limit else sorted(draws.sample(rows, limit))
    return plan.select(kept)


def _shorter_groups(plan: Plan, limit: int, draws: random.Random) -> Plan:
    shorter = Plan()
    for row in range(len(plan)):
        members = plan.completions(row)
        kept = range(len(members)) if len(members) <= limit else sorted(draws.sample(range(len(members)), limit))
        shorter.extend(plan.prompt[row], plan.label[row], [members[i] for i in kept])
    return shorter


def _unique_part(
    plan: Plan, index: FeedbackIndex, fractions: tuple[float | None, float | None], draws: random.Random
) -> list[int]:
    """Rows to keep: for each label with a fraction, that fraction of the distinct completions, each once."""
    kept: list[int] = []
    for label, fraction in enumerate(fractions):
        rows = np.flatnonzero(np.asarray(plan.label) == label).tolist()
        if fraction is not None:
            different: dict[tuple[int, int], int] = {}
            for row in rows:
                digest = index.completion_digest[plan.completions(row)[0][0]]
                different.setdefault((plan.prompt[row], digest), row)
            rows = draws.sample(list(different.values()), round(fraction * len(different)))
        kept += rows
    return sorted(kept)


__all__ = ["Selection", "check_selection", "select_rows"]
