"""Disable dropout in all forms in which models implement it."""

from __future__ import annotations

import re
from typing import Any

import torch

_NOISE = re.compile("drop|jitter")
_RATES_OF_DROPOUT_MODULES = ("p", "prob", "rate")


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout rate in the model's modules to 0.

    `trl.trainer.utils.disable_dropout_in_model` changes only `torch.nn.Dropout`. Many models call functional dropout
    with a rate stored on a module (`attention_dropout` in most models, all dropout in OPT), skip whole layers
    (`layerdrop`), or add noise to the router (`router_jitter_noise`); PEFT stores some rates in a dictionary by
    adapter. The config is left unchanged, because it is saved with the model.
    """
    for module in model.modules():
        is_dropout = "drop" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            if not (_NOISE.search(name) or (is_dropout and name in _RATES_OF_DROPOUT_MODULES)):
                continue
            if _is_rate(value):
                setattr(module, name, 0.0)
            elif isinstance(value, dict):
                value.update({key: 0.0 for key, rate in value.items() if _is_rate(rate)})


def rates_in_config(model: Any) -> dict[str, float]:
    """Dropout rates above 0 in the model's config, by name."""
    found = model.config.get_text_config().to_dict()
    return {name: value for name, value in found.items() if _NOISE.search(name) and _is_rate(value)}


def _is_rate(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= 1
