"""`halos-trl plan`: estimates compared with byte counts of real runs, and the printed output."""

import contextlib
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import paired_rows, unpaired_rows
from peft import LoraConfig
from transformers import TrainerCallback

from halos_trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from halos_trl._trl import score_tokens
from halos_trl.cli.main import help_text
from halos_trl.cli.main import main as halos_trl
from halos_trl.cli.plan import shape_of, shape_of_model
from halos_trl.memory import Run, activations, cast_weights, references, state
from halos_trl.storage import bytes_of, store

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.bytes = nbytes(p.grad for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("dtype", "lora"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_policy_gradients_and_optimizer_are_those_of_a_run(model, tokenizer, make_config, dtype, lora):
    shape, gradients = shape_of_model(model), Gradients()
    run = Run(weight_bytes=4 if dtype == "float32" else 2, lora_rank=4)
    trainer = KTOTrainer(
        model.to(getattr(torch, dtype)),
        args=make_config(KTOConfig, max_steps=1, optim="adamw_torch"),
        train_dataset=unpaired_rows(8),
        processing_class=tokenizer,
        callbacks=[gradients],
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    trainer.train()
    moments = [t for s in trainer.optimizer.state.values() for name, t in s.items() if name != "step"]
    assert state(shape, run, "lora" if lora else "full") == {
        "policy": nbytes(trainer.model.parameters()),
        "gradients": gradients.bytes,
        "AdamW": nbytes(moments),
    }


def test_references_are_as_large_as_stored_ones(model):
    pytest.importorskip("bitsandbytes")
    planned = references(shape_of_model(model), Run(weight_bytes=4), "full")
    for storage in ("same", "bf16", "8bit"):
        assert planned[storage] == bytes_of(store(copy.deepcopy(model), storage, CPU)), storage
    # Blocks of tiny layers are not full.
    assert planned["4bit"] == pytest.approx(bytes_of(store(copy.deepcopy(model), "4bit", CPU)), rel=0.01)


@pytest.mark.parametrize(("bf16", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_activations_are_near_what_autograd_keeps(model, tokenizer, make_config, bf16, checkpointing):
    trainer = DPOTrainer(
        model,
        args=make_config(DPOConfig, packed="off", per_device_train_batch_size=16),
        train_dataset=paired_rows(16),
        processing_class=tokenizer,
    )
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its address is not given away again
        return tensor

    batch = next(iter(trainer.get_train_dataloader()))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    precision = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), precision:
        score_tokens(trainer.model.train(), batch)
    measured = sum(storage.nbytes() for storage in kept.values())
    shape = shape_of_model(model)
    run = Run(compute_bytes=2 if bf16 else 4, tokens=batch["input_ids"].numel(), checkpointing=checkpointing)
    planned = activations(shape, run) + cast_weights(shape, run, "full")
    if checkpointing:  # what one layer needs comes in the backward pass
        one = Run(compute_bytes=4, tokens=run.tokens)
        two_layers = activations(shape, one)
        norm = run.tokens * shape.hidden * 12
        planned -= (two_layers - norm) / shape.layers
    print("planned over measured", planned / measured)
    assert planned == pytest.approx(measured, rel=0.25)


def test_sizes_have_the_parameters_of_the_published_models():
    """The counts on the model cards of Llama 3.2 1B, Llama 3.1 8B and 70B."""
    counts = [shape_of(size)[0].parameters for size in ("1B", "8B", "70B")]
    assert counts == [1_235_814_400, 8_030_261_248, 70_553_706_496]
    shape, assumed = shape_of("3B")
    assert shape.parameters == pytest.approx(3e9, rel=0.02)
    assert "layers" in assumed


def test_engines_divide_what_they_shard():
    shape = shape_of("1B")[0]
    full = state(shape, Run(weight_bytes=2), "full")
    parts = {
        engine: state(shape, Run(engine=engine, devices=4, weight_bytes=2), "full") for engine in ("ddp", "fsdp2")
    }
    assert parts["ddp"] == full
    assert parts["fsdp2"] == {part: size / 4 for part, size in full.items()}
    # 16-bit weights and gradients, and beside the two moments float32 weights.
    zero2 = state(shape, Run(engine="zero2", devices=4), "full")
    n = shape.parameters
    assert zero2 == {"policy": 2 * n, "gradients": 2 * n / 4, "AdamW": 12 * n / 4}
    assert references(shape, Run(engine="fsdp2", devices=4), "full")["8bit"] is None
    assert references(shape, Run(moves=True), "full")["precomputed"] is None


# -- the command ---------------------------------------------------------------------------------------------------


def test_a_listing(capsys, model, tmp_path):
    model.save_pretrained(tmp_path)
    flags = ["--engine", "one_device", "--dtype", "bfloat16", "--method", "dpo", "--gpu_memory", "24"]
    assert halos_trl(["plan", "--model", "8B", *flags]) == 0
    said = capsys.readouterr().out
    assert "8.03 billion parameters" in said
    assert re.search(r"^policy +16\.06 +16\.2\d +5\.\d\d$", said, flags=re.M)
    assert re.search(r"^reference: cpu +2\.10 ", said, flags=re.M)
    assert re.search(r"^one_device +\S+ no +\d+\.\d +\d+\.\d$", said, flags=re.M)
    for source in (tmp_path, tmp_path / "config.json"):
        assert halos_trl(["plan", "--model", str(source), "--method", "simpo"]) == 0
        assert "reference:" not in capsys.readouterr().out.split("Assumed")[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "no/such/folder"], "no size such as 8B"),
        (["--max_length", "0"], "max_length"),
        (["--packed_share", "1.5"], "packed_share"),
        (["--gpu_memory", "nan"], "gpu_memory"),
        (["--model", "0.1B"], "from 0.3B to 1000B"),
        (["--model", "9999B"], "from 0.3B to 1000B"),
    ],
)
def test_what_cannot_be_planned(capsys, flags, message):
    assert halos_trl(["plan", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "num_attention_heads": 0}, "--model"),
        ({"model_type": "gpt2", "n_layer": 1}, "torch.nn.Linear"),
        ({"model_type": "mamba", "num_hidden_layers": 1}, "num_attention_heads"),
        ({"model_type": "t5"}, "decoder-only"),
    ],
)
def test_configs_that_cannot_be_planned(capsys, tmp_path, config, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert halos_trl(["plan", "--model", str(path)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_table_in_the_docs_is_the_command_s(capsys):
    page = (ROOT / "docs" / "scaling.md").read_text()
    command = re.search(r"`halos-trl (plan --model 1B 8B 70B[^`]*)`", page)[1]
    assert halos_trl(command.split()) == 0
    assert capsys.readouterr().out.strip() in page


def test_help_fits_one_screen():
    assert len(help_text().splitlines()) <= 24
