"""A run that goes on with another number of processes, or with steps of another size, than its checkpoint."""

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
"""Under this name the trainer state of a checkpoint holds the number of examples of an optimizer step."""


def write_step_size(args: Any, state: TrainerState) -> None:
    """Note the size of a step in the trainer state, which goes into each checkpoint."""
    state.stateful_callbacks[_STEP] = {"args": {"examples": examples_per_step(args)}, "attributes": {}}


def examples_per_step(args: Any) -> int:
    """Examples of an optimizer step, over all micro-batches and processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def check_processes(folder: Path, args: Any, *, deepspeed: bool) -> None:
    """Refuse a checkpoint that this number of processes cannot go on from, and say what another number changes.

    Raises ValueError under DeepSpeed, whose optimizer state lies in one file for each process.
    """
    before, now = _processes_of(folder), args.world_size
    if before != now and deepspeed:
        raise ValueError(
            f"{folder} was written by {before} processes under DeepSpeed, and this run has {now}. The optimizer state "
            "of ZeRO lies in one part for each process and cannot be divided anew. Resume with "
            f"`--num_processes {before}`, or pass the folder as `model` to start a new run from its weights."
        )
    if before != now:
        logger.warning(
            f"{folder} was written by {before} processes, and this run has {now}. It goes on with the weights, the "
            "optimizer, the reference and the place in the data; only random numbers, e.g. of dropout, are others."
        )
    step, size = _step_size_of(folder), examples_per_step(args)
    if step not in (None, size):
        logger.warning(
            f"An optimizer step of {folder} held {step} examples, and one of this run holds {size}. The place in the "
            "data is counted in steps, so that some rows of this epoch are repeated or left out. To go on exactly, "
            "keep the product of `per_device_train_batch_size`, `gradient_accumulation_steps` and processes."
        )


def missing_random_state(folder: Path) -> str | None:
    """What is wrong with the files of random numbers, one for each process; None where nothing is."""
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
