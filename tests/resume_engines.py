"""A run with humanline, resumed from the middle, for `every_engine.py`."""

from pathlib import Path

import pytest
from conftest import cpu_config, paired_rows, weights
from policy_runs import scored
from two_processes import assert_engine, settings_of_engine

from halos_trl import DPOConfig, DPOTrainer, PPOConfig, PPOTrainer, toy
from halos_trl.trainers.checkpoints import last_complete_checkpoint, problem_of


def make(out, engine, ppo=False, **settings):
    tokenizer = toy.build_tokenizer()
    defaults = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "humanline": True,
    }
    trainer_class, config_class = (PPOTrainer, PPOConfig) if ppo else (DPOTrainer, DPOConfig)
    args = cpu_config(config_class, out / "run", **(defaults | settings_of_engine(engine) | settings))
    return trainer_class(
        model=toy.tiny_model(tokenizer),
        args=args,
        train_dataset=scored(8) if ppo else paired_rows(24),
        processing_class=tokenizer,
    )


def resumed(out, engine):
    """The results of the run, its checkpoints, and the results of the resumed run."""
    whole = make(out, engine)
    whole.train()
    assert_engine(whole, engine)
    middle = out / "run" / "checkpoint-2"
    results = {
        "files": sorted(path.name for path in middle.iterdir()),
        "problem": problem_of(middle, deepspeed=whole.is_deepspeed_enabled),
        "last": Path(last_complete_checkpoint(str(out / "run"))).name,
        "whole": weights(whole.model),
    }
    again = make(out, engine)
    again.train(resume_from_checkpoint=str(middle))
    results["resumed"] = weights(again.model)
    finished = make(out, engine)
    finished.train(resume_from_checkpoint=True)
    results["finished"] = (finished.state.global_step, weights(finished.model))
    if engine == "fsdp2":
        stateless = {"optim": "sgd", "max_steps": 2}
        make(out / "stateless", engine, **stateless).train()
        with pytest.raises(ValueError, match="cannot be restored under FSDP") as refused:
            make(out / "stateless", engine, **(stateless | {"max_steps": 4})).train(resume_from_checkpoint=True)
        results["refused"] = str(refused.value)
        # Only here does an engine restore a policy with its value head into parameters that it has split already.
        ppo = [make(out / "ppo", engine, ppo=True, max_steps=2, save_steps=1) for _ in range(2)]
        ppo[0].train()
        ppo[1].train(resume_from_checkpoint=str(out / "ppo" / "run" / "checkpoint-1"))
        results["ppo"] = [weights(trainer.model) for trainer in ppo]
    return results
