"""What the example scripts share: flags, data, the run itself, and the embedded default task."""

from .data import eval_split, load_data
from .flags import TOY_DEFAULTS, HalosScriptArguments, parse
from .training import run, save_and_push

__all__ = ["TOY_DEFAULTS", "HalosScriptArguments", "eval_split", "load_data", "parse", "run", "save_and_push"]
