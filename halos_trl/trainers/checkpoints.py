"""What a resumed run needs from its checkpoint, and which checkpoint that is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..reference import REFERENCE_FILE, Reference, ReferenceSync, gathered, load_reference, save_reference

logger = get_logger(__name__)

_MOVED = "halos_trl.moved_reference"
"""Stands in the trainer state of a checkpoint that holds a moved reference."""


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint with a trainer state, which is written last; None where there is none."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and p.name.split("-")[-1].isdigit()]
    for folder in sorted(found, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            TrainerState.load_from_json(folder / TRAINER_STATE_NAME)
        except (OSError, ValueError) as error:
            logger.warning(
                f"{folder} is incomplete ({TRAINER_STATE_NAME}: {error}), so the checkpoint before it is used."
            )
        else:
            return str(folder)
    return None


def checkpoint_of(resume_from_checkpoint: Any, output_dir: str) -> Any:
    """What to resume from, where True stands for the last complete checkpoint of the output directory."""
    if resume_from_checkpoint is not True:
        if not isinstance(resume_from_checkpoint, str | os.PathLike | bool | None):
            raise TypeError(
                f"`resume_from_checkpoint={resume_from_checkpoint!r}` is of type "
                f"{type(resume_from_checkpoint).__name__}. Pass the path of a checkpoint, or True for the last one."
            )
        return resume_from_checkpoint
    last = last_complete_checkpoint(output_dir)
    if last is None:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but {output_dir!r} holds no complete checkpoint. Start "
            "without it, or pass the path of a checkpoint."
        )
    return last


# -- the reference -------------------------------------------------------------------------------------------------


def write_reference(reference: Reference, model: Any, state: TrainerState, folder: str, *, keep: bool) -> None:
    """Write a moved reference into a checkpoint; every process has to call this, `keep` says which of them writes."""
    if not reference.moved:
        return
    tensors = gathered(reference.tensors(model), keep=keep)
    if keep:
        save_reference(tensors, folder)
    # Into the trainer's state, so that a later run knows what has to be there.
    state.stateful_callbacks[_MOVED] = {"args": {}, "attributes": {}}


def restore_reference(reference: Reference, sync: ReferenceSync | None, model: Any, folder: str) -> None:
    """Give the reference back what the checkpoint holds of it. Raises ValueError where it would be another one."""
    state_file = os.path.join(folder, TRAINER_STATE_NAME)
    if not os.path.isfile(state_file):
        return  # transformers has its own message for what is no checkpoint
    state = TrainerState.load_from_json(state_file)
    stored = os.path.isfile(os.path.join(folder, REFERENCE_FILE)) or _MOVED in state.stateful_callbacks
    if stored and sync is None:
        raise ValueError(
            f"{folder} holds a reference that has moved ({REFERENCE_FILE}), but this run's stands still: "
            "it would silently be another one. Resume with the `humanline` or `sync_ref_model` setting of the run "
            "that wrote it."
        )
    if stored or (sync and sync.syncs_until(state.global_step)):
        load_reference(reference.tensors(model), folder)
        reference.moved = True
    elif reference.moved:
        raise ValueError(
            f"The reference of {folder} had not left its start, but this trainer has trained before and its "
            "reference has. Make a new trainer and resume with that one."
        )


__all__ = ["checkpoint_of", "last_complete_checkpoint", "restore_reference", "write_reference"]
