"""`halos-trl convert`: convert between HALOs' feedback files, rows for trainers, and Parquet."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.parquet as pq
from datasets.utils import tqdm

from ..data.feedback import load_feedback
from ..data.feedback.files import read_items
from ..data.feedback.formats import format_of
from ..data.feedback.halos_items import PURPOSES_OF, halos_items
from ..data.feedback.plan import PURPOSES
from ..data.feedback.prompts import index_feedback
from ..data.row_values import SAMPLER_COLUMNS
from .arguments import read_arguments

_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass
class ConvertArguments:
    """Convert between HALOs' feedback files, rows for trainers and Parquet.

    The output format is determined by its suffix: `.json` (one array), `.jsonl` (JSON Lines) or `.parquet`.
    """

    input: list[str] = field(
        default_factory=list,
        metadata={"help": "Files of feedback or of rows: JSON, JSON Lines or Parquet. Several are merged by prompt."},
    )
    output: str | None = field(default=None, metadata={"help": "File to write: `.json`, `.jsonl` or `.parquet`."})
    format: Literal["trl", "halos"] = field(
        default="trl", metadata={"help": "trl: rows for trainers. halos: items of HALOs' files (JSON only)."}
    )
    for_: str | None = field(
        default=None,
        metadata={
            "help": (
                f"Purpose of the rows: {', '.join(PURPOSES)}. None: determined by the input (pairs, labels, groups "
                "for scores, sft for samples)."
            )
        },
    )
    split: str | None = field(
        default=None, metadata={"help": "Use only items of this split, and items without a split."}
    )
    pair_mode: Literal["random", "max", "min"] = field(
        default="max", metadata={"help": "How scores are turned into pairs."}
    )
    pair_threshold: float = field(
        default=0.0, metadata={"help": "Minimum difference of scores (exclusive) for a pair."}
    )
    label_threshold: str = field(
        default="median", metadata={"help": "Minimum score of a desirable completion: `mean`, `median`, or a number."}
    )
    seed: int = field(default=0, metadata={"help": "Random seed for `pair_mode`."})
    duplicates: Literal["error", "drop", "keep"] = field(
        default="error", metadata={"help": "What to do with exact duplicates of an item."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing output."})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    arguments = read_arguments(ConvertArguments, argv, "convert")
    print(convert(arguments), file=sys.stderr)


def convert(arguments: ConvertArguments) -> str:
    """Write the output atomically, and return a message about what was done.

    Raises ValueError for arguments that cannot work, an output that exists, and what `load_feedback` raises.
    """
    output = _checked_output(arguments)
    with tempfile.TemporaryDirectory() as folder:
        inputs = [_as_json(Path(name), Path(folder)) for name in arguments.input]
        copied = {str(path): name for path, name in zip(inputs, arguments.input, strict=True) if str(path) != name}
        try:
            if arguments.format == "halos":
                count = _write_items(_halos(inputs, arguments), output)
            else:
                count = _write_rows(_rows(inputs, arguments), output, copied)
        except ValueError as error:
            raise ValueError(_with_names(str(error), copied)) from error
        unit = "items" if arguments.format == "halos" else "rows"
        return f"Wrote {count} {unit} to {output}.{_not_kept(inputs, arguments)}"


def _with_names(text: str, copied: dict[str, str]) -> str:
    """Replace temporary file names in a text by those that the user passed."""
    for copy, name in copied.items():
        text = text.replace(copy, name)
    return text


def _checked_output(arguments: ConvertArguments) -> Path:
    if not arguments.input or arguments.output is None:
        raise ValueError("Pass the files to read as `--input` and the file to write as `--output`.")
    output = Path(arguments.output)
    for path in (*map(Path, arguments.input), output):
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"`{path}` has the suffix {path.suffix!r}; supported are {', '.join(_SUFFIXES)}.")
    if any(Path(name).resolve() == output.resolve() for name in arguments.input):
        raise ValueError(f"`--output {output}` is one of the inputs. Choose another file.")
    if output.exists() and not arguments.overwrite:
        raise ValueError(f"`--output {output}` exists. Pass `--overwrite` to replace it, or choose another file.")
    if arguments.format == "halos" and output.suffix == ".parquet":
        raise ValueError("HALOs reads JSON, not Parquet. Write a `.json` file, or rows with `--format trl`.")
    if arguments.format == "halos" and arguments.for_ is not None:
        raise ValueError(
            "`--for_` applies to `--format trl`; items of HALOs' files keep their type. Leave it out, or convert to "
            "rows first and convert those to HALOs' format."
        )
    _refuse_without_effect(arguments)
    return output


def _refuse_without_effect(arguments: ConvertArguments) -> None:
    """Refuse flags for deriving pairs or labels from scores when nothing is derived."""
    if arguments.format != "halos":
        return
    defaults = ConvertArguments()
    for name in ("pair_mode", "pair_threshold", "label_threshold", "seed"):
        if getattr(arguments, name) != getattr(defaults, name):
            raise ValueError(
                f"`--{name} {getattr(arguments, name)}` has no effect with `--format halos`, which keeps the scores, "
                "labels and pairs of the input. Leave it out, or create rows first (`--format trl --for_ paired` or "
                "`unpaired`) and convert those."
            )


def _as_json(path: Path, folder: Path) -> Path:
    """The file itself, or for Parquet, a copy as JSON Lines."""
    if path.suffix != ".parquet":
        return path
    copy = folder / f"{len(list(folder.iterdir()))}-{path.stem}.jsonl"
    try:
        parquet = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    rows = (row for batch in parquet.iter_batches(batch_size=1000) for row in batch.to_pylist())
    with copy.open("w", encoding="utf-8") as file:
        file.writelines(_line(row, f"{path}, row {number}") + "\n" for number, row in enumerate(rows))
    return copy


def _line(row: dict[str, Any], where: str) -> str:
    """A row as JSON. In columns that no format uses, other types are written as text, since only the column names are
    used.
    """
    others = {key: value if key in _READ else str(value) for key, value in row.items() if value is not None}
    try:
        return json.dumps(others, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}. Convert the column first.") from None


def _set_only(row: dict[str, Any]) -> dict[str, Any]:
    """The row without null columns, which a table cannot omit."""
    return {key: value for key, value in row.items() if value is not None}


# -- what is written -------------------------------------------------------------------------------------------------


def _purpose(inputs: list[Path], arguments: ConvertArguments) -> str:
    """The purpose of the rows."""
    return arguments.for_ or PURPOSES_OF[format_of(next(read_items(inputs[0]))).name]


def _rows(inputs: list[Path], arguments: ConvertArguments) -> datasets.Dataset:
    return load_feedback(
        inputs,
        _purpose(inputs, arguments),  # type: ignore[arg-type]
        arguments.split,
        pair_mode=arguments.pair_mode,
        pair_threshold=arguments.pair_threshold,
        label_threshold=arguments.label_threshold,
        seed=arguments.seed,
        duplicates=arguments.duplicates,
    )


def _halos(inputs: list[Path], arguments: ConvertArguments) -> Iterator[dict[str, Any]]:
    index = index_feedback(inputs, arguments.split, arguments.duplicates)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in inputs]
        for number in index.kept().tolist():
            item, form, found = index.item(files, number)
            yield from halos_items(item, form, found, index.item_prompt[number])


def _write_items(items: Iterable[dict[str, Any]], output: Path) -> int:
    count = 0
    with _replacing(output) as part, part.open("w", encoding="utf-8") as file:
        as_array = output.suffix == ".json"
        for count, item in enumerate(tqdm(items, desc="Writing items", unit=" items"), start=1):
            text = json.dumps(item, ensure_ascii=False, indent=2 if as_array else None)
            file.write((("[\n" if count == 1 else ",\n") + text) if as_array else text + "\n")
        file.write("\n]\n" if as_array else "")
    return count


def _write_rows(rows: datasets.Dataset, output: Path, copied: dict[str, str]) -> int:
    if copied:
        rows = rows.map(lambda row: {"sources": [_with_names(source, copied) for source in row["sources"]]})
    if output.suffix != ".parquet":
        return _write_items(map(_set_only, rows), output)
    with _replacing(output) as part:
        rows.to_parquet(str(part))
    return len(rows)


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as folder:
        part = Path(folder) / output.name
        yield part
        part.replace(output)


_READ = {
    *("type", "prompt", "instruction", "output", "output_A", "output_B", "label", "reward", "reward_A", "reward_B"),
    *("reward_difference", "prompt_id", "sample_id", "sample_id_A", "sample_id_B", "sample_ids", "sources", "split"),
    *("chosen", "rejected", "completion", "completions", "score", "scores", "score_chosen", "score_rejected"),
    *("dataset", "generator", *SAMPLER_COLUMNS),
}


def _not_kept(inputs: list[Path], arguments: ConvertArguments) -> str:
    """A message about keys of the input's first items that are not in the output."""
    firsts = set(itertools.chain.from_iterable(next(read_items(path)).value for path in inputs))
    others = sorted(firsts - _READ)
    keeps_sampler = arguments.format == "halos" or _purpose(inputs, arguments) == "group"
    if not (keeps_sampler and "logprobs" in firsts):
        others += sorted(firsts & set(SAMPLER_COLUMNS))
    return f" Dropped keys: {', '.join(f'`{key}`' for key in others)}." if others else ""


__all__ = ["ConvertArguments", "convert", "main"]
