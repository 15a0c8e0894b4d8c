"""GRPO and PPO resume bit for bit: after SIGKILL, from every checkpoint, between two epochs over one batch."""

import random
import shutil

import pytest
import resume_policy
import torch
from conftest import weights
from policy_runs import scored
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halos_trl.trainers.rollout import rollout_file
from halos_trl.value_head import VALUE_HEAD_FILE


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by name, with their checkpoints."""
    done = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp("whole")
            done[name] = (resume_policy.uninterrupted(name, folder), folder)
        return done[name]

    return run


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("name", resume_policy.RUNS)
def test_resume_from_every_checkpoint_is_exact(whole, tmp_path, name, step):
    expected, folder = whole(name)
    trainer = resume_policy.make_trainer(name, tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resume_policy.equal(expected, resume_policy.end_of(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_killed_run_resumes_bit_for_bit(whole, tmp_path, name):
    expected, _ = whole(name)
    event, step = resume_policy.kill_point(random.Random(name))
    resumed = resume_policy.killed_and_resumed(name, tmp_path, event, step)
    assert resume_policy.equal(expected, resumed), f"killed {event} of step {step}"


def test_checkpoints_hold_what_a_resume_needs(whole):
    _, folder = whole("ppo")
    for step in (2, 4, 6, 8):
        checkpoint = folder / f"checkpoint-{step}"
        assert (checkpoint / VALUE_HEAD_FILE).is_file()
        assert rollout_file(str(checkpoint), 0).is_file() == (step % 3 != 0), "between two epochs over a batch"
        assert not any("v_head" in name for name in load_file(checkpoint / "model.safetensors"))
        assert torch.isfinite(weights(AutoModelForCausalLM.from_pretrained(checkpoint))).all()


def test_resume_says_nothing_about_missing_weights(whole, tmp_path, said):
    _, folder = whole("ppo")
    trainer = resume_policy.make_trainer("ppo", tmp_path, save_strategy="no", log_level="warning")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert "v_head" not in said()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no head", f"{VALUE_HEAD_FILE} is missing"),
        ("no rollout", "ppo_rollout_0.safetensors is missing.*between two epochs"),
        ("broken rollout", "ppo_rollout_0.safetensors cannot be read"),
    ],
)
def test_incomplete_checkpoint_is_refused(whole, tmp_path, damage, message):
    _, folder = whole("ppo")
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(folder / "checkpoint-4", checkpoint)
    if damage == "no head":
        (checkpoint / VALUE_HEAD_FILE).unlink()
    elif damage == "no rollout":
        rollout_file(str(checkpoint), 0).unlink()
    else:
        rollout_file(str(checkpoint), 0).write_bytes(b"\x40\0\0\0\0\0\0\0{")
    trainer = resume_policy.make_trainer("ppo", tmp_path / "out", save_strategy="no")
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_resume_with_another_split_between_epochs_is_refused(whole, tmp_path):
    _, folder = whole("ppo")
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "save_strategy": "no"}
    trainer = resume_policy.make_trainer("ppo", tmp_path / "out", **split)
    with pytest.raises(ValueError, match="does not match the rows"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def other_text(rows):
    """As many tokens, of other letters."""
    return rows.map(lambda row: {"prompt": [turn | {"content": turn["content"].swapcase()} for turn in row["prompt"]]})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": lambda rows: rows.map(lambda row: {"score": 1 - row["score"]})}, "their scores"),
        ({"data": other_text}, "does not match the rows"),
        ({"gamma": 0.5}, r"computed with {'gamma': 0.99, 'lam': 0.95}, but this run has {'gamma': 0.5, 'lam': 0.95}"),
        ({"lam": 0.5}, r"but this run has {'gamma': 0.99, 'lam': 0.5}"),
        ({"ppo_epochs": 2}, "`ppo_epochs=3` has become 2"),
        ({"ppo_epochs": 4}, "`ppo_epochs=3` has become 4"),
    ],
    ids=["scores", "tokens", "gamma", "lam", "fewer epochs", "more epochs"],
)
def test_resume_between_epochs_with_something_else_is_refused(whole, tmp_path, changed, message):
    _, folder = whole("ppo")
    changed = dict(changed)
    data = changed.pop("data", lambda rows: rows)(scored(10))
    trainer = resume_policy.make_trainer("ppo", tmp_path / "out", save_strategy="no", train_dataset=data, **changed)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    if "epochs" in message or "computed" in message:
        assert torch.equal(weights(trainer.model), before), "refused before anything is loaded"


def test_other_epochs_are_refused_between_two_batches_as_well(whole, tmp_path):
    # Step 6 ends the second batch of three epochs each; for two epochs it would be the end of the third.
    _, folder = whole("ppo")
    trainer = resume_policy.make_trainer("ppo", tmp_path / "out", save_strategy="no", ppo_epochs=2)
    with pytest.raises(ValueError, match="`ppo_epochs=3` has become 2"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_best_model_comes_back_with_its_head(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 3e-2}
    trainer = resume_policy.make_trainer(
        "ppo",
        tmp_path,
        eval_dataset=scored(4),
        metric_for_best_model="eval_scores",
        greater_is_better=True,
        **settings,
    )
    trainer.train()
    # The score of fixed completions never changes, so the first checkpoint stays the best.
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    stored = load_file(tmp_path / "checkpoint-2" / VALUE_HEAD_FILE)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in trainer.value_head.state_dict().items())
