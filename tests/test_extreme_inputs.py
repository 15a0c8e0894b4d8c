"""No NaN and no infinity: every loss at inputs far outside what training gives, and every trainer that meets them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss_contract import TABLE, every_loss, mean_loss, run

from halos_trl import losses
from halos_trl.humanline import Humanline
from halos_trl.logprobs import finite_exp, kl_k3
from halos_trl.records import GroupLogps, PolicyStep

# -- the losses ----------------------------------------------------------------------------------------------------

# Log-probs whose ratios reach +-1e4, among them what just overflows exp in float32 (88.8) and in float64 (710).
LOGPS = (0.0, -1e-30, -0.5, -30.0, -88.8, -104.0, -710.0, -1e4)
GARBAGE = (math.inf, -math.inf, math.nan)
OTHER = {
    "advantages": (0.0, 1.0, -1.0, 30.0, -30.0),
    "values": (0.0, 1.0, -1e6, 1e6),
    "discounted_future_rewards": (0.0, -1.0, 1e6),
}


def extreme(name: str, data: st.DataObject, dtype: torch.dtype) -> Any:
    """The loss's record of the contract's table, its shapes and masks filled with far-out values."""
    record = TABLE[name].make()
    filled = {}
    for field, table in record._asdict().items():
        if "mask" in field or field == "desirable":
            continue
        values = st.sampled_from(OTHER.get(field, LOGPS))
        entries = data.draw(st.lists(values, min_size=table.numel(), max_size=table.numel()), label=field)
        filled[field] = torch.tensor(entries, dtype=dtype).view(table.shape)
        if table.ndim == 2:
            mask = getattr(record, f"{field.split('_')[-1]}_mask", None)
            mask = record.mask if mask is None else mask
            garbage = data.draw(st.sampled_from(GARBAGE), label=f"{field} behind the mask")
            filled[field] = filled[field].where(mask != 0, garbage)
    return record._replace(**filled)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), humanline=st.sampled_from([None, Humanline()]))
def test_loss_gradient_and_metrics_are_finite(
    name: str, dtype: torch.dtype, data: st.DataObject, humanline: Humanline | None
) -> None:
    record = extreme(name, data, dtype)
    kwargs: dict[str, Any] = {"kl": data.draw(st.sampled_from([0.0, 1e4]))} if name == "kto" else {}
    if name == "grpo":
        kwargs["sequence_level"] = data.draw(st.booleans())
    leaves = {n: getattr(record, n).clone().requires_grad_() for n in TABLE[name].learned}
    record = record._replace(**leaves)
    out = run(name, record, humanline=humanline, **kwargs)
    mean_loss(out, record).backward()
    assert out.losses.isfinite().all()
    assert out.chosen_rewards.isfinite().all() and out.rejected_rewards.isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values()), out.metrics
    for field, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.isfinite().all(), (field, leaf.grad)


def surrogate(method: str, log_ratio: float, advantage: float, dtype: torch.dtype) -> tuple[float, float]:
    """Loss and gradient of one token of a clipped surrogate, without its other terms."""
    policy = torch.full((1, 1), log_ratio, dtype=dtype, requires_grad=True)
    zeros, ones = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1)
    if method == "grpo":
        group = GroupLogps(policy, zeros, ones, torch.tensor([advantage], dtype=dtype))
        out = losses.grpo(group, beta=0.0, epsilon=0.2)
    else:
        step = PolicyStep(policy, zeros, ones, zeros, zeros + advantage, zeros)
        out = losses.ppo(step, cliprange=0.2, kl_coef=0.0, critic_coef=0.0)
    out.losses.sum().backward()
    assert policy.grad is not None
    return out.losses.item(), policy.grad.item()


@pytest.mark.parametrize("method", ["grpo", "ppo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [50.0, 89.0, 1e4])
def test_clipped_surrogate_far_out(method: str, dtype: torch.dtype, log_ratio: float) -> None:
    # -min(ratio * A, 1.2 * A): nothing to gain at A = 0, clipped at A = 1, and unclipped at A = -1.
    assert surrogate(method, log_ratio, 0.0, dtype) == (0.0, 0.0)
    assert surrogate(method, log_ratio, 1.0, dtype) == (pytest.approx(-1.2), 0.0)
    loss, gradient = surrogate(method, log_ratio, -1.0, dtype)
    assert 0 < gradient <= loss < math.inf
    if log_ratio == 50.0 or (log_ratio == 89.0 and dtype == torch.float64):
        assert loss == gradient == pytest.approx(math.exp(log_ratio), rel=1e-5)
    # The other way round the ratio is 0: clipped to 0.8 where A is negative, no slope where it is positive.
    assert surrogate(method, -log_ratio, -1.0, dtype) == (pytest.approx(0.8), 0.0)
    assert surrogate(method, -log_ratio, 1.0, dtype) == (pytest.approx(0.0, abs=1e-20), pytest.approx(0, abs=1e-20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_and_exp_are_themselves_up_to_their_limit_and_keep_their_slope_beyond(dtype: torch.dtype) -> None:
    limit = {torch.float32: 66.0, torch.float64: 532.0}[dtype]
    x = torch.tensor([-1e4, -30.0, 0.0, 1e-3, 30.0, limit], dtype=dtype, requires_grad=True)
    assert torch.equal(finite_exp(x), x.exp())
    (slope,) = torch.autograd.grad(finite_exp(x).sum(), x)
    assert torch.equal(slope, x.exp())
    assert torch.equal(kl_k3(-x), torch.expm1(x) - x)
    far = torch.tensor([1e4, 2e4], dtype=dtype, requires_grad=True)
    for function, at in ((finite_exp, far), (kl_k3, -far)):
        value = function(at)
        (slope,) = torch.autograd.grad(value.sum(), far)
        assert value.isfinite().all() and value[1] > value[0] and (slope > 0).all() and slope.isfinite().all()
