"""The paired trainers: equality with TRL where it has the method; every TRL option works or is refused."""

import copy

import datasets
import pytest
import torch
import trl
from conftest import paired_rows, perturbed, weights
from peft import LoraConfig, get_peft_model

import halos_trl
from halos_trl import (
    CDPOConfig,
    CDPOTrainer,
    DPOConfig,
    DPOTrainer,
    IPOConfig,
    IPOTrainer,
    SimPOConfig,
    SimPOTrainer,
    SLiCConfig,
    SLiCTrainer,
)

PAIRED = {
    "dpo": (DPOTrainer, DPOConfig),
    "cdpo": (CDPOTrainer, CDPOConfig),
    "ipo": (IPOTrainer, IPOConfig),
    "simpo": (SimPOTrainer, SimPOConfig),
    "slic": (SLiCTrainer, SLiCConfig),
}
LOSS_TYPES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
SMOOTHED = {name: {"label_smoothing": 0.1} for name in ("robust", "exo_pair", "aot", "aot_unpaired")}


@pytest.fixture
def fit(model, tokenizer, make_config):
    """Train a copy of the policy against a reference that differs from it; the trainer comes back."""

    def run(data, trainer_class, config_class, *, train=True, ref="near", trainer_args=None, **overrides):
        needs_reference = getattr(trainer_class, "needs_reference", True)
        trainer = trainer_class(
            model=copy.deepcopy(model),
            ref_model=perturbed(model) if ref == "near" and needs_reference else None,
            args=make_config(config_class, **({"train_sampling_strategy": "sequential"} | overrides)),
            train_dataset=data,
            processing_class=tokenizer,
            **(trainer_args or {}),
        )
        if train:
            trainer.train()
        return trainer

    return run


def assert_same_run(ours, theirs):
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=0, atol=1e-6)
    steps = [[e for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert len(steps[0]) == len(steps[1]) > 0
    for mine, trls in zip(*steps, strict=True):
        assert set(mine) == set(trls)
        for name, value in trls.items():
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=5e-6), name  # float32 sums of 30 nats, times beta


# -- equal to TRL --------------------------------------------------------------------------------------------------


def test_dpo_three_steps_equal_trl(fit):
    data = paired_rows(24)
    assert_same_run(fit(data, DPOTrainer, DPOConfig, beta=0.5), fit(data, trl.DPOTrainer, trl.DPOConfig, beta=0.5))


def test_ipo_three_steps_equal_trl(fit):
    data = paired_rows(24)
    theirs = fit(data, trl.DPOTrainer, trl.DPOConfig, beta=0.3, loss_type="ipo")
    assert_same_run(fit(data, IPOTrainer, IPOConfig, tau=0.3), theirs)


def test_cdpo_equals_trl_with_label_smoothing_mixed_by_hand(fit):
    """cDPO is (1 - eps) * sigmoid + eps * flipped; TRL's `robust` is that, rescaled and with the sign of the flip."""
    data = paired_rows(8)
    ours = fit(data, CDPOTrainer, CDPOConfig, beta=0.5, epsilon=0.2, train=False)
    theirs = fit(data, trl.DPOTrainer, trl.DPOConfig, beta=0.5, train=False)
    batch = next(iter(ours.get_train_dataloader()))
    half = batch["input_ids"].shape[0] // 2
    flipped = {k: torch.cat([v[half:], v[:half]]) for k, v in batch.items()}
    expected = 0.8 * theirs.compute_loss(theirs.model, batch) + 0.2 * theirs.compute_loss(theirs.model, flipped)
    assert ours.compute_loss(ours.model, batch).item() == pytest.approx(expected.item(), abs=1e-6)


OPTIONS = [{"loss_type": name} | SMOOTHED.get(name, {}) for name in LOSS_TYPES if name != "sigmoid"] + [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"f_divergence_type": "forward_kl"},
]
"""Options other than the choice of a loss: tests/test_drop_in.py."""


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_every_trl_loss_of_dpo_gives_trls_run(fit, options):
    data = paired_rows(16)
    settings = {"beta": 0.5, "max_steps": 2} | options
    # TRL's rows: some of its losses turn the rounding of others into more than the tolerance.
    ours = fit(data, DPOTrainer, DPOConfig, packed="off", **settings)
    theirs = fit(data, trl.DPOTrainer, trl.DPOConfig, **settings)
    assert_same_run(ours, theirs)


# -- one optimizer step is one batch -------------------------------------------------------------------------------


fixed_order = pytest.mark.skipif(
    "train_sampling_strategy" not in DPOConfig.__dataclass_fields__,
    reason="before transformers 5.2 the order of a map-style data set cannot be fixed",
)


@fixed_order
@pytest.mark.parametrize("method", PAIRED)
def test_loss_and_weights_do_not_depend_on_the_split(fit, method):
    data = paired_rows(16)
    common = {"max_steps": 2}
    whole = fit(data, *PAIRED[method], **common)
    split = fit(data, *PAIRED[method], **common, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)


# -- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simpo", "slic"])
def test_methods_without_reference_load_only_the_policy(
    method, monkeypatch, model, tokenizer, make_config, tmp_path, said
):
    from transformers import LlamaForCausalLM

    loaded = []
    load = LlamaForCausalLM.from_pretrained.__func__
    counting = classmethod(lambda cls, *args, **kwargs: loaded.append(args) or load(cls, *args, **kwargs))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", counting)
    trainer_class, config_class = PAIRED[method]
    trainer = trainer_class(str(tmp_path / "base"), args=make_config(config_class), train_dataset=paired_rows(8))
    trainer.train()
    assert len(loaded) == 1
    assert trainer.ref_model is None
    assert "reference" not in said().lower()


def test_reference_for_a_method_without_one_is_refused(model, tokenizer, make_config):
    with pytest.raises(ValueError, match="uses no reference"):
        SimPOTrainer(
            model, perturbed(model), make_config(SimPOConfig), train_dataset=paired_rows(8), processing_class=tokenizer
        )


def test_ipo_from_policy_equal_to_reference_stays_finite(fit):
    """HALOs divides by the number of non-zero log-ratios: 0/0, then NaN weights. The first loss is (1/2tau)^2."""
    trainer = fit(paired_rows(24), IPOTrainer, IPOConfig, ref=None, tau=0.5)
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[0] == pytest.approx((1 / (2 * 0.5)) ** 2, abs=1e-6)
    assert all(0 < loss < 2 for loss in losses)
    assert torch.isfinite(weights(trainer.model)).all()


# -- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [{}, {"ld_alpha": 0.3}])
def test_precomputed_log_probs_are_not_those_of_another_run(fit, tmp_path, first):
    """TRL's cache lies beside the data; `ld_alpha` decides which tokens a stored sum is over."""
    paired_rows(16).to_json(tmp_path / "rows.json")
    data = datasets.load_dataset("json", data_files=str(tmp_path / "rows.json"), cache_dir=tmp_path / "cache")["train"]
    second = {"ld_alpha": 0.3} if not first else {}
    fit(data, DPOTrainer, DPOConfig, precompute_ref_log_probs=True, **first, train=False)
    stored = fit(data, DPOTrainer, DPOConfig, precompute_ref_log_probs=True, **second)
    online = fit(data, DPOTrainer, DPOConfig, **second)
    torch.testing.assert_close(weights(stored.model), weights(online.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("humanline", [False, True])
def test_nan_is_refused_whoever_computes_the_loss(fit, model, loss_type, humanline):
    trainer = fit(paired_rows(8), DPOTrainer, DPOConfig, train=False, loss_type=loss_type, humanline=humanline)
    with torch.no_grad():
        next(trainer.model.parameters())[7, 3] = float("nan")
    with pytest.raises(ValueError, match="at step 1"):
        trainer.train()
    assert torch.isnan(weights(trainer.model)).sum() == 1


@pytest.mark.parametrize("config_class", [CDPOConfig, IPOConfig, SimPOConfig, SLiCConfig])
def test_config_of_another_method_is_refused(fit, config_class):
    """Each of them is a `DPOConfig` too, but DPO would not read its own fields."""
    with pytest.raises(ValueError, match=f"got `args` of type {config_class.__module__}.{config_class.__name__}"):
        fit(paired_rows(8), DPOTrainer, config_class)


@pytest.mark.parametrize("method", ["simpo", "slic"])
def test_adapter_without_reference_is_never_copied(fit, model, tokenizer, make_config, method):
    """PEFT allows no second adapter beside one that trains biases."""
    trainer_class, config_class = PAIRED[method]
    policy = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", bias="lora_only"))
    trainer = trainer_class(
        policy, args=make_config(config_class), train_dataset=paired_rows(8), processing_class=tokenizer
    )
    before = weights(trainer.model)
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"]
    assert not torch.equal(before, weights(trainer.model))


def test_equal_chosen_and_rejected_are_counted(fit, said):
    rows = paired_rows(8).to_list()
    rows[3]["rejected"] = rows[3]["chosen"]
    fit(datasets.Dataset.from_list(rows), DPOTrainer, DPOConfig, max_steps=1)
    assert "1 of 8 rows of the train dataset (the first is row 3) have equal `chosen` and `rejected`" in said()
    assert "streamed" not in said()
    streamed = datasets.Dataset.from_list(rows).to_iterable_dataset()
    fit(streamed, DPOTrainer, DPOConfig, max_steps=1)
    assert "1 rows of the streamed train dataset so far have equal `chosen` and `rejected`" in said()


@pytest.mark.parametrize("method", PAIRED)
def test_streaming_and_evaluation(fit, method):
    data = paired_rows(24)
    evaluated = {"eval_dataset": {"a": paired_rows(8, 1), "b": paired_rows(8, 2)}}
    streamed = fit(data.to_iterable_dataset(), *PAIRED[method], max_steps=2, trainer_args=evaluated)
    if "train_sampling_strategy" in DPOConfig.__dataclass_fields__:  # else a map-style data set is always shuffled
        assert torch.equal(weights(streamed.model), weights(fit(data, *PAIRED[method], max_steps=2).model))
    metrics = streamed.evaluate()
    assert streamed.evaluate(paired_rows(8, 1))["eval_loss"] == metrics["eval_a_loss"] != metrics["eval_b_loss"]


# -- HALOs' defaults -----------------------------------------------------------------------------------------------


def test_defaults_are_halos_own(make_config):
    assert make_config(DPOConfig).beta == 0.1
    assert (make_config(CDPOConfig).beta, make_config(CDPOConfig).epsilon) == (0.1, 0.2)
    assert make_config(IPOConfig).tau == 0.1
    assert (make_config(SimPOConfig).beta, make_config(SimPOConfig).gamma_beta_ratio) == (10.0, 0.3)
    assert (make_config(SLiCConfig).beta, make_config(SLiCConfig).lambda_coef) == (1.0, 0.1)


def test_names_tags_and_papers():
    from halos_trl._trl import card_identity

    for name in ("DPOTrainer", "CDPOTrainer", "IPOTrainer", "SimPOTrainer", "SLiCTrainer", "KTOTrainer"):
        trainer_class = getattr(halos_trl, name)
        identity = card_identity(trainer_class)
        assert identity["name"] == trainer_class.method.name
        assert set(identity["tags"]) == {"trl", "halos-trl", identity["name"].lower()}
