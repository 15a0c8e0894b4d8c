"""One optimizer step as one batch, however it is split over micro-batches and processes. And the model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import model_card

if TYPE_CHECKING:
    from .._trl import TrainerHost as _Host
else:
    _Host = object


@dataclass
class Step:
    """The optimizer step in progress."""

    examples: torch.Tensor
    """Examples of the whole step, over all micro-batches and processes."""
    microbatches_left: int


class StepAsBatch(_Host):
    """One optimizer step is one batch, however it is split over micro-batches and processes. And the model card."""

    _step: Step | None = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of the next optimizer step, after `begin_step` has seen them together."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.model.train()
            self.begin_step([self.on_device(batch) for batch in batches])
        return batches, num_items

    def begin_step(self, batches: list[dict[str, Any]]) -> None:
        """Hook: what has to be known about the whole step before its first micro-batch."""
        examples = torch.tensor(sum(map(self.batch_size, batches)), device=self.accelerator.device)
        self._step = Step(self.accelerator.reduce(examples, reduction="sum"), len(batches))

    def batch_size(self, batch: dict[str, Any]) -> int:
        """Number of examples (rows or pairs) in a collated batch."""
        raise NotImplementedError

    def share_of_step(self, mean_loss: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Scale a micro-batch's mean loss so that the step's gradient is that of the mean over all its examples.

        Micro-batches are summed and processes averaged, so the weight is `own examples * processes / examples of the
        step`. Evaluation averages over examples by itself.
        """
        if self.mode == "eval" or self._step is None:
            return mean_loss
        weight = self.batch_size(batch) * self.accelerator.num_processes / self._step.examples
        self._step.microbatches_left -= 1
        if self._step.microbatches_left == 0:
            self._step = None
            self.before_last_backward()
        return mean_loss * weight

    def before_last_backward(self) -> None:
        """Hook: all losses of an optimizer step are there, and its last gradient is not."""

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


__all__ = ["Step", "StepAsBatch"]
