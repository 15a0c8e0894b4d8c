"""Align a language model with online GRPO (arXiv:2402.03300), with or without humanline. TRL samples during training.

    python examples/train_grpo_online.py --humanline            # embedded task: no network, a few minutes

    accelerate launch examples/train_grpo_online.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl \
        --reward_function verify.py:score \
        --humanline --output_dir qwen-grpo --use_vllm --use_peft

Rows have `prompt` and any columns that the reward function reads. `--reward_function` is called as in TRL: with lists
`prompts` and `completions` and the columns as keyword arguments, it returns a list of scores. Alternatively, pass
`--reward_model_name_or_path`. Without humanline, the run is the same as TRL's. `--help` lists all flags.
"""

from trl import get_peft_config, get_quantization_config

from halos_trl import cli
from halos_trl.cli.online import OnlineArguments, rewards, unique_prompts
from halos_trl.online import GRPOConfig, GRPOTrainer

TOY = {
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 12,
    "max_steps": 100,
    "logging_steps": 10,
}


def main() -> None:
    script_args, training_args, model_args, data = cli.parse(GRPOConfig, "scored", TOY, arguments=OnlineArguments)
    train = data[script_args.dataset_train_split]
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards(script_args),
        args=training_args,
        train_dataset=unique_prompts(train) if script_args.embedded else train,
        eval_dataset=cli.eval_split(script_args, training_args, data),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    cli.run(trainer, script_args)


if __name__ == "__main__":
    main()
