"""HALOs' batches: its flat list, shuffling, distribution over processes and truncation, to reproduce runs of HALOs."""

from .batches import HalosBatches, HalosGroupBatches, HalosPairedBatches, HalosPartners, HalosUnpairedBatches
from .order import flat_rows, microbatches
from .prompts import HalosPrompt, load_prompts
from .tokenization import HalosTokenizer, HalosTokens, padded

__all__ = [
    "HalosBatches",
    "HalosGroupBatches",
    "HalosPairedBatches",
    "HalosPartners",
    "HalosPrompt",
    "HalosTokenizer",
    "HalosTokens",
    "HalosUnpairedBatches",
    "flat_rows",
    "load_prompts",
    "microbatches",
    "padded",
]
