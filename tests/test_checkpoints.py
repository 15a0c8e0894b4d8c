"""Which checkpoints a run resumes from: complete ones, written with the same settings, one run per folder."""

import copy
import json
import resource
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import cpu_config, paired_rows, perturbed, weights
from launch import engine_command
from lost_process import SGD
from peft import LoraConfig
from policy_runs import scored
from resume_engines import make as make_engine_run
from test_overriding import scorer
from transformers import TrainerCallback

from halos_trl import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    toy,
)
from halos_trl.trainers.checkpoints import last_complete_checkpoint, only_run_in
from halos_trl.trainers.processes import check_processes

KINDS = {
    "DPO": (DPOTrainer, DPOConfig, lambda: paired_rows(24)),
    "GRPO": (GRPOTrainer, GRPOConfig, lambda: scored(8, sizes=(3,))),
    "Bradley-Terry": (BradleyTerryTrainer, BradleyTerryConfig, lambda: paired_rows(24)),
}


def make(kind, folder, **settings):
    """Four steps of Adam, one in the middle of its second epoch, with a checkpoint after the second and the last."""
    trainer_class, config_class, rows = KINDS[kind]
    saving = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tokenizer = toy.build_tokenizer()
    model = toy.tiny_model(tokenizer)
    lora = LoraConfig(r=4, target_modules="all-linear") if settings.pop("lora", False) else None
    return trainer_class(
        model=scorer(model) if kind == "Bradley-Terry" else copy.deepcopy(model),
        args=cpu_config(config_class, folder, **(saving | settings)),
        train_dataset=rows(),
        eval_dataset=rows() if "eval_strategy" in settings else None,
        processing_class=tokenizer,
        peft_config=lora,
        **({} if kind == "Bradley-Terry" or "humanline" in settings else {"ref_model": perturbed(model)}),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folders and final weights of uninterrupted runs, by kind and settings."""
    done = {}

    def run(kind, **settings):
        key = (kind, *settings.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("finished")
            trainer = make(kind, folder, **settings)
            trainer.train()
            done[key] = (folder, weights(trainer.model))
        return done[key]

    return run


@pytest.fixture
def run_of(finished, tmp_path):
    """A copy of such a folder, which a test may damage, and the final weights."""

    def copied(kind, **settings):
        folder, end = finished(kind, **settings)
        shutil.copytree(folder, tmp_path / "out")
        return tmp_path / "out", end

    return copied


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_content(path):
    torch.save([1, 2, 3], path)


def write(text):
    return lambda path: path.write_text(text)


DAMAGES = [
    ("optimizer.pt", remove, "optimizer.pt is missing"),
    ("optimizer.pt", empty, "optimizer.pt is empty"),
    ("optimizer.pt", halve, "optimizer.pt is truncated"),
    ("optimizer.pt", other_content, "optimizer.pt contains a `list`"),
    ("scheduler.pt", remove, "scheduler.pt is missing"),
    ("scheduler.pt", write("no archive"), "scheduler.pt is truncated, or was not written by `torch.save`"),
    ("rng_state.pth", empty, "rng_state.pth is empty"),
    ("rng_state.pth", other_content, "rng_state.pth contains a `list`"),
    ("model.safetensors", empty, "model.safetensors cannot be read"),
    ("model.safetensors", halve, "model.safetensors cannot be read"),
    ("trainer_state.json", remove, "trainer_state.json is missing"),
    ("trainer_state.json", empty, "trainer_state.json cannot be read"),
    ("trainer_state.json", write("null"), "trainer_state.json does not contain a trainer state but None"),
    ("trainer_state.json", write("[]"), r"trainer_state.json does not contain a trainer state but \[\]"),
    ("trainer_state.json", write('{"global_step": 4, "nonsense": 1}'), "trainer_state.json cannot be read.*nonsense"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES)
def test_damage_is_named_and_passed_over(run_of, said, file, damage, message):
    folder, _ = run_of("DPO")
    damage(folder / "checkpoint-4" / file)
    trainer = make("DPO", folder)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert torch.equal(weights(trainer.model), before)
    assert last_complete_checkpoint(str(folder)) == str(folder / "checkpoint-2")
    assert "checkpoint-4 is incomplete" in said() and file in said()


@pytest.mark.parametrize("kind", KINDS)
def test_resume_with_true_goes_on_from_the_checkpoint_before(run_of, said, kind):
    folder, end = run_of(kind)
    remove(folder / "checkpoint-4" / "optimizer.pt")
    trainer = make(kind, folder)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(trainer.model), end)
    assert "optimizer.pt is missing" in said()


def test_a_checkpoint_of_weights_alone_is_refused(tmp_path):
    make("DPO", tmp_path, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing.*`save_only_model`"):
        make("DPO", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_trains_no_further(run_of, said, kind):
    folder, end = run_of(kind)
    trainer = make(kind, folder)
    result = trainer.train(resume_from_checkpoint=True)
    assert result.global_step == trainer.state.global_step == 4
    assert torch.equal(weights(trainer.model), end)
    assert "belongs to a finished run (step 4 of 4), so nothing was trained" in said()


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(run_of):
    folder, end = run_of("DPO")
    trainer = make("DPO", folder, max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5 and not torch.equal(weights(trainer.model), end)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"humanline": True, "log_epsilon_p": -2.0}, "`log_epsilon_p=-1.0` has become -2.0"),
        ({"humanline": True, "log_epsilon_r": 1.0}, "`log_epsilon_r=1.5` has become 1.0"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 1}, "`humanline=True` has become False"),
    ],
)
def test_another_clamp_or_another_moving_reference_is_refused(run_of, changed, message):
    folder, _ = run_of("DPO", humanline=True)
    trainer = make("DPO", folder, **changed)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_reference_of_another_run_is_refused(run_of, tmp_path):
    folder, _ = run_of("DPO", humanline=True)
    make("DPO", tmp_path / "other", humanline=True).train()
    shutil.copy(tmp_path / "other" / "checkpoint-2" / "reference.safetensors", folder / "checkpoint-2")
    with pytest.raises(ValueError, match=r"reference.safetensors and trainer_state.json .* by different runs"):
        make("DPO", folder, humanline=True).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_checkpoint_that_is_written_again_holds_nothing_of_the_older_run(run_of, said):
    folder, _ = run_of("DPO", humanline=True)
    assert (folder / "checkpoint-2" / "reference.safetensors").is_file()
    make("DPO", folder).train()
    assert "contains checkpoints of an earlier run" in said()
    assert not (folder / "checkpoint-2" / "reference.safetensors").exists()
    assert "halos_trl.moved_reference" not in json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_best_model_comes_back_with_the_reference_it_was_compared_with(tmp_path, adapter):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "humanline": True}
    best = {"metric_for_best_model": "eval_num_tokens", "greater_is_better": False, "save_total_limit": 1}
    trainer = make("DPO", tmp_path, **settings, **best, lora=adapter == "lora")  # the first is the best
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    then, last = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    again = trainer.evaluate()
    for metric in ("eval_loss", "eval_rewards/chosen", "eval_logps/chosen"):
        assert again[metric] == then[metric] != last[metric]


def test_two_runs_cannot_share_an_output_directory(tmp_path):
    trainer = make("Bradley-Terry", tmp_path)
    before = weights(trainer.model)
    with only_run_in(str(tmp_path)), pytest.raises(ValueError, match="Another run is training in"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)
    trainer.train()
    assert not list(tmp_path.glob("*.lock")), "nothing is left behind"


def test_files_of_engines_are_no_damage(run_of):
    """DeepSpeed keeps optimizer (and perhaps schedule) in a folder of its own, FSDP a sharded optimizer in another."""
    folder, _ = run_of("DPO")
    newest = folder / "checkpoint-4"
    (newest / "optimizer.pt").unlink()
    (newest / "optimizer_0").mkdir()
    assert last_complete_checkpoint(str(folder)) == str(newest)
    (newest / "optimizer_0").rmdir()
    (newest / "scheduler.pt").unlink()
    (newest / "global_step4").mkdir()
    assert last_complete_checkpoint(str(folder)) == str(newest)
    with pytest.raises(ValueError, match="it was written under DeepSpeed"):
        make("DPO", folder).train(resume_from_checkpoint=str(newest))


class FullDisk(TrainerCallback):
    """From the end of a step on no file can be longer than `room` bytes, as on a disk that has as much left."""

    def __init__(self, step, room):
        self.step, self.room = step, room

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("kind", "humanline", "room", "missing"),
    [
        ("DPO", True, 50_000, "model.safetensors"),  # the reference comes first
        ("DPO", False, 50_000, "optimizer.pt"),
        ("Bradley-Terry", False, 150_000, "scheduler.pt"),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(run_of, tmp_path, kind, humanline, room, missing):
    settings = {"humanline": True} if humanline else {}
    _, end = run_of(kind, **settings)
    trainer = make(kind, tmp_path / "full", **settings)
    trainer.add_callback(FullDisk(4, room))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*`save_total_limit`"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / "full" / "checkpoint-4" / missing).exists()
    assert last_complete_checkpoint(str(tmp_path / "full")) == str(tmp_path / "full" / "checkpoint-2")
    resumed = make(kind, tmp_path / "full", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed.model), end)


def test_a_checkpoint_of_several_processes_goes_on_in_one(run_of, said):
    folder, end = run_of("GRPO")
    middle = folder / "checkpoint-2"
    for i in range(2):
        shutil.copy(middle / "rng_state.pth", middle / f"rng_state_{i}.pth")
    (middle / "rng_state.pth").unlink()
    trainer = make("GRPO", folder)
    trainer.train(resume_from_checkpoint=str(middle))
    assert "was written by 2 processes, and this run has 1" in said()
    assert torch.equal(weights(trainer.model), end)
    (middle / "rng_state_0.pth").unlink()
    with pytest.raises(ValueError, match=r"rng_state_0\.pth is missing"):
        make("GRPO", folder).train(resume_from_checkpoint=str(middle))


def test_another_number_of_processes_is_refused_under_deepspeed(run_of):
    folder, _ = run_of("DPO")
    args = SimpleNamespace(world_size=3, train_batch_size=8, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="written by 1 processes under DeepSpeed, and this run has 3"):
        check_processes(folder / "checkpoint-2", args, deepspeed=True)


def test_another_size_of_a_step_is_said(run_of, said):
    folder, _ = run_of("DPO")
    make("DPO", folder, per_device_train_batch_size=4).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert "had 8 examples, and one of this run has 4" in said()


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_leaves_the_checkpoint_before(tmp_path):
    command, environment = engine_command(Path(__file__).with_name("lost_process.py"), [tmp_path], "ddp")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    run = tmp_path / "run"
    assert (run / "checkpoint-4" / "rng_state_0.pth").is_file(), "the other process was done with its part"
    assert last_complete_checkpoint(str(run)) == str(run / "checkpoint-2")
    # One process holds the whole step now.
    alone = {"per_device_train_batch_size": 8, **SGD}
    resumed, whole = make_engine_run(tmp_path, None, **alone), make_engine_run(tmp_path / "whole", None, **alone)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=1e-6)
