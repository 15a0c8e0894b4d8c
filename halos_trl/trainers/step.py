"""One optimizer step as one batch, regardless of how it is split over micro-batches and processes.

Each micro-batch contains the information about its step, so `compute_loss` depends only on its batch, keeps no state
between calls, and can be overridden as in TRL.
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
    """Information about the optimizer step of a training micro-batch, stored in the batch under `STEP_SHARE`."""

    weight: torch.Tensor
    """Factor of the micro-batch's mean loss: own examples * processes * micro-batches / examples of the step. 1 if all
    micro-batches have the same size, since the host averages over micro-batches and processes.
    """
    prepared: Any = None
    """What the method computed for this micro-batch from the whole step: KTO's KL estimate, PPO's rollout."""


def share_in(batch: Mapping[str, Any]) -> StepShare | None:
    """The share of a training micro-batch; None for any other batch."""
    return batch.get(STEP_SHARE)


def without_share(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as returned by the collator."""
    return {name: value for name, value in batch.items() if name != STEP_SHARE}


def weighted(mean_loss: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """A micro-batch's mean loss, weighted so that the step's gradient is that of the mean over all examples."""
    share = share_in(batch)
    return mean_loss if share is None else mean_loss * share.weight


def attach_shares(trainer: TrainingRun, batches: list[dict[str, Any]]) -> None:
    """Add a `StepShare` to each micro-batch of an optimizer step. All processes must call this."""
    trainer.model.train()
    for batch, share in zip(batches, shares_of(trainer, [trainer.on_device(b) for b in batches]), strict=True):
        batch[STEP_SHARE] = share


def shares_of(trainer: TrainingRun, batches: list[dict[str, Any]]) -> list[StepShare]:
    """The share of each micro-batch of a step on this process. All processes must call this."""
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
            f"`data_collator` returned a batch with {sorted(batch)}, but {type(trainer).__name__} also reads "
            f"{error}. Leave `data_collator` out, or extend the batch of the trainer's own collator."
        ) from error


def mean_over_examples(trainer: TrainingRun, loop: Callable[[], Any], description: str, prefix: str) -> Any:
    """The host's evaluation `loop`, with a loss that is the mean over all examples, regardless of batch sizes.

    Raises ValueError if the loop has no batch.
    """
    predict, zero = trainer.prediction_step, torch.zeros((), device=trainer.accelerator.device)
    losses, batches = RunningMeans(), 0
    losses.add({"loss": (zero, zero)})  # all processes must take part in the reduction

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
        raise ValueError(f"{description}: the dataset yields no batch. {trainer.why_no_batch('eval')}")
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
