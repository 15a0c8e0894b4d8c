"""Checks of the return values of user functions, which would otherwise fail far from their cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .arguments import shown
from .overridden import overridden

if TYPE_CHECKING:
    from trl import DPOTrainer as _Mixin
else:
    _Mixin = object


class CheckedCollator:
    """Wraps a collator and checks that it returns a batch."""

    def __init__(self, collator: Callable[[list], Any]):
        self.collator = collator

    def __call__(self, rows: list) -> Any:
        batch = self.collator(rows)
        if not isinstance(batch, Mapping):
            raise TypeError(f"`data_collator` returned {shown(batch)}. Return a dict of tensors.")
        if not batch:
            raise ValueError("`data_collator` returned an empty batch. Return a dict of tensors.")
        return batch


class CheckedMetrics:
    """Wraps `compute_metrics` and checks that it returns numbers by name (at the end with `batch_eval_metrics`)."""

    def __init__(self, compute: Callable[..., Any]):
        self.compute = compute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        metrics = self.compute(*args, **kwargs)
        if not isinstance(metrics, dict) and kwargs.get("compute_result", True):
            raise TypeError(f"`compute_metrics` returned {shown(metrics)}. Return a dict of numbers.")
        return metrics


class ChecksUserFunctions(_Mixin):
    """Checks the results of `data_collator` and `compute_metrics`. The trainer's attributes are not changed."""

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with overridden(self, data_collator=CheckedCollator(self.data_collator)):
            return super()._get_dataloader(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`, with `compute_metrics` checked."""
        if self.compute_metrics is None:
            return super().evaluation_loop(*args, **kwargs)
        with overridden(self, compute_metrics=CheckedMetrics(self.compute_metrics)):
            return super().evaluation_loop(*args, **kwargs)
