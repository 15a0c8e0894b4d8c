"""The interface of scorers and their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from .samples import Sample


class Verdict(NamedTuple):
    """A scorer's result for one sample, which is identified by its position in the input."""

    position: int
    score: float | None
    """None if the sample has no score."""
    reason: str | None = None
    """The reason why there is no score."""
    reply: str | None = None
    """The judge's reply."""


class Scorer(Protocol):
    """Scores samples one by one, in batches or concurrently."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect scores, as JSON values without secrets."""
        ...

    def __call__(self, todo: Sequence[tuple[int, Sample]]) -> Iterator[Verdict]:
        """Yield a verdict for each (position, sample), in any order."""
        ...


__all__ = ["Scorer", "Verdict"]
