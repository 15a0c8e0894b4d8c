"""Align a language model with online GRPO (arXiv:2402.03300), plain or under humanline: TRL samples while it trains.

    python examples/train_grpo_online.py --humanline            # embedded default: no network, a few minutes

    accelerate launch examples/train_grpo_online.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl \
        --reward_function verify.py:score \
        --humanline --output_dir qwen-grpo --use_vllm --use_peft

Rows hold `prompt`, and whatever columns the reward reads. `--reward_function` names a function as TRL calls it: with
lists `prompts` and `completions` and the columns as keyword arguments, it returns a list of scores.
`--reward_model_name_or_path` names a reward model. Without humanline the run is TRL's. `--help` lists all flags.
"""

from dataclasses import dataclass, field
from typing import Any

import datasets
from trl import get_peft_config, get_quantization_config

from halos_trl import cli, toy
from halos_trl.online import GRPOConfig, GRPOTrainer
from halos_trl.scoring.function import resolve_function

TOY = {
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 12,
    "max_steps": 100,
    "logging_steps": 10,
}


@dataclass
class OnlineArguments(cli.HalosScriptArguments):
    reward_function: str | None = field(
        default=None,
        metadata={"help": "`module:function` or `file.py:function`, called as TRL calls reward functions."},
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or local path of a reward model with one logit."}
    )


def in_order(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The embedded task's reward: 1 for a right answer, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(toy.verify(p[-1]["content"], c[0]["content"])) for p, c in pairs]


def rewards(script_args: OnlineArguments) -> list[Any]:
    if script_args.embedded:
        return [in_order]
    named: list[Any] = [script_args.reward_model_name_or_path] if script_args.reward_model_name_or_path else []
    if script_args.reward_function:
        named.append(resolve_function(script_args.reward_function))
    if not named:
        raise ValueError("Nothing scores the completions. Pass `--reward_function` or `--reward_model_name_or_path`.")
    return named


def unique(prompts: list[Any]) -> list[Any]:
    return [prompt for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]


def main() -> None:
    script_args, training_args, model_args, data = cli.parse(GRPOConfig, "scored", TOY, arguments=OnlineArguments)
    train = data[script_args.dataset_train_split]
    if script_args.embedded:  # prompts alone, each of them once
        train = datasets.Dataset.from_list([{"prompt": prompt} for prompt in unique(train["prompt"])])
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards(script_args),
        args=training_args,
        train_dataset=train,
        eval_dataset=cli.eval_split(script_args, training_args, data),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    cli.run(trainer, script_args)


if __name__ == "__main__":
    main()
