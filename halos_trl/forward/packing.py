"""Whether a model is given packed rows, and the check that it gives the same log-probs with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import reduce
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from .attention import PREFIX, PackedForwardError, register

logger = get_logger(__name__)

TOLERANCE = 1e-4
"""Largest difference of a token's log-prob between packed and padded rows in float32 and float64, nats."""

LOW_PRECISION_TOLERANCE = 0.05
"""The same in half precision, for the mean over the tokens: single tokens differ more by rounding alone."""

_INPUTS = {"input_ids", "attention_mask"}


class Packing:
    """What is known about packed rows for one model.

    Args:
        model: the causal LM, which keeps this object as an attribute, and so do its copies.
        wrapped: the same in its PEFT model, if it has one.
        obstacle: a reason outside of the model not to pack.
        mode: `"on"`, `"off"` or `"auto"`: packed where the model gives the same numbers.

    Raises ValueError with `"on"` for a model that cannot be given packed rows.
    """

    def __init__(self, model: PreTrainedModel, wrapped: torch.nn.Module, mode: str, obstacle: str | None = None):
        self.mode = mode
        self.name = type(model).__name__
        self.layers = model.config.get_text_config().num_hidden_layers
        self.rounds = _rounds(model)
        self.active = False
        self.is_open = False
        if mode != "off":
            reason = obstacle or prepare(model, wrapped)
            self.is_open = reason is None
            if reason is not None:
                self.give_up(reason)

    def takes(self, inputs: dict[str, Any]) -> bool:
        """Whether rows with these model inputs can be packed."""
        if not (self.active or self.is_open):
            return False
        others = inputs.keys() - _INPUTS
        if others:
            self.give_up(f"its batches bring {sorted(others)}, which a packed row has no place for")
        return not others

    def decide(self, difference: Callable[[], tuple[Tensor, int]]) -> None:
        """Compare packed with padded rows, all processes together, and say so where they differ.

        `difference` answers how far they are apart at each wanted token, and how many layers saw the packed row. A
        batch without a wanted token decides nothing.
        """
        reason, tokens = None, 0
        try:
            values, layers = difference()
            tokens, reason = len(values), self._judge(values, layers)
        except PackedForwardError as error:
            reason = str(error)
        verdict = torch.tensor([float(reason is not None), float(tokens)], device=PartialState().device)
        failed, seen = reduce(verdict, reduction="sum").tolist()
        if failed:
            self.give_up(reason or "another process found that it gives other log-probs with them")
        elif seen:
            self.is_open, self.active = False, True

    def _judge(self, difference: Tensor, layers: int) -> str | None:
        if not len(difference):
            return None
        if layers < self.layers:
            return (
                f"{self.layers - layers} of its {self.layers} layers are no attention layers, or compute their "
                "attention without transformers' `AttentionInterface`"
            )
        rounds = self.rounds or torch.is_autocast_enabled(difference.device.type)
        measure, limit = (difference.mean(), LOW_PRECISION_TOLERANCE) if rounds else (difference.max(), TOLERANCE)
        if measure <= limit:
            return None
        return f"its log-probs differ by {measure.item():.2g} nats between packed and padded rows"

    def give_up(self, reason: str) -> None:
        """Padded rows from here on. Raises ValueError where packed ones were asked for."""
        self.active = self.is_open = False
        if self.mode == "on":
            raise ValueError(
                f"`packed='on'` was set, but {self.name} cannot be given packed rows: {reason}. Use `packed='auto'`, "
                "which falls back to padded rows, or `packed='off'`."
            )
        logger.warning(
            f"{self.name} is given padded rows, which cost more time and memory than packed ones: {reason}."
        )


def give_packing(models: Iterable[torch.nn.Module | None], mode: str, obstacle: str | None = None) -> None:
    """Decide for each causal LM whether its rows are packed; `obstacle` is a reason not to that lies outside of it.

    Raises ValueError as `Packing` does.
    """
    for model in models:
        if model is not None:
            causal_lm = language_model(model)
            causal_lm.halos_packing = Packing(causal_lm, model, mode, obstacle)  # type: ignore[assignment, arg-type]


def packing_of(model: torch.nn.Module) -> Packing | None:
    """What `give_packing` decided; None for a model that it has not seen."""
    return getattr(language_model(model), "halos_packing", None)


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The causal LM inside wrappers of engines, compilers and PEFT."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _rounds(model: PreTrainedModel) -> bool:
    """Whether its results depend on the shape of a batch by more than the rounding of float32."""
    tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return model.dtype in (torch.float16, torch.bfloat16) or getattr(model, "is_quantized", False) or tf32


def prepare(model: PreTrainedModel, wrapped: torch.nn.Module) -> str | None:
    """Make a causal LM understand packed rows; returns why it cannot, or None. Other rows run as before."""
    reason = _known_obstacle(model, wrapped)
    if reason is not None:
        return reason
    implementation = model.config._attn_implementation
    if not implementation.startswith(PREFIX):  # it may come with the config of another model
        model.set_attn_implementation(register(implementation))
        if not model.config._attn_implementation.startswith(PREFIX):
            return "its attention does not come from transformers' `AttentionInterface`"
    if not getattr(model, "halos_keeps_wanted", False):
        model.halos_keeps_wanted = True  # type: ignore[assignment]
        # In front of other hooks: a value head reads the same positions.
        model.base_model.register_forward_hook(_keep_wanted, prepend=True)
    return None


def _known_obstacle(model: PreTrainedModel, wrapped: torch.nn.Module) -> str | None:
    config = model.config
    if config.get_text_config() is not config:
        return "it takes other inputs than text"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return "its attention has ALiBi biases"
    if any(peft.is_prompt_learning for peft in getattr(wrapped, "peft_config", {}).values()):
        return "its adapter prepends virtual tokens"
    implementation = config._attn_implementation
    if implementation.startswith(PREFIX) or implementation in ("eager", "sdpa"):
        return None
    known = implementation in AttentionInterface()
    return f"packed rows need the attention implementation 'sdpa' or 'eager', not {implementation!r}" + (
        "" if known else ", which is not registered"
    )


_wanted: ContextVar[Tensor | None] = ContextVar("wanted", default=None)


@contextlib.contextmanager
def wanted_positions(wanted: Tensor) -> Iterator[None]:
    """Inside, the backbone hands on its hidden states at these positions of the packed row alone."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def only_wanted() -> bool:
    """Whether hidden states have been reduced to the positions whose prediction is wanted."""
    return _wanted.get() is not None


def _keep_wanted(module: Any, args: Any, output: Any) -> Any:
    wanted = _wanted.get()
    if wanted is not None:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden[:, wanted.to(hidden.device)]
    return output


@contextlib.contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, whatever mode the model is in."""
    # Quantized layers have no dropout, and some repack their weights for good in evaluation mode.
    training = [m for m in model.modules() if m.training and not type(m).__module__.startswith("bitsandbytes.")]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
