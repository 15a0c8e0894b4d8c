"""Completions for prompts: batched generation with transformers, or vLLM, in the order of the prompts.

    model, tokenizer = load_sampler("path-or-id")
    generate = TransformersSampler(model, tokenizer, SamplingSettings(n=4, max_tokens=256))
    for prompt, completions in zip(prompts, samples(generate, prompts), strict=True):
        print([completion.text for completion in completions])

`samples` processes the prompts in windows, and each batch of a window has its own seed. The samples of a prompt thus
depend on the settings and on the prompts of its window, but not on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from .data.tokens import prompt_tokens

BATCHES_PER_WINDOW = 8
"""Number of batches within which prompts are sorted by length. More batches reduce padding, but more work is lost when
a run is killed.
"""


@dataclass(frozen=True)
class SamplingSettings:
    """Settings for sampling completions. The defaults are those of HALOs' `train.sample`.

    Parameters:
        n: Completions per prompt.
        temperature: Sampling temperature; 0 selects the most likely token at each step.
        top_p: Sample from the smallest set of tokens with this total probability; 1 samples from all.
        max_tokens: Maximum number of tokens per completion, including the end token.
        max_prompt_length: Maximum number of tokens per prompt; a longer prompt is refused. None: no limit.
        stop: Texts that end a completion and are not part of it. A text that is a single token of the vocabulary ends
            it like the end token.
        seed: Random seed.
        logprobs: Keep the log-probs of the tokens, in nats, under the model itself (temperature 1, all tokens).
        batch_size: Number of completions generated in one batch.

    Raises ValueError for values out of range.
    """

    n: int = 1
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 2048
    max_prompt_length: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = False
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("n", "max_tokens", "batch_size", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` is {self.temperature}; expected a finite number of at least 0.")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"`temperature` is 0, which gives the same completion every time, but `n` is {self.n}. Set `n` to 1, "
                "or raise the temperature."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; expected a probability, above 0 and at most 1.")
        if not all(self.stop):
            raise ValueError("`stop` contains an empty text, which would end every completion immediately. Remove it.")


class Completion(NamedTuple):
    """One completion."""

    text: str
    """Without special tokens, and without the stop text that ended it."""
    token_ids: list[int]
    """As generated, including the end token or the tokens of the stop text."""
    logprobs: list[float] | None
    """In nats, one per token."""
    finish_reason: str
    """`stop`, or `length` if it was truncated at `max_tokens`."""


class Sampler(Protocol):
    """Generates completions for a window of prompts."""

    settings: SamplingSettings

    def tokens(self, row: dict[str, Any], where: str) -> list[int]:
        """The token ids of a row's prompt, including the generation prompt."""

    def window(self, prompts: list[list[int]], number: int) -> list[list[Completion]]:
        """`settings.n` completions for each prompt of window `number`, in order."""


def samples(sampler: Sampler, rows: Sequence[dict[str, Any]], skip: int = 0) -> Iterator[list[Completion]]:
    """The completions of each row's `prompt`, in the order of the rows, without the first `skip` rows.

    A prompt is a text, or a list of messages that is rendered with the chat template; if the last turn is the
    assistant's, it is continued. The samples after `skip` rows are the same as without `skip`.

    Raises a ValueError that names the row for a prompt that cannot be rendered or is too long, before anything is
    generated for its window.
    """
    size = window_size(sampler.settings)
    for first in range(skip // size * size, len(rows), size):
        chunk = rows[first : first + size]
        ids = [_checked(sampler, row, f"Prompt {i} of the data") for i, row in enumerate(chunk, first)]
        found = sampler.window(ids, first // size)
        yield from found[max(skip - first, 0) :]


def window_size(settings: SamplingSettings) -> int:
    """Prompts in a window."""
    return max(1, BATCHES_PER_WINDOW * settings.batch_size // settings.n)


def _checked(sampler: Sampler, row: dict[str, Any], where: str) -> list[int]:
    ids = sampler.tokens(row, where)
    limit = sampler.settings.max_prompt_length
    if not ids:
        raise ValueError(f"{where} is empty: it has no tokens. Drop it.")
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"{where} has {len(ids)} tokens, more than `max_prompt_length` {limit}. Drop it, or raise the limit."
        )
    return ids


# ------------------------------------------------------------------------------------------------------- transformers


def load_sampler(name: str, **model_settings: Any) -> tuple[Any, Any]:
    """Load model and tokenizer from a Hub id or folder, including an adapter with its base model, onto a GPU if there
    is one.
    """
    settings = {"dtype": "auto", **model_settings}
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        from peft import AutoPeftModelForCausalLM

        model: Any = AutoPeftModelForCausalLM.from_pretrained(name, **settings)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, **settings)
    tokenizer = AutoTokenizer.from_pretrained(name)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu").eval(), tokenizer


class TransformersSampler:
    """Batched generation: prompts of similar length together, padded on the left. A `Sampler`.

    `in_step`: processes that share a model's parameters generate until the last of them is done; all must sample
    for the same number of prompts.
    """

    def __init__(self, model: Any, processing_class: Any, settings: SamplingSettings, in_step: bool = False):
        self.model, self.settings, self.in_step = model, settings, in_step
        self.processing_class = processing_class
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.end_ids = _end_ids(model, self.tokenizer, settings.stop)
        self.stop_texts = [text for text in settings.stop if _single_token(self.tokenizer, text) is None]
        pad = self.tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else next(iter(self.end_ids), 0)

    def tokens(self, row: dict[str, Any], where: str) -> list[int]:
        return prompt_tokens(self.processing_class, row, where)

    def window(self, prompts: list[list[int]], number: int) -> list[list[Completion]]:
        n, size = self.settings.n, self.settings.batch_size
        order = sorted((i for i in range(len(prompts)) for _ in range(n)), key=lambda i: -len(prompts[i]))
        found: list[list[Completion]] = [[] for _ in prompts]
        for batch, first in enumerate(range(0, len(order), size)):
            chosen = order[first : first + size]
            made = self._generate([prompts[i] for i in chosen], _seed(self.settings.seed, number, batch))
            for i, completion in zip(chosen, made, strict=True):
                found[i].append(completion)
        return found

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], seed: int) -> list[Completion]:
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[self.pad_id] * (width - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        device = self.model.device
        recorder = _LogProbs() if self.settings.logprobs else None
        was_training = self.model.training
        self.model.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
            (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)
            whole_BT = self.model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=self._generation_config(),
                logits_processor=LogitsProcessorList([recorder] if recorder else []),
                **({"tokenizer": self.tokenizer} if self.stop_texts else {}),
                **({"synced_gpus": True} if self.in_step else {}),
            )
        self.model.train(was_training)
        made_BT = whole_BT[:, width:]
        logps_BT = recorder.of(made_BT).tolist() if recorder else [None] * len(prompts)
        return [self._completion(ids, logps) for ids, logps in zip(made_BT.tolist(), logps_BT, strict=True)]

    def _generation_config(self) -> GenerationConfig:
        # Settings that are not passed are filled in from the model's own `generation_config.json`.
        settings = self.settings
        drawn = (
            {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature else {}
        )
        return GenerationConfig(
            do_sample=settings.temperature > 0,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_new_tokens=0,
            max_new_tokens=settings.max_tokens,
            eos_token_id=self.end_ids or None,
            pad_token_id=self.pad_id,
            use_cache=True,
            **({"stop_strings": self.stop_texts} if self.stop_texts else {}),
            **(drawn if settings.temperature else {}),
        )

    def _completion(self, ids: list[int], logps: list[float] | None) -> Completion:
        end = next((i + 1 for i, token in enumerate(ids) if token in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        cut = min((found for stop in self.stop_texts if (found := text.find(stop)) >= 0), default=None)
        if end is None and cut is not None:
            end = self._tokens_up_to_stop(ids)
        kept = ids[:end]
        return Completion(
            text[:cut],
            kept,
            None if logps is None else logps[: len(kept)],
            "length" if end is None else "stop",
        )

    def _tokens_up_to_stop(self, ids: list[int]) -> int:
        """Number of tokens up to and including a stop text; the rest is padding of the batch."""
        ends = range(1, len(ids) + 1)
        texts = (self.tokenizer.decode(ids[:end], skip_special_tokens=True) for end in ends)
        return next(
            end for end, text in zip(ends, texts, strict=True) if any(stop in text for stop in self.stop_texts)
        )


class _LogProbs(LogitsProcessor):
    """Records the log-probs of the sampled tokens, before temperature and top-p. Keeps the logits of one step in
    memory.
    """

    def __init__(self) -> None:
        self.drawn: list[torch.Tensor] = []
        self.last_BV: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._keep(input_ids[:, -1])
        self.last_BV = scores.float().log_softmax(-1)
        return scores

    def _keep(self, ids_B: torch.Tensor) -> None:
        if self.last_BV is not None:
            self.drawn.append(self.last_BV.gather(-1, ids_B[:, None]))

    def of(self, made_BT: torch.Tensor) -> torch.Tensor:
        """(B, T), nats: of the generated tokens."""
        self._keep(made_BT[:, -1])
        return torch.cat(self.drawn, dim=-1)


def _end_ids(model: Any, tokenizer: Any, stop: Iterable[str]) -> list[int]:
    """The tokens that end a completion: the model's, the tokenizer's, and stop texts that are a single token."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    found = [*own, tokenizer.eos_token_id, *(_single_token(tokenizer, text) for text in stop)]
    return list(dict.fromkeys(token for token in found if token is not None))


def _single_token(tokenizer: Any, text: str) -> int | None:
    """The added token with exactly this text, such as `<|im_end|>`. Other tokens also occur inside words."""
    return tokenizer.get_added_vocab().get(text)


def _seed(*numbers: int) -> int:
    """A seed that is, in practice, unique to these numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


# --------------------------------------------------------------------------------------------------------------- vLLM


class VLLMSampler:
    """Generation with vLLM. A `Sampler`.

    Completions are as reproducible as vLLM's, whose kernels may sum in a different order in a different batch.
    """

    def __init__(self, name: str, settings: SamplingSettings, **engine: Any):
        from vllm import LLM

        self.settings = settings
        adapter = os.path.isfile(os.path.join(name, "adapter_config.json"))
        if adapter:
            raise ValueError(
                f"`{name}` contains an adapter. Merge it first (`halos-trl merge`), or sample with transformers "
                "(`--engine transformers`)."
            )
        self.model = LLM(model=name, seed=settings.seed, **engine)
        self.processing_class = AutoTokenizer.from_pretrained(name)

    def tokens(self, row: dict[str, Any], where: str) -> list[int]:
        return prompt_tokens(self.processing_class, row, where)

    def window(self, prompts: list[list[int]], number: int) -> list[list[Completion]]:
        from vllm import SamplingParams

        settings = self.settings
        params = [
            SamplingParams(
                n=settings.n,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_tokens,
                stop=list(settings.stop),
                seed=_seed(settings.seed, number, i) % 2**31,
                logprobs=0 if settings.logprobs else None,
            )
            for i in range(len(prompts))
        ]
        answers = self.model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [[_of_vllm(output) for output in answer.outputs] for answer in answers]


def _of_vllm(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = None
    if output.logprobs is not None:
        logprobs = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
    return Completion(output.text, ids, logprobs, "length" if output.finish_reason == "length" else "stop")


__all__ = [
    "Completion",
    "Sampler",
    "SamplingSettings",
    "TransformersSampler",
    "VLLMSampler",
    "load_sampler",
    "prompt_tokens",
    "samples",
    "window_size",
]
