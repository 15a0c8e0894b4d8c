"""Checks that the config classes share, with their error messages."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any


def require(condition: bool, name: str, value: Any, why: str, remedy: str) -> None:
    if not condition:
        raise ValueError(f"`{name}={value!r}` cannot work: {why} {remedy}")


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(is_number(value) and value > 0, name, value, "it scales the loss.", "Use a finite number above 0.")


def require_not_negative(config: Any, name: str, why: str) -> None:
    value = getattr(config, name)
    require(is_number(value) and value >= 0, name, value, why, "Use a finite number of at least 0.")


def require_count(config: Any, name: str, why: str) -> None:
    value = getattr(config, name)
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(whole and value >= 1, name, value, why, "Use an integer of at least 1.")


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def check_sync(config: Any) -> None:
    if getattr(config, "sync_ref_model", False):
        if config.precompute_ref_log_probs:
            raise ValueError(
                "`sync_ref_model=True` and `precompute_ref_log_probs=True` cannot be combined: a moving reference "
                "makes log-probs computed before training stale. Disable one of them."
            )
        require(
            0 < config.ref_model_mixup_alpha <= 1, "ref_model_mixup_alpha", config.ref_model_mixup_alpha,
            "it is the weight of the policy in the mixed reference.", "Use a number in (0, 1].",
        )  # fmt: skip
        require_count(config, "ref_model_sync_steps", "it is a number of optimizer steps.")


def defaults_of(config_class: type) -> dict[str, Any]:
    """Field name -> default, for the fields of a config class that have one."""
    made = {f.name: f.default_factory() for f in fields(config_class) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(config_class) if f.default is not MISSING}
