"""One optimizer step as one batch, however it is split over micro-batches and processes. And the model card.

What a micro-batch has to know about its step travels inside it, so `compute_loss` is a function of its batch: it
remembers nothing between calls, and whoever overrides it gets TRL's meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import model_card
from .._trl import STEP_SHARE, overridden
from ..metrics import RunningMeans
from .start import StartChecks


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


class StepAsBatch(StartChecks):
    """One optimizer step is one batch, however it is split over micro-batches and processes. And the model card."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of the next optimizer step, each with its `StepShare`."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.model.train()
            for batch, share in zip(batches, self.shares_of([self.on_device(b) for b in batches]), strict=True):
                batch[STEP_SHARE] = share
        return batches, num_items

    def shares_of(self, batches: list[dict[str, Any]]) -> list[StepShare]:
        """The share of each micro-batch that this process holds of a step; every process has to call this."""
        sizes = [torch.as_tensor(self._size_of(batch), device=self.accelerator.device) for batch in batches]
        step_size = self.accelerator.reduce(torch.stack(sizes).sum(), reduction="sum").clamp(min=1)
        slots = self.accelerator.num_processes * len(batches)
        return [
            StepShare(size * slots / step_size, prepared)
            for size, prepared in zip(sizes, self.prepare_step(batches), strict=True)
        ]

    def _size_of(self, batch: dict[str, Any]) -> Any:
        try:
            return self.batch_size(batch)
        except KeyError as error:
            raise ValueError(
                f"`data_collator` returned a batch with {sorted(batch)}, and {type(self).__name__} also reads "
                f"{error}. Leave `data_collator` out, or take the batch of the trainer's own collator and add to it."
            ) from error

    def prepare_step(self, batches: list[dict[str, Any]]) -> Sequence[Any]:
        """Hook: what has to be computed from the whole step before its first loss, for each micro-batch."""
        return [None] * len(batches)

    def prepare_batch(self, batch: dict[str, Any]) -> Any:
        """The same for a batch that belongs to no step, e.g. one of an evaluation."""
        return self.prepare_step([batch])[0]

    def batch_size(self, batch: dict[str, Any]) -> Any:
        """Number of examples (rows or pairs) in a collated batch."""
        raise NotImplementedError

    # -- evaluation --------------------------------------------------------------------------------------------

    def own_size(self, batch: dict[str, Any]) -> Any:
        """Number of examples of an evaluation batch, without the rows that accelerate repeats to fill the last one."""
        return self.real_rows(self.batch_size(batch))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The host's loop. Its loss is the mean over all examples, also where the last batch of a stream is short."""
        predict, zero = self.prediction_step, torch.zeros((), device=self.accelerator.device)
        losses, batches = RunningMeans(), 0
        losses.add({"loss": (zero, zero)})  # every process has to reduce

        def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal batches
            batches += 1
            result = predict(model, inputs, *args, **kwargs)
            if result[0] is not None:
                size = torch.as_tensor(self.own_size(inputs), device=zero.device)
                losses.add({"loss": (result[0].detach().mean().where(size > 0, 0.0) * size, size)})
            return result

        with overridden(self, prediction_step=counted):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if not batches:
            raise ValueError(f"{description}: the dataset gives no batch. {self.why_no_batch('eval')}")
        for mean in losses.drain(lambda x: self.accelerator.reduce(x, reduction="sum")).values():
            output.metrics[f"{metric_key_prefix}_loss"] = mean
        return output

    # -- model card --------------------------------------------------------------------------------------------

    card_fields: tuple[str, ...] = ("beta",)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into the output directory: method, paper, base model, hyper-parameters, versions.

        Differs from TRL's card: a local base model is named as such instead of being linked as `None`, and the
        hyper-parameters are listed.
        """
        if self.is_world_process_zero():
            model_card.write(self, model_name, dataset_name, tags)


__all__ = ["StepAsBatch", "StepShare", "share_in", "weighted", "without_share"]
