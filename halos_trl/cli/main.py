"""The command `halos-trl`: dispatches to its subcommands and reports their errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "train": "align a model (kto, dpo, cdpo, ipo, simpo, slic, grpo, ppo), or train a reward model",
    "sample": "sample completions of a model for the prompts of a dataset",
    "label": "score samples, and write labels, pairs or scores",
    "rounds": "sample, label and train repeatedly",
    "convert": "convert between HALOs' feedback files, rows for trainers and Parquet",
    "merge": "merge an adapter into its base model",
    "plan": "estimate the memory of a training run on each device",
    "examples": "copy the example scripts and configs to a folder",
    "report": "write an HTML report on a run, or a comparison of several",
}
"""Each is implemented by `main(argv)` in the module of the same name in this folder."""

HELP = """\
usage: halos-trl COMMAND [--config FILE.yaml] [--flag value ...]

Sample from a model, label the samples, train on the feedback.

{commands}

`halos-trl COMMAND --help` lists the flags of a command; `--config FILE.yaml` sets them by name. Without a model and a
dataset, `train`, `sample` and `rounds` run on the embedded task, which needs no network."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 for an error that the user can fix, which is reported in
    one line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    command, *rest = words
    if command == "--version":
        print(f"halos_trl {version('halos_trl')}")
        return 0
    if command not in COMMANDS:
        from ..spelling import did_you_mean

        print(f"halos-trl: `{command}` is not a command.{did_you_mean(command, COMMANDS)}\n", file=sys.stderr)
        print(help_text(), file=sys.stderr)
        return 2
    try:
        import_module(f".{command}", __package__).main(rest)
    except (ValueError, OSError) as error:  # OSError: no such model, no network, a full disk, ...
        if getattr(error, "keep_traceback", False):
            raise
        print(f"halos-trl {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def help_text() -> str:
    """The help text of the command."""
    return HELP.format(commands="\n".join(f"  {name:8} {purpose}" for name, purpose in COMMANDS.items()))


if __name__ == "__main__":
    sys.exit(main())
