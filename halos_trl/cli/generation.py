"""`--generate_on_eval`: completions at each evaluation of a training script, with scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl import RewardConfig

from ..generation import GenerationCallback
from ..sampling import SamplingSettings

if TYPE_CHECKING:
    from .flags import HalosScriptArguments


def toy_generation(given: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Defaults on the embedded task, if the flags enable completions."""
    if not (given.get("generate_on_eval") or config.get("generate_on_eval")):
        return {}
    function = None if given.get("reward_model") or config.get("reward_model") else "halos_trl.toy:reward"
    return {
        "eval_strategy": "steps",
        "eval_steps": 20,
        "per_device_eval_batch_size": 128,
        "generate_max_tokens": 12,
        "reward_function": function,
    }


def check_generation(script_args: HalosScriptArguments, training_args: Any) -> None:
    """Raise ValueError for flags that cannot work together, before anything is loaded."""
    number = script_args.generate_on_eval
    named = [name for name in ("reward_function", "reward_model") if getattr(script_args, name)]
    if number is None:
        if named and not script_args.samples_itself:
            raise ValueError(
                f"`--{named[0]}` scores completions sampled at evaluations, but none are sampled. Pass "
                "`--generate_on_eval N` for N prompts, or leave it out."
            )
        return
    problems = (
        (number < 1, f"`--generate_on_eval {number}` is a number of prompts and must be at least 1."),
        (
            script_args.samples_itself,
            "`--generate_on_eval` is for offline methods, but this one samples and scores completions at each "
            "evaluation by itself. Leave it out.",
        ),
        (
            isinstance(training_args, RewardConfig),
            "`--generate_on_eval` needs a language model, but a reward model generates no completions. Leave it out.",
        ),
        (
            training_args.eval_strategy == "no",
            "`--generate_on_eval` samples at evaluations, but there are none. Pass `--eval_strategy steps` (or "
            "`epoch`).",
        ),
        (
            not named,
            "`--generate_on_eval` needs scores for the completions. Pass `--reward_function` or `--reward_model`.",
        ),
        (len(named) > 1, "Both `--reward_function` and `--reward_model` are given. Leave one of them out."),
    )
    for applies, message in problems:
        if applies:
            raise ValueError(message)


def add_generation(trainer: Any, script_args: HalosScriptArguments) -> None:
    """Add the callback for `--generate_on_eval`."""
    if script_args.generate_on_eval is None:
        return
    reward: Any = script_args.reward_function
    if script_args.reward_model:
        from ..scoring.reward_model import RewardModelScorer

        reward = RewardModelScorer(script_args.reward_model)
    sampling = SamplingSettings(
        max_tokens=script_args.generate_max_tokens, batch_size=trainer.args.per_device_eval_batch_size
    )
    trainer.add_callback(
        GenerationCallback(trainer, reward, num_prompts=script_args.generate_on_eval, sampling=sampling)
    )


__all__ = ["add_generation", "check_generation", "toy_generation"]
