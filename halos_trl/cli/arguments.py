"""Flags of a subcommand: a dataclass filled from the command line and `--config FILE.yaml`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..spelling import did_you_mean

T = TypeVar("T")


def read_arguments(arguments: type[T], argv: Sequence[str] | None, command: str) -> T:
    """The dataclass `arguments` from flags and `--config FILE.yaml`; prints the settings to standard error.

    The docstring of the dataclass is the description in `--help`. Raises ValueError for unknown names (with a
    suggestion), config files that cannot be read, and values in them with a wrong type or choice.
    """
    parser: Any = TrlParser(
        (arguments,),  # type: ignore[arg-type]
        prog=f"halos-trl {command}",
        usage="%(prog)s [--config FILE.yaml] [--flag [value ...]] ...",
        description=(arguments.__doc__ or "").split("\n\n")[0],
        formatter_class=_HelpFormatter,
    )
    words, config = split_off_config(list(sys.argv[1:] if argv is None else argv))
    refuse_unknown(parser, words, config)
    (result,) = parser.parse_args_and_config(args=words)
    check_values(result)
    show(dataclasses.asdict(result), command)
    return result


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Omits the defaults None and empty list, whose meaning is explained in the help of the flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def check_values(arguments: Any) -> None:
    """Check values from a config file, which argparse does not; a single text is converted to a list if a list is
    expected.

    Raises ValueError for a value with a wrong type or choice.
    """
    hints = get_type_hints(type(arguments))
    for field in dataclasses.fields(arguments):
        value, hint = getattr(arguments, field.name), hints[field.name]
        choices = field.metadata.get("choices") or (get_args(hint) if get_origin(hint) is Literal else None)
        if choices and value not in choices:
            raise ValueError(f"`{field.name}` is {value!r}; expected one of {', '.join(map(repr, choices))}.")
        kind = next((kind for kind in (int, float) if hint in (kind, kind | None)), None)
        accepted = int if kind is int else (int, float)
        if kind and value is not None and (isinstance(value, bool) or not isinstance(value, accepted)):
            raise ValueError(f"`{field.name}` is {value!r}; expected {'an integer' if kind is int else 'a number'}.")
        if get_origin(hint) is list and not isinstance(value, list):
            setattr(arguments, field.name, [value])


def show(settings: dict[str, Any], command: str) -> None:
    """Print settings as YAML, which `--config` reads, to standard error."""
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    print(f"# halos-trl {command}\n{text}", file=sys.stderr, end="", flush=True)


def split_off_config(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The command line with `--config FILE` in the form that `TrlParser` reads, and the settings in that file."""
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="--config FILE.yaml")
    config_parser.add_argument("--config")
    known, flags = config_parser.parse_known_args(argv)
    if known.config is None:
        return flags, {}
    try:
        settings = yaml.safe_load(Path(known.config).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"`--config {known.config}` cannot be opened: {error.strerror}. Check the path.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "it is not UTF-8 text" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"
        # Without the parser's message and context: both quote the file, which may contain keys if passed by mistake.
        raise ValueError(f"`--config {known.config}` cannot be read as YAML: {where}.") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"`--config {known.config}` contains a {type(settings).__name__}, not settings by name. Write one `name: "
            "value` per line, e.g. `learning_rate: 1.0e-6`."
        )
    return ["--config", known.config, *flags], settings


def refuse_unknown(parser: argparse.ArgumentParser, argv: list[str], config: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError for a flag or a name in the config file that the parser does not have. Returns the flags."""
    flags = argv[2:] if argv[:1] == ["--config"] else argv
    # Uses argparse itself, so that `--help`, abbreviations and `--flag=value` are handled as in the real parse.
    namespace, unknown = parser.parse_known_args(flags)
    known = vars(namespace)
    if unknown:
        raise ValueError(f"Unknown argument `{unknown[0]}`.{did_you_mean(unknown[0], known, '--')}")
    foreign = sorted(map(str, config.keys() - known.keys() - {"env"}))
    if foreign:
        names = ", ".join(f"`{name}`" for name in foreign)
        raise ValueError(
            f"The config file sets {names}, which this script does not have.{did_you_mean(foreign[0], known)}"
        )
    return known


__all__ = ["read_arguments", "refuse_unknown", "show", "split_off_config"]
