"""This package's classes under TRL's names, for frameworks that take theirs from `trl`."""

from __future__ import annotations

import sys
from types import ModuleType, TracebackType
from typing import Any

import trl
from accelerate.logging import get_logger

from .configs import BradleyTerryConfig, DPOConfig, KTOConfig
from .trainers import BradleyTerryTrainer, DPOTrainer, KTOTrainer

logger = get_logger(__name__)

# TRL's GRPO and PPO generate their completions; ours of the same names do not, so those stay TRL's.
_TRAINERS: dict[str, type] = {
    "DPOTrainer": DPOTrainer,
    "KTOTrainer": KTOTrainer,
    "RewardTrainer": BradleyTerryTrainer,
}
_CONFIGS: dict[str, type] = {"DPOConfig": DPOConfig, "KTOConfig": KTOConfig, "RewardConfig": BradleyTerryConfig}

# Taken once, so that undoing does not depend on what `trl` holds by then.
_ORIGINALS: dict[str, type] = {name: getattr(trl, name) for name in (*_TRAINERS, *_CONFIGS)}


class TRLPatch:
    """What `patch_trl` replaced, and the way back. Leaving it as a context manager undoes it too."""

    def __init__(self) -> None:
        self._before: list[tuple[ModuleType, str, Any]] = []
        for name, ours in (_TRAINERS | _CONFIGS).items():
            for module in _homes(name):
                if getattr(module, name) is not ours:
                    self._before.append((module, name, getattr(module, name)))
                    setattr(module, name, ours)

    def undo(self) -> None:
        """Give TRL's modules back what they held. A name that somebody else has replaced since is left alone."""
        while self._before:
            module, name, before = self._before.pop()
            if getattr(module, name) is (_TRAINERS | _CONFIGS)[name]:
                setattr(module, name, before)
            else:
                logger.warning(
                    f"`{module.__name__}.{name}` is neither this package's nor TRL's class any more and was left as "
                    "it is: somebody else has replaced it since `patch_trl`. Undo the two in reverse order."
                )

    def __enter__(self) -> TRLPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def patch_trl() -> TRLPatch:
    """Put this package's DPO, KTO and reward-model classes under TRL's names.

    For frameworks that take trainers and configs from `trl` themselves. Call it before the framework is imported, so
    that what it derives from TRL's classes (its own config, its own trainer) derives from these:

        halos_trl.patch_trl()
        import framework

    Replaces `DPOTrainer`, `KTOTrainer`, `RewardTrainer` and their configs in `trl` and `trl.trainer`, and the trainers
    also in the modules that define them. Modules that hold TRL's classes already are not changed, and named in a
    warning. `GRPOTrainer` and its config stay TRL's: the two packages mean different methods by the name.

    Returns a handle whose `undo()` takes everything back; `with patch_trl(): ...` does so at the end of the block.
    Calling it twice changes nothing the second time.
    """
    late = sorted(_holders_of_originals())
    if late:
        logger.warning(
            f"{', '.join(late)} imported TRL's classes before `patch_trl` was called and keeps them. Call "
            "`halos_trl.patch_trl()` before importing what should use this package's."
        )
    return TRLPatch()


def _homes(name: str) -> list[ModuleType]:
    # A config is pickled by the module that defines it, so there TRL's stays in its place.
    modules = ["trl", "trl.trainer", *([_ORIGINALS[name].__module__] if name in _TRAINERS else [])]
    return [sys.modules[module] for module in modules if module in sys.modules]


def _holders_of_originals() -> set[str]:
    """Names of the modules outside of TRL and this package in which a class of TRL's stands that is to be replaced."""
    originals = {id(original) for original in _ORIGINALS.values()}
    return {
        name
        for name, module in list(sys.modules.items())
        if name.split(".")[0] not in ("trl", __name__.split(".")[0])
        and any(id(value) in originals for value in list(getattr(module, "__dict__", {}).values()))
    }
