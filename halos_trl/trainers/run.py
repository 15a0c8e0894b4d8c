"""What every trainer of the package does around its host's loops, whatever it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from .. import model_card
from .checkpoints import stops_finished_run, train_from
from .start import refuse_frozen, refuse_missing_gradients
from .step import attach_shares, mean_over_examples

if TYPE_CHECKING:
    from .._trl import TrainerHost as _Host
else:
    _Host = object


class TrainingRun(_Host):
    """Mixed in front of a host trainer: checks before the first update, one step as one batch, exact resumption.

    Each job is a function, in `start.py`, `step.py` and `checkpoints.py`; here stands where the host calls them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gradients_seen = False
        self.add_callback(_BeforeUpdate(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`, which a resumed run goes on with exactly.

        `resume_from_checkpoint=True` takes the last *complete* checkpoint of the output directory: one with missing or
        damaged files is passed over with a warning. A checkpoint that is named and is not complete is refused. A run
        that had reached its last step trains no further.
        """

        def train(checkpoint: Any) -> TrainOutput:
            refuse_frozen(self.accelerator.unwrap_model(self.model))
            self._gradients_seen = False
            return super(TrainingRun, self).train(checkpoint, *args, **kwargs)

        return train_from(self, resume_from_checkpoint, train)

    def restore(self, folder: str) -> None:
        """Hook: take from a checkpoint what `before_checkpoint` wrote."""

    def before_update(self) -> None:
        """Hook: gradients are there, and no weight has changed by them (DeepSpeed may have updated earlier)."""
        if not (self._gradients_seen or self.is_deepspeed_enabled):  # which keeps gradients to itself
            self._gradients_seen = True
            refuse_missing_gradients(self.accelerator.unwrap_model(self.model))

    # -- one optimizer step is one batch -------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of the next optimizer step, each with its `StepShare`; none once a run is finished."""
        if stops_finished_run(self):
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            attach_shares(self, batches)
        return batches, num_items

    def prepare_step(self, batches: list[dict[str, Any]]) -> Sequence[Any]:
        """Hook: what has to be computed from the whole step before its first loss, for each micro-batch."""
        return [None] * len(batches)

    def prepare_batch(self, batch: dict[str, Any]) -> Any:
        """The same for a batch that belongs to no step, e.g. one of an evaluation."""
        return self.prepare_step([batch])[0]

    def batch_size(self, batch: dict[str, Any]) -> Any:
        """Hook: what a collated batch counts in its step, e.g. its number of rows or pairs."""
        raise NotImplementedError

    def own_size(self, batch: dict[str, Any]) -> Any:
        """The same of an evaluation batch, without the rows that accelerate repeats to fill the last one."""
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

        def loop() -> Any:
            return super(TrainingRun, self).evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

        return mean_over_examples(self, loop, description, metric_key_prefix)

    # -- model card ----------------------------------------------------------------------------------------------

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


class _BeforeUpdate(TrainerCallback):
    def __init__(self, trainer: TrainingRun):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.before_update()


__all__ = ["TrainingRun"]
