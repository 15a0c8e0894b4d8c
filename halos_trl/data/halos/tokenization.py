"""HALOs' tokenization of a prompt and its completion, with its truncation and its choice of trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..turns import Processing, chat_tokens
from .prompts import Turns

IGNORED = -100
"""The label of a token that is not trained on."""


class HalosTokens(NamedTuple):
    """A prompt with one completion."""

    prompt: Turns
    """The turns that are left after truncation."""
    completion: Turns
    """The turns that are left after truncation."""
    prompt_text: str
    """The complete prompt before truncation, with the generation prompt."""
    completion_text: str
    combined_text: str
    prompt_input_ids: list[int]
    combined_input_ids: list[int]
    """Prompt and completion, rendered together."""
    labels: list[int]
    """`combined_input_ids` for trained tokens, else -100."""
    prompt_was_cut: bool
    completion_was_cut: bool


class HalosTokenizer:
    """Renders and tokenizes prompt and completion as HALOs does, with its two length limits.

    The length of each turn of the prompt is counted as if it were rendered alone, including the generation prompt. The
    first turn that does not fit into the rest of `max_prompt_length` is truncated, and all turns after it are dropped.
    The completion is counted in the same way, in addition to the prompt, up to `max_length`. Since this overestimates
    the lengths, text that would fit may be truncated.

    Unlike in HALOs, the given turns are not modified. HALOs truncates the stored prompt in place, so the prompt of a
    second completion depends on the first.

    Args:
        tokenizer: a tokenizer with a chat template.
        max_prompt_length: limit of the prompt, in tokens; None: no limit.
        max_length: limit of prompt and completion together, in tokens; None: no limit.
    """

    def __init__(self, tokenizer: Processing, *, max_prompt_length: int | None = None, max_length: int | None = None):
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.max_length = max_length

    def __call__(self, prompt: Turns, completion: Turns, where: str = "The row", **options: Any) -> HalosTokens:
        """Tokenize a prompt with its completion.

        `options` are passed to the chat template; `where` names the row in errors. Raises ValueError for a prompt or
        completion without a turn, and if the chat template fails.
        """
        for name, turns in (("prompt", prompt), ("completion", completion)):
            if not turns:
                raise ValueError(f"{where} has a {name} without a turn. Fix the row, or leave it out.")
        charged = 0
        cut_prompt, charged = self._within(prompt, charged, self.max_prompt_length, where, options, is_prompt=True)
        cut_completion, _ = self._within(completion, charged, self.max_length, where, options, is_prompt=False)
        prompt_ids = self._ids(cut_prompt, where, options, add_generation_prompt=True)
        whole = cut_prompt + cut_completion
        ids = self._ids(whole, where, options)
        # A final EOS or PAD of the prompt is trained on, because it may end an assistant turn.
        start = len(prompt_ids) - (prompt_ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id))
        return HalosTokens(
            cut_prompt,
            cut_completion,
            self._text(prompt, options, add_generation_prompt=True),
            self._text(cut_completion, options),
            self._text(whole, options),
            prompt_ids,
            ids,
            [IGNORED] * start + ids[start:],
            prompt_was_cut=cut_prompt != prompt,
            completion_was_cut=cut_completion != completion,
        )

    def _within(
        self, turns: Turns, charged: int, limit: int | None, where: str, options: dict[str, Any], *, is_prompt: bool
    ) -> tuple[Turns, int]:
        """The turns that fit into `limit`, the last one possibly truncated, and the total length counted so far."""
        if limit is None:
            return turns, charged
        kept: Turns = []
        for turn in turns:
            length = len(self._ids([turn], where, options, add_generation_prompt=is_prompt))
            overflow = charged + length - limit
            if overflow > 0:
                return [*kept, {**turn, "content": self._cut(turn["content"], overflow)}], limit
            kept.append(turn)
            charged += length
        return kept, charged

    def _cut(self, content: str, overflow: int) -> str:
        """The text without its last `overflow` tokens, and without special tokens."""
        tokenizer = self.tokenizer
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        ids = [token for token in tokenizer.encode(content) if token not in special]
        return tokenizer.decode(ids[:-overflow])

    def _ids(self, turns: Turns, where: str, options: dict[str, Any], **how: bool) -> list[int]:
        return list(chat_tokens(self.tokenizer, turns, {**options, **how}, where)["input_ids"])

    def _text(self, turns: Turns, options: dict[str, Any], **how: bool) -> str:
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **{**options, **how})


def padded(
    rows: Sequence[HalosTokens], *, pad_token_id: int, max_prompt_length: int, max_length: int
) -> dict[str, torch.Tensor]:
    """A batch with HALOs' fixed widths.

    `combined_input_ids`, `combined_attention_mask`, `labels`: `(B, max_length)`, padded or truncated on the right;
    `prompt_input_ids`, `prompt_attention_mask`: `(B, max_prompt_length)`, padded or truncated on the left.
    """
    combined = [row.combined_input_ids for row in rows]
    prompts = [row.prompt_input_ids[::-1] for row in rows]

    def right(values: list[list[int]], fill: int, width: int) -> torch.Tensor:
        return torch.tensor([(row + [fill] * width)[:width] for row in values], dtype=torch.int64)

    def ones(values: list[list[int]]) -> list[list[int]]:
        return [[1] * len(row) for row in values]

    return {
        "combined_input_ids": right(combined, pad_token_id, max_length),
        "combined_attention_mask": right(ones(combined), 0, max_length),
        "labels": right([row.labels for row in rows], IGNORED, max_length),
        "prompt_input_ids": right(prompts, pad_token_id, max_prompt_length).flip(1),
        "prompt_attention_mask": right(ones(prompts), 0, max_prompt_length).flip(1),
    }


__all__ = ["IGNORED", "HalosTokenizer", "HalosTokens", "padded"]
