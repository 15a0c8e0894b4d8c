"""Scores from a language model behind an OpenAI-compatible HTTP API (`POST <base URL>/chat/completions`)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from .chat_client import ChatClient, RefusedError
from .samples import Sample
from .verdict import Verdict

logger = logging.getLogger(__name__)

TEMPLATE = """\
Judge how good the response to the following conversation is. Consider whether it does what was asked, is correct, \
complete, clear, and no longer than needed.

<conversation>
{prompt}
</conversation>

<response>
{completion}
</response>

Give reasons in a few sentences. Then end with a line of the form

Score: <a number from 0 (useless) to 10 (could not be better)>
"""

PATTERN = r"(?i)\bscore\b[*_:=\s]*(-?\d+(?:\.\d+)?)"
"""Pattern of the score in a reply: the first group of the last match."""

_BOUNDS = (0.0, 10.0)  # range of the scores that TEMPLATE asks for
_NUMBER_ALONE = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*\.?\s*")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_REFUSALS = 10  # this many refusals before the first reply are not due to individual samples


@dataclass(frozen=True)
class JudgePrompt:
    """The judge's prompt template and the pattern that finds the score in its reply.

    `{prompt}`, `{completion}` and `{<column>}` in `template` are replaced by the sample's texts; other braces are left
    unchanged. `pattern` is a regular expression whose first group is the score. Raises ValueError for a template
    without `{completion}` and for a pattern without a group.
    """

    template: str = TEMPLATE
    pattern: str = PATTERN

    def __post_init__(self) -> None:
        if "{completion}" not in self.template:
            raise ValueError(
                "The judge's template has no `{completion}`, so the judge would not see the completion. Add it."
            )
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(
                f"The judge's pattern {self.pattern!r} is not a valid regular expression: {error}."
            ) from None
        if not groups:
            raise ValueError(f"The judge's pattern {self.pattern!r} has no group for the score, e.g. `Score: (\\d+)`.")

    def text(self, sample: Sample) -> str:
        values = sample.columns | {"prompt": sample.prompt, "completion": sample.text}
        return _PLACEHOLDER.sub(lambda m: _as_text(values[m[1]]) if m[1] in values else m[0], self.template)

    def score(self, reply: str | None) -> float | None:
        """The score in a reply; None if there is none, or if it is outside the range of the built-in template."""
        found = [match[1] for match in re.finditer(self.pattern, reply or "")]
        alone = _NUMBER_ALONE.fullmatch(reply or "") if self.pattern == PATTERN else None
        try:
            score = float(found[-1] if found else alone[1] if alone else "none")
        except (TypeError, ValueError):
            return None
        low, high = _BOUNDS if self.template == TEMPLATE else (-1e12, 1e12)
        return score if low <= score <= high else None


def _as_text(value: Any) -> str:
    """Messages as text for the judge: the content of a single turn, or several turns each preceded by its role."""
    if not (isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value)):
        return str(value)
    texts = [str(turn.get("content") or "") for turn in value]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{turn['role']}: {text}" for turn, text in zip(value, texts, strict=True))


@dataclass
class JudgeScorer:
    """Asks a judge about each sample, with `concurrency` parallel requests, and yields verdicts as replies arrive.

    A sample has no score if the reply contains none or if the server rejects the request's content (status 400, 413 or
    422). Raises ValueError if the server rejects the first ten requests or all of them, or cannot be used; replies
    received until then, including those to pending requests, are yielded first.
    """

    client: ChatClient
    prompt: JudgePrompt = field(default_factory=JudgePrompt)
    concurrency: int = 8

    def __post_init__(self) -> None:
        self._warned = False
        if self.concurrency < 1:
            raise ValueError(f"The judge's concurrency is {self.concurrency}; expected at least 1.")

    @property
    def settings(self) -> dict[str, Any]:
        return self.client.settings | {"judge_template": self.prompt.template, "judge_pattern": self.prompt.pattern}

    def __call__(self, todo: Sequence[tuple[int, Sample]]) -> Iterator[Verdict]:
        refused: list[Verdict] = []  # held back until the server has answered a request
        answered = False
        for verdict, is_refusal in self._answers(iter(todo)):
            answered = answered or not is_refusal
            refused.append(verdict)
            if answered:
                yield from refused
                refused = []
            elif len(refused) == _REFUSALS:
                break
        if refused:
            raise ValueError(
                f"The server refused all of the first {len(refused)} requests. The first one: {refused[0].reason}. "
                "Check the model's name, the options and the template."
            )

    def _answers(self, todo: Iterator[tuple[int, Sample]]) -> Iterator[tuple[Verdict, bool]]:
        """Verdicts, and whether the server refused the request. Waits for pending requests before raising an error."""
        failure: BaseException | None = None
        pending: set[Future[tuple[Verdict, bool]]] = set()
        self.client.start()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while failure is None or pending:
                    while failure is None and len(pending) < self.concurrency and (item := next(todo, None)):
                        pending.add(pool.submit(self._ask, *item))
                    if not pending:
                        break
                    try:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    except KeyboardInterrupt as interrupt:
                        failure = failure or interrupt
                        self.client.stop()
                        continue
                    for future in done:
                        if error := future.exception():
                            failure = failure or error
                            self.client.stop()
                        else:
                            yield future.result()
            finally:
                self.client.stop()
        if failure is not None:
            raise failure

    def _ask(self, position: int, sample: Sample) -> tuple[Verdict, bool]:
        try:
            reply = self.client.reply([{"role": "user", "content": self.prompt.text(sample)}], sample.where)
        except RefusedError as refusal:
            return Verdict(position, None, f"the server refused the request: {refusal}"), True
        score = self.prompt.score(reply)
        if score is None and not self._warned:
            self._warned = True
            logger.warning(
                f"The judge's reply about {sample.where} contains no score: {(reply or '')[-200:]!r}. Samples with "
                "such replies are left out and counted; this is the first one."
            )
        return Verdict(position, score, "the judge's reply contains no score" if score is None else None, reply), False


__all__ = ["PATTERN", "TEMPLATE", "JudgePrompt", "JudgeScorer"]
