"""Runs of GRPO and PPO for `every_engine.py`."""

import functools
import os

import pytest
from accelerate import PartialState
from conftest import cpu_config, weights
from datasets import load_from_disk
from peft import LoraConfig
from policy_runs import build, scored, settings_of
from test_ppo_trainer import reward_model
from transformers import AutoModelForSequenceClassification
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from two_processes import assert_engine, on_disk, settings_of_engine, timeless

from halos_trl import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, toy

EXAMPLES_PER_STEP = 8
STEPS = 4


def run_one(
    trainer_class, config_class, data, out, *, per_device=None, ref="near", lora=False, engine=None, **overrides
):
    tokenizer = toy.build_tokenizer()
    extra = {"reward_model": reward_model(tokenizer)} if overrides.pop("learned", False) else {}
    extra |= {"reward_processing_class": tokenizer} if extra else {}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    per_device = per_device or EXAMPLES_PER_STEP // processes
    args = cpu_config(
        config_class,
        out / "runs",
        max_steps=STEPS,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=EXAMPLES_PER_STEP // processes,
        gradient_accumulation_steps=EXAMPLES_PER_STEP // (per_device * processes),
        **settings_of_engine(engine),
        **(settings_of(trainer_class) | overrides),
    )
    extra["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
    trainer = build(trainer_class, args, toy.tiny_model(tokenizer), tokenizer, data, ref=ref, **extra)
    trainer.train()
    assert trainer.accelerator.num_processes == args.world_size == processes
    assert_engine(trainer, engine)
    logs = [{k: v for k, v in e.items() if "runtime" not in k} for e in trainer.state.log_history if "loss" in e]
    # 14 rows: the last batch of two processes is filled up with repetitions.
    logs.append(timeless(trainer.evaluate(on_disk(scored(4, seed=1), out / "evaluated"))))
    return {"weights": weights(trainer.model), "logs": logs, "processes": trainer.accelerator.num_processes}


def refusal_of_partitioned_reward_model(data, out, engine):
    """The message for a reward model that was loaded after the arguments, as ZeRO-3 partitions it then."""
    tokenizer, folder = toy.build_tokenizer(), out / "saved reward model"
    unset_hf_deepspeed_config()  # an earlier run turned ZeRO-3 on, under which no random weights can be made
    with PartialState().main_process_first():
        if not folder.exists():
            reward_model(tokenizer).save_pretrained(folder)
    args = cpu_config(PPOConfig, out / "runs", **settings_of_engine(engine), **settings_of(PPOTrainer))
    learned = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="reward model") as refused:
        build(
            PPOTrainer, args, toy.tiny_model(tokenizer), tokenizer, data, ref="near", reward_model=learned,
            reward_processing_class=tokenizer,
        )  # fmt: skip
    return str(refused.value)


def runs(out, engine):
    """How the runs ended, by name. OUT holds saved `scored rows`."""
    run = functools.partial(run_one, engine=engine)
    grpo, ppo = (GRPOTrainer, GRPOConfig), (PPOTrainer, PPOConfig)
    data = scored(10)
    # From disk: processes share what is precomputed through the data set's cache folder.
    rows = load_from_disk(out / "scored rows")
    unscored = data.remove_columns("score")
    humanline = {"humanline": True, "ref": None, "log_epsilon_p": -0.001, "log_epsilon_r": 0.001}
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        learned = {"refused": refusal_of_partitioned_reward_model(unscored, out, engine)}
    else:
        learned = {"ppo, reward model": run(*ppo, unscored, out, learned=True)}
    return {
        "grpo, accumulated": run(*grpo, data, out, per_device=1),
        "grpo, precomputed": run(*grpo, rows, out, precompute_ref_log_probs=True),
        "ppo, humanline, accumulated, two epochs": run(*ppo, data, out, per_device=2, ppo_epochs=2, **humanline),
    } | learned
