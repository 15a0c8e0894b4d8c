"""The data of a training script: Hub datasets, local files and folders, mixtures, and their splits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from .. import model_card
from ..data.feedback import feedback_splits, is_feedback_file, load_feedback
from ..data.feedback.plan import Purpose
from ..data.feedback.prompts import Duplicates
from ..data.named import NAMED, load_named

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def load_data(
    script_args: ScriptArguments,
    mixture: DatasetMixtureConfig,
    for_: Purpose | None = None,
    *,
    evaluates: bool = False,
) -> datasets.DatasetDict:
    """Load the splits of a Hub dataset, a dataset of `halos_trl.data.named`, a local file, a folder of files, a
    `save_to_disk` folder, or a TRL mixture.

    `for_` is the purpose of the rows that are built from a file in one of HALOs' formats, which is recognized by its
    content, also in a mixture; None leaves such a file unchanged. `evaluates`: also read its test split.
    """
    if mixture.datasets:
        duplicates: Duplicates = getattr(script_args, "dataset_duplicates", "error")
        parts = [part if for_ is None else _part_of_rows(part, for_, duplicates) for part in mixture.datasets]
        return get_dataset(dataclasses.replace(mixture, datasets=parts))
    name, streaming = str(script_args.dataset_name), script_args.dataset_streaming
    path = Path(name)
    _check_local(path, name, script_args)
    if for_ is not None:
        found = _own_rows(path, script_args, for_, evaluates)
        if found is not None:
            return found
    try:
        if path.is_file():
            return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), streaming=streaming)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _from_disk(name, streaming)
        return datasets.load_dataset(name, name=script_args.dataset_config, streaming=streaming)
    except (DatasetsError, OSError) as error:
        if isinstance(error, ConnectionError):  # cannot be fixed with other flags
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"`--dataset_name {name}` cannot be loaded: {reason}") from error


def _part_of_rows(part: Any, for_: Purpose, duplicates: Duplicates) -> Any:
    """A part of a mixture (TRL's `DatasetConfig`), in which files in HALOs' formats are replaced by their rows."""
    named = part.data_files.get(part.split, []) if isinstance(part.data_files, dict) else part.data_files
    files = [named] if isinstance(named, str) else list(named or [part.path])
    feedback = [name for name in files if is_feedback_file(name)]
    if not feedback:
        return part
    if len(feedback) < len(files):
        others = ", ".join(sorted(set(files) - set(feedback)))
        raise ValueError(
            f"A part of the `datasets` mixture has {feedback[0]}, which is in one of HALOs' formats, together with "
            f"{others}. List them as separate parts."
        )
    rows = load_feedback(files, for_, part.split, duplicates=duplicates)
    cached = [file["filename"] for file in rows.cache_files]
    return dataclasses.replace(part, path="arrow", name=None, data_dir=None, data_files=cached, split="train")


def _own_rows(path: Path, script_args: ScriptArguments, for_: Purpose, evaluates: bool) -> Any:
    """The splits of data that `datasets` cannot read as rows: HALOs' files and named datasets."""
    _refuse_folder_of_feedback(path, str(path))
    if is_feedback_file(path):
        return _feedback(script_args, for_, evaluates)
    if not path.exists() and str(script_args.dataset_name) in NAMED:
        return _named(script_args, for_, evaluates)
    return None


def _check_local(path: Path, name: str, script_args: ScriptArguments) -> None:
    if path.exists() and script_args.dataset_config:
        raise ValueError(
            f"`--dataset_config` selects a configuration of a Hub dataset, but `{name}` is local. Leave it out."
        )
    if not path.exists() and is_path(name):
        raise ValueError(f"`--dataset_name {name}` is a local path, but there is no such file or folder.")
    if path.is_file() and path.suffix not in _READERS:
        raise ValueError(f"`--dataset_name {name}` has the suffix {path.suffix!r}; supported are {sorted(_READERS)}.")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"`--dataset_name {name}` is an empty file.")


def _refuse_folder_of_feedback(path: Path, name: str) -> None:
    feedback = next(filter(is_feedback_file, sorted(path.iterdir())), None) if path.is_dir() else None
    if feedback:
        raise ValueError(
            f"`--dataset_name {name}` is a folder, and {feedback.name} in it is in one of HALOs' formats. Pass the "
            "file itself, or convert the files to rows with `halos-trl convert`."
        )


def _feedback(script_args: ScriptArguments, for_: Purpose, evaluates: bool) -> Any:
    """The splits of a file of feedback. As in HALOs, items without `split` belong to every split of the file."""
    name, test = str(script_args.dataset_name), script_args.dataset_test_split
    splits = [script_args.dataset_train_split]
    if evaluates and test in feedback_splits(name):
        splits.append(test)
    duplicates: Duplicates = getattr(script_args, "dataset_duplicates", "error")
    data = datasets.DatasetDict({split: load_feedback(name, for_, split, duplicates=duplicates) for split in splits})
    return _streamed(data) if script_args.dataset_streaming else data


def _named(script_args: ScriptArguments, for_: Purpose, evaluates: bool) -> Any:
    """The splits of a named dataset."""
    name = str(script_args.dataset_name)
    if script_args.dataset_config:
        raise ValueError(
            f"`--dataset_config` selects a configuration of a Hub dataset, but {name!r} stands for "
            f"{NAMED[name].hub_id} with a fixed configuration. Leave it out, or pass the Hub id."
        )
    splits = [script_args.dataset_train_split]
    if evaluates and script_args.dataset_test_split in NAMED[name].splits:
        splits.append(script_args.dataset_test_split)
    data = datasets.DatasetDict({split: load_named(name, for_, split) for split in splits})
    return _streamed(data) if script_args.dataset_streaming else data


def _from_disk(folder: str, streaming: bool) -> Any:
    saved = datasets.load_from_disk(folder)
    splits = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict({"train": saved})
    return _streamed(splits) if streaming else splits


def _streamed(splits: datasets.DatasetDict) -> datasets.IterableDatasetDict:
    return datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})


def check_splits(script_args: ScriptArguments, training_args: Any, data: Any) -> None:
    """Raise ValueError if the data lack a split that the flags name."""
    wanted = {"dataset_train_split": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        wanted["dataset_test_split"] = script_args.dataset_test_split
    for flag, split in wanted.items():
        if split not in data:
            remedy = (
                ", or use `--eval_strategy no`. A single file has one split, `train`; to use two, put a `train` and a "
                "`test` file into a folder and pass the folder."
                if flag == "dataset_test_split"
                else "."
            )
            raise ValueError(
                f"The dataset has splits {sorted(data)}, not {split!r}. Choose one with `--{flag}`{remedy}"
            )


def dataset_names(script_args: ScriptArguments, mixture: DatasetMixtureConfig) -> list[str]:
    """Dataset names for the model card. If the `path` of a mixture is a reader ("json"), these are its files."""
    if not mixture.datasets:
        return [str(script_args.dataset_name)]
    names: list[str] = []
    for part in mixture.datasets:
        files = part.data_files if part.path in _READERS.values() else None
        values = list(files.values()) if isinstance(files, dict) else files if isinstance(files, list) else [files]
        names += [str(value) for value in values] if files else [part.path]
    return names


def eval_split(script_args: ScriptArguments, training_args: Any, data: Any) -> Any:
    """The evaluation split; None if evaluation is off."""
    return data[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None


def is_path(name: str) -> bool:
    """Whether a name can only be a local path."""
    return not model_card.is_repo_id(name) or Path(name).suffix in _READERS
