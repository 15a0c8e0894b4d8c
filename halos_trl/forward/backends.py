"""Kernels for the attention of a packed row, and the choice among them.

On a CPU, and if no other kernel is available, `scaled_dot_product_attention` runs once for all spans of the same
lengths. On CUDA, the whole row needs one launch: variable-length FlashAttention, from torch or from the package
`flash_attn`, else FlexAttention with a block mask. Before its first use for each kind of call, a kernel is compared
with the computation by spans.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .layout import Layout, Span

logger = get_logger(__name__)


class Call(NamedTuple):
    """Arguments of an attention call.

    `query` is `(1, heads, N, D)`; `key` and `value` may have fewer heads, and `value` a different width. `window` is
    the number of tokens that a token attends to, including itself; `sinks` `(heads,)` are additional logits in the
    softmax.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: Layout
    dropout: float = 0.0
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def has_grouped_queries(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]


class Backend(NamedTuple):
    """A kernel: which calls it supports, and a function that returns `(1, N, heads, value width)`."""

    name: str
    serves: Callable[[Call], bool]
    compute: Callable[[Call], Tensor]


def attend(call: Call) -> Tensor:
    """Attention of a packed row, by the first kernel that supports the call and agrees with the spans."""
    for backend in BACKENDS.get(call.query.device.type, ()):
        if backend.serves(call) and _agrees(backend, call):
            return backend.compute(call)
    return by_spans(call)


# -- one call for all spans of the same lengths ---------------------------------------------------------------------


def by_spans(call: Call) -> Tensor:
    """Attention span by span: in plain torch for softcap or sinks, else by `scaled_dot_product_attention`.

    Spans with the same query and key lengths are stacked and computed together, because a micro-batch of short
    sequences has hundreds of spans but few different lengths.
    """
    layout, device = call.layout, call.query.device
    stacks, order = _stacks(layout, device)
    queries, keys, values = (x[0].transpose(0, 1) for x in (call.query, call.key, call.value))
    outputs = []
    for span, of_queries, of_keys in stacks:
        # (stacked spans, heads, tokens, width)
        q, k, v = (
            x[index].transpose(1, 2) for x, index in ((queries, of_queries), (keys, of_keys), (values, of_keys))
        )
        mask = _span_mask(layout, span, call.window, device)
        if call.softcap is None and call.sinks is None:
            out = scaled_dot_product_attention(
                q, k, v, mask, call.dropout, is_causal=mask is None, scale=call.scaling,
                enable_gqa=call.has_grouped_queries,
            )  # fmt: skip
        else:
            out = _written_out(q, k, v, mask, call.dropout, call.scaling, call.softcap, call.sinks)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[order][None]


class _Stack(NamedTuple):
    """Spans of the same lengths: one of them, and the indices of all their queries and keys in the packed row."""

    span: Span
    queries: Tensor
    keys: Tensor


def _stacks(layout: Layout, device: torch.device) -> tuple[list[_Stack], Tensor]:
    """The spans grouped by length, and the index of each token of the packed row in the concatenated stacks."""
    plan = ("stacks", device)
    if plan not in layout.plans:
        of_length: dict[tuple[int, int], list[Span]] = {}
        for span in layout.spans:
            of_length.setdefault((span.queries, span.keys), []).append(span)
        stacks, places = [], []
        for spans in of_length.values():
            queries = [range(s.start, s.stop) for s in spans]
            keys = [[*range(s.context_start, s.context_stop), *own] for s, own in zip(spans, queries, strict=True)]
            places += [place for own in queries for place in own]
            indices = (torch.tensor([list(row) for row in rows], device=device) for rows in (queries, keys))
            stacks.append(_Stack(spans[0], *indices))
        layout.plans[plan] = stacks, torch.tensor(places, device=device).argsort()
    return layout.plans[plan]  # type: ignore[return-value]


def _span_mask(layout: Layout, span: Span, window: int | None, device: torch.device) -> Tensor | None:
    """`(queries, keys)`, True where attended; None for a plain causal mask."""
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


# -- FlashAttention with variable lengths --------------------------------------------------------------------------


class _Lengths(NamedTuple):
    """Each span as a sequence of queries and a sequence of keys, the latter including its prompt."""

    keys: Tensor
    """Indices into the packed row of all keys, concatenated over spans."""
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int


def lengths_of(layout: Layout, device: torch.device) -> _Lengths:
    """The spans as sequences of variable length, with queries and keys aligned at the end."""
    key = ("lengths", device)
    if key not in layout.plans:
        spans = layout.spans
        rows = [[*range(s.context_start, s.context_stop), *range(s.start, s.stop)] for s in spans]
        layout.plans[key] = _Lengths(
            torch.tensor([k for row in rows for k in row], device=device),
            _starts([span.queries for span in spans], device),
            _starts([span.keys for span in spans], device),
            max(span.queries for span in spans),
            max(span.keys for span in spans),
        )
    return layout.plans[key]  # type: ignore[return-value]


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).to(torch.int32)


def _is_for_flash(call: Call) -> bool:
    width = call.query.shape[-1]
    return (
        call.query.dtype in (torch.float16, torch.bfloat16)
        and width == call.value.shape[-1]
        and width <= 256
        and width % 8 == 0
        and call.sinks is None
        and torch.cuda.get_device_capability(call.query.device) >= (8, 0)
    )


def by_torch_varlen(call: Call) -> Tensor:
    """Attention by `torch.nn.attention.varlen.varlen_attn` of torch 2.13 and newer."""
    kernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    query, key, value, lengths = _flat(call)
    out = kernel(
        query, key, value, lengths.query_starts, lengths.key_starts, lengths.most_queries, lengths.most_keys,
        scale=call.scaling, window_size=_flash_window(call), enable_gqa=call.has_grouped_queries,
    )  # fmt: skip
    return out[None]


def by_flash_attn(call: Call) -> Tensor:
    """Attention by `flash_attn_varlen_func` of the package `flash_attn`."""
    kernel = importlib.import_module("flash_attn").flash_attn_varlen_func
    query, key, value, lengths = _flat(call)
    softcap = {} if call.softcap is None else {"softcap": call.softcap}
    out = kernel(
        query, key, value, lengths.query_starts, lengths.key_starts, lengths.most_queries, lengths.most_keys,
        dropout_p=call.dropout, softmax_scale=call.scaling, causal=True, window_size=_flash_window(call), **softcap,
    )  # fmt: skip
    return out[None]


def _flat(call: Call) -> tuple[Tensor, Tensor, Tensor, _Lengths]:
    lengths = lengths_of(call.layout, call.query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (call.query, call.key, call.value))
    return query, key[lengths.keys], value[lengths.keys], lengths


def _flash_window(call: Call) -> tuple[int, int]:
    # Number of tokens to the left and to the right, excluding the token itself; -1 means no limit.
    return (-1 if call.window is None else call.window - 1, 0)


# -- FlexAttention -------------------------------------------------------------------------------------------------

_BLOCK = 128


def by_flex(call: Call) -> Tensor:
    """Attention by FlexAttention, on CUDA compiled with dynamic shapes, since every batch has a different length."""
    tokens = call.query.shape[2]
    fill = -tokens % _BLOCK
    query, key, value = (pad(x, (0, 0, 0, fill)) for x in (call.query, call.key, call.value))
    mask = _block_mask(call.layout, tokens + fill, call.window, query.device)
    out = _flex(query.device.type)(
        query, key, value, _capped(call.softcap), mask, call.scaling, call.has_grouped_queries
    )
    return out[:, :, :tokens].transpose(1, 2).contiguous()


@functools.cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    flex = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    return torch.compile(flex, dynamic=True) if device_type == "cuda" else flex


@functools.cache
def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _block_mask(layout: Layout, tokens: int, window: int | None, device: torch.device) -> Any:
    """The mask of `by_spans` for a row padded to `tokens`; padding tokens attend to themselves."""
    plan = ("flex", window, device)
    if plan not in layout.plans:
        own, context_start, context_stop = _bounds(layout, tokens, device)
        positions = pad(layout.position_ids[0].to(device), (0, tokens - layout.position_ids.shape[1]))

        def attended(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            of_prompt = (key >= context_start[query]) & (key < context_stop[query])
            seen = of_prompt | ((key >= own[query]) & (key <= query))
            return seen if window is None else seen & (positions[query] - positions[key] < window)

        create = importlib.import_module("torch.nn.attention.flex_attention").create_block_mask
        layout.plans[plan] = create(attended, None, None, tokens, tokens, device=device, BLOCK_SIZE=_BLOCK)
    return layout.plans[plan]


def _bounds(layout: Layout, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each token: the start of its span, and the start and stop of its prompt."""
    own, start, stop = list(range(tokens)), [0] * tokens, [0] * tokens
    for span in layout.spans:
        for bounds, value in ((own, span.start), (start, span.context_start), (stop, span.context_stop)):
            bounds[span.start : span.stop] = [value] * span.queries
    bounds_of_all = torch.tensor([own, start, stop], device=device)
    return bounds_of_all[0], bounds_of_all[1], bounds_of_all[2]


# -- choice of the kernel ------------------------------------------------------------------------------------------

_CUDA = (
    Backend(
        "torch.nn.attention.varlen",
        lambda call: _is_for_flash(call) and not call.dropout and call.softcap is None,
        by_torch_varlen,
    ),
    Backend("flash_attn", _is_for_flash, by_flash_attn),
    Backend("FlexAttention", lambda call: not call.dropout and call.sinks is None, by_flex),
)

BACKENDS = {"cuda": _CUDA}
"""Kernels for each device type, in order of preference."""

_verdicts: dict[object, bool] = {}

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Tolerance for the difference from the computation by spans, relative to the largest result or gradient if that is
above 1; 0.05 in half precision.
"""


def _agrees(backend: Backend, call: Call) -> bool:
    """Whether a kernel runs and gives the same result as the spans; tested once for each kind of call."""
    shape = (call.query.shape[1], call.key.shape[1], call.query.shape[3], call.value.shape[3])
    kind = (backend.name, call.query.device.type, call.query.dtype, shape, call.window is None, call.softcap)
    if kind not in _verdicts:
        reason = why_not(backend, call)
        _verdicts[kind] = reason is None
        if reason is None:
            logger.info(f"Packed rows use the attention kernel {backend.name}.")
        else:
            logger.warning(f"Packed rows do not use the attention kernel {backend.name}: {reason}.")
    return _verdicts[kind]


def why_not(backend: Backend, call: Call) -> str | None:
    """Test a kernel on a small row of the same kind, forward and backward; returns the problem, or None."""
    spans = [
        Span(0, 70, 0, 0),
        Span(70, 90, 0, 70),
        Span(90, 140, 0, 70),
        Span(140, 145, 0, 0),
        Span(145, 177, 140, 145),
    ]
    positions = [p for s in spans for p in range(s.keys - s.queries, s.keys)]
    device = call.query.device
    layout = Layout(
        torch.zeros(1, 177, dtype=torch.long, device=device), torch.tensor([positions], device=device), spans,
        torch.zeros(0, dtype=torch.long, device=device),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, x.shape[1], 177, x.shape[3]) for x in (call.query, call.key, call.value)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    weights = torch.randn(1, 177, shapes[0][1], shapes[2][3], generator=generator).to(device)
    window = None if call.window is None else 24

    def run(compute: Callable[[Call], Tensor], dtype: torch.dtype) -> list[Tensor]:
        query, key, value = tensors = [x.to(device, dtype).requires_grad_() for x in inputs]
        out = compute(Call(query, key, value, layout, scaling=call.scaling, window=window, softcap=call.softcap))
        return [out.float(), *(g.float() for g in torch.autograd.grad((out.float() * weights).sum(), tensors))]

    dtype = call.query.dtype
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        expected = run(by_spans, torch.float64 if dtype == torch.float64 else torch.float32)
        try:
            got = run(backend.compute, dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a missing package, a build for other devices, an unsupported shape
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    apart = max(((a - b).abs().max() / a.abs().max().clamp(min=1)).item() for a, b in zip(expected, got, strict=True))
    limit = TOLERANCE.get(dtype, 0.05)
    return None if apart <= limit else f"it differs by {apart:.2g} from `scaled_dot_product_attention`"


__all__ = [
    "BACKENDS",
    "Backend",
    "Call",
    "attend",
    "by_flash_attn",
    "by_flex",
    "by_spans",
    "by_torch_varlen",
    "lengths_of",
    "why_not",
]
