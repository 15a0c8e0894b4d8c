"""Humanline in the trainers: the clamp in every method, and a reference that is one step behind the policy."""

import contextlib
import copy
import math

import pytest
import torch
import trl
from conftest import paired_rows, perturbed, unpaired_rows, weights
from peft import LoraConfig, get_peft_model
from policy_runs import scored
from safetensors.torch import load_file, save_file
from test_paired_trainers import LOSS_TYPES, PAIRED
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback

from halos_trl import (
    DPOConfig,
    GRPOConfig,
    GRPOTrainer,
    Humanline,
    KTOConfig,
    KTOTrainer,
    PPOConfig,
    PPOTrainer,
    losses,
)
from halos_trl._trl import score_tokens
from halos_trl.reference import REFERENCE_FILE, AdapterOff, FrozenAdapter, FrozenCopy
from halos_trl.sharded import parameters_by_name
from halos_trl.trainers.loss import BatchTables

METHODS = PAIRED | {"kto": (KTOTrainer, KTOConfig)}
SCORED = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}


def rows_for(method, n=24):
    if method in SCORED:
        return scored(n // 3)
    return unpaired_rows(n) if method == "kto" else paired_rows(n)


@pytest.fixture
def make(model, tokenizer, make_config):
    """A trainer with humanline on, in the order of the data."""

    def build(method="dpo", *, policy=None, ref_model=None, peft_config=None, callbacks=None, data=None, **settings):
        trainer_class, config_class = (METHODS | SCORED)[method]
        defaults = {"humanline": True, "train_sampling_strategy": "sequential"}
        return trainer_class(
            copy.deepcopy(model) if policy is None else policy,
            ref_model,
            make_config(config_class, **(defaults | settings)),
            train_dataset=data or rows_for(method),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return build


class Watch(TrainerCallback):
    """Copies the policy's and the reference's moving tensors at the start and the end of every step."""

    def __init__(self):
        self.before, self.reference = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append({k: v.detach().clone() for k, v in model.named_parameters()})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        tensors = self.trainer.reference.tensors(self.trainer.model)
        self.reference.append({k: v.detach().clone() for k, v in tensors.items()})
        missing = [k for k, v in model.named_parameters() if v.requires_grad and ".ref." in k]
        assert not missing, "the reference adapter must not be trained"

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        without = [k for k, v in model.named_parameters() if v.requires_grad and v.grad is None]
        assert not without, f"no gradient for {without}"


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def policy_log_probs(trainer, batch):
    """Without gradient and without dropout."""
    trainer.model.eval()
    with torch.no_grad():
        return score_tokens(trainer.model, batch).logps_BT


def assert_reference_was_policy(watch, *, after_step, of_step):
    reference, policy = watch.reference[after_step - 1], watch.before[of_step - 1]
    assert reference
    for name, tensor in reference.items():
        assert torch.equal(tensor, policy[name.replace(".ref.", ".default.")]), name


ADAPTERS = {
    "full": None,
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
}


# -- the reference is the policy before the step -----------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_reference_after_step_t_is_the_policy_before_step_t(make, method, adapter):
    watch = Watch()
    watch.trainer = make(method, peft_config=ADAPTERS[adapter], callbacks=[watch], max_steps=4)
    watch.trainer.train()
    for t in range(1, 5):
        assert_reference_was_policy(watch, after_step=t, of_step=t)
    moved = [k for k in watch.before[0] if not torch.equal(watch.before[0][k], watch.before[3][k])]
    assert moved


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize(("method", "settings"), [("grpo", {}), ("ppo", {}), ("ppo", {"ppo_epochs": 2})])
def test_methods_on_scored_completions_follow_the_policy_too(make, method, settings, adapter):
    watch = Watch()
    watch.trainer = make(method, peft_config=ADAPTERS[adapter], callbacks=[watch], max_steps=4, **settings)
    watch.trainer.train()
    for t in range(1, 5):
        assert_reference_was_policy(watch, after_step=t, of_step=t)
    # The value head moves even where the policy does not.
    assert any(not torch.equal(t, watch.reference[3][k]) for k, t in watch.reference[0].items())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sync_every_third_step(make, adapter):
    watch = Watch()
    watch.trainer = make(
        peft_config=ADAPTERS[adapter], callbacks=[watch], max_steps=7, humanline_sync_steps=3, data=paired_rows(56)
    )
    watch.trainer.train()
    for after, of in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (6, 6), (7, 6)]:
        assert_reference_was_policy(watch, after_step=after, of_step=of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explicit_reference_is_used_first_and_then_overwritten(make, model, dtype):
    """It may be of another dtype than the policy: what is copied into it is rounded."""
    reference = perturbed(model).to(dtype)
    watch = Watch()
    watch.trainer = make(ref_model=reference, callbacks=[watch], max_steps=2)
    watch.trainer.train()
    assert watch.trainer.state.log_history[0]["rewards/chosen"] != 0.0
    for name, parameter in reference.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, watch.before[1][name].to(dtype)), name


def test_reference_follows_a_policy_whose_layers_are_wrapped(model):
    """The reference is bare, and both have to find each other's parameters by name."""
    policy = copy.deepcopy(model)
    policy.model.layers[0] = checkpoint_wrapper(policy.model.layers[0])
    compiled = torch.nn.Module()
    compiled._orig_mod = policy
    renamed = "_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight"
    assert renamed in dict(compiled.named_parameters())
    assert list(parameters_by_name(compiled)) == list(dict(model.named_parameters()))
    reference = FrozenCopy(perturbed(model), lambda wrapped: wrapped, contextlib.nullcontext)
    reference.sync(compiled)
    assert torch.equal(weights(reference.model), weights(model))


def test_a_policy_without_path_starts_equal_to_its_reference(make):
    trainer = make(max_steps=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert "unclamped" not in first, "no token differs from the reference, so there is nothing to count"


# -- adapters: what the reference says is what a deep copy of the whole policy would say ----------------------------


class DeepCopies(TrainerCallback):
    """Takes a deep copy of the whole policy before every step, and compares it with the reference afterwards."""

    def __init__(self, batch):
        self.batch = batch
        self.distance, self.movement = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.copy = copy.deepcopy(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            expected = score_tokens(self.copy, self.batch).logps_BT
            now = score_tokens(model, self.batch).logps_BT
        self.distance.append((self.trainer.reference.log_probs(self.batch) - expected).abs().max().item())
        self.movement.append((now - expected).abs().max().item())


QUANTIZED = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture
def policy_of(model, tmp_path):
    """`policy_of("4bit")`: what to pass as `policy` and `peft_config`."""

    def build(kind):
        policy = copy.deepcopy(model)
        if kind in QUANTIZED:
            pytest.importorskip("bitsandbytes")
            model.save_pretrained(tmp_path / "base")
            policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=QUANTIZED[kind])
        elif kind == "existing adapter":
            policy = get_peft_model(policy, LoraConfig(**LORA))
        return {"policy": policy, "peft_config": LoraConfig(**LORA) if kind in QUANTIZED else ADAPTERS.get(kind)}

    return build


@pytest.mark.parametrize("kind", ["lora", "dora", "4bit", "8bit", "existing adapter"])
def test_reference_adapter_equals_a_deep_copy_of_the_policy(make, policy_of, kind):
    trainer = make(**policy_of(kind), max_steps=3, learning_rate=1e-2)
    check = DeepCopies(first_batch(trainer))
    check.trainer = trainer
    trainer.add_callback(check)
    trainer.train()
    assert max(check.distance) <= 1e-6
    assert min(check.movement) > 1e-4


@pytest.mark.parametrize("humanline", [True, False])
@pytest.mark.parametrize("ready", [False, True], ids=["peft_config", "PeftModel"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_took_a_part_of_the_base_weights(make, model, init, ready, humanline):
    """The base alone is not what the policy was at the start, so the reference needs an adapter in any case."""
    config = LoraConfig(**LORA | {"init_lora_weights": init})
    policy = get_peft_model(copy.deepcopy(model), config) if ready else None
    watch = Watch()
    watch.trainer = trainer = make(
        policy=policy, peft_config=None if ready else config, callbacks=[watch], humanline=humanline, max_steps=2
    )
    batch = first_batch(trainer)
    start = policy_log_probs(trainer, batch)
    without_adapter = policy_log_probs(make(humanline=False), batch)
    torch.testing.assert_close(start, without_adapter, rtol=0, atol=1e-5)
    torch.testing.assert_close(trainer.reference.log_probs(batch), start, rtol=0, atol=1e-6)
    trainer.train()
    assert not torch.equal(policy_log_probs(trainer, batch), start)
    if humanline:
        assert_reference_was_policy(watch, after_step=2, of_step=2)
    else:
        torch.testing.assert_close(trainer.reference.log_probs(batch), start, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"humanline": False, "sync_ref_model": True, "ref_model_sync_steps": 1}])
def test_reference_adapter_has_no_dropout(make, settings):
    trainer = make(peft_config=LoraConfig(**LORA, lora_dropout=0.5), disable_dropout=False, max_steps=2, **settings)
    trainer.train()
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert torch.equal(trainer.reference.log_probs(batch), trainer.reference.log_probs(batch))
    with torch.no_grad():
        policy = [score_tokens(trainer.model, batch).logps_BT for _ in range(2)]
    assert not torch.equal(*policy), "the policy keeps the dropout that it was asked to keep"


@pytest.mark.parametrize(
    ("kind", "adapter", "humanline"),
    [(FrozenCopy, "full", True), (AdapterOff, "lora", False), (FrozenAdapter, "lora", True)],
)
def test_reference_has_no_dropout_of_the_base_model(make, model, kind, adapter, humanline):
    config = LlamaConfig(**model.config.to_dict() | {"attention_dropout": 0.5})
    trainer = make(
        policy=LlamaForCausalLM(config), peft_config=ADAPTERS[adapter], humanline=humanline, disable_dropout=False
    )
    assert type(trainer.reference) is kind
    batch = first_batch(trainer)
    trainer.model.train()
    next(trainer.model.children()).training = False  # some module that somebody froze
    flags = [module.training for module in trainer.model.modules()]
    assert torch.equal(trainer.reference.log_probs(batch), trainer.reference.log_probs(batch))
    assert [module.training for module in trainer.model.modules()] == flags
    with torch.no_grad():
        policy = [score_tokens(trainer.model, batch).logps_BT for _ in range(2)]
    assert not torch.equal(*policy), "the policy keeps the dropout that it was asked to keep"


def test_reference_that_cannot_hold_the_policy_is_refused(make, model, tokenizer):
    from halos_trl import toy

    with pytest.raises(ValueError, match="second adapter on the same base model"):
        make(ref_model=perturbed(model), peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="the policy's architecture"):
        make(ref_model=toy.build_model(tokenizer))


def test_adapters_hold_one_base_model_and_save_only_the_policy(make, tmp_path):
    trainer = make(peft_config=LoraConfig(**LORA), max_steps=2, save_strategy="steps", save_steps=2)
    assert trainer.ref_model is None
    trained = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    reference = trainer.reference.tensors(trainer.model)
    assert not trained & {id(p) for p in reference.values()}
    policy = [p for n, p in trainer.model.named_parameters() if ".default." in n]
    assert sum(p.numel() for p in reference.values()) == sum(p.numel() for p in policy)

    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "out" / "checkpoint-2"):
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "ref").exists()
    assert not (tmp_path / "saved" / REFERENCE_FILE).exists()


@pytest.mark.parametrize("humanline", [True, False])
def test_an_adapter_that_was_there_besides_is_saved_too(make, model, tmp_path, humanline):
    policy = get_peft_model(copy.deepcopy(model), LoraConfig(**LORA))
    policy.add_adapter("style", LoraConfig(**LORA))
    trainer = make(policy=policy, humanline=humanline, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "out" / "checkpoint-1"):
        assert (folder / "adapter_model.safetensors").is_file()
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["style"]
        stored = load_file(folder / "style" / "adapter_model.safetensors")
        own = dict(policy.named_parameters())
        assert stored
        assert all(torch.equal(t, own[k.replace(".weight", ".style.weight")]) for k, t in stored.items())


# -- the clamp, in every method ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_loss_of_a_batch_is_the_clamped_loss_function(make, model, method):
    """The trainer's loss equals the pure function on the same tables, with bounds that bind."""
    settings = {"log_epsilon_p": -0.05, "log_epsilon_r": 0.03}
    reference = perturbed(model)
    trainer = make(method, ref_model=None if method in ("simpo", "slic") else reference, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    clamp = Humanline(-0.05, 0.03)
    with torch.no_grad():
        tokens = score_tokens(trainer.model, batch)
    reference_BT = trainer.reference.log_probs(batch)
    trainer.model.train()
    if method == "kto":
        from halos_trl.records import UnpairedLogps

        record = UnpairedLogps(tokens.logps_BT, reference_BT, tokens.mask_BT, batch["label"])
        loss = trainer.compute_loss(trainer.model, batch)
        expected, unbounded = (losses.kto(record, kl=trainer.kl, beta=0.1, humanline=h) for h in (clamp, None))
    else:
        record = trainer.record(BatchTables(batch, tokens, reference_BT))
        loss = trainer.compute_loss(trainer.model, batch)
        expected, unbounded = (getattr(losses, method)(record, humanline=h) for h in (clamp, None))
    assert loss.item() == pytest.approx(expected.losses.mean().item(), abs=1e-6)
    assert abs(expected.losses.mean() - unbounded.losses.mean()) > 1e-4, "the bounds must bind"


def test_unclamped_fractions_are_logged_for_each_side_and_all(make, model):
    trainer = make(ref_model=perturbed(model), max_steps=1, log_epsilon_p=-0.2, log_epsilon_r=0.2)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        tokens = score_tokens(trainer.model, batch)
    ratios_BT = tokens.logps_BT - trainer.reference.log_probs(batch)
    inside_BT, counted_BT = (ratios_BT.abs() < 0.2) & (ratios_BT != 0), ratios_BT != 0
    half = len(ratios_BT) // 2
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["unclamped"] == pytest.approx((inside_BT.sum() / counted_BT.sum()).item())
    assert logged["unclamped/chosen"] == pytest.approx((inside_BT[:half].sum() / counted_BT[:half].sum()).item())
    assert logged["unclamped/rejected"] == pytest.approx((inside_BT[half:].sum() / counted_BT[half:].sum()).item())
    assert 0 < logged["unclamped"] < 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [False, True])
def test_every_method_trains(make, method, lora):
    # An untrained model's log-probs lie far below -1: SimPO and SLiC, which clamp them raw, need a lower bound.
    trainer = make(method, peft_config=LoraConfig(**LORA) if lora else None, log_epsilon_p=-20.0)
    before = weights(trainer.model)
    trainer.train()
    assert torch.isfinite(weights(trainer.model)).all()
    assert not torch.equal(before, weights(trainer.model))
    assert "unclamped" in trainer.state.log_history[2]


# -- TRL's own loss types under the clamp --------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trl_loss_types_see_clamped_log_probs(make, model, loss_type):
    """TRL's loss on a policy that is itself (reference + clamped log-ratio) must be what humanline gives."""
    smoothed = {"label_smoothing": 0.1} if loss_type in ("robust", "exo_pair", "aot", "aot_unpaired") else {}
    settings = {"loss_type": loss_type, "beta": 0.5} | smoothed
    reference = perturbed(model)
    ours = make(ref_model=reference, log_epsilon_p=-0.05, log_epsilon_r=0.03, loss_weights=[1.0], **settings)
    assert ours.uses_trl_loss or loss_type == "sigmoid"
    batch = next(iter(ours.get_train_dataloader()))
    ours.model.train()
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()

    plain = make(ref_model=copy.deepcopy(reference), humanline=False, **settings)
    plain.model.train()
    reference_BT = plain.reference.log_probs(batch)

    def clamped(**inputs):
        outputs = plain.model(**inputs)
        mask_BT = batch["completion_mask"][:, 1:]
        outputs.log_probs = (reference_BT + (outputs.log_probs - reference_BT).clamp(-0.05, 0.03)) * mask_BT
        return outputs

    expected = trl.DPOTrainer._compute_loss(plain, clamped, batch, False)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    for mine, trls in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, trls.grad, rtol=1e-4, atol=2e-6)
    assert trl.DPOTrainer._compute_loss(plain, plain.model, batch, False).item() != pytest.approx(
        loss.item(), abs=2e-5
    )


def hinge(ratios_BT, reference_BT, mask_BT):
    chosen_B, rejected_B = ratios_BT.sum(1).chunk(2)
    return torch.relu(1 - 0.5 * (chosen_B - rejected_B)).mean()


def sigmoid_norm(ratios_BT, reference_BT, mask_BT):
    chosen_B, rejected_B = (ratios_BT.sum(1) / mask_BT.sum(1)).chunk(2)
    return -logsigmoid(0.5 * (chosen_B - rejected_B)).mean()


def sigmoid_and_sft(ratios_BT, reference_BT, mask_BT):
    chosen_B, rejected_B = ratios_BT.sum(1).chunk(2)
    chosen_BT, is_chosen_BT = (reference_BT + ratios_BT).chunk(2)[0], mask_BT.chunk(2)[0]
    return -2.0 * logsigmoid(0.5 * (chosen_B - rejected_B)).mean() - 0.5 * chosen_BT[is_chosen_BT].mean()


def desensitized(ratios_BT, reference_BT, mask_BT):
    """Tokens beyond the length of the pair's shorter side count for 0.3."""
    shorter_B = torch.minimum(*mask_BT.sum(1).chunk(2)).repeat(2)
    weight_BT = torch.where(mask_BT.cumsum(1) <= shorter_B[:, None], 1.0, 0.3)
    chosen_B, rejected_B = (weight_BT * ratios_BT).sum(1).chunk(2)
    return -logsigmoid(0.5 * (chosen_B - rejected_B)).mean()


def jensen_shannon(ratios_BT, reference_BT, mask_BT):
    chosen_B, rejected_B = (math.log(2) + logsigmoid(ratios_BT.sum(1))).chunk(2)
    return -logsigmoid(0.5 * (chosen_B - rejected_B)).mean()


@pytest.mark.parametrize(
    ("by_hand", "settings"),
    [
        (hinge, {"loss_type": "hinge"}),
        (sigmoid_norm, {"loss_type": "sigmoid_norm"}),
        (sigmoid_and_sft, {"loss_type": ["sigmoid", "sft"], "loss_weights": [2.0, 0.5]}),
        (desensitized, {"ld_alpha": 0.3}),
        (jensen_shannon, {"f_divergence_type": "js_divergence"}),
    ],
)
def test_trl_losses_are_those_of_clamped_log_ratios(make, model, by_hand, settings):
    trainer = make(
        ref_model=perturbed(model), max_steps=1, beta=0.5, log_epsilon_p=-0.05, log_epsilon_r=0.03, **settings
    )
    batch = first_batch(trainer)
    mask_BT = batch["completion_mask"][:, 1:].bool()
    policy_BT, reference_BT = policy_log_probs(trainer, batch), trainer.reference.log_probs(batch)
    ratios_BT = policy_BT - reference_BT
    expected, unbounded = (
        by_hand(ratios, reference_BT, mask_BT).item() for ratios in (ratios_BT.clamp(-0.05, 0.03), ratios_BT)
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - unbounded) > 1e-4, "the bounds must bind"
    # What is said about the policy is said of the policy as it is.
    chosen_B, rejected_B = policy_BT.sum(1).chunk(2)
    assert logged["logps/chosen"] == pytest.approx(chosen_B.mean().item(), rel=1e-5)
    assert logged["logps/rejected"] == pytest.approx(rejected_B.mean().item(), rel=1e-5)
    inside_BT, counted_BT = (-0.05 < ratios_BT) & (ratios_BT < 0.03) & mask_BT, ratios_BT != 0
    half = len(ratios_BT) // 2
    for name, side in {"": slice(None), "/chosen": slice(half), "/rejected": slice(half, None)}.items():
        share = inside_BT[side].sum() / counted_BT[side].sum()
        assert logged[f"unclamped{name}"] == pytest.approx(share.item())
        assert 0 < share < 1


# -- TR-DPO through the same object --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_sync_ref_model_mixes_after_the_step_also_with_adapters(make, method, adapter):
    watch = Watch()
    watch.trainer = make(
        method, peft_config=ADAPTERS[adapter], callbacks=[watch], max_steps=4, data=rows_for(method, 32),
        humanline=False, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.7,
    )  # fmt: skip
    trainer = watch.trainer
    start = {k: v.detach().clone() for k, v in trainer.reference.tensors(trainer.model).items()}
    trainer.train()
    for name, initial in start.items():
        # The watch runs before the sync at the end of step 2, so the mixture shows from step 3 on.
        after_2 = watch.before[2][name.replace(".ref.", ".default.")]
        assert torch.equal(watch.reference[0][name], initial)
        assert torch.equal(watch.reference[1][name], initial)
        torch.testing.assert_close(watch.reference[2][name], 0.3 * initial + 0.7 * after_2, rtol=0, atol=1e-6)
        assert torch.equal(watch.reference[3][name], watch.reference[2][name])


# -- checkpoints ---------------------------------------------------------------------------------------------------

SAVE = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "data": paired_rows(32)}


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "out" / "checkpoint-2"


def assert_same_end(one, other):
    assert torch.equal(weights(one.model), weights(other.model))
    ends = [trainer.reference.tensors(trainer.model) for trainer in (one, other)]
    assert ends[0]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_moved_reference_is_in_every_checkpoint_without_pickle(make, checkpoint):
    watch = Watch()
    watch.trainer = make(callbacks=[watch], **SAVE)
    watch.trainer.train()
    stored = load_file(checkpoint / REFERENCE_FILE)
    assert set(stored) == set(watch.reference[1])
    assert all(torch.equal(stored[k], watch.reference[1][k]) for k in stored)


def test_an_unmoved_reference_is_not_stored(make, checkpoint):
    for settings in ({"humanline": False}, {"humanline_sync_steps": 3}):
        make(**SAVE, **settings).train()
        assert checkpoint.is_dir()
        assert not (checkpoint / REFERENCE_FILE).exists()
    assert (checkpoint.parent / "checkpoint-4" / REFERENCE_FILE).exists(), "moved before step 3"


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "4bit"])
def test_resumed_run_ends_where_the_uninterrupted_run_ends(make, policy_of, checkpoint, kind):
    settings = SAVE | {"train_sampling_strategy": "random"}
    whole = make(**settings, **policy_of(kind))
    whole.train()
    resumed = make(**settings, **policy_of(kind))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_end(whole, resumed)


def test_only_a_new_trainer_can_go_back_to_where_the_reference_stood_still(make, checkpoint):
    settings = SAVE | {"humanline_sync_steps": 3}
    whole = make(**settings)
    whole.train()
    with pytest.raises(ValueError, match="Create a new trainer"):
        whole.train(resume_from_checkpoint=str(checkpoint))
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_end(whole, resumed)


def test_tr_dpo_resumes_exactly(make, checkpoint):
    """TRL's checkpoints hold no reference, so there a resumed run drifts away."""
    settings = SAVE | {"humanline": False, "sync_ref_model": True, "ref_model_sync_steps": 1}
    whole = make("dpo", **settings)
    whole.train()
    resumed = make("dpo", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(whole.model), weights(resumed.model))


def test_a_stored_reference_is_used_whatever_the_new_period(make, checkpoint):
    whole = make(**SAVE, humanline_sync_steps=2)
    whole.train()
    resumed = make(**SAVE | {"max_steps": 3}, humanline_sync_steps=100)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    third = [next(e for e in t.state.log_history if e.get("step") == 3) for t in (whole, resumed)]
    assert third[0]["rewards/chosen"] == third[1]["rewards/chosen"] != 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"reference\.safetensors is missing.*silently continue"),
        ({"humanline": False}, "contains a reference that has moved"),
        ({"humanline_sync_steps": 100}, r"reference\.safetensors is missing"),
    ],
)
def test_missing_reference_file_is_an_error_whatever_this_run_would_have_written(make, checkpoint, settings, message):
    make(**SAVE).train()
    (checkpoint / REFERENCE_FILE).unlink()
    with pytest.raises(ValueError, match=message):
        make(**SAVE, **settings).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_truncated_reference_file_is_an_error(make, checkpoint, keep):
    make(**SAVE).train()
    file = checkpoint / REFERENCE_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot be read .*truncated"):
        make(**SAVE).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("change", [lambda norm: torch.zeros(3), lambda norm: norm.half()], ids=["shape", "dtype"])
def test_reference_of_another_model_is_an_error(make, checkpoint, change):
    make(**SAVE).train()
    stored = load_file(checkpoint / REFERENCE_FILE)
    stored["model.norm.weight"] = change(stored["model.norm.weight"])
    save_file(stored, checkpoint / REFERENCE_FILE)
    with pytest.raises(ValueError, match=r"the reference of a different model: 'model\.norm\.weight'"):
        make(**SAVE).train(resume_from_checkpoint=str(checkpoint))


def test_no_complete_checkpoint_is_an_error(make):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make().train(resume_from_checkpoint=True)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 0.0)])
def test_zero_is_a_legal_bound(make_config, bounds):
    config = make_config(DPOConfig, humanline=True, log_epsilon_p=bounds[0], log_epsilon_r=bounds[1])
    assert config.humanline_clamp == Humanline(*bounds)
