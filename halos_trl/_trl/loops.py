"""Additions to transformers' loops: metrics are reset, runs without a step are refused, streams are split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from datasets import IterableDataset

from .overridden import overridden

if TYPE_CHECKING:
    # The mixins use attributes of the trainer that they are combined with, which mypy does not know.
    from trl import DPOTrainer as Mixin
else:
    Mixin = object


class CleanLoops(Mixin):
    """A trainer whose training and evaluation loops start with empty sums and raise an error if there is no step."""

    _trained_tokens: int = 0
    """Tokens in training batches, over all processes. TRL's own count grows with every call of its loss, and starts
    at 0 when a run is resumed."""

    _new_tokens: torch.Tensor | None = None
    """Tokens of this process not yet added to it."""

    def forget_metrics(self, mode: str) -> None:
        """Drop the metrics recorded for the next log line of a mode."""
        self._metrics[mode].clear()
        if mode == "train":
            self._new_tokens = None

    def count_tokens(self, batch: dict[str, Any]) -> None:
        """Add the tokens of a training micro-batch to `num_tokens`. No communication, no device sync."""
        if "attention_mask" in batch:
            tokens = batch["attention_mask"].sum()
            self._new_tokens = tokens if self._new_tokens is None else self._new_tokens + tokens

    def trained_tokens(self) -> int:
        """Number of tokens in training batches so far, over all processes. Every process must call this."""
        if self._new_tokens is not None:
            new = self._new_tokens.to(self.accelerator.device, torch.int64)
            self._trained_tokens += int(self.accelerator.reduce(new, reduction="sum").item()) // self._tp_size
            self._new_tokens = None
        return self._trained_tokens

    def go_on_counting(self, tokens: int) -> None:
        """Set the token count of a resumed run to the one in its checkpoint."""
        self._trained_tokens = tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with this package's `num_tokens`."""
        tokens = self.trained_tokens()
        metrics = self._metrics["train" if self.model.training else "eval"]
        if metrics:
            metrics["num_tokens"] = [tokens]
        super().log(logs, start_time)

    def check_loops(self, args: Any) -> None:
        """Raise ValueError for settings that allow no optimizer step."""
        if args.max_steps == 0 or args.max_steps < -1:
            raise ValueError(
                f"`max_steps={args.max_steps}` allows no optimizer step, and transformers would train for "
                "`num_train_epochs` instead. Pass a positive number, or -1 to train for `num_train_epochs`."
            )
        # accelerate would split a collated batch of pairs between its chosen and its rejected half.
        dispatch = getattr(args.accelerator_config, "dispatch_batches", None)
        if dispatch and args.world_size > 1:
            raise ValueError(
                "`accelerator_config={'dispatch_batches': True}` distributes slices of one process's collated "
                "batches, which splits pairs and fails if widths differ. Leave it out, so that each process reads its "
                "own rows."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. Raises ValueError if there would be no optimizer step."""
        if self.args.max_steps <= 0 and self.args.num_train_epochs <= 0:
            raise ValueError(
                f"`num_train_epochs={self.args.num_train_epochs}` without `max_steps` allows no optimizer step. Pass "
                "a positive number for one of them."
            )
        self._tokens_before = self._trained_tokens
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # `auto_find_batch_size` calls this again with a smaller batch after running out of memory.
        self.forget_metrics("train")
        self._trained_tokens = self._tokens_before
        return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """All micro-batches of the next optimizer step. Raises ValueError if the first step has none."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches and self.state.global_step == 0:
            raise ValueError(
                "The train dataset yields no batch, so nothing would be trained. " + self.why_no_batch("train")
            )
        return batches, num_items

    def why_no_batch(self, mode: str) -> str:
        """The end of an error message: why a loop has no batch, and what to do about it."""
        size = self._train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        if self.args.dataloader_drop_last:
            return (
                f"`dataloader_drop_last=True` drops batches of fewer than {size} rows on each of "
                f"{self.accelerator.num_processes} processes. Disable it, lower `per_device_{mode}_batch_size`, or "
                "add rows."
            )
        return "Check its rows: all rows of a streamed dataset may have been filtered out."

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`, with metrics of `predict` or an interrupted evaluation dropped first."""
        self.forget_metrics("eval")
        return super().evaluation_loop(*args, **kwargs)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(dataset, IterableDataset):
            return super()._get_dataloader(dataset, *args, **kwargs)
        # Otherwise one process would read the stream and distribute slices of its collated batches.
        with overridden(self.accelerator.dataloader_config, dispatch_batches=False):
            return super()._get_dataloader(dataset, *args, **kwargs)
