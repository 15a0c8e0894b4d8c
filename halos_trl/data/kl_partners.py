"""The KL partners of an optimizer step.

KTO's KL term compares policy and reference on prompts with completions that belong to other prompts (KTO, section 4.1
of arXiv:2402.01306). All examples of a step are arranged in the order of the whole batch. If all prompts differ,
prompt i is paired with completion i+1, and the last with the first; otherwise, each is paired with a completion of
another prompt.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch


class Sequence(NamedTuple):
    """Token ids of one example, without padding."""

    prompt_ids: list[int]
    completion_ids: list[int]
    scored: list[int]
    """1 for each completion token that counts; tokens of turns that the model did not write do not count."""


def split_sequences(batch: dict[str, torch.Tensor]) -> list[Sequence]:
    """The unpadded prompt and completion ids of each row of a collated batch."""
    rows = zip(
        batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["completion_mask"].tolist(), strict=True
    )
    sequences = []
    for ids, attended, is_completion in rows:
        real = [(token, c) for token, a, c in zip(ids, attended, is_completion, strict=True) if a]
        start = next((i for i, (_, c) in enumerate(real) if c), len(real))
        tokens, scored = [t for t, _ in real], [c for _, c in real]
        sequences.append(Sequence(tokens[:start], tokens[start:], scored[start:]))
    return sequences


def in_batch_order(per_process: list[list[list[Sequence]]]) -> list[Sequence]:
    """Flatten `[process][micro-batch][row]` into the order of the whole batch.

    Micro-batches are ordered round-robin: the first ones of all processes, then the second ones, and so on.
    """
    longest = max(len(microbatches) for microbatches in per_process)
    return [
        row for m in range(longest) for microbatches in per_process if m < len(microbatches) for row in microbatches[m]
    ]


def partners(prompts: Rows[Hashable]) -> list[int] | None:
    """For each row, the row whose completion its prompt is paired with: never one of an equal prompt.

    Every completion is used once, unless more than half of the rows share a prompt. If all prompts differ, the
    partners are `i + 1`, and 0 for the last. None if all prompts are equal.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    if len(groups) < 2:
        return None
    order = [row for rows in groups.values() for row in rows]
    largest = max(groups.values(), key=len)
    shift = len(largest)
    if 2 * shift <= len(order):  # as far as the largest group, so every row leaves its own
        return [partner for _, partner in sorted(zip(order, order[shift:] + order[:shift], strict=True))]
    others = [row for row in order if prompts[row] != prompts[largest[0]]]
    pairs = [(row, others[i % len(others)]) for i, row in enumerate(largest)]
    return [partner for _, partner in sorted(pairs + list(zip(others, largest, strict=False)))]


def mismatch(sequences: list[Sequence]) -> list[Sequence]:
    """Pair each prompt with a completion of another prompt; empty if there is only one prompt."""
    of_row = partners([tuple(sequence.prompt_ids) for sequence in sequences])
    if of_row is None:
        return []
    return [sequences[i]._replace(prompt_ids=row.prompt_ids) for row, i in zip(sequences, of_row, strict=True)]


def share_of(sequences: list[Sequence], process: int, num_processes: int) -> list[Sequence]:
    """The rows that one process evaluates. All processes get the same number, since sharded models run forward passes
    together.

    Missing rows are filled with copies without a completion, which do not contribute to the estimate.
    """
    size = -(-len(sequences) // num_processes)
    share = sequences[process * size : (process + 1) * size]
    filler = Sequence(sequences[0].prompt_ids + sequences[0].completion_ids, [], [])
    return share + [filler] * (size - len(share))


def collate(
    sequences: list[Sequence], *, pad_token_id: int, max_length: int | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `completion_mask`, all `(B, S)`, padded and truncated on the right."""
    ids = [(s.prompt_ids + s.completion_ids)[:max_length] for s in sequences]
    masks = [([0] * len(s.prompt_ids) + s.scored)[:max_length] for s in sequences]
    width = max(map(len, ids))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)

    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "completion_mask": padded(masks, 0),
    }
