"""Checks of a row's prompt and completions, with error texts.

Each check returns None, or the end of a sentence that starts with "Row 3 of the train dataset", with advice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trl import extract_prompt

from .row_values import Problem, Row, shown

_MESSAGE = "{'role': 'user', 'content': '...'}"
_EMPTY = "There is no token to learn from."


def prompt_problem(prompt: Any) -> Problem:
    """The problem of a prompt, which must be text or a nonempty list of messages."""
    if not isinstance(prompt, str | list):
        return (
            f"has prompt {shown(prompt)} of type {type(prompt).__name__}; expected a text or a list of messages. "
            "Fill in the prompt."
        )
    if prompt == []:
        return "has an empty prompt: []. The prompt of a conversation needs at least one message. Fill it in."
    return messages_problem(prompt, "prompt")


def completion_problem(row: Row, column: str, *, takes_empty_turns: bool = False) -> Problem:
    """The problem of a completion, which must have the prompt's format and not be empty.

    `takes_empty_turns`: accept a message without content, which a model generates if it ends its turn immediately.
    """
    return side_problem(row.get(column), row["prompt"], column, takes_empty_turns)


def side_problem(value: Any, prompt: Any, column: str, takes_empty_turns: bool) -> Problem:
    """The problem of a completion's value."""
    if value is None or (isinstance(value, str | list) and not value):
        return f"has an empty `{column}`: {value!r}. {_EMPTY} Fill it in."
    if not isinstance(value, str | list):
        wrap = " Wrap the message in a list." if isinstance(value, dict) else ""
        return (
            f"has `{column}` {shown(value)} of type {type(value).__name__}; expected a text or a list of "
            f"messages.{wrap}"
        )
    if isinstance(value, str) != isinstance(prompt, str):
        return (
            f"mixes a prompt of type {type(prompt).__name__} with a completion of type {type(value).__name__} in "
            f"`{column}`: {shown(value)}. Convert both to text, or both to lists of messages."
        )
    problem = messages_problem(value, column)
    if problem is None and not takes_empty_turns and is_empty(value):
        problem = f"has an empty `{column}`: {shown(value)}. {_EMPTY} Fill it in."
    return problem


def messages_problem(messages: Any, column: str) -> Problem:
    """The problem of a conversation; None for text."""
    if isinstance(messages, str):
        return None
    return next(filter(None, (_message_problem(message, column) for message in messages)), None)


def _message_problem(message: Any, column: str) -> Problem:
    if not isinstance(message, dict):
        return (
            f"has {shown(message)} of type {type(message).__name__} in the list `{column}`; expected a message. "
            f"Write messages as {_MESSAGE}, or make `{column}` a text."
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        chatml = " (`trl.maybe_convert_to_chatml` renames `from` and `value`)" if "from" in message else ""
        return f"has a message without a `role` in `{column}`: {shown(message)}. Write messages as {_MESSAGE}{chatml}."
    if isinstance(content, str):
        return None
    if content is None and any(_held(message)):
        return None
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return None
    return (
        f"has a message in `{column}` whose `content` is {shown(content)} of type {type(content).__name__}: "
        f"{shown(message)}. Expected a text, or a list of parts such as {{'type': 'text', 'text': '...'}}. Only "
        "messages with other fields, such as `tool_calls`, may have no content."
    )


def is_empty(completion: str | list[Row]) -> bool:
    """Whether a completion contains nothing but roles: no text, tool calls or other values."""
    if isinstance(completion, str):
        return not completion
    return not any(any(_held(message)) for message in completion)


def _held(message: Row) -> Iterable[Any]:
    """The values of a message, except its role."""
    for key, value in message.items():
        if key not in ("role", "name"):
            yield any(map(_part, value)) if isinstance(value, list) else value


def _part(part: Any) -> Any:
    """The text of a part of a message's content; parts of other types are returned unchanged."""
    return part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part


def pair_with_text_prompt_problem(row: Row) -> Problem:
    """The problem of a pair whose prompt is text but whose sides are conversations that start with it."""
    chosen = row.get("chosen")
    if not isinstance(row["prompt"], str) or not isinstance(chosen, list) or len(chosen) < 2:
        return None
    if messages_problem(chosen, "chosen") or chosen[0]["role"] not in ("system", "user"):
        return None
    return (
        f"has a text as prompt, {shown(row['prompt'])}, and a `chosen` that is a whole conversation. Remove the "
        "column `prompt` (`dataset.remove_columns('prompt')`): the prompt is then the common beginning of `chosen` "
        "and `rejected`."
    )


def split_prompt(row: Row) -> Row:
    """`prompt`, `chosen` and `rejected` of a pair without `prompt`: the common start, and the rest of each side.

    Like `trl.extract_prompt`, but equal turns are recognized even if `datasets` has filled a field of one of them with
    None.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        return extract_prompt(row)
    start = prompt_length(chosen, rejected)
    return {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}


def prompt_length(chosen: list[Row], rejected: list[Row]) -> int:
    """Number of turns that both sides start with, minus one if one side is the start of the other."""
    turns = min(len(chosen), len(rejected))
    return next((i for i in range(turns) if not same_turn(chosen[i], rejected[i])), turns - 1)


def same_turn(turn: Row, other: Row) -> bool:
    """Whether two messages are equal in all fields that are not None."""
    return turn == other or _set_only(turn) == _set_only(other)


def _set_only(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _set_only(part) for key, part in value.items() if part is not None}
    return [_set_only(part) for part in value] if isinstance(value, list) else value


def implicit_pair_problem(row: Row, splits: bool) -> Problem:
    """The problem of a pair without `prompt`; `splits`: whether the method uses the common start as the prompt."""
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    problem = side_problem(chosen, chosen, "chosen", False) or side_problem(rejected, chosen, "rejected", False)
    if problem is not None:
        return problem.replace("a prompt of type", "a `chosen` of type")
    if isinstance(chosen, str):
        return _no_common_text(chosen, rejected) if splits else None
    return _no_common_turns(chosen, rejected)


def _no_common_text(chosen: str, rejected: str) -> Problem:
    same = chosen[0] == rejected[0] and min(len(chosen), len(rejected)) > 1
    # A single leading space is not part of the prompt.
    if same and not (chosen[0] == " " and chosen[1] != rejected[1]):
        return None
    return _no_prompt(chosen, rejected)


def _no_common_turns(chosen: list[Row], rejected: list[Row]) -> Problem:
    shorter = min(len(chosen), len(rejected))
    start = prompt_length(chosen, rejected)
    is_start = start == shorter - 1 and same_turn(chosen[start], rejected[start])
    if is_start and len(chosen) != len(rejected):
        column = "chosen" if len(chosen) < len(rejected) else "rejected"
        if min(chosen, rejected, key=len)[-1]["role"] != "assistant":
            return (
                f"has a `{column}` that is only the beginning of the other side, without an answer: "
                f"{shown(min(chosen, rejected, key=len))}. {_EMPTY} Fill it in."
            )
    if start == 0:
        return _no_prompt(chosen, rejected)
    for column, side in (("chosen", chosen), ("rejected", rejected)):
        if is_empty(side[start:]):
            return f"has an empty `{column}` after the common beginning: {shown(side[start:])}. {_EMPTY} Fill it in."
    return None


def _no_prompt(chosen: Any, rejected: Any) -> Problem:
    return (
        "has no `prompt`, and `chosen` and `rejected` have no common beginning to use as the prompt: "
        f"{shown(chosen)} and {shown(rejected)}. Add a column `prompt`."
    )
