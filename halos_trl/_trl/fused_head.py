"""TRL's fused LM head, added so that a deep copy of the model uses its own weights."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from .overridden import overridden

_heads = itertools.count()


def add_copyable_head(model: Any, *args: Any, **kwargs: Any) -> None:
    """Add TRL's fused LM head (`trl.trainer.utils.add_fused_lm_head`) to a model, with several corrections.

    TRL's forward calls the model's original forward through a closure, so a deep copy would use the weights of the
    original model; here the original forward is looked up on the model itself. For a `PeftModel` the head is added to
    the base model. Expert counts are read from the model if its config uses other names, the bias of a head under
    `trainable_token_indices` is used, and on a CPU the logits are computed in tiles that fit its caches.
    """
    model = _causal_lm(model)
    # Stored under a separate name, because several trainers may each add a head to the same model.
    unfused = f"_forward_without_fused_head_{next(_heads)}"
    if "forward" in vars(model):  # set by the user; deep copies rebind bound methods
        vars(model)[unfused] = model.forward
    add_fused_lm_head(model, *args, **kwargs)
    fused = model.forward.__func__

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            own = vars(self).get(unfused)
            return type(self).forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        if not has_router_logits(self):
            kwargs["output_router_logits"] = False
        with _head_with_bias(self.get_output_embeddings()), _expert_counts(self), _small_tiles():
            return fused(self, *args, fused_lm_head=True, **kwargs)

    model.forward = types.MethodType(forward, model)


TILE = 4 * 2**20
"""Logits per tile on a CPU. TRL's tiles of 4096 tokens and 32768 vocabulary entries take a gigabyte with copies."""


def tokens_per_tile(width: int) -> int:
    """Number of tokens per tile, for `width` logits per token."""
    return max(64, TILE // width)


@contextlib.contextmanager
def _small_tiles() -> Iterator[None]:
    function = utils._ChunkedLogProbFunction
    # TRL before 1.16 has no tiled CPU implementation; see `compat`.
    tiled = _in_small_tiles(function) if isinstance(function, type) else function
    with overridden(utils, _ChunkedLogProbFunction=tiled):
        yield


@functools.cache
def _in_small_tiles(function: Any) -> Any:
    module = sys.modules[function.__module__]

    class SmallTiles(function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
            tokens = tokens_per_tile(min(len(weight), utils._CHUNKED_LOGPROB_CHUNK_SIZE))
            ctx.tile = {"TOKEN_CHUNK_SIZE": tokens} if hidden.device.type == "cpu" else {}
            with overridden(module, **ctx.tile):
                return function.forward(ctx, hidden, weight, *rest)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            with overridden(module, **ctx.tile):
                return function.backward(ctx, *gradients)

    return SmallTiles


def has_router_logits(model: Any) -> bool:
    """Whether the model is a mixture of experts; the config may have the option for a model without experts."""
    config = model.config.get_text_config()
    return bool(getattr(config, "num_experts", None) or getattr(_causal_lm(model), "num_experts", None))


def _causal_lm(model: Any) -> Any:
    # Called in every forward pass, and accelerate's `is_peft_model` takes milliseconds.
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def _expert_counts(causal_lm: Any) -> Iterator[None]:
    """Set expert counts in the config under Mixtral's names, which are the ones that TRL reads."""
    config = causal_lm.config.get_text_config()
    names = ("num_experts", "num_experts_per_tok")
    missing = {n: getattr(causal_lm, n) for n in names if not hasattr(config, n) and hasattr(causal_lm, n)}
    with overridden(config, **missing):
        yield


@contextlib.contextmanager
def _head_with_bias(head: Any) -> Iterator[None]:
    # PEFT's wrapper exposes the weight of the wrapped module, but not its other attributes.
    if isinstance(head, TrainableTokensWrapper) and not hasattr(head, "bias"):
        vars(head)["bias"] = getattr(head.original_module, "bias", None)
        try:
            yield
        finally:
            del vars(head)["bias"]
    else:
        yield
