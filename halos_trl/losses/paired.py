"""Losses on pairs of a chosen and a rejected completion. Shape legend: see `halos_trl.records`.

Every function here takes `PairedLogps` and returns losses (B,), rewards (B,) and the metrics `unclamped/chosen` and
`unclamped/rejected` (see `halos_trl.humanline.unclamped_fraction`).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from ..humanline import Humanline, log_ratios
from ..logprobs import sequence_mean, sequence_sum
from ..records import LossOutput, PairedLogps, check_number, check_record


def dpo(logps: PairedLogps, *, beta: float = 0.1, humanline: Humanline | None = None) -> LossOutput:
    """Direct preference optimization: -log sigmoid(beta * (sum of chosen log-ratios - sum of rejected log-ratios)).

    Rafailov et al., arXiv 2305.18290, eq. 7.

    Args:
        logps: pairs with reference, nats.
        beta: inverse temperature, per nat; larger stays closer to the reference.
        humanline: clamp of the per-token log-ratios before they are summed.

    Returns:
        losses (B,) in nats; rewards (B,) = beta * summed log-ratio.

    Gives the same numbers as HALOs and, with humanline off, as TRL's `sigmoid` loss.
    """
    check_record(logps)
    check_number("beta", beta, "(0, inf)", "It multiplies the log-ratios; 0.1 is the usual start.")
    chosen_BT, rejected_BT, metrics = _log_ratios(logps, humanline)
    chosen_B = beta * sequence_sum(chosen_BT, logps.chosen_mask)
    rejected_B = beta * sequence_sum(rejected_BT, logps.rejected_mask)
    return LossOutput(-logsigmoid(chosen_B - rejected_B), chosen_B.detach(), rejected_B.detach(), metrics)


def cdpo(
    logps: PairedLogps, *, beta: float = 0.1, epsilon: float = 0.2, humanline: Humanline | None = None
) -> LossOutput:
    """Conservative DPO: DPO in expectation over labels that are wrong with probability epsilon.

    Mitchell, "A note on DPO with noisy preferences & relationship to IPO" (https://ericmitchell.ai/cdpo.pdf):
    (1 - epsilon) * dpo(pairs) + epsilon * dpo(swapped pairs).

    Args:
        logps: pairs with reference, nats.
        beta: as in `dpo`.
        epsilon: probability that a label is wrong, in [0, 0.5); 0 is DPO.
        humanline: as in `dpo`.

    Returns:
        losses (B,) in nats; rewards as in `dpo`.

    Gives the same numbers as HALOs. TRL's `robust` loss is different: it corrects the bias due to wrong labels with a
    negative weight on the swapped term.
    """
    check_number(
        "epsilon", epsilon, "[0, 0.5)", "It is the rate of wrong labels; at 0.5, labels carry no information."
    )
    as_labelled = dpo(logps, beta=beta, humanline=humanline)
    flipped = dpo(logps.swapped(), beta=beta, humanline=humanline)
    return as_labelled._replace(losses=(1 - epsilon) * as_labelled.losses + epsilon * flipped.losses)


def ipo(logps: PairedLogps, *, tau: float = 0.1, humanline: Humanline | None = None) -> LossOutput:
    """Identity preference optimization: (mean chosen log-ratio - mean rejected log-ratio - 1 / (2 tau))^2.

    Azar et al., arXiv 2310.12036, eq. 17.

    Args:
        logps: pairs with reference, nats.
        tau: strength of the regularization, per nat; the target of the margin is 1 / (2 tau).
        humanline: clamp of the per-token log-ratios before they are averaged.

    Returns:
        losses (B,) in squared nats per token; rewards (B,) = mean log-ratio per completion token, without tau.

    The paper sums over the completion; HALOs and TRL average per token, and so does this function. HALOs divides by
    the number of tokens whose clamped log-ratio is not exactly 0, which is 0 / 0 where policy and reference are equal;
    here it is the number of completion tokens. A row without completion tokens has mean 0.
    """
    check_record(logps)
    check_number("tau", tau, "(0, inf)", "The target margin is 1 / (2 tau); 0.1 is the usual start.")
    chosen_BT, rejected_BT, metrics = _log_ratios(logps, humanline)
    chosen_B = sequence_mean(chosen_BT, logps.chosen_mask)
    rejected_B = sequence_mean(rejected_BT, logps.rejected_mask)
    losses_B = (chosen_B - rejected_B - 1 / (2 * tau)).square()
    return LossOutput(losses_B, chosen_B.detach(), rejected_B.detach(), metrics)


def simpo(
    logps: PairedLogps, *, beta: float = 10.0, gamma_beta_ratio: float = 0.3, humanline: Humanline | None = None
) -> LossOutput:
    """SimPO: -log sigmoid(beta * (mean chosen log-prob - mean rejected log-prob - gamma_beta_ratio)).

    Meng et al., arXiv 2405.14734, eq. 6, with gamma = beta * gamma_beta_ratio.

    Args:
        logps: pairs, nats; the reference fields are not read.
        beta: inverse temperature, per nat per token.
        gamma_beta_ratio: margin that the mean log-probs should have, nats per token; at least 0.
        humanline: clamp of the per-token log-probs (there is no reference, so only the lower bound can bind).

    Returns:
        losses (B,) in nats; rewards (B,) = mean log-prob per completion token, without beta.

    HALOs divides by the number of tokens whose clamped log-prob is not exactly 0; here it is the number of completion
    tokens. A row without completion tokens has mean 0.
    """
    check_record(logps, reference=False)
    check_number("beta", beta, "(0, inf)", "It multiplies log-probs per token; 2 to 10 is usual.")
    check_number("gamma_beta_ratio", gamma_beta_ratio, "[0, inf)", "It is a margin in nats per token; 0.3 is usual.")
    chosen_BT, rejected_BT, metrics = _log_ratios(_without_reference(logps), humanline)
    chosen_B = sequence_mean(chosen_BT, logps.chosen_mask)
    rejected_B = sequence_mean(rejected_BT, logps.rejected_mask)
    losses_B = -logsigmoid(beta * (chosen_B - rejected_B - gamma_beta_ratio))
    return LossOutput(losses_B, chosen_B.detach(), rejected_B.detach(), metrics)


def slic(
    logps: PairedLogps, *, beta: float = 1.0, lambda_coef: float = 0.1, humanline: Humanline | None = None
) -> LossOutput:
    """SLiC-HF: max(0, beta - chosen log-prob + rejected log-prob) - lambda_coef * chosen log-prob, per sequence.

    Zhao et al., arXiv 2305.10425: rank calibration plus a regularizer, here with the chosen completion as its target.

    Args:
        logps: pairs, nats; the reference fields are not read.
        beta: margin (the paper's delta), nats per sequence.
        lambda_coef: weight of the regularizer, at least 0.
        humanline: clamp of the per-token log-probs in the calibration term; the regularizer is never clamped.

    Returns:
        losses (B,) in nats; rewards (B,) = summed (clamped) log-prob.

    HALOs adds a calibration term per pair to a regularizer per token, which broadcasts or fails; here both are one
    number per pair. TRL's `hinge` loss is different: it has a reference and no regularizer.
    """
    check_record(logps, reference=False)
    check_number("beta", beta, "(0, inf)", "It is the margin between two log-probs, in nats per sequence.")
    check_number(
        "lambda_coef",
        lambda_coef,
        "[0, inf)",
        "It is the weight of the chosen completion's likelihood; 0 disables the term.",
    )
    chosen_BT, rejected_BT, metrics = _log_ratios(_without_reference(logps), humanline)
    chosen_B = sequence_sum(chosen_BT, logps.chosen_mask)
    rejected_B = sequence_sum(rejected_BT, logps.rejected_mask)
    calibration_B = relu(beta - chosen_B + rejected_B)
    regularizer_B = -sequence_sum(logps.policy_chosen, logps.chosen_mask)
    return LossOutput(calibration_B + lambda_coef * regularizer_B, chosen_B.detach(), rejected_B.detach(), metrics)


def _without_reference(logps: PairedLogps) -> PairedLogps:
    return logps._replace(reference_chosen=None, reference_rejected=None)


def _log_ratios(logps: PairedLogps, humanline: Humanline | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Clamped log-ratios (without reference: log-probs) of both sides, and the two unclamped fractions."""
    chosen_BT, chosen = log_ratios(logps.policy_chosen, logps.reference_chosen, logps.chosen_mask, humanline)
    rejected_BT, rejected = log_ratios(logps.policy_rejected, logps.reference_rejected, logps.rejected_mask, humanline)
    return chosen_BT, rejected_BT, {"unclamped/chosen": chosen, "unclamped/rejected": rejected}
