"""Attention kernels for packed rows, as far as they run on a CPU, and the choice among them.

tests/test_gpu.py runs them where they belong.
"""

import sys
import types

import pytest
import torch
from accelerate import PartialState

from halos_trl.forward import backends
from halos_trl.forward.backends import (
    Backend,
    Call,
    attend,
    by_flash_attn,
    by_flex,
    by_spans,
    why_not,
)
from halos_trl.forward.layout import shared_prompt_layout

FLASH = Backend("flash_attn", lambda call: True, by_flash_attn)


def call_of(dtype=torch.float32, heads=(4, 2), **settings):
    """Attention over a pair, a single row, and a group of three whose prompt is one token."""
    lengths = [(9, [3, 14]), (30, [7]), (1, [5, 1, 2])]
    rows = [(i + 1, p, c) for i, (p, completions) in enumerate(lengths) for c in completions]
    width = max(p + c for _, p, c in rows)
    ids = torch.tensor([[token] * (p + c) + [0] * (width - p - c) for token, p, c in rows])
    ends = torch.tensor([[p, p + c] for _, p, c in rows])
    columns = torch.arange(width)
    mask = ((columns >= ends[:, :1]) & (columns < ends[:, 1:])).long()
    layout = shared_prompt_layout(ids, (columns < ends[:, 1:]).long(), mask)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, layout.input_ids.shape[1], 16, generator=generator).to(dtype).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    )
    return Call(query, key, value, layout, **settings)


def detached(call):
    return call._replace(query=call.query.detach(), key=call.key.detach(), value=call.value.detach())


def atol_of(settings):
    return 1e-6 if "softcap" in settings else 1e-10  # written out, the softmax is computed in float32


def with_gradients(compute, call):
    out = compute(call)
    return [out, *torch.autograd.grad(out.square().sum(), (call.query, call.key, call.value))]


SETTINGS = {
    "plain": {},
    "window": {"window": 8},
    "softcap": {"softcap": 0.5},
    "scale": {"scaling": 0.1},
    "all heads": {"heads": (4, 4)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_block_mask_of_flex_attention_is_that_of_the_spans(settings):
    call = call_of(torch.float64, **settings)
    with torch.no_grad():  # on a CPU it has no backward pass
        torch.testing.assert_close(by_flex(detached(call)), by_spans(call), rtol=0, atol=atol_of(settings))


def varlen(
    query, key, value, query_starts, key_starts, most_queries, most_keys, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """`flash_attn_varlen_func` as its documentation has it, in plain torch."""
    assert causal and dropout_p == 0.0 and query_starts.dtype == key_starts.dtype == torch.int32
    outputs = []
    for i in range(len(query_starts) - 1):
        q, (k, v) = (
            query[query_starts[i] : query_starts[i + 1]],
            (
                x[key_starts[i] : key_starts[i + 1]].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
                for x in (key, value)
            ),
        )
        assert len(q) <= most_queries and len(k) <= most_keys
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # The mask is aligned to the bottom right corner, so that the last query sees the last key.
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (distance >= 0) & ((distance <= window_size[0]) | torch.tensor(window_size[0] < 0))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.fixture
def flash_attn(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_lengths_for_flash_attention_are_those_of_the_spans(settings, flash_attn):
    call = call_of(torch.float64, **settings)
    results = [with_gradients(compute, call) for compute in (by_flash_attn, by_spans)]
    torch.testing.assert_close(*results, rtol=0, atol=atol_of(settings))
    assert why_not(FLASH, call) is None


# -- which one -----------------------------------------------------------------------------------------------------


@pytest.fixture
def of_cpu(monkeypatch):
    """Sets the kernels that are tried on a CPU."""
    PartialState()  # for the logger
    monkeypatch.setattr(backends, "_verdicts", {})
    return lambda *kernels: monkeypatch.setattr(backends, "BACKENDS", {"cpu": kernels})


def test_a_cpu_has_the_spans_alone():
    assert "cpu" not in backends.BACKENDS
    assert [kernel.name for kernel in backends.BACKENDS["cuda"]] == [
        "torch.nn.attention.varlen", "flash_attn", "FlexAttention",
    ]  # fmt: skip


def test_kernel_that_is_missing_fails_or_differs_is_passed_over_once(of_cpu, said, caplog):
    def shifted(call):
        return by_spans(call).roll(1, dims=1)

    calls = []
    right = Backend("right", lambda call: True, lambda call: calls.append(1) or by_spans(call))
    of_cpu(
        FLASH,
        Backend("flex", lambda call: True, by_flex),
        Backend("wrong", lambda c: True, shifted),
        right,
    )
    call = call_of()
    for _ in range(2):
        torch.testing.assert_close(attend(call), by_spans(call))
    messages = said().splitlines()
    assert len(messages) == 3
    assert (
        "do not use the attention kernel flash_attn: ModuleNotFoundError: No module named 'flash_attn'" in messages[0]
    )
    assert (
        "do not use the attention kernel flex: NotImplementedError: FlexAttention does not support backward on CPU"
        in messages[1]
    )
    assert "do not use the attention kernel wrong: it differs by" in messages[2]
    assert len(calls) == 3  # its own check, and twice for the call


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "varlen"), ({"softcap": 5.0}, "flash_attn"), ({"dropout": 0.1}, "flash_attn"), ({"window": 4}, "varlen"),
        ({"dtype": torch.float32}, "Flex"), ({"dtype": torch.float32, "dropout": 0.1}, None),
        ({"sinks": torch.zeros(4)}, None),
    ],
)  # fmt: skip
def test_what_each_kernel_of_cuda_serves(settings, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    call = call_of(**{"dtype": torch.bfloat16} | settings)
    names = [kernel.name for kernel in backends.BACKENDS["cuda"] if kernel.serves(call)]
    assert (names[0] if names else "").find(expected or "") >= 0 and bool(names) == (expected is not None)
