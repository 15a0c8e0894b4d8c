"""The losses: one pure function per method, from a record of per-token log-probs to a `LossOutput`.

Losses do not depend on models, configs or devices. If `losses` is (B,), the batch's loss is `losses.mean()`; if it is
(B, T), the batch's loss is `losses.sum()` divided by the number of completion tokens.
"""

from .paired import cdpo, dpo, ipo, simpo, slic
from .policy import grpo, ppo
from .unpaired import kto, kto_kl

__all__ = ["cdpo", "dpo", "grpo", "ipo", "kto", "kto_kl", "ppo", "simpo", "slic"]
