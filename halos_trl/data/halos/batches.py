"""Samplers that produce HALOs' batches for a trainer, and KTO's KL partners within a micro-batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Sampler

from .. import kl_partners
from .order import grouped_share, shuffled_share
from .rows import HalosRowTokenizer

Rows = list[dict[str, Any]]


class HalosBatches(Sampler[list[int]]):
    """Micro-batches of one process in HALOs' order, each a list of row indices. Base of the three samplers below.

    The rows of the dataset must be in the order of HALOs' flat list: all rows of a prompt together, and prompts in the
    order in which they first appear. The order of an epoch depends only on `seed` and the epoch's number, and is the
    one that HALOs' generator `random.Random(seed)` produces.

    Args:
        prompts: the prompt of each row, as any value that identifies the prompt.
        microbatch_size: examples of a micro-batch on one process.
        microbatches: micro-batches of an optimizer step on one process (gradient accumulation).
        num_processes, process_index: number of processes, and this process's index.
        seed: seed of the order, the same on all processes.
        repeats: number of consecutive repetitions of each optimizer step (PPO's epochs over a batch); above 1, a last
            step with fewer micro-batches is left out.
    """

    keeps_partial = False
    """Whether an incomplete last micro-batch is used if there is only one process."""

    def __init__(
        self,
        prompts: Sequence[Hashable],
        *,
        microbatch_size: int,
        microbatches: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        repeats: int = 1,
    ):
        self.microbatch_size = microbatch_size
        self.microbatches = microbatches
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0
        self.rows = len(prompts)
        groups: dict[Hashable, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        self._groups = list(groups.values())

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._size[0]

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(self.seed)
        for _ in range(self.epoch):
            self.share(rng)
        yield from self._steps(self._batches(rng))

    @property
    def left_out(self) -> int:
        """Number of rows that an epoch does not use, over all processes; each epoch leaves out different rows."""
        return self.rows - self._size[1] * self.num_processes // self.repeats

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Micro-batches and rows of an epoch on this process, the same in every epoch."""
        batches = self._steps(self._batches(random.Random(0)))
        return len(batches), sum(map(len, batches))

    def share(self, rng: random.Random) -> list[int]:
        """This process's rows of the next epoch, in order."""
        return shuffled_share(
            [row for group in self._groups for row in group],
            rng,
            num_processes=self.num_processes,
            process_index=self.process_index,
            global_batch_size=self.microbatch_size * self.microbatches * self.num_processes,
        )

    def _batches(self, rng: random.Random) -> list[list[int]]:
        own, size = self.share(rng), self.microbatch_size
        batches = [own[start : start + size] for start in range(0, len(own), size)]
        if batches and len(batches[-1]) < size and not (self.keeps_partial and self.num_processes == 1):
            batches.pop()
        return batches

    def _steps(self, batches: list[list[int]]) -> list[list[int]]:
        if self.repeats == 1:
            return batches
        whole = len(batches) // self.microbatches * self.microbatches
        steps = [batches[start : start + self.microbatches] for start in range(0, whole, self.microbatches)]
        return [batch for step in steps for batch in step * self.repeats]


class HalosPairedBatches(HalosBatches):
    """Batches of pairs. With several processes, incomplete global batches are dropped; one process uses every pair."""

    keeps_partial = True


class HalosUnpairedBatches(HalosBatches):
    """Batches of single completions. An incomplete last micro-batch is dropped."""


class HalosGroupBatches(HalosBatches):
    """Batches of groups: prompts are shuffled, and their completions are distributed round-robin over processes.

    In HALOs, processes may have different numbers of micro-batches and then wait for each other forever. Here, all
    processes are limited to the smallest number.
    """

    def share(self, rng: random.Random) -> list[int]:
        """This process's rows of the next epoch, in order."""
        own = grouped_share(
            self._groups,
            rng,
            microbatch_size=self.microbatch_size,
            num_processes=self.num_processes,
            process_index=self.process_index,
        )
        fewest = self.rows // self.num_processes
        return own[: fewest // self.microbatch_size * self.microbatch_size]


class HalosPartners:
    """Wraps a collator and adds HALOs' KL sequences to each micro-batch: prompt i with completion i + 1.

    The last prompt gets the first completion; with a single row, its own. Prompt and completion are rendered and
    truncated together by `tokenize`, as for rows. Adds `KL_input_ids`, `KL_attention_mask` and `KL_completion_mask`,
    all `(B, S)`.
    """

    def __init__(self, collate: Callable[[Rows], dict[str, Any]], tokenize: HalosRowTokenizer, *, pad_token_id: int):
        self.collate = collate
        self.tokenize = tokenize
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Rows) -> dict[str, Any]:
        batch = self.collate(rows)
        mismatched = [
            self.tokenize.tokens(row | {"completion": partner["completion"]}, "completion", "A KL sequence")
            for row, partner in zip(rows, rows[1:] + rows[:1], strict=True)
        ]
        sequences = [
            kl_partners.Sequence(prompt_ids, ids[len(prompt_ids) :], [1] * (len(ids) - len(prompt_ids)))
            for prompt_ids, ids, _ in mismatched
        ]
        collated = kl_partners.collate(
            sequences,
            pad_token_id=self.pad_token_id,
            max_length=self.tokenize.max_length,
            device=torch.device("cpu"),
        )
        return batch | {f"KL_{name}": table for name, table in collated.items()}


__all__ = ["HalosBatches", "HalosGroupBatches", "HalosPairedBatches", "HalosPartners", "HalosUnpairedBatches"]
