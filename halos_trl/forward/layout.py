"""Packing the sequences of a micro-batch into one row of unique tokens, and mapping results back to their rows.

Rows that share a prompt become one run: the prompt once, then each completion without its last token, which predicts
nothing. Rows that are scored as a whole share their common prefix. All runs are concatenated to one row without
padding. Position ids restart with each run and with each completion, so each token keeps the position that it has in
its own row.

Shape legend: `B` rows and `S` positions of the padded batch, `N` unique tokens, `M` wanted positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Tokens `start` to `stop` of the packed row, which also attend to tokens `context_start` to `context_stop`: the
    prompt of a completion, nothing for a prompt.
    """

    start: int
    stop: int
    context_start: int
    context_stop: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.queries + self.context_stop - self.context_start


class Layout:
    """Positions of a padded batch's tokens in the packed row.

    Attributes:
        input_ids (`Tensor` of shape `(1, N)`): the unique tokens.
        position_ids (`Tensor` of shape `(1, N)`): each token's position in its own row.
        spans (`list[Span]`): which tokens attend to which.
        wanted (`Tensor` of shape `(M,)`): index into the packed row of each position whose output is wanted, in the
            order of the padded batch.

        It is an object and not a dict of tensors, so that accelerate's wrappers do not move or cast its contents.
    """

    def __init__(self, input_ids: Tensor, position_ids: Tensor, spans: list[Span], wanted: Tensor):
        self.input_ids = input_ids
        self.position_ids = position_ids
        self.spans = spans
        self.wanted = wanted
        self.plans: dict[object, object] = {}
        """Data that an attention kernel derived from the spans, cached for the next layers."""
        self.seen_by: set[int] = set()
        """Attention modules that have used this layout."""


class TokenLayout(Layout):
    """A layout that wants the positions that predict completion tokens.

    Attributes:
        labels (`Tensor` of shape `(M,)`): the token that each wanted position predicts.
        mask_BT (`Tensor` of shape `(B, S - 1)`): bool, True at the wanted positions of the padded batch.
    """

    def __init__(
        self, input_ids: Tensor, position_ids: Tensor, spans: list[Span], wanted: Tensor, labels: Tensor,
        mask_BT: Tensor,
    ):  # fmt: skip
        super().__init__(input_ids, position_ids, spans, wanted)
        self.labels = labels
        self.mask_BT = mask_BT


def table(values_M: Tensor, mask_BT: Tensor) -> Tensor:
    """Scatter `(M,)` numbers to the `M` True positions of a mask `(B, T)`; 0 elsewhere. Differentiable."""
    mask_BT = mask_BT.to(values_M.device)
    # With `masked_scatter`, even a batch without wanted positions stays connected to the model's graph.
    return values_M.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_M)


def shared_prompt_layout(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> TokenLayout:
    """The packed row of a padded batch; all arguments `(B, S)`, of which `completion_mask` marks the wanted tokens.

    The prompt of a row is everything before its first wanted token; rows with equal prompts share it. Tokens after a
    row's last wanted token, and rows without wanted tokens, have no effect on any result and are left out.
    """
    mask_BT = completion_mask[:, 1:].bool()
    ids, attended, wanted = (t.tolist() for t in (input_ids, attention_mask, completion_mask))
    runs: dict[tuple[int, ...], list[_Row]] = {}
    for b, (row, real, want) in enumerate(zip(ids, attended, wanted, strict=True)):
        where = [s for s, a in enumerate(real) if a]
        scored = [k for k, s in enumerate(where) if want[s]]
        if scored:
            prompt = tuple(row[s] for s in where[: scored[0]])
            runs.setdefault(prompt, []).append(_Row(b, where[: scored[-1]], len(prompt)))
    packed, positions = _pack(ids, runs.values())
    device = input_ids.device
    return TokenLayout(
        *packed.tensors(device),
        wanted=torch.tensor(positions, device=device)[:, :-1][mask_BT],
        labels=input_ids[:, 1:][mask_BT],
        mask_BT=mask_BT,
    )


def shared_prefix_layout(input_ids: Tensor, attention_mask: Tensor, last: Sequence[int]) -> Layout:
    """The packed row of a padded batch `(B, S)` in which column `last[b]` of each row `b` is wanted.

    Rows share common prefixes, in groups chosen to save as many tokens as possible. Tokens after a row's wanted token
    have no effect on it and are left out.
    """
    ids, attended = input_ids.tolist(), attention_mask.tolist()
    where = [[s for s in range(stop + 1) if real[s] or s == stop] for real, stop in zip(attended, last, strict=True)]
    sequences = [tuple(row[s] for s in columns) for row, columns in zip(ids, where, strict=True)]
    groups = _shared_prefixes(sequences)
    packed, positions = _pack(ids, [[_Row(b, where[b], shared) for b in members] for members, shared in groups])
    wanted = [positions[b][stop] for b, stop in enumerate(last)]
    return Layout(*packed.tensors(input_ids.device), wanted=torch.tensor(wanted, device=input_ids.device))


def _shared_prefixes(sequences: Sequence[tuple[int, ...]]) -> list[tuple[list[int], int]]:
    """Groups of sequences and the length of the prefix that each group shares.

    Of all partitions of the sorted sequences into contiguous groups, the one that saves the most tokens.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[i] for i in order]
    common = [_common(a, b) for a, b in itertools.pairwise(ordered)]
    best = [(0, 0, 0)]  # for the first n sequences: tokens saved, start of the last group, its prefix length
    for stop in range(1, len(ordered) + 1):
        shared = len(ordered[stop - 1])
        choices = [(best[stop - 1][0], stop - 1, shared)]
        for start in range(stop - 2, -1, -1):
            shared = min(shared, common[start])
            choices.append((best[start][0] + shared * (stop - start - 1), start, shared))
        best.append(max(choices))
    groups, stop = [], len(ordered)
    while stop:
        _, start, shared = best[stop]
        groups.append((order[start:stop], shared))
        stop = start
    return groups[::-1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Row(NamedTuple):
    number: int
    where: list[int]
    """Columns of the padded batch whose tokens must be computed."""
    shared: int
    """Number of these tokens that all rows of the run share."""


def _pack(ids: list[list[int]], runs: Iterable[list[_Row]]) -> tuple[_Packed, list[list[int]]]:
    """The packed row of these runs, and the index in it of each token of the padded batch."""
    packed, positions = _Packed(), [[0] * len(row) for row in ids]
    for members in runs:
        number, where, shared = members[0]
        start = packed.add([ids[number][s] for s in where[:shared]], 0, (0, 0))
        for number, where, _ in members:
            own = packed.add([ids[number][s] for s in where[shared:]], shared, (start, start + shared))
            for k, s in enumerate(where):
                positions[number][s] = start + k if k < shared else own + k - shared
    if not packed.ids:  # the model must run nevertheless, as on the other processes
        packed.add(ids[0][:1], 0, (0, 0))
    return packed, positions


class _Packed:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.spans: list[Span] = []

    def add(self, tokens: Sequence[int], first_position: int, context: tuple[int, int]) -> int:
        start = len(self.ids)
        self.ids += tokens
        self.positions += range(first_position, first_position + len(tokens))
        if tokens:
            self.spans.append(Span(start, len(self.ids), *context))
        return start

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, list[Span]]:
        """Token ids and position ids, both `(1, N)`, and the spans."""
        return torch.tensor([self.ids], device=device), torch.tensor([self.positions], device=device), self.spans
