"""Type checks for config fields, derived from their annotations.

`dataclass` does not check types: `humanline="false"` would enable humanline, and `max_length="long"` would only fail
in the middle of a run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import types
import typing
from numbers import Integral, Real
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from .checks import require

_PLAIN = (bool, int, float, str, list, dict, type(None))

_STANDS_FOR_NONE = {"max_grad_norm": 0.0}
"""Fields for which `None` means "no limit" although their annotation does not include it, and the equivalent value
that all versions of the Trainer accept.
"""

_MAY_BE_INFINITE = {"max_grad_norm"}

_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "dataset_num_proc",
    "precompute_ref_batch_size",
)
"""Integer fields that must be at least 1."""


def check_types(config: Any) -> None:
    """Check each field's value against its annotation and its choices. Raises a ValueError that names the field and
    the value.

    Boolean fields accept only `True` or `False`. Numeric fields accept neither `bool` nor NaN. Numbers written as
    strings ("1e-6") are converted, as `TrlParser` does for flags and YAML, and integral floats are converted for
    integer fields. Of the fields of `transformers.TrainingArguments`, only booleans, numbers and choices are checked;
    the rest is left to transformers.
    """
    config_class: type = type(config)
    for field, kinds in _checkable(config_class):
        if kinds is not None:
            setattr(config, field.name, _checked(field, kinds, getattr(config, field.name)))
        _check_choice(field, getattr(config, field.name))
    _check_what_hosts_trip_over(config)
    for name in _COUNTS:
        value = getattr(config, name, None)
        require(value is None or value >= 1, name, value, "it must be at least 1.", "Use an integer of at least 1.")


_REPORTS_TO_NONE = TrainingArguments.__dataclass_fields__["report_to"].default is None
"""Whether transformers accepts None, as its older versions do."""
_TEXTS = ("metric_for_best_model", "optim_args", "output_dir", "run_name")
_KEYS_AND_VALUES = re.compile(r"\s*[^=,]+=[^=,]*(,\s*[^=,]+=[^=,]*)*")


def _check_what_hosts_trip_over(config: Any) -> None:
    """Check fields of transformers whose own errors do not name the field."""
    for name in _TEXTS:
        value = getattr(config, name, None)
        require(
            value is None or isinstance(value, str | os.PathLike), name, value,
            f"it is a `{type(value).__name__}`.", "Pass a string, or leave it out.",
        )  # fmt: skip
    require(
        not config.optim_args or _KEYS_AND_VALUES.fullmatch(config.optim_args) is not None,
        "optim_args", config.optim_args, "the optimizer's settings are given by name.",
        'Write them as "name=value,name=value".',
    )  # fmt: skip
    require(
        not isinstance(config.accelerator_config, bool | int | float | list | tuple), "accelerator_config",
        config.accelerator_config, "it names settings.", "Pass a dict, or the path of a JSON file.",
    )  # fmt: skip
    noise = config.neftune_noise_alpha
    require(
        noise is None or noise >= 0, "neftune_noise_alpha", noise, "it is the magnitude of the noise.",
        "Use a number of at least 0, or leave it out.",
    )  # fmt: skip
    multiple = getattr(config, "pad_to_multiple_of", None)
    require(
        multiple in (None, "auto") or (isinstance(multiple, int) and multiple >= 1), "pad_to_multiple_of", multiple,
        "lengths are padded to a multiple of it.", "Use an integer of at least 1, or leave it out.",
    )  # fmt: skip
    settings = config.accelerator_config
    require(
        not isinstance(settings, str) or os.path.isfile(settings), "accelerator_config", settings,
        "there is no such file.", "Pass a dict, or the path of a JSON file.",
    )  # fmt: skip
    known = ("all", "none", *INTEGRATION_TO_CALLBACK)
    require(
        _names_trackers(config.report_to, known), "report_to", config.report_to, "it is not a known tracker.",
        f"Use one or several of {', '.join(map(repr, known))}.",
    )  # fmt: skip


def _names_trackers(report_to: Any, known: tuple[str, ...]) -> bool:
    if report_to is None:
        return _REPORTS_TO_NONE
    names = [report_to] if isinstance(report_to, str) else report_to
    return isinstance(names, list | tuple) and all(name in known for name in names)


@functools.cache
def _checkable(config_class: type) -> list[tuple[dataclasses.Field, set[type] | None]]:
    """The fields of a config class, each with the types it accepts, or None for any."""
    hints = _hints(config_class)
    hosts = {f.name for f in dataclasses.fields(TrainingArguments)}
    pairs = [(f, _kinds(hints.get(f.name))) for f in dataclasses.fields(config_class)]
    return [(f, None if kinds and f.name in hosts and kinds & {str, dict} else kinds) for f, kinds in pairs]


def _hints(config_class: type) -> dict[str, Any]:
    for base in config_class.__mro__:
        try:
            return typing.get_type_hints(base)
        except NameError:  # a user's class may use names that are imported only for type checkers
            continue
    return {}


def _kinds(hint: Any) -> set[type] | None:
    """The plain types that make up an annotation; None if it contains other types."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = [typing.get_origin(part) or part for part in (typing.get_args(hint) if union else [hint])]
    return set(parts) if all(part in _PLAIN for part in parts) else None


def _checked(field: dataclasses.Field, kinds: set[type], value: Any) -> Any:
    if value is None:
        optional = type(None) in kinds or field.default is None or field.name in _STANDS_FOR_NONE
        require(optional, field.name, value, "None is not allowed here.", f"Pass {_names(kinds)}, or leave it out.")
        return _STANDS_FOR_NONE.get(field.name)
    if any(kind in kinds and _is_a(kind, value) for kind in (bool, str, list, dict)):
        return value
    number = _number(value, kinds) if kinds & {int, float} else None
    require(number is not None, field.name, value, f"it is a `{type(value).__name__}`.", f"Pass {_names(kinds)}.")
    finite = math.isfinite(number) or (field.name in _MAY_BE_INFINITE and not math.isnan(number))  # type: ignore[arg-type]
    require(finite, field.name, value, "it is not finite.", "Use a finite number.")
    return number


def _is_a(kind: type, value: Any) -> bool:
    # TRL accepts a string for a list of one element.
    return isinstance(value, (list, tuple, str) if kind is list else kind)


def _number(value: Any, kinds: set[type]) -> int | float | None:
    """The value converted to the expected type of number; None if that is not possible."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = int(value) if float not in kinds else float(value)
        except ValueError:
            return None
    if isinstance(value, Real) and float in kinds:
        return value  # type: ignore[return-value]
    if isinstance(value, Integral) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return None


def _names(kinds: set[type]) -> str:
    words = {bool: "True or False", float: "a number", int: "an integer", str: "a string", list: "a list"}
    words |= {dict: "a dict", type(None): "None"}
    return " or ".join(text for kind, text in words.items() if kind in kinds and not (kind is int and float in kinds))


def _check_choice(field: dataclasses.Field, value: Any) -> None:
    choices = field.metadata.get("choices")
    if choices and value != field.default and not (isinstance(value, str) and value in choices):
        require(
            False, field.name, value, "it is not one of the choices.", f"Use one of {', '.join(map(repr, choices))}."
        )
