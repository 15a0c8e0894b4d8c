"""References that are rounded, quantized or streamed: numbers, bytes, sync, checkpoints."""

import copy

import pytest
import torch
from conftest import paired_rows, perturbed, unpaired_rows, weights
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from halos_trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SimPOConfig
from halos_trl._trl import score_tokens
from halos_trl.reference import REFERENCE_FILE
from halos_trl.sharded import by_layer, parameters_by_name
from halos_trl.storage import bytes_of, parameters_of, quantized_layers, store, weights_of

CPU = torch.device("cpu")
QUANTIZED = ["8bit", "4bit"]
STORAGES = ["bf16", *QUANTIZED, "cpu"]


@pytest.fixture(autouse=True)
def _has_bitsandbytes(request):
    if getattr(request.node, "callspec", None) and set(QUANTIZED) & set(
        map(str, request.node.callspec.params.values())
    ):
        pytest.importorskip("bitsandbytes")


@pytest.fixture
def make(model, tokenizer, make_config):
    def build(storage="same", method="dpo", *, policy=None, ref_model=None, peft_config=None, **settings):
        trainer_class, config_class, rows = {
            "dpo": (DPOTrainer, DPOConfig, paired_rows),
            "kto": (KTOTrainer, KTOConfig, unpaired_rows),
        }[method]
        settings = {"train_sampling_strategy": "sequential", "reference_storage": storage} | settings
        return trainer_class(
            copy.deepcopy(model) if policy is None else policy,
            ref_model,
            make_config(config_class, **settings),
            train_dataset=rows(24),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return build


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def unpacked(model, storage):
    """The weights that a stored model computes with, in float64, by arithmetic of its own."""
    import bitsandbytes as bnb

    found = {name: tensor.double() for name, tensor in parameters_of(model).items()}
    for name, layer in quantized_layers(model).items():
        if storage == "8bit":  # each row has a scale, and 127 is its largest value
            parts = {part: weights_of(model)[f"{name}{part}"] for part in ("", ".SCB")}
            found[name] = parts[""].double() * parts[".SCB"].double()[:, None] / 127
        else:
            found[name] = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    return found


# -- what a storage costs and how far off it is --------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "rounding"), [("bf16", None), ("8bit", 0.5 / 127), ("4bit", 0.16)])
def test_stored_weights_are_the_nearest_that_the_storage_has(model, storage, rounding):
    stored = store(copy.deepcopy(model), storage, CPU)
    for name, weight in parameters_of(model).items():
        apart = (unpacked(stored, storage)[name] - weight.double()).abs()
        if name not in quantized_layers(stored):
            assert (apart <= 2**-8 * weight.abs()).all(), name
        else:  # of the largest value of a row or block; 0.16 is half of NF4's widest gap, and its scales are rounded
            assert apart.max() <= rounding * 1.05 * weight.abs().max(), name
            assert apart.max() > rounding * 0.3 * weight.abs().max(), name


@pytest.mark.parametrize(("storage", "tolerance"), [("bf16", 0.01), ("8bit", 0.02), ("4bit", 0.02), ("cpu", 0)])
def test_log_probs_are_those_of_the_stored_weights(make, storage, tolerance):
    """What remains is the rounding of activations: bfloat16, or the 8 bits of LLM.int8."""
    trainer = make(storage)
    exact = copy.deepcopy(trainer.model).double()
    for name, parameter in exact.named_parameters():
        parameter.data = unpacked(trainer.ref_model, storage)[name]
    batch = first_batch(trainer)
    with torch.no_grad():
        expected = score_tokens(exact, batch).logps_BT
    got = trainer.reference.log_probs(batch)
    assert (got - expected).abs().max() <= max(tolerance, 1e-5)
    if storage == "cpu":
        torch.testing.assert_close(got, make().reference.log_probs(batch), rtol=0, atol=0)


def test_bytes_of_each_storage(model):
    head = model.get_output_embeddings().weight
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight is not head]
    quantized, rows = sum(m.weight.numel() for m in linear), sum(m.weight.shape[0] for m in linear)
    rest = sum(p.numel() for p in model.parameters()) - quantized
    blocks = sum(-(-m.weight.numel() // 64) for m in linear)  # a byte each, and of 256 of them and each layer a float
    expected = {
        "same": 4 * (quantized + rest),
        "bf16": 2 * (quantized + rest),
        "8bit": quantized + 4 * rows + 2 * rest,
        "4bit": quantized // 2
        + blocks
        + sum(4 * -(-m.weight.numel() // 64 // 256) for m in linear)
        + 4 * len(linear)
        + 2 * rest,
        "cpu": 4 * (quantized + rest),
    }
    for storage, size in expected.items():
        assert bytes_of(store(copy.deepcopy(model), storage, CPU)) == size, storage
    sizes = list(expected.values())
    assert sizes[:4] == sorted(sizes[:4], reverse=True)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # of a process of several
def test_streamed_weights_are_there_one_module_at_a_time(model, device):
    streamed = store(copy.deepcopy(model), "cpu", torch.device(device))
    head, present = streamed.get_output_embeddings(), []

    def note(module, args):
        present.append({name for name, p in streamed.named_parameters() if p.device.type != "meta"})

    assert all(p.device.type == "meta" for p in streamed.parameters())
    for module in streamed.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, args, output: note(module, args))
    ids = torch.arange(12)[None]
    torch.testing.assert_close(streamed(ids).logits, model(ids).logits, rtol=0, atol=0)
    heads = {name for name, p in streamed.named_parameters() if name.startswith("lm_head")}
    assert head is not None and all(len(names - heads) <= 1 for names in present)
    assert all(p.device.type == "meta" for p in streamed.parameters())
    assert streamed.to("cpu", torch.float64) is streamed
    assert store(streamed, "cpu", CPU) is streamed, "a second trainer may have the same `ref_model`"


# -- training ------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """The policy before each step, the reference after it."""

    def __init__(self):
        self.before, self.reference = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append(copy.deepcopy(model).requires_grad_(False))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.reference.append({n: t.clone() for n, t in self.trainer.reference.tensors(model).items()})


@pytest.mark.parametrize(("storage", "method"), [*((storage, "dpo") for storage in STORAGES), ("4bit", "kto")])
def test_reference_under_humanline_is_the_stored_policy_of_one_step_ago(make, storage, method):
    trainer, watch = make(storage, method, humanline=True), Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    trainer.train()
    for before, reference in zip(watch.before, watch.reference, strict=True):
        expected = weights_of(store(before, storage, CPU))
        assert expected.keys() == reference.keys()
        assert all(torch.equal(reference[name], tensor) for name, tensor in expected.items())
    assert not all(torch.equal(t, watch.reference[0][name]) for name, t in watch.reference[-1].items())


@pytest.mark.parametrize("storage", [*QUANTIZED, "cpu"])
def test_a_moving_stored_reference_resumes_bit_for_bit(make, tmp_path, storage):
    settings = {"humanline": True, "save_strategy": "steps", "save_steps": 2, "full_determinism": True}
    whole = make(storage, **settings)
    whole.train()
    resumed = make(storage, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert (tmp_path / "out" / "checkpoint-2" / REFERENCE_FILE).exists()
    assert torch.equal(weights(whole.model), weights(resumed.model))
    for name, tensor in whole.reference.tensors(whole.model).items():
        assert torch.equal(tensor, resumed.reference.tensors(resumed.model)[name]), name


def test_a_checkpoint_of_another_storage_is_refused(make, tmp_path):
    make("bf16", humanline=True, save_strategy="steps", save_steps=2).train()
    other = make("same", humanline=True, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="reference_storage"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_a_model_from_another_device_follows_in_all_of_its_parts(tokenizer, monkeypatch):
    """If moving to the CPU copies tensors, as from a GPU, tied weights stay tied and no module keeps its own copy."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size)).eval()
    stored, to = copy.deepcopy(tied), torch.Tensor.to

    def as_from_a_gpu(tensor, *args, **kwargs):
        moved = to(tensor, *args, **kwargs)
        return moved.clone() if args == ("cpu",) else moved

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", as_from_a_gpu)
        store(stored, "cpu", CPU)
    for name, parameter in tied.named_parameters():
        parameter.data = parameter.data + 1
        parameters_of(stored)[name].copy_(parameter.data)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(stored(ids).logits, tied(ids).logits, rtol=0, atol=0)


def test_tr_dpo_mixes_into_what_is_rounded_or_streamed(make):
    """Steps of plain descent are far above the rounding of bfloat16."""
    mixed = {}
    for storage in ("same", "bf16", "cpu"):
        trainer = make(storage, sync_ref_model=True, ref_model_mixup_alpha=0.5, ref_model_sync_steps=1)
        trainer.train()
        mixed[storage] = torch.cat([t.flatten().double() for t in parameters_of(trainer.ref_model).values()])
    torch.testing.assert_close(mixed["cpu"], mixed["same"], rtol=0, atol=0)
    torch.testing.assert_close(mixed["bf16"], mixed["same"], rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("storage", ["4bit", "cpu"])
def test_a_policy_that_is_loaded_from_a_folder(make, model, tokenizer, tmp_path, storage):
    model.save_pretrained(tmp_path / "policy")
    trainer = make(storage, policy=str(tmp_path / "policy"), packed="off")
    trainer.train()
    expected = weights_of(store(copy.deepcopy(model), storage, CPU))
    for name, tensor in trainer.reference.tensors(trainer.model).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("storage", ["8bit", "4bit"])
def test_packed_rows_and_mixed_precision(make, storage):
    trainer = make(storage, bf16=True, packed="on")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=5e-3)


def test_a_reference_that_was_passed_may_be_streamed(make, model, other_model):
    plain = make(ref_model=copy.deepcopy(other_model))
    streamed = make("cpu", ref_model=copy.deepcopy(other_model), humanline=True)
    batch = first_batch(plain)
    expected = plain.reference.log_probs(batch)
    assert torch.equal(streamed.reference.log_probs(batch), expected)
    streamed.train()
    assert not torch.equal(streamed.reference.log_probs(batch), expected)


@pytest.mark.parametrize("storage", ["4bit"])
def test_the_start_is_still_compared(make, model, storage):
    trainer = make(storage)
    trainer.model.load_state_dict(perturbed(model, scale=0.5).state_dict())
    with pytest.raises(ValueError, match="differs from its reference"):
        trainer.train()


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage": "2bit"}, "reference_storage='2bit'"),
        ({"storage": "bf16", "precompute_ref_log_probs": True}, "needs no reference model"),
        ({"storage": "4bit", "sync_ref_model": True}, "changes smaller than the quantization step would be lost"),
        ({"storage": "4bit", "peft_config": LoraConfig(task_type="CAUSAL_LM")}, "quantization_config"),
    ],
)
def test_settings_that_cannot_work(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(("storage", "remedy"), [("bf16", "dtype=torch.bfloat16"), ("4bit", "BitsAndBytesConfig")])
def test_a_reference_that_was_passed_is_not_rewritten(make, other_model, storage, remedy):
    with pytest.raises(ValueError, match=remedy):
        make(storage, ref_model=other_model)


def test_methods_without_a_reference(make_config):
    with pytest.raises(ValueError, match="reference_storage='bf16'"):
        make_config(SimPOConfig, reference_storage="bf16")


def test_quantized_references_copy_the_policy_whole(make):
    make("8bit", sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1).train()


def test_without_bitsandbytes(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        store(model, "8bit", CPU)


# -- sharded references --------------------------------------------------------------------------------------------


def test_what_is_gathered_at_a_time_is_a_layer_or_a_module_outside_of_them(model):
    groups = by_layer(parameters_by_name(model))
    assert sorted(name for names in groups for name in names) == sorted(parameters_by_name(model))
    assert groups[0] == ["model.embed_tokens.weight"]
    assert ["model.norm.weight"] in groups
    layers = [names for names in groups if names[0].startswith("model.layers.")]
    assert len(layers) == model.config.num_hidden_layers
    for number, names in enumerate(layers):
        assert all(name.startswith(f"model.layers.{number}.") for name in names)
    adapters = [
        "base.model.layers.3.q.lora_A.ref.weight",
        "base.model.layers.3.q.lora_B.ref.weight",
        "transformer.h.0.w",
    ]
    assert by_layer(adapters) == [adapters[:2], adapters[2:]]
