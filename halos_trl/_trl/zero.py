"""Separate gradient clipping for some of the parameters trained with DeepSpeed ZeRO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .overridden import overridden

_NORMS = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")


def give_own_groups(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Move the parameters into separate parameter groups, with the settings of their previous groups."""
    own = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        apart = [p for p in group["params"] if id(p) in own]
        rest = [p for p in group["params"] if id(p) not in own]
        if apart and rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": apart})


class OwnLimit:
    """Clips the gradient of some parameter groups of a ZeRO optimizer separately; their norm is `norm`.

    DeepSpeed's `step` computes one norm over all parameters and scales every gradient by it. Here these groups are
    excluded from that norm, and their gradients are scaled by their own.
    """

    def __init__(self, zero: Any, parameters: Iterable[torch.nn.Parameter], max_norm: float):
        own = {id(parameter) for parameter in parameters}
        groups = getattr(zero, "bit16_groups", None) or getattr(zero, "fp16_groups", None)
        if not groups or not hasattr(zero, "unscale_and_clip_grads"):
            raise ValueError(
                f"DeepSpeed trains with {type(zero).__name__}, which does not support separate gradient clipping for "
                "the value head. Use ZeRO stage 2 or 3, e.g. configs/accelerate/zero2.yaml."
            )
        self.zero = zero
        self._max_norm = max_norm
        self._groups = [i for i, group in enumerate(groups) if any(id(p) in own for p in group)]
        self._norms: dict[int, torch.Tensor] = {}
        # ZeRO-1 and 2 compute norms over the parameters of which this process holds a part.
        self._parts = getattr(zero, "params_in_partition", groups)
        self._unscale = zero.unscale_and_clip_grads
        zero.unscale_and_clip_grads = self._unscale_and_clip
        for name in _NORMS:
            if hasattr(zero, name):
                setattr(zero, name, self._kept_out(getattr(zero, name)))

    @property
    def norm(self) -> torch.Tensor:
        """Norm of the last step's gradient before clipping, multiplied by fp16's loss scale.

        Infinite if the gradient is not finite: under fp16 DeepSpeed skips such a step before computing norms.
        """
        if self.zero.overflow or not self._norms:
            return torch.tensor(torch.inf)
        norms = torch.stack(list(self._norms.values()))
        return torch.linalg.vector_norm(norms.where(norms >= 0, torch.inf))

    def _kept_out(self, norm_of: Any) -> Any:
        def norm(*gradients_and_parameters: Any) -> torch.Tensor:
            value = norm_of(*gradients_and_parameters)
            group = next((i for i in self._groups if self._parts[i] is gradients_and_parameters[-1]), None)
            if group is None:
                return value
            self._norms[group] = torch.as_tensor(value)
            # DeepSpeed returns -1 for a gradient that is not finite, and skips the step.
            return torch.zeros_like(self._norms[group]).where(self._norms[group] >= 0, self._norms[group])

        return norm

    def _unscale_and_clip(self, gradients: Any, total_norm: Any) -> None:
        if not any(self._is_of(gradients, i) for i in self._groups):
            return self._unscale(gradients, total_norm)
        with overridden(self.zero, clip_grad=self._max_norm):
            return self._unscale(gradients, self.norm)

    def _is_of(self, gradients: Any, group: int) -> bool:
        if isinstance(gradients, int):  # ZeRO-3 passes the index of the group
            return gradients == group
        return gradients[0] is self.zero.single_partition_of_fp32_groups[group].grad


__all__ = ["OwnLimit", "give_own_groups"]
