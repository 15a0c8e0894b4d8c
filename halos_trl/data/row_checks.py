"""Checks of a raw row in each format: pure functions of the row that describe its problem.

Each check returns None for a valid row, or the end of a sentence that starts with "Row 3 of the train dataset", with
advice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from .row_texts import (
    completion_problem,
    implicit_pair_problem,
    is_empty,
    pair_with_text_prompt_problem,
    prompt_problem,
    side_problem,
)
from .row_values import (
    TEMPLATE_COLUMNS,
    Problem,
    Row,
    label_problem,
    prompt_id_problem,
    sampler_problem,
    score_problem,
    shown,
    template_problem,
)

RowCheck: TypeAlias = Callable[[Row], Problem]


def paired_check(columns: Iterable[str], *, splits_implicit: bool = True) -> RowCheck:
    """The check for rows of `chosen` and `rejected`, with a `prompt` if `columns` has one.

    Without one, the prompt is the common beginning of both sides; `splits_implicit` states whether the method uses it.
    """
    if "prompt" not in columns:
        return lambda row: implicit_pair_problem(row, splits_implicit) or template_problem(row)
    return lambda row: (
        prompt_problem(row.get("prompt"))
        or pair_with_text_prompt_problem(row)
        or completion_problem(row, "chosen")
        or completion_problem(row, "rejected")
        or template_problem(row)
    )


def unpaired_check(row: Row) -> Problem:
    """The check for rows of `prompt`, `completion` and `label`."""
    return (
        prompt_problem(row.get("prompt"))
        or completion_problem(row, "completion")
        or label_problem(row.get("label"))
        or template_problem(row)
    )


def scored_check(columns: Iterable[str], needs_score: bool) -> RowCheck:
    """The check for rows of one `completion`, with a `score` or a `label` if `columns` has one and it is used."""
    reads_score = "score" in columns
    reads_label = needs_score and not reads_score and "label" in columns

    def check(row: Row) -> Problem:
        return (
            prompt_problem(row.get("prompt"))
            or completion_problem(row, "completion", takes_empty_turns=True)
            or (score_problem(row.get("score")) if reads_score else None)
            or (label_problem(row.get("label")) if reads_label else None)
            or prompt_id_problem(row)
            or template_problem(row)
        )

    return check


def scored_pairs_check(columns: Iterable[str]) -> RowCheck:
    """The check for pairs whose sides count as scored completions."""
    pairs = paired_check(columns)
    return lambda row: pairs(row) or prompt_id_problem(row)


def scored_lists_check(columns: Iterable[str]) -> RowCheck:
    """The check for rows of `completions`, with `scores` if `columns` has them."""
    has_scores = "scores" in columns

    def check(row: Row) -> Problem:
        return (
            prompt_problem(row.get("prompt"))
            or _completions_problem(row)
            or (_scores_problem(row) if has_scores else None)
            or prompt_id_problem(row)
            or template_problem(row)
        )

    return check


def sampled_check(check: RowCheck) -> RowCheck:
    """A check of scored rows that also requires the tokens of each completion and their log-probs."""
    return lambda row: check(row) or _sampler_problem(row)


class OneForm:
    """A check that also refuses rows whose format, text or conversation, differs from that of the first valid row.

    TRL prepares all rows according to the format of the first one.
    """

    def __init__(self, check: RowCheck):
        self.check = check
        self.first: str | None = None

    def __call__(self, row: Row) -> Problem:
        problem = self.check(row)
        if problem is not None:
            return problem
        form = form_of(row)
        self.first = self.first or form
        if form == self.first:
            return None
        return (
            f"is {form}, but the first row is {self.first}. All rows of a dataset must have the same format: convert "
            "all prompts and completions to text, or all of them to lists of messages."
        )


def form_of(row: Row) -> str:
    """The format of a row, "text" or "conversational"."""
    value = next(row[column] for column in ("prompt", "chosen", "completion") if column in row)
    return "text" if isinstance(value, str) else "conversational"


def _completions_problem(row: Row) -> Problem:
    completions = row.get("completions")
    if not isinstance(completions, list):
        return (
            f"has `completions` {shown(completions)} of type {type(completions).__name__}; expected a list of "
            "completions. Wrap a single completion in a list, or rename the column to `completion`."
        )
    if not completions:
        return "has an empty list of `completions`. Add at least one completion, or remove the row."
    problems = (side_problem(value, row["prompt"], "completions", True) for value in completions)
    return next(filter(None, problems), None)


def _sampler_problem(row: Row) -> Problem:
    ids, logps = row.get("token_ids"), row.get("logprobs")
    if "completions" not in row:
        return sampler_problem(ids, logps) or _turns_problem(row["completion"])
    completions = row["completions"]
    for column, values in (("token_ids", ids), ("logprobs", logps)):
        if not isinstance(values, list) or len(values) != len(completions):
            return (
                f"has {len(completions)} completions and `{column}` {shown(values)}; expected one list for each "
                "completion."
            )
    problems = map(sampler_problem, ids, logps)  # type: ignore[arg-type]
    return next(filter(None, [*problems, *map(_turns_problem, completions)]), None)


def _turns_problem(completion: Any) -> Problem:
    if isinstance(completion, str) or len(completion) == 1:
        return None
    return (
        f"has a completion of {len(completion)} turns, but its `token_ids` are those of a single generated turn. Set "
        "`old_policy='reference'` to train on several turns."
    )


def _scores_problem(row: Row) -> Problem:
    completions, scores = row["completions"], row.get("scores")
    if scores is not None and not isinstance(scores, list):
        return (
            f"has `scores` {shown(scores)} of type {type(scores).__name__}; expected a list with one score per "
            "completion."
        )
    if len(scores or []) != len(completions):
        return f"has {len(completions)} completions but {len(scores or [])} scores. Provide one score per completion."
    return next(filter(None, map(score_problem, scores or [])), None)


__all__ = [
    "TEMPLATE_COLUMNS",
    "OneForm",
    "Problem",
    "Row",
    "RowCheck",
    "is_empty",
    "paired_check",
    "sampled_check",
    "scored_check",
    "scored_lists_check",
    "scored_pairs_check",
    "shown",
    "unpaired_check",
]
