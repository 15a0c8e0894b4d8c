"""What stands between a NaN and the weights: checks of the loss, of the gradient, and of what is saved."""

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
    """A trainer that stops with an error where a NaN or an infinity would reach its weights or its logs."""

    @property
    def moment(self) -> str:
        """Where an error appeared, for its message."""
        return f"step {self.state.global_step + 1}" if self.model.training else "evaluation"

    def refuse_non_finite_loss(self, loss: torch.Tensor) -> None:
        """Raise before a loss that is no number can be logged or have a gradient."""
        if not torch.isfinite(loss).all():
            raise ValueError(
                f"The loss is {loss.item()} at {self.moment}. The weights were not updated with it. Look for NaN in "
                "the model's weights (a broken checkpoint) and for extreme scores, lower `learning_rate`, or use "
                "`bf16` or `float32` instead of `fp16`."
            )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Between the last gradient of a step and its update.
        self._refuse_non_finite_optimizer()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = float(whole(norm)) if isinstance(norm, torch.Tensor) else norm
        if value is None or math.isfinite(value):
            return norm
        if self.skips_overflow:
            return None  # which keeps it out of the log
        raise ValueError(
            f"The gradient's norm is {value} at step {self.state.global_step + 1}. The weights were not updated "
            "with it (DeepSpeed, which updates earlier, may have done so). Lower `learning_rate`, or look for "
            "extreme values in the model's weights."
        )

    @property
    def skips_overflow(self) -> bool:
        """Whether infinite gradients come from the loss scale of fp16: the scaler skips the step and lowers it."""
        if self.accelerator.mixed_precision != "fp16":
            return False
        scaler = self.accelerator.scaler  # an engine has its own
        return scaler is None or scaler.get_scale() > 1

    def _refuse_non_finite_optimizer(self) -> None:
        # Not the configuration's values, but what schedules, callbacks and the caller's optimizer made of them.
        for group in self.optimizer.param_groups:
            for name, value in _numbers(group):
                if math.isnan(value) or (name == "lr" and math.isinf(value)):
                    raise ValueError(
                        f"The optimizer's `{name}` is {value} at step {self.state.global_step + 1}. The weights were "
                        "not updated with it. Look at `learning_rate`, at the schedule, and at the optimizer's "
                        "settings."
                    )

    def refuse_non_finite_weights(self, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Raise before trained weights that are no numbers are written to a file."""
        # The last update of a run is followed by no loss that would show what it did.
        trained = {name: p for name, p in parameters_by_name(self.model).items() if p.requires_grad}
        for name, parameter in trained.items():
            tensor = own_shard(parameter) if state_dict is None else state_dict.get(name, parameter.new_empty(0))
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"The weights {name!r} hold NaN or infinite numbers after step {self.state.global_step}, so the "
                    "model is not saved. Lower `learning_rate`, and go on from an earlier checkpoint."
                )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.refuse_non_finite_weights(state_dict)
        super()._save(output_dir, state_dict)  # type: ignore[misc]


def _numbers(group: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The settings of a parameter group that are numbers, or tuples of them, by name."""
    for name, setting in group.items():
        if name == "params":
            continue
        values: Iterable[Any] = setting if isinstance(setting, list | tuple) else [setting]
        for value in values:
            if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1):
                yield name, float(value)


__all__ = ["FiniteUpdates"]
