"""Humanline in TRL's online GRPO: TRL's run without it, hand-computed numbers with it, reference and checkpoints."""

import math
from pathlib import Path

import datasets
import pytest
import torch
import trl
from conftest import CPU_SETTINGS, perturbed, user
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from halos_trl import toy
from halos_trl.online import GRPOConfig, GRPOTrainer

SETTINGS = CPU_SETTINGS | {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1.0,
}


def prompts(n=16):
    return datasets.Dataset.from_list([{"prompt": user(p)} for p in toy.make_prompts(n, 0, "feedback")])


def many_letters(completions, **kwargs):
    """A reward that differs inside a group: how many different letters there are."""
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def online_trainer(model, tokenizer, tmp_path, trainer=GRPOTrainer, config=GRPOConfig, peft_config=None, **settings):
    args = config(output_dir=str(tmp_path), **(SETTINGS | settings))
    return trainer(
        model, many_letters, args, train_dataset=prompts(), processing_class=tokenizer, peft_config=peft_config
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_without_humanline_the_run_is_trls_bit_for_bit(model, tokenizer, tmp_path, beta):
    model.config._name_or_path = str(tmp_path / "policy")  # TRL loads its reference from there
    model.save_pretrained(tmp_path / "policy")
    runs = []
    for trainer, config in ((trl.GRPOTrainer, trl.GRPOConfig), (GRPOTrainer, GRPOConfig)):
        torch.manual_seed(0)
        run = online_trainer(str(tmp_path / "policy"), tokenizer, tmp_path, trainer, config, beta=beta)
        run.train()
        runs.append(run)
    theirs, ours = ([{k: v for k, v in line.items() if "time" not in k and "second" not in k}
                     for line in run.state.log_history] for run in runs)  # fmt: skip
    assert ours == theirs
    before = load_file(tmp_path / "policy" / "model.safetensors")
    assert any(
        not torch.equal(value, before[name]) for name, value in weights(runs[0].model).items() if name in before
    )
    for name, value in weights(runs[1].model).items():
        assert torch.equal(value, weights(runs[0].model)[name]), name


def micro_batch(tokenizer):
    """What TRL hands to its loss: two completions of different lengths after left-padded prompts."""
    generator = torch.Generator().manual_seed(3)
    prompt_ids = torch.randint(5, len(tokenizer), (2, 4), generator=generator)
    completion_ids = torch.randint(5, len(tokenizer), (2, 5), generator=generator)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "completion_ids": completion_ids,
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "advantages": torch.tensor([1.5, -0.5]),
        "num_items_in_batch": torch.tensor(8.0),
    }


def log_probs(model, batch):
    """Per-token log-probs `(B, T)` of the completions, by the definition."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    table = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double().log_softmax(-1)
    return table.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, 3:]


def test_loss_under_humanline_is_the_clamped_one(model, tokenizer, tmp_path):
    """-min(r A, clip(r) A) + beta * k3 over tokens; r from the clamped log-ratio, k3 from the plain one."""
    low, high, beta = -0.05, 0.08, 0.3
    trainer = online_trainer(
        model, tokenizer, tmp_path, humanline=True, log_epsilon_p=low, log_epsilon_r=high, beta=beta,
        loss_type="bnpo", epsilon=0.04, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    reference = perturbed(model, scale=0.05)
    trainer.reference.sync(reference)
    trainer.model.train()
    batch = micro_batch(tokenizer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}

    trainer.model.zero_grad()
    policy_BT, mask_BT = log_probs(trainer.model, batch), batch["completion_mask"]
    raw_BT = policy_BT - log_probs(reference, batch).detach()
    inside_BT = (low < raw_BT) & (raw_BT < high)
    assert 0 < int((inside_BT & (mask_BT > 0)).sum()) < 8, "some tokens are clamped, some are not"
    ratio_BT = torch.where(inside_BT, raw_BT, raw_BT.detach().clamp(low, high)).exp()
    advantages_B1 = batch["advantages"][:, None].double()
    surrogate_BT = -torch.minimum(ratio_BT * advantages_B1, ratio_BT.clamp(0.96, 1.04) * advantages_B1)
    kl_BT = (-raw_BT).exp() + raw_BT - 1
    expected = ((surrogate_BT + beta * kl_BT) * mask_BT).sum() / mask_BT.sum()
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(got[name], parameter.grad, rtol=1e-3, atol=1e-6), name
    unclamped = (inside_BT & (mask_BT > 0)).sum() / mask_BT.sum()
    assert trainer._metrics["train"]["unclamped"] == [pytest.approx(unclamped.item())]
    kl = (kl_BT * mask_BT).sum() / mask_BT.sum()
    assert trainer._metrics["train"]["kl"] == [pytest.approx(kl.item(), rel=1e-4)]


class Watch(TrainerCallback):
    """Policy and reference as they are in each optimizer step's update."""

    def __init__(self):
        self.trainer, self.before, self.references = None, [], []

    def _reference(self):
        tensors = self.trainer.reference.tensors(self.trainer.model)
        return {name.replace(".ref.", ".default."): tensor.clone() for name, tensor in tensors.items()}

    def on_step_begin(self, args, state, control, **kwargs):
        self.before.append(weights(self.trainer.model))

    def on_step_end(self, args, state, control, **kwargs):
        self.references.append(self._reference())


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_the_reference_is_the_policy_before_each_second_step(model, tokenizer, tmp_path, peft_config):
    trainer = online_trainer(
        model, tokenizer, tmp_path, peft_config=peft_config, humanline=True, humanline_sync_steps=2, max_steps=4
    )
    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    start = watch._reference()
    trainer.train()
    for step, reference in enumerate(watch.references, 1):
        expected = start if step < 2 else watch.before[1 if step < 4 else 3]
        assert reference and all(torch.equal(value, expected[name]) for name, value in reference.items()), step
    moved = [name for name, value in watch.references[-1].items() if not torch.equal(value, start[name])]
    assert moved, "nothing was trained"
    # One step behind, so the ratio is not 1 from the second step on.
    assert [line["unclamped"] > 0 for line in trainer.state.log_history if "unclamped" in line] == [False] + [True] * 3


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_resumed_run_goes_on_bit_for_bit(model, tokenizer, tmp_path, peft_config):
    model.save_pretrained(tmp_path / "policy")

    def run(folder, **settings):
        torch.manual_seed(0)
        return online_trainer(
            str(tmp_path / "policy"), tokenizer, folder, peft_config=peft_config, humanline=True,
            save_strategy="steps", save_steps=2, max_steps=4, **settings,
        )  # fmt: skip

    whole = run(tmp_path / "run")
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in weights(resumed.model).items():
        assert torch.equal(value, weights(whole.model)[name]), name
    assert resumed.state.log_history[2]["unclamped"] == whole.state.log_history[2]["unclamped"]

    with pytest.raises(ValueError, match=r"log_epsilon_p=-1.0` has become -0.5"):
        run(tmp_path / "other", log_epsilon_p=-0.5).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"`humanline=True` has become False"):
        online_trainer(str(tmp_path / "policy"), tokenizer, tmp_path / "other", peft_config=peft_config).train(
            resume_from_checkpoint=str(checkpoint)
        )
    (checkpoint / "reference.safetensors").unlink()
    with pytest.raises(ValueError, match=r"reference\.safetensors is missing"):
        run(tmp_path / "other").train(resume_from_checkpoint=str(checkpoint))


def test_the_references_adapter_is_not_part_of_the_saved_model(model, tokenizer, tmp_path):
    trainer = online_trainer(model, tokenizer, tmp_path, peft_config=lora(), humanline=True, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (Path(tmp_path) / "saved" / "ref").exists()
    model.cpu()
    loaded = PeftModel.from_pretrained(toy.tiny_model(tokenizer), str(tmp_path / "saved"))
    assert list(loaded.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"humanline": True, "use_bias_correction_kl": True}, "`use_bias_correction_kl=True` weights"),
        ({"humanline": True, "loss_type": "cispo"}, "`loss_type='cispo'` detaches the ratio"),
        ({"humanline": True, "sync_ref_model": True, "beta": 0.1}, "`humanline=True` and `sync_ref_model=True`"),
        ({"humanline": True, "log_epsilon_p": 0.5}, "log_epsilon_p=0.5"),
        ({"log_epsilon_p": -0.5}, "it has no effect while `humanline` is off"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        GRPOConfig(output_dir=str(tmp_path), **(SETTINGS | settings))
