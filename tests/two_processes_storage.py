"""Runs with each `reference_storage` that `every_engine.py` makes in every process, and the engines that refuse it."""

import os

import pytest
import torch
from accelerate.utils import gather_object
from conftest import cpu_config, paired_rows, weights
from transformers import TrainerCallback
from two_processes import assert_engine, settings_of_engine

from halos_trl import DPOConfig, DPOTrainer, toy
from halos_trl.sharded import parameters_by_name, whole
from halos_trl.storage import store, weights_of

STORAGES = ("bf16", "8bit", "4bit", "cpu")
STEPS = 3


def make(out, engine, storage):
    tokenizer = toy.build_tokenizer()
    per_device = 8 // int(os.environ.get("WORLD_SIZE", 1))
    args = cpu_config(
        DPOConfig,
        out,
        max_steps=STEPS,
        humanline=True,
        humanline_sync_steps=2,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=per_device,
        reference_storage=storage,
        **settings_of_engine(engine),
    )
    return DPOTrainer(
        model=toy.tiny_model(tokenizer), args=args, train_dataset=paired_rows(24), processing_class=tokenizer
    )


class PolicyBefore(TrainerCallback):
    """A bare copy of the policy as it was before the second step, which is the only one that moves the reference."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.policy = toy.tiny_model(toy.build_tokenizer())
            weights_before = {name: whole(p) for name, p in parameters_by_name(model).items()}
            for name, parameter in self.policy.named_parameters():
                parameter.data.copy_(weights_before[name])


def held(trainer):
    return {name: whole(tensor).clone() for name, tensor in trainer.reference.tensors(trainer.model).items()}


def run(out, engine, storage):
    trainer, before = make(out, engine, storage), PolicyBefore()
    trainer.add_callback(before)
    start = held(trainer)
    trainer.train()
    assert_engine(trainer, engine)
    end, copied = held(trainer), weights_of(store(before.policy, storage, torch.device("cpu")))
    assert end.keys() == copied.keys()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in end.items())
    return {"start": start, "end": gather_object([end]), "weights": weights(trainer.model)}


def runs(out, engine):
    """By storage: how a run under humanline ended, or the message that refuses it."""
    results = {}
    zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    for storage in STORAGES:
        if zero3 or (engine == "fsdp2" and storage != "bf16"):
            with pytest.raises(ValueError, match="cannot work under") as refused:
                make(out / f"refused {storage}", engine, storage)
            results[storage] = str(refused.value)
        else:
            results[storage] = run(out / f"stored {storage}", engine, storage)
    return results
