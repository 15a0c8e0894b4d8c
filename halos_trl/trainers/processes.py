"""Checks of a resumed run whose number of processes or step size differs from that of its checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

logger = get_logger(__name__)

_STEP = "halos_trl.step"
"""Key of the trainer state of a checkpoint for the number of examples per optimizer step."""


def write_step_size(args: Any, state: TrainerState) -> None:
    """Store the step size in the trainer state, which is part of each checkpoint."""
    state.stateful_callbacks[_STEP] = {"args": {"examples": examples_per_step(args)}, "attributes": {}}


def examples_per_step(args: Any) -> int:
    """Examples per optimizer step, over all micro-batches and processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def check_processes(folder: Path, args: Any, *, deepspeed: bool) -> None:
    """Warn if the number of processes or the step size differs from that of the checkpoint.

    Raises ValueError for a different number of processes under DeepSpeed, which stores one part of the optimizer state
    per process.
    """
    before, now = _processes_of(folder), args.world_size
    if before != now and deepspeed:
        raise ValueError(
            f"{folder} was written by {before} processes under DeepSpeed, and this run has {now}. The optimizer state "
            "of ZeRO is stored in one part per process and cannot be redistributed. Resume with "
            f"`--num_processes {before}`, or pass the folder as `model` to start a new run from its weights."
        )
    if before != now:
        logger.warning(
            f"{folder} was written by {before} processes, and this run has {now}. Weights, optimizer, "
            "reference and position in the data are restored; only random numbers, such as those of dropout, differ."
        )
    step, size = _step_size_of(folder), examples_per_step(args)
    if step not in (None, size):
        logger.warning(
            f"An optimizer step of {folder} had {step} examples, and one of this run has {size}. The position in the "
            "data is counted in steps, so some rows of this epoch are repeated or skipped. To resume exactly, keep "
            "the product of `per_device_train_batch_size`, `gradient_accumulation_steps` and processes."
        )


def missing_random_state(folder: Path) -> str | None:
    """The first missing file of a random state, of which there is one per process; None if all exist."""
    names = {path.name for path in folder.glob("rng_state*.pth")}
    if "rng_state.pth" in names:
        return None
    missing = next((i for i in range(len(names)) if f"rng_state_{i}.pth" not in names), None)
    if missing is not None:
        return f"rng_state_{missing}.pth is missing"
    return None if names else "rng_state.pth is missing"


def _processes_of(folder: Path) -> int:
    return sum(bool(re.fullmatch(r"rng_state(_\d+)?\.pth", path.name)) for path in folder.iterdir())


def _step_size_of(folder: Path) -> int | None:
    callbacks = json.loads((folder / TRAINER_STATE_NAME).read_text("utf-8")).get("stateful_callbacks") or {}
    return ((callbacks.get(_STEP) or {}).get("args") or {}).get("examples")


__all__ = ["check_processes", "examples_per_step", "missing_random_state", "write_step_size"]
