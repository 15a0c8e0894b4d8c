"""The formats of feedback items: detecting them, and parsing all of them into one representation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..row_texts import prompt_problem, side_problem
from ..row_values import SAMPLER_COLUMNS, Problem, label_problem, sampler_problem, score_problem, shown
from .files import Item, Object

Text = str | list[dict[str, Any]]


class Completion(NamedTuple):
    """One completion, with the score, label and other values that its item has for it."""

    text: Text
    score: float | None = None
    label: bool | None = None
    sample_id: str | None = None
    sampled: tuple[list[int], list[float]] | None = None
    """Token ids and their log-probs (nats) under the sampling model."""


class Judged(NamedTuple):
    """A parsed item: completions of a prompt, and pairs of them (positions; the first is preferred)."""

    prompt: Text
    completions: tuple[Completion, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    ties: int = 0
    """Pairs with equal scores, which express no preference."""


class Format(NamedTuple):
    """A format of items: its keys, and its parser."""

    name: str
    needs: tuple[str, ...]
    sides: tuple[str, ...]
    """Keys of the completions; the last one contains all remaining completions."""
    read: Callable[[Object], Judged]
    scores: tuple[str, ...] = ()
    """Keys of the scores, which must be in all items of a file or in none."""


# -- HALOs' formats --------------------------------------------------------------------------------------------------


def _sample(value: Object) -> Judged:
    """HALOs stores a sample as text; `instruction` is the prompt in files for AlpacaEval."""
    prompt = value["prompt"] if "prompt" in value else [{"role": "user", "content": value["instruction"]}]
    return Judged(prompt, (Completion(_turns(value["output"]), None, None, _sample_id(value)),))


def _binary(value: Object) -> Judged:
    label = bool(_checked(value["label"], label_problem))
    score = _score(value, "reward")
    return Judged(
        value["prompt"], (Completion(_turns(value["output"]), score, label, _sample_id(value), _sampled(value)),)
    )


def _scalar(value: Object) -> Judged:
    score = float(_checked(value["reward"], score_problem))
    return Judged(
        value["prompt"], (Completion(_turns(value["output"]), score, None, _sample_id(value), _sampled(value)),)
    )


def _pairwise(value: Object) -> Judged:
    """`label` 1: A is preferred. HALOs also assigns 0 to pairs with equal scores, which express no preference."""
    label = bool(_checked(value["label"], label_problem))
    scores = [_score(value, key) for key in ("reward_A", "reward_B")]
    sides = tuple(
        Completion(_turns(value[f"output_{side}"]), score, None, _sample_id(value, f"sample_id_{side}"))
        for side, score in zip("AB", scores, strict=True)
    )
    if not label and scores[0] is not None and scores[0] == scores[1]:
        return Judged(value["prompt"], sides, ties=1)
    return Judged(value["prompt"], sides, ((0, 1) if label else (1, 0),))


# -- rows of TRL -----------------------------------------------------------------------------------------------------


def _pair_row(value: Object) -> Judged:
    rejected = value["rejected"]
    others = rejected if is_list_of_completions(rejected) else [rejected]
    scores = [_score(value, "score_chosen"), *_scores_of_rejected(value, len(others))]
    texts = enumerate(zip([value["chosen"], *others], scores, strict=True))
    completions = tuple(Completion(text, score, None, _sample_id(value, "", i)) for i, (text, score) in texts)
    return Judged(value["prompt"], completions, tuple((0, i) for i in range(1, len(completions))))


def _scores_of_rejected(value: Object, count: int) -> list[float | None]:
    scores = value.get("score_rejected")
    scores = scores if isinstance(scores, list) else [scores] * count
    if len(scores) != count:
        raise ValueError(f"has {count} completions in `rejected` and {len(scores)} scores in `score_rejected`.")
    return [None if score is None else float(_checked(score, score_problem)) for score in scores]


def _labelled_row(value: Object) -> Judged:
    label = bool(_checked(value["label"], label_problem))
    score = _score(value, "score")
    return Judged(
        value["prompt"], (Completion(value["completion"], score, label, _sample_id(value), _sampled(value)),)
    )


def _scored_row(value: Object) -> Judged:
    score = float(_checked(value["score"], score_problem))
    return Judged(value["prompt"], (Completion(value["completion"], score, None, _sample_id(value), _sampled(value)),))


def _group_row(value: Object) -> Judged:
    completions, scores = value["completions"], value["scores"]
    if not isinstance(completions, list) or not isinstance(scores, list) or len(completions) != len(scores):
        raise ValueError(
            f"has `completions` {shown(completions)} and `scores` {shown(scores)}; expected two lists of equal length."
        )
    sampled = _sampled_each(value, len(completions))
    return Judged(
        value["prompt"],
        tuple(
            Completion(text, float(_checked(score, score_problem)), None, _sample_id(value, "", i), sampled[i])
            for i, (text, score) in enumerate(zip(completions, scores, strict=True))
        ),
    )


def _sft_row(value: Object) -> Judged:
    return Judged(value["prompt"], (Completion(value["completion"], None, None, _sample_id(value)),))


_BY_TYPE = {
    form.name: form
    for form in (
        Format("sample", ("output",), ("output",), _sample),
        Format("binary_feedback", ("prompt", "output", "label"), ("output",), _binary, ("reward",)),
        Format(
            "pairwise_feedback",
            ("prompt", "output_A", "output_B", "label"),
            ("output_A", "output_B"),
            _pairwise,
            ("reward_A", "reward_B"),
        ),
        Format("scalar_feedback", ("prompt", "output", "reward"), ("output",), _scalar, ("reward",)),
    )
}
_BY_KEYS = (
    Format(
        "pairs",
        ("prompt", "chosen", "rejected"),
        ("chosen", "rejected"),
        _pair_row,
        ("score_chosen", "score_rejected"),
    ),
    Format("groups", ("prompt", "completions", "scores"), ("completions",), _group_row, ("scores",)),
    Format("labelled", ("prompt", "completion", "label"), ("completion",), _labelled_row, ("score",)),
    Format("scored", ("prompt", "completion", "score"), ("completion",), _scored_row, ("score",)),
    Format("completions", ("prompt", "completion"), ("completion",), _sft_row),
)


def format_of(item: Item) -> Format:
    """The format of an item, from its `type` if it has one, else from its keys. Raises ValueError if unknown."""
    value = item.value
    if "type" in value:
        known = _BY_TYPE.get(value["type"]) if isinstance(value["type"], str) else None
        if known is None:
            raise ValueError(
                f"{item.where} has `type` {shown(value['type'])}; expected one of {', '.join(map(repr, _BY_TYPE))}."
            )
        return known
    for form in _BY_KEYS:
        if value.keys() >= set(form.needs):
            return form
    raise ValueError(
        f"{item.where} has an unknown format: no `type`, and the keys {sorted(value)}. Expected an item with a `type` "
        f"of {', '.join(map(repr, _BY_TYPE))}, or a row with "
        f"{'; '.join(', '.join(f'`{key}`' for key in form.needs) for form in _BY_KEYS)}."
    )


def judged(item: Item, form: Format) -> Judged:
    """Parse an item. Raises ValueError, naming the item, for missing, invalid or contradictory fields."""
    value = item.value
    missing = [key for key in form.needs if key not in value]
    if form.name == "sample" and not {"prompt", "instruction"} & value.keys():
        missing = ["prompt", *missing]
    if missing:
        raise ValueError(
            f"{item.where} lacks {', '.join(f'`{key}`' for key in missing)}; items of format {form.name!r} have "
            f"{', '.join(f'`{key}`' for key in form.needs)}. It has the keys {sorted(value)}."
        )
    try:
        found = form.read(value)
        _check_texts(found, form)
    except ValueError as error:
        raise ValueError(f"{item.where} {error}") from None
    return found


# -- checks ----------------------------------------------------------------------------------------------------------


def _checked(value: Any, problem_of: Callable[[Any], Problem]) -> Any:
    problem = problem_of(value)
    if problem is not None:
        raise ValueError(problem)
    return value


def _score(value: Object, key: str) -> float | None:
    """A score that may be missing or null."""
    score = value.get(key)
    return None if score is None else float(_checked(score, score_problem))


def _sample_id(value: Object, key: str = "sample_id", position: int = 0) -> str | None:
    """The id of a sample; rows of `load_feedback` have a list of them."""
    found, ids = value.get(key), value.get("sample_ids")
    if found is None and isinstance(ids, list) and len(ids) > position:
        found = ids[position]
    return None if found is None else str(found)


def _sampled(value: Object) -> tuple[list[int], list[float]] | None:
    """Token ids and log-probs of a completion, as stored by `halos-trl sample --logprobs`."""
    ids: Any = value.get("token_ids")
    logps: Any = value.get("logprobs")
    if logps is None:
        return None
    if problem := sampler_problem(ids, logps):
        raise ValueError(problem)
    return ids, [float(number) for number in logps]


def _sampled_each(value: Object, count: int) -> list[tuple[list[int], list[float]] | None]:
    """`_sampled` for each of a list of completions."""
    columns = [value.get(column) for column in SAMPLER_COLUMNS]
    if columns[1] is None:
        return [None] * count
    if not all(isinstance(column, list) and len(column) == count for column in columns):
        ids, logps = map(shown, columns)
        raise ValueError(
            f"has {count} completions, `token_ids` {ids} and `logprobs` {logps}; expected one list per completion."
        )
    return [_sampled(dict(zip(SAMPLER_COLUMNS, own, strict=True))) for own in zip(*columns, strict=True)]


def _turns(output: Any) -> Any:
    return [{"role": "assistant", "content": output}] if isinstance(output, str) else output


def is_list_of_completions(value: Any) -> bool:
    """Whether a value is a list of completions; a list of turns is a single completion."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, str | list) for part in value)


def _check_texts(found: Judged, form: Format) -> None:
    is_chat = form.name in _BY_TYPE
    problem = prompt_problem(found.prompt) or _user_problem(found.prompt, is_chat) or _turns_problem(found.prompt)
    if problem is None:
        texts = [completion.text for completion in found.completions]
        keys = itertools.chain(form.sides, itertools.repeat(form.sides[-1]))
        sides = zip(texts, keys, strict=False)
        problem = _first(side_problem(text, found.prompt, key, True) or _turns_problem(text) for text, key in sides)
    if problem := problem or _first(_contradiction(found, *pair) for pair in found.pairs):
        raise ValueError(problem)


def _contradiction(found: Judged, better: int, worse: int) -> Problem:
    """The problem of a pair in which the same text has two scores."""
    a, b = found.completions[better], found.completions[worse]
    if a.text != b.text or a.score == b.score:
        return None
    return (
        f"has a pair of equal completions with different scores, {shown(a.score)} and {shown(b.score)}: "
        f"{shown(a.text)}. Fix or remove the item."
    )


def _first(problems: Any) -> Problem:
    return next(filter(None, problems), None)


def _user_problem(prompt: Text, is_chat: bool) -> Problem:
    if isinstance(prompt, str):
        form = "[{'role': 'user', 'content': '...'}]"
        return f"has the text {shown(prompt)} as prompt; expected a conversation: {form}." if is_chat else None
    if any(turn["role"] == "user" for turn in prompt):
        return None
    roles = [turn["role"] for turn in prompt]
    return f"has a prompt without a user turn (roles: {roles}). Add the turn that the completion answers."


def _turns_problem(text: Text) -> Problem:
    """The problem of turns with a field that is not text; all rows of a dataset need the same schema."""
    if isinstance(text, str):
        return _encoding_problem(text)
    for turn in text:
        for key, value in turn.items():
            if value is not None and not isinstance(value, str):
                return (
                    f"has a turn whose `{key}` is of type {type(value).__name__}: {shown(turn)}. In feedback files, "
                    "all fields of a turn must be text; load other conversations with `datasets.load_dataset`."
                )
            if value is not None and (problem := _encoding_problem(value)):
                return problem
    return None


def _encoding_problem(text: str) -> Problem:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            f"contains half of a surrogate pair, {json.dumps(text[error.start])}, which is not a valid character (a "
            "truncated emoji, for example). Remove it."
        )
    return None


def split_of(value: Object) -> str | None:
    """The split of an item; None if it belongs to every split."""
    split = value.get("split")
    return None if split is None else str(split)


def known_types() -> Sequence[str]:
    """The values of `type` in HALOs' files."""
    return tuple(_BY_TYPE)


__all__ = [
    "Completion",
    "Format",
    "Judged",
    "Text",
    "format_of",
    "is_list_of_completions",
    "judged",
    "known_types",
    "split_of",
]
