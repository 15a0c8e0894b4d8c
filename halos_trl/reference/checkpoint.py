"""A moving reference in checkpoints, and what a resumed run must have in common with the run that wrote them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..reference import REFERENCE_FILE, Reference, ReferenceSync, gathered, load_reference, save_reference

_MOVED = "halos_trl.moved_reference"
"""Stands in the trainer state of a checkpoint that holds a moved reference."""

_SETTINGS = "halos_trl.settings"
"""Under this name the trainer state of a checkpoint holds the settings that have to stay."""


def write_reference(reference: Reference, model: Any, state: TrainerState, folder: str, *, keep: bool) -> None:
    """Write a moved reference into a checkpoint; every process has to call this, `keep` says which of them writes."""
    if not reference.moved:
        if keep:  # another run's, where the folder is written a second time
            (Path(folder) / REFERENCE_FILE).unlink(missing_ok=True)
        return
    tensors = gathered(reference.tensors(model), keep=keep)
    written = uuid.uuid4().hex
    if keep:
        save_reference(tensors, folder, {"written": written})
    # Into the trainer's state, so that a later run knows what has to be there, and that both are of one run.
    state.stateful_callbacks[_MOVED] = {"args": {"written": written}, "attributes": {}}


def restore_reference(reference: Reference, sync: ReferenceSync | None, model: Any, folder: str) -> None:
    """Give the reference back what the checkpoint holds of it. Raises ValueError where it would be another one."""
    state = _state_of(folder)
    stored = os.path.isfile(os.path.join(folder, REFERENCE_FILE)) or _MOVED in state.stateful_callbacks
    if stored and sync is None:
        raise ValueError(
            f"{folder} holds a reference that has moved ({REFERENCE_FILE}), but this run's stands still: "
            "it would silently be another one. Resume with the `humanline` or `sync_ref_model` setting of the run "
            "that wrote it."
        )
    if stored or (sync and sync.syncs_until(state.global_step)):
        load_reference(reference.tensors(model), folder)
        _refuse_another_runs(folder, state)
        reference.moved = True
    elif reference.moved:
        raise ValueError(
            f"The reference of {folder} had not left its start, but this trainer has trained before and its "
            "reference has. Make a new trainer and resume with that one."
        )


def _refuse_another_runs(folder: str, state: TrainerState) -> None:
    with safe_open(os.path.join(folder, REFERENCE_FILE), framework="pt") as file:
        written = (file.metadata() or {}).get("written")
    expected = _args_of(state, _MOVED).get("written")
    if written != expected and None not in (written, expected):
        raise ValueError(
            f"{REFERENCE_FILE} and {TRAINER_STATE_NAME} of {folder} were written by different runs, which shared an "
            "output directory. Resume from a checkpoint that one run wrote alone."
        )


# -- settings ------------------------------------------------------------------------------------------------------


def lasting_settings(args: Any) -> dict[str, Any]:
    """The settings of humanline and of the moving reference that a resumed run has to share. Periods may change."""
    settings = {"humanline": args.humanline, "sync_ref_model": args.sync_ref_model}
    if args.humanline:
        settings |= {"log_epsilon_p": args.log_epsilon_p, "log_epsilon_r": args.log_epsilon_r}
    return settings


def write_settings(settings: dict[str, Any], state: TrainerState) -> None:
    """Note the settings in the trainer state, which goes into each checkpoint."""
    state.stateful_callbacks[_SETTINGS] = {"args": settings, "attributes": {}}


def refuse_other_settings(settings: dict[str, Any], folder: str) -> None:
    """Refuse to resume with settings other than those of the checkpoint. Raises ValueError that names them."""
    before = _args_of(_state_of(folder), _SETTINGS)
    changed = [name for name in before | settings if before.get(name) != settings.get(name)]
    if before and changed:
        said = ", ".join(f"`{n}={before.get(n)!r}` has become {settings.get(n)!r}" for n in changed)
        raise ValueError(
            f"{folder} was written with other settings: {said}. A resumed run would be neither the one nor the other. "
            "Resume with the settings of the checkpoint, or pass the folder as `model` to start a new run from its "
            "weights."
        )


def _state_of(folder: str) -> TrainerState:
    return TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))


def _args_of(state: TrainerState, name: str) -> dict[str, Any]:
    return (state.stateful_callbacks.get(name) or {}).get("args", {})


__all__ = ["lasting_settings", "refuse_other_settings", "restore_reference", "write_reference", "write_settings"]
