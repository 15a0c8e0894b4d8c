"""How the sequences of a micro-batch become one row of unique tokens, and how its results return to their rows.

Rows that share a prompt become one run: the prompt once, then each completion without its last token, which predicts
nothing. All runs stand in one row without padding. Position ids restart with each run and with each completion, so a
token has the position that it has in its own row.

Shape legend: `B` rows and `S` positions of the padded batch, `N` unique tokens, `M` wanted positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Tokens `start` to `stop` of the packed row, which attend to `context` tokens in front of them: a prompt's none,
    a completion's its prompt.
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
    """Where the tokens of a padded batch stand in the packed row.

    Attributes:
        input_ids (`Tensor` of shape `(1, N)`): the unique tokens.
        position_ids (`Tensor` of shape `(1, N)`): each token's position in its own row.
        wanted (`Tensor` of shape `(M,)`): index into the packed row of each position whose prediction is wanted, in
            the order of the padded batch.
        labels (`Tensor` of shape `(M,)`): the token that each of them predicts.
        mask_BT (`Tensor` of shape `(B, S - 1)`): bool, True at the wanted positions of the padded batch.
        spans (`list[Span]`): what attends to what.
        padded_tokens (`int`): tokens of the padded batch, `B * S`.

    It is one object, and not a dict of tensors, so that no wrapper of accelerate's moves or casts what it holds.
    """

    def __init__(
        self, input_ids: Tensor, position_ids: Tensor, wanted: Tensor, labels: Tensor, mask_BT: Tensor,
        spans: list[Span], padded_tokens: int,
    ):  # fmt: skip
        self.input_ids = input_ids
        self.position_ids = position_ids
        self.wanted = wanted
        self.labels = labels
        self.mask_BT = mask_BT
        self.spans = spans
        self.padded_tokens = padded_tokens
        self.plans: dict[object, object] = {}
        """What a back-end of the attention made of the spans, kept for the next layer."""
        self.seen_by: set[int] = set()
        """Attention modules that this layout has reached."""

    def table(self, values: Tensor) -> Tensor:
        """`(M,)` numbers at the wanted positions -> `(B, S - 1)`, 0 elsewhere. Differentiable."""
        mask_BT = self.mask_BT.to(values.device)
        return values.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values[: len(self.wanted)])


def shared_prompt_layout(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Layout:
    """The packed row of a padded batch; all arguments `(B, S)`, of which `completion_mask` marks the wanted tokens.

    The prompt of a row is everything in front of its first wanted token; rows with equal prompts share it. What stands
    behind a row's last wanted token, and a row without one, has no effect on any result and is left out.
    """
    device = input_ids.device
    mask_BT = completion_mask[:, 1:].bool()
    ids, attended, wanted = (t.tolist() for t in (input_ids, attention_mask, completion_mask))
    packed, positions = _Packed(), [[0] * len(row) for row in ids]
    runs: dict[tuple[int, ...], list[_Row]] = {}
    for b, (row, real, want) in enumerate(zip(ids, attended, wanted, strict=True)):
        where = [s for s, a in enumerate(real) if a]
        scored = [k for k, s in enumerate(where) if want[s]]
        if scored:
            prompt = tuple(row[s] for s in where[: scored[0]])
            runs.setdefault(prompt, []).append(_Row(b, where[: scored[-1]], len(prompt)))
    for prompt, members in runs.items():
        start = packed.add(prompt, 0, (0, 0))
        for b, where, first in members:
            own = packed.add([ids[b][s] for s in where[first:]], first, (start, start + first))
            for k, s in enumerate(where):
                positions[b][s] = start + k if k < first else own + k - first
    if not packed.ids:  # the model has to run all the same, as on the other processes
        packed.add(ids[0][:1], 0, (0, 0))
    return Layout(
        torch.tensor([packed.ids], device=device),
        torch.tensor([packed.positions], device=device),
        torch.tensor(positions, device=device)[:, :-1][mask_BT],
        input_ids[:, 1:][mask_BT],
        mask_BT,
        packed.spans,
        input_ids.numel(),
    )


class _Row(NamedTuple):
    number: int
    where: list[int]
    """Columns of the padded batch that hold its tokens, without those behind the last position that predicts."""
    prompt: int


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
