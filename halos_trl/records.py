"""The records passed from a forward pass to a loss, and their checks.

Shape legend, used as name suffixes throughout the package:

    B   pairs, sequences or completions of a batch
    T   positions of the shifted token table: position t scores token t+1
    V   vocabulary

Log-probabilities are natural logarithms (nats), one per token. A mask is nonzero on completion tokens and 0 on prompt
and padding. Losses apply the mask themselves, so values at masked positions have no effect and no gradient.
"""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor


class PairedLogps(NamedTuple):
    """Per-token log-probs of pairs; row i of the chosen tables and row i of the rejected tables belong to the same
    prompt.

    The chosen tables are (B, T), the rejected tables (B, U), where U may differ from T. The two reference tables are
    None for methods without a reference (SimPO, SLiC).
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_mask: Tensor
    rejected_mask: Tensor

    def swapped(self) -> PairedLogps:
        """The same pairs with the preference reversed."""
        return PairedLogps(
            policy_chosen=self.policy_rejected,
            policy_rejected=self.policy_chosen,
            reference_chosen=self.reference_rejected,
            reference_rejected=self.reference_chosen,
            chosen_mask=self.rejected_mask,
            rejected_mask=self.chosen_mask,
        )


class UnpairedLogps(NamedTuple):
    """Per-token log-probs (B, T) of individually judged completions; `desirable` is a bool tensor (B,)."""

    policy: Tensor
    reference: Tensor
    mask: Tensor
    desirable: Tensor


class GroupLogps(NamedTuple):
    """Per-token log-probs (B, T) of scored completions and one advantage (B,) for each of them.

    `old_policy` has the log-probs in the denominator of the ratio; None if these are the reference's.
    """

    policy: Tensor
    reference: Tensor
    mask: Tensor
    advantages: Tensor
    old_policy: Tensor | None = None


class PolicyStep(NamedTuple):
    """The inputs of one PPO update; every table is (B, T).

    `old_policy` has the log-probs in the denominator of the ratio, `values` the current output of the value head,
    `advantages` and `discounted_future_rewards` the rollout statistics (`halos_trl.advantages.gae`), without gradient.
    """

    policy: Tensor
    old_policy: Tensor
    mask: Tensor
    values: Tensor
    advantages: Tensor
    discounted_future_rewards: Tensor


class LossOutput(NamedTuple):
    """The result of a loss.

    `losses` is (B,), whose mean is the batch's loss, or (B, T) with exact zeros at masked positions, whose sum over
    the number of completion tokens is the batch's loss. The rewards are detached, and empty if there is no chosen or
    no rejected side. `metrics` maps names to detached 0-d tensors.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metrics: dict[str, Tensor]


# One letter per axis. Within a record, the same letter means the same size.
_AXES: dict[type, dict[str, str]] = {
    PairedLogps: {
        "policy_chosen": "BT",
        "policy_rejected": "BU",
        "reference_chosen": "BT",
        "reference_rejected": "BU",
        "chosen_mask": "BT",
        "rejected_mask": "BU",
    },
    UnpairedLogps: {"policy": "BT", "reference": "BT", "mask": "BT", "desirable": "B"},
    GroupLogps: {"policy": "BT", "reference": "BT", "mask": "BT", "advantages": "B", "old_policy": "BT"},
    PolicyStep: {
        "policy": "BT",
        "old_policy": "BT",
        "mask": "BT",
        "values": "BT",
        "advantages": "BT",
        "discounted_future_rewards": "BT",
    },
}


def check_record(record: NamedTuple, *, reference: bool = True) -> None:
    """Refuse a record whose tensors would need broadcasting, or whose dtypes are wrong.

    `reference=False` skips the reference fields, for losses that do not read them. Raises ValueError.
    """
    axes = _AXES[type(record)]
    fields = {name: value for name, value in record._asdict().items() if reference or "reference" not in name}
    if isinstance(record, GroupLogps) and record.old_policy is None:
        del fields["old_policy"]
    check_shapes(type(record).__name__, {name: (value, axes[name]) for name, value in fields.items()})


def check_shapes(owner: str, tables: dict[str, tuple[object, str]]) -> None:
    """Refuse tensors whose shapes disagree with their axis letters, by name: {"mask": (mask_BT, "BT"), ...}.

    The first tensor with a letter determines its size. Masks may have any real dtype, `desirable` must be bool and
    everything else floating point. Raises a ValueError that states what was passed, what was expected and what to do.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (value, axes) in tables.items():
        where = f"{owner}.{name}"
        tensor = _check_tensor(where, value)
        if tensor.ndim != len(axes):
            raise ValueError(
                f"{where} has shape {tuple(tensor.shape)}; expected {len(axes)} dimension(s) ({', '.join(axes)}). "
                "Pass one entry per completion for (B), one per token for (B, T); nothing is broadcast."
            )
        for axis, size in zip(axes, tensor.shape, strict=True):
            expected, source = sizes.setdefault(axis, (size, name))
            if size != expected:
                raise ValueError(
                    f"{where} has shape {tuple(tensor.shape)}, so {axis}={size}; expected {axis}={expected} as in "
                    f"{owner}.{source}. Truncate or pad the tables to the same shape; nothing is broadcast."
                )


def _check_tensor(where: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        advice = "Pass the reference's per-token log-probs, or use a method without a reference (SimPO, SLiC)."
        raise ValueError(
            f"{where} is {type(value).__name__}; expected a tensor. "
            + (advice if value is None and "reference" in where else "Convert it with torch.as_tensor.")
        )
    if where.endswith("desirable"):
        if value.dtype != torch.bool:
            raise ValueError(
                f"{where} has dtype {value.dtype}; expected torch.bool. Convert the labels, e.g. with `labels > 0`; "
                "as truth values, -1 and +1 would both be desirable."
            )
    elif value.is_complex() or not (value.is_floating_point() or where.endswith("mask")):
        raise ValueError(
            f"{where} has dtype {value.dtype}; expected a real floating dtype. Convert it with `.float()`."
        )
    return value


def check_output(output: object, shape: tuple[int, ...], advice: str) -> LossOutput:
    """Check the result of a method's `loss`: a `LossOutput` with losses of this shape, rewards that are tensors, and
    0-d metrics.

    `advice` is added to the error for losses with a different shape. Raises ValueError.
    """
    if not isinstance(output, LossOutput):
        raise ValueError(f"`loss` returned {type(output).__name__}; expected a `halos_trl.records.LossOutput`.")
    if not isinstance(output.losses, Tensor) or output.losses.shape != shape:
        found = getattr(output.losses, "shape", type(output.losses).__name__)
        raise ValueError(
            f"`loss` returned losses of shape {tuple(found) if isinstance(found, torch.Size) else found}; expected "
            f"{shape}, one loss for each {'row or pair' if len(shape) == 1 else 'token'}. {advice}"
        )
    for side in ("chosen_rewards", "rejected_rewards"):
        if not isinstance(getattr(output, side), Tensor):
            raise ValueError(
                f"`loss` returned `{side}` as {type(getattr(output, side)).__name__}; expected a detached tensor, an "
                "empty one (`losses.detach().new_empty(0)`) if the method has no rewards."
            )
    for name, value in output.metrics.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise ValueError(
                f"`loss` returned the metric {name!r} as {type(value).__name__}; expected a detached 0-d tensor, e.g. "
                "`values.mean().detach()`."
            )
    return output


def check_number(name: str, value: float, interval: str, advice: str) -> None:
    """Refuse a coefficient outside `interval`, written in mathematical notation: "(0, inf)", "[0, 0.5)".

    Raises ValueError.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    inside = isinstance(value, Real) and (
        (low <= value if interval.startswith("[") else low < value)
        and (value <= high if interval.endswith("]") else value < high)
    )
    if not inside:
        raise ValueError(f"{name} is {value!r}; expected a number in {interval}. {advice}")
