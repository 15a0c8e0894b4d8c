"""The losses: one pure function per method, a record of per-token log-probs in, a `LossOutput` out.

A loss knows no model, no configuration and no device. Where results are (B,), the batch's loss is `losses.mean()`;
where they are (B, T), it is `losses.sum()` over the number of completion tokens.
"""

from .paired import cdpo, dpo, ipo, simpo, slic
from .policy import grpo, ppo
from .unpaired import kto, kto_kl

__all__ = ["cdpo", "dpo", "grpo", "ipo", "kto", "kto_kl", "ppo", "simpo", "slic"]
