"""Sources of reference log-probs, and how the reference follows the policy.

Each source is a class with `log_probs(batch)`; those that can move also have `sync(policy)`:

===================  ==================================================  =====
class                reference                                           moves
===================  ==================================================  =====
`FrozenCopy`         a second model: a copy of the policy or `ref_model`  yes
`AdapterOff`         the policy with its adapter switched off            no
`FrozenAdapter`      a second adapter on the policy's base model         yes
`PrecomputedColumn`  sums stored with the dataset                        no
`PrecomputedTokens`  log-probs of each token, stored with the dataset    no
`NoReference`        none (SimPO, SLiC)                                  no
===================  ==================================================  =====
"""

from .checkpoint import (
    REFERENCE_FILE,
    gathered,
    load_reference,
    restore_best_reference,
    restore_reference,
    save_reference,
    write_reference,
)
from .sources import AdapterOff, ForwardContext, FrozenAdapter, FrozenCopy, NoReference, Reference
from .stored import PrecomputedColumn, PrecomputedTokens, at_completion_tokens, spread_evenly
from .sync import ReferenceSync

__all__ = [
    "REFERENCE_FILE",
    "AdapterOff",
    "ForwardContext",
    "FrozenAdapter",
    "FrozenCopy",
    "NoReference",
    "PrecomputedColumn",
    "PrecomputedTokens",
    "Reference",
    "ReferenceSync",
    "at_completion_tokens",
    "gathered",
    "load_reference",
    "restore_best_reference",
    "restore_reference",
    "save_reference",
    "spread_evenly",
    "write_reference",
]
