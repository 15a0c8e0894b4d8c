"""The distinct prompts of a dataset, for sampling completions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from trl import extract_prompt

Row = dict[str, Any]

_ANSWERS = {
    *("completion", "completions", "label", "score", "scores", "chosen", "rejected", "messages", "output", "type"),
    *("prompt_id", "sample_id", "generator", "dataset", "split", "token_ids", "logprobs", "finish_reason"),
    *("row_number", "instruction", "reward"),
}
"""Columns about existing completions, or whose names are used in samples."""


def unique_prompts(rows: Iterable[Row], name: str = "data") -> list[Row]:
    """One row for each distinct prompt, in order of first appearance: `prompt` and the other columns.

    The prompt is the column `prompt`, else `instruction` (AlpacaEval), else `messages` up to the assistant's last
    turn, else the common beginning of `chosen` and `rejected`. Columns about completions (`chosen`, `label`, `score`,
    ...) are left out; the others are kept for reward functions.

    Raises a ValueError that names the row if none of these columns exists or a prompt is empty.
    """
    found: dict[str, Row] = {}
    for index, row in enumerate(rows):
        prompt = _prompt_of(row)
        if not prompt:
            raise ValueError(
                f"Row {index} of {name} has {'an empty prompt' if prompt is not None else 'no prompt'} (its columns: "
                f"{sorted(row)}). Sampling needs a column `prompt` (a text or a list of messages), `instruction`, "
                "`messages`, or `chosen` and `rejected`."
            )
        kept = {key: value for key, value in row.items() if key not in _ANSWERS and value is not None}
        found.setdefault(json.dumps(prompt, sort_keys=True), {**kept, "prompt": prompt})
    return list(found.values())


def _prompt_of(row: Row) -> Any:
    if row.get("prompt") is not None:
        return _turns(row["prompt"])
    if row.get("instruction") is not None:
        return [{"role": "user", "content": row["instruction"]}]
    if row.get("messages"):
        turns = _turns(row["messages"])
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if row.get("chosen") and row.get("rejected"):
        return _turns(extract_prompt({"chosen": row["chosen"], "rejected": row["rejected"]})["prompt"])
    return None


def _turns(prompt: Any) -> Any:
    """Turns without the keys that `datasets` fills in with None because other rows have them."""
    if isinstance(prompt, str):
        return prompt
    return [{key: value for key, value in turn.items() if value is not None} for turn in prompt]


__all__ = ["unique_prompts"]
