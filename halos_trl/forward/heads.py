"""Computing heads only at the wanted positions, with hooks inside the model's forward pass.

Engines that shard parameters gather a head's weights only there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

_INSTALLED = "halos_reads_wanted"


# -- language models: hidden states --------------------------------------------------------------------------------

_wanted: ContextVar[tuple[Tensor, ...] | None] = ContextVar("wanted", default=None)


@contextlib.contextmanager
def wanted_positions(*index: Tensor) -> Iterator[None]:
    """Context in which the backbone returns its hidden states `(1, M, H)` at these positions only.

    `index` is the batch index and the position of each, both `(M,)`. Negative positions count from the end.
    """
    token = _wanted.set(index)
    try:
        yield
    finally:
        _wanted.reset(token)


def only_wanted() -> bool:
    """Whether hidden states are restricted to the wanted positions."""
    return _wanted.get() is not None


def reads_wanted(model: torch.nn.Module) -> bool:
    """Whether `read_wanted_hidden` or `read_wanted_scores` was called for a model."""
    return getattr(model, _INSTALLED, False)


def read_wanted_hidden(causal_lm: PreTrainedModel) -> str | None:
    """Restrict LM head and value head to the positions of `wanted_positions`; returns why that fails, or None."""
    if causal_lm.base_model is causal_lm:
        return "its backbone and its head are the same module"
    if not reads_wanted(causal_lm):
        setattr(causal_lm, _INSTALLED, True)
        # Before other hooks, so that a value head reads the same positions.
        causal_lm.base_model.register_forward_hook(_keep_wanted, prepend=True)
    return None


def _keep_wanted(module: Any, args: Any, output: Any) -> Any:
    wanted = _wanted.get()
    if wanted is not None:
        hidden_BSH = output.last_hidden_state
        output.last_hidden_state = hidden_BSH[tuple(index.to(hidden_BSH.device) for index in wanted)][None]
    return output


# -- reward models: scores -----------------------------------------------------------------------------------------


class _Scores:
    """Holds the scores of a forward pass between the head and the model's output."""

    def __init__(self, wanted: Tensor):
        self.wanted = wanted
        self.logits: Tensor | None = None
        self.hook: RemovableHandle | None = None

    def note(self, module: Any, args: Any, output: Tensor) -> None:
        self.logits = output[0, self.wanted.to(output.device)]


_scores: ContextVar[_Scores | None] = ContextVar("scores", default=None)


@contextlib.contextmanager
def wanted_scores(wanted: Tensor) -> Iterator[None]:
    """Context in which a reward model returns the logits `(M, labels)` at these positions of a packed row."""
    scores = _Scores(wanted)
    token = _scores.set(scores)
    try:
        yield
    finally:
        _scores.reset(token)
        if scores.hook is not None:
            scores.hook.remove()


def read_wanted_scores(classifier: PreTrainedModel) -> str | None:
    """Make a sequence classifier support `wanted_scores`; returns why that fails, or None."""
    head = getattr(classifier, "score", None)
    if not isinstance(head, torch.nn.Module):
        return "it has no head `score` that is applied to single positions"
    if not reads_wanted(classifier):
        setattr(classifier, _INSTALLED, True)
        classifier.register_forward_pre_hook(_watch_head)
        # Before an engine's hooks, which look for gradients in the model's output.
        classifier.register_forward_hook(_answer_scores, prepend=True)
    return None


def _watch_head(module: Any, args: Any) -> None:
    # Registered for each pass, to run after an engine's hooks: in the backward pass, ZeRO-3 gathers the head's
    # weights only for what is computed from its own hook's output.
    scores = _scores.get()
    if scores is not None:
        if scores.hook is not None:
            scores.hook.remove()
        scores.hook = module.score.register_forward_hook(scores.note)


def _answer_scores(module: Any, args: Any, output: Any) -> Any:
    scores = _scores.get()
    if scores is not None:
        output.logits = scores.logits
    return output


__all__ = [
    "only_wanted",
    "read_wanted_hidden",
    "read_wanted_scores",
    "reads_wanted",
    "wanted_positions",
    "wanted_scores",
]
