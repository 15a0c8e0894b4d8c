"""KTO, for single completions labelled as desirable or undesirable. Shape legend: see `halos_trl.records`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..humanline import Humanline, clamp, log_ratios, unclamped_fraction
from ..records import LossOutput, UnpairedLogps, check_number, check_record


def kto(
    logps: UnpairedLogps,
    *,
    kl: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    humanline: Humanline | None = None,
) -> LossOutput:
    """Kahneman-Tversky optimization: raises or lowers the gain over the reference point `kl`, depending on the label.

    Ethayarajh et al., arXiv 2402.01306, eq. 8: weight * (1 - sigmoid(+-beta * (summed log-ratio - kl))), + and
    `desirable_weight` for desirable rows, - and `undesirable_weight` for the others.

    Args:
        logps: completions with their labels, nats; all rows may have the same label, or there may be no rows.
        kl: the reference point, nats per sequence: a number or 0-d tensor, at least 0. It is the same number for the
            whole optimizer step (`kto_kl`) and receives no gradient.
        beta: inverse temperature, per nat.
        desirable_weight, undesirable_weight: at least 0.
        humanline: clamp of the per-token log-ratios before they are summed.

    Returns:
        losses (B,) in row order, each in [0, weight]; chosen_rewards = beta * summed log-ratio of the desirable rows,
        rejected_rewards the same of the others, both in row order; metrics `unclamped/chosen`, `unclamped/rejected`.

    Rewards include the factor beta as in TRL; HALOs logs them without it. 1 - sigmoid(x) is computed as sigmoid(-x),
    which does not round to 0 for confident rows. With kl = 0 and humanline off this is TRL's `apo_zero_unpaired`.
    """
    check_record(logps)
    check_number("beta", beta, "(0, inf)", "It multiplies the log-ratios; 0.1 is the usual start.")
    check_number("desirable_weight", desirable_weight, "[0, inf)", "It is the weight of desirable rows; 1 is neutral.")
    check_number(
        "undesirable_weight", undesirable_weight, "[0, inf)", "It is the weight of undesirable rows; 1 is neutral."
    )
    if isinstance(kl, Tensor) and kl.ndim != 0:
        raise ValueError(
            f"kl has shape {tuple(kl.shape)}; expected one number. Reduce the sums and counts of `kto_kl` over the "
            "step first: sum / max(count, 1), clamped at 0."
        )

    desirable_B = logps.desirable
    ratios_BT, _ = log_ratios(logps.policy, logps.reference, logps.mask)
    sums_B = clamp(ratios_BT, humanline).sum(-1)
    gains_B = beta * (sums_B - (kl.detach() if isinstance(kl, Tensor) else kl))
    losses_B = torch.where(
        desirable_B, desirable_weight * torch.sigmoid(-gains_B), undesirable_weight * torch.sigmoid(gains_B)
    )
    rewards_B = beta * sums_B.detach()
    metrics = {
        "unclamped/chosen": unclamped_fraction(ratios_BT[desirable_B], humanline),
        "unclamped/rejected": unclamped_fraction(ratios_BT[~desirable_B], humanline),
    }
    return LossOutput(losses_B, rewards_B[desirable_B], rewards_B[~desirable_B], metrics)


@torch.no_grad()
def kto_kl(
    policy_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, humanline: Humanline | None = None
) -> tuple[Tensor, Tensor]:
    """The sum and the count for KTO's reference point, over mismatched pairs of prompt and completion.

    Ethayarajh et al., arXiv 2402.01306, section 4.1: the KL of policy and reference is estimated as the mean summed
    log-ratio of completions that belong to other prompts, clamped at 0.

    Args:
        policy_BT, reference_BT: log-probs of the mismatched completions, nats.
        mask_BT: nonzero on completion tokens.
        humanline: clamp of the per-token log-ratios, the same as in `kto`.

    Returns:
        (sum, count), both 0-d and without gradient, of the log-ratios' dtype: the summed log-ratios of all rows
        (nats), and the number of rows whose summed log-ratio is not exactly 0. Add both over micro-batches and
        processes; the reference point is sum / max(count, 1), clamped at 0. Clamping or dividing earlier biases it.

    As in HALOs, rows that are exactly 0 (including rows without tokens) do not count; TRL averages over all rows.
    """
    ratios_BT, _ = log_ratios(policy_BT, reference_BT, mask_BT, humanline)
    sums_B = ratios_BT.sum(-1)
    return sums_B.sum(), (sums_B != 0).sum().to(sums_B.dtype)
