"""`load_feedback`: from feedback files to a dataset."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from datasets.utils import tqdm

from ..labelling import PairMode
from .files import open_file, read_items
from .formats import Completion, Judged, Text, is_list_of_completions, known_types, split_of
from .plan import PURPOSES, Plan, Purpose, Rules, check_rules, plan_rows
from .prompts import Duplicates, FeedbackIndex, index_feedback
from .selection import Selection, check_selection, select_rows

CONTROL_TOKENS = ("<|good|>", "<|bad|>")
"""HALOs' control tokens for conditional SFT: before desirable and undesirable completions."""

_BATCH = 1000  # rows
_LAYOUT = 1  # version of the row format; part of the name of the cached dataset


def load_feedback(
    path_or_paths: str | Path | Sequence[str | Path],
    for_: Purpose = "paired",
    split: str | None = None,
    *,
    pair_mode: PairMode = "max",
    pair_threshold: float | str = 0.0,
    label_threshold: float | str = "median",
    max_per_prompt: int | None = None,
    frac_unique_desirable: float | None = None,
    frac_unique_undesirable: float | None = None,
    seed: int = 0,
    duplicates: Duplicates = "error",
    control_tokens: tuple[str, str] = CONTROL_TOKENS,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Load rows for a trainer from feedback files: HALOs' formats or TRL's rows, as a JSON array or JSON Lines.

    Items with equal prompts (roles and contents) are merged over all files. Prompts keep the order in which they first
    appear. `for_` determines the rows:

    - "paired": `prompt`, `chosen`, `rejected`. The pairs in the files, and pairs by score of the other completions.
    - "unpaired": `prompt`, `completion`, `label`. Labelled completions, both sides of each pair, and labels by score.
    - "group": `prompt` with the lists `completions` and `scores`. Without scores, labels and pairs count as +1 and -1.
      Also `token_ids` and `logprobs` if the files contain the output of `halos-trl sample --logprobs`: a list for each
      completion (None if it has none).
    - "sft": `prompt`, `completion`. The first desirable completion, else the one with the best score, else the one
      that is preferred most often; all samples if none is judged.
    - "csft": as "unpaired", with a control token before each completion and without `label`.

    Every row has `sample_ids` (None if the file has none) and `sources` ("file#item", items counted from 0), one for
    each completion. If the files have scores, pairs also have `score_chosen` and `score_rejected`, and labelled rows
    have `score`.

    `split`: use only items with this `split` and those without one. `pair_mode`, `pair_threshold` and
    `label_threshold` are those of `halos_trl.data.labelling`, for completions that have only scores. `max_per_prompt`:
    maximum number of rows per prompt (of completions per group), sampled with `seed`. `frac_unique_desirable` and
    `frac_unique_undesirable`: keep this fraction of the distinct completions with that label, each once.
    `duplicates`: treatment of items that equal another one in all fields: "error", "drop" or "keep".
    `control_tokens`: texts to put before desirable and undesirable completions. `cache_dir`: where `datasets` stores
    the memory-mapped rows (default: its own cache).

    Raises ValueError, naming file and item, for invalid input before any row is created.
    """
    paths = [path_or_paths] if isinstance(path_or_paths, str | Path) else list(path_or_paths)
    _check_arguments(paths, for_, duplicates)
    selection = Selection(max_per_prompt, frac_unique_desirable, frac_unique_undesirable, seed)
    check_selection(selection, for_)
    rules = Rules(pair_mode, pair_threshold, label_threshold, seed)
    check_rules(rules)
    index = index_feedback(paths, split, duplicates)
    plan = plan_rows(index, for_, rules)
    plan = select_rows(plan, index, selection, for_)
    features = _features(index, plan, for_)
    tokens = control_tokens if for_ == "csft" else None
    name = f"{_fingerprint(index, plan, features, tokens)}.arrow"
    path = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "halos_trl" / name
    if not path.exists():
        _write(path, _rows(index, plan, tuple(features), tokens), len(plan), features)
    return Dataset.from_file(str(path))


def is_feedback_file(path: str | Path) -> bool:
    """Whether a file needs `load_feedback` instead of `datasets.load_dataset`: its first item is in one of HALOs'
    formats or has a list of rejected completions.
    """
    if Path(path).suffix not in (".json", ".jsonl") or not Path(path).is_file():
        return False
    try:
        value = next(read_items(path)).value
    except ValueError:
        return False
    # Also for an unknown `type` with HALOs' other keys, for which `load_feedback` raises a helpful error.
    is_halos = value.get("type") in known_types() or ("type" in value and bool({"output", "output_A"} & value.keys()))
    return is_halos or ({"prompt", "chosen"} <= value.keys() and is_list_of_completions(value.get("rejected")))


def feedback_splits(path: str | Path) -> set[str]:
    """The values of `split` in a feedback file."""
    return {split for item in read_items(path) if (split := split_of(item.value)) is not None}


def _check_arguments(paths: list[Any], for_: Any, duplicates: Any) -> None:
    if not paths:
        raise ValueError("No feedback file was passed. Pass a path, or a list of paths.")
    for path in paths:
        if not isinstance(path, str | Path):
            raise TypeError(
                f"{path!r} is of type {type(path).__name__}; expected a path. Pass a path or a list of them."
            )
    if for_ not in PURPOSES:
        raise ValueError(f"`for_` is {for_!r}; expected one of {', '.join(map(repr, PURPOSES))}.")
    if duplicates not in ("error", "drop", "keep"):
        raise ValueError(f"`duplicates` is {duplicates!r}; expected 'error', 'drop' or 'keep'.")


# -- the rows --------------------------------------------------------------------------------------------------------


def _features(index: FeedbackIndex, plan: Plan, for_: Purpose) -> Features:
    text: Any = Value("string")
    if index.is_chat:
        text = List({key: Value("string") for key in _ordered(index.turn_keys)})
    score, texts = Value("float64"), List(Value("string"))
    own: dict[str, Any] = {
        "paired": {"chosen": text, "rejected": text},
        "unpaired": {"completion": text, "label": Value("bool")},
        "group": {"completions": List(text), "scores": List(score)},
        "sft": {"completion": text},
        "csft": {"completion": text},
    }[for_]
    scores = {"paired": ("score_chosen", "score_rejected"), "unpaired": ("score",)}.get(for_, ())
    if plan.has_scores:
        own |= dict.fromkeys(scores, score)
    if for_ == "group" and index.is_sampled:
        own |= {"token_ids": List(List(Value("int64"))), "logprobs": List(List(score))}
    return Features({"prompt": text, **own, "sample_ids": texts, "sources": texts})


def _ordered(turn_keys: set[str]) -> list[str]:
    return ["role", "content", *sorted(turn_keys - {"role", "content"})]


def _rows(
    index: FeedbackIndex, plan: Plan, columns: tuple[str, ...], control_tokens: tuple[str, str] | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a plan, reading their texts from the files."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_file(path)) for path in index.files]
        for row in range(len(plan)):
            numbers, scores = zip(*plan.completions(row), strict=True)
            items = [index.completion_item[number] for number in numbers]
            read = {item: index.formats[index.item_file[item]].read(index.value(files, item)) for item in set(items)}
            found = [
                read[item].completions[index.completion_slot[number]]
                for item, number in zip(items, numbers, strict=True)
            ]
            values = _values(read[items[0]], found, scores, plan.label[row])
            values["sources"] = [index.where(item) for item in items]
            if control_tokens is not None:
                token = control_tokens[0 if plan.label[row] else 1]
                values["completion"] = _with_control_token(values["completion"], token)
            yield {column: _with_keys(values[column], index.turn_keys) for column in columns}


def _values(first: Judged, found: list[Completion], scores: Sequence[float], label: int) -> dict[str, Any]:
    known = [None if score != score else score for score in scores]
    texts = [completion.text for completion in found]
    return {
        "prompt": first.prompt,
        "chosen": texts[0],
        "rejected": texts[-1],
        "completion": texts[0],
        "completions": texts,
        "label": bool(label),
        "score": known[0],
        "score_chosen": known[0],
        "score_rejected": known[-1],
        "scores": known,
        "token_ids": [None if completion.sampled is None else completion.sampled[0] for completion in found],
        "logprobs": [None if completion.sampled is None else completion.sampled[1] for completion in found],
        "sample_ids": [completion.sample_id for completion in found],
    }


def _write(path: Path, rows: Iterator[dict[str, Any]], count: int, features: Features) -> None:
    """Write rows to an Arrow file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / "rows"
        writer = ArrowWriter(features=features, path=str(part))
        with tqdm(total=count, unit=" rows", desc="Writing rows") as bar:
            while batch := list(itertools.islice(rows, _BATCH)):
                writer.write_table(pa.Table.from_pylist(batch, schema=features.arrow_schema))
                bar.update(len(batch))
        writer.finalize()
        part.replace(path)


def _with_control_token(completion: Text, token: str) -> Text:
    """The completion with the token before the content of its last turn, as in HALOs."""
    if isinstance(completion, str):
        return token + completion
    *before, last = completion
    return [*before, {**last, "content": token + (last["content"] or "")}]


def _with_keys(value: Any, keys: set[str]) -> Any:
    """Turns with all keys that occur in any row, as a dataset's columns need them; missing values are None."""
    if len(keys) <= 2 or not isinstance(value, list):
        return value
    if all(isinstance(part, dict) for part in value):
        return [{key: turn.get(key) for key in keys} for turn in value]
    return [_with_keys(part, keys) for part in value]


def _fingerprint(index: FeedbackIndex, plan: Plan, features: Features, control_tokens: tuple[str, str] | None) -> str:
    """Fingerprint of the rows; `datasets` loads rows with a known fingerprint from its cache."""
    seen = hashlib.blake2b(digest_size=16)
    seen.update(json.dumps([_LAYOUT, index.files, str(features), control_tokens]).encode())
    places = (index.item_digest, index.item_file, index.item_index)  # the last two determine `sources`
    for column in (*places, plan.label, plan.first, plan.completion, plan.score):
        seen.update(column.tobytes())
    return seen.hexdigest()


__all__ = ["CONTROL_TOKENS", "feedback_splits", "is_feedback_file", "load_feedback"]
