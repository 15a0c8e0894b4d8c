"""The one door to private names of TRL and transformers.

TRL is the host: it loads models, tokenizes, prepares adapters, evaluates and saves. What it bakes in and this
package does not want is undone here and nowhere else; every other module uses public names only.

=============================  =========================================================================
what TRL does                  what happens here
=============================  =========================================================================
KTO pairs each prompt with a   TRL is told that there is no KL term, so it neither stores partners nor
neighbour's completion once    refuses shuffling and batch size 1; `UnpairedPreferenceTrainer` pairs inside
and forbids shuffling          the optimizer step
re-loads the reference from    an *instance* is copied, so that policy and reference start out equal
the hub id of the policy
loads a reference for every    none is loaded where `needs_reference` is false
DPO-like method
averages micro-batch means     sums and counts are kept on the device and divided once per log line
drops rows without room for    the same rows are dropped, but counted in a warning
a completion, silently
writes the reference adapter   the other adapters are saved
into the saved model
gives a PeftModel a reference  it is added without editing the base weights a second time (PiSSA and its
adapter, needed or not         kin), and not at all where `needs_reference` is false
precomputes reference sums in  the live reference computes them; what was stored is found by all that decides
a forward pass of its own, and the numbers
finds them by dataset and
weights alone
prepares the policy for an     also where a reference was prepared before it
evaluation before training
only if nothing else is
lets NaN losses, gradients     an error before the update, and before the weights are saved
and learning rates through
loads the adapter of a         its dtype stays
quantized model as float32
=============================  =========================================================================
"""

from __future__ import annotations

from accelerate.utils import is_peft_model
from trl.trainer.utils import get_config_model_id

from ..forward.score import STEP_SHARE, TokenTable, score_together, score_tokens
from . import compat  # noqa: F401  (fills in for an older TRL)
from .adapters import (
    POLICY_ADAPTER,
    REFERENCE_ADAPTER,
    add_reference_adapter,
    edits_base_weights,
    reading_adapter,
    refuse_unfit_adapters,
    restored_by_switch,
    saved_with_adapter,
)
from .dropout import rates_in_config
from .host import Method, NamedTrainer, TrainerHost, card_identity, run_urls, unwrapped_for_generation
from .online import OnlineHost
from .overridden import overridden
from .paired import PairedHost
from .reward import RewardHost
from .scored import ScoredHost
from .unpaired import UnpairedHost
from .user_functions import CheckedCollator
from .value import ValueHost

__all__ = [
    "POLICY_ADAPTER",
    "REFERENCE_ADAPTER",
    "STEP_SHARE",
    "CheckedCollator",
    "Method",
    "NamedTrainer",
    "OnlineHost",
    "PairedHost",
    "RewardHost",
    "ScoredHost",
    "TokenTable",
    "TrainerHost",
    "UnpairedHost",
    "ValueHost",
    "add_reference_adapter",
    "card_identity",
    "edits_base_weights",
    "get_config_model_id",
    "is_peft_model",
    "overridden",
    "rates_in_config",
    "reading_adapter",
    "refuse_unfit_adapters",
    "restored_by_switch",
    "run_urls",
    "saved_with_adapter",
    "score_together",
    "score_tokens",
    "unwrapped_for_generation",
]
