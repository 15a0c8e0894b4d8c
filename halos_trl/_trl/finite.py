"""Checks for NaN and infinity in losses, gradients, optimizer settings and saved weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..sharded import own_shard, parameters_by_name, whole

if TYPE_CHECKING:
    from transformers import Trainer as _Mixin
else:
    _Mixin = object


class FiniteUpdates(_Mixin):
    """A trainer that raises an error before a NaN or an infinity can reach its weights or its logs."""

    @property
    def moment(self) -> str:
        """The current step or "evaluation", for error messages."""
        return f"step {self.state.global_step + 1}" if self.model.training else "evaluation"

    def refuse_non_finite_loss(self, loss: torch.Tensor) -> None:
        """Raise before a NaN or infinite loss is logged or differentiated."""
        if not torch.isfinite(loss).all():
            raise ValueError(
                f"The loss is {loss.item()} at {self.moment}. The weights were not updated with it. Check the model's "
                "weights for NaN (a damaged checkpoint) and the scores for extreme values, lower `learning_rate`, or "
                "use `bf16` or float32 instead of `fp16`."
            )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called after the last backward pass of a step and before the update.
        self._refuse_non_finite_optimizer()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = float(whole(norm)) if isinstance(norm, torch.Tensor) else norm
        if value is None or math.isfinite(value):
            return norm
        if self.skips_overflow:
            return None  # not logged
        raise ValueError(
            f"The gradient's norm is {value} at step {self.state.global_step + 1}. The weights were not updated with "
            "it (DeepSpeed, which updates earlier, may have done so). Lower `learning_rate`, or check the model's "
            "weights for extreme values."
        )

    @property
    def skips_overflow(self) -> bool:
        """Whether infinite gradients may be due to fp16's loss scale; the scaler then skips the step and lowers it."""
        if self.accelerator.mixed_precision != "fp16":
            return False
        scaler = self.accelerator.scaler  # None under an engine with its own scaler
        return scaler is None or scaler.get_scale() > 1

    def _refuse_non_finite_optimizer(self) -> None:
        # The current values, which schedules, callbacks and the caller's optimizer may have changed from the config.
        for group in self.optimizer.param_groups:
            for name, value in _numbers(group):
                if math.isnan(value) or (name == "lr" and math.isinf(value)):
                    raise ValueError(
                        f"The optimizer's `{name}` is {value} at step {self.state.global_step + 1}. The weights were "
                        "not updated with it. Check `learning_rate`, the schedule, and the optimizer's settings."
                    )

    def refuse_non_finite_weights(self, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Raise before trained weights with NaN or infinity are written to a file."""
        # No loss is computed after the last update of a run, so only this check can detect a bad update.
        trained = {name: p for name, p in parameters_by_name(self.model).items() if p.requires_grad}
        for name, parameter in trained.items():
            tensor = own_shard(parameter) if state_dict is None else state_dict.get(name, parameter.new_empty(0))
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"The weights {name!r} contain NaN or infinite numbers after step {self.state.global_step}, so "
                    "the model is not saved. Lower `learning_rate`, and resume from an earlier checkpoint."
                )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.refuse_non_finite_weights(state_dict)
        super()._save(output_dir, state_dict)  # type: ignore[misc]


def _numbers(group: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numeric settings of a parameter group, by name; tuples yield one number each."""
    for name, setting in group.items():
        if name == "params":
            continue
        values: Iterable[Any] = setting if isinstance(setting, list | tuple) else [setting]
        for value in values:
            if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1):
                yield name, float(value)


__all__ = ["FiniteUpdates"]
