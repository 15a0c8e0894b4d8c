"""Files that a run writes to its output directory besides the model: settings, statistics of the data, log lines.

`halos-trl report` reads them. They contain numbers and settings, but no texts of the data and no access tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from .. import model_card
from ..run_folder import DATA_SUMMARY, RUN_SUMMARY, TRAIN_LOG, read_lines
from ..sharded import shape_of
from .data_summary import data_summary

if TYPE_CHECKING:
    from .run import TrainingRun

logger = get_logger(__name__)

_LEFT_OUT = (
    *("output_dir", "run_name", "logging_dir", "hub_token", "push_to_hub_token", "local_rank"),
    *("debug", "disable_tqdm", "dataloader_pin_memory"),
)
"""Settings that only concern where a run is stored and how it is displayed."""


class RunFiles(TrainerCallback):
    """Writes `run_summary.json`, `data_summary.json` and `train_log.jsonl`, in the main process.

    A line of the log file is a line of `trainer.state.log_history` with `seconds`, the training time so far without
    evaluations and checkpoints, and `memory_bytes`, the peak memory so far of the GPU or, without one, of the process.
    """

    def __init__(self, trainer: TrainingRun):
        self.trainer = trainer
        self._clock: _Clock | None = None
        """Set when training begins."""

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = _kept_lines(self.folder / TRAIN_LOG, state)
            self._clock = _Clock(max((line.get("seconds", 0.0) for line in kept), default=0.0))
            _write(self.folder / TRAIN_LOG, "".join(map(_as_line, kept)))
            _write_json(self.folder / RUN_SUMMARY, run_summary(self.trainer))
            _write_json(self.folder / DATA_SUMMARY, data_summary(self.trainer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._clock is not None:
            self._clock.tick()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._clock is not None:
            self._clock.skip()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._clock is not None:
            self._clock.skip()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._clock is not None and state.is_world_process_zero and state.log_history:
            stamps = {"seconds": round(self._clock.seconds, 3), "memory_bytes": _peak_memory()}
            _write(self.folder / TRAIN_LOG, _as_line({**state.log_history[-1], **stamps}), "a")


@contextlib.contextmanager
def recorded(trainer: TrainingRun) -> Iterator[None]:
    """Record in `run_summary.json` whether the training inside finished, or the error with which it failed."""
    try:
        yield
    except BaseException as error:
        _record_end(trainer, {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    _record_end(trainer, {"status": "finished"})


def _record_end(trainer: TrainingRun, end: dict[str, Any]) -> None:
    path = Path(trainer.args.output_dir) / RUN_SUMMARY
    if trainer.is_world_process_zero() and path.is_file():
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text("utf-8"))
            if found.get("process") == os.getpid():  # written by this run
                _write_json(path, {**found, **end, "ended": _now()})


def run_summary(trainer: TrainingRun) -> dict[str, Any]:
    """Method, model, settings, sizes and versions of a run."""
    args = trainer.args
    settings = {name: value for name, value in args.to_dict().items() if name not in _LEFT_OUT}
    model = trainer.accelerator.unwrap_model(trainer.model)
    sizes = [(shape_of(p).numel(), p.requires_grad) for p in model.parameters()]
    return {
        "status": "running",
        "started": _now(),
        "process": os.getpid(),
        "trainer": type(trainer).__name__,
        "base_model": model_card.base_model(trainer.model)[1],
        "steps": trainer.state.max_steps,
        "processes": args.world_size,
        "device": _device_name(trainer.accelerator.device),
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "adapter": model_card.adapter_settings(trainer.model),
        "settings": settings,
        "changed": sorted(_changed(args) & settings.keys()),
        "versions": model_card.versions(),
    }


def _changed(args: Any) -> set[str]:
    """Names of the settings that differ from their defaults."""
    found = set()
    for field in dataclasses.fields(args):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(args, field.name)
        filled_in = default is None and field.name in _FILLED_IN
        if field.init and not filled_in and getattr(value, "value", value) != getattr(default, "value", default):
            found.add(field.name)
    return found


_FILLED_IN = ("bf16", "accelerator_config", "eval_steps", "data_seed", "model_init_kwargs", "fsdp_config")
"""Settings whose default is None and which transformers fills in."""


def _kept_lines(path: Path, state: Any) -> list[dict[str, Any]]:
    """Log lines from before this run: those up to the checkpoint if it was resumed, otherwise none."""
    if not state.global_step:
        return []
    lines = [line for line in read_lines(path) if line.get("step", 0) <= state.global_step]
    return lines if len(lines) >= len(state.log_history) else list(state.log_history)


class _Clock:
    """Seconds of training, without the parts that were skipped."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self._since = seconds, time.monotonic()

    def tick(self) -> None:
        moment = time.monotonic()
        self.seconds += moment - self._since
        self._since = moment

    def skip(self) -> None:
        self._since = time.monotonic()


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _as_line(value: dict[str, Any]) -> str:
    return json.dumps(value, default=str) + "\n"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, json.dumps(value, indent=1, default=str) + "\n")


def _write(path: Path, text: str, mode: str = "w") -> None:
    """Write a file that training does not depend on; failing to write it only gives a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        logger.warning_once(f"{path} cannot be written ({error.strerror}), so the run's report will be incomplete.")


__all__ = ["RunFiles", "recorded", "run_summary"]
