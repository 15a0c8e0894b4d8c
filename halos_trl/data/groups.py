"""Scored completions: every accepted form of rows becomes one row per completion, and the rows of a prompt a group."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from trl import extract_prompt, unpair_preference_dataset

from .checks import Row, Rows, _columns, _require_columns, drop_columns

logger = get_logger(__name__)

LARGEST_SCORE = 1e12
"""Its square, summed over the tokens of a step, is far from what float32 holds (3e38)."""

ScoreRows = Callable[[Dataset], Sequence[float]]
"""Gives one score for each row of `prompt` and `completion`, in order."""


def scored_rows(dataset: Rows, name: str, score_rows: ScoreRows | None = None) -> Dataset:
    """One row per completion with `prompt`, `completion`, `score`, `group` and `label`.

    `dataset` holds `prompt`, `completion` and `score`; or `prompt` with the lists `completions` and `scores`; or a
    boolean `label`, or `chosen` and `rejected`, which count as scores of +1 and -1. A score column is used where there
    is one, then `score_rows`, then the label. `group` numbers the prompts, found by `prompt_id` where that column
    exists and by a hash of roles and contents elsewhere. `label` is whether the score is positive.

    Raises ValueError, naming the row, for streamed data, missing columns, empty completions, lists of different
    lengths, and scores that are not finite numbers.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The {name} dataset is a {type(dataset).__name__}. Advantages and batches need whole groups, so all rows "
            "have to be there before training: pass a map-style `datasets.Dataset` (do not stream)."
        )
    dataset = dataset.with_format(None)
    columns = _columns(dataset, name)
    if {"score", "group", "completion_ids"} <= columns:
        return dataset  # prepared before, and passed to `evaluate`
    dataset = _one_row_per_completion(dataset, columns, name)
    if "score" in dataset.column_names and score_rows is not None:
        logger.warning(f"The {name} dataset has a score column, so the reward model is not used for it.")
    if "score" not in dataset.column_names:
        dataset = dataset.add_column("score", _scores_of(dataset, name, score_rows))
    scores = _finite(dataset["score"], name)
    groups = group_numbers(dataset, name)
    made = {"score": scores, "group": groups, "label": [score > 0 for score in scores]}
    dataset = dataset.remove_columns([column for column in made if column in dataset.column_names])
    for column, values in made.items():
        dataset = dataset.add_column(column, values)
    return dataset


def prompt_hash(prompt: Any) -> str:
    """SHA-256 of a prompt's text, or of its roles and contents, so that different conversations cannot collide."""
    parts = prompt if isinstance(prompt, str) else [[turn["role"], turn.get("content")] for turn in prompt]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def group_numbers(dataset: Dataset, name: str) -> list[int]:
    """Which rows share a prompt: a number per row, counting prompts as they first appear."""
    if "prompt_id" in dataset.column_names:
        keys = list(dataset["prompt_id"])
        if None in keys:
            raise ValueError(
                f"Row {keys.index(None)} of the {name} dataset has no `prompt_id` although the dataset has that "
                "column. Fill it in every row, or remove the column: then rows with equal prompts form a group."
            )
    else:
        keys = [prompt_hash(prompt) for prompt in dataset["prompt"]]
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def check_completion_tokens(dataset: Dataset, name: str) -> Dataset:
    """Refuse a completion of zero tokens: there is nothing to learn from and no token to put a reward on."""
    for i, ids in enumerate(dataset["completion_ids"]):
        if not len(ids):
            raise ValueError(
                f"Row {i} of the {name} dataset has a completion of zero tokens. There is no token to learn from. "
                "Drop such rows, or look at what the chat template makes of them."
            )
    return dataset


# -- forms of rows -------------------------------------------------------------------------------------------------


def _one_row_per_completion(dataset: Dataset, columns: set[str], name: str) -> Dataset:
    if "completions" in columns and "prompt" in columns:
        if {"score", "completion"} & columns:
            raise ValueError(
                f"The {name} dataset has columns {sorted(columns)}: lists of `completions` beside single values. "
                "With `completions` goes a list of `scores`, one for each. Rename or remove the other columns."
            )
        _check_each(dataset, lambda row, i: _check_lists(row, i, name, "scores" in columns))
        return dataset.map(_unfold, batched=True, remove_columns=dataset.column_names)
    if {"chosen", "rejected"} <= columns:
        _check_each(dataset, lambda row, i: _refuse_empty(row, i, name, "chosen", "rejected"))
        if "prompt" not in columns:
            dataset = dataset.map(extract_prompt)
        dataset = drop_columns(dataset, columns & {"completion", "label"}, name, "Rows with `chosen` and `rejected`")
        return unpair_preference_dataset(dataset)
    alternative = "with `score` or a boolean `label`; or `prompt` with the lists `completions` and `scores`; or pairs"
    _require_columns(columns, name, ("prompt", "completion"), alternative)
    _check_each(dataset, lambda row, i: _refuse_empty(row, i, name, "completion"))
    return dataset


def _check_each(dataset: Dataset, check: Callable[[Row, int], None]) -> None:
    for i, row in enumerate(dataset):
        check(row, i)


def _check_lists(row: Row, i: int, name: str, has_scores: bool) -> None:
    completions = row["completions"]
    if not completions:
        raise ValueError(f"Row {i} of the {name} dataset has no completions. Drop such rows.")
    if has_scores and len(row["scores"] or []) != len(completions):
        raise ValueError(
            f"Row {i} of the {name} dataset has {len(completions)} completions but {len(row['scores'] or [])} scores. "
            "Give one score for each completion."
        )
    for completion in completions:
        _refuse_empty({"completions": completion}, i, name, "completions")
    for score in row["scores"] if has_scores else ():
        _check_score(score, f"Row {i} of the {name} dataset")


def _refuse_empty(row: Row, i: int, name: str, *columns: str) -> None:
    # A message without content is let through: a model that ends its turn at once has said one token, the end, and its
    # low score is worth learning from. What the chat template makes of it is checked after tokenization.
    for column in columns:
        if not row[column]:
            raise ValueError(
                f"Row {i} of the {name} dataset has an empty `{column}`: {row[column]!r}. There is no token to learn "
                "from. Drop such rows."
            )


def _unfold(rows: dict[str, list]) -> dict[str, list]:
    """One row per element of `completions` (and of `scores`); the other columns are repeated."""
    lists = {"completions": "completion", "scores": "score"}
    counts = [len(completions) for completions in rows["completions"]]
    return {
        lists.get(column, column): (
            [value for values in rows[column] for value in values]
            if column in lists
            else [value for value, count in zip(rows[column], counts, strict=True) for _ in range(count)]
        )
        for column in rows
    }


# -- scores --------------------------------------------------------------------------------------------------------


def _scores_of(dataset: Dataset, name: str, score_rows: ScoreRows | None) -> Sequence[float]:
    if score_rows is not None:
        return score_rows(dataset)
    if "label" not in dataset.column_names:
        raise ValueError(
            f"The {name} dataset has columns {sorted(dataset.column_names)}: neither `score` (or `scores`) nor "
            "`label`. Add a score to each completion, or a boolean label (PPO also takes a `reward_model`)."
        )
    for i, label in enumerate(dataset["label"]):
        if not isinstance(label, bool):
            raise ValueError(
                f"Row {i} of the {name} dataset has label {label!r} of type {type(label).__name__}; labels are "
                "booleans (True: score +1, False: -1). Rename a column of numbers to `score`."
            )
    return [1.0 if label else -1.0 for label in dataset["label"]]


def _finite(scores: Sequence[Any], name: str) -> list[float]:
    for i, score in enumerate(scores):
        _check_score(score, f"Row {i} of the {name} dataset")
    return [float(score) for score in scores]


def _check_score(score: Any, where: str) -> None:
    if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
        raise ValueError(
            f"{where} has score {score!r}; scores are finite numbers. Mend or drop the row: it would spoil the "
            "advantages of its whole group."
        )
    if abs(score) > LARGEST_SCORE:
        raise ValueError(
            f"{where} has score {score!r}; scores may reach {LARGEST_SCORE:.0e} in absolute value. Losses and "
            "gradients are float32 and square them. Rescale the scores, e.g. to a few units."
        )
