"""Advantages: relative to a group, and generalized advantage estimation.

Shape legend: see `halos_trl.records`. All results are without gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .logprobs import apply_mask, at_least_float32, masked_mean, masked_var
from .records import check_number, check_shapes


class GAE(NamedTuple):
    """Rollout statistics, each (B, T) and exactly 0 at masked positions.

    `advantages` are whitened over the mask; `returns` are the unwhitened advantages plus the values, so that
    `returns - values` gives these back; `discounted_future_rewards` is the critic's target.
    """

    advantages: Tensor
    returns: Tensor
    discounted_future_rewards: Tensor


@torch.no_grad()
def group_advantages(
    scores_B: Tensor, group_ids_B: Tensor | Sequence[Hashable], eps: float = 1e-2, *, scale_by_std: bool = True
) -> Tensor:
    """Score of each completion relative to its group: (score - group mean) / (group std + eps).

    Shao et al. (DeepSeekMath), arXiv 2402.03300, section 4.1.2; `scale_by_std=False` omits the division, as Dr. GRPO
    does (arXiv 2503.20783).

    Args:
        scores_B: one finite score per completion, any unit.
        group_ids_B: which completions share a prompt: integers, or a sequence of hashables such as prompt ids.
        eps: added to the standard deviation, in the unit of the scores; positive.

    Returns:
        (B,) without unit, float32 or float64. Exactly 0 in a group of one or with equal scores. Any finite scores are
        accepted.

    As in HALOs, the standard deviation is the population's (divided by n); TRL divides by n - 1 and adds 1e-4.
    """
    check_number("eps", eps, "(0, inf)", "It keeps the division finite if all scores of a group are equal.")
    if scores_B.ndim != 1 or len(group_ids_B) != len(scores_B):
        raise ValueError(
            f"scores have shape {tuple(scores_B.shape)} and there are {len(group_ids_B)} group ids; expected one "
            "score and one id per completion. Pass the whole groups, flattened to (B,)."
        )
    scores_B = at_least_float32(scores_B)
    _check_finite("scores", scores_B)
    groups_B, count = _group_indices(group_ids_B, scores_B.device)

    # In units of a power of two, which is exact: squares and sums of scores like 1e200 would overflow.
    unit_B = _unit(scores_B, groups_B, count)
    scores_B, eps_B = scores_B / unit_B, eps / unit_B
    # Shifted by the smallest score of the group: equal scores then centre to exactly 0, not to a rounding error.
    lowest_G = scores_B.new_zeros(count).scatter_reduce(0, groups_B, scores_B, "amin", include_self=False)
    shifted_B = scores_B - lowest_G[groups_B]
    centred_B = shifted_B - _group_mean(shifted_B, groups_B, count)
    if not scale_by_std:
        return centred_B * unit_B
    return centred_B / (_group_mean(centred_B.square(), groups_B, count).sqrt() + eps_B)


@torch.no_grad()
def gae(values_BT: Tensor, rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float = 0.99, lam: float = 0.95) -> GAE:
    """Generalized advantage estimation, returns and discounted future rewards.

    Schulman et al., arXiv 1506.02438, eq. 16: A[t] = sum over l of (gamma * lam)^l * delta[t + l] with delta[t] =
    rewards[t] + gamma * values[t + 1] - values[t] and values 0 after the last position.

    Args:
        values_BT: the critic's values at the rollout, in units of the reward.
        rewards_BT: reward per token; a score for the whole completion is placed on its last token.
        mask_BT: nonzero on completion tokens; may have gaps (turns of users and tools).
        gamma: discount per position, in [0, 1].
        lam: interpolation between the estimators, in [0, 1]: 0 is one step, 1 is the whole future.

    Returns:
        `GAE`. Advantages are whitened with mean and population variance (+ 1e-8) over the mask of this call; the rest
        is in units of the reward.

    As in HALOs, values and rewards count as 0 at masked positions, and the discount is also applied once per masked
    position.
    """
    check_number("gamma", gamma, "[0, 1]", "It is a discount factor per token.")
    check_number("lam", lam, "[0, 1]", "It interpolates between the one-step estimate (0) and the whole future (1).")
    check_shapes("gae", {"values": (values_BT, "BT"), "rewards": (rewards_BT, "BT"), "mask": (mask_BT, "BT")})
    values_BT, rewards_BT = apply_mask(values_BT, mask_BT), apply_mask(rewards_BT, mask_BT)
    _check_finite("values", values_BT)
    _check_finite("rewards", rewards_BT)

    next_values_BT = torch.cat([values_BT[:, 1:], torch.zeros_like(values_BT[:, :1])], dim=1)
    raw_BT = _discounted_sum(rewards_BT + gamma * next_values_BT - values_BT, gamma * lam)
    variance = masked_var(raw_BT, mask_BT)
    if not variance.isfinite():
        raise ValueError(
            f"values reach {values_BT.abs().max().item():.3g} and rewards {rewards_BT.abs().max().item():.3g}: the "
            f"variance of the advantages overflows {raw_BT.dtype}. Rescale the scores, e.g. to a few units."
        )
    whitened_BT = (raw_BT - masked_mean(raw_BT, mask_BT)) * (variance + 1e-8).rsqrt()
    return GAE(
        advantages=apply_mask(whitened_BT, mask_BT),
        returns=apply_mask(raw_BT + values_BT, mask_BT),
        discounted_future_rewards=apply_mask(_discounted_sum(rewards_BT, gamma), mask_BT),
    )


def _discounted_sum(x_BT: Tensor, discount: float) -> Tensor:
    """y[t] = x[t] + discount * y[t + 1]."""
    y_BT = x_BT.clone()
    for t in range(x_BT.shape[1] - 2, -1, -1):
        y_BT[:, t] += discount * y_BT[:, t + 1]
    return y_BT


def _group_indices(group_ids_B: Tensor | Sequence[Hashable], device: torch.device) -> tuple[Tensor, int]:
    """Ids as indices 0..G-1, and G."""
    if isinstance(group_ids_B, Tensor):
        if group_ids_B.is_floating_point() or group_ids_B.ndim != 1:
            raise ValueError(
                f"group ids are {group_ids_B.dtype} of shape {tuple(group_ids_B.shape)}; expected integers (B,). "
                "Pass the index of each completion's prompt."
            )
        group_ids_B = group_ids_B.tolist()
    index: dict[Hashable, int] = {}
    indices = [index.setdefault(group_id, len(index)) for group_id in group_ids_B]
    return torch.tensor(indices, dtype=torch.long, device=device), len(index)


def _group_mean(x_B: Tensor, groups_B: Tensor, count: int) -> Tensor:
    """The mean of each row's group, (B,)."""
    means_G = x_B.new_zeros(count).scatter_reduce(0, groups_B, x_B, "mean", include_self=False)
    return means_G[groups_B]


def _unit(x_B: Tensor, groups_B: Tensor, count: int) -> Tensor:
    """The largest power of two that the absolute values of each row's group reach, at least 1: (B,)."""
    largest_G = x_B.new_ones(count).scatter_reduce(0, groups_B, x_B.abs(), "amax")
    # mantissa in [1/2, 1); the quotient is exact, where 2 ** exponent may overflow or round.
    mantissa_G, _ = torch.frexp(largest_G)
    return (largest_G / (2 * mantissa_G))[groups_B]


def _check_finite(name: str, x: Tensor) -> None:
    if not x.isfinite().all():
        at = (~x.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{name}{at} is {x[tuple(at)].item()}; expected finite numbers. Drop the row or fix its score: the "
            "statistics of all rows that it is averaged with would not be finite."
        )
