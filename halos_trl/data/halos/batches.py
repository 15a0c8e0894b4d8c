"""HALOs' batches for a trainer: samplers over the rows of its dataset, and KTO's KL partners inside a micro-batch."""

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
    """Micro-batches of one process in HALOs' order: a list of row indices for each. Base of the three below.

    The rows of the dataset are HALOs' flat list: rows of a prompt one after the other, prompts in the order in which
    they first appear. The order of an epoch depends on `seed` and its number alone; it is the one that HALOs'
    generator `random.Random(seed)` gives it.

    Args:
        prompts: the prompt of each row, as anything that tells prompts apart.
        microbatch_size: examples of a micro-batch on one process.
        microbatches: micro-batches of an optimizer step on one process (gradient accumulation).
        num_processes, process_index: of the run.
        seed: of the order, the same on all processes.
        repeats: how often each optimizer step comes in a row (epochs of PPO over one batch); above 1, a last step
            with fewer micro-batches is left out.
    """

    keeps_partial = False
    """Whether a last micro-batch that is not full is used, where there is one process."""

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
        """Choose the order of the next iteration."""
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
        """Rows that an epoch does not use, on all processes together; others in each epoch."""
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
    """Batches of pairs. Several processes share whole global batches only; one process uses every pair."""

    keeps_partial = True


class HalosUnpairedBatches(HalosBatches):
    """Batches of single completions. The last micro-batch is dropped where it is not full."""


class HalosGroupBatches(HalosBatches):
    """Batches of groups: prompts are shuffled, their completions dealt one by one over the processes.

    Unlike HALOs, whose processes may hold different numbers of micro-batches and then wait for each other for ever,
    all stop with the one that has the fewest.
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
    """Adds HALOs' KL sequences to what another collator makes of a micro-batch: prompt i with completion i+1.

    The last prompt gets the first completion; a micro-batch of one row its own. Prompt and completion are rendered and
    cut together, as `tokenize` does it for rows. Adds `KL_input_ids`, `KL_attention_mask` and `KL_completion_mask`,
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
