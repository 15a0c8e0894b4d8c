"""Runs in every process of a launch, as `two_processes.py` does: a run with humanline, resumed from its middle.

accelerate launch --config_file FILE --num_processes 2 tests/resume_engines.py OUT [fsdp2|zero]
"""

import os
import sys
from pathlib import Path

import torch
from conftest import cpu_config, paired_rows, weights
from two_processes import assert_engine, make_fsdp2_real, settings_of_engine

from halos_trl import DPOConfig, DPOTrainer, toy
from halos_trl.trainers.checkpoints import last_complete_checkpoint, problem_of


def make(out, engine):
    tokenizer = toy.build_tokenizer()
    args = cpu_config(
        DPOConfig,
        out / "run",
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        optim="adamw_torch",
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        humanline=True,
        **settings_of_engine(engine),
    )
    model = toy.tiny_model(tokenizer)
    return DPOTrainer(model=model, args=args, train_dataset=paired_rows(24), processing_class=tokenizer)


def main(out: Path, engine: str | None = None) -> None:
    if engine == "fsdp2":
        make_fsdp2_real()
    whole = make(out, engine)
    whole.train()
    assert_engine(whole, engine)
    end = weights(whole.model)
    middle = out / "run" / "checkpoint-2"
    results = {
        "files": sorted(path.name for path in middle.iterdir()),
        "problem": problem_of(middle, deepspeed=whole.is_deepspeed_enabled),
        "last": Path(last_complete_checkpoint(str(out / "run"))).name,
        "whole": end,
        "processes": whole.accelerator.num_processes,
    }
    resumed = make(out, engine)
    resumed.train(resume_from_checkpoint=str(middle))
    results["resumed"] = weights(resumed.model)
    finished = make(out, engine)
    finished.train(resume_from_checkpoint=True)
    results["finished"] = (finished.state.global_step, weights(finished.model))
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(results, out / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
