"""Saving a moving reference in checkpoints and restoring it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..sharded import assign_whole, shape_of, whole
from .sources import Reference
from .sync import ReferenceSync

logger = get_logger(__name__)

REFERENCE_FILE = "reference.safetensors"
"""File name of a moving reference in checkpoints."""

_MOVED = "halos_trl.moved_reference"
"""Key in the trainer state of checkpoints that contain a moved reference."""


def write_reference(reference: Reference, model: Any, state: TrainerState, folder: str, *, keep: bool) -> None:
    """Write a moved reference into a checkpoint. Every process must call this; those with `keep` write the file."""
    if not reference.moved:
        if keep:  # remove the file of another run in the same folder
            (Path(folder) / REFERENCE_FILE).unlink(missing_ok=True)
        return
    tensors = gathered(reference.tensors(model), keep=keep)
    written = uuid.uuid4().hex
    if keep:
        save_reference(tensors, folder, {"written": written})
    # Recorded in the trainer state, so that a resuming run can check that the file exists and is of the same run.
    state.stateful_callbacks[_MOVED] = {"args": {"written": written}, "attributes": {}}


def restore_reference(reference: Reference, sync: ReferenceSync | None, model: Any, folder: str) -> None:
    """Restore the reference from a checkpoint. Raises ValueError if the result would be a different reference."""
    state = _state_of(folder)
    stored = os.path.isfile(os.path.join(folder, REFERENCE_FILE)) or _MOVED in state.stateful_callbacks
    if stored and sync is None:
        raise ValueError(
            f"{folder} contains a reference that has moved ({REFERENCE_FILE}), but this run has a fixed reference, so "
            "the reference would silently change. Resume with the `humanline` or `sync_ref_model` setting of the run "
            "that wrote the checkpoint."
        )
    if stored or (sync and sync.syncs_until(state.global_step)):
        load_reference(reference.tensors(model), folder)
        _refuse_another_runs(folder, state)
        reference.moved = True
    elif reference.moved:
        raise ValueError(
            f"The reference of {folder} has not moved yet, but this trainer has already trained and moved its "
            "reference. Create a new trainer to resume."
        )


def restore_best_reference(reference: Reference, model: Any, folder: str) -> None:
    """Restore a moved reference from the best checkpoint of its own run.

    A checkpoint from before the first move contains no reference; it is then left unchanged, with a warning.
    """
    if os.path.isfile(os.path.join(folder, REFERENCE_FILE)):
        load_reference(reference.tensors(model), folder)
    else:
        logger.warning(
            f"{folder}, the best checkpoint, was written before the reference moved, so it contains no reference. The "
            "policy was restored from it; the reference remains that of the last step."
        )


def _refuse_another_runs(folder: str, state: TrainerState) -> None:
    with safe_open(os.path.join(folder, REFERENCE_FILE), framework="pt") as file:
        written = (file.metadata() or {}).get("written")
    expected = _args_of(state, _MOVED).get("written")
    if written != expected and None not in (written, expected):
        raise ValueError(
            f"{REFERENCE_FILE} and {TRAINER_STATE_NAME} of {folder} were written by different runs with the same "
            "output directory. Resume from a checkpoint written by a single run."
        )


# -- the file ------------------------------------------------------------------------------------------------------


def gathered(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Full tensors on the CPU, empty without `keep`. Every process must call this, since each may hold a shard."""
    kept = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            kept[name] = value.cpu()
    return kept


def save_reference(
    tensors: dict[str, torch.Tensor], checkpoint_dir: str, metadata: dict[str, str] | None = None
) -> None:
    """Write a moved reference into a checkpoint folder atomically."""
    folder = Path(checkpoint_dir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{REFERENCE_FILE}.partial"
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata)
    partial.replace(folder / REFERENCE_FILE)


def load_reference(tensors: dict[str, torch.Tensor], checkpoint_dir: str) -> None:
    """Restore a moved reference in place. Raises ValueError if the file is missing, damaged or of another model."""
    path = Path(checkpoint_dir) / REFERENCE_FILE
    consequence = "Without it, training would silently continue with a different reference."
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, but this run moves its reference (`humanline` or `sync_ref_model`). {consequence} "
            "Resume from another checkpoint, or with the settings of the run that wrote it."
        )
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is probably truncated. {consequence} Resume from an "
            "earlier checkpoint."
        ) from error
    differing = sorted(set(stored) ^ set(tensors)) or sorted(
        name
        for name, tensor in tensors.items()
        if (stored[name].shape, stored[name].dtype) != (shape_of(tensor), tensor.dtype)
    )
    if differing:
        raise ValueError(
            f"{path} contains the reference of a different model: {differing[0]!r} and {len(differing) - 1} more "
            "tensors do not match. Resume with the model, adapter configuration and `reference_storage` of the run "
            "that wrote the checkpoint."
        )
    for name, tensor in tensors.items():
        assign_whole(tensor, stored[name])


def _state_of(folder: str) -> TrainerState:
    return TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))


def _args_of(state: TrainerState, name: str) -> dict[str, Any]:
    return (state.stateful_callbacks.get(name) or {}).get("args", {})


__all__ = [
    "REFERENCE_FILE",
    "gathered",
    "load_reference",
    "restore_best_reference",
    "restore_reference",
    "save_reference",
    "write_reference",
]
