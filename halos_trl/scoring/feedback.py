"""Conversion of scored samples to items of HALOs' feedback files or to rows for trainers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from ..data.labelling import PairMode, binary_labels, group_positions, preferences
from ..data.row_values import SAMPLER_COLUMNS, TEMPLATE_COLUMNS, Row, shown
from .samples import Sample

FeedbackKind = Literal["binary", "pairwise", "scalar", "groups"]
FeedbackFormat = Literal["trl", "halos"]
FEEDBACK_KINDS: tuple[FeedbackKind, ...] = get_args(FeedbackKind)
FEEDBACK_FORMATS: tuple[FeedbackFormat, ...] = get_args(FeedbackFormat)

_REPLACED = ("type", "reward", "score", "label", "prompt", "instruction", "output", "completion")


class Rule(NamedTuple):
    """Rules for deriving feedback from scores; see `halos_trl.data.labelling`."""

    kind: FeedbackKind = "binary"
    threshold: float | str | None = None
    """None means the median for labels and 0 for pairs."""
    pair_mode: PairMode = "max"
    seed: int = 0


def feedback_rows(samples: Sequence[Sample], scores: Sequence[float], rule: Rule, form: FeedbackFormat) -> list[Row]:
    """The rows or items that result from the samples and their scores under `rule`.

    `binary`: one per sample, with a label. `pairwise`: one per pair. `scalar`: one per sample, with a score and the
    sample's other columns. `groups`: one per prompt, with the lists `completions` and `scores`.

    Raises ValueError for scores that are not finite numbers and for an unknown kind, threshold or pair mode. In HALOs'
    format it also raises ValueError for groups and for prompts that are not conversations.
    """
    if rule.kind not in FEEDBACK_KINDS or form not in FEEDBACK_FORMATS:
        raise ValueError(
            f"The feedback is {rule.kind!r} in the format {form!r}; expected one of {', '.join(FEEDBACK_KINDS)} in "
            f"{' or '.join(FEEDBACK_FORMATS)}."
        )
    if form == "halos":
        return _halos_items(samples, scores, rule)
    return _trl_rows(samples, scores, rule)


# -- rows for trainers -----------------------------------------------------------------------------------------------


def _trl_rows(samples: Sequence[Sample], scores: Sequence[float], rule: Rule) -> list[Row]:
    if rule.kind == "binary":
        labels = _labels(scores, rule)
        return [
            _prompt_of(sample) | _of_sampler(sample) | {"completion": sample.completion, "label": label}
            for sample, label in zip(samples, labels, strict=True)
        ]
    if rule.kind == "pairwise":
        return [
            _prompt_of(samples[pair.a])
            | {"chosen": samples[pair.chosen].completion, "rejected": samples[pair.rejected].completion}
            for pair in _pairs(samples, scores, rule)
        ]
    if rule.kind == "scalar":
        return [
            _other_columns(sample) | {"prompt": sample.prompt, "completion": sample.completion, "score": score}
            for sample, score in zip(samples, scores, strict=True)
        ]
    return [
        _prompt_of(samples[members[0]], "prompt_id")
        | {"completions": [samples[i].completion for i in members], "scores": [scores[i] for i in members]}
        | _sampler_lists([samples[i] for i in members])
        for members in group_positions([sample.group for sample in samples])
    ]


def _prompt_of(sample: Sample, *columns: str) -> Row:
    """The prompt, and the columns that are passed to the chat template."""
    return {"prompt": sample.prompt} | _kept(sample, *columns, *TEMPLATE_COLUMNS)


def _kept(sample: Sample, *columns: str) -> Row:
    """The given columns, as far as the sample has them."""
    return {name: value for name in columns if (value := sample.columns.get(name)) is not None}


def _of_sampler(sample: Sample) -> Row:
    """The tokens and log-probs that a sampler stored; tokens are not used without log-probs."""
    found = _kept(sample, *SAMPLER_COLUMNS)
    return found if len(found) == len(SAMPLER_COLUMNS) else {}


def _sampler_lists(members: Sequence[Sample]) -> Row:
    """Tokens and log-probs of all completions of a prompt, if a sampler stored them for each."""
    found = [_of_sampler(sample) for sample in members]
    return {column: [own[column] for own in found] for column in SAMPLER_COLUMNS} if all(found) else {}


def _other_columns(sample: Sample) -> Row:
    return {name: value for name, value in sample.columns.items() if name not in _REPLACED}


# -- HALOs' files ----------------------------------------------------------------------------------------------------


def _halos_items(samples: Sequence[Sample], scores: Sequence[float], rule: Rule) -> list[Row]:
    if rule.kind == "groups":
        raise ValueError("HALOs has no format for groups. Write `scalar` feedback, which HALOs groups itself.")
    for sample in samples:
        if isinstance(sample.prompt, str):
            raise ValueError(
                f"{sample.where} has the text {shown(sample.prompt)} as its prompt. Prompts in HALOs' files are "
                "conversations. Use the format `trl`, or convert the prompts to lists of messages."
            )
    if rule.kind == "binary":
        labels = _labels(scores, rule)
        return [
            _identified(sample)
            | _sample_id(sample)
            | _of_sampler(sample)
            | {"output": sample.completion, "label": int(label), "reward": score, "type": "binary_feedback"}
            for sample, label, score in zip(samples, labels, scores, strict=True)
        ]
    if rule.kind == "scalar":
        return [
            _other_columns(sample)
            | _identified(sample)
            | {"output": sample.completion, "reward": score, "type": "scalar_feedback"}
            for sample, score in zip(samples, scores, strict=True)
        ]
    return [
        _identified(samples[pair.a])
        | _sample_id(samples[pair.a], "sample_id_A")
        | _sample_id(samples[pair.b], "sample_id_B")
        | {
            "output_A": samples[pair.a].completion,
            "output_B": samples[pair.b].completion,
            "label": pair.label,
            "reward_A": scores[pair.a],
            "reward_B": scores[pair.b],
            "reward_difference": pair.difference,
            "type": "pairwise_feedback",
        }
        for pair in _pairs(samples, scores, rule)
    ]


def _identified(sample: Sample) -> dict[str, Any]:
    split = sample.columns.get("split")
    return {"prompt_id": sample.group, "prompt": sample.prompt} | ({} if split is None else {"split": split})


def _sample_id(sample: Sample, key: str = "sample_id") -> dict[str, Any]:
    """Distinguishes equal completions of a prompt. HALOs neither writes nor reads this key."""
    number = sample.columns.get("sample_id")
    return {} if number is None else {key: number}


# -- both ------------------------------------------------------------------------------------------------------------


def _labels(scores: Sequence[float], rule: Rule) -> list[bool]:
    return binary_labels(scores, "median" if rule.threshold is None else rule.threshold)


def _pairs(samples: Sequence[Sample], scores: Sequence[float], rule: Rule) -> list[Any]:
    groups = [sample.group for sample in samples]
    return preferences(scores, groups, rule.pair_mode, rule.threshold or 0.0, rule.seed)


__all__ = ["FEEDBACK_FORMATS", "FEEDBACK_KINDS", "FeedbackFormat", "FeedbackKind", "Rule", "feedback_rows"]
