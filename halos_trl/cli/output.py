"""The output file of a command: JSON Lines that are appended incrementally, so that an interrupted run can be resumed.

    with OutputFile("samples.jsonl", {"model": model, "seed": seed}, overwrite=False) as output:
        for item in itertools.islice(all_items, output.count, None):  # the first `count` are in the file already
            output.write(item)

`.samples.jsonl.settings.yaml` next to `samples.jsonl` stores the settings of the run and whether the file is finished.
Leaving the `with` block without an exception finishes the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from filelock import FileLock, Timeout


class OutputFile:
    """A JSON Lines file that is written once, by one process at a time, in one or more runs with the same settings.

    Parameters:
        path: The file. Its folder is created if necessary.
        settings: Everything that the content depends on, as JSON values by name, including a `fingerprint` of the
            inputs. Omit settings that do not affect the content, such as a batch size.
        overwrite: Start over, replacing an existing file.
        reopen: Also continue a finished file with the same settings.

    Attributes:
        count: Number of items in the file, including those of earlier runs.
        resumed: Whether an earlier run started the file.

    Raises ValueError if the path is a folder, or if the file exists and is finished (without `reopen`), was not
    written by this class, was started with other settings (each is named), or is being written by another process.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False, reopen: bool = False
    ):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(dict(settings)))
        self._reopen = reopen
        if self.path.is_dir():
            raise ValueError(f"`{self.path}` is a folder. Pass a file in it.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"`{self.path}` is being written by another process. Wait for it, or choose another output."
            ) from None
        try:
            if not overwrite:
                self._check()
            self.resumed = self.path.exists() and not overwrite
            self.count = _cut_to_whole_lines(self.path) if self.resumed else 0
            self._save(finished=False)
            self._file = self.path.open("ab" if self.resumed else "wb")
        except BaseException:
            self._unlock()
            raise

    def _check(self) -> None:
        begun = _read_settings(self.path)
        if begun is None:
            if self.path.exists():
                raise ValueError(
                    f"`{self.path}` exists, but `{_settings_path(self.path).name}` next to it does not, so the run "
                    "cannot be resumed. Choose another output, or pass `--overwrite` to replace it."
                )
            return
        if not self.path.exists() or (self.path.stat().st_size == 0 and not begun["finished"]):
            return
        if begun["finished"] and not self._reopen:
            raise ValueError(
                f"`{self.path}` exists and is finished. Choose another output, or pass `--overwrite` to replace it."
            )
        differing = differences(begun["settings"], self.settings)
        if differing:
            raise ValueError(
                f"`{self.path}` was started with other settings: {'; '.join(differing)}. Use the original settings, "
                "choose another output, or pass `--overwrite` to start over."
            )

    def write(self, *items: Mapping[str, Any]) -> None:
        """Append items, one per line, and flush them to the file."""
        # Lone surrogates, which a judge's reply may contain, are escaped.
        texts = (json.dumps(item, ensure_ascii=False) for item in items)
        self._file.write(b"".join(text.encode(errors="backslashreplace") + b"\n" for text in texts))
        self._file.flush()
        self.count += len(items)

    def items(self) -> Iterator[dict[str, Any]]:
        """The items of the file, in order. Raises a ValueError that gives the line of an item that is not a JSON
        object.
        """
        return read_items(self.path)

    def _save(self, *, finished: bool) -> None:
        target = _settings_path(self.path)
        partial = target.with_name(f"{target.name}.partial")
        partial.write_text(
            yaml.safe_dump({"finished": finished, "settings": self.settings}, sort_keys=False, allow_unicode=True),
            "utf-8",
        )
        partial.replace(target)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._save(finished=True)
        self._unlock()

    def _unlock(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def begun_with(path: str | Path) -> dict[str, Any] | None:
    """The settings that a file was started with; None if it was not written by `OutputFile`."""
    begun = _read_settings(Path(path))
    return None if begun is None else begun["settings"]


def is_finished(path: str | Path) -> bool:
    """Whether the file was finished by `OutputFile`."""
    begun = _read_settings(Path(path))
    return Path(path).exists() and begun is not None and begun["finished"]


def read_items(path: str | Path) -> Iterator[dict[str, Any]]:
    """The items of a JSON Lines file. Raises a ValueError that gives the line of an item that is not a JSON object."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                item = json.loads(line)
            except ValueError as error:
                raise ValueError(f"`{path}`, line {number}: not JSON ({error}).") from None
            if not isinstance(item, dict):
                raise ValueError(f"`{path}`, line {number}: contains a {type(item).__name__}, not an object.")
            yield item


def fingerprint(items: Iterable[Any]) -> str:
    """A hash (16 hexadecimal digits) of JSON values."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Descriptions of the differences between two sets of settings."""
    absent = "(none)"
    names = [*before, *(name for name in after if name not in before)]
    pairs = [(name, before.get(name, absent), after.get(name, absent)) for name in names]
    return [f"`{name}` was {old!r} and is {new!r}" for name, old, new in pairs if old != new]


def _settings_path(path: Path) -> Path:
    # Hidden, because `datasets` reads all other files of a folder as data.
    return path.with_name(f".{path.name}.settings.yaml")


def _read_settings(path: Path) -> dict[str, Any] | None:
    file = _settings_path(path)
    if not file.exists():
        return None
    try:
        begun = yaml.safe_load(file.read_text("utf-8"))
        return {"finished": bool(begun["finished"]), "settings": dict(begun["settings"])}
    except (UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{file}` cannot be read. Remove it and `{path}`, or pass `--overwrite`.") from error


def _cut_to_whole_lines(path: Path) -> int:
    """Remove an incomplete last line, and return the number of complete lines."""
    count = end = 0
    with path.open("r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                count += 1
                end += len(line)
        file.truncate(end)
    return count


__all__ = ["OutputFile", "begun_with", "differences", "fingerprint", "is_finished", "read_items"]
