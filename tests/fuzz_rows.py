"""Changes of the fuzz suite to rows, columns and datasets."""

from __future__ import annotations

import copy
import math
import random
import re
from typing import Any

import datasets
import numpy as np
import pandas
import torch
from fuzz_cases import Case, Change, assistant, user

LONG = "ab" * 400
LONE_SURROGATE = "a\ud800b"

NOT_TEXT = (None, 5, 1.5, True, math.nan, {}, {"role": "user", "content": "a"}, b"ab", np.float32(1), np.arange(3))
BAD_TEXT = (*NOT_TEXT, [], ["ab"], [5], [None], [["ab"]], [{}], [user("ab")], (), "")
TEXTS = (
    " ",
    "\n",
    "a",
    "\x00",
    LONE_SURROGATE,
    "\u202eab\u202c",
    "👩‍👩‍👧 ab",
    "e\u0301\u2028b",
    "<|end|>",
    "ab<|end|>",
    "<|pad|>a",
    "<|user|>ab<|assistant|>",
    LONG,
    "{{ 1 / 0 }}",
    "ab\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
)
"""Unusual texts."""


def message(role: Any = "user", content: Any = "ab", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
BAD_MESSAGES = (
    [{"content": "ab"}],
    [{"role": "user"}],
    [message(role=None)],
    [message(role=5)],
    [message(role="narrator")],
    [message(role="")],
    [message(content=None)],
    [message(content=5)],
    [message(content=["ab"])],
    [message(content={"text": "ab"})],
    [message(content=[{"type": "text"}])],
    [message(content=[{"type": "image"}])],
    [message(content=[{"type": "audio", "audio": "a.wav"}])],
    [message(), None],
    [message(), "ab"],
    [message(), 5],
    [message(), [message()]],
    [message("assistant", None, tool_calls="add")],
    [message("assistant", None, tool_calls=[5])],
    [message("assistant", "", tool_calls=[CALL])],
    [message("assistant", "ab", tool_calls=None)],
    [message("tool", "3", name="add")],
    [{"from": "human", "value": "ab"}],
)
ODD_MESSAGES = (
    [message(content="")],
    [message("system", "be kind"), message()],
    [message(), message()],
    [message("assistant", "ab")],
    [message(), message("assistant", "a"), message()],
    [message(content=[{"type": "text", "text": "ab"}])],
    [message(name="Bo")],
    [message(extra={"deep": [1, {"x": None}]})],
)


def values(rng: random.Random, case: Case) -> Change:
    """Another value in one column of one row, or of all."""
    column = rng.choice(sorted(case.rows[0]))
    value, trains = VALUE_MAKERS.get(column, _text_value)(rng, case, column)
    whole = rng.random() < 0.25
    indices = range(len(case.rows)) if whole else [rng.choice([0, len(case.rows) // 2, len(case.rows) - 1])]

    def apply(case: Case) -> None:
        for i in indices:
            case.rows[i][column] = copy.deepcopy(value)

    where = "every row" if whole else f"row {indices[0]}"
    names = tuple(rf"[Rr]ow {i}\b.*the (train|eval) dataset" for i in indices)
    if case.kind == "scored":
        names += (r"do not stream",)  # rows that fit into no map-style dataset
    if isinstance(value, bytes):  # then pyarrow makes bytes of the others
        names += (r"[Rr]ow \d+\b.*the train dataset",)
    if whole:  # a column of a wrong type may be refused as one, and rows of one prompt may be too few
        names += (rf"`{column}`.*the train dataset|the train dataset.*`{column}`", r"row of the train dataset")
    return Change(f"`{column}` of {where} = {shown(value)}", apply, names, learns=False, trains=trains)


def _text_value(rng: random.Random, case: Case, column: str) -> tuple[Any, bool]:
    pool = rng.choice(["wrong", "messages", "odd", "text"])
    if pool == "wrong":
        return rng.choice(BAD_TEXT), False
    if pool == "messages":
        return rng.choice(BAD_MESSAGES), True
    if pool == "odd":
        return rng.choice(ODD_MESSAGES), True
    text = rng.choice(TEXTS)
    conversational = not isinstance(case.rows[0][column], str)
    if not conversational:
        return text, True
    return (user(text) if column == "prompt" else assistant(text)), True


def _list_value(rng: random.Random, case: Case, column: str) -> tuple[Any, bool]:
    one, two = case.rows[0][column]
    wrong = (None, 5, "ab", {}, [], [one], [one, two, one], [one, None], [[], two], [one, 5], ["", two], [[one], two])
    mixed = ([one, "ab"], ["ab", two], [one, assistant("ab")], {"0": one, "1": two})
    return rng.choice(wrong + mixed), False


def _label_value(rng: random.Random, case: Case, column: str) -> tuple[Any, bool]:
    value = rng.choice([None, 2, -1, 0.5, "true", "yes", [], [True], {}, math.nan, 1, 0, np.bool_(True), 1.0])
    return value, value == "true" or (
        isinstance(value, int | float | np.bool_) and value in (0, 1)
    )  # as pyarrow reads it


def _score_value(rng: random.Random, case: Case, column: str) -> tuple[Any, bool]:
    good = (3, -1e3, np.float32(0.5), np.int64(2), 1e30, -1e300, 1e-300)
    bad = (None, "abc", [1.0], {}, math.nan, math.inf, -math.inf, True, 1j)
    value = rng.choice(good + bad)
    return value, any(value is each for each in good)


def _scores_value(rng: random.Random, case: Case, column: str) -> tuple[Any, bool]:
    bad = (None, 5.0, "ab", [], [1.0], [1.0, 0.0, 0.5], [1.0, None], ["1", "0"], [math.nan, 0.0], [[1.0], [0.0]], {})
    good = ([1, 0], [1e30, -1e30], [0.5, 0.5], [1e-300, 0.0])
    value = rng.choice(bad + good)
    return value, value in good


VALUE_MAKERS = {
    "completions": _list_value,
    "label": _label_value,
    "score": _score_value,
    "scores": _scores_value,
}


def shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 80 else f"{text[:60]}... ({len(text)} characters)"


# -- columns -------------------------------------------------------------------------------------------------------

OWN_NAMES = (
    "KL_completion_ids",
    "group",
    "advantage",
    "ref_chosen_logps",
    "ref_logps",
    "ref_KL_logps",
    "prompt_ids",
    "completion_ids",
    "chosen_ids",
    "input_ids",
    "labels",
    "image",
    "images",
    "margin",
    "prompt_id",
    "tools",
    "chat_template_kwargs",
    "label",
    "score",
    "scores",
    "completion",
    "completions",
    "chosen",
    "messages",
    "text",
    "length",
    "__index_level_0__",
    "",
    "ünï côdé",
)
"""Names of extra columns: those that TRL and this package use themselves, and strange ones."""

EXTRA_VALUES = (None, 5, "ab", [], [1, 2], {}, {"a": None}, True, math.nan, "{", "[]", ["ab"], [None], 0.5)


def columns(rng: random.Random, case: Case) -> Change:
    """A missing column, an additional column, another name, rows with other keys."""
    mine = sorted(case.rows[0])
    what = rng.choice(["missing", "missing everywhere", "renamed", "extra", "extra", "extra", "extra in one row"])
    column = rng.choice(mine)
    extra, value = rng.choice(OWN_NAMES), rng.choice(EXTRA_VALUES)
    row = rng.randrange(len(case.rows))

    def apply(case: Case) -> None:
        if what == "missing":
            case.rows[row].pop(column, None)
        elif what == "missing everywhere":
            for each in case.rows:
                each.pop(column, None)
        elif what == "renamed":
            case.rows = [{(k.title() if k == column else k): v for k, v in each.items()} for each in case.rows]
        elif what == "extra":
            case.rows = [{**each, extra: value} for each in case.rows]
        else:
            case.rows[row][extra] = value

    named = extra if what.startswith("extra") else column
    text = f"column {named!r} {what}" + (f" = {shown(value)}" if what.startswith("extra") else "")
    more = ("has images",) if extra in ("image", "images") else ()
    changed = r"\d+" if what == "extra" else str(row)
    names = (rf"['`\"](?i:{re.escape(named)})['`\"]", rf"[Rr]ow {changed}\b.*dataset", *more)
    return Change(text, apply, names, learns=False)


# -- datasets ------------------------------------------------------------------------------------------------------


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    """A `datasets.Dataset`, or a stream of rows that fit into none."""
    for options in ({}, {"on_mixed_types": "use_json"}):
        try:
            return datasets.Dataset.from_list(rows, **options)
        except Exception:  # whatever pyarrow says
            continue
    return stream(rows)


def stream(rows: list[dict[str, Any]]) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows)))


class TorchRows(torch.utils.data.Dataset):
    """Rows in a map-style dataset of torch's."""

    def __init__(self, rows: list):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


CONTAINERS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "dict of columns": lambda rows: {column: [row.get(column) for row in rows] for column in rows[0]},
    "DataFrame": pandas.DataFrame,
    "torch dataset": TorchRows,
    "DatasetDict": lambda rows: datasets.DatasetDict(train=as_dataset(rows)),
    "dict of datasets": lambda rows: {"train": as_dataset(rows)},
    "a string": lambda rows: "trl-lib/nothing",
    "None": lambda rows: None,
    "a number": lambda rows: 5,
    "empty list": lambda rows: [],
    "no rows, no columns": lambda rows: datasets.Dataset.from_list([]),
    "no rows": lambda rows: as_dataset(rows).select(range(0)),
    "empty stream": lambda rows: stream([]),
    "one row": lambda rows: as_dataset(rows).select([0]),
    "stream": stream,
    "stream of a dataset": lambda rows: as_dataset(rows).to_iterable_dataset(num_shards=2),
    "shuffled stream": lambda rows: stream(rows).shuffle(seed=1, buffer_size=3),
    "stream in torch format": lambda rows: as_dataset(rows).to_iterable_dataset().with_format("torch"),
    "torch format": lambda rows: as_dataset(rows).with_format("torch"),
    "numpy format": lambda rows: as_dataset(rows).with_format("numpy"),
    "pandas format": lambda rows: as_dataset(rows).with_format("pandas"),
    "arrow format": lambda rows: as_dataset(rows).with_format("arrow"),
    "some columns formatted": lambda rows: as_dataset(rows).with_format("numpy", columns=sorted(rows[0])[:1]),
    "transform": lambda rows: as_dataset(rows).with_transform(lambda batch: batch),
    "transform that drops": lambda rows: as_dataset(rows).with_transform(lambda batch: {}),
    "shuffled": lambda rows: as_dataset(rows).shuffle(seed=1),
    "selected": lambda rows: as_dataset(rows).select([3, 0, 2] if len(rows) > 3 else [1, 0]),
    "joined": lambda rows: datasets.concatenate_datasets([as_dataset(rows), as_dataset(rows)]),
    "interleaved streams": lambda rows: datasets.interleave_datasets([stream(rows), stream(rows)]),
    "rows that are no dicts": lambda rows: [5, 6],
    "the class itself": lambda rows: datasets.Dataset,
}
NEVER = ("a string", "None", "a number", "empty list", "no rows, no columns", "no rows", "empty stream")


def containers(rng: random.Random, case: Case) -> Change:
    """The rows in something other than a `datasets.Dataset`."""
    name = rng.choice(sorted(CONTAINERS))

    def apply(case: Case) -> None:
        case.dataset = CONTAINERS[name]
        case.leaves_rows_out = name in ("one row", "selected")

    names = ("`train_dataset", "train dataset")
    return Change(f"dataset: {name}", apply, names, learns=False, trains=name not in NEVER, hosts_speak=True)
