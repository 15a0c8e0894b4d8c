"""Checks of raw rows, before tokenization. Every error names the dataset, the row and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset

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
        return _check_each(dataset, lambda row, i: _check_completions(row, i, name, ("chosen", "rejected")))
    _require_columns(
        columns, name, ("prompt", "completion", "label"), "or paired rows with `chosen` and `rejected` (and `prompt`)"
    )

    def check(row: Row, i: int) -> None:
        _check_completions(row, i, name, ("completion",))
        if not isinstance(row["label"], bool):
            raise ValueError(
                f"Row {i} of the {name} dataset has label {row['label']!r} of type {type(row['label']).__name__}; "
                "labels are booleans (True: desirable). Convert them, e.g. "
                "`dataset.map(lambda row: {'label': row['score'] > 0})`, or for a column of 0 and 1 "
                "`dataset.cast_column('label', datasets.Value('bool'))`."
            )

    return _check_each(dataset, check)


def check_paired_rows(dataset: Rows, name: str) -> Rows:
    """Refuse rows that DPO-like methods cannot learn from: missing columns or empty completions (ValueError)."""
    columns = _columns(dataset, name)
    _require_columns(columns, name, ("chosen", "rejected"), "with `prompt`, or with the prompt as their common start")
    return _check_each(dataset, lambda row, i: _check_completions(row, i, name, ("chosen", "rejected")))


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


def _check_each(dataset: Rows, check: Callable[[Row, int], None]) -> Rows:
    if isinstance(dataset, Dataset):
        for i, row in enumerate(dataset.with_format(None)):
            check(row, i)
        return dataset

    def checked(row: Row, i: int) -> Row:
        check(row, i)
        return row

    return dataset.map(checked, with_indices=True, features=dataset.features)


def _check_completions(row: Row, i: int, name: str, columns: tuple[str, ...]) -> None:
    for column in columns:
        if _is_empty(row[column]):
            raise ValueError(
                f"Row {i} of the {name} dataset has an empty `{column}`: {row[column]!r}. There is no token to learn "
                "from. Fill such rows or drop them with `dataset.filter`."
            )


def _is_empty(completion: Any) -> bool:
    if not completion:
        return True
    if isinstance(completion, str):
        return False
    # A conversation: empty when no message holds anything (content, tool calls, reasoning) besides its role.
    return not any(value for message in completion for key, value in message.items() if key not in ("role", "name"))
