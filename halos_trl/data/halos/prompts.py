"""HALOs' feedback files as HALOs loads them: one record per prompt, with its completions, scores, pairs and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from ..feedback.files import read_items

Turns: TypeAlias = list[dict[str, Any]]
Item: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class HalosPrompt:
    """A prompt with all feedback that a file contains about it; HALOs' `Example`."""

    key: str
    """The file's `prompt_id`."""
    prompt: Turns | str
    generations: list[Any]
    """The prompt's completions, each a list of turns."""
    scores: list[float] = field(default_factory=list)
    """A score for each generation, or empty."""
    pairs: list[tuple[int, int]] = field(default_factory=list)
    """Pairs (better, worse) of indices into `generations`."""
    desirable: list[bool] = field(default_factory=list)
    """A label for each generation, for binary feedback."""
    sft_index: int = -1
    """Index of the generation that is the target of supervised fine-tuning."""

    @property
    def prompt_id(self) -> str:
        """HALOs' id of the prompt: SHA-256 of the concatenated contents of its turns."""
        contents = self.prompt if isinstance(self.prompt, str) else "".join(turn["content"] for turn in self.prompt)
        return hashlib.sha256(contents.encode()).hexdigest()


Source: TypeAlias = str | Path | Sequence[HalosPrompt | Mapping[str, Any]]


def load_prompts(source: Source, split: str = "train") -> list[HalosPrompt]:
    """The prompts of a HALOs feedback file, in order of first appearance, as HALOs loads them.

    Items are grouped by `prompt_id`. A prompt whose first item has another `split` is skipped; items without a `split`
    belong to every split. Prompts that are already loaded (`HalosPrompt`, or mappings with its fields) are returned
    unchanged.

    Raises ValueError for a file that is not a JSON array (or JSON Lines) of feedback items, and for an item with a
    missing field or another type than the first item of its prompt.
    """
    if not isinstance(source, str | Path):
        return [prompt if isinstance(prompt, HalosPrompt) else _of_mapping(prompt) for prompt in source]
    items: dict[str, list[tuple[str, Item]]] = {}
    for item in read_items(source):
        items.setdefault(_get(item.value, "prompt_id", item.where), []).append((item.where, item.value))
    return [_prompt_of(key, members) for key, members in items.items() if members[0][1].get("split", split) == split]


def _of_mapping(prompt: Mapping[str, Any]) -> HalosPrompt:
    known = {f.name for f in fields(HalosPrompt)}
    return HalosPrompt(**{name: value for name, value in prompt.items() if name in known})


def _get(item: Item, name: str, where: str) -> Any:
    if item.get(name) is None:
        raise ValueError(f"{where} has no `{name}`; it has {sorted(item)}. Add it, or remove the item.")
    return item[name]


def _prompt_of(key: str, members: list[tuple[str, Item]]) -> HalosPrompt:
    kind = _get(members[0][1], "type", members[0][0])
    if kind not in _READERS:
        raise ValueError(
            f"{members[0][0]} is of type {kind!r}; expected one of {sorted(_READERS)}. Label samples without feedback "
            "first."
        )
    for where, item in members:
        if item.get("type") != kind:
            raise ValueError(
                f"{where} is of type {item.get('type')!r}, but the first item with its `prompt_id` ({key!r}) is of "
                f"type {kind!r}. Keep one type of feedback for each prompt."
            )
    last_where, last = members[-1]
    return HalosPrompt(key, _get(last, "prompt", last_where), **_READERS[kind](members))


def _binary(members: list[tuple[str, Item]]) -> dict[str, Any]:
    read = _scalar(members)
    desirable = [bool(_get(item, "label", where)) for where, item in members]
    best = desirable.index(True) if any(desirable) else _first_highest(read["scores"])
    return read | {"desirable": desirable, "sft_index": best}


def _scalar(members: list[tuple[str, Item]]) -> dict[str, Any]:
    return {
        "generations": [_get(item, "output", where) for where, item in members],
        "scores": [_get(item, "reward", where) for where, item in members],
    }


def _pairwise(members: list[tuple[str, Item]]) -> dict[str, Any]:
    generations: list[Turns] = []
    scores: list[float] = []
    pairs: list[tuple[int, int]] = []
    index_of: dict[str, int] = {}
    for where, item in members:
        pair = []
        for side in "AB":
            turns = _get(item, f"output_{side}", where)
            text = turns[0]["content"]
            if text not in index_of:
                index_of[text] = len(generations)
                generations.append(turns)
                scores.append(_get(item, f"reward_{side}", where))
            pair.append(index_of[text])
        first, second = pair
        pairs.append((first, second) if _get(item, "label", where) == 1 else (second, first))
    return {"generations": generations, "scores": scores, "pairs": pairs, "sft_index": _first_highest(scores)}


def _first_highest(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


_READERS: dict[str, Callable[[list[tuple[str, Item]]], dict[str, Any]]] = {
    "binary_feedback": _binary,
    "pairwise_feedback": _pairwise,
    "scalar_feedback": _scalar,
}

__all__ = ["HalosPrompt", "Source", "load_prompts"]
