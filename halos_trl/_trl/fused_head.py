"""TRL's fused LM head, put on a model so that a copy of the model runs its own weights."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

from accelerate.utils import is_peft_model
from peft.utils.other import TrainableTokensWrapper
from trl.trainer.utils import add_fused_lm_head

from .overridden import overridden

_UNFUSED = "_forward_without_fused_head"


def add_copyable_head(model: Any, *args: Any, **kwargs: Any) -> None:
    """`trl.trainer.utils.add_fused_lm_head`, with what it lacks.

    Its forward calls the model's former one through a closure, so a deep copy would run the original's weights; here
    the former one is found through the model itself. A `PeftModel` gets the head on its base model. Numbers of experts
    are read from the model where the config has them under another name, and a head under `trainable_token_indices`
    has a bias.
    """
    if is_peft_model(model):
        model = model.get_base_model()
    if "forward" in vars(model):  # somebody's own; bound methods are copied along with their object
        vars(model)[_UNFUSED] = model.forward
    add_fused_lm_head(model, *args, **kwargs)
    fused = model.forward.__func__

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            own = vars(self).get(_UNFUSED)
            return type(self).forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        if not has_router_logits(self):
            kwargs["output_router_logits"] = False
        with _head_with_bias(self.get_output_embeddings()), _expert_counts(self):
            return fused(self, *args, fused_lm_head=True, **kwargs)

    model.forward = types.MethodType(forward, model)


def has_router_logits(model: Any) -> bool:
    """Whether the model has experts to balance. Its config may have the option although this model has none."""
    config = model.config.get_text_config()
    return bool(getattr(config, "num_experts", None) or getattr(_causal_lm(model), "num_experts", None))


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


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
