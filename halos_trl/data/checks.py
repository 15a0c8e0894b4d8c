"""Checks of raw rows, before tokenization. Every error names the dataset, the row and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

logger = get_logger(__name__)

Rows: TypeAlias = Dataset | IterableDataset
Row: TypeAlias = dict[str, Any]


def check_unpaired_rows(dataset: Rows, name: str) -> Rows:
    """Refuse rows that KTO-like methods cannot learn from.

    Either `prompt`, `completion`, `label` (bool), or paired rows (`chosen`, `rejected`, maybe `prompt`), which TRL
    unpairs. Raises ValueError for missing columns, labels that are not boolean, and empty completions; streamed rows
    are checked as they are read. Returns the dataset to use.
    """
    columns = _columns(dataset, name)
    if {"chosen", "rejected"} <= columns:
        dataset = check_paired_rows(dataset, name)
        # TRL would let these stand in for what it makes of the pairs.
        return drop_columns(dataset, columns & {"completion", "label"}, name, "Rows with `chosen` and `rejected`")
    _require_columns(
        columns, name, ("prompt", "completion", "label"), "or paired rows with `chosen` and `rejected` (and `prompt`)"
    )

    def check(row: Row, i: int) -> None:
        _check_completions(row, i, name, ("completion",))
        if not isinstance(row["label"], bool | np.bool_):
            raise ValueError(
                f"Row {i} of the {name} dataset has label {row['label']!r} of type {type(row['label']).__name__}; "
                "labels are booleans (True: desirable). Write true or false in a JSON file; or convert the column, "
                "e.g. `dataset.map(lambda row: {'label': row['score'] > 0})`, or for 0 and 1 "
                "`dataset.cast_column('label', datasets.Value('bool'))`."
            )

    return _check_each(dataset, ("prompt", "completion", "label"), check)


def check_paired_rows(dataset: Rows, name: str) -> Rows:
    """Refuse rows that DPO-like methods cannot learn from: missing columns or empty completions (ValueError)."""
    columns = _columns(dataset, name)
    _require_columns(columns, name, ("chosen", "rejected"), "with `prompt`, or with the prompt as their common start")
    wanted = tuple(column for column in ("prompt", "chosen", "rejected") if column in columns)
    equal: list[int] = []

    def check(row: Row, i: int) -> None:
        _check_completions(row, i, name, ("chosen", "rejected"))
        if row["chosen"] == row["rejected"]:
            equal.append(i)
            if not isinstance(dataset, Dataset) and len(equal) & (len(equal) - 1) == 0:  # 1, 2, 4, 8, ...
                logger.warning(f"{len(equal)} rows of the streamed {name} dataset so far have {_EQUAL}")

    checked = _check_each(dataset, wanted, check)
    if isinstance(dataset, Dataset) and equal:
        logger.warning(
            f"{len(equal)} of {len(dataset)} rows of the {name} dataset (the first is row {equal[0]}) have {_EQUAL}"
        )
    return checked


_EQUAL = "equal `chosen` and `rejected`. They are kept, but say nothing about a preference."


def drop_columns(dataset: Rows, columns: set[str], name: str, whose: str) -> Rows:
    """The dataset without columns that would be mistaken for others, with a warning that names them."""
    if not columns:
        return dataset
    logger.warning(f"{whose} of the {name} dataset bring columns {sorted(columns)}, which are not read.")
    return dataset.remove_columns(sorted(columns))


def _columns(dataset: Rows, name: str) -> set[str]:
    try:
        return set(next(iter(dataset)))
    except StopIteration:
        raise ValueError(f"The {name} dataset is empty. Pass at least one row.") from None


def _require_columns(columns: set[str], name: str, wanted: tuple[str, ...], alternative: str) -> None:
    missing = [column for column in wanted if column not in columns]
    if not missing:
        return
    others = sorted(columns - set(wanted))
    hints = [
        f"`dataset.rename_column({close[0]!r}, {column!r})`"
        for column in missing
        if (close := difflib.get_close_matches(column, others, n=1, cutoff=0.6))
    ]
    raise ValueError(
        f"The {name} dataset has columns {sorted(columns)}; missing: {missing}. Expected {list(wanted)}, "
        f"{alternative}. " + (f"Did you mean {' and '.join(hints)}?" if hints else "Rename or add the columns.")
    )


def _check_each(dataset: Rows, columns: tuple[str, ...], check: Callable[[Row, int], None]) -> Rows:
    if isinstance(dataset, Dataset):
        for i, row in enumerate(dataset.select_columns(list(columns)).with_format(None)):  # not the images
            check(row, i)
        return dataset

    def checked(row: Row, i: int) -> Row:
        check(row, i)
        return row

    return dataset.map(checked, with_indices=True, features=dataset.features)


def _check_completions(row: Row, i: int, name: str, columns: tuple[str, ...]) -> None:
    if "prompt" in row:
        _check_prompt(row["prompt"], [row[column] for column in columns], i, name)
    for column in columns:
        if _is_empty(row[column]):
            raise ValueError(
                f"Row {i} of the {name} dataset has an empty `{column}`: {row[column]!r}. There is no token to learn "
                "from. Fill such rows or drop them with `dataset.filter`."
            )


def _check_prompt(prompt: Any, completions: list[Any], i: int, name: str) -> None:
    if not isinstance(prompt, str | list):
        raise ValueError(
            f"Row {i} of the {name} dataset has prompt {prompt!r} of type {type(prompt).__name__}; a prompt is a text "
            "or a list of messages. Fill such rows or drop them with `dataset.filter`."
        )
    for completion in completions:
        if completion and isinstance(completion, str) != isinstance(prompt, str):
            raise ValueError(
                f"Row {i} of the {name} dataset mixes a prompt of type {type(prompt).__name__} with a completion of "
                f"type {type(completion).__name__}. Make both texts, or both lists of messages."
            )


def _is_empty(completion: Any) -> bool:
    if not completion:
        return True
    if isinstance(completion, str):
        return False
    # A conversation: empty when no message holds anything (content, tool calls, reasoning) besides its role.
    held = (value for message in completion for key, value in message.items() if key not in ("role", "name"))
    return not any(any(map(_part, value)) if isinstance(value, list) else value for value in held)


def _part(part: Any) -> Any:
    """What a part of a message's content holds; parts of a type other than text count as they are."""
    return part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
