"""TRL's fused LM head, put on a model so that a copy of the model runs its own weights."""

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
    """`trl.trainer.utils.add_fused_lm_head`, with what it lacks.

    Its forward calls the model's former one through a closure, so a deep copy would run the original's weights; here
    the former one is found through the model itself. A `PeftModel` gets the head on its base model. Numbers of experts
    are read from the model where the config has them under another name, a head under `trainable_token_indices` has a
    bias, and on a CPU the logits are computed in tiles that its caches hold.
    """
    model = _causal_lm(model)
    # Under a name of its own, since a model may get a head from each of several trainers.
    unfused = f"_forward_without_fused_head_{next(_heads)}"
    if "forward" in vars(model):  # somebody's own; bound methods are copied along with their object
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
"""Logits of a tile on a CPU. TRL's hold 4096 tokens and 32768 entries of the vocabulary, a gigabyte with copies."""


def tokens_per_tile(width: int) -> int:
    """Rows of a tile of `width` logits each."""
    return max(64, TILE // width)


@contextlib.contextmanager
def _small_tiles() -> Iterator[None]:
    function = utils._ChunkedLogProbFunction
    # TRL before 1.16 has no tiles on a CPU; see `compat`.
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
    """Whether the model has experts to balance. Its config may have the option although this model has none."""
    config = model.config.get_text_config()
    return bool(getattr(config, "num_experts", None) or getattr(_causal_lm(model), "num_experts", None))


def _causal_lm(model: Any) -> Any:
    # Asked in every forward pass; accelerate's `is_peft_model` takes milliseconds.
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def _expert_counts(causal_lm: Any) -> Iterator[None]:
    """TRL reads both numbers from the config, under the names that Mixtral's has."""
    config = causal_lm.config.get_text_config()
    names = ("num_experts", "num_experts_per_tok")
    missing = {n: getattr(causal_lm, n) for n in names if not hasattr(config, n) and hasattr(causal_lm, n)}
    with overridden(config, **missing):
        yield


@contextlib.contextmanager
def _head_with_bias(head: Any) -> Iterator[None]:
    # PEFT's wrapper answers for the weight of the module that it wraps, and for nothing else.
    if isinstance(head, TrainableTokensWrapper) and not hasattr(head, "bias"):
        vars(head)["bias"] = getattr(head.original_module, "bias", None)
        try:
            yield
        finally:
            del vars(head)["bias"]
    else:
        yield
