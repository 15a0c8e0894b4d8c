"""Decides whether a model runs on packed rows, and checks that they give the same results as padded ones."""

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
"""Tolerance for the difference between packed and padded rows in float32 and float64: of a token's log-prob, in nats,
or of a sequence's score, relative to the size of the scores if that is above 1."""

LOW_PRECISION_TOLERANCE = 0.05
"""The same in half precision, for the mean over the batch, because single results differ more by rounding."""

_INPUTS = {"input_ids", "attention_mask"}


class Packing:
    """Whether one model runs on packed rows.

    Args:
        model: the language or reward model. It and its copies store this object as an attribute.
        wrapped: the same model inside its PEFT model, if it has one.
        obstacle: a reason not to pack that does not depend on the model.
        mode: `"on"`, `"off"` or `"auto"` (pack if the model gives the same numbers).
        reduce_sum: sums a tensor over the processes, which must all make the same decision.

    Raises ValueError with `"on"` for a model that does not support packed rows.
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
            self.give_up(f"its batches contain {sorted(others)}, which packed rows do not support")
        return not others

    def serves(self, inputs: dict[str, Any], difference: Callable[[], tuple[Tensor, int]]) -> bool:
        """Whether to run these model inputs as a packed row; the first ones are compared with padded rows."""
        if not self.takes(inputs):
            return False
        if self.is_open:
            self.decide(difference)
        return self.active

    def decide(self, difference: Callable[[], tuple[Tensor, int]]) -> None:
        """Compare packed with padded rows over all processes, and give up packing if they differ.

        `difference` returns the absolute difference of the results at each wanted position, and the number of layers
        that used the packed row. A batch without a wanted position leaves the decision open.
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
            self.give_up(reason or "its results with packed rows differ on another process")
        elif seen:
            self.is_open, self.active = False, True

    def _judge(self, difference: Tensor, layers: int) -> str | None:
        if not len(difference):
            return None
        if layers < self.layers:
            return (
                f"{self.layers - layers} of its {self.layers} layers are not attention layers, or compute attention "
                "without transformers' `AttentionInterface`"
            )
        rounds = self.rounds or torch.is_autocast_enabled(difference.device.type)
        measure, limit = (difference.mean(), LOW_PRECISION_TOLERANCE) if rounds else (difference.max(), TOLERANCE)
        if measure <= limit:
            return None
        return f"its results differ by {measure.item():.2g} between packed and padded rows"

    def give_up(self, reason: str) -> None:
        """Use padded rows from here on. Raises ValueError with mode `"on"`."""
        self.active = self.is_open = False
        if self.mode == "on":
            raise ValueError(
                f"`packed='on'` was set, but {self.name} does not support packed rows: {reason}. Use `packed='auto'`, "
                "which falls back to padded rows, or `packed='off'`."
            )
        logger.warning(f"{self.name} uses padded rows, which take more time and memory than packed ones: {reason}.")


_sum_over_processes = partial(reduce, reduction="sum")


def give_packing(
    models: Iterable[torch.nn.Module | None],
    mode: str,
    obstacle: str | None = None,
    read_wanted: Callable[[PreTrainedModel], str | None] = read_wanted_hidden,
    reduce_sum: Callable[[Tensor], Tensor] = _sum_over_processes,
) -> None:
    """Decide for each model whether its rows are packed.

    `obstacle` is a reason not to pack that does not depend on the models. `read_wanted` restricts a model's head to
    the wanted positions and returns why that fails, or None: `read_wanted_hidden` for a causal LM,
    `read_wanted_scores` for a sequence classifier. `reduce_sum` lets all processes make the same decision. Raises
    ValueError as `Packing` does.
    """
    for wrapped in models:
        if wrapped is not None:
            model: Any = language_model(wrapped)
            reason = obstacle or read_wanted(model)
            model.halos_packing = Packing(model, wrapped, mode, reason, reduce_sum)


def compiled_rows(args: Any) -> str | None:
    """Why rows are not packed with these training arguments; None if they may be."""
    return "`torch_compile=True` would compile a layout that changes with each batch" * args.torch_compile or None


def packing_of(model: torch.nn.Module) -> Packing | None:
    """The model's `Packing`; None if `give_packing` was not called for it."""
    return getattr(language_model(model), "halos_packing", None)


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The causal LM or sequence classifier inside the wrappers of engines, compilers and PEFT."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _rounds(model: PreTrainedModel) -> bool:
    """Whether results depend on the batch's shape by more than float32 rounding."""
    tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return model.dtype in (torch.float16, torch.bfloat16) or getattr(model, "is_quantized", False) or tf32


def prepare(model: PreTrainedModel, wrapped: torch.nn.Module) -> str | None:
    """Make a model's attention support packed rows; returns why that fails, or None. Padded rows are not affected."""
    reason = _known_obstacle(model, wrapped)
    if reason is not None:
        return reason
    implementation = model.config._attn_implementation
    if not implementation.startswith(PREFIX):  # the config may have been copied from a prepared model
        model.set_attn_implementation(register(implementation))
        if not model.config._attn_implementation.startswith(PREFIX):
            return "its attention does not use transformers' `AttentionInterface`"
    return None


def _known_obstacle(model: PreTrainedModel, wrapped: torch.nn.Module) -> str | None:
    config = model.config
    if config.get_text_config() is not config:
        return "it has inputs other than text"
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
    """The results of `padded()` and `packed()`, without dropout and without gradient.

    Raises PackedForwardError if the model fails on the packed row.
    """
    with without_dropout(model):
        expected = padded()
        try:
            return expected, packed()
        except (PackedForwardError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # model code may raise any error for unexpected arguments
            raise PackedForwardError(f"it fails on a packed row ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Disable dropout temporarily, in train and in eval mode."""
    # Skip quantized layers: they have no dropout, and some repack their weights permanently in eval mode.
    training = [m for m in model.modules() if m.training and not type(m).__module__.startswith("bitsandbytes.")]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
