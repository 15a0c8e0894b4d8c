"""Stored reference log-probs equal live ones, in every precision; `evaluate` with and without them."""

import copy
import math

import datasets
import pytest
import torch
from conftest import paired_rows, unpaired_rows
from peft import LoraConfig

from halos_trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    PPOConfig,
    PPOTrainer,
)


def scored_rows(n):
    rows = unpaired_rows(n).to_list()
    return datasets.Dataset.from_list([{**row, "score": float(row.pop("label"))} for row in rows])


METHODS = {
    "dpo": (DPOTrainer, DPOConfig, paired_rows),
    "kto": (KTOTrainer, KTOConfig, unpaired_rows),
    "grpo": (GRPOTrainer, GRPOConfig, scored_rows),
    "ppo": (PPOTrainer, PPOConfig, scored_rows),
}


@pytest.fixture
def build(model, tokenizer, make_config):
    def run(method, data=None, *, policy=None, **settings):
        trainer_class, config_class, rows = METHODS[method]
        extra = {k: settings.pop(k) for k in ("eval_dataset", "peft_config") if k in settings}
        settings = {"train_sampling_strategy": "sequential", "max_steps": 1} | settings
        return trainer_class(
            model=copy.deepcopy(policy or model),
            args=make_config(config_class, **settings),
            train_dataset=rows(8) if data is None else data,
            processing_class=tokenizer,
            **extra,
        )

    return run


@pytest.fixture
def noisy(model):
    """A policy with attention dropout of 0.5 in training mode."""
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model.train()


def reference_sums(trainer):
    """The inputs of the losses, summed over each row."""
    read, reference_logps = [], trainer.reference_logps
    trainer.reference_logps = lambda *batch: read.append(reference_logps(*batch)) or read[-1]
    trainer.train()
    return torch.cat([table_BT.sum(-1) for table_BT in read])


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"disable_dropout": False}, {"lora": True, "bf16": True}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_stored_log_probs_are_the_live_ones(build, noisy, method, settings):
    settings = dict(settings)
    if settings.pop("lora", False):
        # Trainable and stored: the base model, read with the adapter switched off.
        settings["peft_config"] = LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.3, task_type="CAUSAL_LM")
    live, stored = (
        reference_sums(build(method, policy=noisy, precompute_ref_log_probs=stores, **settings))
        for stores in (False, True)
    )
    # DPO and KTO spread a sum over the tokens, which rounds in float32.
    torch.testing.assert_close(stored, live, rtol=2e-6 if method in ("dpo", "kto") else 0, atol=1e-5)
    assert live.abs().min() > 1


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_first_ratio_is_one_in_half_precision(build, method):
    trainer = build(method, bf16=True, precompute_ref_log_probs=True)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["clip_fraction"] == 0
    assert abs(first["kl"]) < 1e-6


@pytest.mark.parametrize("change", ["precision", "config"])
def test_stored_log_probs_of_another_arithmetic_are_not_read(build, model, tmp_path, change):
    scored_rows(8).save_to_disk(tmp_path / "rows")
    on_disk = [datasets.load_from_disk(tmp_path / "rows") for _ in range(3)]
    other = copy.deepcopy(model)
    if change == "config":
        other.config.rms_norm_eps = 0.5
        for module in other.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.5
    bf16 = change == "precision"
    first = build("grpo", on_disk[0], precompute_ref_log_probs=True)
    second = build("grpo", on_disk[1], policy=other, precompute_ref_log_probs=True, bf16=bf16)
    live = reference_sums(build("grpo", scored_rows(8), policy=other, bf16=bf16))[-8:]  # behind the check of the start
    sums = [torch.tensor(trainer.train_dataset["ref_logps"]).sum(-1) for trainer in (first, second)]
    torch.testing.assert_close(sums[1], live, rtol=0, atol=1e-5)
    assert (sums[0] - sums[1]).abs().max() > 1e-4
    third = build("grpo", on_disk[2], precompute_ref_log_probs=True)
    third.live_reference = None  # found in the cache
    torch.testing.assert_close(torch.tensor(third.train_dataset["ref_logps"]).sum(-1), sums[0], rtol=0, atol=0)


# -- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_own_train_dataset_can_be_evaluated(build, method):
    trainer, live = (build(method, max_length=24, precompute_ref_log_probs=p) for p in (True, False))
    for _ in ("before training", "after training"):
        got, expected = trainer.evaluate(trainer.train_dataset), live.evaluate(live.train_dataset)
        assert got["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
        trainer.train(), live.train()


def test_part_of_the_train_dataset_is_computed_anew(build, said):
    trainer = build("dpo", precompute_ref_log_probs=True)
    part = trainer.train_dataset.select(range(4))
    assert trainer.evaluate(part)["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert "Columns ['ref_chosen_logps', 'ref_rejected_logps'] of the eval dataset" in said()


def test_policy_equals_reference_before_training_in_half_precision(build):
    for evaluates in (
        lambda trainer: trainer.evaluate(),
        lambda trainer: trainer.predict(trainer.eval_dataset).metrics,
    ):
        trainer = build("dpo", bf16=True, eval_dataset=paired_rows(8))
        metrics = evaluates(trainer)
        assert next(v for name, v in metrics.items() if name.endswith("_loss")) == pytest.approx(math.log(2), abs=1e-7)
    trainer = build("grpo", bf16=True, eval_dataset=scored_rows(8))
    assert trainer.evaluate()["eval_kl"] == pytest.approx(0, abs=1e-9)
    trainer.train()
    assert next(line["kl"] for line in trainer.state.log_history if "kl" in line) == pytest.approx(0, abs=1e-9)
