"""What a scorer says of a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from .samples import Sample


class Verdict(NamedTuple):
    """Of one sample, by its position in the input."""

    position: int
    score: float | None
    """None: the sample was left unscored."""
    reason: str | None = None
    """Why it was."""
    reply: str | None = None
    """The text of a judge."""


class Scorer(Protocol):
    """Scores samples one after the other or several at a time."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores depend on, as JSON values; no secrets."""
        ...

    def __call__(self, todo: Sequence[tuple[int, Sample]]) -> Iterator[Verdict]:
        """A verdict for each of the positions and samples, as they come."""
        ...


__all__ = ["Scorer", "Verdict"]
