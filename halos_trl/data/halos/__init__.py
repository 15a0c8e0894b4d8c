"""HALOs' own batches: its flat list, order, deal and truncation, for a run that repeats one of HALOs."""

from .order import microbatches
from .prompts import HalosPrompt, load_prompts
from .tokenization import HalosTokenizer, HalosTokens, padded

__all__ = ["HalosPrompt", "HalosTokenizer", "HalosTokens", "load_prompts", "microbatches", "padded"]
