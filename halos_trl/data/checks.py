"""Checks of raw datasets before tokenization: their type, columns and rows, for all methods.

Every error names the dataset, the row and the remedy. The checks of a single row are in `row_checks`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, Json, Value

from .row_checks import TEMPLATE_COLUMNS, OneForm, Row, RowCheck, paired_check, unpaired_check

logger = get_logger(__name__)

Rows: TypeAlias = Dataset | IterableDataset

SOURCES = "sources"
"""The column in which `load_feedback` records the file and item that each completion of a row comes from."""

_DROP = "Or set `drop_invalid_rows=True` to drop and count such rows."


def check_unpaired_rows(dataset: Rows, name: str, *, drop_invalid: bool = False) -> Rows:
    """Check the rows of a dataset for KTO-like methods, and return the dataset to use.

    Rows have either `prompt`, `completion` and `label` (booleans, or the integers 0 and 1, which are converted), or
    they are pairs (`chosen`, `rejected`, optionally `prompt`), which TRL unpairs. Raises ValueError for anything but a
    dataset, for missing columns, and for the first row that fails `row_checks`; with `drop_invalid`, such rows are
    dropped and counted in a warning. Streamed rows are checked as they are read.
    """
    dataset = plain_rows(dataset, name)
    columns = columns_of(dataset, name)
    if {"chosen", "rejected"} <= columns:
        dataset = check_paired_rows(dataset, name, drop_invalid=drop_invalid)
        # TRL would use these columns instead of those that it derives from the pairs.
        return drop_columns(dataset, columns & {"completion", "label"}, name, "Rows with `chosen` and `rejected`")
    wanted = ("prompt", "completion", "label")
    require_columns(columns, name, wanted, "or paired rows with `chosen` and `rejected` (and `prompt`)")
    dataset = check_each(dataset, name, wanted, OneForm(unpaired_check), drop_invalid)
    return with_boolean_labels(without_missing_kwargs(dataset, columns))


def check_paired_rows(dataset: Rows, name: str, *, drop_invalid: bool = False, splits_implicit: bool = True) -> Rows:
    """Check rows of `chosen` and `rejected` for DPO-like methods, and return the dataset to use.

    As `check_unpaired_rows`. `splits_implicit`: without a column `prompt`, the method uses the common beginning of
    both sides as the prompt.
    """
    dataset = plain_rows(dataset, name)
    columns = columns_of(dataset, name)
    require_columns(
        columns, name, ("chosen", "rejected"), "with `prompt`, or with the prompt as their common beginning"
    )
    wanted = tuple(column for column in ("prompt", "chosen", "rejected") if column in columns)
    equal = _EqualPairs(dataset, name)
    check = OneForm(paired_check(columns, splits_implicit=splits_implicit))
    dataset = check_each(dataset, name, wanted, check, drop_invalid, equal.look_at)
    equal.report()
    return without_missing_kwargs(dataset, columns)


class _EqualPairs:
    """Counts pairs with equal sides, and warns about them."""

    text = "equal `chosen` and `rejected`. They are kept, but express no preference."

    def __init__(self, dataset: Rows, name: str):
        self.rows = len(dataset) if isinstance(dataset, Dataset) else None
        self.name = name
        self.found: list[int] = []

    def look_at(self, row: Row, i: int) -> None:
        if row["chosen"] != row["rejected"]:
            return
        self.found.append(i)
        if self.rows is None and _is_power_of_two(len(self.found)):
            logger.warning(f"{len(self.found)} rows of the streamed {self.name} dataset so far have {self.text}")

    def report(self) -> None:
        if self.rows is not None and self.found:
            logger.warning(
                f"{len(self.found)} of {self.rows} rows of the {self.name} dataset (the first is row {self.found[0]}) "
                f"have {self.text}"
            )


def _is_power_of_two(count: int) -> bool:
    """Whether to warn at this count of a stream, which has no end at which to report the total: 1, 2, 4, 8, ..."""
    return count & (count - 1) == 0


# -- the dataset as a whole ----------------------------------------------------------------------------------------


def plain_rows(dataset: Any, name: str) -> Rows:
    """The dataset with rows of plain Python values, regardless of its format.

    Raises ValueError for anything but a `datasets.Dataset` or `IterableDataset`, with the call that converts it, and
    for a dataset with a transform.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"The {name} dataset is of type {type(dataset).__module__}.{type(dataset).__name__}; expected a "
            f"`datasets.Dataset` or a `datasets.IterableDataset`. {_conversion(dataset, name)}"
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        if {"image", "images"} & set(dataset.column_names):
            return dataset  # images are often loaded by a transform
        raise ValueError(
            f"The {name} dataset has a transform (`set_transform` or `with_transform`), which tokenization would "
            "discard. Apply it with `dataset.map(function)` instead."
        )
    return dataset.with_format(None)


def plain_splits(dataset: Any, name: str) -> Any:
    """`plain_rows` of what a trainer accepts as a dataset, including None, and a dict of datasets for evaluation."""
    if dataset is None:
        return None
    if isinstance(dataset, dict) and name != "train":
        return type(dataset)({key: plain_rows(part, str(key)) for key, part in dataset.items()})
    return plain_rows(dataset, name)


def _conversion(dataset: Any, name: str) -> str:
    if isinstance(dataset, Mapping):
        key = next(iter(dataset), "train")
        return f"It contains {sorted(map(str, dataset))}: pass one of them, e.g. `data[{key!r}]`."
    if isinstance(dataset, str):
        return f"Load it: `datasets.load_dataset({dataset!r}, split={name!r})`."
    makers = {"DataFrame": "from_pandas", "Table": "from_list", "list": "from_list", "tuple": "from_list"}
    maker = makers.get(type(dataset).__name__)
    if type(dataset).__module__.startswith("polars"):
        maker = "from_polars"
    if maker:
        return f"Convert it: `datasets.Dataset.{maker}(rows)`."
    return "Convert it, e.g. with `datasets.Dataset.from_list` or `datasets.IterableDataset.from_generator`."


def columns_of(dataset: Rows, name: str) -> set[str]:
    """The columns of a dataset, or of the first row of a stream. Raises ValueError for an empty dataset."""
    if isinstance(dataset, Dataset):
        columns = set(dataset.column_names) if len(dataset) else set()
    else:
        columns = set(next(iter(dataset), ()))
    if not columns:
        raise ValueError(f"The {name} dataset is empty. Pass at least one row.")
    return columns


def drop_columns(dataset: Rows, columns: set[str], name: str, whose: str) -> Rows:
    """The dataset without columns whose names have another meaning, with a warning that names them."""
    if not columns:
        return dataset
    logger.warning(f"{whose} of the {name} dataset have the columns {sorted(columns)}, which are ignored.")
    return dataset.remove_columns(sorted(columns))


def require_columns(columns: set[str], name: str, wanted: tuple[str, ...], alternative: str) -> None:
    """Raise ValueError for missing columns, suggesting a trainer for the rows, or a column with a similar name."""
    missing = [column for column in wanted if column not in columns]
    if not missing:
        return
    remedy = _fitting_trainer(columns) or _renames(missing, sorted(columns - set(wanted)))
    raise ValueError(
        f"The {name} dataset has columns {sorted(columns)}; missing: {missing}. Expected {list(wanted)}, "
        f"{alternative}. {remedy}"
    )


def _renames(missing: list[str], others: list[str]) -> str:
    hints = [
        f"`dataset.rename_column({close[0]!r}, {column!r})`"
        for column in missing
        if (close := difflib.get_close_matches(column, others, n=1, cutoff=0.6))
    ]
    return f"Did you mean {' and '.join(hints)}?" if hints else "Rename or add the columns."


_FITTING = (
    (
        {"prompt", "completions", "scores"},
        "Use `GRPOTrainer` or `PPOTrainer` for lists of `completions` and `scores`.",
    ),
    (
        {"prompt", "completion", "score"},
        "Use `GRPOTrainer` or `PPOTrainer` for scored rows, or convert the scores to labels for `KTOTrainer`, e.g. "
        "`dataset.map(lambda row: {'label': row['score'] > 0})`.",
    ),
    ({"prompt", "completion", "label"}, "Use `KTOTrainer`, `GRPOTrainer` or `PPOTrainer` for labelled rows."),
    (
        {"prompt", "completion"},
        "Use `trl.SFTTrainer`, or `PPOTrainer` with a `reward_model`, for completions without feedback; for the other "
        "methods, add a `label` or a `score`.",
    ),
    ({"messages"}, "Use `trl.SFTTrainer` for `messages` without feedback."),
    ({"conversations"}, "`dataset.map(trl.maybe_convert_to_chatml)` converts `from` and `value` to messages."),
    ({"text"}, "Use `trl.SFTTrainer` for `text` without feedback."),
)


def _fitting_trainer(columns: set[str]) -> str:
    return next((advice for fits, advice in _FITTING if fits <= columns), "")


# -- each row ------------------------------------------------------------------------------------------------------


def check_each(
    dataset: Rows,
    name: str,
    columns: Iterable[str],
    check: RowCheck,
    drop_invalid: bool,
    look_at: Callable[[Row, int], None] = lambda row, i: None,
) -> Rows:
    """The dataset without the rows that fail `check`, or a ValueError that names the first of them.

    Reads `columns` and those passed to the chat template. `look_at` is called once per valid row, with its index.
    """
    if not isinstance(dataset, Dataset):
        return _check_stream(dataset, name, check, drop_invalid, look_at)
    problems: list[tuple[int, str, str]] = []
    for i, row in enumerate(_rows(dataset, (*columns, *TEMPLATE_COLUMNS, SOURCES))):
        problem = check(row)
        if problem is None:
            look_at(row, i)
        elif drop_invalid:
            problems.append((i, source_of(row), problem))
        else:
            raise ValueError(f"{_of_row(i, name, row, problem)} {_DROP}")
    return _without(dataset, name, problems) if problems else dataset


def _rows(dataset: Dataset, columns: Iterable[str]) -> Iterator[Row]:
    present = [column for column in columns if column in dataset.column_names]  # reading images would decode them
    for batch in dataset.select_columns(present).with_format(None).iter(batch_size=1000):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _without(dataset: Dataset, name: str, problems: list[tuple[int, str, str]]) -> Dataset:
    first, source, problem = problems[0]
    if len(problems) == len(dataset):
        raise ValueError(
            f"All rows of the {name} dataset are invalid. Row {first} of the {name} dataset{source} {problem}"
        )
    logger.warning(
        f"Dropped {len(problems)} of {len(dataset)} rows of the {name} dataset. The first, row {first}{source}, "
        f"{problem}"
    )
    dropped = {i for i, *_ in problems}
    return dataset.select([i for i in range(len(dataset)) if i not in dropped])


def _check_stream(
    dataset: IterableDataset, name: str, check: RowCheck, drop_invalid: bool, look_at: Callable[[Row, int], None]
) -> IterableDataset:
    seen = -1  # streams are read several times: trainers read the first row, and each epoch reads all rows
    dropped = 0

    def is_good(row: Row, i: int) -> bool:
        nonlocal seen, dropped
        is_new, seen = i > seen, max(i, seen)
        problem = check(row)
        if problem is None:
            if is_new:
                look_at(row, i)
            return True
        if not drop_invalid:
            raise ValueError(f"{_of_row(i, name, row, problem)} {_DROP}")
        dropped += is_new
        if is_new and _is_power_of_two(dropped):
            logger.warning(
                f"Dropped {dropped} rows of the streamed {name} dataset so far. The last, row {i}{source_of(row)}, "
                f"{problem}"
            )
        return False

    checked = dataset.filter(is_good, with_indices=True)
    if drop_invalid and next(iter(checked), None) is None:
        raise ValueError(f"All rows of the streamed {name} dataset are invalid. See the warnings for the reasons.")
    return checked


def _of_row(i: int, name: str, row: Row, problem: str) -> str:
    return f"Row {i} of the {name} dataset{source_of(row)} {problem}"


def source_of(row: Row) -> str:
    """The origin of a row loaded by `load_feedback`, in parentheses; empty for other rows."""
    sources = row.get(SOURCES)
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        return ""
    return f" ({', '.join(dict.fromkeys(sources))})"


# -- normalized values ---------------------------------------------------------------------------------------------


def with_boolean_labels(dataset: Rows) -> Rows:
    """Convert labels 0 and 1 to booleans; others are unchanged."""
    if dataset.features is not None and dataset.features.get("label") == Value("bool"):
        return dataset
    return _with_column(dataset, "label", Value("bool"), bool)


def without_missing_kwargs(dataset: Rows, columns: set[str]) -> Rows:
    """Remove from `chat_template_kwargs` the None values with which `datasets` fills columns of dicts.

    A template can distinguish a variable that is None from one that is undefined.
    """
    if "chat_template_kwargs" not in columns:
        return dataset
    return _with_column(dataset, "chat_template_kwargs", Json(), own_kwargs)


def own_kwargs(kwargs: Row | None) -> Row:
    """The variables of the chat template that a row sets."""
    return {key: value for key, value in (kwargs or {}).items() if value is not None}


def _with_column(dataset: Rows, column: str, feature: Any, convert: Callable[[Any], Any]) -> Rows:
    features = dataset.features
    return dataset.map(
        lambda row: {column: convert(row[column])},
        features=None if features is None else Features({**features, column: feature}),
    )


__all__ = [
    "Row",
    "Rows",
    "check_each",
    "check_paired_rows",
    "check_unpaired_rows",
    "columns_of",
    "drop_columns",
    "own_kwargs",
    "plain_rows",
    "plain_splits",
    "require_columns",
    "with_boolean_labels",
    "without_missing_kwargs",
]
