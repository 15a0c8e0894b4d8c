"""Names of the files that a run writes to its output directory for `halos-trl report`, and reading its log lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN_SUMMARY, DATA_SUMMARY, TRAIN_LOG = "run_summary.json", "data_summary.json", "train_log.jsonl"

GENERATIONS = "_generations.jsonl"
"""`push_to_hub` does not upload files whose names begin with an underscore."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, up to the first incomplete line; empty if the file does not exist."""
    found: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                break  # the process was killed while writing the line
            if isinstance(value, dict):
                found.append(value)
    return found


__all__ = ["DATA_SUMMARY", "GENERATIONS", "RUN_SUMMARY", "TRAIN_LOG", "read_lines"]
