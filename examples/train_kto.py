"""Align a language model with KTO (arXiv:2402.01306) on completions that were judged good or bad individually.

    python examples/train_kto.py                               # embedded task: no network, a minute or two

    python examples/train_kto.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/kto-mix-14k \
        --config configs/kto.yaml --output_dir qwen-kto \
        --use_peft --load_in_4bit --merge_adapter --push_to_hub

Model and dataset are Hub ids or local paths (JSON, JSONL, Parquet, CSV, a `save_to_disk` folder). Rows have `prompt`,
`completion` and a boolean `label`, or `prompt`, `chosen` and `rejected`, which are unpaired; standard or
conversational. The flags are those of TRL's KTO script and a few more (`--help`).
"""

from trl import get_peft_config, get_quantization_config

from halos_trl import KTOConfig, KTOTrainer, cli

TOY = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "adam_beta2": 0.98,
    "per_device_train_batch_size": 64,
    "num_train_epochs": 4,
}
TOY_HUMANLINE = {"humanline_sync_steps": 32, "undesirable_weight": 0.3}


def main() -> None:
    script_args, training_args, model_args, data = cli.parse(KTOConfig, "unpaired", TOY, toy_humanline=TOY_HUMANLINE)
    trainer = KTOTrainer(
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
