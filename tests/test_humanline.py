"""The humanline clamp: values, gradients, the unclamped fraction, and refused arguments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halos_trl.humanline import Humanline, log_ratios

# Powers of two, so that sums and differences are exact and "exactly at a bound" is meant literally.
BOUNDS = Humanline(-1.0, 1.5)
RATIOS = [-4.0, -1.0, -0.5, 0.0, 0.25, 1.5, 2.0]
OUTSIDE = [True, False, False, False, False, False, True]


def one_row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_log_ratios_are_held_at_the_bounds() -> None:
    reference = one_row([-2.0] * 7)
    got, _ = log_ratios(reference + one_row(RATIOS), reference, torch.ones(1, 7), BOUNDS)
    assert got.tolist() == [[-1.0, -1.0, -0.5, 0.0, 0.25, 1.5, 1.5]]


def test_gradient_passes_inside_and_at_a_bound_but_not_outside() -> None:
    policy, reference = one_row(RATIOS).requires_grad_(), torch.zeros(1, 7).double().requires_grad_()
    log_ratios(policy, reference, torch.ones(1, 7), BOUNDS)[0].sum().backward()
    assert policy.grad is not None and reference.grad is not None
    assert policy.grad.tolist() == [[0.0 if outside else 1.0 for outside in OUTSIDE]]
    assert torch.equal(reference.grad, -policy.grad)


def test_unclamped_fraction_counts_as_halos_does() -> None:
    # Not exactly 0: six of seven. Strictly inside the bounds and not 0: -0.5 and 0.25.
    _, fraction = log_ratios(one_row(RATIOS), one_row([0.0] * 7), torch.ones(1, 7), BOUNDS)
    assert fraction.item() == pytest.approx(2 / 6, abs=1e-15)
    # Masked positions count neither way: left are -1 and -0.5.
    _, fraction = log_ratios(one_row(RATIOS), one_row([0.0] * 7), torch.tensor([[0, 1, 1, 0, 0, 0, 0]]), BOUNDS)
    assert fraction.item() == 0.5


@pytest.mark.parametrize(
    ("rows", "humanline", "expected"),
    [
        pytest.param(2, BOUNDS, 0.0, id="policy equals reference"),
        pytest.param(2, None, 1.0, id="humanline off"),
        pytest.param(0, BOUNDS, 1.0, id="no rows"),
    ],
)
def test_unclamped_fraction_at_its_limits(rows: int, humanline: Humanline | None, expected: float) -> None:
    same = torch.full((rows, 3), -1.0)
    got, fraction = log_ratios(same.clone().requires_grad_(), same, torch.ones(rows, 3), humanline)
    assert fraction.item() == expected
    assert fraction.shape == () and not fraction.requires_grad
    assert not got.any()


def test_without_humanline_log_ratios_are_the_masked_difference() -> None:
    got, _ = log_ratios(one_row([-1.0, -9.0, -3.0]), one_row([-2.0, -1.0, -7.0]), torch.tensor([[1, 1, 0]]))
    assert got.tolist() == [[1.0, -8.0, 0.0]]


def test_without_reference_the_log_probs_are_clamped() -> None:
    policy = one_row([-3.0, -0.5, -1.0, -0.25])
    got, fraction = log_ratios(policy, None, torch.tensor([[1, 1, 1, 0]]), BOUNDS)
    assert got.tolist() == [[-1.0, -0.5, -1.0, 0.0]]
    assert fraction.item() == pytest.approx(1 / 3, abs=1e-15)


def test_half_precision_is_upcast_before_the_difference() -> None:
    # 10 - 1/16 is not a bfloat16 number, so a difference taken in bfloat16 would be off by as much as itself.
    policy, reference = torch.tensor([[-10.0]], dtype=torch.bfloat16), torch.tensor([[-9.9375]], dtype=torch.bfloat16)
    mixed, _ = log_ratios(policy.float() + 0.001, reference, torch.ones(1, 1))
    half, _ = log_ratios(policy, reference, torch.ones(1, 1))
    assert half.dtype == mixed.dtype == torch.float32
    assert half.item() == -0.0625
    assert mixed.item() == pytest.approx(-0.0615, abs=1e-6)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.1, 1.0),
        (-1.0, -0.1),
        (1.0, -1.0),
        (0.0, 0.0),
        (-math.inf, 1.0),
        (-1.0, math.inf),
        (math.nan, 1.0),
        (-1.0, math.nan),
    ],
)
def test_bounds_that_make_no_sense_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"log_epsilon_p=.*log_epsilon_r=.*humanline=None"):
        Humanline(low, high)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 0.0)])
def test_a_bound_of_zero_is_legal(low: float, high: float) -> None:
    got, _ = log_ratios(one_row([-2.0, 2.0]), one_row([0.0, 0.0]), torch.ones(1, 2), Humanline(low, high))
    assert got.tolist() == [[low, high]]


def test_defaults_are_those_of_halos() -> None:
    assert Humanline() == Humanline(log_epsilon_p=-1.0, log_epsilon_r=1.5)


def test_bounds_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Humanline().log_epsilon_p = -2.0  # type: ignore[misc]


@pytest.mark.parametrize("wrong", ["policy", "reference", "mask"])
def test_nothing_is_broadcast(wrong: str) -> None:
    tables = {name: torch.zeros(2, 3) for name in ("policy", "reference", "mask")}
    tables[wrong] = tables[wrong][:1]
    with pytest.raises(ValueError, match="nothing is broadcast"):
        log_ratios(tables["policy"], tables["reference"], tables["mask"], BOUNDS)


@settings(max_examples=25, deadline=None)
@given(
    ratios=st.lists(st.floats(-50, 50), min_size=1, max_size=8),
    low=st.floats(-5, 0),
    width=st.floats(0.01, 5),
    data=st.data(),
)
def test_clamped_log_ratios_stay_within_the_bounds(
    ratios: list[float], low: float, width: float, data: st.DataObject
) -> None:
    bounds = Humanline(low, max(low + width, 0.01))
    mask = torch.tensor([data.draw(st.lists(st.integers(0, 1), min_size=len(ratios), max_size=len(ratios)))])
    policy = one_row(ratios)
    got, fraction = log_ratios(policy, torch.zeros_like(policy), mask, bounds)
    assert ((bounds.log_epsilon_p <= got) & (got <= bounds.log_epsilon_r)).all()
    assert (got[mask == 0] == 0).all()
    assert 0 <= fraction <= 1
    inside = (mask == 1) & (bounds.log_epsilon_p <= policy) & (policy <= bounds.log_epsilon_r)
    assert torch.equal(got[inside], policy[inside])
