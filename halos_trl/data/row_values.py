"""Checks of a row's scores, labels, ids and arguments of the chat template, with error texts.

Each check returns None, or the end of a sentence that starts with "Row 3 of the train dataset", with advice.
"""

from __future__ import annotations

import inspect
import json
import math
import reprlib
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin

Row: TypeAlias = dict[str, Any]
Problem: TypeAlias = str | None

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns passed to the chat template in addition to the messages."""

LARGEST_SCORE = 1e12
"""Its square, summed over the tokens of a step, is far below the maximum of float32 (3e38)."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxdict = 3


def shown(value: Any) -> str:
    """A value for an error message: its `repr`, shortened."""
    return _short.repr(value)


def score_problem(score: Any) -> Problem:
    """The problem of a score, which must be a finite number."""
    is_number = isinstance(score, Real) and not isinstance(score, bool) and score == score
    if is_number and abs(score) <= LARGEST_SCORE:
        return None
    if is_number and abs(score) != math.inf:
        return (
            f"has score {shown(score)}; the absolute value may be at most {LARGEST_SCORE:.0e}, because float32 losses "
            "square it. Rescale the scores, e.g. to a few units."
        )
    return (
        f"has score {shown(score)}; expected a finite number. Fix the score or remove the row: the score would "
        "invalidate the advantages of the whole group."
    )


SAMPLER_COLUMNS = ("token_ids", "logprobs")
"""Columns that a sampler stores for a completion, with vLLM's names: token ids, and their log-probs in nats."""


def sampler_problem(token_ids: Any, logprobs: Any) -> Problem:
    """The problem of a sampled completion's tokens and log-probs: one finite number, 0 or less, per token."""
    remedy = "Sample with `halos-trl sample --logprobs`, or remove both columns."
    if not (isinstance(token_ids, list) and token_ids and all(map(_is_token_id, token_ids))):
        return f"has `token_ids` {shown(token_ids)}; expected the list of the completion's token ids. {remedy}"
    if not isinstance(logprobs, list):
        return f"has `logprobs` {shown(logprobs)}; expected a list with one number for each token. {remedy}"
    if len(logprobs) != len(token_ids):
        return (
            f"has {len(token_ids)} `token_ids` and {len(logprobs)} `logprobs`; expected one for each token. {remedy}"
        )
    for position, value in enumerate(logprobs):
        if not (isinstance(value, Real) and not isinstance(value, bool) and -math.inf < float(value) <= 0):
            return (
                f"has {shown(value)} at position {position} of its `logprobs`; expected finite numbers of at most 0, "
                "the natural logarithms of probabilities. Drop the row, or remove both columns."
            )
    return None


def _is_token_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def label_problem(label: Any) -> Problem:
    """The problem of a label, which must be a boolean, or the number 0 or 1."""
    if isinstance(label, bool | np.bool_) or (isinstance(label, Integral) and label in (0, 1)):
        return None
    return (
        f"has label {shown(label)} of type {type(label).__name__}; expected a boolean, or the integer 0 or 1 "
        "(True and 1: desirable). Write true or false in a JSON file, or convert the column, e.g. "
        "`dataset.map(lambda row: {'label': row['score'] > 0})`. If the values are scores, rename the column to "
        "`score` and use `GRPOTrainer` or `PPOTrainer`."
    )


def prompt_id_problem(row: Row) -> Problem:
    """The problem of a row's `prompt_id`, if it has one, which must be text or a number other than NaN."""
    if "prompt_id" not in row:
        return None
    value = row["prompt_id"]
    if isinstance(value, str | Integral) or (isinstance(value, Real) and math.isfinite(value)):
        return None
    missing = value is None or isinstance(value, Real)
    fault = (
        f"has no `prompt_id` ({value!r}), although the dataset has that column"
        if missing
        else f"has `prompt_id` {shown(value)} of type {type(value).__name__}; expected a text or a number"
    )
    return f"{fault}. Fill it in for every row, or remove the column; rows with equal prompts then form a group."


# -- arguments of the chat template ----------------------------------------------------------------------------------


def _arguments_of_template() -> frozenset[str]:
    """Keys not allowed in `chat_template_kwargs`: arguments of `apply_chat_template`, not template variables."""
    methods = (PreTrainedTokenizerBase.apply_chat_template, ProcessorMixin.apply_chat_template)
    names = {name for method in methods for name in inspect.signature(method).parameters}
    variables = {"documents", "kwargs"}
    return frozenset(names - variables | {"messages", "conversations", "processing_class", "input"})


_RESERVED = _arguments_of_template()


def template_problem(row: Row) -> Problem:
    """The problem of a row's `tools` or `chat_template_kwargs`, if it has them."""
    problem = tools_problem(row["tools"]) if row.get("tools") is not None else None
    if problem is None and row.get("chat_template_kwargs") is not None:
        problem = template_kwargs_problem(row["chat_template_kwargs"])
    return problem


def tools_problem(tools: Any) -> Problem:
    """The problem of a row's tools, which must be a list of JSON schemas, or such a list as JSON text."""
    try:
        schemas = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError) as error:
        return (
            f"has `tools` that cannot be read as JSON ({error}): {shown(tools)}. Use a list of JSON schemas, or null "
            "for no tools."
        )
    if schemas is None:
        return None
    if isinstance(schemas, list) and all(isinstance(tool, dict) or callable(tool) for tool in schemas):
        return None
    return (
        f"has `tools` {shown(tools)}; expected a list of JSON schemas, each a dict, or such a list as JSON text. Use "
        "null for no tools."
    )


def template_kwargs_problem(kwargs: Any) -> Problem:
    """The problem of a row's template variables, which must be a dict without arguments of the call."""
    if not isinstance(kwargs, dict):
        return (
            f"has `chat_template_kwargs` {shown(kwargs)} of type {type(kwargs).__name__}; expected a dict of "
            "variables of the chat template, e.g. {'enable_thinking': False}. Use null for none."
        )
    # `datasets` fills missing keys in a column of dicts with None.
    reserved = sorted(str(key) for key, value in kwargs.items() if key in _RESERVED and value is not None)
    if not reserved:
        return None
    return (
        f"has {', '.join(f'`{key}`' for key in reserved)} in `chat_template_kwargs`: {shown(kwargs)}. A row may set "
        "variables of the chat template, but not the template itself or arguments of `apply_chat_template`. Remove "
        "the key; set the template on the tokenizer (`processing_class.chat_template`)."
    )
