"""Conversations: a row's prompt and completion as turns, their rendering, and masks of the assistant's tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

Row: TypeAlias = dict[str, Any]
Messages: TypeAlias = list[dict[str, Any]]
Processing: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin

# Notes about a row.
REPEATED = "repeated"
CONTINUED = "continued"
OTHER_TURNS = "other turns"


class Turns(NamedTuple):
    """The turns of a prompt and of its completion."""

    prompt: Messages
    completion: Messages
    continues: bool
    """Whether the completion's first turn continues the prompt's last one, an assistant turn."""
    notes: frozenset[str] = frozenset()

    @property
    def whole(self) -> Messages:
        """All turns, where a turn that starts in the prompt and continues in the completion is one turn."""
        if not self.continues:
            return self.prompt + self.completion
        begun, rest = self.prompt[-1], self.completion[0]
        turn = {**begun, **_held(rest), "content": _joined(begun["content"], rest.get("content"))}
        return [*self.prompt[:-1], turn, *self.completion[1:]]

    @property
    def first_completed(self) -> int:
        """Index in `whole` of the first turn that contains text of the completion."""
        return len(self.prompt) - self.continues


def turns_of(prompt: Messages, completion: Messages, *, prompt_is_explicit: bool = True) -> Turns:
    """The turns of a row. If the completion repeats the prompt exactly, the repetition is removed.

    If the prompt ends with an assistant turn and the completion starts with one, the completion continues that turn,
    as with `continue_final_message`. This does not apply to prompts that were extracted as the common start of two
    conversations (`prompt_is_explicit=False`), because their turns are complete.
    """
    notes = set()
    if [_held(turn) for turn in completion[: len(prompt)]] == [_held(turn) for turn in prompt] and prompt:
        completion = completion[len(prompt) :]
        notes.add(REPEATED)
    if any(turn["role"] != "assistant" for turn in completion):
        notes.add(OTHER_TURNS)
    continues = prompt_is_explicit and bool(completion) and _may_continue(prompt, completion[0])
    if continues and not _begun(prompt):
        return Turns(prompt[:-1], completion, False, frozenset(notes))
    if continues:
        notes.add(CONTINUED)
    return Turns(prompt, completion, continues, frozenset(notes))


def _may_continue(prompt: Messages, first: dict[str, Any]) -> bool:
    return (
        len(prompt) > 1
        and prompt[-1]["role"] == first["role"] == "assistant"
        and not prompt[-1].get("tool_calls")  # a turn with tool calls is complete
    )


def _begun(prompt: Messages) -> bool:
    """Whether the last turn has content."""
    return bool(prompt[-1].get("content"))


def _held(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without keys whose value is None, which `datasets` adds if other rows have them."""
    return {key: value for key, value in turn.items() if value is not None}


def _joined(begun: Any, rest: Any) -> Any:
    if isinstance(begun, str) and isinstance(rest, str | None):
        return begun + (rest or "")
    return _parts(begun) + _parts(rest or "")


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


# -- rendering -----------------------------------------------------------------------------------------------------


def template_options(row: Row) -> dict[str, Any]:
    """A row's additional arguments for the chat template: `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools  # as in TRL
    return {"tools": tools, **_held(row.get("chat_template_kwargs") or {})}


def chat_tokens(processing_class: Processing, messages: Messages, options: dict[str, Any], where: str) -> Row:
    """Result of `apply_chat_template` for a conversation: `input_ids`, and other requested outputs. Raises ValueError,
    naming the row, if the template fails.
    """
    is_processor = isinstance(processing_class, ProcessorMixin)
    try:
        made = processing_class.apply_chat_template(
            prepare_multimodal_messages(messages) if is_processor else messages,
            tokenize=True,
            return_dict=True,
            **options,
        )
    except Exception as error:  # a template may raise anything
        if not getattr(processing_class, "chat_template", None):
            raise ValueError(
                f"{where} is a conversation, but the tokenizer has no chat template. Set `tokenizer.chat_template` "
                "or `chat_template_path` in the config, or convert the rows to text."
            ) from error
        roles = [turn.get("role") for turn in messages]
        raise ValueError(
            f"{where} cannot be rendered: the chat template fails with {type(error).__name__}: {error} (roles: "
            f"{roles}). Fix the row, drop it with `dataset.filter`, or use another template."
        ) from error
    return {key: value[0] for key, value in made.items()} if is_processor else dict(made)


# -- masks of the assistant's tokens -------------------------------------------------------------------------------

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Encode: TypeAlias = Callable[..., list[int]]


def has_generation_markers(processing_class: Processing, options: dict[str, Any]) -> bool:
    """Whether the chat template marks the assistant's text with `{% generation %}`."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    template = processing_class.chat_template
    if isinstance(template, dict):
        template = template.get("tool_use" if options.get("tools") else "default") or template.get("default")
    # The mask is computed from character offsets, which only fast tokenizers provide.
    return bool(tokenizer.is_fast and _MARKER.search(template or ""))


def mask_by_boundaries(encode: Encode, turns: Turns, ids: list[int], where: str) -> list[bool]:
    """A mask of `ids`, the tokens of `turns.whole`, that is True in assistant turns, including their end tokens.

    For templates without generation markers. An assistant turn starts where the rendered preceding turns with the
    generation prompt end, and ends where the rendered turns up to and including it end. `encode` returns the ids of a
    conversation. Tokens of the prompt are marked too, up to the first turn of the completion.
    """
    messages, first = turns.whole, turns.first_completed
    mask = [False] * len(ids)
    for i in range(first, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        is_last = i + 1 == len(messages)
        start = 0 if i == first else common_prefix(encode(messages[:i], add_generation_prompt=True), ids)
        end = len(ids) if is_last else _end_of(encode(messages[: i + 1]), ids, where)
        mask[start:end] = [True] * max(end - start, 0)
    return mask


def _end_of(rendered: list[int], ids: list[int], where: str) -> int:
    end = common_prefix(rendered, ids)
    if end < len(rendered) - 1:  # the last token may merge with the following text
        raise ValueError(
            f"{where} has turns of users or tools in its completion, and the chat template renders a turn differently "
            "if others follow it, so the assistant's tokens cannot be located. Use a template with "
            "`{% generation %}` markers (`trl.get_training_chat_template` provides one for many models), or set "
            "`assistant_only_loss=False`."
        )
    return end


def common_prefix(ids: list[int], other: list[int]) -> int:
    """Length of the common prefix of two token sequences."""
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
