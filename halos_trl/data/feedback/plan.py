"""Planning rows from feedback: completions by number, with scores and labels, without reading texts or files."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import numpy as np

from ..labelling import PairMode, binary_labels, preferences
from .prompts import Entry, FeedbackIndex, Prompt

logger = logging.getLogger(__name__)

Purpose = Literal["paired", "unpaired", "group", "sft", "csft"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


class Rules(NamedTuple):
    """Rules for deriving pairs and labels from scores."""

    pair_mode: PairMode = "max"
    pair_threshold: float | str = 0.0
    label_threshold: float | str = "median"
    seed: int = 0


def check_rules(rules: Rules) -> None:
    """Raise ValueError for invalid rules, even if the files do not need them."""
    binary_labels([0.0], rules.label_threshold)
    preferences([0.0], [0], rules.pair_mode, rules.pair_threshold, rules.seed)


class Row(NamedTuple):
    """One row: its prompt, its completions (in a pair, the preferred one first), and its label if it has one."""

    prompt: int
    entries: tuple[Entry, ...]
    label: bool | None = None


class Plan:
    """The planned rows in order, stored in a few bytes each."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.prompt, self.label = array("q"), array("b")
        self.first = array("q")
        self.completion, self.score = array("q"), array("d")
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        label = -1 if row.label is None else int(row.label)
        scores = [math.nan if entry.score is None else entry.score for entry in row.entries]
        self.extend(row.prompt, label, zip([entry.completion for entry in row.entries], scores, strict=True))

    def extend(self, prompt: int, label: int, completions: Iterable[tuple[int, float]]) -> None:
        """Add a row of completions by number, with their scores."""
        self.prompt.append(prompt)
        self.label.append(label)
        self.first.append(len(self.completion))
        for completion, score in completions:
            self.completion.append(completion)
            self.score.append(score)

    def __len__(self) -> int:
        return len(self.prompt)

    def completions(self, row: int) -> list[tuple[int, float]]:
        """Number and score (NaN: none) of each completion of a row."""
        end = self.first[row + 1] if row + 1 < len(self) else len(self.completion)
        of_row = slice(self.first[row], end)
        return list(zip(self.completion[of_row], self.score[of_row], strict=True))

    def select(self, rows: Iterable[int]) -> Plan:
        """Some of the rows, in the order of their numbers in `rows`."""
        chosen = Plan()
        for row in map(int, rows):
            chosen.extend(self.prompt[row], self.label[row], self.completions(row))
        return chosen

    @property
    def has_scores(self) -> bool:
        return bool(np.isfinite(np.asarray(self.score)).any())


def plan_rows(index: FeedbackIndex, for_: Purpose, rules: Rules) -> Plan:
    """Plan the rows, prompt by prompt. Warns about prompts without rows, raises ValueError if there are no rows."""
    plan = {"paired": _pairs, "unpaired": _labelled, "group": _groups, "sft": _best, "csft": _labelled}[for_](
        index, rules
    )
    _report(index, plan, for_)
    return plan


def _report(index: FeedbackIndex, plan: Plan, for_: Purpose) -> None:
    reasons = {
        "paired": "a single completion, equal scores, or scores no more than `pair_threshold` apart",
        "unpaired": "pairs of equal scores only",
        "csft": "pairs of equal scores only",
        "group": "no completions",
        "sft": "no completion that is desirable, scored or preferred",
    }
    prompts = len(set(index.item_prompt))
    without = prompts - len(set(plan.prompt))
    if not len(plan):
        raise ValueError(
            f"None of the {prompts} prompts of {', '.join(index.files)} yields a row for {for_!r}: they have "
            f"{reasons[for_]}."
        )
    if without:
        logger.warning(f"{without} of {prompts} prompts yield no row for {for_!r}: they have {reasons[for_]}.")
    if index.ties and for_ in ("paired", "unpaired", "csft"):
        logger.warning(f"{index.ties} pairs have equal scores and thus no preferred side. They yield no rows.")


# -- one function for each purpose -----------------------------------------------------------------------------------


def _pairs(index: FeedbackIndex, rules: Rules) -> Plan:
    """The pairs in the files, and pairs of the other completions by score (labels count as +1 and -1)."""
    plan = Plan()
    free: list[Entry] = []
    prompts: list[int] = []
    for number, prompt in enumerate(index.prompts()):
        for better, worse in prompt.pairs:
            plan.append(Row(number, (prompt.entries[better], prompt.entries[worse])))
        outside = _outside_of_pairs(prompt)
        _check_judged(index, outside, "paired")
        free += outside
        prompts += [number] * len(outside)
    if not free:
        return plan
    scores: list[float] = [_score(entry) for entry in free]  # type: ignore[misc]
    for pair in preferences(scores, prompts, rules.pair_mode, rules.pair_threshold, rules.seed):
        plan.append(Row(prompts[pair.chosen], (free[pair.chosen], free[pair.rejected])))
    return plan.select(np.argsort(plan.prompt, kind="stable"))


def _labelled(index: FeedbackIndex, rules: Rules) -> Plan:
    """A row for each labelled completion, two for each pair without labels, and labels by score for other
    completions.
    """
    plan = Plan()
    unlabelled: list[int] = []
    for number, prompt in enumerate(index.prompts()):
        outside = _outside_of_pairs(prompt)
        _check_judged(index, outside, "unpaired")
        by_score = {entry.completion for entry in outside if entry.label is None}
        for entry in prompt.entries:
            if entry.completion in by_score:
                unlabelled.append(len(plan))
            if entry.label is not None or entry.completion in by_score:
                plan.append(Row(number, (entry,), entry.label))
        for pair in prompt.pairs:
            for side, label in zip(pair, (True, False), strict=True):
                if prompt.entries[side].label is None:
                    plan.append(Row(number, (prompt.entries[side],), label))
    if unlabelled:
        scores = [plan.score[row] for row in unlabelled]
        for row, label in zip(unlabelled, binary_labels(scores, rules.label_threshold), strict=True):
            plan.label[row] = label
    return plan


def _groups(index: FeedbackIndex, rules: Rules) -> Plan:
    """All completions of a prompt, each once, with scores: as given, else +1 and -1 by label, else from pairs."""
    plan = Plan()
    for number, prompt in enumerate(index.prompts()):
        if any(entry.score is not None for entry in prompt.entries):
            _check_all_scored(index, prompt)
        in_pairs = _scores_of_pairs(prompt)
        entries = [entry._replace(score=_score(entry, in_pairs.get(i))) for i, entry in enumerate(prompt.entries)]
        _check_judged(index, entries, "group")
        plan.append(Row(number, tuple(entries)))
    return plan


def _best(index: FeedbackIndex, rules: Rules) -> Plan:
    """As in HALOs: the first desirable completion, else the first one with the highest score, else the one that is
    preferred most often. If no sample is judged, all of them become rows.
    """
    plan = Plan()
    for number, prompt in enumerate(index.prompts()):
        for entry in _best_of(prompt):
            plan.append(Row(number, (entry,)))
    return plan


def _best_of(prompt: Prompt) -> list[Entry]:
    desirable = [entry for entry in prompt.entries if entry.label]
    scored = [entry for entry in prompt.entries if entry.score is not None]
    if desirable:
        return desirable[:1]
    if scored:
        return [max(scored, key=lambda entry: entry.score)]  # type: ignore[arg-type, return-value]
    if prompt.pairs:
        wins = _scores_of_pairs(prompt)
        return [prompt.entries[max(wins, key=lambda i: (wins[i], -i))]]
    return [entry for entry in prompt.entries if entry.label is None]


# -- shared helpers --------------------------------------------------------------------------------------------------


def _outside_of_pairs(prompt: Prompt) -> list[Entry]:
    """Completions with a judgement of their own that are in no pair."""
    inside = {side for pair in prompt.pairs for side in pair}
    return [entry for i, entry in enumerate(prompt.entries) if entry.alone and i not in inside]


def _score(entry: Entry, otherwise: float | None = None) -> float | None:
    if entry.score is not None:
        return entry.score
    return otherwise if entry.label is None else 1.0 if entry.label else -1.0


def _scores_of_pairs(prompt: Prompt) -> dict[int, float]:
    """By position: (number of pairs that prefer the completion - number that reject it) / number of its pairs."""
    results: dict[int, list[float]] = {}
    for better, worse in prompt.pairs:
        results.setdefault(better, []).append(1.0)
        results.setdefault(worse, []).append(-1.0)
    return {side: sum(values) / len(values) for side, values in results.items()}


def _check_judged(index: FeedbackIndex, entries: Iterable[Entry], for_: str) -> None:
    for entry in entries:
        if entry.score is None and entry.label is None:
            raise ValueError(
                f"{index.where(index.completion_item[entry.completion])} has no label, score or preference, but "
                f"{for_!r} rows need one. Label the samples first (`halos-trl label`), or load them for 'sft'."
            )


def _check_all_scored(index: FeedbackIndex, prompt: Prompt) -> None:
    unscored = [entry for entry in prompt.entries if entry.score is None]
    if unscored:
        raise ValueError(
            f"{index.where(index.completion_item[unscored[0].completion])} has no score, but other completions of its "
            "prompt have one, so their advantages cannot be computed. Score all completions of a prompt or none."
        )


__all__ = ["PURPOSES", "Plan", "Purpose", "Row", "Rules", "check_rules", "plan_rows"]
