"""Scores for completions from a reward model, a Python function, or a judge behind an HTTP API.

A scorer is called with samples and their positions, and yields a `Verdict` for each in any order.
"""

from .samples import Sample
from .verdict import Scorer, Verdict

__all__ = ["Sample", "Scorer", "Verdict"]
