"""Tokenization of rows for all trainers: rendering, tokenization and checks, before training.

Token ids are the same as with TRL's trainers, except if the completion repeats the prompt, if the prompt ends with an
assistant turn, or if the tokenizer adds a special token that the text already contains.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import ProcessorMixin

from .checks import source_of
from .turns import (
    OTHER_TURNS,
    Processing,
    Row,
    Turns,
    chat_tokens,
    common_prefix,
    has_generation_markers,
    mask_by_boundaries,
    template_options,
    turns_of,
)

ROW_NUMBER = "row_number"
"""Column with the number of the user's row, for rows that are split into several."""

NOTES = "row_notes"
"""Temporary column with the notes about a row, one per line, which are counted later."""

# Notes about a row, in addition to those of `turns`.
REPEATED_TEXT = "repeated text"
DOUBLE_BOS = "two BOS"
BOUNDARY = "boundary"
CUT = "cut"
NO_ROOM = "no room"
INVALID = "invalid: "
"""Prefix of a note about an invalid row."""

_CODE = zlib.crc32(b"".join(Path(__file__).with_name(name).read_bytes() for name in ("tokens.py", "turns.py")))


class TokenLimits(NamedTuple):
    """A model's vocabulary size and maximum number of positions; None: unknown, or no limit."""

    vocabulary: int | None = None
    positions: int | None = None


NO_LIMITS = TokenLimits()


class TextTokens:
    """Tokenizes texts without duplicating special tokens that the tokenizer adds.

    A BOS added by the tokenizer is omitted if the text already starts with one. An EOS added by the tokenizer is
    always omitted, because completions receive their EOS separately.
    """

    def __init__(self, processing_class: Processing):
        self.processing_class = processing_class
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        probe = self._ids("a")
        self.adds_bos = len(probe) > 1 and probe[0] == self.tokenizer.bos_token_id
        self.adds_eos = len(probe) > 1 and probe[-1] == self.tokenizer.eos_token_id

    def repeats_bos(self, text: str) -> bool:
        """Whether the tokenizer would add a second BOS."""
        return self.adds_bos and text.startswith(self.tokenizer.bos_token)

    def __call__(self, text: str) -> list[int]:
        ids = self._ids(text)
        return ids[self.repeats_bos(text) : len(ids) - self.adds_eos]

    def _ids(self, text: str) -> list[int]:
        ids = self.processing_class(text=text)["input_ids"]
        return list(ids[0] if isinstance(self.processing_class, ProcessorMixin) else ids)


def prompt_tokens(processing_class: Any, row: dict[str, Any], where: str) -> list[int]:
    """The token ids of a row's `prompt`, with the chat template applied and without a duplicate BOS."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return TextTokens(processing_class)(prompt)
    if len(prompt) > 1 and prompt[-1]["role"] == "assistant" and not prompt[-1].get("content"):
        prompt = prompt[:-1]  # an assistant turn without content
    begun = len(prompt) > 1 and prompt[-1]["role"] == "assistant"
    options = {**template_options(row), "continue_final_message": begun, "add_generation_prompt": not begun}
    return list(chat_tokens(processing_class, prompt, options, where)["input_ids"])


class Tokens(NamedTuple):
    """Token ids of one side of a row and of its prompt."""

    prompt_ids: list[int]
    ids: list[int]
    """Token ids of prompt and completion."""
    is_trained: list[bool]
    """Mask of the `ids` that may be trained on, based on turns alone; entries of the prompt are ignored."""


@dataclass(frozen=True)
class RowTokenizer:
    """Adds `prompt_ids`, and `<side>_ids` for each side, to a row. For `dataset.map(..., with_indices=True)`.

    With `assistant_only`, `<side>_mask` marks the tokens of a completion that the assistant wrote. With `whole`, which
    reward models need, `<side>_ids` contains prompt and completion, and there is no `prompt_ids`. With `sampled`, the
    ids of a completion are the row's `token_ids`, after its prompt as used for sampling; its text is only compared
    with them. The column `NOTES` lists what to count about the row.

    Raises ValueError, naming the row, if a row cannot be tokenized or has nothing to train on; with `drop_invalid`
    this is noted instead.
    """

    processing_class: Processing
    name: str
    """Name of the dataset."""
    sides: tuple[str, ...]
    assistant_only: bool = False
    whole: bool = False
    prompt_is_explicit: bool = True
    max_length: int | None = None
    keep_end: bool = False
    limits: TokenLimits = NO_LIMITS
    drop_invalid: bool = False
    sampled: bool = False
    code: int = _CODE
    """`datasets` hashes the fields to find its cache, so a hash of the code invalidates it when the code changes."""

    def __call__(self, row: Row, index: int) -> Row:
        try:
            made, notes = self._made(
                row, f"Row {row.get(ROW_NUMBER, index)} of the {self.name} dataset{source_of(row)}"
            )
        except ValueError as error:
            if not self.drop_invalid:
                raise
            made = {} if self.whole else {"prompt_ids": [0]}
            made |= {f"{side}_ids": [0] for side in self.sides}
            made |= {f"{side}_mask": [False] for side in self.sides if self.assistant_only}
            notes = {INVALID + " ".join(str(error).split())}
        return made | {NOTES: "\n".join(sorted(notes))}

    def _made(self, row: Row, where: str) -> tuple[Row, set[str]]:
        notes: set[str] = set()
        places = {side: f"{where} (`{side}`)" if len(self.sides) > 1 else where for side in self.sides}
        prompts: dict[tuple[bool, int], list[int]] = {}
        sides = {side: self._tokens(row, side, places[side], notes, prompts) for side in self.sides}
        first, *others = sides.values()
        start = len(first.prompt_ids)
        for tokens in (first, *others):
            start = min(start, common_prefix(first.prompt_ids, tokens.ids))
        if start < max(len(tokens.prompt_ids) for tokens in sides.values()) and not self._opens_elsewhere(row):
            notes.add(BOUNDARY)
        for side, tokens in sides.items():
            self._check(tokens, start, places[side], notes)
        if NO_ROOM in notes:
            notes = {NO_ROOM}
        else:
            self._check_limits(sides, places)
        made: Row = {} if self.whole else {"prompt_ids": first.ids[:start]}
        for side, tokens in sides.items():
            made[f"{side}_ids"] = tokens.ids if self.whole else tokens.ids[start:]
            if self.assistant_only:
                made[f"{side}_mask"] = tokens.is_trained[start:]
        return made, notes

    # -- one side ----------------------------------------------------------------------------------------------

    def _tokens(self, row: Row, side: str, where: str, notes: set[str], prompts: dict) -> Tokens:
        """Tokenize one side. `prompts` caches rendered prompts, because the sides of a row share theirs."""
        if self.sampled:
            return self._of_sampler(row, row[side], where)
        if isinstance(row[side], str):
            return self._of_text(row.get("prompt", ""), row[side], where, notes)
        turns = turns_of(row.get("prompt", []), row[side], prompt_is_explicit=self.prompt_is_explicit)
        if not turns.completion:
            raise ValueError(f"{where} only repeats the prompt. Fix the row, or drop it with `dataset.filter`.")
        if not turns.prompt and "prompt" in row:
            raise ValueError(f"{where} has a prompt without a turn. Fix the row, or drop it with `dataset.filter`.")
        notes |= turns.notes - ({OTHER_TURNS} if self.assistant_only or self.whole else set())
        return self._of_turns(turns, template_options(row), where, prompts)

    def _opens_elsewhere(self, row: Row) -> bool:
        """Whether a completion starts with a turn of a role other than the assistant, without generation prompt."""
        return any(not isinstance(row[side], str) and row[side][0]["role"] != "assistant" for side in self.sides)

    def _of_text(self, prompt: str, completion: str, where: str, notes: set[str]) -> Tokens:
        eos = self.text_tokens.tokenizer.eos_token
        if eos is None:
            raise ValueError(
                f"{where} is text, which must end with an EOS token, but the tokenizer has none. Set "
                "`tokenizer.eos_token`, or `eos_token` in the config."
            )
        if prompt.strip() and completion.startswith(prompt):
            notes.add(REPEATED_TEXT)
        text = prompt + completion if completion.endswith(eos) else prompt + completion + eos
        if self.text_tokens.repeats_bos(text):
            notes.add(DOUBLE_BOS)
        _refuse_half_characters(text, where)
        ids = self.text_tokens(text)
        return Tokens(self.text_tokens(prompt), ids, [True] * len(ids))

    def _of_sampler(self, row: Row, completion: Any, where: str) -> Tokens:
        sampled = list(row["token_ids"])
        decoded = self.text_tokens.tokenizer.decode(sampled, skip_special_tokens=True)
        text = completion if isinstance(completion, str) else _text_of(completion[0])
        if not _without_blanks(decoded).startswith(_without_blanks(text)):
            raise ValueError(
                f"{where} has the completion {text[:80]!r}, but its `token_ids` decode to {decoded[:80]!r}. The text "
                "was changed after sampling, or the samples were generated with another tokenizer. Sample with this "
                "model's tokenizer, or set `old_policy='reference'`."
            )
        prompt = row["prompt"]
        ids = self.text_tokens(prompt) if isinstance(prompt, str) else prompt_tokens(self.processing_class, row, where)
        return Tokens(ids, ids + sampled, [True] * (len(ids) + len(sampled)))

    def _of_turns(self, turns: Turns, options: Row, where: str, prompts: dict) -> Tokens:
        def encode(messages: list, **how: Any) -> Row:
            return chat_tokens(self.processing_class, messages, {**options, **how}, where)

        how = "continue_final_message" if turns.continues else "add_generation_prompt"
        # Rows for reward models may be whole conversations without a prompt.
        prompt = turns.continues, len(turns.prompt)
        if prompt not in prompts:
            prompts[prompt] = encode(turns.prompt, **{how: True})["input_ids"] if turns.prompt else []
        marked = self.assistant_only and has_generation_markers(self.processing_class, options)
        whole = encode(turns.whole, **({"return_assistant_tokens_mask": True} if marked else {}))
        ids = list(whole["input_ids"])
        if marked:
            is_trained = [bool(x) for x in whole["assistant_masks"]]
        elif self.assistant_only:
            is_trained = mask_by_boundaries(lambda *a, **k: encode(*a, **k)["input_ids"], turns, ids, where)
        else:
            is_trained = [True] * len(ids)
        return Tokens(list(prompts[prompt]), ids, is_trained)

    @cached_property
    def text_tokens(self) -> TextTokens:
        """The tokenizer for rows of text."""
        return TextTokens(self.processing_class)

    # -- checks ------------------------------------------------------------------------------------------------

    def _check(self, tokens: Tokens, start: int, where: str, notes: set[str]) -> None:
        ids, length = tokens.ids, len(tokens.ids)
        if length <= start:
            raise ValueError(
                f"{where} has a completion of zero tokens, so there is no token to learn from. Drop such rows, or "
                "check how the chat template renders them."
            )
        if self.whole:
            notes |= {NO_ROOM} if self.max_length is not None and length > self.max_length else set()
            return
        if not any(tokens.is_trained[start:]):
            raise ValueError(
                f"{where} has a completion without a token of the assistant, and `assistant_only_loss=True` trains "
                "only on those. Drop such rows, or set `assistant_only_loss=False`."
            )
        if not any(tokens.is_trained[max(start, 1) :]):
            raise ValueError(
                f"{where} has a single token, {ids[0]}, and an empty prompt, so there is no context to predict it "
                "from. Add a prompt, or drop the row."
            )
        limit = length if self.max_length is None else min(self.max_length, length)
        begin = length - limit if self.keep_end else 0
        if not any(tokens.is_trained[max(start, begin + 1) : begin + limit]):
            notes.add(NO_ROOM)
        elif limit < (length - start if self.keep_end else length):
            notes.add(CUT)

    def _check_limits(self, sides: dict[str, Tokens], places: dict[str, str]) -> None:
        vocabulary, positions = self.limits
        for side, (_, ids, _) in sides.items():
            if vocabulary is not None and max(ids) >= vocabulary:
                token = max(ids)
                raise ValueError(
                    f"{places[side]} has token id {token} "
                    f"({self.text_tokens.tokenizer.convert_ids_to_tokens(token)!r}), but the model has {vocabulary} "
                    "token embeddings. Pass the model's own tokenizer, or, if tokens were added to it, call "
                    "`model.resize_token_embeddings(len(tokenizer))` first."
                )
            length = len(ids) if self.max_length is None else min(len(ids), self.max_length)
            if positions is not None and length > positions:
                raise ValueError(
                    f"{places[side]} has {len(ids)} tokens, but the model has {positions} positions. Set "
                    f"`max_length={positions}` or less, or shorten the row."
                )


def _refuse_half_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} contains {text[error.start]!r}, half of a surrogate pair, which tokenizers cannot encode. Fix "
            "the text, e.g. with `text.encode(errors='replace').decode()`."
        ) from None


def _text_of(turn: dict[str, Any]) -> str:
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _without_blanks(text: str) -> str:
    """The text without white space, because engines differ in the white space around special tokens."""
    return "".join(text.split())


__all__ = ["NOTES", "ROW_NUMBER", "RowTokenizer", "TextTokens", "TokenLimits", "prompt_tokens"]
