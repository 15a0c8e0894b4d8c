"""Per-token log-probabilities and the reductions over a mask. Shape legend: see `halos_trl.records`.

Arithmetic is at least float32: half-precision input is upcast before it is exponentiated or summed, and float64 is
kept. Masked positions are removed by selection, not by multiplication with 0, so that an infinity or NaN in the
padding cannot leak.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORE_INDEX = -100


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in its own dtype if that is float32 or float64, in float32 otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def apply_mask(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`x_BT`, at least float32, with exact zeros (and zero gradient) where the mask is 0."""
    return at_least_float32(x_BT).where(mask_BT != 0, 0.0)


def token_logps(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Log-probability of every label under the logits one position earlier.

    Args:
        logits_BTV: model output, any float dtype; position t predicts token t+1.
        labels_BT: token ids; -100 marks tokens that are not scored. The first column is never scored.

    Returns:
        (B, T-1) in nats: entry t is log p(labels[t+1] | logits[t]), and 0 where labels[t+1] is -100. float32, or
        float64 for float64 logits.

    As in HALOs, half-precision logits are upcast before the softmax: bfloat16 has 8 significant bits, and the errors
    of single tokens add up over a completion.
    """
    if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != labels_BT.shape:
        raise ValueError(
            f"logits have shape {tuple(logits_BTV.shape)} and labels {tuple(labels_BT.shape)}; expected (B, T, V) and "
            "(B, T). Pass both unshifted, as returned by the model and the collator."
        )
    labels_BT = labels_BT[:, 1:]
    scored_BT = labels_BT != IGNORE_INDEX
    logps_BTV = at_least_float32(logits_BTV[:, :-1]).log_softmax(-1)
    # -100 is not a valid index, so ignored positions read token 0 and are then set to 0.
    logps_BT = logps_BTV.gather(-1, labels_BT.where(scored_BT, 0).unsqueeze(-1)).squeeze(-1)
    return logps_BT.where(scored_BT, 0.0)


def token_entropy(logits_BTV: Tensor) -> Tensor:
    """Entropy of the next-token distribution at every position: (B, T), nats."""
    logps_BTV = at_least_float32(logits_BTV).log_softmax(-1)
    # A token of probability 0 contributes 0, whereas 0 * log 0 is NaN.
    return -(logps_BTV.exp() * logps_BTV.clamp(min=torch.finfo(logps_BTV.dtype).min)).sum(-1)


def sequence_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the completion tokens of each row: (B,)."""
    return apply_mask(x_BT, mask_BT).sum(-1)


def sequence_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the completion tokens of each row: (B,); 0 for a row without completion tokens."""
    return sequence_sum(x_BT, mask_BT) / (mask_BT != 0).sum(-1).clamp(min=1)


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over all completion tokens of the batch: 0-d; 0 if there are none."""
    return apply_mask(x_BT, mask_BT).sum() / (mask_BT != 0).sum().clamp(min=1)


def masked_var(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Population variance over all completion tokens of the batch: 0-d; 0 if there are none."""
    return masked_mean((at_least_float32(x_BT) - masked_mean(x_BT, mask_BT)).square(), mask_BT)


def finite_exp(x: Tensor) -> Tensor:
    """exp(x) without overflow: beyond three quarters of the exponent range, it is continued along its tangent.

    At least float32. Exact up to x = 66.5 (float32) or 532 (float64). Beyond, value and slope are finite and positive,
    so that such a ratio times an advantage of 0 is 0, a clipped ratio has no gradient, and an unclipped one decreases.
    The last quarter of the range is headroom for factors and sums.
    """
    x = at_least_float32(x)
    inside = x.clamp(max=_exp_limit(x.dtype))
    return inside.exp() * (1 + (x - inside))


def kl_k3(log_ratios_BT: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from r = log policy - log reference: exp(-r) - 1 + r.

    Unbiased when the tokens were sampled from the policy, and never negative: "k3" of Schulman's note "Approximating
    KL divergence" (http://joschu.net/blog/kl-approx.html); DeepSeekMath (arXiv 2402.03300) eq. 4. Nats, shape and
    dtype of the input (at least float32). exp(-r) - 1 is computed as one function because r is near 0 at the start of
    training; far below 0, it is continued along its tangent, as in `finite_exp`.
    """
    log_ratios_BT = at_least_float32(log_ratios_BT)
    inside = (-log_ratios_BT).clamp(max=_exp_limit(log_ratios_BT.dtype))
    beyond = -log_ratios_BT - inside
    return torch.expm1(inside) + inside.exp() * beyond + log_ratios_BT


def _exp_limit(dtype: torch.dtype) -> float:
    return 0.75 * math.log(torch.finfo(dtype).max)
