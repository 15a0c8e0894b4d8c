"""Fixtures: the toy's tokenizer, models of a few thousand parameters, rows, and configs that fit a CPU."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that threads only cost

import copy
import functools
import gc
import importlib.metadata
import logging

import datasets
import pytest
import torch
import transformers

from halos_trl import toy
from halos_trl.sharded import whole

datasets.disable_progress_bars()
torch.set_num_threads(1)
# accelerate parses it at every question whether a package is there: a third of what a short training run takes.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def pytest_collection_modifyitems(config, items):
    """Put files with slow tests first, so that no process waits for one at the end; leave the long tier of the fuzz
    suite out, unless `-m` asks for it.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if "fuzz" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("fuzz")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session):
    """Exempt imported objects from garbage collection, which takes half the time of a training run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _tokenizer():
    return toy.build_tokenizer()


@pytest.fixture
def tokenizer(_tokenizer):
    """The toy's, fresh: trainers set its tokens to what their config says."""
    return copy.deepcopy(_tokenizer)


@pytest.fixture(scope="session")
def _tiny(_tokenizer):
    return toy.tiny_model(_tokenizer)


@pytest.fixture
def model(_tiny):
    """A fresh policy with a fixed initialization."""
    return copy.deepcopy(_tiny)


@pytest.fixture
def other_model(_tiny):
    """A model near the policy, to serve as a reference that differs from it."""
    return perturbed(_tiny)


def perturbed(model, scale=0.02, seed=5):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def unpaired_rows(n, seed=0):
    """Conversational rows of prompt, completion, label; two desirable ones to one undesirable."""
    prompts = toy.make_prompts(n, seed, "feedback")
    return datasets.Dataset.from_list(
        [
            {
                "prompt": user(prompt),
                "completion": assistant(toy.answer(prompt) if i % 3 else "ba"),
                "label": bool(i % 3),
            }
            for i, prompt in enumerate(prompts)
        ]
    )


def paired_rows(n, seed=0):
    prompts = toy.make_prompts(n, seed, "feedback")
    return datasets.Dataset.from_list(
        [
            {"prompt": user(p), "chosen": assistant(toy.answer(p)), "rejected": assistant(toy.answer(p)[::-1] + "a")}
            for p in prompts
        ]
    )


CPU_SETTINGS = {
    "max_steps": 3,
    # Plain gradient descent, so that weights are as comparable as gradients. Adam divides by a gradient's own size:
    # where that is near 0 it makes a whole step of a rounding error, and hides a wrong factor everywhere else.
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
"""Three quiet, deterministic steps on a CPU."""


def cpu_config(config_class, output_dir, **overrides):
    """`cpu_config(KTOConfig, folder, beta=0.5)`: `CPU_SETTINGS`, changed."""
    settings = {"output_dir": str(output_dir)} | CPU_SETTINGS | overrides
    if "train_sampling_strategy" not in config_class.__dataclass_fields__:  # before transformers 5.2
        settings.pop("train_sampling_strategy", None)
    return config_class(**settings)


@pytest.fixture
def make_config(tmp_path):
    """`make_config(KTOConfig, beta=0.5)`: a config for the test's own folder."""
    return functools.partial(cpu_config, output_dir=tmp_path / "out")


IMAGE = "<image>"
IMAGE_TEMPLATE = (
    "{%- for message in messages %}{{- '<|' + message['role'] + '|>' }}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}<image>{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- if message['role'] == 'assistant' %}<|end|>{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{%- endif %}"
)


@pytest.fixture(scope="session")
def vision():
    """A Llava of a few thousand parameters and its processor, built without a download; images have 8 x 8 pixels."""
    pytest.importorskip("PIL")
    tokenizer = toy.build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = None  # the processor has one
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default", image_token=IMAGE,
        num_additional_image_tokens=1, chat_template=IMAGE_TEMPLATE,
    )  # fmt: skip
    small = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, **small),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=128, bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **small,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlavaForConditionalGeneration(config).float(), processor


def weights(model):
    """All parameters in one vector; with a sharded model, all processes must call this."""
    return torch.cat([whole(p).flatten() for p in model.parameters()])


@pytest.fixture
def said(caplog):
    """Everything the libraries warned about, as one string."""
    caplog.set_level(logging.WARNING)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)
