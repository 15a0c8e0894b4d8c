"""Batches of whole groups: the examples of each optimizer step, and their distribution over processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

FILLER = -1
"""Index of the filler row in a micro-batch without examples."""


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack groups into steps of at most `capacity` examples, each a list of indices into `sizes`.

    No size may exceed the capacity. Best fit, largest first: a step is closed only if none of the remaining groups
    fits. Deterministic.
    """
    steps: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = next((r for r in range(sizes[i], capacity + 1) if with_room[r]), None)
        if room is None:
            room, step = capacity, len(steps)
            steps.append([])
        else:
            step = with_room[room].pop()
        steps[step].append(i)
        with_room[room - sizes[i]].append(step)
    return steps


class GroupBatchSampler(Sampler[list[int]]):
    """Micro-batches of one process, such that the examples of a group are in the same optimizer step.

    A step has at most `micro_batch_size * micro_batches * num_processes` examples, fewer if no further group fits. Its
    examples are distributed round-robin over the processes, as in HALOs, and each process spreads its own evenly over
    exactly `micro_batches` micro-batches. Thus all processes run the same number of micro-batches; a micro-batch
    without examples contains `FILLER`.

    Group sizes are packed once, so every epoch has the same number of steps, which the learning-rate schedule and an
    exact resume need. Each epoch shuffles the groups of equal size and the order of the steps, depending only on
    `seed` and the epoch. A group larger than a step is split (`oversized` counts them).

    Args:
        group_ids: the group of each example.
        micro_batch_size: maximum number of examples of a micro-batch.
        micro_batches: micro-batches of a step on one process (gradient accumulation).
        num_processes, process_index: number of processes, and this process's index.
        shuffle: whether to use a new order in each epoch; otherwise, groups keep the order of the data as far as sizes
            allow.
        seed: seed of the shuffle.
        repeats: number of consecutive repetitions of each step (PPO's epochs over a batch).
    """

    def __init__(
        self,
        group_ids: Sequence[int],
        *,
        micro_batch_size: int,
        micro_batches: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        repeats: int = 1,
    ):
        self.micro_batches = micro_batches
        self.num_processes = num_processes
        self.process_index = process_index
        self.shuffle = shuffle
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0
        self.step_size = micro_batch_size * micro_batches * num_processes
        groups: dict[int, list[int]] = {}
        for example, group in enumerate(group_ids):
            groups.setdefault(group, []).append(example)
        self.oversized = sum(len(group) > self.step_size for group in groups.values())
        self._pieces = [
            group[i : i + self.step_size] for group in groups.values() for i in range(0, len(group), self.step_size)
        ]
        self._steps = sorted(map(sorted, pack([len(piece) for piece in self._pieces], self.step_size)))

    @property
    def steps(self) -> int:
        """Number of distinct optimizer steps in an epoch."""
        return len(self._steps)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._steps) * self.micro_batches * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._order_of_epoch():
            examples = [example for piece in step for example in self._pieces[piece]]
            yield from self._own_share(examples) * self.repeats

    def _order_of_epoch(self) -> list[list[int]]:
        if not self.shuffle:
            return self._steps
        rng = random.Random(f"{self.seed}/{self.epoch}")
        by_size: dict[int, list[int]] = {}
        for i, piece in enumerate(self._pieces):
            by_size.setdefault(len(piece), []).append(i)
        for pieces in by_size.values():
            rng.shuffle(pieces)
        steps = [[by_size[len(self._pieces[place])].pop() for place in step] for step in self._steps]
        rng.shuffle(steps)
        return steps

    def _own_share(self, examples: list[int]) -> list[list[int]]:
        own = examples[self.process_index :: self.num_processes]
        bounds = [len(own) * k // self.micro_batches for k in range(self.micro_batches + 1)]
        return [own[start:end] or [FILLER] for start, end in pairwise(bounds)]


class StepRows(torch.utils.data.Dataset):
    """Rows of a prepared dataset by index; `FILLER` is a row without a completion, which does not contribute."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        first = dataset[0]
        # A few tokens, because this process must run the models, too, so that collective operations match.
        self.filler = first | {"prompt_ids": (first["prompt_ids"] + first["completion_ids"])[:8], "completion_ids": []}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.filler if index == FILLER else self.dataset[index]


class ScoredCollator:
    """Adds the numbers of the rows to the batch of another collator: `score` and `advantage`, each `(B,)`, and
    `logprobs` of the sampling model, `(B, longest completion)`, if the rows have them.
    """

    def __init__(self, collate_tokens: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate_tokens = collate_tokens

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate_tokens(rows)
        for column in ("score", "advantage"):
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows], dtype=torch.float32)
        if "logprobs" in rows[0]:
            logps = [torch.tensor(row["logprobs"], dtype=torch.float32) for row in rows]
            batch["logprobs"] = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)
        return batch


__all__ = ["FILLER", "GroupBatchSampler", "ScoredCollator", "StepRows", "pack"]
