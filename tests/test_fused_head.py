"""TRL's fused LM head as added by this package: copies use their own weights, mixtures of experts work."""

import copy

import pytest
import torch
from conftest import perturbed
from peft import LoraConfig
from test_humanline_training import METHODS, SCORED, first_batch, rows_for
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from halos_trl._trl import score_tokens
from halos_trl._trl.fused_head import TILE, add_copyable_head
from halos_trl.forward.packing import give_packing

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def build(model, tokenizer, make_config):
    def build(method, policy=None, **settings):
        trainer_class, config_class = (METHODS | SCORED)[method]
        peft_config = settings.pop("peft_config", None)
        return trainer_class(
            copy.deepcopy(model) if policy is None else policy,
            args=make_config(config_class, **settings),
            train_dataset=rows_for(method),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return build


def outputs_of(model, batch):
    """Every way in which the policy is called: with its fused head, without, and generating."""
    model.eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        tokens = score_tokens(model, batch)
        values = [] if tokens.values_BT is None else [tokens.values_BT]
        settings = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        generated = model.generate(**inputs, **settings)
        return [tokens.logps_BT, *values, model(**inputs).logits, *generated.scores]


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("adapter", [None, LoraConfig(**LORA)], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_copy_of_the_policy_runs_its_own_weights(build, method, adapter, mixed):
    trainer = build(method, max_steps=3, learning_rate=0.5, peft_config=adapter, bf16=mixed)
    batch = first_batch(trainer)
    before = outputs_of(trainer.model, batch)
    early = copy.deepcopy(trainer.model)
    trainer.train()
    late = copy.deepcopy(trainer.model)
    after = outputs_of(trainer.model, batch)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for copied, expected in ((early, before), (late, after)):
        torch.testing.assert_close(outputs_of(copied, batch), expected, rtol=0, atol=1e-6)
    for parameter in trainer.model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(outputs_of(late, batch), after, rtol=0, atol=1e-6)


def test_a_forward_that_somebody_put_on_the_model_stays(build, model):
    calls = []
    policy = copy.deepcopy(model)
    own = policy.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    policy.forward = counting
    trainer = build("dpo", policy)
    batch = first_batch(trainer)
    trainer.model(input_ids=batch["input_ids"])
    assert calls == [1]


@pytest.mark.parametrize("first", ["dpo", "ppo"])
def test_a_model_may_go_through_several_trainers(build, model, first):
    policy = copy.deepcopy(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = policy(input_ids=ids).logits
    for method in (first, "dpo", first):
        trainer = build(method, policy)
    batch = first_batch(trainer)
    once = score_tokens(build(first, copy.deepcopy(model)).model, batch)
    for running in (policy, copy.deepcopy(policy)):
        assert running(input_ids=ids).logits.equal(plain)
        assert score_tokens(running, batch).logps_BT.equal(once.logps_BT)


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HYBRID = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "shared_intermediate_size": 32,
    "layer_types": ["attention", "attention"],
}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "granitemoeshared": {"num_local_experts": 4},
    "granitemoehybrid": {"num_local_experts": 4, **HYBRID},
    "phimoe": {"num_local_experts": 4},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
}
"""Half of them lack `num_experts`, which TRL reads, in their config."""


def mixture(family, **settings):
    config = AutoConfig.for_model(family, **SIZES | EXPERTS[family] | settings)
    torch.manual_seed(0)
    return perturbed(AutoModelForCausalLM.from_config(config).eval(), scale=0.1)


@pytest.mark.parametrize("family", EXPERTS)
def test_balancing_term_is_that_of_the_models_own_forward(family):
    model = mixture(family)
    ids = torch.arange(3, 27).reshape(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    config = model.config.to_dict()
    with torch.no_grad():
        expected = model(**inputs, output_router_logits=True)
        add_copyable_head(model)
        fused = model(**inputs, labels=ids, fused_lm_head=True, output_router_logits=True)
    assert float(fused.aux_loss) == pytest.approx(float(expected.aux_loss), abs=1e-6)
    logps = expected.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(fused.log_probs, logps, rtol=0, atol=1e-5)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("experts", [4, 0])
def test_granite_hybrid_trains_with_and_without_experts(build, tokenizer, experts):
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_local_experts": experts}
    trainer = build("dpo", mixture("granitemoehybrid", **sizes), max_steps=2)
    trainer.train()
    assert ("aux_loss" in trainer.state.log_history[0]) == (experts > 0)


class _Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        sizes = [x.numel() for x in (result if isinstance(result, list | tuple) else [result]) if torch.is_tensor(x)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("mode", ["on", "off"])
def test_logits_of_all_tokens_never_exist_at_once(mode):
    sizes = SIZES | {"vocab_size": 40_000, "hidden_size": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    ids = torch.randint(3, 40_000, (4, 80))
    mask = (torch.arange(80) >= 20).long().expand(4, 80).clone()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    expected = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]
    expected.sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    add_copyable_head(model)
    give_packing([model], mode)
    with _Largest() as largest:
        logps_BT = score_tokens(model, batch).logps_BT
        logps_BT.sum().backward()
    torch.testing.assert_close(logps_BT, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, rtol=1e-4, atol=1e-5)
    assert int(mask.sum()) * 40_000 > 2 * TILE >= 2 * largest.elements > 0
