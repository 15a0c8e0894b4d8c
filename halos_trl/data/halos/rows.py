"""Rows of a dataset with HALOs' tokenization, in the order of HALOs' flat list."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..groups import group_numbers
from ..tokens import NO_ROOM, RowTokenizer, Tokens
from ..turns import Row, template_options
from .tokenization import IGNORED, HalosTokenizer

POSITION = "halos_row"
"""Column with the number of the row in the dataset that was passed in."""

PROMPT = "halos_prompt"
"""Column with the number of the prompt, in order of first appearance."""

CUT_PROMPT = "prompt cut as in HALOs"
CUT_COMPLETION = "completion cut as in HALOs"

_CODE = zlib.crc32(
    b"".join(
        (Path(__file__).parent / name).read_bytes()
        for name in ("../tokens.py", "../turns.py", "rows.py", "tokenization.py")
    )
)


@dataclass(frozen=True)
class HalosRowTokenizer(RowTokenizer):
    """Tokenizes rows as HALOs does: conversations, truncated to HALOs' two length limits.

    Raises ValueError, naming the row, for rows that are not conversations, and if truncation removes a completion.
    """

    max_prompt_length: int | None = None
    code: int = _CODE

    @cached_property
    def render(self) -> HalosTokenizer:
        """The tokenizer of a prompt and its completion."""
        return HalosTokenizer(
            self.processing_class, max_prompt_length=self.max_prompt_length, max_length=self.max_length
        )

    def tokens(self, row: Row, side: str, where: str, notes: set[str] | None = None) -> Tokens:
        """Token ids of a row's prompt with one of its completions. Adds truncations to `notes`."""
        turns = {column: _plain_turns(row[column], column, where) for column in ("prompt", side)}
        made = self.render(turns["prompt"], turns[side], where, **template_options(row))
        if notes is not None:
            notes |= {CUT_PROMPT} if made.prompt_was_cut else set()
            notes |= {CUT_COMPLETION} if made.completion_was_cut else set()
        start = sum(label == IGNORED for label in made.labels)
        ids = made.combined_input_ids[: self.max_length] if self.whole else made.combined_input_ids
        return Tokens(ids[:start], ids, [True] * len(ids))

    def _tokens(self, row: Row, side: str, where: str, notes: set[str], prompts: dict) -> Tokens:
        return self.tokens(row, side, where, notes)

    def _check(self, tokens: Tokens, start: int, where: str, notes: set[str]) -> None:
        super()._check(tokens, start, where, notes)
        if NO_ROOM in notes:
            raise ValueError(
                f"{where} has no room for its completion: the prompt alone has {start} tokens, and `max_length="
                f"{self.max_length}`. (HALOs would include it in its batches and learn nothing from it.) Raise "
                "`max_length`, lower `max_prompt_length`, or drop the row before training."
            )


def _plain_turns(turns: Any, column: str, where: str) -> list[dict[str, Any]]:
    """Turns without keys whose value is None, which `datasets` adds if other rows have them."""
    if isinstance(turns, str):
        raise ValueError(
            f"{where} has text as `{column}`. `batch_order='halos'` truncates turn by turn and needs conversations, "
            "such as [{'role': 'user', 'content': '...'}]. Convert the rows, or set `batch_order='trl'`."
        )
    plain = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    for turn in plain:
        if not isinstance(turn.get("content"), str):
            raise ValueError(
                f"{where} has a turn in `{column}` whose content is {turn.get('content')!r:.80}. "
                "`batch_order='halos'` truncates the text of turns, so the content must be text. Convert it, or set "
                "`batch_order='trl'`."
            )
    return plain


# -- the flat list -------------------------------------------------------------------------------------------------


def with_positions(dataset: Dataset) -> Dataset:
    """Add each row's number, which is kept when a row is split into several."""
    dataset = dataset.remove_columns([column for column in (POSITION, PROMPT) if column in dataset.column_names])
    return dataset.add_column(POSITION, list(range(len(dataset))))


def in_flat_order(dataset: Dataset, name: str) -> Dataset:
    """Sort the rows as in HALOs' flat list: all rows of a prompt together, prompts in order of first appearance.

    Within a prompt, rows keep their order in the dataset; in a pair the better completion comes first.
    """
    positions = list(dataset[POSITION])
    given = dataset.select(sorted(range(len(dataset)), key=positions.__getitem__))  # a stable sort
    prompts = group_numbers(given, name)
    flat = given.add_column(PROMPT, prompts).select(sorted(range(len(prompts)), key=prompts.__getitem__))
    return flat.remove_columns(POSITION)


__all__ = ["CUT_COMPLETION", "CUT_PROMPT", "PROMPT", "HalosRowTokenizer", "in_flat_order", "with_positions"]
