"""The reference stays the initial policy, whatever is trained: biases, unfrozen or saved modules, single tokens."""

import copy

import pytest
import torch
from conftest import cpu_config, weights
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_humanline_training import METHODS, SCORED, first_batch, rows_for
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from halos_trl._trl import score_tokens
from halos_trl.reference import AdapterOff, FrozenAdapter, FrozenCopy

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}

BESIDE = {
    "bias all": LoraConfig(**LORA, bias="all"),
    "bias lora_only": LoraConfig(**LORA, bias="lora_only"),
    "unfrozen norms": LoraConfig(**LORA),
    "lm_head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "embed_tokens": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "tokens": LoraConfig(**LORA, trainable_token_indices=list(range(40))),
}
"""Parameters trained in addition to the adapter's matrices."""


@pytest.fixture
def biased(model):
    """A policy with biases, of which none is 0."""
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"attention_bias": True, "mlp_bias": True}))
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return policy.eval()


@pytest.fixture
def build(biased, tokenizer, tmp_path):
    def build(method="dpo", *, peft_config=None, policy=None, callbacks=None, **settings):
        trainer_class, config_class = (METHODS | SCORED)[method]
        defaults = {"max_steps": 8, "learning_rate": 0.3, "max_grad_norm": 1.0, "num_train_epochs": 1}
        return trainer_class(
            copy.deepcopy(biased) if policy is None else policy,
            args=cpu_config(config_class, tmp_path / "out", **defaults | settings),
            train_dataset=rows_for(method),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return build


def unfreeze_norms(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)


def log_probs(model, batch):
    """Computed by a plain forward pass of a copy in float64, independently of the reference code."""
    model = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return logps * batch["completion_mask"][:, 1:]


class Policies(TrainerCallback):
    """A deep copy of the policy before every step."""

    def __init__(self):
        self.before = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append(copy.deepcopy(model))


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("humanline", [False, True], ids=["still", "humanline"])
def test_reference_is_a_deep_copy_of_the_policy(build, beside, humanline):
    watch = Policies()
    trainer = build(peft_config=BESIDE[beside], callbacks=[watch], humanline=humanline)
    if beside == "unfrozen norms":
        unfreeze_norms(trainer.model)
    batch = first_batch(trainer)
    trainer.train()
    assert type(trainer.reference) is (FrozenAdapter if humanline else AdapterOff)
    expected = log_probs(watch.before[-1 if humanline else 0], batch)
    now = log_probs(trainer.model, batch)
    assert (now - expected).abs().max() > 1e-3, "nothing was learned"
    torch.testing.assert_close(trainer.reference.log_probs(batch).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_probs(trainer.model, batch), now, rtol=0, atol=0)


@pytest.mark.parametrize("beside", ["bias all", "unfrozen norms"])
@pytest.mark.parametrize("method", ["kto", "grpo", "ppo", "ipo"])
def test_every_method_reads_the_start(build, method, beside):
    watch = Policies()
    trainer = build(method, peft_config=BESIDE[beside], callbacks=[watch], max_steps=4)
    if beside == "unfrozen norms":
        unfreeze_norms(trainer.model)
    batch = first_batch(trainer)
    trainer.train()
    expected = log_probs(watch.before[0], batch)
    torch.testing.assert_close(trainer.reference.log_probs(batch).double(), expected, rtol=0, atol=1e-5)


def test_losses_of_trl_read_the_same_reference(build):
    """`hinge` with `beta=1` is 1 - margin if positive, so the loss reveals the reference."""
    watch = Policies()
    trainer = build(peft_config=BESIDE["bias all"], callbacks=[watch], loss_type=["hinge"], beta=0.01)
    batch = first_batch(trainer)
    trainer.train()
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch).item()
    ratios = (log_probs(trainer.model, batch) - log_probs(watch.before[0], batch)).sum(-1)
    chosen, rejected = ratios.chunk(2)
    assert loss == pytest.approx((1 - 0.01 * (chosen - rejected)).relu().mean().item(), abs=1e-6)


class UnfreezesLater(TrainerCallback):
    """Gradual unfreezing, with an optimizer that knows all parameters from the start."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            unfreeze_norms(model)


@pytest.mark.parametrize("humanline", [False, True])
def test_parameters_that_are_unfrozen_during_the_run(build, biased, humanline):
    policy = get_peft_model(copy.deepcopy(biased), LoraConfig(**LORA))
    watch = Policies()
    trainer = build(policy=policy, callbacks=[UnfreezesLater(), watch], humanline=humanline)
    trainer.optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
    batch = first_batch(trainer)
    trainer.train()
    moved = [
        n
        for n, p in policy.named_parameters()
        if "norm" in n and not torch.equal(p, dict(watch.before[0].named_parameters())[n])
    ]
    assert moved
    expected = log_probs(watch.before[-1 if humanline else 0], batch)
    torch.testing.assert_close(trainer.reference.log_probs(batch).double(), expected, rtol=0, atol=1e-5)


def test_a_given_peft_model_keeps_what_its_owner_unfroze(build, biased):
    policy = get_peft_model(copy.deepcopy(biased), BESIDE["bias all"])
    unfreeze_norms(policy)
    trainable = {n for n, p in policy.named_parameters() if p.requires_grad}
    watch = Policies()
    trainer = build(policy=policy, callbacks=[watch])
    batch = first_batch(trainer)
    trainer.train()
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trainable
    expected = log_probs(watch.before[0], batch)
    torch.testing.assert_close(trainer.reference.log_probs(batch).double(), expected, rtol=0, atol=1e-5)


def test_reading_the_reference_leaves_a_frozen_part_of_the_adapter_frozen(build):
    trainer = build(peft_config=LoraConfig(**LORA))
    frozen = [p for n, p in trainer.model.named_parameters() if "layers.0" in n and "lora_" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    trainer.train()
    assert frozen and not any(p.requires_grad or p.grad is not None for p in frozen)


def test_a_moved_reference_with_biases_resumes_exactly(build):
    settings = {"humanline": True, "peft_config": BESIDE["bias all"], "save_strategy": "steps", "save_steps": 4}
    once = build(**settings)
    once.train()
    again = build(**settings)
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-4")
    assert torch.equal(weights(again.model), weights(once.model))
    one, two = (trainer.reference.tensors(trainer.model) for trainer in (once, again))
    assert any(name.endswith("bias") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_unfrozen_modules_are_not_saved_by_peft(build, said):
    trainer = build(peft_config=LoraConfig(**LORA), save_strategy="steps", save_steps=4)
    unfreeze_norms(trainer.model)
    trainer.train()
    assert "PEFT saves only the adapter" in said() and "modules_to_save" in said()
    again = build(peft_config=LoraConfig(**LORA))
    unfreeze_norms(again.model)
    with pytest.raises(ValueError, match="a resumed run would reset them"):
        again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-4")


def test_biases_are_saved_by_peft(build, said, biased):
    trainer = build(peft_config=BESIDE["bias all"])
    trainer.train()
    assert "PEFT saves only the adapter" not in said()
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(copy.deepcopy(biased), trainer.args.output_dir)
    batch = first_batch(trainer)
    torch.testing.assert_close(log_probs(reloaded, batch), log_probs(trainer.model, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_engines_that_split_parameters_refuse_what_has_no_switch(build, engine):
    trainer = build(peft_config=BESIDE["bias all"])
    setattr(trainer, engine, True)
    with pytest.raises(ValueError, match="train outside the adapter"):
        trainer.train()


def test_an_own_reference_model_stands_still_whatever_trains(build, biased):
    trainer = build(peft_config=BESIDE["bias all"], max_steps=2)
    assert isinstance(trainer.reference, AdapterOff)
    explicit = build(max_steps=2)
    assert isinstance(explicit.reference, FrozenCopy)
    batch = first_batch(explicit)
    explicit.train()
    torch.testing.assert_close(
        explicit.reference.log_probs(batch).double(), log_probs(biased, batch), rtol=0, atol=1e-5
    )


def test_an_adapter_that_changes_the_model_from_the_start_is_said(build, said):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    build(peft_config=config, max_steps=1).train()
    assert "Before the first update the policy differs from its reference" in said()


def test_reference_forward_inside_a_pending_graph_leaves_gradients_alone(build):
    """The values are swapped between the policy's forward pass and its backward pass."""
    trainer = build(peft_config=BESIDE["bias all"])
    trainer.train()
    batch = first_batch(trainer)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]

    def gradients(read_reference):
        total = score_tokens(trainer.model, batch).logps_BT.sum()
        if read_reference:
            trainer.reference.log_probs(batch)
        return torch.autograd.grad(total, trained)

    assert all(map(torch.equal, gradients(True), gradients(False)))
