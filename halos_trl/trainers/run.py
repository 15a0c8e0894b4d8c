"""Steps that every trainer of the package adds to its host's training and evaluation loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from .. import model_card
from .checkpoints import stops_finished_run, train_from
from .run_files import RunFiles, recorded
from .start import refuse_frozen, refuse_missing_gradients
from .step import attach_shares, mean_over_examples

if TYPE_CHECKING:
    from .._trl import TrainerHost as _Host
else:
    _Host = object


class TrainingRun(_Host):
    """Mixin placed before a host trainer: checks before the first update, one step as one batch, exact resumption.

    The work is done by functions in `start.py`, `step.py` and `checkpoints.py`; this class calls them from the host's
    hooks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gradients_seen = False
        self.add_callback(_BeforeUpdate(self))
        self.add_callback(RunFiles(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`, with exact resumption.

        `resume_from_checkpoint=True` uses the last *complete* checkpoint of the output directory; checkpoints with
        missing or damaged files are skipped with a warning. An incomplete checkpoint that is named explicitly is
        refused. A run that had already finished trains no further.
        """

        def train(checkpoint: Any) -> TrainOutput:
            refuse_frozen(self.accelerator.unwrap_model(self.model))
            self._gradients_seen = False
            return super(TrainingRun, self).train(checkpoint, *args, **kwargs)

        with recorded(self):
            return train_from(self, resume_from_checkpoint, train)

    def restore(self, folder: str) -> None:
        """Hook: restore what `before_checkpoint` wrote to a checkpoint."""

    def before_update(self) -> None:
        """Hook: gradients are computed, but no weight has been updated yet (except under DeepSpeed, which may update
        earlier).
        """
        if not (self._gradients_seen or self.is_deepspeed_enabled):  # which keeps gradients to itself
            self._gradients_seen = True
            refuse_missing_gradients(self.accelerator.unwrap_model(self.model))

    # -- one optimizer step is one batch -------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of the next optimizer step, each with its `StepShare`; none if the run is finished."""
        if stops_finished_run(self):
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            attach_shares(self, batches)
            for batch in batches:
                self.count_tokens(batch)
        return batches, num_items

    def prepare_step(self, batches: list[dict[str, Any]]) -> Sequence[Any]:
        """Hook: values computed from the whole step before its first loss, one for each micro-batch."""
        return [None] * len(batches)

    def prepare_batch(self, batch: dict[str, Any]) -> Any:
        """The same for a batch that is not part of a step, such as an evaluation batch."""
        return self.prepare_step([batch])[0]

    def batch_size(self, batch: dict[str, Any]) -> Any:
        """Hook: the weight of a collated batch in its step, such as its number of rows or pairs."""
        raise NotImplementedError

    def own_size(self, batch: dict[str, Any]) -> Any:
        """The same for an evaluation batch, without the rows that accelerate repeats to fill the last one."""
        return self.real_rows(self.batch_size(batch))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The host's loop, with a loss that is the mean over all examples even if the last batch of a stream
        is short.

        The metrics of callbacks that have `evaluation_metrics(prefix)`, such as `GenerationCallback`, are added, so
        that they are logged, used for the best model and passed to other callbacks like all others.
        """

        def loop() -> Any:
            return super(TrainingRun, self).evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

        output = mean_over_examples(self, loop, description, metric_key_prefix)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "evaluation_metrics"):
                output.metrics.update(callback.evaluation_metrics(metric_key_prefix))
        return output

    # -- model card ----------------------------------------------------------------------------------------------

    card_fields: tuple[str, ...] = ("beta",)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write the model card to `README.md` in the output directory: method, paper, base model, hyperparameters,
        versions.

        Differs from TRL's card: a local base model is described as local instead of being linked as `None`, and the
        hyperparameters are listed.
        """
        if self.is_world_process_zero():
            model_card.write(self, model_name, dataset_name, tags)


class _BeforeUpdate(TrainerCallback):
    def __init__(self, trainer: TrainingRun):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.before_update()


__all__ = ["TrainingRun"]
