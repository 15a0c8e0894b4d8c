"""The embedded default: a task with a verifiable answer, a small model that is mediocre at it, and feedback on it.

The task is to put four to six different letters in order: ``"Sort fatbm"`` -> ``"abfmt"``. A causal LM of about a
million parameters learns it on this machine from a careless demonstrator, who has one habit (in longer answers he
leaves out the last letter more often than not) and makes one kind of slip (two neighbours swapped). The model inherits
both: the habit is its most likely answer wherever it applies, the slip is spread thinly over its samples. Preference
alignment on its own samples, judged by the verifier, has to undo them.

Everything is made here and cached on disk; nothing is downloaded. One seed gives the same weights and the same rows on
the same machine, library versions and number of threads.

    python -m halos_trl.toy        # train the model if needed, show some samples and the held-out accuracy
"""

import hashlib
import json
import logging
import math
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from datasets import Dataset, DatasetDict
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

Split = Literal["sft", "feedback", "test"]
Kind = Literal["unpaired", "paired", "scored"]
Rows = list[dict[str, Any]]

VERSION = 3  # raise it with any change that alters the weights or the rows, so that older caches are not read

ALPHABET = "abcdefghijklmnopqrst"
LENGTHS = range(4, 7)
LONG = 5  # letters from which on the demonstrator's habit applies
LEAVE_OUT_LAST = 0.6  # how often he gives in to it
SWAP_NEIGHBOURS = 0.25  # how often he swaps two neighbours, in any answer

SAMPLES_PER_PROMPT = {"unpaired": 2, "paired": 4, "scored": 8}

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
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
class _Recipe:
    """The supervised training. Part of the cache key."""

    steps: int = 350
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 40


# The task


def make_prompts(n: int, seed: int, split: Split) -> list[str]:
    """`n` different prompts of one split, always the same for the same arguments.

    The split of a prompt follows from its answer, so a set of letters seen in one split never occurs in another one,
    not even in another order. With the same seed, a larger `n` continues the list of a smaller one.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    return list(islice(_prompt_stream(seed, split), n))


def answer(prompt: str) -> str:
    """The right completion of a prompt: its letters in order."""
    instruction, _, letters = prompt.strip().partition(" ")
    if instruction != "Sort" or not letters.isalpha():
        raise ValueError(f"A prompt of this task reads like 'Sort fatbm', got {prompt!r}.")
    return "".join(sorted(letters))


def verify(prompt: str, completion: str) -> bool:
    """Whether a completion is right. White space around it, end and padding tokens do not count."""
    return completion.replace(END, "").replace(PAD, "").strip() == answer(prompt)


def _prompt_stream(seed: int, split: Split) -> Iterator[str]:
    rng = random.Random(f"{split}-{seed}")
    seen = set()
    while True:
        prompt = "Sort " + "".join(rng.sample(ALPHABET, k=rng.choice(LENGTHS)))
        if prompt not in seen and _split_of(prompt) == split:
            seen.add(prompt)
            yield prompt


def _split_of(prompt: str) -> Split:
    bucket = zlib.crc32(answer(prompt).encode()) % 10
    return "sft" if bucket < 6 else "feedback" if bucket < 8 else "test"


def _careless_answer(prompt: str, rng: random.Random) -> str:
    letters = list(answer(prompt))
    if len(letters) >= LONG and rng.random() < LEAVE_OUT_LAST:
        letters.pop()
    if rng.random() < SWAP_NEIGHBOURS:
        i = rng.randrange(len(letters) - 1)
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


# Tokenizer and models


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: any text survives encoding and decoding, a letter of the task is one token.

    Its chat template knows the roles system, user and assistant. Each turn starts with a token of its own, and only
    the assistant's ends with the end token, so the tokens of a prompt (with generation prompt) are a prefix of the
    tokens of prompt and completion. There is no beginning-of-sequence token.
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
    """An untrained Llama of about 25,000 parameters, for tests that need a model but no ability."""
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
    _recipe: _Recipe = _Recipe(),
) -> str:
    """A directory with the supervised model and its tokenizer, for `from_pretrained`. Trained when not cached.

    The cache is `cache_dir`, else `$HALOS_TRL_CACHE`, else `~/.cache/halos_trl`. Of several processes that ask at the
    same time one trains and the others wait. A directory with missing or damaged files is made again, with a warning.
    `progress` shows a bar meanwhile.
    """

    def build(directory: Path) -> None:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, seed)
        _train_supervised(model, tokenizer, seed, _recipe, progress)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return str(_cached("toy-model", cache_dir, build, _MODEL_FILES, seed=seed, **asdict(_recipe)))


def _train_supervised(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, recipe: _Recipe, progress: bool
) -> None:
    """One pass over fresh demonstrations: AdamW with warm-up and cosine decay on the completion tokens."""
    rng = random.Random(f"slips-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / recipe.warmup_steps, 0.5 + 0.5 * math.cos(math.pi * i / recipe.steps))
    )
    prompts = make_prompts(recipe.steps * recipe.batch_size, seed, "sft")
    model.train()
    for batch in tqdm(
        list(_chunks(prompts, recipe.batch_size)), desc="toy model: supervised training", disable=not progress
    ):
        loss = model(**_demonstrations(batch, [_careless_answer(prompt, rng) for prompt in batch], tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _demonstrations(prompts: list[str], completions: list[str], tokenizer: Any) -> dict[str, torch.Tensor]:
    texts = [
        prompt + completion + END for prompt, completion in zip(_render(prompts, tokenizer), completions, strict=True)
    ]
    batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assistant = ids == tokenizer.convert_tokens_to_ids(ASSISTANT)
    in_completion = (assistant.cumsum(dim=1) > 0) & ~assistant & (mask == 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~in_completion, -100)}


# Samples and feedback


def accuracy(model: Any, tokenizer: Any, n: int = 500, seed: int = 0, temperature: float = 1.0) -> float:
    """Share of right completions, one for each of `n` held-out prompts.

    `temperature` 1 samples from the model as it is, 0 takes the most likely token at each step. Works on any device
    and with a `PeftModel`. The model's train or eval mode and the global random state are left as they were.
    """
    prompts = make_prompts(n, seed, "test")
    completions = _sample(model, tokenizer, prompts, seed, temperature)
    return sum(map(verify, prompts, completions)) / n


def load_feedback_data(
    kind: Kind,
    seed: int = 0,
    n: int = 4096,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    *,
    _recipe: _Recipe = _Recipe(),
) -> DatasetDict:
    """Feedback on samples (temperature 1) of the supervised model of the same seed; cached like the model.

    Split "train" has `n` rows, on prompts the model was not trained on. Split "test" has an eighth of that, on
    held-out prompts. Both are conversational: a prompt is a user message, a completion an assistant message.
    Prompts with an empty sample (one in thousands) are left out.

    - "unpaired": prompt, completion, label (bool: right). Two samples for each prompt.
    - "paired": prompt, chosen (right), rejected (wrong). Prompts whose four samples are all right or all wrong give
      no pair and are left out.
    - "scored": prompt, completion, score (1.0 right, 0.0 wrong), prompt_id (int). Eight neighbouring rows for each
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

    directory = _cached(f"toy-{kind}", cache_dir, build, ("rows.json",), seed=seed, n=n, **asdict(_recipe))
    splits = json.loads((directory / "rows.json").read_text(encoding="utf-8"))
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def _feedback_rows(kind: Kind, model: Any, tokenizer: Any, seed: int, split: Split, size: int, progress: bool) -> Rows:
    """Sample prompt after prompt until there are `size` rows."""
    per_prompt = SAMPLES_PER_PROMPT[kind]
    size = math.ceil(size / per_prompt) * per_prompt if kind == "scored" else size
    # a bound, so that a model which is always wrong gives an error and not an endless search for pairs
    prompts = make_prompts(4 * size + 64, seed, split)
    rows: Rows = []
    with tqdm(total=size, desc=f"toy feedback: {kind}, {split} prompts", disable=not progress) as bar:
        for first in range(0, len(prompts), 256):
            chunk = prompts[first : first + 256]
            repeated = [prompt for prompt in chunk for _ in range(per_prompt)]
            samples = list(_chunks(_sample(model, tokenizer, repeated, seed * 1_000_003 + first, 1.0), per_prompt))
            for prompt_id, (prompt, group) in enumerate(zip(chunk, samples, strict=True), start=first):
                # the model ends one sample in thousands at once; trainers refuse a completion without a token
                if all(group):
                    rows += _rows_of(kind, prompt, group, prompt_id)
            bar.update(min(len(rows), size) - bar.n)
            if len(rows) >= size:
                return rows[:size]
    raise RuntimeError(f"{len(prompts)} prompts gave {len(rows)} {kind} rows, {size} were asked for.")


def _rows_of(kind: Kind, prompt: str, samples: list[str], prompt_id: int) -> Rows:
    judged = [(_assistant(sample), verify(prompt, sample)) for sample in samples]
    if kind == "unpaired":
        return [{"prompt": _user(prompt), "completion": sample, "label": right} for sample, right in judged]
    if kind == "scored":
        row = {"prompt": _user(prompt), "prompt_id": prompt_id}
        return [{**row, "completion": sample, "score": float(right)} for sample, right in judged]
    chosen = [sample for sample, right in judged if right]
    rejected = [sample for sample, right in judged if not right]
    pairs = zip(chosen[:1], rejected[:1], strict=False)
    return [{"prompt": _user(prompt), "chosen": right, "rejected": wrong} for right, wrong in pairs]


@torch.no_grad()
def _sample(model: Any, tokenizer: Any, prompts: list[str], seed: int, temperature: float) -> list[str]:
    device = next(model.parameters()).device
    strategy: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        strategy = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    completions: list[str] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else []):
        # `torch.manual_seed` also seeds the generators of devices which are not restored here
        (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)
        for texts in _chunks(_render(prompts, tokenizer), 1024):
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


def _render(prompts: list[str], tokenizer: Any) -> list[str]:
    return tokenizer.apply_chat_template([_user(p) for p in prompts], add_generation_prompt=True, tokenize=False)


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# The cache

_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _cached(
    name: str, cache_dir: Any, build: Callable[[Path], None], files: Sequence[str] = (), **determinants: Any
) -> Path:
    """The directory of the cache that belongs to the determinants, filled by `build` when it is not there.

    It is filled anew, with a warning, when one of `files` is missing or cannot be read.
    """
    root = Path(cache_dir or os.environ.get("HALOS_TRL_CACHE") or "~/.cache/halos_trl").expanduser()
    # other library versions may give other numbers, or write files that this one cannot read
    determinants |= {"version": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    key = hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()[:16]
    target, partial = root / f"{name}-{key}", root / f"{name}-{key}.partial"
    if target.is_dir() and _damage(target, files) is None:
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        damage = _damage(target, files) if target.is_dir() else None
        if damage is not None:
            logger.warning(f"The cache of the toy task is damaged ({damage}). {target} is made again.")
            shutil.rmtree(target)
        if not target.is_dir():
            # a directory gets its final name only when complete, so an interrupted run leaves nothing that is read
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            os.replace(partial, target)
    return target


def _damage(directory: Path, files: Sequence[str]) -> str | None:
    """What is wrong with a directory of the cache, which has to hold these files; None where they can be read."""
    for path in (directory / name for name in files):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    continue
            text = path.read_text(encoding="utf-8")
            holds_something = isinstance(json.loads(text), dict) if path.suffix == ".json" else bool(text)
        except (SafetensorError, OSError, ValueError) as error:
            return f"{path.name} cannot be read: {error}"
        if not holds_something:
            return f"{path.name} holds {text[:20]!r}"
    return None


def _chunks(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def main() -> None:
    """Train the model if needed, show some of its samples and its accuracy."""
    path = load_model_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompts = make_prompts(8, 0, "test")
    for prompt, completion in zip(prompts, _sample(model, tokenizer, prompts, 0, 1.0), strict=True):
        print(f"{prompt:11} -> {completion:8} {'right' if verify(prompt, completion) else 'wrong'}")
    sampled, greedy = accuracy(model, tokenizer), accuracy(model, tokenizer, temperature=0)
    print(f"held-out accuracy: {sampled:.3f} sampled, {greedy:.3f} greedy")


if __name__ == "__main__":
    main()
