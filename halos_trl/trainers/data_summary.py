"""Statistics of a run's data: rows, lengths, label balance, dropped and truncated rows, overlap of the splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

QUANTILES = {"min": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "max": 1.0}
_SIDES = ("completion_ids", "chosen_ids", "rejected_ids")
_BATCH = 10_000


def data_summary(trainer: Any) -> dict[str, Any]:
    """Statistics of the trainer's prepared datasets.

    For `train` and each evaluation set: `rows`; `lengths` in tokens, as quantiles by column; `labels` and `scores` if
    the rows have them; `prompts`, the number of distinct prompts; `notes` on dropped and truncated rows, with their
    counts. For each evaluation set, `overlap`: how many of its distinct prompts and rows are in the training set.
    Streamed datasets are marked as such and not read.
    """
    notes = getattr(trainer, "row_notes", {})
    train = trainer.train_dataset
    found = {"train": _summary(train, notes.get("train")), "eval": {}, "overlap": {}}
    for name, data in _evaluation_sets(trainer.eval_dataset):
        found["eval"][name] = _summary(data, notes.get(name))
        if isinstance(data, Dataset) and isinstance(train, Dataset):
            found["overlap"][name] = overlap(train, data)
    return found


def _evaluation_sets(data: Any) -> list[tuple[str, Any]]:
    if data is None:
        return []
    return list(data.items()) if isinstance(data, dict) else [("eval", data)]


def _summary(data: Any, notes: dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(data, Dataset):
        return {"streamed": True} if data is not None else {}
    found: dict[str, Any] = {"rows": len(data), "notes": notes or {}}
    columns = [name for name in ("prompt_ids", *_SIDES) if name in data.column_names]
    found["lengths"] = {name.removesuffix("_ids"): quantiles(_lengths(data, name)) for name in columns}
    if "prompt_ids" in columns:
        found["prompts"] = len(set(_keys(data, ["prompt_ids"])))
    if "score" in data.column_names:
        found["scores"] = quantiles(_column(data, "score"))
    elif "label" in data.column_names:
        desirable = int(np.sum(_column(data, "label").astype(bool)))
        found["labels"] = {"desirable": desirable, "undesirable": len(data) - desirable}
    return found


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Minimum, 10 %, median, 90 %, maximum and mean; empty if there are no values."""
    if not len(values):
        return {}
    found = {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}
    return found | {"mean": float(values.mean())}


def overlap(train: Dataset, evaluation: Dataset) -> dict[str, int]:
    """Numbers of distinct prompts and rows in `evaluation`, and of those that are also in `train`, by token ids."""
    found: dict[str, int] = {}
    shared = [name for name in ("prompt_ids", *_SIDES) if {name} <= {*train.column_names} & {*evaluation.column_names}]
    for what, columns in (("prompts", [name for name in shared if name == "prompt_ids"]), ("rows", shared)):
        if columns:
            keys = set(_keys(evaluation, columns))
            found[what] = len(keys)
            found[f"shared_{what}"] = len(keys.intersection(_keys(train, columns)))
    return found


def _tables(data: Dataset, columns: list[str]) -> Iterable[Any]:
    return data.select_columns(columns).with_format("arrow").iter(_BATCH)


def _column(data: Dataset, name: str) -> np.ndarray:
    parts = [table[name].to_numpy() for table in _tables(data, [name])]
    return np.concatenate(parts) if parts else np.empty(0)


def _lengths(data: Dataset, name: str) -> np.ndarray:
    parts = [np.diff(_list_column(table, name)[0]) for table in _tables(data, [name])]
    return np.concatenate(parts) if parts else np.empty(0)


def _keys(data: Dataset, columns: list[str]) -> Iterator[bytes]:
    """A digest of each row's token ids; a set of the ids themselves would take gigabytes for a million rows."""
    for table in _tables(data, columns):
        lists = [_list_column(table, name) for name in columns]
        for i in range(len(table)):
            ids = b"|".join(values[offsets[i] : offsets[i + 1]].tobytes() for offsets, values in lists)
            yield hashlib.blake2b(ids, digest_size=16).digest()


def _list_column(table: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the lists of a column, and their concatenated values."""
    # These functions accept all list types; the user's tokenized rows may be lists of a fixed length.
    lengths = pc.list_value_length(table[name]).to_numpy()
    return np.append(0, np.cumsum(lengths)), pc.list_flatten(table[name]).to_numpy().astype(np.int64)


__all__ = ["data_summary", "overlap", "quantiles"]
