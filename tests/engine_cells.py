"""Runs in every process of a launch: the cells of the engine matrix, one after the other, each saved as OUT/<cell>.pt.

python tests/engine_cells.py OUT CELLS [fsdp2|zero]        # CELLS: a JSON file with a list of names

A cell is `method/adapter/humanline/rows`, e.g. `KTO/lora/humanline/packed`. It trains, evaluates, saves, and goes on
from its own checkpoint; the parent compares with the same cell in one process (`tests/engine_matrix.py`).
"""

import copy
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from conftest import cpu_config, paired_rows, perturbed, unpaired_rows
from peft import LoraConfig
from policy_runs import GRPO, PPO, scored
from test_overriding import scorer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from two_processes import assert_engine, make_fsdp2_real, settings_of_engine, timeless

import halos_trl
from halos_trl import toy
from halos_trl.sharded import parameters_by_name, whole

STEPS, SAVED, EXAMPLES_PER_STEP = 4, 3, 8
PAIRED = ("DPO", "CDPO", "IPO", "SimPO", "SLiC")
METHODS = (*PAIRED, "KTO", "GRPO", "PPO", "BradleyTerry")
# PPO's checkpoint lies between two epochs over a batch, and both of its gradient limits act.
OWN = {
    "GRPO": GRPO,
    "PPO": PPO | {"ppo_epochs": 2, "max_grad_norm": 0.05, "v_head_max_grad_norm": 0.05},
    "KTO": {"beta": 0.5},
    "DPO": {"beta": 0.5},
    "CDPO": {"beta": 0.5},
}


def names():
    """The cells of one engine."""
    for method in METHODS:
        for adapter in ("full", "lora"):
            for humanline in ("plain",) if method == "BradleyTerry" else ("plain", "humanline"):
                for rows in ("packed", "padded"):
                    yield f"{method}/{adapter}/{humanline}/{rows}"


def data_of(method):
    """Rows to train on, and 11 or 14 others, so that accelerate fills the last batch of two processes with repeats.

    For the reward model 8, which need not be filled up: its evaluation is TRL's, which counts repeated rows.
    """
    if method in ("GRPO", "PPO"):
        return scored(8), scored(4, seed=1)
    rows = unpaired_rows if method == "KTO" else paired_rows
    return rows(24), rows(8 if method == "BradleyTerry" else 11, seed=1)


def build(name, folder, engine):
    method, adapter, humanline, rows = name.split("/")
    trainer_class = getattr(halos_trl, f"{method}Trainer")
    tokenizer = toy.build_tokenizer()
    model = toy.tiny_model(tokenizer)
    if method == "BradleyTerry":
        # Before the arguments, which turn ZeRO-3 on: its empty parameters cannot be given random values.
        unset_hf_deepspeed_config()
        model = scorer(model)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    settings = OWN.get(method, {})
    if humanline == "humanline":
        # SimPO has no reference: its bounds are those of log-probs, here near the median of the untrained model's.
        lower = -5.6 if method == "SimPO" else -0.005
        settings = settings | {"humanline": True, "log_epsilon_p": lower, "log_epsilon_r": 0.005}
    args = cpu_config(
        getattr(halos_trl, f"{method}Config"),
        folder,
        max_steps=STEPS,
        # Far above the gradients, so that Adam does not divide by their size and make whole steps of rounding errors;
        # it still has a state that a resumed run needs.
        optim="adamw_torch",
        adam_epsilon=1.0,
        learning_rate=0.5,
        save_strategy="steps",
        save_steps=SAVED,
        # Two micro-batches on each process.
        per_device_train_batch_size=EXAMPLES_PER_STEP // processes // 2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=EXAMPLES_PER_STEP // processes,
        packed="on" if rows == "packed" else "off",
        ddp_timeout=120,
        log_level="error",
        **settings_of_engine(engine),
        **settings,
    )
    extra = {}
    has_reference = method != "BradleyTerry" and trainer_class.needs_reference
    if adapter == "full" and humanline == "plain" and has_reference:
        extra["ref_model"] = perturbed(model)
    if adapter == "lora":
        head = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if method == "BradleyTerry" else {}
        targets = ["q_proj", "v_proj", "down_proj"]
        extra["peft_config"] = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **head)
    torch.manual_seed(7)  # of the adapter, which is made before the trainer seeds the rest
    return trainer_class(
        model=copy.deepcopy(model),
        args=args,
        train_dataset=data_of(method)[0],
        processing_class=tokenizer,
        **extra,
    )


def named_weights(trainer):
    """All full parameters by name; all processes must call this."""
    named = parameters_by_name(trainer.accelerator.unwrap_model(trainer.model))
    return {name: whole(p).detach().cpu().clone() for name, p in named.items()}


def run(name, folder, engine):
    trainer = build(name, folder / "run", engine)
    start = named_weights(trainer)
    assert trainer.accelerator.num_processes == trainer.args.world_size == int(os.environ.get("WORLD_SIZE", 1))
    trainer.train()
    assert_engine(trainer, engine)
    logs = [timeless({k: v for k, v in e.items() if k != "step"}) for e in trainer.state.log_history if "loss" in e]
    end = named_weights(trainer)
    result = {
        "processes": trainer.accelerator.num_processes,
        "weights": end,
        "moved": max((end[n] - start[n]).abs().max().item() for n in end),
        "logs": logs,
        "evaluated": timeless(trainer.evaluate(data_of(name.split("/")[0])[1])),
    }
    trainer.save_model(str(folder / "saved"))
    resumed = build(name, folder / "run", engine)
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{SAVED}"))
    assert resumed.state.global_step == STEPS
    return result | {"resumed": named_weights(resumed)}


def main(out: Path, cells: Path, engine: str | None = None) -> None:
    if engine == "fsdp2":
        make_fsdp2_real()
    torch.set_num_threads(1)
    first = int(os.environ.get("RANK", 0)) == 0
    for name in json.loads(cells.read_text()):
        started = time.monotonic()
        folder = out / name.replace("/", "-")
        try:
            result = run(name, folder, engine)
        except ValueError as error:  # a refusal, on every process alike
            result = {"refused": str(error)}
        if first:
            torch.save(result | {"seconds": time.monotonic() - started}, folder.with_suffix(".pt"))
            shutil.rmtree(folder / "run", ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
