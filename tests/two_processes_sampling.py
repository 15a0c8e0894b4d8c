"""Runs that sample, which `every_engine.py` makes in every process: online GRPO, and generations during evaluation."""

import functools
import os

import pytest
import torch
import trl
from accelerate import PartialState
from accelerate.utils import gather_object
from conftest import cpu_config, paired_rows, weights
from peft import LoraConfig
from test_online import SETTINGS, many_letters, prompts
from two_processes import assert_engine, settings_of_engine

from halos_trl import DPOConfig, DPOTrainer, GenerationCallback, online, toy
from halos_trl.report.runs import read_run
from halos_trl.sampling import SamplingSettings
from halos_trl.sharded import whole

STEPS, SAVED = 3, 2
ADAM = {"optim": "adamw_torch", "adam_epsilon": 1.0, "learning_rate": 0.5}  # as in `engine_cells.py`
SAMPLING = SamplingSettings(max_tokens=12, batch_size=2, temperature=1.0, top_p=1.0)
N_PROMPTS = 5  # an odd number: one process has a prompt less


def lora():
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def in_every_process(tensor):
    """The tensors of the processes, in a list; each has to ask."""
    return gather_object([tensor])


# -- online GRPO ---------------------------------------------------------------------------------------------------


def online_trainer(out, engine, *, module=online, adapter=False, **settings):
    tokenizer = toy.build_tokenizer()
    folder = out / "policy"  # TRL loads its reference from there
    with PartialState().main_process_first():
        if not folder.exists():
            toy.tiny_model(tokenizer).save_pretrained(folder)
    settings = SETTINGS | ADAM | {"max_steps": STEPS, "max_completion_length": 4, "log_level": "error"} | settings
    args = module.GRPOConfig(output_dir=str(out), **(settings | settings_of_engine(engine)))
    torch.manual_seed(7)  # of the adapter
    return module.GRPOTrainer(
        str(folder), many_letters, args, train_dataset=prompts(), processing_class=tokenizer,
        peft_config=lora() if adapter else None,
    )  # fmt: skip


def ends(trainer):
    """Weights and reference in every process."""
    reference = getattr(trainer, "reference", None)
    tensors = reference.tensors(trainer.model).values() if reference else []
    flat = torch.cat([torch.zeros(0), *(whole(t).flatten() for t in tensors)])
    return {"weights": in_every_process(weights(trainer.model)), "reference": in_every_process(flat)}


def online_run(out, engine, resumes=False, **settings):
    """How a run ended in each process, and how it did when it was resumed."""
    saves = {"save_strategy": "steps", "save_steps": SAVED} if resumes else {}
    trainer = online_trainer(out, engine, **saves, **settings)
    trainer.train()
    assert trainer.accelerator.num_processes == trainer.args.world_size == 2
    assert_engine(trainer, engine)
    logs = [e for e in trainer.state.log_history if "loss" in e]
    result = ends(trainer) | {"unclamped": [e.get("unclamped") for e in logs]}
    if resumes:
        resumed = online_trainer(out, engine, **saves, **settings)
        resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{SAVED}"))
        result["resumed"] = ends(resumed)
    return result


def online_runs(out, engine):
    """Runs of online GRPO by name; under DeepSpeed the message that refuses humanline."""
    if engine == "zero":
        with pytest.raises(ValueError, match="humanline") as refused:
            online_trainer(out / "refused", engine, humanline=True)
        return {"refused": str(refused.value)}
    run = functools.partial(online_run, engine=engine)
    humanline = {"resumes": True, "humanline": True, "log_epsilon_p": -0.01, "log_epsilon_r": 0.01}
    return {
        "trl": run(out / "trl", module=trl),
        "plain": run(out / "plain"),
        "humanline": run(out / "humanline", **humanline),
        "humanline, lora": run(out / "humanline lora", adapter=True, **humanline),
    }


# -- generations during evaluation ---------------------------------------------------------------------------------


def letters(completion):
    return float(len(set(completion)))


def generating_run(out, engine, adapter):
    """A run that samples before its first step and at two evaluations, and what its file holds afterwards."""
    tokenizer = toy.build_tokenizer()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = cpu_config(
        DPOConfig,
        out,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=3.0,
        per_device_train_batch_size=8 // processes,
        per_device_eval_batch_size=8 // processes,
        gradient_checkpointing=True,
        humanline=adapter,
        **settings_of_engine(engine),
    )
    torch.manual_seed(7)  # of the adapter
    trainer = DPOTrainer(
        model=toy.tiny_model(tokenizer),
        args=args,
        train_dataset=paired_rows(16),
        eval_dataset=paired_rows(8, seed=1),
        processing_class=tokenizer,
        peft_config=lora() if adapter else None,
    )
    trainer.add_callback(GenerationCallback(trainer, letters, num_prompts=N_PROMPTS, sampling=SAMPLING))
    trainer.train()
    assert_engine(trainer, engine)
    evaluated = [{n: v for n, v in e.items() if n.startswith("eval_gen") or n == "eval_win_rate"}
                 for e in trainer.state.log_history if "eval_loss" in e]  # fmt: skip
    return {
        "weights": weights(trainer.model),
        "evaluated": in_every_process(evaluated),
        "lines": read_run(out).generations,
    }


def generating_runs(out, engine):
    return {name: generating_run(out / f"generating {name}", engine, name == "lora") for name in ("full", "lora")}
