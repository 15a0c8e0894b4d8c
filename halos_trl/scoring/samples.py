"""Samples, each a prompt with one completion and its location, read from items of files or rows of datasets."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..data.groups import prompt_key
from ..data.row_texts import is_empty, prompt_problem, side_problem
from ..data.row_values import SAMPLER_COLUMNS, Row, shown

_PAIRS = {"chosen", "rejected", "output_A", "output_B"}
_SCORES = ("reward", "score")


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt."""

    where: str
    """Location for error messages: file and item, or dataset and row."""
    prompt: Any
    """Text, or a list of messages."""
    completion: Any
    """In the prompt's format."""
    group: Hashable
    """Identifies the prompt of a sample: its `prompt_id`, or else a digest of the prompt."""
    columns: Row = field(default_factory=dict)
    """The other columns of the item or row."""

    @property
    def text(self) -> Any:
        """The completion as text, or as messages if it has several turns or parts."""
        if isinstance(self.completion, str):
            return self.completion
        content = self.completion[0].get("content")
        return content if len(self.completion) == 1 and isinstance(content, str) else self.completion

    @property
    def given_score(self) -> Any:
        """The item's `reward` or `score`; None if it has neither."""
        return next((self.columns[name] for name in _SCORES if self.columns.get(name) is not None), None)


@dataclass
class Samples:
    """The samples of one input, in order, and the number left out because of an empty completion."""

    samples: list[Sample]
    empty: int = 0


def read_samples(rows: Iterable[tuple[str, Row]]) -> Samples:
    """Read samples from rows that are passed with their location.

    A row contains `prompt` (or `instruction`, as in HALOs' samples for AlpacaEval) with `completion`, `output`
    (HALOs) or the list `completions`. If the prompt is a list of messages, a text `output` becomes an assistant
    message.

    Raises ValueError, naming the row, for missing or malformed fields, for different prompts with the same
    `prompt_id`, and for a repeated combination of `prompt_id` and `sample_id`.
    """
    found = Samples([])
    prompts: dict[Hashable, tuple[str, Sample]] = {}
    seen: dict[tuple[Hashable, Hashable], Sample] = {}
    for where, row in rows:
        for sample in _samples_of(where, row):
            _refuse_other_prompt(sample, prompts)
            _refuse_duplicate(sample, seen)
            if is_empty(sample.completion):
                found.empty += 1
            else:
                found.samples.append(sample)
    return found


def _samples_of(where: str, row: Row) -> Iterator[Sample]:
    prompt = _prompt(where, row)
    if problem := prompt_problem(prompt) or _turns_problem(prompt):
        raise ValueError(f"{where} {problem}")
    column = _completion_column(where, row)
    values = row[column]
    if column != "completions":
        values = [values]
    elif not isinstance(values, list):
        raise ValueError(f"{where} has `completions` {shown(values)}; expected a list of completions.")
    columns = {name: value for name, value in row.items() if name not in ("prompt", "instruction", column)}
    group = row.get("prompt_id")
    if group is None:
        group = prompt_key({**row, "prompt": prompt})
    elif not isinstance(group, Hashable):
        raise ValueError(f"{where} has `prompt_id` {shown(group)}; expected a number or a text.")
    for number, value in enumerate(values):
        place = f"{where}, completion {number}" if column == "completions" else where
        yield Sample(place, prompt, _completion(place, prompt, column, value), group, _own(columns, number, values))


def _prompt(where: str, row: Row) -> Any:
    if row.get("prompt") is not None:
        return row["prompt"]
    if isinstance(row.get("instruction"), str):
        return [{"role": "user", "content": row["instruction"]}]
    raise ValueError(f"{where} has no `prompt`. It has {_names(row)}. Add a prompt to each sample.")


def _turns_problem(prompt: Any) -> str | None:
    if isinstance(prompt, str) or any(turn["role"] == "user" for turn in prompt):
        return None
    roles = ", ".join(str(turn["role"]) for turn in prompt)
    return f"has a prompt without a user turn (roles: {roles}). Add the turn that the completion answers."


def _completion_column(where: str, row: Row) -> str:
    names = [name for name in ("completion", "output", "completions") if row.get(name) is not None]
    if len(names) == 1:
        return names[0]
    if names:
        raise ValueError(f"{where} has {' and '.join(f'`{name}`' for name in names)}. Keep one of them.")
    if _PAIRS & row.keys():
        raise ValueError(
            f"{where} contains a pair ({_names(row)}), which is already labelled. Pass a file of samples, with one "
            "completion in each item."
        )
    raise ValueError(f"{where} has no `completion`, `output` or `completions`. It has {_names(row)}.")


def _names(row: Row) -> str:
    return ", ".join(f"`{name}`" for name, value in row.items() if value is not None) or "no fields"


def _completion(where: str, prompt: Any, column: str, value: Any) -> Any:
    if isinstance(value, str) and isinstance(prompt, list):
        value = [{"role": "assistant", "content": value}]
    if value in ("", []):
        return value
    if problem := side_problem(value, prompt, column, takes_empty_turns=True):
        raise ValueError(f"{where} {problem}")
    return value


def _own(columns: Row, number: int, values: list[Any]) -> Row:
    """The columns of one completion in a list: its entry of `scores`, and of the values that a sampler stored."""
    lists = {name: columns.get(name) for name in SAMPLER_COLUMNS}
    if all(isinstance(found, list) and len(found) == len(values) for found in lists.values()):
        columns = columns | {name: found[number] for name, found in lists.items()}  # type: ignore[index]
    scores = columns.get("scores")
    if not isinstance(scores, list) or len(scores) != len(values):
        return columns
    return {name: value for name, value in columns.items() if name != "scores"} | {"score": scores[number]}


def _refuse_other_prompt(sample: Sample, prompts: dict[Hashable, tuple[str, Sample]]) -> None:
    key = prompt_key({**sample.columns, "prompt": sample.prompt})
    first_key, first = prompts.setdefault(sample.group, (key, sample))
    if first_key != key:
        raise ValueError(
            f"{first.where} and {sample.where} have the same `prompt_id`, {sample.group!r}, but different prompts, "
            f"{shown(first.prompt)} and {shown(sample.prompt)}, so their scores cannot be compared. Make the ids "
            "unique, or label files whose ids both start at 0 separately."
        )


def _refuse_duplicate(sample: Sample, seen: dict[tuple[Hashable, Hashable], Sample]) -> None:
    number = sample.columns.get("sample_id")
    if number is None:
        return
    if not isinstance(number, Hashable):
        raise ValueError(f"{sample.where} has `sample_id` {shown(number)}; expected a number or a text.")
    first = seen.setdefault((sample.group, number), sample)
    if first is not sample:
        raise ValueError(
            f"{first.where} and {sample.where} are the same sample: `prompt_id` {sample.group!r} and `sample_id` "
            f"{number!r} occur twice. Remove one of them."
        )


__all__ = ["Sample", "Samples", "read_samples"]
