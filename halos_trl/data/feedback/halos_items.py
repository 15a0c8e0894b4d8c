"""Conversion of feedback in any format to items of HALOs' files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..row_values import SAMPLER_COLUMNS
from .files import Item, Object
from .formats import Completion, Format, Judged, Text

_KEPT = ("split", "dataset", "generator")
"""Keys of HALOs' items that do not describe the completion."""

PURPOSES_OF = {
    "sample": "sft",
    "completions": "sft",
    "binary_feedback": "unpaired",
    "labelled": "unpaired",
    "pairwise_feedback": "paired",
    "pairs": "paired",
    "scalar_feedback": "group",
    "scored": "group",
    "groups": "group",
}
"""The default purpose of the items of each format."""


def halos_items(item: Item, form: Format, found: Judged, prompt_id: int) -> Iterator[Object]:
    """Convert an item to HALOs' items: samples, labels, pairs or scores, depending on its content.

    Items in HALOs' format keep their keys. HALOs cannot read feedback without rewards, so missing rewards are replaced
    by +1 and -1, as in HALOs' datasets without scores. Raises ValueError for a prompt that is text.
    """
    if "type" in item.value:
        yield item.value
        return
    if isinstance(found.prompt, str):
        raise ValueError(
            f"{item.where} has a text as prompt, but prompts in HALOs' files are conversations. Use `--format trl` or "
            "convert the prompts to lists of messages."
        )
    base = {"prompt_id": item.value.get("prompt_id", prompt_id), "prompt": found.prompt}
    base |= {key: item.value[key] for key in _KEPT if key in item.value}
    purpose = PURPOSES_OF[form.name]
    if purpose == "paired":
        for better, worse in found.pairs:
            yield base | _pair(found.completions[better], found.completions[worse])
        return
    for number, completion in enumerate(found.completions):
        sample_id = number if completion.sample_id is None else completion.sample_id
        yield base | {"sample_id": sample_id} | _single(completion, purpose)


def _single(completion: Completion, purpose: str) -> dict[str, Any]:
    if purpose == "sft":
        return {"output": _only_text(completion.text), "type": "sample"}
    sampled = {} if completion.sampled is None else dict(zip(SAMPLER_COLUMNS, completion.sampled, strict=True))
    if purpose == "unpaired":
        reward = (1.0 if completion.label else -1.0) if completion.score is None else completion.score
        label = int(bool(completion.label))
        return sampled | {"output": completion.text, "label": label, "reward": reward, "type": "binary_feedback"}
    return sampled | {"output": completion.text, "reward": completion.score, "type": "scalar_feedback"}


def _only_text(completion: Text) -> Any:
    """The text of a single-turn completion, as in HALOs' samples."""
    return completion if isinstance(completion, str) or len(completion) > 1 else completion[0]["content"]


def _pair(better: Completion, worse: Completion) -> dict[str, Any]:
    rewards = (1.0, -1.0) if better.score is None or worse.score is None else (better.score, worse.score)
    ids = {"sample_id_A": better.sample_id, "sample_id_B": worse.sample_id}
    return {key: value for key, value in ids.items() if value is not None} | {
        "output_A": better.text,
        "output_B": worse.text,
        "label": 1,
        "reward_A": rewards[0],
        "reward_B": rewards[1],
        "reward_difference": abs(rewards[0] - rewards[1]),
        "type": "pairwise_feedback",
    }


__all__ = ["PURPOSES_OF", "halos_items"]
