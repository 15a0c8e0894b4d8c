"""Kill a GRPO or PPO run with SIGKILL, resume it, and compare with an uninterrupted run, bit for bit.

    python tests/resume_policy.py --points 6         # 6 kill points for each kind of run

PPO makes three epochs over each batch and saves every two steps, so most checkpoints lie between two of them.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
from conftest import weights
from kill_and_resume import run_until_killed
from peft import LoraConfig
from policy_runs import build, scored, settings_of
from transformers import TrainerCallback

from halos_trl import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, toy

STEPS, SAVE_STEPS = 8, 2
EVENTS = (
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "while_saving",
)
RUNS = {
    "grpo": (GRPOTrainer, GRPOConfig, {}),
    "grpo, humanline": (GRPOTrainer, GRPOConfig, {"humanline": True}),
    "ppo": (PPOTrainer, PPOConfig, {"ppo_epochs": 3}),
    "ppo, humanline": (PPOTrainer, PPOConfig, {"ppo_epochs": 3, "humanline": True}),
    "ppo, lora": (PPOTrainer, PPOConfig, {"ppo_epochs": 3, "lora": True}),
}


class KillAt(TrainerCallback):
    """SIGKILL at one event of one step."""

    def __init__(self, event, step):
        self.step = step
        if event != "while_saving":
            setattr(self, event, self.kill)

    def kill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(name, output_dir, callbacks=None, eval_dataset=None, train_dataset=None, **overrides):
    trainer_class, config_class, own = RUNS[name]
    own = own | overrides
    lora = own.pop("lora", False)
    tokenizer = toy.build_tokenizer()
    settings = {
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "log_level": "error",
    }
    args = config_class(**(settings | settings_of(trainer_class) | own))
    moves = own.get("humanline") or lora
    peft_config = LoraConfig(r=4, target_modules="all-linear") if lora else None
    data = scored(10) if train_dataset is None else train_dataset
    # 10 groups make 5 steps: GRPO's second epoch, with its own order, is killed and resumed too.
    return build(
        trainer_class, args, toy.tiny_model(tokenizer), tokenizer, data, ref=None if moves else "near",
        callbacks=callbacks, peft_config=peft_config, eval_dataset=eval_dataset,
    )  # fmt: skip


def train_until_killed(name, output_dir, event, step):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # the process never comes back
    trainer = make_trainer(name, output_dir, [KillAt(event, step)])
    if event == "while_saving":
        write = trainer.before_checkpoint

        def write_and_die(folder):
            write(folder)
            if trainer.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.before_checkpoint = write_and_die
    trainer.train()


def end_of(trainer):
    """The weights (value head included) and everything that was logged."""
    logs = [e for e in trainer.state.log_history if "loss" in e]
    return weights(trainer.model), logs


def uninterrupted(name, folder):
    trainer = make_trainer(name, folder)
    trainer.train()
    return end_of(trainer)


def kill_point(rng):
    event = rng.choice(EVENTS)
    saves = range(2 * SAVE_STEPS, STEPS + 1, SAVE_STEPS)
    # At least one checkpoint lies behind, else there is nothing to resume from.
    return event, rng.choice(saves) if event == "while_saving" else rng.randrange(SAVE_STEPS + 1, STEPS)


def killed_and_resumed(name, folder, event, step):
    """The end of a run that was killed and resumed."""
    run_until_killed(train_until_killed, name, str(folder), event, step)
    trainer = make_trainer(name, folder)
    trainer.train(resume_from_checkpoint=True)
    return end_of(trainer)


def equal(one, other):
    return torch.equal(one[0], other[0]) and one[1] == other[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=6, help="kill points for each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    torch.set_num_threads(1)
    failures = 0
    for name in RUNS:
        root = Path(tempfile.mkdtemp())
        expected = uninterrupted(name, root / "whole")
        for number in range(options.points):
            event, step = kill_point(rng)
            same = equal(expected, killed_and_resumed(name, root / str(number), event, step))
            failures += not same
            print(f"{name:16s} killed {event:21s} step {step}: {'equal' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(root)
    print(f"{failures} of {len(RUNS) * options.points} differ")
    return failures


if __name__ == "__main__":
    sys.exit(main())
