"""HALOs' micro-batches: the flat list of examples, its shuffling, distribution over processes, and left-out rows."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeVar

from datasets import Dataset

from .prompts import HalosPrompt, Source, load_prompts

Loader = Literal["paired", "unpaired", "group"]
LOADERS: tuple[Loader, ...] = ("paired", "unpaired", "group")
ExampleT = TypeVar("ExampleT")


# -- distribution over processes -----------------------------------------------------------------------------------


def shuffled_share(
    examples: Sequence[ExampleT],
    rng: random.Random,
    *,
    num_processes: int = 1,
    process_index: int = 0,
    global_batch_size: int = 1,
) -> list[ExampleT]:
    """A process's examples of one epoch, for pairs and single completions.

    The list is shuffled, truncated to whole global batches if there are several processes, and distributed
    round-robin.
    """
    order = list(examples)
    rng.shuffle(order)
    usable = len(order) if num_processes == 1 else len(order) // global_batch_size * global_batch_size
    return order[:usable][process_index::num_processes]


def grouped_share(
    groups: Sequence[Sequence[ExampleT]],
    rng: random.Random,
    *,
    microbatch_size: int,
    num_processes: int = 1,
    process_index: int = 0,
) -> list[ExampleT]:
    """A process's examples of one epoch, for groups: prompts are shuffled, and examples distributed round-robin.

    Each process keeps only full micro-batches, so processes may have different numbers of them.
    """
    order = list(groups)
    rng.shuffle(order)
    own = [example for group in order for example in group][process_index::num_processes]
    return own[: len(own) // microbatch_size * microbatch_size]


# -- the flat list -------------------------------------------------------------------------------------------------


class Caps(NamedTuple):
    """Limits on the flat list; None: no limit."""

    max_prompt_count: int | None = None
    """Maximum number of pairs per prompt, sampled at random; does not apply to binary feedback."""
    frac_unique_desirable: float | None = None
    """Maximum number of desirable examples, as a fraction of the number of generations; the first ones are kept."""
    frac_unique_undesirable: float | None = None


@dataclass(frozen=True)
class Single:
    """A judged completion in the flat list."""

    prompt: HalosPrompt
    completion: int
    status: str
    """`"chosen"` or `"rejected"`."""

    @property
    def score(self) -> float:
        """The score of the generation, else +1 or -1."""
        if self.completion < len(self.prompt.scores):
            return self.prompt.scores[self.completion]
        return 1 if self.status == "chosen" else -1


def flat_pairs(prompts: list[HalosPrompt]) -> list[tuple[HalosPrompt, tuple[int, int]]]:
    """All pairs, in loading order."""
    return [(prompt, pair) for prompt in prompts for pair in prompt.pairs]


def flat_singles(prompts: list[HalosPrompt], caps: Caps) -> list[Single]:
    """All judged completions, in loading order: for each pair the better one and then the worse one, else by label.

    Raises ValueError for a prompt that has neither pairs nor labels.
    """
    limit = math.inf if caps.max_prompt_count is None else caps.max_prompt_count
    generations = sum(min(limit, len(prompt.generations)) for prompt in prompts)
    fractions = {"chosen": caps.frac_unique_desirable, "rejected": caps.frac_unique_undesirable}
    allowed = {side: math.inf if f is None else f * generations for side, f in fractions.items()}
    seen = dict.fromkeys(allowed, 0)
    kept = []
    for prompt in prompts:
        for single in _judged(prompt):
            if seen[single.status] < allowed[single.status]:
                seen[single.status] += 1
                kept.append(single)
    return kept


def _judged(prompt: HalosPrompt) -> Iterator[Single]:
    if prompt.pairs:
        for better, worse in prompt.pairs:
            yield Single(prompt, better, "chosen")
            yield Single(prompt, worse, "rejected")
    elif prompt.desirable:
        for i, desirable in enumerate(prompt.desirable):
            yield Single(prompt, i, "chosen" if desirable else "rejected")
    else:
        raise ValueError(
            f"Prompt {prompt.key!r} has neither pairs nor labels, which the unpaired and group loaders need. Convert "
            "its scores to binary or pairwise feedback first."
        )


def flat_rows(
    source: Source,
    loader: Loader,
    *,
    split: str = "train",
    frac_unique_desirable: float | None = None,
    frac_unique_undesirable: float | None = None,
) -> Dataset:
    """HALOs' flat list of a feedback file as rows for trainers. The arguments are those of `microbatches`.

    Rows have `prompt`, `chosen` and `rejected` for `"paired"`, else `prompt`, `completion`, `label` and `score`.
    Raises ValueError as `microbatches` does.
    """
    _check_loader(loader)
    prompts = load_prompts(source, split)
    if loader == "paired":
        _require_pairs(prompts)
        return Dataset.from_list(
            [
                {"prompt": p.prompt, "chosen": p.generations[better], "rejected": p.generations[worse]}
                for p, (better, worse) in flat_pairs(prompts)
            ]
        )
    singles = flat_singles(prompts, Caps(None, frac_unique_desirable, frac_unique_undesirable))
    return Dataset.from_list(
        [
            {
                "prompt": single.prompt.prompt,
                "completion": single.prompt.generations[single.completion],
                "label": single.status == "chosen",
                "score": float(single.score),
            }
            for single in singles
        ]
    )


# -- micro-batches -------------------------------------------------------------------------------------------------


def microbatches(
    source: Source,
    loader: Loader,
    *,
    split: str = "train",
    microbatch_size: int,
    global_batch_size: int | None = None,
    num_processes: int = 1,
    process_index: int = 0,
    seed: int = 0,
    n_epochs: int | None = None,
    n_examples: int | None = None,
    max_prompt_count: int | None = None,
    frac_unique_desirable: float | None = None,
    frac_unique_undesirable: float | None = None,
    num_skip: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches that HALOs' data loaders produce from a feedback file on one process, in order.

    An example is a dict with `prompt` (the file's `prompt_id`), and `chosen` and `rejected` for pairs; else
    `completion`, `status` (`"chosen"` or `"rejected"`), `score` and `kl_completion` (`[prompt, index]`, the next
    completion of the micro-batch, which KTO's KL term pairs with the prompt). Completions are indices into the
    prompt's generations, as returned by `load_prompts`.

    Args:
        source: path of a HALOs feedback file, or prompts loaded by `load_prompts`.
        loader: `"paired"` (DPO and its relatives), `"unpaired"` (KTO, PPO) or `"group"` (GRPO).
        split: skip prompts of other splits.
        microbatch_size: examples of a micro-batch on one process.
        global_batch_size: examples of an optimizer step on all processes; with several processes an epoch is truncated
            to a multiple of it. Defaults to `microbatch_size * num_processes`.
        num_processes, process_index: number of processes, and this process's index.
        seed: seed of the order, the same on all processes; each epoch has a different order.
        n_epochs, n_examples: when to stop, whichever comes first. At least one is needed; without `n_epochs` the data
            are repeated. `n_examples` counts the examples of all processes.
        max_prompt_count: maximum number of pairs per prompt, sampled once.
        frac_unique_desirable, frac_unique_undesirable: maximum number of desirable and undesirable examples, as a
            fraction of the number of generations; the first ones are kept. HALOs' `launch.py` passes 1.0.
        num_skip: number of examples to skip, over all processes.

    Raises ValueError for invalid settings, if no micro-batch would ever be full (HALOs repeats the data endlessly),
    and if the file has no feedback for the loader. With groups, processes may have different numbers of
    micro-batches, as in HALOs; `HalosGroupBatches` avoids this in training.
    """
    _check_loader(loader)
    if global_batch_size is None:
        global_batch_size = microbatch_size * num_processes
    counts = {
        "microbatch_size": microbatch_size, "global_batch_size": global_batch_size, "num_processes": num_processes,
        "n_epochs": n_epochs, "n_examples": n_examples, "max_prompt_count": max_prompt_count,
    }  # fmt: skip
    for name, value in counts.items():
        _require_count(name, value)
    _check_run(loader, microbatch_size, global_batch_size, num_processes, process_index)
    if n_epochs is None and n_examples is None:
        raise ValueError("Neither `n_epochs` nor `n_examples` is set, so the run would never end. Pass one of them.")
    prompts = load_prompts(source, split)
    if loader == "paired":
        _require_pairs(prompts)
    run = _Run(
        prompts, loader, microbatch_size, global_batch_size, num_processes, process_index,
        Caps(max_prompt_count, frac_unique_desirable, frac_unique_undesirable),
    )  # fmt: skip
    run.refuse_without_batch(can_end=n_epochs is not None)
    return run.batches(random.Random(seed), n_epochs, n_examples, num_skip)


def _check_loader(loader: str) -> None:
    if loader not in LOADERS:
        raise ValueError(f"`loader` is {loader!r}; expected one of {LOADERS}.")


def _require_pairs(prompts: list[HalosPrompt]) -> None:
    if not any(prompt.pairs for prompt in prompts):
        raise ValueError(
            f"None of the {len(prompts)} prompts has a pair, which `loader='paired'` needs. Pass pairwise feedback or "
            "use another loader."
        )


def _require_count(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
        raise ValueError(f"`{name}={value!r}` cannot work: expected an integer of at least 1.")


def _check_run(loader: str, microbatch: int, global_batch: int, processes: int, process: int) -> None:
    if not 0 <= process < processes:
        raise ValueError(f"`process_index` is {process}; expected 0 to {processes - 1} for {processes} processes.")
    if loader != "paired" and microbatch * processes <= 1:
        raise ValueError(
            f"`microbatch_size={microbatch}` on one process leaves no other completion for the KL term, which HALOs "
            f"computes within a micro-batch. Use at least 2 with `loader={loader!r}`."
        )
    if loader != "group" and global_batch % processes:
        raise ValueError(
            f"`global_batch_size={global_batch}` cannot be split evenly over {processes} processes: some would have "
            "more examples than others, which would wait for them. Use a multiple of the number of processes."
        )


@dataclass(frozen=True)
class _Run:
    """The prompts and settings of a run on one process."""

    prompts: list[HalosPrompt]
    loader: str
    microbatch_size: int
    global_batch_size: int
    num_processes: int
    process_index: int
    caps: Caps

    def refuse_without_batch(self, *, can_end: bool) -> None:
        """Raise ValueError if the run would repeat its data without ever filling a micro-batch."""
        _, own = self.share(self.prompts, random.Random(0))
        if not can_end and len(own) < self.microbatch_size:
            raise ValueError(
                f"An epoch leaves {len(own)} examples for this process, fewer than `microbatch_size="
                f"{self.microbatch_size}`, so `n_examples` would never be reached. Lower the batch sizes, or set "
                "`n_epochs`."
            )

    def share(self, prompts: list[HalosPrompt], rng: random.Random) -> tuple[list[HalosPrompt], list[Any]]:
        """The prompts, with pairs drawn under `max_prompt_count`, and this process's examples of the next epoch."""
        limit = self.caps.max_prompt_count
        if limit is not None:
            prompts = [
                replace(prompt, pairs=rng.sample(prompt.pairs, min(limit, len(prompt.pairs))))
                if prompt.pairs
                else prompt
                for prompt in prompts
            ]
        process = {"num_processes": self.num_processes, "process_index": self.process_index}
        if self.loader == "paired":
            return prompts, shuffled_share(
                flat_pairs(prompts), rng, **process, global_batch_size=self.global_batch_size
            )
        singles = flat_singles(prompts, self.caps)
        if self.loader == "unpaired":
            return prompts, shuffled_share(singles, rng, **process, global_batch_size=self.global_batch_size)
        groups: dict[str, list[Single]] = {}
        for single in singles:
            groups.setdefault(single.prompt.prompt_id, []).append(single)
        return prompts, grouped_share(list(groups.values()), rng, **process, microbatch_size=self.microbatch_size)

    def batches(
        self, rng: random.Random, n_epochs: int | None, n_examples: int | None, num_skip: int
    ) -> Iterator[list[dict[str, Any]]]:
        prompts, done, epoch = self.prompts, 0, 0
        to_skip = max(0, -(-num_skip // self.num_processes))
        while n_epochs is None or epoch < n_epochs:
            prompts, own = self.share(prompts, rng)
            skipped = min(to_skip, len(own))
            to_skip -= skipped
            for batch in self._chunks(own[skipped:]):
                yield _written(batch)
                if len(batch) == self.microbatch_size:
                    done += len(batch) * self.num_processes
                    if n_examples is not None and done >= n_examples:
                        return
            epoch += 1

    def _chunks(self, own: list[Any]) -> Iterator[list[Any]]:
        for start in range(0, len(own), self.microbatch_size):
            batch = own[start : start + self.microbatch_size]
            if len(batch) == self.microbatch_size or (self.loader == "paired" and self.num_processes == 1):
                yield batch


def _written(batch: list[Any]) -> list[dict[str, Any]]:
    if not isinstance(batch[0], Single):
        return [{"prompt": p.key, "chosen": chosen, "rejected": rejected} for p, (chosen, rejected) in batch]
    return [
        {
            "prompt": single.prompt.key,
            "completion": single.completion,
            "status": single.status,
            "score": single.score,
            "kl_completion": [partner.prompt.key, partner.completion],
        }
        for single, partner in zip(batch, batch[1:] + batch[:1], strict=True)
    ]


__all__ = [
    "LOADERS",
    "Caps",
    "Loader",
    "flat_pairs",
    "flat_rows",
    "flat_singles",
    "grouped_share",
    "microbatches",
    "shuffled_share",
]
