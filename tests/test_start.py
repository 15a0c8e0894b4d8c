"""Checks before the first update: unsuitable models are refused, parameters are trained, dropout is disabled."""

import copy
import math

import pytest
import torch
from conftest import paired_rows, perturbed, weights
from peft import LoraConfig, PeftModel, get_peft_model
from test_humanline_training import METHODS, SCORED, rows_for
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    TrainerCallback,
)

from halos_trl import BradleyTerryConfig, BradleyTerryTrainer
from halos_trl._trl.dropout import switch_off_dropout
from halos_trl.trainers import start

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def build(model, tokenizer, make_config):
    def build(method="dpo", *, policy=None, ref_model=None, peft_config=None, callbacks=None, **settings):
        trainer_class, config_class = (METHODS | SCORED)[method]
        return trainer_class(
            copy.deepcopy(model) if policy is None else policy,
            ref_model,
            make_config(config_class, **settings),
            train_dataset=rows_for(method),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return build


# -- something trains ----------------------------------------------------------------------------------------------


@pytest.fixture
def loaded_for_inference(model, tmp_path):
    get_peft_model(copy.deepcopy(model), LORA).save_pretrained(tmp_path / "adapter")
    return PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["dpo", "kto", "grpo", "ppo"])
def test_an_adapter_loaded_for_inference_is_refused(build, loaded_for_inference, method, checkpointing):
    with pytest.raises(ValueError, match="is_trainable=True"):
        build(method, policy=loaded_for_inference, gradient_checkpointing=checkpointing)


@pytest.mark.parametrize("method", ["simpo", "ppo"])
def test_a_frozen_model_is_refused(build, model, method):
    with pytest.raises(ValueError, match="Nothing would be trained"):
        build(method, policy=copy.deepcopy(model).requires_grad_(False))


def test_a_frozen_model_with_a_new_adapter_trains(build, model):
    trainer = build(policy=copy.deepcopy(model).requires_grad_(False), peft_config=LORA, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_model_that_was_frozen_after_construction_is_refused(build, method):
    trainer = build(method)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_("v_head" in name)
    with pytest.raises(ValueError, match="Nothing would be trained"):
        trainer.train()


def test_trainable_parameters_that_the_loss_does_not_reach(build):
    trainer = build(peft_config=LORA, gradient_checkpointing=True)
    trainer.model.requires_grad_(False)
    trainer.model.register_parameter("unused", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"received a gradient in the first step.*unused"):
        trainer.train()


def reward_model(model, **config):
    torch.manual_seed(0)
    config = LlamaConfig(**model.config.to_dict() | {"num_labels": 1} | config)
    return AutoModelForSequenceClassification.from_config(config)


def test_a_frozen_reward_model_is_refused(model, tokenizer, make_config):
    trainer = BradleyTerryTrainer(
        reward_model(model), make_config(BradleyTerryConfig), train_dataset=paired_rows(8), processing_class=tokenizer
    )
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing would be trained"):
        trainer.train()


# -- no noise ------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48, "num_hidden_layers": 2,
    "n_layer": 2, "num_attention_heads": 2, "n_head": 2, "attention_heads": 2, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16, "word_embed_proj_dim": 32, "rotary_dim": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "n_positions": 64, "d_model": 32, "num_layers": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "opt", "gpt2", "gptj", "gpt_neox",
    "gpt_bigcode", "bloom", "xglm", "biogpt", "stablelm", "starcoder2", "olmo2", "granite", "mixtral", "qwen3_moe",
    "olmoe", "modernbert-decoder",
]  # fmt: skip


def tiny(architecture, **settings):
    """An untrained model with every dropout rate of its config at one half."""
    default = AutoConfig.for_model(architecture)
    rates = {name: 0.5 for name, value in default.to_dict().items() if is_rate(name, value)}
    sizes = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes | rates | settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model


def is_rate(name, value):
    return ("drop" in name or "jitter" in name) and isinstance(value, int | float) and not isinstance(value, bool)


def log_probs(model, training):
    model.train(training)
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_architecture_keeps_its_dropout(architecture):
    model = tiny(architecture)
    config = model.config.to_dict()
    quiet = log_probs(model, training=False)
    assert (log_probs(model, training=True) - quiet).abs().mean() > 0.01, "the table of rates misses this one"
    switch_off_dropout(model)
    assert torch.equal(log_probs(model, training=True), quiet)
    assert model.config.to_dict() == config, "which is saved with the model"


def test_dropout_of_adapters_is_reached(model):
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    policy = get_peft_model(copy.deepcopy(model), config)
    switch_off_dropout(policy)
    assert torch.equal(log_probs(policy, training=True), log_probs(policy, training=False))


class FirstLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs = getattr(self, "logs", logs)


@pytest.mark.parametrize("method", ["dpo", "kto"])
@pytest.mark.parametrize("adapter", [None, LORA])
def test_policy_and_reference_are_equal_at_the_first_step(build, model, method, adapter):
    """DPO's first loss is log 2, and KTO's one half, since every log-ratio is exactly 0."""
    config = LlamaConfig(**model.config.to_dict() | {"attention_dropout": 0.5})
    seen = FirstLoss()
    build(method, policy=LlamaForCausalLM(config), peft_config=adapter, callbacks=[seen], max_steps=1).train()
    expected = math.log(2) if method == "dpo" else 0.5
    assert float(seen.logs["loss"]) == pytest.approx(expected, abs=1e-7)


def test_dropout_that_was_asked_for_stays(build, model):
    config = LlamaConfig(**model.config.to_dict() | {"attention_dropout": 0.5})
    policy = LlamaForCausalLM(config)
    trainer = build(policy=policy, disable_dropout=False, max_steps=1)
    trainer.train()
    assert policy.model.layers[0].self_attn.attention_dropout == 0.5


def test_a_model_that_reads_its_config_in_every_pass_is_refused(build, tokenizer):
    """No module of Persimmon holds its attention's rate."""
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    with pytest.raises(ValueError, match=r"attention_dropout=0\.5.*disable_dropout=False"):
        build(policy=tiny("persimmon", **sizes)).train()
    build(policy=tiny("persimmon", **sizes, attention_dropout=0.0), max_steps=1).train()


@pytest.mark.parametrize(("method", "settings"), [("dpo", {}), ("dpo", {"ld_alpha": 0.5}), ("kto", {})])
def test_stored_sums_are_compared_as_sums(build, model, method, settings):
    """A model whose tokens have very different log-probs, unlike a new one."""
    build(method, policy=perturbed(model, scale=0.5), max_steps=1, precompute_ref_log_probs=True, **settings).train()


def test_checks_leave_the_random_state_alone(build, model, monkeypatch):
    config = LlamaConfig(**model.config.to_dict() | {"attention_dropout": 0.5})
    ends = []
    for check in (start.check_start, lambda trainer, batch: None):
        monkeypatch.setattr("halos_trl.trainers.base.check_start", check)
        torch.manual_seed(0)
        trainer = build(policy=LlamaForCausalLM(config), max_steps=2, disable_dropout=False)
        trainer.train()
        ends.append((torch.random.get_rng_state(), weights(trainer.model)))
    assert all(map(torch.equal, *ends))


def test_a_reward_model_trains_without_dropout(model, tokenizer, make_config):
    policy = reward_model(model, attention_dropout=0.5)
    BradleyTerryTrainer(
        policy, make_config(BradleyTerryConfig), train_dataset=paired_rows(8), processing_class=tokenizer
    )
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(policy.train()(input_ids=ids).logits, policy.eval()(input_ids=ids).logits)


def test_a_policy_that_was_changed_after_its_reference_was_taken_is_refused(build, model, other_model):
    trainer = build()
    trainer.model.load_state_dict(other_model.state_dict())
    with pytest.raises(ValueError, match="no `ref_model` was passed"):
        trainer.train()
    build(policy=other_model, ref_model=copy.deepcopy(model), max_steps=1).train()


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_stored_log_probs_are_compared_in_their_own_form(build, model, other_model, method):
    """Of a completion DPO and KTO store the sum, which says nothing about single tokens."""
    build(method, precompute_ref_log_probs=True, max_steps=1).train()
    trainer = build(method, precompute_ref_log_probs=True, policy=model)
    model.load_state_dict(other_model.state_dict())
    with pytest.raises(ValueError, match="the policy differs from its reference"):
        trainer.train()


def test_a_second_run_of_one_trainer_goes_on_from_a_policy_that_has_moved(build):
    trainer = build(max_steps=2, learning_rate=0.5)
    trainer.train()
    trainer.train()


# -- models that cannot work ---------------------------------------------------------------------------------------


def other_vocabulary(model, size):
    return LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"vocab_size": size}))


def test_a_reference_of_another_vocabulary_is_refused(build, model):
    with pytest.raises(ValueError, match="and `ref_model` one of 2000"):
        build(ref_model=other_vocabulary(model, 2000))


def test_a_reference_with_padded_embeddings_is_fine(build, model):
    build(ref_model=other_vocabulary(model, model.config.vocab_size + 3), max_steps=1).train()


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_reference_that_is_an_adapter(build, model, method):
    """It is what merging the adapter gives."""
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    reference = get_peft_model(copy.deepcopy(model), settings)
    merged = copy.deepcopy(reference).merge_and_unload()
    one = build(method, ref_model=reference)
    other = build(method, ref_model=merged)
    batch = next(iter(one.get_train_dataloader()))
    torch.testing.assert_close(one.reference.log_probs(batch), other.reference.log_probs(batch), rtol=0, atol=1e-5)
    one.train()


def test_an_encoder_decoder_is_refused_before_it_is_loaded(build, tmp_path):
    T5Config(vocab_size=64).save_pretrained(tmp_path / "t5")  # no weights, so that loading would fail
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        build(policy=str(tmp_path / "t5"))
