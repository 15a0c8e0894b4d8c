"""The humanline clamp: per-token log-ratios of policy and reference are clamped between two bounds before any loss.

Shape legend: see `halos_trl.records`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from .logprobs import apply_mask, at_least_float32
from .records import check_shapes


@dataclass(frozen=True)
class Humanline:
    """Bounds of the per-token log-ratio log policy - log reference, in nats.

    "Humanline: Online Alignment as Perceptual Loss" (arXiv 2509.24207): a token beyond a bound counts as the bound and
    has no gradient. The defaults are HALOs'.

    Attributes:
        log_epsilon_p: lower bound, at most 0.
        log_epsilon_r: upper bound, at least 0.
    """

    log_epsilon_p: float = -1.0
    log_epsilon_r: float = 1.5

    def __post_init__(self) -> None:
        low, high = self.log_epsilon_p, self.log_epsilon_r
        numbers = isinstance(low, Real) and isinstance(high, Real)
        if not (numbers and -math.inf < low <= 0 <= high < math.inf and low < high):
            raise ValueError(
                f"Humanline bounds are log_epsilon_p={low!r} and log_epsilon_r={high!r}; expected finite numbers "
                "with log_epsilon_p <= 0 <= log_epsilon_r, not both 0. They bound a log-ratio, which is 0 if policy "
                "and reference agree. Pass humanline=None to disable the clamp."
            )


def log_ratios(
    policy_BT: Tensor, reference_BT: Tensor | None, mask_BT: Tensor, humanline: Humanline | None = None
) -> tuple[Tensor, Tensor]:
    """Per-token log-ratios of policy and reference, clamped if `humanline` is given.

    Args:
        policy_BT: log-probs of the policy, nats.
        reference_BT: log-probs of the reference, nats. None counts as zeros: methods without a reference clamp the raw
            log-probs, for which only the lower bound can take effect.
        mask_BT: nonzero on completion tokens.
        humanline: the bounds; None leaves the log-ratios as they are.

    Returns:
        The log-ratios (B, T) in nats, exactly 0 at masked positions, and the unclamped fraction (0-d; see
        `unclamped_fraction`). The gradient passes if the log-ratio lies within the bounds, inclusive, and is 0
        outside.
    """
    tables: dict[str, tuple[object, str]] = {"policy": (policy_BT, "BT"), "mask": (mask_BT, "BT")}
    if reference_BT is not None:
        tables["reference"] = (reference_BT, "BT")
    check_shapes("log_ratios", tables)

    log_ratios_BT = at_least_float32(policy_BT)
    if reference_BT is not None:
        # Both are upcast first: they are close to each other, and their half-precision difference is mostly noise.
        log_ratios_BT = log_ratios_BT - at_least_float32(reference_BT)
    log_ratios_BT = apply_mask(log_ratios_BT, mask_BT)
    return clamp(log_ratios_BT, humanline), unclamped_fraction(log_ratios_BT, humanline)


def clamp(log_ratios_BT: Tensor, humanline: Humanline | None) -> Tensor:
    """`log_ratios_BT` clamped to the bounds; the gradient passes inside and exactly at a bound."""
    if humanline is None:
        return log_ratios_BT
    # The bounds enclose 0, so masked positions stay exactly 0.
    return log_ratios_BT.clamp(humanline.log_epsilon_p, humanline.log_epsilon_r)


def unclamped_fraction(log_ratios_BT: Tensor, humanline: Humanline | None) -> Tensor:
    """Fraction of tokens that the clamp leaves unchanged: detached, 0-d, in [0, 1].

    Counted as in HALOs, so that logged curves are comparable: a token is in the denominator if its (masked, unclamped)
    log-ratio is not exactly 0, and in the numerator if it also lies strictly inside the bounds. So the fraction is 0,
    not 1, if policy and reference are equal, and a token exactly at a bound counts as clamped although its gradient
    passes. 1 if humanline is off or there are no rows.
    """
    log_ratios_BT = log_ratios_BT.detach()
    if humanline is None or log_ratios_BT.shape[0] == 0:
        return log_ratios_BT.new_ones(())
    inside, counted = unclamped_counts(log_ratios_BT, humanline)
    return inside.to(log_ratios_BT.dtype) / counted.clamp(min=1)


def unclamped_counts(log_ratios_BT: Tensor, humanline: Humanline) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of `unclamped_fraction`, for sums over micro-batches and processes."""
    log_ratios_BT = log_ratios_BT.detach()
    counted_BT = log_ratios_BT != 0
    inside_BT = (humanline.log_epsilon_p < log_ratios_BT) & (log_ratios_BT < humanline.log_epsilon_r)
    return (counted_BT & inside_BT).sum(), counted_BT.sum()
