"""Properties that every loss must have, and hand-computed numbers for each of them.

The golden file (`test_golden.py`) says that the losses equal HALOs; this file says what may not happen to any loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halos_trl import losses
from halos_trl.advantages import gae, group_advantages
from halos_trl.humanline import Humanline
from halos_trl.logprobs import kl_k3, masked_mean, masked_var, sequence_mean, token_entropy, token_logps
from halos_trl.records import GroupLogps, LossOutput, PairedLogps, PolicyStep, UnpairedLogps

Record = PairedLogps | UnpairedLogps | GroupLogps | PolicyStep
few_examples = settings(max_examples=25, deadline=None)

LOG_2 = math.log(2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]])
OTHER_MASK = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])


def tables(count: int, seed: int = 0) -> list[Tensor]:
    """(B, T) log-prob tables in float64, log-ratios of about a nat."""
    generator = torch.Generator().manual_seed(seed)
    return [-torch.rand(MASK.shape, generator=generator, dtype=torch.float64) * 3 - 0.1 for _ in range(count)]


def make_paired() -> PairedLogps:
    chosen, rejected, reference_chosen, reference_rejected = tables(4)
    return PairedLogps(chosen, rejected, reference_chosen, reference_rejected, MASK, OTHER_MASK)


def make_unpaired() -> UnpairedLogps:
    policy, reference = tables(2)
    return UnpairedLogps(policy, reference, MASK, torch.tensor([True, False, False, True]))


def make_group() -> GroupLogps:
    policy, reference, old = tables(3)
    return GroupLogps(policy, reference, MASK, torch.tensor([1.0, -0.5, 0.25, -1.0], dtype=torch.float64), old)


def make_step() -> PolicyStep:
    policy, old, values, advantages, targets = tables(5)
    return PolicyStep(policy, old, MASK, values, advantages + 1.5, targets)


@dataclass(frozen=True)
class Entry:
    """A loss, how to make its record, the fields that receive a gradient, and arguments that it must refuse."""

    make: Callable[[], Record]
    learned: tuple[str, ...]
    refused: dict[str, tuple[Any, ...]]
    needed: dict[str, Any] = field(default_factory=dict)


NOT_POSITIVE = (0, 0.0, -1.0, math.nan, math.inf, "0.1")
NEGATIVE = (-0.1, math.nan, math.inf)
PAIR = ("policy_chosen", "policy_rejected")
TABLE = {
    "dpo": Entry(make_paired, PAIR, {"beta": NOT_POSITIVE}),
    "cdpo": Entry(make_paired, PAIR, {"beta": NOT_POSITIVE, "epsilon": (-0.1, 0.5, 1.0, math.nan)}),
    "ipo": Entry(make_paired, PAIR, {"tau": NOT_POSITIVE}),
    "simpo": Entry(make_paired, PAIR, {"beta": NOT_POSITIVE, "gamma_beta_ratio": NEGATIVE}),
    "slic": Entry(make_paired, PAIR, {"beta": NOT_POSITIVE, "lambda_coef": NEGATIVE}),
    "kto": Entry(
        make_unpaired,
        ("policy",),
        {"beta": NOT_POSITIVE, "desirable_weight": NEGATIVE, "undesirable_weight": NEGATIVE},
        {"kl": 0.3},
    ),
    "grpo": Entry(
        make_group, ("policy",), {"epsilon": NOT_POSITIVE, "epsilon_high": NOT_POSITIVE[1:], "beta": NEGATIVE}
    ),
    "ppo": Entry(
        make_step, ("policy", "values"), {"cliprange": NOT_POSITIVE, "critic_coef": NEGATIVE, "kl_coef": NEGATIVE}
    ),
}
PAIRED = ("dpo", "cdpo", "ipo", "simpo", "slic")
WITHOUT_REFERENCE = ("simpo", "slic")
every_loss = pytest.mark.parametrize("name", TABLE)
with_and_without_humanline = pytest.mark.parametrize("humanline", [None, Humanline()], ids=["plain", "humanline"])


def run(name: str, record: Record, **kwargs: Any) -> LossOutput:
    return getattr(losses, name)(record, **(TABLE[name].needed | kwargs))


def mean_loss(out: LossOutput, record: Record) -> Tensor:
    return out.losses.mean() if out.losses.ndim == 1 else out.losses.sum() / (mask_of(record) != 0).sum()


def mask_of(record: Record, name: str = "") -> Tensor:
    return getattr(record, f"{name.split('_')[-1]}_mask" if isinstance(record, PairedLogps) else "mask")


def fill_padding(record: Record, value: float) -> Any:
    fields = {n: t for n, t in record._asdict().items() if t.ndim == 2 and "mask" not in n}
    return record._replace(**{n: t.where(mask_of(record, n) != 0, value) for n, t in fields.items()})


def map_all(record: Record, change: Callable[[Tensor], Tensor]) -> Any:
    return record._replace(**{n: change(t) for n, t in record._asdict().items()})


def gradients(name: str, record: Record, **kwargs: Any) -> dict[str, Tensor]:
    leaves = {n: getattr(record, n).clone().requires_grad_() for n in TABLE[name].learned}
    changed: Any = record._replace(**leaves)
    mean_loss(run(name, changed, **kwargs), changed).backward()
    return {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def assert_same(a: LossOutput, b: LossOutput) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_table_holds_every_loss() -> None:
    assert set(TABLE) == set(losses.__all__) - {"kto_kl"}


# --------------------------------------------------------------------------------------------------------------------
# The contract
# --------------------------------------------------------------------------------------------------------------------

SIGNATURES = {
    "dpo": {"beta": 0.1, "humanline": None},
    "cdpo": {"beta": 0.1, "epsilon": 0.2, "humanline": None},
    "ipo": {"tau": 0.1, "humanline": None},
    "simpo": {"beta": 10.0, "gamma_beta_ratio": 0.3, "humanline": None},
    "slic": {"beta": 1.0, "lambda_coef": 0.1, "humanline": None},
    "kto": {
        "kl": inspect.Parameter.empty,
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "humanline": None,
    },
    "grpo": {"epsilon": 0.01, "beta": 0.01, "humanline": None, "epsilon_high": None, "sequence_level": False},
    "ppo": {"cliprange": 0.5, "critic_coef": 0.01, "kl_coef": 0.1, "humanline": None},
}


@every_loss
def test_signature(name: str) -> None:
    record, *options = inspect.signature(getattr(losses, name)).parameters.values()
    assert record.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options)
    assert {option.name: option.default for option in options} == SIGNATURES[name]


@every_loss
@with_and_without_humanline
def test_masked_tokens_have_no_effect_and_no_gradient(name: str, humanline: Humanline | None) -> None:
    record = TABLE[name].make()
    clean = run(name, record, humanline=humanline)
    for junk in (1e30, math.inf, -math.inf, math.nan):
        spoiled = fill_padding(record, junk)
        assert_same(run(name, spoiled, humanline=humanline), clean)
        for learned, grad in gradients(name, spoiled, humanline=humanline).items():
            assert (grad[mask_of(record, learned) == 0] == 0).all(), (learned, junk)
            assert grad.isfinite().all()
    if clean.losses.ndim == 2:
        assert (clean.losses[mask_of(record) == 0] == 0).all()


@every_loss
def test_unmasked_tokens_have_a_gradient(name: str) -> None:
    # Otherwise the test above would pass for a loss that is cut off from its input. A wide clip range and a wide
    # margin keep the kinks of GRPO, PPO and SLiC out of the way.
    wide = {"grpo": {"epsilon": 1e3}, "ppo": {"cliprange": 1e3}, "slic": {"beta": 1e3}}.get(name, {})
    record = TABLE[name].make()
    for learned, grad in gradients(name, record, **wide).items():
        assert (grad[mask_of(record, learned) != 0] != 0).all()


@every_loss
@with_and_without_humanline
def test_gradients_are_the_derivatives_of_the_loss(name: str, humanline: Humanline | None) -> None:
    record, learned = TABLE[name].make(), TABLE[name].learned

    def loss(*values: Tensor) -> Tensor:
        changed: Any = record._replace(**dict(zip(learned, values, strict=True)))
        return mean_loss(run(name, changed, humanline=humanline), changed)

    leaves = [getattr(record, n).clone().requires_grad_() for n in learned]
    assert torch.autograd.gradcheck(loss, leaves)


@every_loss
@with_and_without_humanline
@pytest.mark.parametrize("pad", [(0, 3), (2, 0)], ids=["right", "left"])
def test_padding_columns_change_nothing(name: str, humanline: Humanline | None, pad: tuple[int, int]) -> None:
    record = TABLE[name].make()
    padded = map_all(record, lambda t: torch.nn.functional.pad(t, pad) if t.ndim == 2 else t)
    out, wide = (run(name, r, humanline=humanline) for r in (record, padded))
    if wide.losses.ndim == 2:
        wide = wide._replace(losses=wide.losses[:, pad[0] : wide.losses.shape[1] - pad[1]])
    assert_same(wide, out)


@every_loss
@with_and_without_humanline
def test_rows_do_not_see_each_other(name: str, humanline: Humanline | None) -> None:
    record = TABLE[name].make()
    whole = run(name, record, humanline=humanline)
    singles: list[Any] = [record._replace(**{n: t[i : i + 1] for n, t in record._asdict().items()}) for i in range(4)]
    rows = [run(name, single, humanline=humanline) for single in singles]
    for part in ("losses", "chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(torch.cat([getattr(row, part) for row in rows]), getattr(whole, part))


@every_loss
@with_and_without_humanline
def test_precision(name: str, humanline: Humanline | None) -> None:
    def convert(dtype: torch.dtype) -> Any:
        return map_all(TABLE[name].make(), lambda t: t.to(dtype) if t.is_floating_point() else t)

    def floats(out: LossOutput) -> list[Tensor]:
        return [out.losses, out.chosen_rewards, out.rejected_rewards, *out.metrics.values()]

    exact = run(name, convert(torch.float64), humanline=humanline)
    assert all(t.dtype == torch.float64 for t in floats(exact))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        rounded = convert(dtype)
        out = run(name, rounded, humanline=humanline)
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in floats(out))
        # The loss of the very numbers that came in, to float32; and near the loss of the numbers before rounding.
        same = run(name, map_all(rounded, lambda t: t.double() if t.is_floating_point() else t), humanline=humanline)
        torch.testing.assert_close(out.losses.double(), same.losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.losses.double(), exact.losses, rtol=tolerance, atol=tolerance)


@every_loss
def test_rewards_and_metrics_are_detached_and_the_input_is_left_alone(name: str) -> None:
    record = TABLE[name].make()
    learned = {n: getattr(record, n).clone().requires_grad_() for n in TABLE[name].learned}
    before = map_all(record, torch.clone)
    changed: Any = record._replace(**learned)
    out = run(name, changed)
    assert out.losses.requires_grad
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
    assert all(not value.requires_grad and value.shape == () for value in out.metrics.values())
    for n, value in before._asdict().items():
        assert torch.equal(getattr(changed, n), value)


@every_loss
def test_no_gradient_flows_into_what_is_not_learned(name: str) -> None:
    entry, record = TABLE[name], TABLE[name].make()
    fixed = {
        n: t.clone().requires_grad_()
        for n, t in record._asdict().items()
        if n not in entry.learned and t.is_floating_point() and "reference" not in n and n != "old_policy"
    }
    changed: Any = record._replace(**fixed, **{n: getattr(record, n).clone().requires_grad_() for n in entry.learned})
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    mean_loss(run(name, changed, **({"kl": kl} if name == "kto" else {})), changed).backward()
    assert kl.grad is None and all(t.grad is None for t in fixed.values())


@every_loss
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda t: t[:1], id="one row"),
        pytest.param(lambda t: t[..., :1], id="one column"),
        pytest.param(lambda t: t[0] if t.ndim == 2 else t[:, None], id="dimension"),
        pytest.param(lambda t: t.tolist(), id="list"),
    ],
)
def test_nothing_is_broadcast(name: str, spoil: Callable[[Tensor], Any]) -> None:
    record = TABLE[name].make()
    for n in record._fields:
        if name in WITHOUT_REFERENCE and "reference" in n:
            continue
        changed: Any = record._replace(**{n: spoil(getattr(record, n))})
        with pytest.raises(ValueError, match=f"{type(record).__name__}.*expected"):
            run(name, changed)


@every_loss
def test_coefficients_out_of_range_are_refused(name: str) -> None:
    record = TABLE[name].make()
    for option, values in TABLE[name].refused.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"{option} is .*expected a number in"):
                run(name, record, **{option: value})


@pytest.mark.parametrize("name", [n for n in PAIRED if n not in WITHOUT_REFERENCE])
def test_a_missing_reference_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"reference_chosen is NoneType.*without a reference"):
        run(name, make_paired()._replace(reference_chosen=None, reference_rejected=None))


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
@with_and_without_humanline
def test_methods_without_reference_do_not_read_it(name: str, humanline: Humanline | None) -> None:
    record = make_paired()
    bare = record._replace(reference_chosen=None, reference_rejected=None)
    assert_same(run(name, bare, humanline=humanline), run(name, record, humanline=humanline))


def test_dtypes_that_cannot_be_meant_are_refused() -> None:
    record = make_unpaired()
    with pytest.raises(ValueError, match=r"desirable has dtype torch.int64; expected torch.bool"):
        run("kto", record._replace(desirable=torch.tensor([1, -1, -1, 1])))
    with pytest.raises(ValueError, match=r"policy has dtype torch.int64; expected a real floating dtype"):
        run("kto", record._replace(policy=record.policy.long()))


def test_kto_refuses_a_kl_per_row() -> None:
    with pytest.raises(ValueError, match=r"kl has shape \(4,\); expected one number"):
        run("kto", make_unpaired(), kl=torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
@every_loss
def test_masks_may_have_any_real_dtype(name: str, dtype: torch.dtype) -> None:
    record = TABLE[name].make()
    masks = {n: t.to(dtype) for n, t in record._asdict().items() if "mask" in n}
    changed: Any = record._replace(**masks)
    assert_same(run(name, changed), run(name, record))


@every_loss
@with_and_without_humanline
def test_rows_without_completion_tokens_stay_finite(name: str, humanline: Humanline | None) -> None:
    record = TABLE[name].make()
    masks = {n: torch.zeros_like(t) for n, t in record._asdict().items() if "mask" in n}
    changed: Any = record._replace(**masks)
    out = run(name, changed, humanline=humanline)
    for value in (out.losses, out.chosen_rewards, out.rejected_rewards, *out.metrics.values()):
        assert value.isfinite().all()
    leaves = {n: getattr(changed, n).clone().requires_grad_() for n in TABLE[name].learned}
    run(name, changed._replace(**leaves), humanline=humanline).losses.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.values())


# --------------------------------------------------------------------------------------------------------------------
# Signs and limits
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRED)
@with_and_without_humanline
def test_swapping_the_sides_swaps_the_rewards(name: str, humanline: Humanline | None) -> None:
    out, back = (run(name, record, humanline=humanline) for record in (make_paired(), make_paired().swapped()))
    assert torch.equal(out.chosen_rewards, back.rejected_rewards)
    assert torch.equal(out.rejected_rewards, back.chosen_rewards)
    assert out.metrics["unclamped/chosen"] == back.metrics["unclamped/rejected"]


@with_and_without_humanline
def test_swapping_the_sides_of_a_pair(humanline: Humanline | None) -> None:
    # With m the margin (beta included for DPO), from softplus(x) - softplus(-x) = x:
    #   dpo    loss(-m) - loss(m) = m
    #   cdpo   loss(-m) - loss(m) = (1 - 2 epsilon) m
    #   ipo    (-m - t)^2 - (m - t)^2 = 4 m t, with t = 1 / (2 tau)
    def difference(name: str, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, back = (run(name, r, humanline=humanline, **kwargs) for r in (make_paired(), make_paired().swapped()))
        return back.losses - out.losses, out.chosen_rewards - out.rejected_rewards

    got, margins = difference("dpo", beta=0.7)
    torch.testing.assert_close(got, margins)
    got, margins = difference("cdpo", beta=0.7, epsilon=0.1)
    torch.testing.assert_close(got, 0.8 * margins)
    got, margins = difference("ipo", tau=0.25)
    torch.testing.assert_close(got, 8 * margins)


@pytest.mark.parametrize("name", PAIRED)
def test_a_likelier_chosen_and_unlikelier_rejected_completion_lower_the_loss(name: str) -> None:
    # For IPO and SLiC as long as the margin is below its target, which a large one ensures.
    wide = {"ipo": {"tau": 0.01}, "slic": {"beta": 100.0}}.get(name, {})
    grads = gradients(name, make_paired(), **wide)
    assert (grads["policy_chosen"][MASK != 0] < 0).all()
    assert (grads["policy_rejected"][OTHER_MASK != 0] > 0).all()


def test_kto_raises_desirable_rows_and_lowers_the_others() -> None:
    record = make_unpaired()
    (grad,) = gradients("kto", record).values()
    assert (grad[record.desirable][MASK[record.desirable] != 0] < 0).all()
    assert (grad[~record.desirable][MASK[~record.desirable] != 0] > 0).all()


@pytest.mark.parametrize(
    ("name", "kwargs", "limit"),
    [
        ("dpo", {}, LOG_2),
        ("cdpo", {}, LOG_2),
        ("ipo", {"tau": 0.1}, 25.0),  # (0 - 1 / 0.2)^2
        ("ipo", {"tau": 0.25}, 4.0),  # (0 - 1 / 0.5)^2
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.0}, LOG_2),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, softplus(1.0)),
        ("slic", {"beta": 3.0, "lambda_coef": 0.0}, 3.0),
        ("kto", {"kl": 0.0}, 0.5),
        ("kto", {"kl": torch.tensor(0.0), "desirable_weight": 1.5, "undesirable_weight": 1.5}, 0.75),
    ],
)
@with_and_without_humanline
def test_limit_where_policy_equals_reference_and_both_sides_are_equal(
    name: str, kwargs: dict[str, Any], limit: float, humanline: Humanline | None
) -> None:
    (t,) = tables(1)
    record = PairedLogps(t, t, t, t, MASK, MASK) if name in PAIRED else make_unpaired()._replace(policy=t, reference=t)
    out = run(name, record, humanline=humanline, **kwargs)
    torch.testing.assert_close(out.losses, torch.full_like(out.losses, limit), rtol=1e-12, atol=0)


def test_limit_of_grpo_and_ppo_where_policy_equals_reference() -> None:
    # ratio 1 and log-ratio 0: -A for GRPO; for PPO -A plus the critic's part.
    group = make_group()._replace(policy=make_group().reference, old_policy=None)
    torch.testing.assert_close(run("grpo", group).losses, -group.advantages[:, None] * MASK)
    step = make_step()._replace(policy=make_step().old_policy)
    critic = 0.5 * (step.values - step.discounted_future_rewards) ** 2
    torch.testing.assert_close(run("ppo", step, critic_coef=0.2).losses, (0.2 * critic - step.advantages) * MASK)


def test_losses_stay_finite_and_keep_a_gradient_far_from_the_reference() -> None:
    # A log-ratio of 30 nats: 1 - sigmoid(30) is 0 in float32, sigmoid(-30) is not.
    policy = torch.full((2, 1), 30.0, requires_grad=True)
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1)
    out = losses.kto(UnpairedLogps(policy, zeros, ones, torch.tensor([True, False])), kl=0.0, beta=1.0)
    out.losses[0].backward()
    assert out.losses.tolist() == pytest.approx([math.exp(-30), 1.0], rel=1e-5)
    assert policy.grad is not None and policy.grad[0].item() == pytest.approx(-math.exp(-30), rel=1e-5)
    out = losses.dpo(PairedLogps(zeros, zeros + 500, zeros, zeros, ones, ones), beta=1.0)
    assert out.losses.tolist() == [500.0, 500.0]


# --------------------------------------------------------------------------------------------------------------------
# Numbers worked out by hand
# --------------------------------------------------------------------------------------------------------------------


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# Chosen log-ratios 1.0, 0.5 (sum 1.5, mean 0.75); rejected -2.0, 0.5, 0.25 (sum -1.25, mean -1.25 / 3). The third
# chosen and the first rejected position are padding.
HAND_PAIR = PairedLogps(
    policy_chosen=row(-1.0, -2.0, -7.0),
    policy_rejected=row(-9.0, -4.0, -1.0, -0.25),
    reference_chosen=row(-2.0, -2.5, -1.0),
    reference_rejected=row(-3.0, -2.0, -1.5, -0.5),
    chosen_mask=torch.tensor([[1, 1, 0]]),
    rejected_mask=torch.tensor([[0, 1, 1, 1]]),
)


@pytest.mark.parametrize(
    ("name", "kwargs", "loss", "chosen", "rejected"),
    [
        # margin 1.5 + 1.25 = 2.75; -log sigmoid(0.2 * 2.75) = softplus(-0.55)
        ("dpo", {"beta": 0.2}, softplus(-0.55), 0.3, -0.25),
        # clamped to [-1, 0.75]: chosen 0.75 + 0.5, rejected -1 + 0.5 + 0.25; margin 1.5, times 0.2
        ("dpo", {"beta": 0.2, "humanline": Humanline(-1, 0.75)}, softplus(-0.3), 0.25, -0.05),
        # 0.9 * softplus(-0.55) + 0.1 * softplus(0.55)
        ("cdpo", {"beta": 0.2, "epsilon": 0.1}, 0.9 * softplus(-0.55) + 0.1 * softplus(0.55), 0.3, -0.25),
        # means 3/4 and -5/12, margin 7/6; target 1 / 0.5 = 2; (7/6 - 2)^2 = 25/36
        ("ipo", {"tau": 0.25}, 25 / 36, 3 / 4, -5 / 12),
        # log-probs: means -3/2 and -5.25/3 = -7/4, margin 1/4; 2 * (1/4 - 1) = -3/2
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 1.0}, softplus(1.5), -1.5, -1.75),
        # clamped at -1.5: chosen (-1 - 1.5) / 2 = -5/4, rejected (-1.5 - 1 - 0.25) / 3 = -11/12; margin -1/3
        (
            "simpo",
            {"beta": 3.0, "gamma_beta_ratio": 0.0, "humanline": Humanline(-1.5, 1)},
            softplus(1.0),
            -5 / 4,
            -11 / 12,
        ),
        # sums -3 and -5.25: max(0, 4 + 3 - 5.25) = 1.75; minus 0.5 * -3
        ("slic", {"beta": 4.0, "lambda_coef": 0.5}, 3.25, -3.0, -5.25),
        # the margin of 2.25 exceeds beta: the regularizer is left
        ("slic", {"beta": 1.0, "lambda_coef": 0.5}, 1.5, -3.0, -5.25),
        # clamped at -1.5: sums -2.5 and -2.75: max(0, 1 + 2.5 - 2.75) = 0.75; the regularizer is not clamped
        ("slic", {"beta": 1.0, "lambda_coef": 0.5, "humanline": Humanline(-1.5, 1)}, 0.75 + 1.5, -2.5, -2.75),
    ],
)
def test_paired_numbers(name: str, kwargs: dict[str, Any], loss: float, chosen: float, rejected: float) -> None:
    out = run(name, HAND_PAIR, **kwargs)
    assert out.losses.tolist() == pytest.approx([loss], rel=1e-12)
    assert out.chosen_rewards.tolist() == pytest.approx([chosen], rel=1e-12)
    assert out.rejected_rewards.tolist() == pytest.approx([rejected], rel=1e-12)


# Summed log-ratios 1.5, -1.0, 0.5; the second row is undesirable.
HAND_UNPAIRED = UnpairedLogps(
    policy=torch.tensor([[-1.0, -1.5], [-3.0, -8.0], [-0.5, -0.25]]),
    reference=torch.tensor([[-2.0, -2.0], [-2.0, -1.0], [-0.25, -1.0]]),
    mask=torch.tensor([[1, 1], [1, 0], [1, 1]]),
    desirable=torch.tensor([True, False, True]),
)


def test_kto_numbers() -> None:
    # kl 0.5: gains 1.0, -1.5, 0.0, times beta 0.2. Desirable 2 * (1 - sigmoid(gain)); undesirable 3 * sigmoid(gain).
    out = losses.kto(HAND_UNPAIRED, kl=0.5, beta=0.2, desirable_weight=2.0, undesirable_weight=3.0)
    assert out.losses.tolist() == pytest.approx([2 * (1 - sigmoid(0.2)), 3 * sigmoid(-0.3), 1.0], rel=1e-6)
    assert out.chosen_rewards.tolist() == pytest.approx([0.3, 0.1], rel=1e-6)
    assert out.rejected_rewards.tolist() == pytest.approx([-0.2], rel=1e-6)
    # Clamped to [-0.5, 0.75]: sums 0.75 + 0.5, -0.5, -0.25 + 0.75.
    # Strictly inside: 0.5 of 1 and 0.5; nothing of -1; -0.25 of -0.25 and 0.75.
    out = losses.kto(HAND_UNPAIRED, kl=0.5, beta=0.2, humanline=Humanline(-0.5, 0.75))
    assert out.losses.tolist() == pytest.approx([sigmoid(-0.15), sigmoid(-0.2), 0.5], rel=1e-6)
    assert out.metrics["unclamped/chosen"].item() == 0.5
    assert out.metrics["unclamped/rejected"].item() == 0.0


def test_kto_kl_numbers() -> None:
    # Row sums 1.5, -1.0, 0.5: total 1.0 of three rows.
    assert [x.item() for x in losses.kto_kl(*HAND_UNPAIRED[:3])] == [1.0, 3.0]
    # Clamped to [-0.5, 0.75]: 1.25 - 0.5 + 0.5.
    assert [x.item() for x in losses.kto_kl(*HAND_UNPAIRED[:3], Humanline(-0.5, 0.75))] == [1.25, 3.0]
    # A row that is exactly 0 (here one without tokens) is not counted.
    mask, no_rows = torch.tensor([[1, 1], [0, 0], [1, 1]]), torch.zeros(0, 2)
    assert [x.item() for x in losses.kto_kl(*HAND_UNPAIRED[:2], mask)] == [2.0, 2.0]
    assert [x.item() for x in losses.kto_kl(no_rows, no_rows, no_rows)] == [0.0, 0.0]


def test_kto_without_kl_is_apo_zero_unpaired() -> None:
    # TRL's apo_zero_unpaired (arXiv 2408.06266, eq. 7): 1 - sigmoid(beta r) desirable, sigmoid(beta r) undesirable.
    record = make_unpaired()
    r = ((record.policy - record.reference) * MASK).sum(-1)
    expected = torch.where(record.desirable, 1 - torch.sigmoid(0.3 * r), torch.sigmoid(0.3 * r))
    torch.testing.assert_close(losses.kto(record, kl=0.0, beta=0.3).losses, expected)


def test_cdpo_without_wrong_labels_is_dpo() -> None:
    assert_same(losses.cdpo(make_paired(), epsilon=0.0), losses.dpo(make_paired()))


# Log-ratios log 2 and log 1/2, then one padding position.
L2 = math.log(2)
HAND_GROUP = GroupLogps(
    row(-1.0, -2.0, -3.0), row(-1.0 - L2, -2.0 + L2, -9.0), torch.tensor([[1, 1, 0]]), torch.ones(1)
)


@pytest.mark.parametrize(
    ("advantage", "kwargs", "expected"),
    [
        # min(2, 1.2) and min(0.5, 0.8)
        (1.0, {"epsilon": 0.2, "beta": 0.0}, (-1.2, -0.5)),
        # -3 * 2 is smaller than -3 * 1.2, -3 * 0.8 than -3 * 0.5
        (-3.0, {"epsilon": 0.2, "beta": 0.0}, (6.0, 2.4)),
        # only the upper side is wider
        (1.0, {"epsilon": 0.2, "epsilon_high": 0.5, "beta": 0.0}, (-1.5, -0.5)),
        (-3.0, {"epsilon": 0.2, "epsilon_high": 0.5, "beta": 0.0}, (6.0, 2.4)),
        # k3: 1/2 - 1 + log 2 and 2 - 1 - log 2
        (0.0, {"epsilon": 0.2, "beta": 0.5}, (0.5 * (L2 - 0.5), 0.5 * (1 - L2))),
        # clamped to [-log 4/3, log 3/2]: ratios 1.5 and 0.75; the KL part sees the unclamped ones
        (
            1.0,
            {"epsilon": 9.0, "beta": 1.0, "humanline": Humanline(-math.log(4 / 3), math.log(1.5))},
            (-1.5 + L2 - 0.5, -0.75 + 1 - L2),
        ),
        # mean log-ratio 0: one ratio of 1 for both tokens
        (1.0, {"epsilon": 0.2, "beta": 0.0, "sequence_level": True}, (-1.0, -1.0)),
        # clamped to [-log 2, 0]: mean -log(2) / 2, ratio 1 / sqrt(2), clipped at 0.8 for a negative advantage
        (
            -1.0,
            {"epsilon": 0.2, "beta": 0.0, "sequence_level": True, "humanline": Humanline(-L2, 0.0)},
            (0.8, 0.8),
        ),
    ],
)
def test_grpo_numbers(advantage: float, kwargs: dict[str, Any], expected: tuple[float, float]) -> None:
    out = losses.grpo(HAND_GROUP._replace(advantages=torch.tensor([advantage]).double()), **kwargs)
    assert out.losses.tolist() == [pytest.approx([*expected, 0.0], rel=1e-12, abs=1e-15)]


def test_grpo_metrics() -> None:
    out = losses.grpo(HAND_GROUP._replace(advantages=torch.tensor([-3.0]).double()), epsilon=0.6)
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {
            "kl": 0.25,  # (log 2 - 1/2 + 1 - log 2) / 2
            "weighted_advantage": 3.75,  # (6 + 1.5) / 2
            "mean_abs_advantage": 3.0,
            "clipfrac": 0.0,  # with a negative advantage a ratio above 1.6 is not clipped, and 0.5 is inside
            "unclamped": 1.0,
        }
    )
    assert losses.grpo(HAND_GROUP, epsilon=0.6).metrics["clipfrac"].item() == 0.5
    assert out.chosen_rewards.numel() == out.rejected_rewards.numel() == 0


def test_grpo_without_kl_penalty_survives_an_infinite_one() -> None:
    # exp(200) overflows float32, and 0 * inf would be NaN.
    policy = torch.full((1, 1), -200.0, requires_grad=True)
    out = losses.grpo(GroupLogps(policy, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1)), beta=0.0)
    out.losses.sum().backward()
    assert out.losses.isfinite().all() and policy.grad is not None and policy.grad.isfinite().all()


def test_ppo_numbers() -> None:
    # Ratios 2 and 1/2, clip range 0.2. Token 1: A = 1: -1.2; critic (3 - 1)^2 / 2 = 2; log-ratio log 2.
    # Token 2: A = -2: -min(-1, -1.6) = 1.6; critic (0 + 1)^2 / 2 = 1/2; log-ratio -log 2.
    step = PolicyStep(
        policy=HAND_GROUP.policy,
        old_policy=HAND_GROUP.reference,
        mask=HAND_GROUP.mask,
        values=row(3.0, 0.0, 5.0),
        advantages=row(1.0, -2.0, 5.0),
        discounted_future_rewards=row(1.0, -1.0, 5.0),
    )
    out = losses.ppo(step, cliprange=0.2, critic_coef=0.5, kl_coef=0.1)
    assert out.losses.tolist() == [pytest.approx([-1.2 + 1.0 + 0.1 * L2, 1.6 + 0.25 - 0.1 * L2, 0.0], rel=1e-12)]
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {
            "policy_loss": 0.2,  # (-1.2 + 1.6) / 2
            "critic_loss": 1.25,  # (2 + 1/2) / 2
            "policykl": 0.0,
            "clipfrac": 1.0,
            "seqratio": 1.0,  # 2 * 1/2
            "values_mean": 1.5,
            "values_var": 2.25,
            "unclamped": 1.0,
        },
        abs=1e-15,
    )
    # Humanline [-log 4/3, log 3/2]: ratios 1.5 and 0.75 in the surrogate, log 2 and -log 2 in the KL part.
    humanline = Humanline(-math.log(4 / 3), math.log(1.5))
    out = losses.ppo(step, cliprange=9.0, critic_coef=0.0, kl_coef=0.1, humanline=humanline)
    assert out.losses.tolist() == [pytest.approx([-1.5 + 0.1 * L2, 1.5 - 0.1 * L2, 0.0], rel=1e-12)]


# --------------------------------------------------------------------------------------------------------------------
# Log-probs
# --------------------------------------------------------------------------------------------------------------------


def test_token_logps_numbers() -> None:
    # Two tokens with logits 0 and log 3: probabilities 1/4 and 3/4. The first label is never scored.
    logits = torch.tensor([[[0.0, math.log(3)]] * 4], dtype=torch.float64)
    got = token_logps(logits, torch.tensor([[1, 0, -100, 1]]))
    assert got.tolist() == [pytest.approx([math.log(1 / 4), 0.0, math.log(3 / 4)], rel=1e-12)]
    assert got.dtype == torch.float64


def test_token_logps_have_no_gradient_at_ignored_labels() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    token_logps(logits, torch.tensor([[2, 3, -100, 1]])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(-1).ne(0).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("labels", [torch.zeros(2, 4).long(), torch.zeros(1, 3).long(), torch.zeros(4).long()])
def test_token_logps_refuse_other_shapes(labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, T, V\) and \(B, T\)"):
        token_logps(torch.zeros(2, 3, 5), labels)


def test_token_entropy_numbers() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)], [0.0, -math.inf]]], dtype=torch.float64)
    mixed = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert token_entropy(logits).tolist() == [pytest.approx([LOG_2, mixed, 0.0], rel=1e-12, abs=1e-15)]


def test_masked_statistics() -> None:
    x, mask = row(1.0, 3.0, 99.0), torch.tensor([[1, 1, 0]])
    assert (masked_mean(x, mask).item(), masked_var(x, mask).item(), sequence_mean(x, mask).item()) == (2.0, 1.0, 2.0)
    assert masked_mean(x, mask * 0).item() == masked_var(x, mask * 0).item() == sequence_mean(x, mask * 0).item() == 0


def test_k3_is_precise_near_zero() -> None:
    # exp(-r) - 1 + r = r^2 / 2 - r^3 / 6 + ...; in float32 the plain formula is 0 or 6e-8 here.
    assert kl_k3(torch.tensor(1e-3)).item() == pytest.approx(5e-7 - 1e-9 / 6, rel=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# Properties
# --------------------------------------------------------------------------------------------------------------------

SCORES = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(-100, 100).map(lambda x: round(x, 3))), min_size=1, max_size=12
)


@few_examples
@given(rows=SCORES, scale_by_std=st.booleans())
def test_group_advantages_have_mean_zero(rows: list[tuple[str, float]], scale_by_std: bool) -> None:
    ids = [group for group, _ in rows]
    scores = torch.tensor([score for _, score in rows], dtype=torch.float64)
    got = group_advantages(scores, ids, scale_by_std=scale_by_std)
    for group in set(ids):
        members = torch.tensor([i for i, other in enumerate(ids) if other == group])
        mean = scores[members].mean()
        std = ((scores[members] - mean) ** 2).mean().sqrt()
        expected = (scores[members] - mean) / (std + 1e-2 if scale_by_std else 1)
        torch.testing.assert_close(got[members], expected, rtol=1e-8, atol=1e-9)
        assert got[members].mean().abs() < 1e-9
        if len(set(scores[members].tolist())) == 1:
            assert not got[members].any()


@few_examples
@given(rows=SCORES, data=st.data())
def test_group_advantages_follow_a_permutation(rows: list[tuple[str, float]], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    scores = torch.tensor([score for _, score in rows], dtype=torch.float64)
    ids = torch.tensor([ord(group) for group, _ in rows])
    torch.testing.assert_close(group_advantages(scores[order], ids[order]), group_advantages(scores, ids)[order])


def test_group_advantages_numbers() -> None:
    # Group of 1 and 3: mean 2, population std 1; group of one.
    got = group_advantages(torch.tensor([1.0, 7.0, 3.0], dtype=torch.float64), ["p", ("q", 1), "p"], 0.25)
    assert got.tolist() == [-0.8, 0.0, 0.8]
    assert group_advantages(torch.tensor([1, 3]), torch.tensor([5, 5]), scale_by_std=False).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("size", [1e200, 1.7e308, 1.0, 1e-200])
def test_group_advantages_of_any_finite_scores(size: float) -> None:
    # Scores -1, 1 in units of `size`: mean 0, standard deviation `size`.
    scores = torch.tensor([-size, size, 5.0, 7.0], dtype=torch.float64)
    expected = size / (size + 0.01)
    got = group_advantages(scores, ["big", "big", "small", "small"])
    assert got.tolist() == pytest.approx([-expected, expected, -1 / 1.01, 1 / 1.01], rel=1e-12)
    # Beside it in the batch, other groups are what they are alone, to the bit.
    assert torch.equal(got[2:], group_advantages(scores[2:], [0, 0]))
    assert group_advantages(scores, [0, 0, 1, 1], scale_by_std=False)[1].item() == pytest.approx(size, rel=1e-12)


def test_a_group_of_equal_scores_has_no_advantage_at_all() -> None:
    # The float64 mean of three times 0.1 is not 0.1, so a plain difference would leave a rounding error.
    assert not group_advantages(torch.tensor([0.1] * 3, dtype=torch.float64), "ppp").any()


def test_group_advantages_refuse() -> None:
    for spoiled in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"scores\[1\] is (nan|inf); expected finite"):
            group_advantages(torch.tensor([0.0, spoiled]), [0, 0])
    with pytest.raises(ValueError, match="one score and one id per completion"):
        group_advantages(torch.zeros(3), [0, 0])
    with pytest.raises(ValueError, match="one score and one id per completion"):
        group_advantages(torch.zeros(2, 1), [0, 0])
    with pytest.raises(ValueError, match="expected integers"):
        group_advantages(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="eps is 0"):
        group_advantages(torch.zeros(2), [0, 0], eps=0)


def naive_gae(values: list[float], rewards: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages before whitening and discounted rewards, each as its defining double sum."""
    steps = range(len(values))
    deltas = [rewards[t] + (gamma * values[t + 1] if t + 1 < len(values) else 0) - values[t] for t in steps]
    advantages = [sum((gamma * lam) ** (u - t) * deltas[u] for u in steps if u >= t) for t in steps]
    return advantages, [sum(gamma ** (u - t) * rewards[u] for u in steps if u >= t) for t in steps]


UNIT = st.floats(0, 1).map(lambda x: round(x, 3))


@few_examples
@given(seed=st.integers(0, 2**31), length=st.integers(1, 7), gamma=UNIT, lam=UNIT)
def test_gae_equals_its_definition(seed: int, length: int, gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, rewards = torch.randn(2, 3, length, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 2, (3, length), generator=generator)
    got = gae(values, rewards, mask, gamma=gamma, lam=lam)
    pairs = zip((values * mask).tolist(), (rewards * mask).tolist(), strict=True)
    naive = torch.tensor([naive_gae(v, r, gamma, lam) for v, r in pairs], dtype=torch.float64)
    raw, discounted = naive[:, 0], naive[:, 1]
    torch.testing.assert_close(got.returns, (raw + values) * mask)
    torch.testing.assert_close(got.discounted_future_rewards, discounted * mask)
    inside = raw[mask == 1]
    if len(inside):
        whitened = (inside - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(got.advantages[mask == 1], whitened, rtol=1e-6, atol=1e-6)
    assert all((table[mask == 0] == 0).all() and table.isfinite().all() for table in got)


def test_gae_refuses() -> None:
    zeros, mask = torch.zeros(1, 3), torch.tensor([[1, 1, 0]])
    for name, value in (("gamma", -0.1), ("gamma", 1.1), ("lam", -0.1), ("lam", 1.1), ("lam", math.nan)):
        with pytest.raises(ValueError, match=rf"{name} is .*expected a number in \[0, 1\]"):
            gae(zeros, zeros, mask, **{name: value})
    with pytest.raises(ValueError, match=r"rewards\[0, 1\] is nan"):
        gae(zeros, torch.tensor([[0.0, math.nan, 0.0]]), mask)
    with pytest.raises(ValueError, match=r"rewards 1e\+25: the variance .* overflows torch.float32"):
        gae(zeros, torch.tensor([[0.0, 1e25, 0.0]]), mask)
    with pytest.raises(ValueError, match=r"values\[0, 0\] is inf"):
        gae(torch.tensor([[math.inf, 0.0, 0.0]]), zeros, mask)
    with pytest.raises(ValueError, match="nothing is broadcast"):
        gae(zeros, zeros[:, :1], mask)
    # What stands in the padding is of no interest.
    gae(torch.tensor([[0.0, 0.0, math.nan]]), torch.tensor([[0.0, 0.0, math.inf]]), mask)


@few_examples
@given(desirable=st.lists(st.booleans(), min_size=1, max_size=6), seed=st.integers(0, 2**31), kl=st.floats(0, 5))
def test_kto_by_parts_equals_the_whole(desirable: list[bool], seed: int, kl: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, reference = -3 * torch.rand(2, len(desirable), 4, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 2, policy.shape, generator=generator)
    record = UnpairedLogps(policy, reference, mask, torch.tensor(desirable))
    whole = losses.kto(record, kl=kl, desirable_weight=1.5, undesirable_weight=0.5, humanline=Humanline())
    labels = record.desirable
    for part, rewards, rest in (
        (labels, whole.chosen_rewards, "rejected_rewards"),
        (~labels, whole.rejected_rewards, "chosen_rewards"),
    ):
        rows = UnpairedLogps(*(t[part] for t in record))
        out = losses.kto(rows, kl=kl, desirable_weight=1.5, undesirable_weight=0.5, humanline=Humanline())
        torch.testing.assert_close(out.losses, whole.losses[part])
        torch.testing.assert_close(torch.cat([out.chosen_rewards, out.rejected_rewards]), rewards)
        assert getattr(out, rest).shape == (0,)
        assert all(value.isfinite() for value in out.metrics.values())
    # The sums behind the KL estimate add up in the same way, however a step is split.
    parts = [losses.kto_kl(policy[part], reference[part], mask[part]) for part in (labels, ~labels)]
    both = losses.kto_kl(policy, reference, mask)
    for i in range(2):
        torch.testing.assert_close(parts[0][i] + parts[1][i], both[i])


# The loss of one pair from its chosen and rejected tokens' log-ratios (where there is no reference: log-probs) after
# the clamp, and from the chosen tokens' log-probs. HALOs' defaults.
PAIRED_BY_HAND: dict[str, Callable[[list[float], list[float], list[float]], float]] = {
    "dpo": lambda c, r, _: softplus(-0.1 * (sum(c) - sum(r))),
    "cdpo": lambda c, r, _: 0.8 * softplus(-0.1 * (sum(c) - sum(r))) + 0.2 * softplus(0.1 * (sum(c) - sum(r))),
    "ipo": lambda c, r, _: (sum(c) / len(c) - sum(r) / len(r) - 5) ** 2,
    "simpo": lambda c, r, _: softplus(-10 * (sum(c) / len(c) - sum(r) / len(r) - 0.3)),
    "slic": lambda c, r, raw: max(0.0, 1 - sum(c) + sum(r)) - 0.1 * sum(raw),
}
TOKENS = st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), min_size=1, max_size=6)  # (policy, reference)


def padded(rows: list[list[tuple[float, float]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Policy, reference and mask of rows that start at different columns, with rubbish outside of the mask."""
    width = max(map(len, rows)) + len(rows)
    policy, reference = torch.full((2, len(rows), width), 7.0, dtype=torch.float64)
    mask = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        at = slice(i, i + len(row))
        policy[i, at], reference[i, at] = torch.tensor(row, dtype=torch.float64).T
        mask[i, at] = 1
    return policy, reference, mask


@pytest.mark.parametrize("name", PAIRED)
@few_examples
@given(
    pairs=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4),
    bounds=st.none() | st.tuples(st.floats(-3, -0.1), st.floats(0.1, 3)),
)
def test_paired_losses_equal_their_formula(
    name: str, pairs: list[tuple[Any, Any]], bounds: tuple[float, float] | None
) -> None:
    def seen(tokens: list[tuple[float, float]]) -> list[float]:
        values = [p if name in WITHOUT_REFERENCE else p - q for p, q in tokens]
        return values if bounds is None else [min(max(value, bounds[0]), bounds[1]) for value in values]

    chosen, reference_chosen, chosen_mask = padded([pair[0] for pair in pairs])
    rejected, reference_rejected, rejected_mask = padded([pair[1] for pair in pairs])
    record = PairedLogps(chosen, rejected, reference_chosen, reference_rejected, chosen_mask, rejected_mask)
    out = run(name, record, humanline=None if bounds is None else Humanline(*bounds))
    by_hand = PAIRED_BY_HAND[name]
    expected = [by_hand(seen(c), seen(r), [policy for policy, _ in c]) for c, r in pairs]
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
