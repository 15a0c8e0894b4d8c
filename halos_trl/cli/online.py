"""Flags, rewards and prompts of `examples/train_grpo_online.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset

from .. import toy
from ..scoring.function import resolve_function
from .flags import HalosScriptArguments


@dataclass
class OnlineArguments(HalosScriptArguments):
    """The script arguments, with the scorers of completions."""

    samples_itself: ClassVar[bool] = True

    reward_function: str | None = field(
        default=None,
        metadata={"help": "`module:function` or `file.py:function`, called as TRL calls reward functions."},
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or local path of a reward model with one logit."}
    )


def _in_order(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The embedded task's reward: 1 for a correct answer, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(toy.verify(p[-1]["content"], c[0]["content"])) for p, c in pairs]


def rewards(script_args: OnlineArguments) -> list[Any]:
    """Reward functions and models as TRL expects them. Raises ValueError if the flags specify none."""
    if script_args.embedded:
        return [_in_order]
    named: list[Any] = [script_args.reward_model_name_or_path] if script_args.reward_model_name_or_path else []
    if script_args.reward_function:
        named.append(resolve_function(script_args.reward_function))
    if not named:
        raise ValueError(
            "There is no scorer for the completions. Pass `--reward_function` or `--reward_model_name_or_path`."
        )
    return named


def unique_prompts(rows: Dataset) -> Dataset:
    """The distinct prompts of rows in which equal prompts are adjacent."""
    prompts = list(rows["prompt"])
    return Dataset.from_list([{"prompt": p} for i, p in enumerate(prompts) if i == 0 or p != prompts[i - 1]])
