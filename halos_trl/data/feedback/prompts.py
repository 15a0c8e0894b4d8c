"""The feedback on each prompt, merged over items and files.

Only positions, hashes, scores and labels are kept in memory, a few dozen bytes per completion; texts remain in the
files. The first pass over the files checks every item, so that no rows are created from invalid files.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from datasets.utils import tqdm

from .files import Item, Object, item_at, open_file, read_items
from .formats import Format, Judged, Text, format_of, judged, split_of

logger = logging.getLogger(__name__)

Duplicates = Literal["error", "drop", "keep"]


class Entry(NamedTuple):
    """A completion of a prompt, with its scores and labels."""

    completion: int
    """Number of the completion in the `FeedbackIndex`."""
    score: float | None
    label: bool | None
    alone: bool
    """Whether an item judges the completion individually and not only in a pair."""


class Prompt(NamedTuple):
    """A prompt with all of its completions and pairs."""

    entries: tuple[Entry, ...]
    pairs: tuple[tuple[int, int], ...]
    """Positions in `entries`, the preferred one first."""


class FeedbackIndex:
    """An index of the items of several files by prompt, built by `index_feedback`."""

    def __init__(self, files: Sequence[str]):
        self.files = tuple(files)
        self.formats: list[Format] = []
        self.dropped: list[int] = []
        self.ties = 0
        self.turn_keys: set[str] = set()
        self.is_sampled = False
        """Whether any completion has token ids and log-probs of the sampling model."""
        self.is_chat: bool | None = None
        self.skipped_splits: set[str] = set()
        # By item.
        self.item_file, self.item_index = array("l"), array("q")
        self.item_offset, self.item_size = array("q"), array("q")
        self.item_prompt, self.item_digest = array("q"), array("q")
        self.item_completions, self.item_pairs = array("q"), array("q")  # start of the item's own
        self.item_has_pairs = array("b")
        # By completion: its item, position in the item, hash of its text, score (NaN: none), label (-1: none).
        self.completion_item, self.completion_slot = array("q"), array("b")
        self.completion_digest = array("q")
        self.score, self.label = array("d"), array("b")
        # By pair: numbers of completions.
        self.better, self.worse = array("q"), array("q")
        self._prompts: dict[bytes, int] = {}

    # -- building, in one pass -----------------------------------------------------------------------------------

    def add(self, file: int, item: Item, found: Judged) -> None:
        """Add a parsed item."""
        number = len(self.item_file)
        key = _digest(found.prompt, 16)
        digests = [_number(completion.text) for completion in found.completions]
        self.item_file.append(file)
        self.item_index.append(item.index)
        self.item_offset.append(item.offset)
        self.item_size.append(item.size)
        self.item_prompt.append(self._prompts.setdefault(key, len(self._prompts)))
        self.item_digest.append(_number(repr((key, digests, found.pairs, [c[1:] for c in found.completions]))))
        self.item_completions.append(len(self.completion_item))
        self.item_pairs.append(len(self.better))
        self.item_has_pairs.append(bool(found.pairs or found.ties))
        self.is_sampled |= any(completion.sampled is not None for completion in found.completions)
        first = len(self.completion_item)
        for slot, (completion, digest) in enumerate(zip(found.completions, digests, strict=True)):
            self.completion_item.append(number)
            self.completion_slot.append(slot)
            self.completion_digest.append(digest)
            self.score.append(math.nan if completion.score is None else completion.score)
            self.label.append(-1 if completion.label is None else completion.label)
        for better, worse in found.pairs:
            self.better.append(first + better)
            self.worse.append(first + worse)
        self.ties += found.ties

    # -- reading by prompt ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.item_file)

    def where(self, item: int) -> str:
        """File and number of an item, as used in errors and rows."""
        return f"{self.files[self.item_file[item]]}#{self.item_index[item]}"

    def kept(self) -> np.ndarray:
        """The numbers of the items that were not dropped as duplicates."""
        return np.delete(np.arange(len(self)), self.dropped)

    def item(self, files: Sequence[IO[bytes]], item: int) -> tuple[Item, Format, Judged]:
        """Read an item from the opened `files` again, and return it with its format and parsed content."""
        form, value = self.formats[self.item_file[item]], self.value(files, item)
        name, position = self.files[self.item_file[item]], self.item_index[item]
        found = Item(value, name, position, 0, self.item_offset[item], self.item_size[item])
        return found, form, form.read(value)

    def value(self, files: Sequence[IO[bytes]], item: int) -> Object:
        """Read an item from the opened `files` again."""
        return item_at(files[self.item_file[item]], self.item_offset[item], self.item_size[item])

    def prompts(self) -> Iterator[Prompt]:
        """Every prompt, in the order of first appearance.

        Equal completions of a prompt are merged if they are in pairs or in files of different formats. Within files of
        one format they are kept separate, because a model may generate the same text twice.
        """
        items = self.kept()
        of_prompt = np.asarray(self.item_prompt)[items]
        items = items[np.argsort(of_prompt, kind="stable")]
        bounds = np.flatnonzero(np.diff(np.sort(of_prompt))) + 1
        start = 0
        for end in (*bounds.tolist(), len(items)):
            yield self._merged(items[start:end].tolist())
            start = end

    def _completions_of(self, item: int) -> range:
        starts = self.item_completions
        return range(starts[item], starts[item + 1] if item + 1 < len(starts) else len(self.completion_item))

    def _pairs_of(self, item: int) -> list[tuple[int, int]]:
        starts = self.item_pairs
        of_item = slice(starts[item], starts[item + 1] if item + 1 < len(starts) else None)
        return list(zip(self.better[of_item], self.worse[of_item], strict=True))

    def _merged(self, items: list[int]) -> Prompt:
        entries: list[Entry] = []
        judged_by: list[set[str]] = []  # for each entry, the formats of the items that judge it individually
        equal: dict[int, list[int]] = {}  # positions of the entries with the same text
        position: dict[int, int] = {}
        # Individual completions come first, so that those in pairs can be merged with them.
        for item in sorted(items, key=lambda item: self.item_has_pairs[item]):
            form = self.formats[self.item_file[item]].name
            for number in self._completions_of(item):
                entry = self._entry(number)
                known = equal.setdefault(self.completion_digest[number], [])
                at = next((i for i in known if not entry.alone or form not in judged_by[i]), None)
                if at is None:
                    at = len(entries)
                    known.append(at)
                    entries.append(entry)
                    judged_by.append(set())
                if entry.alone:
                    judged_by[at].add(form)
                entries[at] = _joined(entries[at], entry)
                position[number] = at
        found = [(position[a], position[b]) for item in items for a, b in self._pairs_of(item)]
        return Prompt(tuple(entries), tuple(found))

    def _entry(self, number: int) -> Entry:
        score, label = self.score[number], self.label[number]
        alone = not self.item_has_pairs[self.completion_item[number]]
        return Entry(number, None if score != score else score, None if label < 0 else bool(label), alone)


def _joined(entry: Entry, other: Entry) -> Entry:
    """Merge the values that two items have for a completion; those of the first take precedence."""
    return entry._replace(
        score=other.score if entry.score is None else entry.score,
        label=other.label if entry.label is None else entry.label,
    )


def index_feedback(
    paths: Sequence[str | Path], split: str | None = None, duplicates: Duplicates = "error"
) -> FeedbackIndex:
    """Read feedback files and check each item.

    `split`: use only items with this `split` and those without one. `duplicates`: treatment of items that equal an
    earlier one in all fields: "error", "drop" or "keep".

    Raises ValueError, naming file and item, for invalid input.
    """
    index = FeedbackIndex([str(path) for path in paths])
    sizes = [_size(path) for path in paths]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="Reading feedback") as bar:
        for number, path in enumerate(paths):
            done = 0
            for item, form, found in _checked_items(path):
                if not done:
                    index.formats.append(form)
                bar.update(item.offset + item.size - done)
                done = item.offset + item.size
                _check_schema(index, item, found)
                own = split_of(item.value)
                if split is not None and own is not None and own != split:
                    index.skipped_splits.add(own)
                    continue
                index.add(number, item, found)
    if not len(index):
        raise ValueError(
            f"No item of {', '.join(index.files)} has split {split!r}; the splits are {sorted(index.skipped_splits)}. "
            "Pass one of them, or None for all items."
        )
    if duplicates != "keep":
        _drop_duplicates(index, duplicates == "error")
    return index


def _size(path: str | Path) -> int:
    with open_file(path) as file:
        return file.seek(0, 2)


def _checked_items(path: str | Path) -> Iterator[tuple[Item, Format, Judged]]:
    """The items of a file. Raises ValueError unless all have the same format, and all or none have scores."""
    form: Format | None = None
    first_scored: bool | None = None
    for item in read_items(path):
        found_form = format_of(item)
        if form is None:
            form = found_form
        elif found_form.name != form.name:
            raise ValueError(
                f"{item.where} has format {found_form.name!r}, but the items before it have format {form.name!r}. "
                "Split the file into one per format, and pass them together."
            )
        found = judged(item, form)
        scored = [completion.score is not None for completion in found.completions]
        first_scored = scored[0] if first_scored is None else first_scored
        if any(one != first_scored for one in scored):
            keys = " and ".join(f"`{key}`" for key in form.scores)
            raise ValueError(
                f"{item.where} {'lacks' if first_scored else 'has'} {keys}, but the items before it "
                f"{'have' if first_scored else 'lack'} it. Score all items of a file or none."
            )
        yield item, form, found


def _check_schema(index: FeedbackIndex, item: Item, found: Judged) -> None:
    """Raise ValueError if some prompts are text and others are conversations."""
    is_chat = not isinstance(found.prompt, str)
    if index.is_chat is None:
        index.is_chat = is_chat
    if is_chat != index.is_chat:
        forms = ("text", "a conversation")
        raise ValueError(
            f"{item.where} has {forms[is_chat]} as prompt, but the items before it have {forms[index.is_chat]}. Load "
            "them separately, or convert all prompts to one format."
        )
    if is_chat:
        for text in (found.prompt, *(completion.text for completion in found.completions)):
            for turn in text:
                index.turn_keys.update(turn)  # type: ignore[arg-type]


def _drop_duplicates(index: FeedbackIndex, is_error: bool) -> None:
    digests = np.asarray(index.item_digest)
    order = np.argsort(digests, kind="stable")
    repeats = np.flatnonzero(np.diff(digests[order]) == 0)  # equal neighbours, the earlier item first
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_file(path)) for path in index.files] if len(repeats) else []
        for first, second in zip(order[repeats].tolist(), order[repeats + 1].tolist(), strict=True):
            if index.value(files, first) != index.value(files, second):
                continue
            if is_error:
                raise ValueError(
                    f"{index.where(second)} repeats {index.where(first)} in all fields. If a file was passed or "
                    "written twice, pass `duplicates='drop'` (`--dataset_duplicates drop`, for `halos-trl convert` "
                    "`--duplicates drop`) to load such items once. If a model generated the same completion several "
                    "times and the items have no `sample_id`, pass `'keep'`."
                )
            index.dropped.append(second)
    if index.dropped:
        logger.warning(f"Dropped {len(index.dropped)} of {len(index)} items that repeat an earlier one in all fields.")


def _digest(text: Text, size: int) -> bytes:
    """Hash of a text, or of the roles, contents and other set fields of a conversation."""
    if not isinstance(text, str):
        text = "".join(map(_turn, text))
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def _turn(turn: dict[str, Any]) -> str:
    """A turn as text. Fields are preceded by their lengths, so that different turns have different texts."""
    fields = sorted(key for key in turn if turn[key] is not None)
    return "".join([f"{len(fields)}:", *(f"{key}:{len(turn[key])}:{turn[key]}" for key in fields)])


def _number(text: Text) -> int:
    return int.from_bytes(_digest(text, 8), "little", signed=True)


__all__ = ["Duplicates", "Entry", "FeedbackIndex", "Prompt", "index_feedback"]
