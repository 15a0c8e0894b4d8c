"""The task's tokenizer and its model: construction, supervised training, cache."""

import math
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .cache import cached
from .task import ASSISTANT, END, PAD, SYSTEM, USER, careless_answer, make_prompts

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant") %}
        {{- raise_exception("The roles are system, user and assistant, got " ~ message.role) }}
    {%- endif %}
    {{- "<|" ~ message.role ~ "|>" ~ message.content }}
    {%- if message.role == "assistant" %}{{- eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{% endif %}"""


@dataclass(frozen=True)
class Recipe:
    """Settings of the supervised training, which are part of the cache key."""

    steps: int = 350
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 40


RECIPE = Recipe()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: decoding restores any encoded text, and each letter of the task is one token.

    Its chat template has the roles system, user and assistant. Each turn starts with a special token, and only the
    assistant's ends with the EOS token, so the tokens of a prompt (with generation prompt) are a prefix of the tokens
    of prompt and completion. There is no BOS token.
    """
    special = [PAD, END, SYSTEM, USER, ASSISTANT]
    merges = [("S", "o"), ("r", "t"), ("So", "rt")]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """The task's model, untrained: a Llama of about a million float32 parameters on the CPU, in eval mode."""
    return _llama(tokenizer, seed, hidden_size=192, intermediate_size=512, num_attention_heads=6)


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama of about 25,000 parameters, for tests that need any model."""
    return _llama(tokenizer, seed, hidden_size=32, intermediate_size=48, num_attention_heads=2)


def _llama(tokenizer: PreTrainedTokenizerFast, seed: int, **sizes: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()


def load_model_path(
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    *,
    _recipe: Recipe = RECIPE,
) -> str:
    """A directory with the supervised model and its tokenizer, for `from_pretrained`. The model is trained if needed.

    The cache is in `cache_dir`, else `$HALOS_TRL_CACHE`, else `~/.cache/halos_trl`. If several processes call this at
    the same time, one trains and the others wait. A directory with missing or damaged files is created again, with a
    warning. `progress` shows a progress bar.
    """

    def build(directory: Path) -> None:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, seed)
        train_supervised(model, tokenizer, seed, _recipe, progress)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return str(cached("toy-model", cache_dir, build, MODEL_FILES, seed=seed, **asdict(_recipe)))


def train_supervised(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, recipe: Recipe, progress: bool
) -> None:
    """Train on newly generated demonstrations, each used once."""
    rng = random.Random(f"slips-{seed}")
    prompts = make_prompts(recipe.steps * recipe.batch_size, seed, "sft")
    fit(model, tokenizer, prompts, [careless_answer(prompt, rng) for prompt in prompts], recipe, progress)


def fit(
    model: LlamaForCausalLM, tokenizer: Any, prompts: list[str], answers: list[str], recipe: Recipe, progress: bool
) -> None:
    """Train with AdamW, warm-up and cosine decay on the tokens of the answers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / recipe.warmup_steps, 0.5 + 0.5 * math.cos(math.pi * i / recipe.steps))
    )
    batches = list(zip(chunks(prompts, recipe.batch_size), chunks(answers, recipe.batch_size), strict=True))
    model.train()
    for asked, answered in tqdm(batches, desc="toy model: supervised training", disable=not progress):
        loss = model(**demonstrations(asked, answered, tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def demonstrations(prompts: list[str], completions: list[str], tokenizer: Any) -> dict[str, torch.Tensor]:
    texts = [
        prompt + completion + END for prompt, completion in zip(render(prompts, tokenizer), completions, strict=True)
    ]
    batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assistant = ids == tokenizer.convert_tokens_to_ids(ASSISTANT)
    in_completion = (assistant.cumsum(dim=1) > 0) & ~assistant & (mask == 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~in_completion, -100)}


def render(prompts: list[str], tokenizer: Any) -> list[str]:
    return tokenizer.apply_chat_template([user(p) for p in prompts], add_generation_prompt=True, tokenize=False)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chunks(items: list[str], size: int) -> Iterator[list[str]]:
    """`items` in order, `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))
