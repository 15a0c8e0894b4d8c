"""The KL partners of an optimizer step.

KTO's KL term compares policy and reference on prompts with completions that belong to other prompts (KTO, section 4.1
of arXiv:2402.01306). All examples of a step are put in the order of the whole batch, and prompt i is paired with
completion i+1, the last with the first: an example is never its own partner, however the step was split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sequence(NamedTuple):
    """Token ids of one example, without padding."""

    prompt_ids: list[int]
    completion_ids: list[int]


def split_sequences(batch: dict[str, torch.Tensor]) -> list[Sequence]:
    """The unpadded prompt and completion ids of each row of a collated batch."""
    rows = zip(
        batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["completion_mask"].tolist(), strict=True
    )
    sequences = []
    for ids, attended, is_completion in rows:
        real = [(token, c) for token, a, c in zip(ids, attended, is_completion, strict=True) if a]
        sequences.append(Sequence([t for t, c in real if not c], [t for t, c in real if c]))
    return sequences


def in_batch_order(per_process: list[list[list[Sequence]]]) -> list[Sequence]:
    """Flatten `[process][micro-batch][row]` into the order of the whole batch.

    Micro-batches are dealt round-robin: the first ones of all processes, then the second ones, and so on.
    """
    longest = max(len(microbatches) for microbatches in per_process)
    return [
        row for m in range(longest) for microbatches in per_process if m < len(microbatches) for row in microbatches[m]
    ]


def rotate(sequences: list[Sequence]) -> list[Sequence]:
    """Prompt i with completion i+1 (wrapping); nothing where an example could only be its own partner."""
    if len(sequences) < 2:
        return []
    shifted = sequences[1:] + sequences[:1]
    return [Sequence(a.prompt_ids, b.completion_ids) for a, b in zip(sequences, shifted, strict=True)]


def share_of(sequences: list[Sequence], process: int, num_processes: int) -> list[Sequence]:
    """What one process scores. Every process gets the same number of rows, since sharded models forward together.

    Missing rows are filled with copies without a completion, which add nothing to the estimate.
    """
    size = -(-len(sequences) // num_processes)
    share = sequences[process * size : (process + 1) * size]
    filler = Sequence(sequences[0].prompt_ids + sequences[0].completion_ids, [])
    return share + [filler] * (size - len(share))


def collate(
    sequences: list[Sequence], *, pad_token_id: int, max_length: int | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `completion_mask`, all `(B, S)`, padded and truncated on the right."""
    ids = [(s.prompt_ids + s.completion_ids)[:max_length] for s in sequences]
    masks = [([0] * len(s.prompt_ids) + [1] * len(s.completion_ids))[:max_length] for s in sequences]
    width = max(map(len, ids))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)

    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "completion_mask": padded(masks, 0),
    }
