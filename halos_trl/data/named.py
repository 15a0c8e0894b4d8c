"""Datasets of the Hub by a short name: HALOs' datasets, and others that TRL users often load.

Each has its location and a pure function from its raw rows to the items that `load_feedback` reads. Texts are not
modified (HALOs collapses repeated spaces, which breaks code).
"""

from __future__ import annotations

import json
import logging
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from .feedback import load_feedback
from .feedback.plan import Purpose

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Turns = list[dict[str, str]]
ItemsOf = Callable[[Iterable[Row], str], Iterator[Row]]
"""Converts raw rows to items, given the split."""


class Named(NamedTuple):
    """A dataset: its Hub id, the names of its splits, its items, and further arguments for `load_dataset`."""

    hub_id: str
    splits: Mapping[str, str]
    items: ItemsOf
    config: str | None = None
    data_dir: str | None = None


def load_named(
    name: str,
    for_: Purpose = "paired",
    split: str = "train",
    *,
    path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> datasets.Dataset:
    """Rows for a trainer from a dataset in `NAMED`, as `load_feedback` reads them from files.

    `path` is a local copy of the dataset to read instead of the Hub; `options` are those of `load_feedback`. Duplicate
    rows of the source are kept. The `sources` of a row name an item of `<name>-<split>.jsonl`, which is written to the
    cache.

    Raises ValueError for an unknown name or split, and what `load_feedback` raises.
    """
    items = named_items(name, split, path=path, cache_dir=cache_dir)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "halos_trl" / "named"
    file = _write(items, folder, f"{name}-{split}.jsonl")
    return load_feedback(file, for_, **{"duplicates": "keep", "cache_dir": cache_dir, **options})


def named_items(
    name: str, split: str, *, path: str | Path | None = None, cache_dir: str | Path | None = None
) -> Iterator[Row]:
    """The items of a dataset in `NAMED`: a `prompt` each, with completions and their feedback.

    Arguments and errors as of `load_named`.
    """
    source = named(name)
    if split not in source.splits:
        raise ValueError(f"{name!r} has splits {sorted(source.splits)}, not {split!r}.")
    # A local copy has no configurations, which exist only on the Hub.
    config = source.config if path is None else None
    raw = datasets.load_dataset(
        str(path or source.hub_id),
        name=config,
        data_dir=source.data_dir,
        split=source.splits[split],
        cache_dir=None if cache_dir is None else str(cache_dir),
    )
    return source.items(raw, split)


def named(name: str) -> Named:
    """The dataset with this name. Raises a ValueError that lists the known names for an unknown one."""
    if name not in NAMED:
        raise ValueError(f"Unknown dataset {name!r}; expected one of {', '.join(NAMED)}.")
    return NAMED[name]


def _write(items: Iterable[Row], folder: Path, name: str) -> Path:
    """Write items as JSON Lines, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        written = Path(part) / name
        with written.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        return written.replace(folder / name)


# -- from raw rows to items ------------------------------------------------------------------------------------------


def _each(convert: Callable[[Row], Row]) -> ItemsOf:
    """The items of a dataset in which each row is one item. Rows without a prompt are left out and counted in a
    warning.
    """

    def items(rows: Iterable[Row], split: str) -> Iterator[Row]:
        left_out = 0
        for item in map(convert, rows):
            if item["prompt"]:
                yield item
            else:
                left_out += 1
        if left_out:
            logger.warning(
                f"Left out {left_out} rows of the {split} split: `chosen` and `rejected` have no common beginning."
            )

    return items


def _user(text: str) -> Turns:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> Turns:
    return [{"role": "assistant", "content": text}]


def _plain(turns: Iterable[Row]) -> Turns:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _pair(prompt: Turns, chosen: Turns, rejected: Turns, chosen_score: Any = None, rejected_score: Any = None) -> Row:
    scores: Row = {}
    if chosen_score is not None and rejected_score is not None:
        scores = {"score_chosen": float(chosen_score), "score_rejected": float(rejected_score)}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **scores}


_SHP_RATIO = 2  # minimum ratio of the scores of a training pair
_SHP_PAIRS = 5  # maximum number of pairs per training prompt


def shp(rows: Iterable[Row], split: str) -> Iterator[Row]:
    """Reddit posts with two answers and their votes. In training, as in HALOs: pairs whose votes differ by at least a
    factor of 2, and at most 5 pairs per post, sampled with seed 0.
    """
    rows = list(rows) if split != "train" else _some_of_each_post([row for row in rows if _votes_differ(row)])
    for row in rows:
        sides = [(_assistant(row[f"human_ref_{side}"]), row[f"score_{side}"]) for side in "AB"]
        (chosen, better), (rejected, worse) = sides if row["labels"] == 1 else sides[::-1]
        yield _pair(_user(row["history"]), chosen, rejected, better, worse)


def _votes_differ(row: Row) -> bool:
    low, high = sorted((row["score_A"], row["score_B"]))
    return high >= _SHP_RATIO * low


def _some_of_each_post(rows: list[Row]) -> list[Row]:
    of_post: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        of_post.setdefault(row["history"], []).append(i)
    draws = random.Random(0)
    kept = [i for post in of_post.values() for i in draws.sample(post, min(_SHP_PAIRS, len(post)))]
    return [rows[i] for i in sorted(kept)]


_SPEAKERS = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def dialogue(text: str) -> Turns:
    """The turns of a text in which `Human:` and `Assistant:` begin a paragraph."""
    _, *parts = _SPEAKERS.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[speaker], "content": content.strip()} for speaker, content in turns]


def hh(row: Row) -> Row:
    """Two dialogues with a common beginning. The prompt is the common part up to a turn of the human."""
    chosen, rejected = dialogue(row["chosen"]), dialogue(row["rejected"])
    prompt = _common_prompt(chosen, rejected)
    return _pair(chosen[:prompt], chosen[prompt:], rejected[prompt:])


def _common_prompt(chosen: Turns, rejected: Turns) -> int:
    """Number of common initial turns of both sides, up to a user turn that both answer."""
    alike = 0
    while alike < min(len(chosen), len(rejected)) - 1 and chosen[alike] == rejected[alike]:
        alike += 1
    while alike and chosen[alike - 1]["role"] != "user":
        alike -= 1
    return alike


def oasst(rows: Iterable[Row], split: str) -> Iterator[Row]:
    """Trees of messages with ranked answers, English ones only. Answers with neighbouring ranks form a pair."""
    messages = {row["message_id"]: row for row in rows if row["lang"] == "en"}
    ranked = {(row["parent_id"], row["rank"]): row for row in messages.values() if row["rank"] is not None}
    for (parent, rank), row in ranked.items():
        better = ranked.get((parent, rank - 1))
        path = _path_from_root(parent, messages)
        # Prompts have ranks, too, and parents in other languages were left out.
        if better is not None and path and path[-1]["role"] == "user":
            yield _pair(path, _assistant(better["text"]), _assistant(row["text"]))


def _path_from_root(message: str | None, messages: Mapping[str, Row]) -> Turns:
    path: Turns = []
    while message is not None:
        row = messages.get(message)
        if row is None:
            return []
        path.append({"role": "user" if row["role"] == "prompter" else "assistant", "content": row["text"]})
        message = row["parent_id"]
    return path[::-1]


def ultrafeedback(row: Row) -> Row:
    """A prompt as text, two conversations, and a score of each."""
    return _pair(
        _user(row["prompt"]),
        _assistant(row["chosen"][-1]["content"]),
        _assistant(row["rejected"][-1]["content"]),
        row.get("score_chosen"),
        row.get("score_rejected"),
    )


def ultrafeedback_armorm(row: Row) -> Row:
    """As `ultrafeedback`; the sides are those of the highest and the lowest score of several samples."""
    scores = row["all_rm_scores"]
    return _pair(
        _user(row["prompt"]), _plain(row["chosen"][1:]), _plain(row["rejected"][1:]), max(scores), min(scores)
    )


def ultrachat(row: Row) -> Row:
    """Conversations; the first turn is the prompt, all others the completion."""
    first, *others = _plain(row["messages"])
    return {"prompt": [first], "completion": others}


def safe_rlhf(row: Row) -> Row:
    """A prompt and two responses, of which `better_response_id` (0 or 1) is preferred."""
    better = row["better_response_id"]
    responses = [_assistant(row[f"response_{i}"]) for i in (better, 1 - better)]
    return _pair(_user(row["prompt"]), *responses)


def s1k(row: Row) -> Row:
    """A question with the reasoning and the answer of DeepSeek R1, in s1's own markup."""
    thoughts, answer = row["deepseek_thinking_trajectory"], row["deepseek_attempt"]
    return {
        "prompt": _user(row["question"]),
        "completion": _assistant(f"<|im_start|>think\n{thoughts}\n<|im_start|>answer\n{answer}"),
    }


def alpaca_eval(row: Row) -> Row:
    """Instructions and the answers of the reference model."""
    return {"prompt": _user(row["instruction"]), "completion": _assistant(row["output"])}


def wildbench(row: Row) -> Row:
    """Conversations that end with a user turn, and GPT-4's answer. HALOs reads only the first turn."""
    return {"prompt": _plain(row["conversation_input"]), "completion": _assistant(row["references"]["gpt-4"])}


def conversations(row: Row) -> Row:
    """Two conversations that include the prompt, with scores or ratings if there are any."""
    chosen, rejected = _plain(row["chosen"]), _plain(row["rejected"])
    prompt = _common_prompt(chosen, rejected)
    scores = [row.get(f"score_{side}", row.get(f"rating_{side}")) for side in ("chosen", "rejected")]
    return _pair(chosen[:prompt], chosen[prompt:], rejected[prompt:], *scores)


def with_text_prompt(row: Row) -> Row:
    """As `conversations`; if those contain only answers, the prompt is the text of the column `prompt`."""
    if row["chosen"][0]["role"] == "assistant":
        row = {**row, **{side: [*_user(row["prompt"]), *row[side]] for side in ("chosen", "rejected")}}
    return conversations(row)


def labelled(row: Row) -> Row:
    """TRL's own rows of `prompt`, `completion` and `label`."""
    return {"prompt": _plain(row["prompt"]), "completion": _plain(row["completion"]), "label": row["label"]}


def nectar(row: Row) -> Row:
    """A dialogue and seven ranked answers; the first one is paired with each of the others."""
    prompt = [turn for turn in dialogue(row["prompt"]) if turn["content"]]  # ends with an empty turn of the assistant
    best, *others = sorted(row["answers"], key=lambda answer: answer["rank"])
    return {
        "prompt": prompt,
        "chosen": _assistant(best["answer"]),
        "rejected": [_assistant(other["answer"]) for other in others],
    }


_TURN_OF = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def helpsteer(row: Row) -> Row:
    """A response with the score `helpfulness` (0 to 4). The prompt separates earlier turns by `<extra_id_1>`."""
    first, *parts = _TURN_OF.split(row["prompt"])
    later = zip(parts[::2], parts[1::2], strict=True)
    prompt = _user(first) + [{"role": speaker.lower(), "content": text} for speaker, text in later]
    return {"prompt": prompt, "completion": _assistant(row["response"]), "score": float(row["helpfulness"])}


# -- the table -------------------------------------------------------------------------------------------------------

_SAME = {"train": "train", "test": "test"}
_HH, _ARMORM = "Anthropic/hh-rlhf", "ultrafeedback-armorm"

NAMED: dict[str, Named] = {
    # HALOs' names
    "shp": Named("stanfordnlp/SHP", _SAME | {"validation": "validation"}, shp),
    "hh": Named(_HH, _SAME, _each(hh)),
    "hh_helpful": Named(_HH, _SAME, _each(hh), data_dir="helpful-base"),
    "hh_harmless": Named(_HH, _SAME, _each(hh), data_dir="harmless-base"),
    "oasst": Named("OpenAssistant/oasst1", {"train": "train", "test": "validation"}, oasst),
    "ultrabin": Named(
        "HuggingFaceH4/ultrafeedback_binarized",
        {"train": "train_prefs", "test": "test_prefs"},
        _each(ultrafeedback),
    ),
    "ultrafeedback_armorm": Named(f"princeton-nlp/llama3-{_ARMORM}", _SAME, _each(ultrafeedback_armorm)),
    "ultrafeedback_armorm_gemma": Named(f"princeton-nlp/gemma2-{_ARMORM}", _SAME, _each(ultrafeedback_armorm)),
    "ultrachat": Named("HuggingFaceH4/ultrachat_200k", {"train": "train_sft", "test": "test_sft"}, _each(ultrachat)),
    "safe_rlhf": Named("PKU-Alignment/PKU-SafeRLHF-single-dimension", _SAME, _each(safe_rlhf)),
    "s1k_11": Named("simplescaling/s1K-1.1", {"train": "train"}, _each(s1k)),
    "alpacaeval": Named("tatsu-lab/alpaca_eval", {"test": "eval"}, _each(alpaca_eval)),
    "wildbench": Named("allenai/WildBench", {"test": "test"}, _each(wildbench), config="v2"),
    # often used with TRL
    "trl_ultrafeedback": Named("trl-lib/ultrafeedback_binarized", _SAME, _each(conversations)),
    "kto_mix": Named("trl-lib/kto-mix-14k", _SAME, _each(labelled)),
    "capybara": Named("argilla/distilabel-capybara-dpo-7k-binarized", {"train": "train"}, _each(with_text_prompt)),
    "nectar": Named("berkeley-nest/Nectar", {"train": "train"}, _each(nectar)),
    "helpsteer": Named("nvidia/HelpSteer2", {"train": "train", "test": "validation"}, _each(helpsteer)),
}
"""Every dataset by its name."""

__all__ = ["NAMED", "Named", "load_named", "named", "named_items"]
