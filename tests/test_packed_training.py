"""Training on packed rows gives the same weights and log lines as on padded rows."""

import copy

import pytest
import torch
from conftest import assistant, paired_rows, perturbed, unpaired_rows, weights
from datasets import concatenate_datasets
from peft import LoraConfig
from policy_runs import scored
from transformers import LlamaModel

import halos_trl
from halos_trl.forward.packing import packing_of

SETTINGS = {
    "DPO": {},
    "CDPO": {},
    "IPO": {},
    "SimPO": {},
    "SLiC": {},
    "KTO": {},
    "GRPO": {"epsilon": 0.05, "beta": 0.1},
    "PPO": {"cliprange": 0.05, "kl_coef": 0.1, "critic_coef": 0.5},
}


def rows(method):
    if method == "KTO":
        data = unpaired_rows(12)
        # A second completion for each prompt, so that rows of one step share prompts.
        again = data.map(lambda row: {"completion": assistant("abcab"), "label": not row["label"]})
        order = [i for pair in zip(range(12), range(12, 24), strict=True) for i in pair]
        return concatenate_datasets([data, again]).select(order)
    return scored(6) if method in ("GRPO", "PPO") else paired_rows(24)


def run(method, packed, make_config, model, tokenizer, *, humanline=False, lora=False, checkpointing=False, **more):
    reference_free = method in ("SimPO", "SLiC")
    settings = {"humanline": humanline, **({"log_epsilon_p": -0.05, "log_epsilon_r": 0.03} if humanline else {})}
    args = make_config(
        getattr(halos_trl, f"{method}Config"),
        packed=packed,
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
        **settings | SETTINGS[method] | more,
    )
    trainer = getattr(halos_trl, f"{method}Trainer")(
        copy.deepcopy(model),
        args=args,
        train_dataset=rows(method),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian") if lora else None,
        **({} if reference_free or lora else {"ref_model": perturbed(model)}),
    )
    trainer.train()
    assert packing_of(trainer.model).active == (packed != "off")
    # Stored log-probs may be those of an earlier run, for which no reference ran.
    if not (reference_free or lora or args.precompute_ref_log_probs):
        assert packing_of(trainer.ref_model).active == (packed != "off")
    return trainer


def lines(trainer):
    times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in trainer.state.log_history]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("humanline", [False, True], ids=["plain", "humanline"])
@pytest.mark.parametrize("method", SETTINGS)
def test_three_steps(method, humanline, lora, make_config, model, tokenizer):
    # Gradient checkpointing with adapters, as TRL's default has it.
    arguments = {"humanline": humanline, "lora": lora, "checkpointing": lora}
    packed, padded = (run(method, mode, make_config, model, tokenizer, **arguments) for mode in ("on", "off"))
    torch.testing.assert_close(weights(packed.model), weights(padded.model), rtol=0, atol=1e-6)
    for ours, theirs in zip(lines(packed), lines(padded), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["KTO", "PPO"])
def test_split_of_a_step_does_not_matter(method, make_config, model, tokenizer):
    whole, split = (
        run(method, "on", make_config, model, tokenizer, per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size)
        for size in (8, 2)
    )  # fmt: skip
    torch.testing.assert_close(weights(whole.model), weights(split.model), rtol=0, atol=1e-6)


def test_reference_of_kto_reads_the_batch_that_the_loss_gets(make_config, model, tokenizer):
    trainer = run("KTO", "on", make_config, model, tokenizer)
    batch = trainer.on_device(next(iter(trainer.get_train_dataloader())))
    (prepared,) = trainer.prepare_step([batch])
    batch["input_ids"][:, 2:4] = batch["input_ids"][:, 2:4].flip(1)
    found = trainer.reference_logps(batch, prepared)
    assert not found.equal(prepared.reference_BT)
    torch.testing.assert_close(found, trainer.reference.log_probs(batch), rtol=0, atol=1e-6)


def test_reference_of_kto_reads_rows_and_partners_at_once(make_config, model, tokenizer, monkeypatch):
    calls = []
    forward = LlamaModel.forward

    def noting(self, *args, **kwargs):
        calls.append((self, torch.is_grad_enabled()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", noting)
    trainer = run("KTO", "on", make_config, model, tokenizer)
    reference = [grad for backbone, grad in calls if backbone is trainer.ref_model.model]
    policy = [grad for backbone, grad in calls if backbone is trainer.model.model]
    # In the first step packed rows are compared with padded ones.
    assert len(reference) == 2 + 1 + 1 + 1
    # The policy: without gradient for the estimate of the KL, with it for the loss.
    assert policy[-4:] == [False, True, False, True]


@pytest.mark.parametrize("loss_type", ["ipo", "bco_pair", "discopop"])
def test_losses_of_trl(loss_type, make_config, model, tokenizer):
    packed, padded = (
        run("DPO", mode, make_config, model, tokenizer, loss_type=loss_type, use_weighting=True)
        for mode in ("on", "off")
    )
    torch.testing.assert_close(weights(packed.model), weights(padded.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["DPO", "KTO", "GRPO"])
def test_stored_reference(method, make_config, model, tokenizer):
    packed, padded = (
        run(method, mode, make_config, model, tokenizer, precompute_ref_log_probs=True) for mode in ("on", "off")
    )
    torch.testing.assert_close(weights(packed.model), weights(padded.model), rtol=0, atol=1e-6)


def test_evaluation(make_config, model, tokenizer):
    results = []
    for mode in ("on", "off"):
        trainer = run("DPO", mode, make_config, model, tokenizer)
        results.append(trainer.evaluate(rows("DPO").select(range(7))))
    for name, value in results[0].items():
        if not name.endswith(("runtime", "per_second")):
            assert value == pytest.approx(results[1][name], rel=1e-4, abs=1e-5), name


def test_bfloat16_is_judged_by_its_own_tolerance(make_config, model, tokenizer):
    trainer = run("DPO", "on", make_config, model, tokenizer, bf16=True)
    assert packing_of(trainer.model).active


@pytest.mark.parametrize(("given", "kept"), [("on", "on"), (True, "on"), (False, "off"), ("auto", "auto")])
def test_setting_as_yaml_reads_it(given, kept, make_config):
    assert make_config(halos_trl.DPOConfig, packed=given).packed == kept


def test_setting_of_another_name_is_refused(make_config):
    with pytest.raises(ValueError, match=r"`packed='yes'` cannot work.*'auto', 'on', 'off'"):
        make_config(halos_trl.KTOConfig, packed="yes")


def test_compiled_models_are_given_padded_rows(make_config, model, tokenizer, said):
    def trainer(packed):
        args = make_config(halos_trl.DPOConfig, packed=packed, torch_compile=True)
        return halos_trl.DPOTrainer(model, args=args, train_dataset=rows("DPO"), processing_class=tokenizer)

    assert not packing_of(trainer("auto").model).active
    assert "`torch_compile=True` would compile" in said()
    with pytest.raises(ValueError, match=r"packed='on'.*torch_compile"):
        trainer("on")
