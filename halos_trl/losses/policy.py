"""Clipped policy-gradient losses over scored completions. Shape legend: see `halos_trl.records`.

Results are per-token terms (B, T), exactly 0 at masked positions; the loss of a batch, micro-batch or optimizer step
is their sum over its number of completion tokens. Metrics are means over the completion tokens unless they say
otherwise.
"""

from __future__ import annotations

from torch import Tensor

from ..humanline import Humanline, clamp, log_ratios, unclamped_fraction
from ..logprobs import apply_mask, at_least_float32, finite_exp, kl_k3, masked_mean, masked_var, sequence_mean
from ..records import GroupLogps, LossOutput, PolicyStep, check_number, check_record


def grpo(
    logps: GroupLogps,
    *,
    epsilon: float = 0.01,
    beta: float = 0.01,
    humanline: Humanline | None = None,
    epsilon_high: float | None = None,
    sequence_level: bool = False,
) -> LossOutput:
    """Group-relative policy optimization: clipped surrogate with group advantages, plus beta times a KL penalty.

    Shao et al. (DeepSeekMath), arXiv 2402.03300, eq. 3: per token -min(ratio * A, clip(ratio) * A) + beta * k3.

    Args:
        logps: completions with the advantages A (B,) of `halos_trl.advantages.group_advantages`; log-probs in nats.
            The ratio's denominator is `old_policy` if the record has it, else the reference.
        epsilon: the ratio is clipped to [1 - epsilon, 1 + epsilon_high].
        beta: weight of the KL penalty, at least 0.
        humanline: clamp of the per-token log-ratios before the ratio is formed; the KL penalty stays unclamped.
        epsilon_high: upper clip range, epsilon if None (a larger one is the "clip-higher" of DAPO, arXiv 2503.14476).
        sequence_level: form one ratio per completion, exp(mean token log-ratio), as in GSPO (arXiv 2507.18071, eq. 7).

    Returns:
        losses (B, T); no rewards; metrics `kl` (k3, nats), `weighted_advantage` (|ratio * A|), `mean_abs_advantage`
        (over rows), `clipfrac` (tokens where the clip binds), `unclamped`.

    The KL penalty always uses the reference. As in HALOs, and unlike in the paper, the ratio's denominator is the
    reference unless the record has `old_policy`, and the mean is taken over all tokens of the batch (TRL's `bnpo`)
    instead of per completion first. With `sequence_level` each completion is therefore weighted by its number of
    tokens, whereas GSPO weights all completions equally.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    check_record(logps)
    check_number("epsilon", epsilon, "(0, inf)", "It is the clip range below a ratio of 1; 0.01 to 0.2 is usual.")
    check_number(
        "epsilon_high", epsilon_high, "(0, inf)", "It is the clip range above a ratio of 1; None means epsilon."
    )
    check_number("beta", beta, "[0, inf)", "It weighs the KL penalty; 0 drops it.")

    advantages_B1 = at_least_float32(logps.advantages).detach().unsqueeze(-1)
    to_reference_BT, _ = log_ratios(logps.policy, logps.reference, logps.mask)
    raw_BT = to_reference_BT
    if logps.old_policy is not None:
        raw_BT, _ = log_ratios(logps.policy, logps.old_policy, logps.mask)
    ratios_BT = clamp(raw_BT, humanline)
    if sequence_level:
        ratios_BT = sequence_mean(ratios_BT, logps.mask).unsqueeze(-1).expand_as(raw_BT)
    ratios_BT = finite_exp(ratios_BT)
    surrogate_BT, clipped_BT = _clipped_surrogate(ratios_BT, advantages_B1, 1 - epsilon, 1 + epsilon_high)
    kl_BT = kl_k3(to_reference_BT)
    losses_BT = apply_mask(surrogate_BT + beta * kl_BT if beta else surrogate_BT, logps.mask)
    metrics = {
        "kl": masked_mean(kl_BT, logps.mask),
        "weighted_advantage": masked_mean((ratios_BT * advantages_B1).abs(), logps.mask),
        "mean_abs_advantage": advantages_B1.abs().mean(),
        "clipfrac": masked_mean(clipped_BT, logps.mask),
        "unclamped": unclamped_fraction(raw_BT, humanline),
    }
    return _output(losses_BT, metrics)


def ppo(
    step: PolicyStep,
    *,
    cliprange: float = 0.5,
    critic_coef: float = 0.01,
    kl_coef: float = 0.1,
    humanline: Humanline | None = None,
) -> LossOutput:
    """Proximal policy optimization with a value head: clipped surrogate, critic and KL penalty in one per-token term.

    Schulman et al., arXiv 1707.06347, eq. 7 and 9. With r = policy - old_policy and ratio = exp(r):

        -min(ratio * A, clip(ratio, 1 - cliprange, 1 + cliprange) * A)
        + critic_coef * (values - discounted_future_rewards)^2 / 2
        + kl_coef * r

    Args:
        step: the tables of one update; log-probs in nats, values and discounted rewards in units of the score.
        cliprange: half width of the ratio's clip range.
        critic_coef: weight of the critic's term, at least 0.
        kl_coef: weight of the KL penalty, at least 0.
        humanline: clamp of r in the surrogate; the KL penalty stays unclamped.

    Returns:
        losses (B, T); no rewards; metrics `policy_loss`, `critic_loss` (both before their weights), `policykl` (mean
        of -r, nats), `clipfrac` (tokens where the clip binds), `seqratio` (mean over rows of the product of a row's
        ratios), `values_mean`, `values_var` (population), `unclamped`.

    As in HALOs, and unlike in the paper, the KL penalty is the plain log-ratio ("k1"), the critic's target is the
    discounted sum of rewards and not the GAE returns, values are not clipped and there is no entropy bonus.
    """
    check_record(step)
    check_number("cliprange", cliprange, "(0, inf)", "The ratio is clipped to 1 -+ cliprange; 0.2 to 0.5 is usual.")
    check_number("critic_coef", critic_coef, "[0, inf)", "It weighs the critic's squared error; 0 drops it.")
    check_number("kl_coef", kl_coef, "[0, inf)", "It weighs the KL penalty; 0 drops it.")

    mask_BT = step.mask
    raw_BT, _ = log_ratios(step.policy, step.old_policy, mask_BT)
    clamped_BT = clamp(raw_BT, humanline)
    # Mask the inputs that have a gradient: masking only the result gives 0 * inf = NaN in the backward pass.
    values_BT = apply_mask(step.values, mask_BT)
    advantages_BT = step.advantages.detach()
    targets_BT = step.discounted_future_rewards.detach()

    surrogate_BT, clipped_BT = _clipped_surrogate(finite_exp(clamped_BT), advantages_BT, 1 - cliprange, 1 + cliprange)
    critic_BT = (values_BT - targets_BT).square() / 2
    losses_BT = apply_mask(surrogate_BT + critic_coef * critic_BT + kl_coef * raw_BT, mask_BT)
    metrics = {
        "policy_loss": masked_mean(surrogate_BT, mask_BT),
        "critic_loss": masked_mean(critic_BT, mask_BT),
        "policykl": masked_mean(-raw_BT, mask_BT),
        "clipfrac": masked_mean(clipped_BT, mask_BT),
        "seqratio": finite_exp(clamped_BT.sum(-1)).mean(),
        "values_mean": masked_mean(values_BT, mask_BT),
        "values_var": masked_var(values_BT, mask_BT),
        "unclamped": unclamped_fraction(raw_BT, humanline),
    }
    return _output(losses_BT, metrics)


def _clipped_surrogate(ratios: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(ratio * A, clip(ratio, low, high) * A), and 1 where the clip binds (no gradient passes there), else 0."""
    unclipped, clipped = ratios * advantages, ratios.clamp(low, high) * advantages
    return -unclipped.minimum(clipped), (clipped < unclipped).to(unclipped.dtype)


def _output(losses_BT: Tensor, metrics: dict[str, Tensor]) -> LossOutput:
    no_rewards = losses_BT.detach().new_empty(0)
    return LossOutput(losses_BT, no_rewards, no_rewards, {name: value.detach() for name, value in metrics.items()})
