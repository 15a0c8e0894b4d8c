"""Checkpoints: which are complete, which one a run resumes from, and which settings must not change."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.logging import get_logger
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import TrainOutput

from .processes import check_processes, missing_random_state

logger = get_logger(__name__)

_SETTINGS = "halos_trl.settings"
"""Key of the trainer state for the settings that must not change."""

_LOCK = "_training.lock"  # uploads leave out what begins with an underscore


class Resumable(Protocol):
    """Interface of a trainer that can resume."""

    args: Any
    state: Any
    control: Any
    is_deepspeed_enabled: bool

    def restore(self, folder: str) -> None:
        """Restore what the trainer wrote to a checkpoint in addition to the host's files."""


def train_from(trainer: Resumable, resume_from_checkpoint: Any, train: Callable[[Any], TrainOutput]) -> TrainOutput:
    """The host's `train`, from a complete checkpoint or from the start, with exclusive use of the output directory.

    Raises ValueError for a checkpoint that is not complete, and while another run trains in that directory.
    """
    checkpoint = checkpoint_of(resume_from_checkpoint, trainer.args.output_dir)
    writes = trainer.args.save_strategy != "no" and trainer.args.process_index == 0
    with only_run_in(trainer.args.output_dir) if writes else contextlib.nullcontext():
        if not checkpoint or not os.path.isdir(checkpoint):  # transformers refuses a path that leads nowhere
            if writes and any(Path(trainer.args.output_dir).glob("checkpoint-*")):
                logger.warning(
                    f"{trainer.args.output_dir!r} contains checkpoints of an earlier run, but this run starts from "
                    "the beginning. `resume_from_checkpoint=True` will later use the checkpoint with the highest "
                    "step, whichever run wrote it. Use another `output_dir` to keep them apart."
                )
            return train(checkpoint)
        folder = os.fspath(checkpoint)
        require_complete(folder, deepspeed=trainer.is_deepspeed_enabled)
        check_processes(Path(folder), trainer.args, deepspeed=trainer.is_deepspeed_enabled)
        step = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME)).global_step
        trainer.restore(folder)
        result = train(folder)
    if trainer.state.global_step == step:
        logger.warning(
            f"{folder} belongs to a finished run (step {trainer.state.global_step} of {trainer.state.max_steps}), so "
            "nothing was trained. To continue training, raise `max_steps` or `num_train_epochs`."
        )
    return result


def stops_finished_run(trainer: Resumable) -> bool:
    """Stop a resumed run that had already finished. Returns whether it had."""
    if trainer.state.global_step < trainer.state.max_steps:
        return False
    trainer.control.should_training_stop = True
    return True


@contextlib.contextmanager
def only_run_in(output_dir: str) -> Iterator[None]:
    """Hold the lock of an output directory. Raises ValueError while another run trains there."""
    path = Path(output_dir) / _LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"Another run is training in {output_dir!r} (it has locked {_LOCK}). The runs would mix their "
            "checkpoints, e.g. the weights of one with the optimizer state of the other. Choose a different "
            "`output_dir`."
        ) from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        logger.warning(f"{path} cannot be locked ({error}). Make sure that no other run uses the same `output_dir`.")
    try:
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)
            lock.release()


def begin_checkpoint(folder: str) -> None:
    """Mark an older checkpoint in this folder as incomplete until all of its files have been rewritten."""
    (Path(folder) / TRAINER_STATE_NAME).unlink(missing_ok=True)
    for path in Path(folder).glob("rng_state*.pth"):  # one for each process, and there may have been others
        path.unlink(missing_ok=True)


# -- which checkpoint ----------------------------------------------------------------------------------------------


def checkpoint_of(resume_from_checkpoint: Any, output_dir: str) -> Any:
    """The checkpoint to resume from; for True, the last complete one in the output directory."""
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
            f"`resume_from_checkpoint=True`, but {output_dir!r} has no complete checkpoint. Start without it, or "
            "pass the path of a checkpoint."
        )
    return last


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that has all files needed to resume; None if there is none."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and p.name.split("-")[-1].isdigit()]
    for folder in sorted(found, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        problem = problem_of(folder)
        if problem is None:
            return str(folder)
        logger.warning(f"{folder} is incomplete ({problem}), so the previous checkpoint is used.")
    return None


def require_complete(folder: str, *, deepspeed: bool | None = None) -> None:
    """Refuse a checkpoint from which a run cannot resume exactly. Raises a ValueError that names the file."""
    problem = problem_of(Path(folder), deepspeed=deepspeed)
    if problem is not None:
        raise ValueError(
            f"Cannot resume from {folder}: {problem}. Part of the state would silently be reset. Resume from another "
            "checkpoint, one that was not written with `save_only_model`, or pass the folder as `model` to start a "
            "new run from its weights."
        )


def problem_of(folder: Path, *, deepspeed: bool | None = None) -> str | None:
    """The problem of a checkpoint: its first missing or damaged file; None if it is complete.

    `deepspeed` tells whether DeepSpeed will read it; None if unknown. Engines have their own files: DeepSpeed's are in
    `global_step<n>`, FSDP's sharded files in folders. Only their existence is checked.
    """
    problem = (
        _state_problem(folder / TRAINER_STATE_NAME) or _missing_file(folder, deepspeed) or missing_random_state(folder)
    )
    if problem:
        return problem
    for path in sorted(folder.iterdir()):
        problem = _file_problem(path)
        if problem:
            return f"{path.name} {problem}"
    return None


def _state_problem(path: Path) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        state = json.loads(path.read_text("utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
            return f"{path.name} does not contain a trainer state but {str(state)[:40]}"
        TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError) as error:
        return f"{path.name} cannot be read: {error}"
    return None


def _missing_file(folder: Path, deepspeed: bool | None) -> str | None:
    names = [path.name for path in folder.iterdir()]
    of_deepspeed = any(name.startswith("global_step") for name in names)
    if deepspeed or (deepspeed is None and of_deepspeed):
        return None if of_deepspeed else "DeepSpeed's folder `global_step<n>` is missing"
    # One file; FSDP's folder `optimizer_0`; or a file for each process.
    if not any("optimizer" in name and not name.endswith(".partial") for name in names):
        return "it was written under DeepSpeed" if of_deepspeed else "optimizer.pt is missing"
    return None if "scheduler.pt" in names else "scheduler.pt is missing"


def _file_problem(path: Path) -> str | None:
    """The problem of a file of a checkpoint, found without reading its tensors; None if there is none."""
    needed = {"optimizer.pt": {"state", "param_groups"}, "scheduler.pt": set(), "scaler.pt": set()}.get(path.name)
    if path.name.startswith("rng_state") and path.suffix == ".pth":
        needed = {"python", "numpy", "cpu"}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return None
        if needed is None:
            return None
        if not zipfile.is_zipfile(path):
            return "is empty" if path.stat().st_size == 0 else "is truncated, or was not written by `torch.save`"
        with safe_globals():
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, OSError) as error:
        return f"cannot be read ({error}); it is probably truncated"
    except Exception as error:  # readers raise all kinds of errors for damaged files
        return f"cannot be read: {str(error).splitlines()[0]}"
    if not isinstance(content, dict) or not needed <= content.keys():
        return f"contains a `{type(content).__name__}`, which does not match its name"
    return None


# -- settings that have to stay ------------------------------------------------------------------------------------


def lasting_settings(args: Any) -> dict[str, Any]:
    """The settings of humanline, the moving reference and HALOs' batches that must not change in a resumed run.

    Sync periods may change.
    """
    settings = {name: getattr(args, name, False) for name in ("humanline", "sync_ref_model")}
    if settings["humanline"]:
        settings |= {"log_epsilon_p": args.log_epsilon_p, "log_epsilon_r": args.log_epsilon_r}
    if getattr(args, "batch_order", "trl") == "halos":
        settings |= {"batch_order": "halos", "max_prompt_length": args.max_prompt_length}
    return settings


def write_settings(settings: dict[str, Any], state: TrainerState, tokens: int = 0) -> None:
    """Record the settings and the number of trained tokens in the trainer state, which is part of each checkpoint."""
    state.stateful_callbacks[_SETTINGS] = {"args": settings, "attributes": {"num_tokens": tokens}}


def tokens_in(folder: str) -> int:
    """The number of tokens that a checkpoint's run had been trained on; 0 where it does not say."""
    return _noted_in(folder).get("attributes", {}).get("num_tokens", 0)


def refuse_other_settings(settings: dict[str, Any], folder: str) -> None:
    """Refuse to resume with settings that differ from the checkpoint's. Raises a ValueError that names them."""
    before = _noted_in(folder).get("args", {})
    changed = [name for name in before | settings if before.get(name) != settings.get(name)]
    if before and changed:
        old, new = ({"batch_order": "trl"} | noted for noted in (before, settings))
        said = ", ".join(f"`{n}={old.get(n)!r}` has become {new.get(n)!r}" for n in changed)
        raise ValueError(
            f"{folder} was written with different settings: {said}. Resume with the settings of the checkpoint, or "
            "pass the folder as `model` to start a new run from its weights."
        )


def _noted_in(folder: str) -> dict[str, Any]:
    state = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
    return state.stateful_callbacks.get(_SETTINGS) or {}


__all__ = [
    "begin_checkpoint",
    "checkpoint_of",
    "last_complete_checkpoint",
    "lasting_settings",
    "only_run_in",
    "problem_of",
    "refuse_other_settings",
    "require_complete",
    "stops_finished_run",
    "tokens_in",
    "train_from",
    "write_settings",
]
