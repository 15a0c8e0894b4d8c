"""Align a language model with offline PPO (arXiv:1707.06347) on completions with scores, labels or a reward model.

    python examples/train_ppo.py                               # embedded task: no network, a few minutes

    python examples/train_ppo.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/kto-mix-14k \
        --config configs/ppo.yaml --output_dir qwen-ppo --reward_model_path reward-model

Model and dataset are Hub ids or local paths (JSON, JSONL, Parquet, CSV, a `save_to_disk` folder). Rows have `prompt`,
`completion` and a `score`, or a boolean `label` (+1 and -1), or are pairs; standard or conversational. Rows
without a score can be scored by a reward model (`--reward_model_path`), e.g. one trained with `BradleyTerryTrainer`.
`--help` lists all flags.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import get_peft_config, get_quantization_config

from halos_trl import PPOConfig, PPOTrainer, cli
from halos_trl.trainers.reward import load_reward_model

TOY = {
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 64,
    "num_train_epochs": 3,
    # HALOs' KL penalty is linear in the log-ratio: on fixed completions it lowers the log-probs of all of them without
    # bound. With the default of 0.1, it outweighs the advantages at this learning rate.
    "kl_coef": 0.01,
}


@dataclass
class PPOScriptConfig(PPOConfig):
    """`PPOConfig` with an additional flag."""

    reward_model_path: str | None = field(
        default=None, metadata={"help": "Reward model (Hub id or folder) for rows without a score column."}
    )


def main() -> None:
    script_args, training_args, model_args, data = cli.parse(PPOScriptConfig, "scored", TOY)
    reward = training_args.reward_model_path
    trainer = PPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=data[script_args.dataset_train_split],
        eval_dataset=cli.eval_split(script_args, training_args, data),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        reward_model=load_reward_model(reward) if reward else None,
        reward_processing_class=AutoTokenizer.from_pretrained(reward) if reward else None,
    )
    cli.run(trainer, script_args)


if __name__ == "__main__":
    main()
