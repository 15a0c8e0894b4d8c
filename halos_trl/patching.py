"""This package's classes under TRL's names, for frameworks that import their trainers from `trl`."""

from __future__ import annotations

import sys
from types import ModuleType, TracebackType
from typing import Any

import trl
from accelerate.logging import get_logger

from .configs import BradleyTerryConfig, DPOConfig, KTOConfig
from .trainers import BradleyTerryTrainer, DPOTrainer, KTOTrainer

logger = get_logger(__name__)

# TRL's GRPO and PPO generate their completions, unlike the trainers of the same names here, so they are not replaced.
_TRAINERS: dict[str, type] = {
    "DPOTrainer": DPOTrainer,
    "KTOTrainer": KTOTrainer,
    "RewardTrainer": BradleyTerryTrainer,
}
_CONFIGS: dict[str, type] = {"DPOConfig": DPOConfig, "KTOConfig": KTOConfig, "RewardConfig": BradleyTerryConfig}

# Read once, so that undoing does not depend on the later state of `trl`.
_ORIGINALS: dict[str, type] = {name: getattr(trl, name) for name in (*_TRAINERS, *_CONFIGS)}


class TRLPatch:
    """Handle that undoes `patch_trl`, also usable as a context manager."""

    def __init__(self) -> None:
        self._before: list[tuple[ModuleType, str, Any]] = []
        for name, ours in (_TRAINERS | _CONFIGS).items():
            for module in _homes(name):
                if getattr(module, name) is not ours:
                    self._before.append((module, name, getattr(module, name)))
                    setattr(module, name, ours)

    def undo(self) -> None:
        """Restore TRL's classes. Names that were replaced by other code in the meantime are left unchanged."""
        while self._before:
            module, name, before = self._before.pop()
            if getattr(module, name) is (_TRAINERS | _CONFIGS)[name]:
                setattr(module, name, before)
            else:
                logger.warning(
                    f"`{module.__name__}.{name}` was replaced by other code after `patch_trl` and is left unchanged. "
                    "Undo the two replacements in reverse order."
                )

    def __enter__(self) -> TRLPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def patch_trl() -> TRLPatch:
    """Put this package's DPO, KTO and reward-model classes under TRL's names.

    For frameworks that import trainers and configs from `trl`. Call it before importing the framework, so that the
    framework's subclasses of TRL's classes derive from these:

        halos_trl.patch_trl()
        import framework

    Replaces `DPOTrainer`, `KTOTrainer`, `RewardTrainer` and their configs in `trl` and `trl.trainer`, and the trainers
    also in the modules that define them. Modules that have already imported TRL's classes are not changed, and are
    named in a warning. `GRPOTrainer` and its config are not replaced, because the two packages use this name for
    different methods.

    Returns a handle whose `undo()` restores everything; `with patch_trl(): ...` does so at the end of the block. A
    second call has no effect.
    """
    late = sorted(_holders_of_originals())
    if late:
        logger.warning(
            f"{', '.join(late)} imported TRL's classes before `patch_trl` was called and keeps them. Call "
            "`halos_trl.patch_trl()` before importing the modules that should use this package's classes."
        )
    return TRLPatch()


def _homes(name: str) -> list[ModuleType]:
    # A config is pickled by reference to the module that defines it, so TRL's own class stays there.
    modules = ["trl", "trl.trainer", *([_ORIGINALS[name].__module__] if name in _TRAINERS else [])]
    return [sys.modules[module] for module in modules if module in sys.modules]


def _holders_of_originals() -> set[str]:
    """Names of modules outside TRL and this package that contain one of TRL's classes to be replaced."""
    originals = {id(original) for original in _ORIGINALS.values()}
    return {
        name
        for name, module in list(sys.modules.items())
        if name.split(".")[0] not in ("trl", __name__.split(".")[0])
        and any(id(value) in originals for value in list(getattr(module, "__dict__", {}).values()))
    }
