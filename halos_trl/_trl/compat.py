"""Replacements for features that older releases of TRL lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import trl
from packaging.version import Version
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .fused_head import tokens_per_tile


class _PlainLogProbs:
    """TRL's fused LM head in plain torch, for TRL 1.15, whose only implementation needs Triton and a GPU.

    Not used with newer TRL, which has its own CPU implementation. Logits are computed one tile at a time and
    recomputed in the backward pass.
    """

    def __init__(self, fused: Any) -> None:
        self.fused = fused

    def apply(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
        temperature: float, chunk_size: int, softcap: float | None, scale: float, outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        if self.fused is not None and hidden.device.type in ("cuda", "xpu"):
            return self.fused.apply(hidden, weight, bias, labels, temperature, chunk_size, softcap, scale, outputs)

        def block(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            # Under ZeRO-3 the backward pass needs the full weight, too.
            with maybe_gather_lm_head_ctx(weight, bias):
                return _log_probs(hidden, weight, bias, labels, temperature, softcap, scale, outputs)

        size = tokens_per_tile(len(weight))
        pieces = zip(hidden.split(size), labels.split(size), strict=True)
        blocks = [checkpoint(block, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*blocks, strict=True))


def _log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
    temperature: float, softcap: float | None, scale: float, outputs: tuple[str, ...],
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logps = logits.log_softmax(-1)
    columns: dict[str, Callable[[], torch.Tensor]] = {
        "entropy": lambda: -(logps.exp() * logps).sum(-1),
        "log_sum_sq_probs": lambda: (2 * logps.detach()).logsumexp(-1),
        "mean_logits": lambda: logits.detach().mean(-1),
        "is_top1": lambda: logits.argmax(-1) == labels,
    }
    chosen = logps.gather(-1, labels[:, None]).squeeze(-1)
    return (chosen, *(make() if name in outputs else None for name, make in columns.items()))


if Version(trl.__version__) < Version("1.16"):
    trl.trainer.utils._ChunkedLogProbFunction = _PlainLogProbs(trl.trainer.utils._ChunkedLogProbFunction)
