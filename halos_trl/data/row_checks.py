"""What is wrong with one raw row, in words: pure functions of the row, without its dataset.

Each returns the end of a sentence that begins with "Row 3 of the train dataset", and what to do; or None for a row
that can be trained on.
"""

from __future__ import annotations

import inspect
import json
import math
import reprlib
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin

Row: TypeAlias = dict[str, Any]
Problem: TypeAlias = str | None
RowCheck: TypeAlias = Callable[[Row], Problem]

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that reach the chat template beside the messages."""

LARGEST_SCORE = 1e12
"""Its square, summed over the tokens of a step, is far from what float32 holds (3e38)."""

_MESSAGE = "{'role': 'user', 'content': '...'}"
_EMPTY = "There is no token to learn from."

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxdict = 3


def shown(value: Any) -> str:
    """A value as an error message shows it: its `repr`, shortened."""
    return _short.repr(value)


# -- rows of each form ---------------------------------------------------------------------------------------------


def paired_check(columns: Iterable[str], *, splits_implicit: bool = True) -> RowCheck:
    """The check of rows of `chosen` and `rejected`, with a `prompt` where `columns` has one.

    Without one the prompt is the common start of both sides; `splits_implicit` says that the method has to find it.
    """
    if "prompt" not in columns:
        return lambda row: _implicit_pair_problem(row, splits_implicit) or template_problem(row)
    return lambda row: (
        prompt_problem(row.get("prompt"))
        or _foreign_prompt_problem(row)
        or completion_problem(row, "chosen")
        or completion_problem(row, "rejected")
        or template_problem(row)
    )


def unpaired_check(row: Row) -> Problem:
    """Of a row of `prompt`, `completion` and `label`."""
    return (
        prompt_problem(row.get("prompt"))
        or completion_problem(row, "completion")
        or label_problem(row.get("label"))
        or template_problem(row)
    )


def scored_check(columns: Iterable[str], needs_score: bool) -> RowCheck:
    """The check of rows of one `completion`, with a `score` or a `label` where `columns` has one and it is read."""
    reads_score = "score" in columns
    reads_label = needs_score and not reads_score and "label" in columns

    def check(row: Row) -> Problem:
        return (
            prompt_problem(row.get("prompt"))
            or completion_problem(row, "completion", takes_empty_turns=True)
            or (score_problem(row.get("score")) if reads_score else None)
            or (label_problem(row.get("label")) if reads_label else None)
            or prompt_id_problem(row)
            or template_problem(row)
        )

    return check


def scored_pairs_check(columns: Iterable[str]) -> RowCheck:
    """The check of pairs whose sides count as scored completions."""
    pairs = paired_check(columns)
    return lambda row: pairs(row) or prompt_id_problem(row)


def scored_lists_check(columns: Iterable[str]) -> RowCheck:
    """The check of rows of `completions`, with `scores` where `columns` has them."""
    has_scores = "scores" in columns

    def check(row: Row) -> Problem:
        return (
            prompt_problem(row.get("prompt"))
            or _completions_problem(row)
            or (_scores_problem(row) if has_scores else None)
            or prompt_id_problem(row)
            or template_problem(row)
        )

    return check


class OneForm:
    """A check that also refuses rows of another form than the first good one.

    The form of the first row, text or conversation, decides how all of them are prepared.
    """

    def __init__(self, check: RowCheck):
        self.check = check
        self.first: str | None = None

    def __call__(self, row: Row) -> Problem:
        problem = self.check(row)
        if problem is not None:
            return problem
        form = form_of(row)
        self.first = self.first or form
        if form == self.first:
            return None
        return (
            f"is {form}, but the first row is {self.first}. All rows of a dataset need one form: make all prompts and "
            "completions text, or all of them lists of messages."
        )


def form_of(row: Row) -> str:
    """Whether a row whose columns agree is text or a conversation, as an error names it."""
    value = next(row[column] for column in ("prompt", "chosen", "completion") if column in row)
    return "text" if isinstance(value, str) else "conversational"


# -- prompts and completions ---------------------------------------------------------------------------------------


def prompt_problem(prompt: Any) -> Problem:
    """Of a prompt: a text, or a list of messages, and not empty."""
    if not isinstance(prompt, str | list):
        return (
            f"has prompt {shown(prompt)} of type {type(prompt).__name__}; a prompt is a text or a list of messages. "
            "Fill in the prompt."
        )
    if not prompt:
        return (
            f"has an empty prompt: {prompt!r}. The first token of a completion needs a token before it. Fill in the "
            "prompt; for completions without one, let the prompt be the tokenizer's `bos_token`."
        )
    return messages_problem(prompt, "prompt")


def completion_problem(row: Row, column: str, *, takes_empty_turns: bool = False) -> Problem:
    """Of a completion: of the form of the prompt, and not empty.

    `takes_empty_turns`: a message without content counts, as the completion of a model that ended its turn at once.
    """
    return _side_problem(row.get(column), row["prompt"], column, takes_empty_turns)


def _side_problem(value: Any, prompt: Any, column: str, takes_empty_turns: bool) -> Problem:
    if value is None or (isinstance(value, str | list) and not value):
        return f"has an empty `{column}`: {value!r}. {_EMPTY} Fill it in."
    if not isinstance(value, str | list):
        wrap = " Put the message into a list." if isinstance(value, dict) else ""
        return (
            f"has `{column}` {shown(value)} of type {type(value).__name__}; a completion is a text, or a list of "
            f"messages.{wrap}"
        )
    if isinstance(value, str) != isinstance(prompt, str):
        return (
            f"mixes a prompt of type {type(prompt).__name__} with a completion of type {type(value).__name__} in "
            f"`{column}`: {shown(value)}. Make both texts, or both lists of messages."
        )
    problem = messages_problem(value, column)
    if problem is None and not takes_empty_turns and is_empty(value):
        problem = f"has an empty `{column}`: {shown(value)}. {_EMPTY} Fill it in."
    return problem


def messages_problem(messages: Any, column: str) -> Problem:
    """Of a conversation; None for a text."""
    if isinstance(messages, str):
        return None
    return next(filter(None, (_message_problem(message, column) for message in messages)), None)


def _message_problem(message: Any, column: str) -> Problem:
    if not isinstance(message, dict):
        return (
            f"has {shown(message)} of type {type(message).__name__} in the list `{column}`, where a message belongs. "
            f"Write messages as {_MESSAGE}, or let `{column}` be a text."
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
        f"{shown(message)}. A message's content is a text, or a list of parts such as "
        "{'type': 'text', 'text': '...'}; it may be missing only beside `tool_calls` and the like."
    )


def is_empty(completion: str | list[Row]) -> bool:
    """Whether a completion holds no text, tool call or anything else besides roles."""
    if isinstance(completion, str):
        return not completion
    return not any(any(_held(message)) for message in completion)


def _held(message: Row) -> Iterable[Any]:
    """What a message holds besides its role."""
    for key, value in message.items():
        if key not in ("role", "name"):
            yield any(map(_part, value)) if isinstance(value, list) else value


def _part(part: Any) -> Any:
    """What a part of a message's content holds; parts of a type other than text count as they are."""
    return part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part


def _foreign_prompt_problem(row: Row) -> Problem:
    chosen = row.get("chosen")
    if not isinstance(row["prompt"], str) or not isinstance(chosen, list) or len(chosen) < 2:
        return None
    if messages_problem(chosen, "chosen") or chosen[0]["role"] not in ("system", "user"):
        return None
    return (
        f"has a text as prompt, {shown(row['prompt'])}, and a `chosen` that is a whole conversation. Remove the "
        "column (`dataset.remove_columns('prompt')`): the prompt is then taken from the common start of `chosen` and "
        "`rejected`."
    )


def _implicit_pair_problem(row: Row, splits: bool) -> Problem:
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    problem = _side_problem(chosen, chosen, "chosen", False) or _side_problem(rejected, chosen, "rejected", False)
    if problem is not None:
        return problem.replace("a prompt of type", "a `chosen` of type")
    if isinstance(chosen, str):
        return _no_common_text(chosen, rejected) if splits else None
    return _no_common_turns(chosen, rejected)


def _no_common_text(chosen: str, rejected: str) -> Problem:
    same = chosen[0] == rejected[0] and min(len(chosen), len(rejected)) > 1
    # A single space in front is not left to the prompt.
    if same and not (chosen[0] == " " and chosen[1] != rejected[1]):
        return None
    return _no_prompt(chosen, rejected)


def _no_common_turns(chosen: list[Row], rejected: list[Row]) -> Problem:
    shorter = min(len(chosen), len(rejected))
    common = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if common is None and len(chosen) != len(rejected):
        column = "chosen" if len(chosen) < len(rejected) else "rejected"
        if min(chosen, rejected, key=len)[-1]["role"] != "assistant":
            return (
                f"has a `{column}` that is only the start of the other side and has no answer of its own: "
                f"{shown(min(chosen, rejected, key=len))}. {_EMPTY} Fill it in."
            )
    start = shorter - 1 if common is None else common
    if start == 0:
        return _no_prompt(chosen, rejected)
    for column, side in (("chosen", chosen), ("rejected", rejected)):
        if is_empty(side[start:]):
            return f"has an empty `{column}` behind the common start: {shown(side[start:])}. {_EMPTY} Fill it in."
    return None


def _no_prompt(chosen: Any, rejected: Any) -> Problem:
    return (
        "has no `prompt`, and `chosen` and `rejected` have no common start that could be one: "
        f"{shown(chosen)} and {shown(rejected)}. Add a column `prompt`."
    )


# -- lists of completions ------------------------------------------------------------------------------------------


def _completions_problem(row: Row) -> Problem:
    completions = row.get("completions")
    if not isinstance(completions, list):
        return (
            f"has `completions` {shown(completions)} of type {type(completions).__name__}; it is a list of "
            "completions. Put a single one into a list, or rename the column to `completion`."
        )
    if not completions:
        return "has no completions. Fill in the list."
    problems = (_side_problem(value, row["prompt"], "completions", True) for value in completions)
    return next(filter(None, problems), None)


def _scores_problem(row: Row) -> Problem:
    completions, scores = row["completions"], row.get("scores")
    if scores is not None and not isinstance(scores, list):
        return (
            f"has `scores` {shown(scores)} of type {type(scores).__name__}; it is a list with one score for each "
            "completion."
        )
    if len(scores or []) != len(completions):
        return (
            f"has {len(completions)} completions but {len(scores or [])} scores. Give one score for each completion."
        )
    return next(filter(None, map(score_problem, scores or [])), None)


# -- scores, labels, ids -------------------------------------------------------------------------------------------


def score_problem(score: Any) -> Problem:
    """Of a score: a finite number."""
    is_number = isinstance(score, Real) and not isinstance(score, bool) and score == score
    if is_number and abs(score) <= LARGEST_SCORE:
        return None
    if is_number and abs(score) != math.inf:
        return (
            f"has score {shown(score)}; scores may reach {LARGEST_SCORE:.0e} in absolute value. Losses and gradients "
            "are float32 and square them. Rescale the scores, e.g. to a few units."
        )
    return (
        f"has score {shown(score)}; scores are finite numbers. Mend the score: it would spoil the advantages of its "
        "whole group."
    )


def label_problem(label: Any) -> Problem:
    """Of a label: a boolean, or the number 0 or 1."""
    if isinstance(label, bool | np.bool_) or (isinstance(label, Integral) and label in (0, 1)):
        return None
    return (
        f"has label {shown(label)} of type {type(label).__name__}; labels are booleans, or the whole numbers 0 and 1 "
        "(True and 1: desirable). Write true or false in a JSON file; or convert the column, e.g. "
        "`dataset.map(lambda row: {'label': row['score'] > 0})`. Rename a column of other numbers to `score`: "
        "`GRPOTrainer` and `PPOTrainer` take scores."
    )


def prompt_id_problem(row: Row) -> Problem:
    """Of a `prompt_id`, where the row has one: a text or a number that equals itself."""
    if "prompt_id" not in row:
        return None
    value = row["prompt_id"]
    if isinstance(value, str | Integral) or (isinstance(value, Real) and math.isfinite(value)):
        return None
    missing = value is None or isinstance(value, Real)
    fault = (
        f"has no `prompt_id` ({value!r}), although the dataset has that column"
        if missing
        else f"has `prompt_id` {shown(value)} of type {type(value).__name__}; ids are texts or numbers"
    )
    return f"{fault}. Fill it in in every row, or remove the column: then rows with equal prompts form a group."


# -- what else reaches the chat template ---------------------------------------------------------------------------


def _arguments_of_template() -> frozenset[str]:
    """Names that a row's `chat_template_kwargs` may not hold: arguments of the call, not variables of the template."""
    methods = (PreTrainedTokenizerBase.apply_chat_template, ProcessorMixin.apply_chat_template)
    names = {name for method in methods for name in inspect.signature(method).parameters}
    variables = {"documents", "kwargs"}
    return frozenset(names - variables | {"messages", "conversations", "processing_class", "input"})


_RESERVED = _arguments_of_template()


def template_problem(row: Row) -> Problem:
    """Of `tools` and `chat_template_kwargs`, where the row has them."""
    problem = tools_problem(row["tools"]) if row.get("tools") is not None else None
    if problem is None and row.get("chat_template_kwargs") is not None:
        problem = template_kwargs_problem(row["chat_template_kwargs"])
    return problem


def tools_problem(tools: Any) -> Problem:
    """Of a row's tools: a list of JSON schemas, or its JSON text."""
    try:
        schemas = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError) as error:
        return (
            f"has `tools` that cannot be read as JSON ({error}): {shown(tools)}. Write a list of JSON schemas, or "
            "leave it null."
        )
    if schemas is None:
        return None
    if isinstance(schemas, list) and all(isinstance(tool, dict) or callable(tool) for tool in schemas):
        return None
    return (
        f"has `tools` {shown(tools)}; tools are a list of JSON schemas, each a dict, or such a list as JSON text. "
        "Leave it null where there are none."
    )


def template_kwargs_problem(kwargs: Any) -> Problem:
    """Of a row's variables of the chat template: a dict that replaces no argument of the call."""
    if not isinstance(kwargs, dict):
        return (
            f"has `chat_template_kwargs` {shown(kwargs)} of type {type(kwargs).__name__}; it is a dict of variables "
            "of the chat template, e.g. {'enable_thinking': False}. Leave it null where there are none."
        )
    # A missing key of a column of dicts is filled with None.
    reserved = sorted(str(key) for key, value in kwargs.items() if key in _RESERVED and value is not None)
    if not reserved:
        return None
    return (
        f"has {', '.join(f'`{key}`' for key in reserved)} in `chat_template_kwargs`: {shown(kwargs)}. Data may set "
        "variables of the chat template, but neither replace the template nor the arguments it is applied with. "
        "Remove the key; a template is set on the tokenizer (`processing_class.chat_template`)."
    )


__all__ = [
    "TEMPLATE_COLUMNS",
    "OneForm",
    "Problem",
    "Row",
    "RowCheck",
    "is_empty",
    "paired_check",
    "scored_check",
    "scored_lists_check",
    "scored_pairs_check",
    "shown",
    "unpaired_check",
]
