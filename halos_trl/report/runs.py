"""Reading the files in a run's output directory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..run_folder import DATA_SUMMARY, GENERATIONS, RUN_SUMMARY, TRAIN_LOG, read_lines

Row = dict[str, Any]

TRAINER_STATE = "trainer_state.json"


class Series(NamedTuple):
    """The values of a metric at a run's optimizer steps. Values may be NaN or infinite."""

    steps: list[int]
    values: list[float]

    @property
    def finite(self) -> Series:
        pairs = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]
        return Series([s for s, _ in pairs], [v for _, v in pairs])


@dataclass(frozen=True)
class Run:
    """A run: its log lines in order, and the contents of its other files, which are empty if a file is missing."""

    name: str
    history: list[Row]
    summary: Row = field(default_factory=dict)
    data: Row = field(default_factory=dict)
    generations: list[Row] = field(default_factory=list)
    """Rows with `step`, `prompt`, `completion`, `score`, `tokens`, in the order of the file."""
    notes: list[str] = field(default_factory=list)
    """Remarks about the files, shown in the report."""

    def series(self, metric: str) -> Series:
        """A metric's values, one for each step that logs it; if a step logs it twice, the last one."""
        found = {row["step"]: row[metric] for row in self.history if metric in row and "step" in row}
        kept = {step: float(value) for step, value in found.items() if isinstance(value, int | float)}
        return Series(list(kept), list(kept.values()))

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.history for name in row))

    @property
    def settings(self) -> Row:
        return self.summary.get("settings", {})

    @property
    def method(self) -> str:
        return str(self.summary.get("trainer", "")).removesuffix("Trainer")


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in several folders, with distinct names. Raises ValueError for a folder without a run."""
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"{paths[i]} is passed twice. Pass each run once.")
    return [read_run(path, name) for path, name in zip(paths, _short_names(resolved), strict=True)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest trailing parts of the paths that are distinct."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """The run in a folder, which is the `output_dir` of a trainer or one of its checkpoints.

    Raises ValueError if the folder does not exist, contains no run, or nothing was logged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{folder} is {'not a folder' if path.exists() else 'missing'}. Pass a run's `output_dir`.")
    summary, notes = _read_json(path / RUN_SUMMARY), []
    history, note = _history(path)
    if history is None:
        raise ValueError(_why_no_run(path, summary))
    if not any("loss" in row or "eval_loss" in row for row in history):
        raise ValueError(
            f"{folder} has a log without a training or evaluation loss: the run has logged nothing yet, or "
            "`logging_steps` is larger than the run. Try again later, or train with a smaller `logging_steps`."
        )
    notes += [note] if note else []
    notes += _status_notes(summary)
    lines = read_lines(path / GENERATIONS)
    return Run(name or path.resolve().name, history, summary, _read_json(path / DATA_SUMMARY), lines, notes)


def _history(path: Path) -> tuple[list[Row] | None, str | None]:
    """The log lines, and a remark on their source; None if no file contains log lines."""
    own, state = read_lines(path / TRAIN_LOG), _state_history(path)
    if own and _last_step(own) >= _last_step(state or []):
        # Evaluations after training are in only one of the two files.
        missing = [row for row in state or [] if _last_step(own) <= row.get("step", 0) and not _is_in(row, own)]
        return own + missing, None
    if state is not None:
        return state, None
    if (path / TRAIN_LOG).is_file():
        return own, None
    checkpoints = sorted(path.glob(f"checkpoint-*/{TRAINER_STATE}"), key=lambda p: _step_of(p.parent.name))
    if not checkpoints:
        return None, None
    folder = checkpoints[-1].parent
    return _state_history(folder), f"Only checkpoints were found; the log is that of {folder.name}."


def _is_in(row: Row, rows: list[Row]) -> bool:
    return any(row.items() <= other.items() for other in rows)


def _state_history(path: Path) -> list[Row] | None:
    file = path / TRAINER_STATE
    history = _read_json(file).get("log_history") if file.is_file() else None
    return [row for row in history if isinstance(row, dict)] if isinstance(history, list) else None


def _last_step(rows: Sequence[Row]) -> int:
    return max((row.get("step", 0) for row in rows), default=-1)


def _step_of(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _why_no_run(path: Path, summary: Row) -> str:
    if summary:
        return f"{path} is a run that has logged nothing yet. Try again later."
    rounds = sorted(folder.name for folder in path.glob("round-*") if folder.is_dir())
    if rounds:
        return f"{path} contains online rounds. Pass the run of one of them, e.g. {path / rounds[0] / 'policy'}."
    below = sorted({file.parent for name in (TRAIN_LOG, TRAINER_STATE) for file in path.glob(f"*/{name}")})
    hint = f" Did you mean {below[0]}?" if below else " Pass the `output_dir` of a training run."
    return f"{path} contains no run: it has no {TRAIN_LOG}, {TRAINER_STATE} or checkpoint.{hint}"


def _status_notes(summary: Row) -> list[str]:
    status = summary.get("status")
    if status == "failed":
        return [f"The run ended with an error: {summary.get('error')}"]
    if status == "running":
        return ["The run is still in progress, or it was interrupted."]
    return []


def _read_json(path: Path) -> Row:
    """Read a JSON object from a file. Raises ValueError, naming the file, if it contains anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. It may be truncated. Copy it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} contains a value of type {type(value).__name__}, not a JSON object.")
    return value


__all__ = ["Run", "Series", "read_run", "read_runs"]
