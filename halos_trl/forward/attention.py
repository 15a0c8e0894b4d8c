"""Attention over a packed row: each completion attends to its prompt and to itself, each prompt to itself.

For each attention implementation that a model may use, a second one with its own name is registered through
transformers' `AttentionInterface`. Forward passes without a layout (generation, logits for `compute_metrics`) are not
affected.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from .backends import Call, attend
from .layout import Layout

PREFIX = "halos_packed_"

_packed: ContextVar[bool] = ContextVar("packed", default=False)


class PackedForwardError(ValueError):
    """The model does not support packed rows, e.g. because of its attention's arguments."""


@contextlib.contextmanager
def packed_forward() -> Iterator[None]:
    """Context in which models build no attention mask, because the layout determines which tokens attend to which."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def register(implementation: str) -> str:
    """Register a variant of `implementation` that also supports packed rows, and return its name."""
    name = PREFIX + implementation.replace("flash_attention", "fa").replace("/", "_")
    if name not in AttentionInterface():
        AttentionInterface.register(name, partial(_attention, implementation))
        AttentionMaskInterface.register(name, partial(_mask, implementation))
    return name


def _mask(implementation: str, *args: Any, **kwargs: Any) -> Any:
    if _packed.get():
        return None
    return AttentionMaskInterface()[implementation](*args, **kwargs)


def _attention(
    implementation: str, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    *args: Any, layout: Layout | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if layout is None:
        plain: Callable[..., Any]
        if implementation == "eager":
            plain = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        else:
            plain = AttentionInterface()[implementation]
        return plain(module, query, key, value, attention_mask, *args, **kwargs)
    layout.seen_by.add(id(module))
    return packed_attention(module, query, key, value, layout, *args, **kwargs), None


# Arguments passed by models that do not affect which tokens attend to which.
_WITHOUT_EFFECT = {
    "cache_position",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **others: Any,
) -> Tensor:  # fmt: skip
    """Attention of a packed row.

    `query` is `(1, heads, N, D)`; `key` and `value` may have fewer heads, and `value` a different width. Returns
    `(1, N, heads, value width)`. Raises `PackedForwardError` for arguments that change the attention in an unsupported
    way.
    """
    asked = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if asked or others.get("is_causal") is False:
        raise PackedForwardError(f"its attention uses {asked or ['is_causal=False']}")
    return attend(Call(query, key, value, layout, dropout, scaling, sliding_window, softcap, s_aux))
