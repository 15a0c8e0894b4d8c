"""Align a language model with GRPO (arXiv:2402.03300) on groups of completions that were scored beforehand.

    python examples/train_grpo.py                              # embedded task: no network, a few minutes

    python examples/train_grpo.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name scored.jsonl \
        --config configs/grpo.yaml --output_dir qwen-grpo \
        --use_peft --load_in_4bit --merge_adapter --push_to_hub

Model and dataset are Hub ids or local paths (JSON, JSONL, Parquet, CSV, a `save_to_disk` folder). Rows have `prompt`,
`completion`, `score` (and optionally `prompt_id`), or `prompt` with the lists `completions` and `scores`; labelled
and paired rows count as scores of +1 and -1. Standard or conversational. `--help` lists all flags.
"""

from trl import get_peft_config, get_quantization_config

from halos_trl import GRPOConfig, GRPOTrainer, cli

TOY = {
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 64,
    "num_train_epochs": 3,
    # HALOs' clip of 0.01 is narrow for three epochs over one set of completions; with `epsilon_high=2`, a good one may
    # become three times as likely as under the model that generated it.
    "epsilon": 0.5,
    "epsilon_high": 2.0,
    "beta": 0.05,
}


def main() -> None:
    script_args, training_args, model_args, data = cli.parse(GRPOConfig, "scored", TOY)
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=data[script_args.dataset_train_split],
        eval_dataset=cli.eval_split(script_args, training_args, data),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    cli.run(trainer, script_args)


if __name__ == "__main__":
    main()
