"""One optimizer step as one batch, however it is split over micro-batches and processes.

What a micro-batch has to know about its step travels inside it, so `compute_loss` is a function of its batch: it
remembers nothing between calls, and whoever overrides it gets TRL's meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .._trl import STEP_SHARE, overridden
from ..metrics import RunningMeans

if TYPE_CHECKING:
    from .run import TrainingRun


@dataclass(frozen=True)
class StepShare:
    """What a training micro-batch knows about its optimizer step. It stands in the batch under `STEP_SHARE`."""

    weight: torch.Tensor
    """Factor of the micro-batch's mean loss: own examples * processes * micro-batches / examples of the step. 1 where
    all micro-batches are of one size, since the host averages over micro-batches and processes."""
    prepared: Any = None
    """What the method computed for this micro-batch when it saw the whole step: KTO's KL estimate, PPO's rollout."""


def share_in(batch: Mapping[str, Any]) -> StepShare | None:
    """The share of a training micro-batch; None for every other batch, which stands for itself."""
    return batch.get(STEP_SHARE)


def without_share(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as its collator made it."""
    return {name: value for name, value in batch.items() if name != STEP_SHARE}


def weighted(mean_loss: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """A micro-batch's mean loss, so that the step's gradient is that of the mean over all its examples."""
    share = share_in(batch)
    return mean_loss if share is None else mean_loss * share.weight


def attach_shares(trainer: TrainingRun, batches: list[dict[str, Any]]) -> None:
    """Put into each micro-batch of an optimizer step what it has to know of the step; every process calls this."""
    trainer.model.train()
    for batch, share in zip(batches, shares_of(trainer, [trainer.on_device(b) for b in batches]), strict=True):
        batch[STEP_SHARE] = share


def shares_of(trainer: TrainingRun, batches: list[dict[str, Any]]) -> list[StepShare]:
    """The share of each micro-batch that this process holds of a step; every process has to call this."""
    sizes = [torch.as_tensor(_size_of(trainer, batch), device=trainer.accelerator.device) for batch in batches]
    step_size = trainer.accelerator.reduce(torch.stack(sizes).sum(), reduction="sum").clamp(min=1)
    slots = trainer.accelerator.num_processes * len(batches)
    return [
        StepShare(size * slots / step_size, prepared)
        for size, prepared in zip(sizes, trainer.prepare_step(batches), strict=True)
    ]


def _size_of(trainer: TrainingRun, batch: dict[str, Any]) -> Any:
    try:
        return trainer.batch_size(batch)
    except KeyError as error:
        raise ValueError(
            f"`data_collator` returned a batch with {sorted(batch)}, and {type(trainer).__name__} also reads "
            f"{error}. Leave `data_collator` out, or take the batch of the trainer's own collator and add to it."
        ) from error


def mean_over_examples(trainer: TrainingRun, loop: Callable[[], Any], description: str, prefix: str) -> Any:
    """The host's evaluation `loop`, with a loss that is the mean over all examples, however long the batches are.

    Raises ValueError where the loop has no batch.
    """
    predict, zero = trainer.prediction_step, torch.zeros((), device=trainer.accelerator.device)
    losses, batches = RunningMeans(), 0
    losses.add({"loss": (zero, zero)})  # every process has to reduce

    def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal batches
        batches += 1
        result = predict(model, inputs, *args, **kwargs)
        if result[0] is not None:
            size = torch.as_tensor(trainer.own_size(inputs), device=zero.device)
            losses.add({"loss": (result[0].detach().mean().where(size > 0, 0.0) * size, size)})
        return result

    with overridden(trainer, prediction_step=counted):
        output = loop()
    if not batches:
        raise ValueError(f"{description}: the dataset gives no batch. {trainer.why_no_batch('eval')}")
    for mean in losses.drain(lambda x: trainer.accelerator.reduce(x, reduction="sum")).values():
        output.metrics[f"{prefix}_loss"] = mean
    return output


__all__ = [
    "StepShare",
    "attach_shares",
    "mean_over_examples",
    "share_in",
    "shares_of",
    "weighted",
    "without_share",
]
