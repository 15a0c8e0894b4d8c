"""The only package that uses private names of TRL and transformers.

TRL loads models, tokenizes, prepares adapters, evaluates and saves. Where its built-in behaviour does not suit this
package, it is changed here; all other modules use public names only.

=============================  =========================================================================
TRL's behaviour                behaviour here
=============================  =========================================================================
KTO pairs each prompt with a   TRL is told that there is no KL term, so it neither stores partners nor
neighbour's completion once    refuses shuffling and batch size 1; `UnpairedPreferenceTrainer` pairs within
and forbids shuffling          the optimizer step
reloads the reference from     the model instance is copied, so that policy and reference start out equal
the Hub id of the policy
loads a reference for every    no reference is loaded if `needs_reference` is false
DPO-like method
averages micro-batch means     sums and counts are kept on the device and divided once per log line
silently drops rows without    the same rows are dropped, but counted in a warning
room for a completion
writes the reference adapter   only the other adapters are saved
into the saved model
adds a reference adapter to    it is added without modifying the base weights a second time (PiSSA and similar
every PeftModel                methods), and not at all if `needs_reference` is false
precomputes reference sums in  the same code computes live and stored log-probs; the cache key contains every
a separate forward pass, with  setting that affects the numbers
a cache key of dataset and
weights alone
refuses to precompute for      computed by the collator that training uses, and stored with a checksum of the row's
rows with images               tokens; KTO's partners are then fixed, as for text
prepares the policy for an     the policy is prepared even if a reference was prepared before it
evaluation before training
only if nothing else is
does not check losses,         NaN and infinity raise an error before the update, and before the weights are
gradients and learning rates   saved
loads the adapter of a         the adapter keeps its dtype
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
