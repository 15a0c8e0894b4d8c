"""Scores from a Python function, such as a verifier."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..data.labelling import score_problem
from .samples import Sample
from .verdict import Verdict

Function = Callable[..., Any]

_PLAIN, _BATCHED = "completion", "completions"


class RewardFunctionError(ValueError):
    """A reward function raised: `__cause__` is its exception."""

    keep_traceback = True
    """The command prints the traceback in addition to the message."""


class FunctionScorer:
    """Calls `function(prompt=..., completion=..., <column>=..., ...)` for each sample.

    `function` may also be a name, `module:function` or `file.py:function`. The function receives the row's columns
    that match its parameters, or all columns if it takes `**kwargs`. `prompt` has the row's format; `completion` is
    the text, or the list of messages for a completion of several turns. A function with a parameter `completions` is
    called like a reward function of TRL, with lists of one element (`prompts`, `completions` in the row's format, and
    the columns), and returns a list of one score. If the function returns None, the sample has no score.

    Raises ValueError for a name that cannot be resolved. While scoring it raises `RewardFunctionError` if the function
    raises and ValueError if it returns anything but a finite number or None; both name the row.
    """

    def __init__(self, function: str | Function):
        if isinstance(function, str):
            self.name = function
            self.function, source = _resolve(function)
        else:
            self.name = getattr(function, "__qualname__", type(function).__name__)
            self.function, source = function, None
        self._parameters = _parameters(self.function, self.name)
        self._batched = _BATCHED in self._parameters and _PLAIN not in self._parameters
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        self.settings: dict[str, Any] = {"function": self.name, "function_source": _digest(source)}

    def __call__(self, todo: Sequence[tuple[int, Sample]]) -> Iterator[Verdict]:
        for position, sample in todo:
            score = self._score(sample)
            yield Verdict(position, score, "the function returned None" if score is None else None)

    def _score(self, sample: Sample) -> float | None:
        arguments = self._arguments(sample)
        try:
            score = self.function(**arguments)
        except Exception as error:
            raise RewardFunctionError(
                f"`{self.name}` raised {type(error).__name__} for {sample.where}: {error}. Fix the function or the "
                "row."
            ) from error
        if self._batched:
            score = self._single(score, sample)
        if score is None:
            return None
        if problem := score_problem(score):
            hint = " Convert it with `float(...)`." if isinstance(score, bool | str) else ""
            raise ValueError(f"The score that `{self.name}` returned for {sample.where} is invalid: {problem}.{hint}")
        return float(score)

    def _single(self, scores: Any, sample: Sample) -> Any:
        if isinstance(scores, list | tuple) and len(scores) == 1:
            return scores[0]
        raise ValueError(
            f"`{self.name}` returned {scores!r} for {sample.where}. A function with a parameter `completions` must "
            "return a list with one score for each of them; it received one."
        )

    def _arguments(self, sample: Sample) -> dict[str, Any]:
        if self._batched:
            columns = {name: [value] for name, value in sample.columns.items()}
            given = columns | {"prompts": [sample.prompt], "completions": [sample.completion]}
        else:
            given = sample.columns | {"prompt": sample.prompt, "completion": sample.text}
        missing = [
            name
            for name, parameter in self._parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name not in given
        ]
        if missing:
            raise ValueError(
                f"`{self.name}` has a parameter `{missing[0]}`, which {sample.where} does not hold.{_names(given)}"
                f"{_meant(missing[0], given)}"
            )
        return given if self._takes_all else {k: v for k, v in given.items() if k in self._parameters}


def _names(given: dict[str, Any]) -> str:
    return f" It has {', '.join(f'`{name}`' for name in sorted(given))}."


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def resolve_function(name: str) -> Function:
    """Import the function `module:function` or `file.py:function`. Raises ValueError if it does not exist."""
    return _resolve(name)[0]


def _resolve(name: str) -> tuple[Function, str | None]:
    """The function, and the file of its module."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise ValueError(
            f"The function is {name!r}; expected `module:function` or `file.py:function`, e.g. "
            "`rewards.py:is_correct`."
        )
    module = _from_file(place, name) if place.endswith(".py") else _from_module(place, name)
    function = getattr(module, attribute, None)
    if function is None:
        public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ValueError(f"{place} has no function `{attribute}`.{_meant(attribute, public)}")
    if not callable(function):
        raise ValueError(f"`{name}` is of type {type(function).__name__}, not a function.")
    return function, getattr(module, "__file__", None)


def _from_file(path: str, name: str) -> ModuleType:
    if not Path(path).is_file():
        raise ValueError(f"The function is {name!r}, but there is no file {path}. Check the path.")
    # Registered under its name, so that the file can define dataclasses and be imported by child processes.
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None  # always set for a `.py` file
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    _find_modules_in(Path(path).parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _from_module(module: str, name: str) -> ModuleType:
    _find_modules_in(Path.cwd())
    try:
        return importlib.import_module(module)
    except Exception as error:
        hint = (
            f" For a file, write `{module.replace('.', '/')}.py:{name.rpartition(':')[2]}`."
            if isinstance(error, ModuleNotFoundError) and error.name == module
            else ""
        )
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {error}.{hint}") from error


def _find_modules_in(folder: Path) -> None:
    """Add a folder to the import path, as `python file.py` does; it stays there for calls of the function."""
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


def _parameters(function: Function, name: str) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The parameters of `{name}` cannot be read ({error}). Wrap it in a `def`.") from None
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_all and not {_PLAIN, _BATCHED} & parameters.keys():
        raise ValueError(
            f"`{name}` takes ({', '.join(parameters)}). It is called with keyword arguments: rename one parameter to "
            "`completion`, and others to `prompt` or columns of the rows."
        )
    return parameters


def _digest(source: str | None) -> str | None:
    """Hash of the file, so that scores of a changed function are not reused."""
    if source is None or not Path(source).is_file():
        return None
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]


__all__ = ["FunctionScorer", "RewardFunctionError"]
