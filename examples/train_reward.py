"""Train a Bradley-Terry reward model on pairs of a chosen and a rejected completion.

    python examples/train_reward.py                            # embedded task: no network

    python examples/train_reward.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized \
        --config configs/reward.yaml --output_dir qwen-reward

Model and dataset are Hub ids or local paths. Rows have `chosen`, `rejected` and optionally `prompt`, standard or
conversational. The flags are those of TRL's reward script and a few more (`--help`). With a test split, the script
prints the share of its pairs whose chosen completion scores higher, before and after training.
"""

from trl import get_peft_config, get_quantization_config

from halos_trl import BradleyTerryConfig, BradleyTerryTrainer, cli

TOY = {"learning_rate": 3e-4, "per_device_train_batch_size": 64, "num_train_epochs": 1}


def main() -> None:
    script_args, training_args, model_args, data = cli.parse(BradleyTerryConfig, "paired", TOY)
    held_out = data.get(script_args.dataset_test_split)
    trainer = BradleyTerryTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=data[script_args.dataset_train_split],
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    before = trainer.evaluate()["eval_accuracy"] if held_out else None
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    cli.save_and_push(trainer, script_args)
    if held_out:
        after = trainer.evaluate()["eval_accuracy"]
        trainer.accelerator.print(f"held-out pair accuracy: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
