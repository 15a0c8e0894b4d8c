"""Tests that need a GPU: kernels, half precision, TRL's fused head on CUDA, and training on packed rows.

make gpu
"""

import copy
import importlib.util

import pytest
import torch
from conftest import cpu_config, paired_rows, perturbed, weights
from peft import LoraConfig
from test_packed_backends import SETTINGS, call_of, with_gradients
from test_packed_forward import SHAPES, batch_of, fused, random_rows
from test_packed_training import SETTINGS as METHODS
from test_packed_training import lines
from test_packed_training import rows as rows_of
from transformers import LlamaConfig, LlamaForCausalLM

import halos_trl
from halos_trl import BradleyTerryConfig, BradleyTerryTrainer
from halos_trl.forward.backends import BACKENDS, attend, by_spans, why_not
from halos_trl.forward.packing import give_packing, packing_of
from halos_trl.forward.score import score_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KERNELS = {kernel.name: kernel for kernel in BACKENDS["cuda"]}
HALF, EXACT = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def exact_matmuls():
    """The results of float32 are compared, so it is not to be rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(call, dtype):
    query, key, value = (x.detach().cuda().to(dtype).requires_grad_() for x in (call.query, call.key, call.value))
    return call._replace(query=query, key=key, value=value)


# -- kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, torch.float16, EXACT], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_gives_the_attention_of_the_spans(name, settings, dtype):
    kernel = KERNELS[name]
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    call = on_gpu(call_of(torch.float64, **settings), dtype)
    if not kernel.serves(call):
        pytest.skip(f"{name} does not serve {dtype} with {settings}")
    assert why_not(kernel, call) is None
    exact = on_gpu(call_of(torch.float64, **settings), torch.float64)
    tolerance = 1e-3 if dtype == EXACT else 0.05
    for ours, expected in zip(with_gradients(kernel.compute, call), with_gradients(by_spans, exact), strict=True):
        scale = expected.abs().max().clamp(min=1)
        assert (ours.double() - expected).abs().max() <= tolerance * scale


def test_some_kernel_serves_half_precision():
    call = on_gpu(call_of(), HALF)
    assert any(kernel.serves(call) and why_not(kernel, call) is None for kernel in KERNELS.values())
    torch.testing.assert_close(attend(call).float(), by_spans(call).float(), rtol=0, atol=0.05)


# -- forward passes ------------------------------------------------------------------------------------------------


def llama(dtype, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **settings,
    )  # fmt: skip
    return fused(LlamaForCausalLM(config).cuda().to(dtype))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [HALF, EXACT], ids=str)
def test_packed_rows_give_what_padded_rows_give(dtype, shapes, checkpointing):
    padded, batch = llama(dtype).train(), {k: v.cuda() for k, v in batch_of(random_rows(shapes)).items()}
    packed = copy.deepcopy(padded)
    give_packing([packed], "on")
    if checkpointing:
        for model in (padded, packed):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    tables = [score_tokens(model, batch) for model in (padded, packed)]
    assert packing_of(packed).active
    apart = (tables[0].logps_BT - tables[1].logps_BT).float().abs()[tables[0].mask_BT]
    assert apart.max() <= 1e-4 if dtype == EXACT else apart.mean() <= 0.05
    for tokens in tables:
        tokens.logps_BT.float().sum().backward()
    for (name, p), q in zip(padded.named_parameters(), packed.parameters(), strict=True):
        limit = 1e-3 if dtype == EXACT else 0.05
        assert (p.grad.float() - q.grad.float()).norm() <= limit * p.grad.float().norm(), name


def test_fused_head_gives_the_log_probs_of_the_logits():
    model, batch = llama(EXACT), {k: v.cuda() for k, v in batch_of(random_rows(SHAPES["pairs"])).items()}
    give_packing([model], "on")
    with torch.no_grad():
        tokens = score_tokens(model, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps_BT = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(tokens.logps_BT, logps_BT * tokens.mask_BT, rtol=0, atol=1e-4)


def test_self_check_notices_a_wrong_kernel(monkeypatch, said):
    from halos_trl.forward import attention

    monkeypatch.setattr(attention, "attend", lambda call: by_spans(call).roll(1, dims=1))
    model, batch = llama(EXACT), {k: v.cuda() for k, v in batch_of(random_rows(SHAPES["pairs"])).items()}
    give_packing([model], "auto")
    score_tokens(model, batch)
    assert not packing_of(model).active and "differ by" in said()


# -- training ------------------------------------------------------------------------------------------------------


def gpu_config(config_class, folder, **settings):
    return cpu_config(config_class, folder, use_cpu=False, **settings)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_three_steps(method, bf16, lora, model, tokenizer, tmp_path):
    def run(packed):
        settings = {"packed": packed, "bf16": bf16, "gradient_checkpointing": lora}
        args = gpu_config(
            getattr(halos_trl, f"{method}Config"), tmp_path / packed, train_sampling_strategy="sequential",
            **settings | METHODS[method],
        )  # fmt: skip
        reference = {} if lora or method in ("SimPO", "SLiC") else {"ref_model": perturbed(model)}
        trainer = getattr(halos_trl, f"{method}Trainer")(
            copy.deepcopy(model), args=args, train_dataset=rows_of(method), processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian") if lora else None,
            **reference,
        )  # fmt: skip
        trainer.train()
        assert packing_of(trainer.model).active == (packed == "on")
        return trainer

    packed, padded = run("on"), run("off")
    apart = (weights(packed.model) - weights(padded.model)).abs().max()
    assert apart <= (1e-2 if bf16 else 1e-5)
    for ours, theirs in zip(lines(packed), lines(padded), strict=True):
        assert set(ours) == set(theirs)
        if "loss" in theirs:
            assert ours["loss"] == pytest.approx(
                theirs["loss"], rel=0.05 if bf16 else 1e-4, abs=0.02 if bf16 else 1e-5
            )


def test_three_steps_of_a_reward_model(tokenizer, tmp_path):
    from test_packed_rewards import reward_model

    def run(packed):
        args = gpu_config(BradleyTerryConfig, tmp_path / packed, packed=packed, bf16=True)
        trainer = BradleyTerryTrainer(
            reward_model(), args=args, train_dataset=paired_rows(24), processing_class=tokenizer
        )
        trainer.train()
        assert packing_of(trainer.model).active == (packed == "on")
        return weights(trainer.model)

    assert (run("on") - run("off")).abs().max() <= 1e-2
