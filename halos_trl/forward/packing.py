"""Whether a model is given packed rows, and the check that it gives the same results with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import reduce
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from .attention import PREFIX, PackedForwardError, register
from .heads import read_wanted_hidden

logger = get_logger(__name__)

TOLERANCE = 1e-4
"""Largest difference between packed and padded rows in float32 and float64: of a token's log-prob, in nats, or of a
sequence's score, relative to the scores' size where that is above 1."""

LOW_PRECISION_TOLERANCE = 0.05
"""The same in half precision, for the mean over the batch: single results differ more by rounding alone."""

_INPUTS = {"input_ids", "attention_mask"}


class Packing:
    """What is known about packed rows for one model.

    Args:
        model: the language or reward model, which keeps this object as an attribute, and so do its copies.
        wrapped: the same in its PEFT model, if it has one.
        obstacle: a reason outside of the model not to pack.
        mode: `"on"`, `"off"` or `"auto"`: packed where the model gives the same numbers.
        reduce_sum: sums a tensor over the processes that have to decide alike.

    Raises ValueError with `"on"` for a model that cannot be given packed rows.
    """

    def __init__(
        self, model: PreTrainedModel, wrapped: torch.nn.Module, mode: str, obstacle: str | None,
        reduce_sum: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        self.mode = mode
        self.reduce_sum = reduce_sum
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

    def serves(self, inputs: dict[str, Any], difference: Callable[[], tuple[Tensor, int]]) -> bool:
        """Whether these model inputs go through the model as a packed row; the first ones are compared (`decide`)."""
        if not self.takes(inputs):
            return False
        if self.is_open:
            self.decide(difference)
        return self.active

    def decide(self, difference: Callable[[], tuple[Tensor, int]]) -> None:
        """Compare packed with padded rows, all processes together, and say so where they differ.

        `difference` answers how far the results are apart at each wanted position, and how many layers saw the packed
        row. A batch without a wanted position decides nothing.
        """
        reason, tokens = None, 0
        try:
            values, layers = difference()
            tokens, reason = len(values), self._judge(values, layers)
        except PackedForwardError as error:
            reason = str(error)
        verdict = torch.tensor([float(reason is not None), float(tokens)], device=PartialState().device)
        failed, seen = self.reduce_sum(verdict).tolist()
        if failed:
            self.give_up(reason or "another process found that it gives other results with them")
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
        return f"its results differ by {measure.item():.2g} between packed and padded rows"

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


_sum_over_processes = partial(reduce, reduction="sum")


def give_packing(
    models: Iterable[torch.nn.Module | None],
    mode: str,
    obstacle: str | None = None,
    read_wanted: Callable[[PreTrainedModel], str | None] = read_wanted_hidden,
    reduce_sum: Callable[[Tensor], Tensor] = _sum_over_processes,
) -> None:
    """Decide for each model whether its rows are packed.

    `obstacle` is a reason not to that lies outside of the models. `read_wanted` lets a model's head read the wanted
    positions alone, and answers why it cannot: `read_wanted_hidden` of a causal LM, `read_wanted_scores` of a sequence
    classifier. All processes decide alike, through `reduce_sum`. Raises ValueError as `Packing` does.
    """
    for wrapped in models:
        if wrapped is not None:
            model: Any = language_model(wrapped)
            reason = obstacle or read_wanted(model)
            model.halos_packing = Packing(model, wrapped, mode, reason, reduce_sum)


def compiled_rows(args: Any) -> str | None:
    """Why the rows of a run with these training arguments are not packed; None where they may be."""
    return "`torch_compile=True` would compile a layout that is another one in each batch" * args.torch_compile or None


def packing_of(model: torch.nn.Module) -> Packing | None:
    """What `give_packing` decided; None for a model that it has not seen."""
    return getattr(language_model(model), "halos_packing", None)


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The causal LM or sequence classifier inside wrappers of engines, compilers and PEFT."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _rounds(model: PreTrainedModel) -> bool:
    """Whether its results depend on the shape of a batch by more than the rounding of float32."""
    tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return model.dtype in (torch.float16, torch.bfloat16) or getattr(model, "is_quantized", False) or tf32


def prepare(model: PreTrainedModel, wrapped: torch.nn.Module) -> str | None:
    """Make a model's attention understand packed rows; returns why it cannot, or None. Other rows run as before."""
    reason = _known_obstacle(model, wrapped)
    if reason is not None:
        return reason
    implementation = model.config._attn_implementation
    if not implementation.startswith(PREFIX):  # it may come with the config of another model
        model.set_attn_implementation(register(implementation))
        if not model.config._attn_implementation.startswith(PREFIX):
            return "its attention does not come from transformers' `AttentionInterface`"
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


@torch.no_grad()
def both_ways(
    model: torch.nn.Module, padded: Callable[[], Tensor], packed: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """What `padded()` and `packed()` return, without dropout and without gradient.

    Raises PackedForwardError where the model fails on the packed row.
    """
    with without_dropout(model):
        expected = padded()
        try:
            return expected, packed()
        except (PackedForwardError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the code of a model does with arguments that it does not know
            raise PackedForwardError(f"it fails on a packed row ({type(error).__name__}: {error})") from error


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
