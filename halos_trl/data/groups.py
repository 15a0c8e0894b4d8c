"""Scored completions: rows in all accepted formats are converted to one row per completion, grouped by prompt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from trl import unpair_preference_dataset

from ..advantages import group_advantages
from .checks import (
    Row,
    Rows,
    check_each,
    columns_of,
    drop_columns,
    plain_rows,
    require_columns,
    without_missing_kwargs,
)
from .row_checks import (
    TEMPLATE_COLUMNS,
    OneForm,
    RowCheck,
    sampled_check,
    scored_check,
    scored_lists_check,
    scored_pairs_check,
    shown,
)
from .row_texts import split_prompt
from .row_values import SAMPLER_COLUMNS

logger = get_logger(__name__)

ScoreRows = Callable[[Dataset], Sequence[float]]
"""Returns one score for each row of `prompt` and `completion`, in order."""

GROUP = "prompt_group"
"""The column that numbers the prompts."""

_PROMPT_COLUMNS = ("prompt", *TEMPLATE_COLUMNS)


def scored_rows(
    dataset: Rows,
    name: str,
    score_rows: ScoreRows | None = None,
    *,
    drop_invalid: bool = False,
    sampled: bool = False,
) -> Dataset:
    """One row per completion with `prompt`, `completion`, `score`, `prompt_group` and `label`.

    `dataset` has `prompt`, `completion` and `score`; or `prompt` with the lists `completions` and `scores`; or a
    `label` (a boolean, 0 or 1), or `chosen` and `rejected`, which count as scores of +1 and -1. A score column takes
    precedence, then `score_rows`, then the label. `prompt_group` is the number of the prompt from `group_numbers`.
    `label` is whether the score is positive. `sampled` requires each completion's `token_ids` and `logprobs` (for
    lists of completions, a list of each); otherwise these columns are removed.

    Raises ValueError for streamed data, missing columns, ids shared by different prompts, and the first row that fails
    `row_checks`; with `drop_invalid`, such rows are dropped and counted in a warning (a row with several completions
    as a whole).
    """
    dataset = plain_rows(dataset, name)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The {name} dataset is a {type(dataset).__name__}. Advantages and batches need whole groups, so all "
            "rows must be available before training: pass a map-style `datasets.Dataset` (do not stream)."
        )
    columns = columns_of(dataset, name)
    if {"score", GROUP, "completion_ids"} <= columns:
        return dataset  # already prepared, and passed to `evaluate`
    if {"image", "images"} & columns:
        raise ValueError(
            f"The {name} dataset has images, which `GRPOTrainer` and `PPOTrainer` do not support. Use `DPOTrainer` "
            "with pairs or `KTOTrainer` with labelled rows, or remove the column."
        )
    dataset = drop_columns(dataset, columns & {GROUP}, name, "Rows")
    if sampled:
        _require_sampler(columns, name)
    else:
        dataset = dataset.remove_columns(sorted(columns & set(SAMPLER_COLUMNS)))
    read, check = _form_of(columns - {GROUP}, name, score_rows is None)
    if sampled:
        read, check = (*read, *SAMPLER_COLUMNS), sampled_check(check)
    dataset = _one_row_per_completion(dataset, name, read, check, drop_invalid)
    if "score" in dataset.column_names and score_rows is not None:
        logger.warning(f"The {name} dataset has a score column, so the reward model is not used for it.")
    if "score" not in dataset.column_names:
        dataset = dataset.add_column("score", _scores_of(dataset, score_rows))
    elif "label" in dataset.column_names:
        logger.warning(f"The {name} dataset has a column `label` in addition to the scores, which is ignored.")
    scores = [float(score) for score in dataset["score"]]
    made = {"score": scores, "label": [score > 0 for score in scores]}
    dataset = dataset.remove_columns([column for column in made if column in dataset.column_names])
    for column, values in made.items():
        dataset = dataset.add_column(column, values)
    return dataset


# -- groups --------------------------------------------------------------------------------------------------------


def prompt_key(row: Row) -> str:
    """SHA-256 of everything that determines the prompt's tokens: different prompts have different keys.

    That is the text, or for conversations everything passed to the chat template: all fields of the messages, `tools`
    and `chat_template_kwargs`.
    """
    prompt, tools, kwargs = row["prompt"], row.get("tools"), row.get("chat_template_kwargs")
    parts = [
        prompt if isinstance(prompt, str) else [_set_fields(message) for message in prompt],
        # A template may write tools as JSON, so the order of their keys counts.
        json.loads(tools) if isinstance(tools, str) else tools,
        _set_fields(kwargs or {}),
    ]
    return hashlib.sha256(json.dumps(parts, default=_digest).encode()).hexdigest()


def _set_fields(fields: Row) -> list[tuple[str, Any]]:
    """The fields by name. If one of several rows has a field, it is filled in with None for the others."""
    return sorted((key, value) for key, value in fields.items() if value is not None)


def _digest(value: Any) -> str:
    """A digest of values that JSON cannot represent: an image, bytes, a date."""
    data = (
        value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
    )
    return hashlib.sha256(data).hexdigest()


def group_numbers(dataset: Dataset, name: str) -> list[int]:
    """A number per row that identifies its prompt by `prompt_key`, counted in order of first appearance.

    A column `prompt_id` splits the rows of equal prompts into several groups. Raises ValueError for an id shared by
    different prompts.
    """
    keys = _prompt_keys(dataset)
    ids = list(dataset["prompt_id"]) if "prompt_id" in dataset.column_names else [None] * len(keys)
    numbers: dict[tuple[Any, str], int] = {}
    key_of_id: dict[Any, tuple[str, int]] = {}
    for i, (key, prompt_id) in enumerate(zip(keys, ids, strict=True)):
        first_key, first = key_of_id.setdefault(prompt_id, (key, i))
        if prompt_id is not None and key != first_key:
            raise ValueError(
                f"Rows {first} and {i} of the {name} dataset have the same `prompt_id`, {prompt_id!r}, but different "
                f"prompts, so their scores cannot be compared: {shown(dataset[first]['prompt'])} and "
                f"{shown(dataset[i]['prompt'])} (`tools` and `chat_template_kwargs` are part of a prompt). This "
                "happens if datasets whose ids start at 0 are concatenated. Make the ids unique, or remove the "
                "column; rows with equal prompts then form a group."
            )
        numbers.setdefault((prompt_id, key), len(numbers))
    return [numbers[prompt_id, key] for prompt_id, key in zip(ids, keys, strict=True)]


def _prompt_keys(dataset: Dataset) -> list[str]:
    dataset = dataset.select_columns([column for column in _PROMPT_COLUMNS if column in dataset.column_names])
    keys: list[str] = []
    for batch in dataset.iter(batch_size=1000):
        keys += [prompt_key(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return keys


# -- formats of rows -----------------------------------------------------------------------------------------------


def _form_of(columns: set[str], name: str, needs_score: bool) -> tuple[tuple[str, ...], RowCheck]:
    """The columns to read from rows with these columns, and the check of such a row."""
    if {"completions", "prompt"} <= columns:
        if {"score", "completion"} & columns:
            raise ValueError(
                f"The {name} dataset has columns {sorted(columns)}: lists of `completions` and columns for a single "
                "completion. Remove one of the two; `completions` requires a list of `scores`, one for each."
            )
        _require_judgement(columns, name, needs_score, {"scores"})
        return ("prompt", "completions", "scores"), scored_lists_check(columns)
    if {"chosen", "rejected"} <= columns:
        return ("prompt", "chosen", "rejected"), scored_pairs_check(columns)
    alternative = "with `score` or `label`; or `prompt` with the lists `completions` and `scores`; or pairs"
    require_columns(columns, name, ("prompt", "completion"), alternative)
    _require_judgement(columns, name, needs_score, {"score", "label"})
    return ("prompt", "completion", "score", "label"), scored_check(columns, needs_score)


def _one_row_per_completion(
    dataset: Dataset, name: str, read: tuple[str, ...], check: RowCheck, drop_invalid: bool
) -> Dataset:
    columns = set(dataset.column_names)
    if "chosen" in read:
        dataset = drop_columns(dataset, columns & {"completion", "label"}, name, "Rows with `chosen` and `rejected`")
    dataset = check_each(dataset, name, (*read, "prompt_id"), OneForm(check), drop_invalid)
    if "prompt" not in columns:
        dataset = dataset.map(split_prompt)
    dataset = without_missing_kwargs(dataset, columns)
    dataset = dataset.add_column(GROUP, group_numbers(dataset, name))
    if "completions" in read:
        return dataset.map(_unfold, batched=True, remove_columns=dataset.column_names)
    return unpair_preference_dataset(dataset) if "chosen" in read else dataset


def _require_sampler(columns: set[str], name: str) -> None:
    missing = [column for column in SAMPLER_COLUMNS if column not in columns]
    if missing or {"chosen", "rejected"} <= columns:
        raise ValueError(
            f"`old_policy='sampler'` requires the columns `token_ids` and `logprobs` (the tokens of each completion "
            f"and their log-probs), but the {name} dataset has columns {sorted(columns)}. Sample with `halos-trl "
            "sample --logprobs` and label with `--feedback scalar` or `groups`, or set `old_policy='reference'`."
        )


def _require_judgement(columns: set[str], name: str, needs_score: bool, wanted: set[str]) -> None:
    if needs_score and not wanted & columns:
        raise ValueError(
            f"The {name} dataset has columns {sorted(columns)}: neither `score` (or `scores`) nor `label`. Add a "
            "score or a boolean label for each completion, or, for PPO, pass a `reward_model`."
        )


def _unfold(rows: dict[str, list]) -> dict[str, list]:
    """One row per element of `completions`, `scores` and the sampler's columns; other columns are repeated."""
    lists = {"completions": "completion", "scores": "score"} | {column: column for column in SAMPLER_COLUMNS}
    counts = [len(completions) for completions in rows["completions"]]
    return {
        lists.get(column, column): (
            [value for values in rows[column] for value in values]
            if column in lists
            else [value for value, count in zip(rows[column], counts, strict=True) for _ in range(count)]
        )
        for column in rows
    }


def _scores_of(dataset: Dataset, score_rows: ScoreRows | None) -> Sequence[float]:
    if score_rows is not None:
        return score_rows(dataset)
    return [1.0 if label else -1.0 for label in dataset["label"]]


def with_advantages(dataset: Dataset, name: str, *, scale_by_std: bool) -> Dataset:
    """Add `advantage`, each score relative to its whole group, regardless of how batches are formed."""
    if {"advantage", "completion_ids"} <= set(dataset.column_names):
        return dataset  # already prepared, and passed to `evaluate`
    if "advantage" in dataset.column_names:
        logger.warning(
            f"The {name} dataset has a column `advantage`. It is replaced, because advantages are computed from "
            "scores."
        )
        dataset = dataset.remove_columns("advantage")
    groups = list(dataset[GROUP])
    sizes = Counter(groups)
    alone = sum(size == 1 for size in sizes.values())
    if alone:
        logger.warning(
            f"{alone} of {len(sizes)} prompts of the {name} dataset have a single completion. Its advantage is 0, so "
            "it only contributes to the KL penalty. Score more completions of these prompts, or drop them."
        )
    scores_B = torch.tensor(dataset["score"], dtype=torch.float64)
    advantages_B = group_advantages(scores_B, groups, scale_by_std=scale_by_std)
    return dataset.add_column("advantage", advantages_B.tolist())
