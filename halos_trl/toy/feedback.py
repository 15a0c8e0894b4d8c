"""Sampling from a model, its accuracy, and feedback on its samples."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cache import cached
from .model import RECIPE, Recipe, chunks, load_model_path, render, user
from .task import LENGTHS, Split, make_prompts, verify

Kind = Literal["unpaired", "paired", "scored"]
Rows = list[dict[str, Any]]

SAMPLES_PER_PROMPT = {"unpaired": 2, "paired": 4, "scored": 8}


def accuracy(model: Any, tokenizer: Any, n: int = 500, seed: int = 0, temperature: float = 1.0) -> float:
    """Fraction of correct completions, one for each of `n` held-out prompts.

    `temperature` 1 samples from the unmodified distribution, 0 takes the most likely token at each step. Works on any
    device and with a `PeftModel`. The model's train or eval mode and the global random state are restored.
    """
    prompts = make_prompts(n, seed, "test")
    completions = sample(model, tokenizer, prompts, seed, temperature)
    return sum(map(verify, prompts, completions)) / n


def load_feedback_data(
    kind: Kind,
    seed: int = 0,
    n: int = 4096,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    *,
    _recipe: Recipe = RECIPE,
) -> DatasetDict:
    """Feedback on samples (temperature 1) of the supervised model of the same seed; cached like the model.

    Split "train" has `n` rows, on prompts that the model was not trained on. Split "test" has an eighth of that, on
    held-out prompts. Both are conversational: a prompt is a user message, a completion an assistant message. Prompts
    with an empty sample (one in thousands) are left out.

    - "unpaired": prompt, completion, label (bool: correct). Two samples for each prompt.
    - "paired": prompt, chosen (correct), rejected (wrong). Prompts whose four samples are all correct or all wrong
      give no pair and are left out.
    - "scored": prompt, completion, score (1.0 correct, 0.0 wrong), prompt_id (int). Eight consecutive rows for each
      prompt; the number of rows is rounded up to whole groups.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}.")
    if n < 1:
        raise ValueError(f"n is the number of training rows and must be at least 1, got {n}.")

    def build(directory: Path) -> None:
        path = load_model_path(seed, cache_dir, progress, _recipe=_recipe)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        train = _feedback_rows(kind, model, tokenizer, seed, "feedback", n, progress)
        test = _feedback_rows(kind, model, tokenizer, seed, "test", math.ceil(n / 8), progress)
        (directory / "rows.json").write_text(json.dumps({"train": train, "test": test}), encoding="utf-8")

    directory = cached(f"toy-{kind}", cache_dir, build, ("rows.json",), seed=seed, n=n, **asdict(_recipe))
    splits = json.loads((directory / "rows.json").read_text(encoding="utf-8"))
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def _feedback_rows(kind: Kind, model: Any, tokenizer: Any, seed: int, split: Split, size: int, progress: bool) -> Rows:
    """Sample completions of further prompts until there are `size` rows."""
    per_prompt = SAMPLES_PER_PROMPT[kind]
    size = math.ceil(size / per_prompt) * per_prompt if kind == "scored" else size
    # a limit, so that a model that is always wrong gives an error instead of an endless search for pairs
    prompts = make_prompts(4 * size + 64, seed, split)
    rows: Rows = []
    with tqdm(total=size, desc=f"toy feedback: {kind}, {split} prompts", disable=not progress) as bar:
        for first in range(0, len(prompts), 256):
            chunk = prompts[first : first + 256]
            repeated = [prompt for prompt in chunk for _ in range(per_prompt)]
            samples = list(chunks(sample(model, tokenizer, repeated, seed * 1_000_003 + first, 1.0), per_prompt))
            for prompt_id, (prompt, group) in enumerate(zip(chunk, samples, strict=True), start=first):
                # some samples (one in thousands) are empty, and trainers refuse completions without a token
                if all(group):
                    rows += _rows_of(kind, prompt, group, prompt_id)
            bar.update(min(len(rows), size) - bar.n)
            if len(rows) >= size:
                return rows[:size]
    raise RuntimeError(f"{len(prompts)} prompts gave {len(rows)} {kind} rows, but {size} were requested.")


def _rows_of(kind: Kind, prompt: str, samples: list[str], prompt_id: int) -> Rows:
    judged = [(assistant_turn(sample), verify(prompt, sample)) for sample in samples]
    if kind == "unpaired":
        return [{"prompt": user(prompt), "completion": sample, "label": right} for sample, right in judged]
    if kind == "scored":
        row = {"prompt": user(prompt), "prompt_id": prompt_id}
        return [{**row, "completion": sample, "score": float(right)} for sample, right in judged]
    chosen = [sample for sample, right in judged if right]
    rejected = [sample for sample, right in judged if not right]
    pairs = zip(chosen[:1], rejected[:1], strict=False)
    return [{"prompt": user(prompt), "chosen": right, "rejected": wrong} for right, wrong in pairs]


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[str], seed: int, temperature: float) -> list[str]:
    device = next(model.parameters()).device
    strategy: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        strategy = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    completions: list[str] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else []):
        # `torch.manual_seed` would also seed the generators of devices that are not restored here
        (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)
        for texts in chunks(render(prompts, tokenizer), 1024):
            batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
            ids = model.generate(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                max_new_tokens=max(LENGTHS) + 4,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
                **strategy,
            )
            completions += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return completions


def assistant_turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
