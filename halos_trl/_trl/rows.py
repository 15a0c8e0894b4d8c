"""Prepared rows: what fits into `max_length`."""

from __future__ import annotations

from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

logger = get_logger(__name__)


def groups_by_length(args: Any) -> bool:
    """The name that the setting had before transformers 5.2."""
    return bool(getattr(args, "group_by_length", False))


_MADE_HERE = ("ref_logps", "ref_KL_logps", "ref_chosen_logps", "ref_rejected_logps")


def drop_foreign_columns(dataset: Any, name: str) -> Any:
    """Drop columns of a raw dataset that would be mistaken for what is made of its rows, with a warning."""
    columns = set(next(iter(dataset), ()))
    foreign = sorted(column for column in columns if column in _MADE_HERE or column.startswith("KL_"))
    if not foreign or "prompt_ids" in columns:  # prepared before, and passed to `evaluate`
        return dataset
    logger.warning(
        f"Columns {foreign} of the {name} dataset are not read: reference log-probs and KL partners are made by the "
        "trainer (`precompute_ref_log_probs=True` stores them). Rename what you need for something else."
    )
    return dataset.remove_columns(foreign)


def drop_and_count(dataset: Any, max_length: int, name: str) -> Any:
    """Drop rows whose prompt leaves no room for a completion token within `max_length`, and say how many."""
    advice = f"their prompt alone fills `max_length`={max_length}. Raise `max_length` or shorten the prompts."
    if isinstance(dataset, Dataset):
        kept = dataset.filter(lambda prompt_ids: len(prompt_ids) < max_length, input_columns="prompt_ids")
        if len(kept) < len(dataset):
            first = next(i for i, ids in enumerate(dataset["prompt_ids"]) if len(ids) >= max_length)
            logger.warning(
                f"Dropped {len(dataset) - len(kept)} of {len(dataset)} rows of the {name} dataset (the first is row "
                f"{first}): {advice}"
            )
        if len(kept) == 0:
            raise ValueError(f"No row of the {name} dataset can be trained on: {advice}")
        return kept

    dropped = 0

    def has_room(row: dict[str, Any]) -> bool:
        nonlocal dropped
        if len(row["prompt_ids"]) < max_length:
            return True
        dropped += 1
        if dropped & (dropped - 1) == 0:  # 1, 2, 4, 8, ...: a stream has no end at which to report the total
            logger.warning(f"Dropped {dropped} rows of the streamed {name} dataset so far: {advice}")
        return False

    return dataset.filter(has_room)
