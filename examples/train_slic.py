"""Align a language model with SLiC (arXiv:2305.10425) on pairs of completions, without a reference.

    python examples/train_slic.py                               # embedded task: no network

    python examples/train_slic.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized \
        --config configs/slic.yaml --output_dir qwen-slic

    python examples/train_slic.py --humanline                   # embedded task with humanline

Model and dataset are Hub ids or local paths (JSON, JSONL, Parquet, CSV, a `save_to_disk` folder). Rows have `chosen`,
`rejected` and optionally `prompt`, standard or conversational. The flags are those of TRL's DPO
script and a few more (`--help`).
"""

from trl import get_peft_config, get_quantization_config

from halos_trl import SLiCConfig, SLiCTrainer, cli

TOY = {"learning_rate": 3e-4, "per_device_train_batch_size": 64, "num_train_epochs": 1}


def main() -> None:
    script_args, training_args, model_args, data = cli.parse(SLiCConfig, "paired", TOY)
    trainer = SLiCTrainer(
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
