"""A disk cache whose directories are named by a hash of the settings that determine their content."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

VERSION = 3  # increment after any change of the weights or the rows, so that older caches are not used


def cached(
    name: str, cache_dir: Any, build: Callable[[Path], None], files: Sequence[str] = (), **determinants: Any
) -> Path:
    """The cache directory for the determinants, created with `build` if it does not exist.

    It is created again, with a warning, if one of `files` is missing or cannot be read.
    """
    root = Path(cache_dir or os.environ.get("HALOS_TRL_CACHE") or "~/.cache/halos_trl").expanduser()
    # other library versions may give different numbers, or write files that this one cannot read
    determinants |= {"version": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    key = hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()[:16]
    target, partial = root / f"{name}-{key}", root / f"{name}-{key}.partial"
    if target.is_dir() and _damage(target, files) is None:
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        damage = _damage(target, files) if target.is_dir() else None
        if damage is not None:
            logger.warning(f"The cache of the toy task is damaged ({damage}). {target} is created again.")
            shutil.rmtree(target)
        if not target.is_dir():
            # a directory gets its final name only when complete, so the result of an interrupted run is not used
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            os.replace(partial, target)
    return target


def _damage(directory: Path, files: Sequence[str]) -> str | None:
    """The problem with a cache directory that must contain these files; None if all can be read."""
    for path in (directory / name for name in files):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    continue
            text = path.read_text(encoding="utf-8")
            holds_something = isinstance(json.loads(text), dict) if path.suffix == ".json" else bool(text)
        except (SafetensorError, OSError, ValueError) as error:
            return f"{path.name} cannot be read: {error}"
        if not holds_something:
            return f"{path.name} holds {text[:20]!r}"
    return None
