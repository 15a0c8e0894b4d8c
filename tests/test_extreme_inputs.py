"""No NaN or infinity: every loss on extreme inputs, and every trainer when they appear."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import paired_rows, unpaired_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_runs import scored
from test_loss_contract import TABLE, every_loss, mean_loss, run
from test_overriding import scorer
from transformers import TrainerCallback

import halos_trl
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
@settings(max_examples=20, deadline=None)
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


# -- the trainers --------------------------------------------------------------------------------------------------

ALIGNMENT = {
    "DPO": (halos_trl.DPOTrainer, halos_trl.DPOConfig, {}),
    "DPO, a loss of TRL": (halos_trl.DPOTrainer, halos_trl.DPOConfig, {"loss_type": "ipo"}),
    "cDPO": (halos_trl.CDPOTrainer, halos_trl.CDPOConfig, {}),
    "IPO": (halos_trl.IPOTrainer, halos_trl.IPOConfig, {}),
    "SimPO": (halos_trl.SimPOTrainer, halos_trl.SimPOConfig, {}),
    "SLiC": (halos_trl.SLiCTrainer, halos_trl.SLiCConfig, {}),
    "KTO": (halos_trl.KTOTrainer, halos_trl.KTOConfig, {}),
    "GRPO": (halos_trl.GRPOTrainer, halos_trl.GRPOConfig, {}),
    "PPO": (halos_trl.PPOTrainer, halos_trl.PPOConfig, {}),
    "Bradley-Terry": (halos_trl.BradleyTerryTrainer, halos_trl.BradleyTerryConfig, {}),
}
every_trainer = pytest.mark.parametrize("name", ALIGNMENT)


@pytest.fixture
def make_trainer(model: Any, tokenizer: Any, make_config: Any) -> Any:
    def make(name: str, callbacks: Any = None, data: Any = None, **settings: Any) -> Any:
        trainer_class, config_class, own = ALIGNMENT[name]
        config = make_config(config_class, **({"max_steps": 2, "optim": "adamw_torch"} | own | settings))
        if data is None:
            rows = {"KTO": unpaired_rows, "GRPO": scored, "PPO": scored}.get(name, paired_rows)
            data = rows(16)
        policy = scorer(model) if name == "Bradley-Terry" else copy.deepcopy(model)
        return trainer_class(
            model=policy, args=config, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
        )

    return make


class Spoil(TrainerCallback):
    """Does something bad before the second step, and remembers what the trainer held then."""

    def __init__(self, spoil: Any):
        self.spoil = spoil

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.before = self.held()
            self.spoil(self.trainer)

    def held(self) -> tuple[Any, Any]:
        return copy.deepcopy((self.trainer.model.state_dict(), self.trainer.optimizer.state_dict()["state"]))


def assert_stopped(trainer: Any, spoil: Spoil, message: str) -> None:
    """The run ends at its second step, with weights, value head and Adam's moments as they were before it."""
    spoil.trainer = trainer
    with pytest.raises(ValueError, match=message):
        trainer.train()
    torch.testing.assert_close(spoil.held(), spoil.before, rtol=0, atol=0)
    assert all(math.isfinite(v) for e in trainer.state.log_history for v in e.values())


def infinite_loss(trainer: Any) -> None:
    if isinstance(trainer, halos_trl.BradleyTerryTrainer):
        # In front of the hook that takes the scores of packed rows.
        trainer.model.score.register_forward_hook(lambda module, args, scores: scores * math.inf, prepend=True)
    else:
        of_batch = trainer.batch_loss
        trainer.batch_loss = lambda *args, **kwargs: of_batch(*args, **kwargs) * math.inf


def infinite_gradient(trainer: Any) -> None:
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient / 0)


def rate_that_is_no_number(trainer: Any) -> None:
    trainer.optimizer.param_groups[0]["lr"] = math.nan


@every_trainer
def test_an_infinite_loss_stops_the_run_before_the_update(make_trainer: Any, name: str) -> None:
    callback = Spoil(infinite_loss)
    trainer = make_trainer(name, callbacks=[callback])
    assert_stopped(trainer, callback, r"The loss is (nan|inf|-inf) at step 2. The weights were not updated")


@pytest.mark.parametrize("name", ["DPO", "PPO", "Bradley-Terry"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (infinite_gradient, r"The gradient's norm is (nan|inf) at step 2. The weights were not updated"),
        (rate_that_is_no_number, r"The optimizer's `lr` is nan at step 2. The weights were not updated"),
    ],
)
def test_what_only_the_update_would_show_stops_the_run_too(
    make_trainer: Any, name: str, spoil: Any, message: str
) -> None:
    callback = Spoil(spoil)
    assert_stopped(make_trainer(name, callbacks=[callback]), callback, message)


def test_the_value_heads_gradient_stops_the_run_too(make_trainer: Any) -> None:
    # A loss of about 1e35 is a number; squares of its gradient are not.
    def spoil(trainer: Any) -> None:
        trainer.args.critic_coef = 1e35

    callback = Spoil(spoil)
    assert_stopped(make_trainer("PPO", callbacks=[callback]), callback, "norm of the value head is inf at step 2")


@pytest.mark.parametrize("name", ["GRPO", "PPO"])
@pytest.mark.parametrize("score", [1e20, -1e200])
def test_extreme_scores_are_refused(make_trainer: Any, name: str, score: float) -> None:
    rows = scored(4)
    rows = rows.map(lambda row, i: {"score": score if i == 2 else row["score"]}, with_indices=True)
    with pytest.raises(ValueError, match=r"Row 2 of the train dataset has score .*1e\+12"):
        make_trainer(name, data=rows)


def test_ppo_trains_on_the_largest_scores(make_trainer: Any) -> None:
    rows = scored(8).map(lambda row, i: {"score": 1e12 * (-1) ** i}, with_indices=True)
    trainer = make_trainer("PPO", data=rows)
    trainer.train()
    assert all(math.isfinite(v) for e in trainer.state.log_history for v in e.values())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("name", ["DPO", "PPO", "Bradley-Terry"])
def test_weights_that_overflowed_in_the_last_step_are_not_saved(make_trainer: Any, tmp_path: Any, name: str) -> None:
    trainer = make_trainer(name, optim="sgd", learning_rate=3e38, max_steps=1, weight_decay=1e3)
    trainer.train()
    with pytest.raises(ValueError, match="contain NaN or infinite numbers after step 1, so the model is not saved"):
        trainer.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_fp16_leaves_overflow_to_the_scaler_until_it_is_not_the_scales_fault(
    make_trainer: Any, monkeypatch: Any
) -> None:
    trainer = make_trainer("DPO")
    trainer.create_optimizer()
    infinity = torch.tensor(math.inf)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "_mixed_precision", "fp16")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.accelerator.scaler.scale(torch.zeros(()))  # so that it knows its scale
    assert trainer._get_grad_norm(trainer.model, infinity) is None, "not in the log"
    trainer.accelerator.scaler.update(1.0)
    with pytest.raises(ValueError, match="gradient's norm is inf"):
        trainer._get_grad_norm(trainer.model, infinity)


def test_a_metric_that_is_no_number_stays_out_of_the_log(make_trainer: Any, said: Any) -> None:
    trainer = make_trainer("DPO")
    trainer.model.train()
    bad = torch.tensor(-math.inf)
    trainer.record_metrics({"logits/chosen": (bad, torch.ones(())), "entropy": (torch.ones(()), torch.ones(()))})
    trainer.log({"loss": 1.0})
    (entry,) = trainer.state.log_history
    assert entry["entropy"] == 1.0 and "logits/chosen" not in entry
    assert "['logits/chosen'] are NaN or infinite, so they are left out of the log" in said()
