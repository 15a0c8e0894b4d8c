"""Attention over a packed row: each completion attends to its prompt and to itself, each prompt to itself.

Registered through transformers' `AttentionInterface` under a name of its own beside each implementation that a model
may use, so that a forward pass without a layout (generation, logits for `compute_metrics`) runs as before.
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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from .layout import Layout, Span

PREFIX = "halos_packed_"

_packed: ContextVar[bool] = ContextVar("packed", default=False)


class PackedForwardError(ValueError):
    """The model cannot run on a packed row, e.g. since it asks its attention for something that such a row lacks."""


@contextlib.contextmanager
def packed_forward() -> Iterator[None]:
    """Inside, models build no mask: the layout says what attends to what."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def register(implementation: str) -> str:
    """The name under which packed rows are understood and everything else runs as under `implementation`."""
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


# Arguments that models pass along and that say nothing about what attends to what.
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

    `query` is `(1, heads, N, D)`; `key` and `value` may have fewer heads and `value` another width. Returns
    `(1, N, heads, value width)`. Raises `PackedForwardError` for arguments that change the attention in another
    way.
    """
    asked = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if asked or others.get("is_causal") is False:
        raise PackedForwardError(f"its attention takes {asked or ['is_causal=False']}")
    lengths = [span.queries for span in layout.spans]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    prompt_of = _prompts(layout)
    outputs = []
    for i, span in enumerate(layout.spans):
        k, v = keys[i], values[i]
        if prompt_of[i] is not None:
            k, v = torch.cat([keys[prompt_of[i]], k], dim=2), torch.cat([values[prompt_of[i]], v], dim=2)
        mask = _span_mask(layout, span, sliding_window, query.device)
        if softcap is None and s_aux is None:
            out = scaled_dot_product_attention(
                queries[i], k, v, mask, dropout, is_causal=mask is None, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
        else:
            out = _written_out(queries[i], k, v, mask, dropout, scaling, softcap, s_aux)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _prompts(layout: Layout) -> list[int | None]:
    """The index of the span that each span attends to besides itself."""
    if "prompts" not in layout.plans:
        at = {span.start: i for i, span in reversed(list(enumerate(layout.spans)))}
        layout.plans["prompts"] = [
            at[span.context_start] if span.context_stop > span.context_start else None for span in layout.spans
        ]
    return layout.plans["prompts"]  # type: ignore[return-value]


def _span_mask(layout: Layout, span: Span, window: int | None, device: torch.device) -> Tensor | None:
    """`(queries, keys)`, True where attended; None for a plain causal square."""
    context = span.keys - span.queries
    if window is not None and window >= span.keys:
        window = None
    if not context and window is None:
        return None
    key = (span.queries, span.keys, window, device)
    if key not in layout.plans:
        distance = (torch.arange(span.queries, device=device) + context)[:, None] - torch.arange(
            span.keys, device=device
        )
        mask = distance >= 0
        layout.plans[key] = mask if window is None else mask & (distance < window)
    return layout.plans[key]  # type: ignore[return-value]


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.dropout(weights, dropout, train=dropout > 0) @ value
