"""From loss outputs to logged numbers: named sums and counts, divided once per log line.

A mean of micro-batch means depends on how a step was split; a sum divided by a count does not. Therefore, metrics are
kept as `(sum, count)` on their device, and reduced over processes only when a log line is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .humanline import Humanline, unclamped_counts
from .records import LossOutput

Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Metric name -> (sum, number of things summed), both scalars."""


def total(values: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and count of `values`, over `mask` if one is given. Detached, at least float32."""
    values = values.detach()
    values = values if values.dtype == torch.float64 else values.float()
    if mask is None:
        return values.sum(), values.new_tensor(values.numel())
    return (values * mask).sum(), mask.sum().to(values.dtype)


def loss_sums(output: LossOutput) -> Sums:
    """Sums of the rewards of both sides and of the method's own metrics."""
    sums = {"rewards/chosen": total(output.chosen_rewards), "rewards/rejected": total(output.rejected_rewards)}
    # The mean over no rows is undefined, but the name is kept, since all processes must have the same names.
    of_rows = {name: total(value if len(output.losses) else value[None][:0]) for name, value in output.metrics.items()}
    return sums | of_rows


def accuracy_sums(output: LossOutput) -> Sums:
    """Fraction of pairs whose chosen reward is larger (ties do not count)."""
    return {"rewards/accuracies": total((output.chosen_rewards > output.rejected_rewards).float())}


def side_sums(name: str, values_BT: torch.Tensor, mask_BT: torch.Tensor, desirable_B: torch.Tensor) -> Sums:
    """Token means of `values_BT`, separately for desirable (`name/chosen`) and undesirable (`name/rejected`) rows."""
    return {
        f"{name}/chosen": total(values_BT, mask_BT & desirable_B[:, None]),
        f"{name}/rejected": total(values_BT, mask_BT & ~desirable_B[:, None]),
    }


def logps_sums(logps_BT: torch.Tensor, desirable_B: torch.Tensor) -> Sums:
    """Summed log-prob of a completion in nats, averaged over the completions of each side."""
    logps_B = logps_BT.sum(-1)
    return {"logps/chosen": total(logps_B, desirable_B), "logps/rejected": total(logps_B, ~desirable_B)}


def unclamped_sums(log_ratios_BT: torch.Tensor, is_chosen_B: torch.Tensor, humanline: Humanline) -> Sums:
    """The unclamped fraction of all tokens, and of each side. Log-ratios are unclamped, and 0 where masked."""
    sides = {"": log_ratios_BT, "/chosen": log_ratios_BT[is_chosen_B], "/rejected": log_ratios_BT[~is_chosen_B]}
    return {f"unclamped{side}": unclamped_counts(table_BT, humanline) for side, table_BT in sides.items()}


def finite(means: dict[str, float]) -> tuple[dict[str, float], list[str]]:
    """The means that are finite, and the names of the others."""
    kept = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return kept, [name for name in means if name not in kept]


class RunningMeans:
    """Sums and counts since the last log line."""

    def __init__(self) -> None:
        self._sums: Sums = {}

    def add(self, sums: Sums) -> None:
        for name, (value, count) in sums.items():
            if name in self._sums:
                before, number = self._sums[name]
                value, count = before + value, number + count
            self._sums[name] = (value, count)

    def drain(self, reduce_sum: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Means over everything since the last call and over all processes; resets the sums.

        `reduce_sum` sums a tensor over processes. All processes must have the same metric names, which holds if names
        do not depend on the data (a side without rows has count 0). A metric whose count is 0 is omitted.
        `rewards/margins` is the difference of the two mean rewards, as in TRL.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        # One float64 buffer, one reduction: counts of many steps do not lose their units.
        device = next(iter(self._sums.values()))[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        flat = [x.to(device, dtype) for name in names for x in self._sums[name]]
        sums = reduce_sum(torch.stack(flat)).tolist()
        self._sums = {}
        means = {name: sums[2 * i] / sums[2 * i + 1] for i, name in enumerate(names) if sums[2 * i + 1] > 0}
        if "rewards/chosen" in means and "rewards/rejected" in means:
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means
