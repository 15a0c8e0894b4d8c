"""The training of one round, which continues from the checkpoint of the previous round on new data."""

from __future__ import annotations

import copy
import math
import shutil
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import TrainerCallback

from ..trainers.checkpoints import last_complete_checkpoint
from .methods import make_trainer

if TYPE_CHECKING:
    from .rounds import Rounds


def train_round(run: Rounds, number: int, rows: Dataset) -> dict[str, Any]:
    """Train on the feedback of a round, and save its policy and its checkpoint. All processes must call this.

    Optimizer, scheduler, random state and a moving reference are restored from the checkpoint of the previous round.
    The schedule assumes that each later round has as many steps as this one. A round that was interrupted during
    training is trained again from that checkpoint.
    """
    folder = run.folder(number)
    args = copy.copy(run.training)
    args.output_dir = str(folder)
    args.ignore_data_skip = True  # the checkpoint's position belongs to the rows of the previous round
    trainer = make_trainer(run.method, _model(run, number), args, run.model, train_dataset=rows)
    if trainer.is_world_process_zero():
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()
    before = last_complete_checkpoint(str(run.folder(number - 1))) if number > 1 else None
    if number > 1 and before is None:
        raise ValueError(
            f"`{run.folder(number - 1)}` has no complete checkpoint to resume from. Remove its `metrics.json` to "
            "train the round again."
        )
    done = int(before.rsplit("-", 1)[1]) if before else 0
    steps = _steps(trainer, run.training)
    trainer.args.max_steps = done + steps * (run.flags.rounds - number + 1)
    trainer.add_callback(_EndOfRound(done + steps))
    trainer.train(resume_from_checkpoint=before)
    trainer.save_model(run.policy(number))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] > done]
    trainer.accelerator.free_memory()
    return {"steps": steps, "total_steps": done + steps, "loss": losses[-1] if losses else None}


def _model(run: Rounds, number: int) -> str:
    """The model that the reference is copied from; the policy's weights come from the checkpoint."""
    moves = run.flags.reference == "previous" and not run.model.use_peft
    return run.policy(number - 1) if moves else run.start


def _steps(trainer: Any, training: Any) -> int:
    """Number of optimizer steps of a round: `--max_steps`, or `--num_train_epochs` passes over its rows."""
    if training.max_steps > 0:
        return training.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(math.ceil(batches / training.gradient_accumulation_steps) * training.num_train_epochs)


class _EndOfRound(TrainerCallback):
    """Ends training at a step, with a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= self.step:
            control.should_save = control.should_log = control.should_training_stop = True
        return control


__all__ = ["train_round"]
