"""The command `halos-trl`, and code shared by the example scripts: flags, data, the run, and the embedded task."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import eval_split, load_data
    from .flags import TOY_DEFAULTS, HalosScriptArguments, parse
    from .training import run, save_and_push

__all__ = ["TOY_DEFAULTS", "HalosScriptArguments", "eval_split", "load_data", "parse", "run", "save_and_push"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Imported lazily, because the help of the command does not need these modules."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        homes = (import_module(home, __name__) for home in (".flags", ".data", ".training"))
        return next(getattr(home, name) for home in homes if hasattr(home, name))
