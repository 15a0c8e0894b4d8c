"""Reading JSON objects one at a time from a JSON array, as written by HALOs, or from JSON Lines.

Files are not kept in memory. Each item is parsed and returned with its position, from which it can be read again.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Object = dict[str, Any]

_CHUNK = 1 << 16  # bytes
_SPACE = " \t\r\n"
_LONGEST_TOKEN = 16  # characters; tokens outside of strings that a chunk may split: `-Infinity`, a pair of \u escapes
_decoder = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Item:
    """One object of a file, and its position."""

    value: Object
    file: str
    index: int
    """Index of the item in the file, from 0."""
    line: int
    """Line number of the item's start, from 1; 0 if unknown."""
    offset: int
    """Byte position of the item in the file."""
    size: int
    """Length of the item in bytes."""

    @property
    def where(self) -> str:
        """The item's file and index, for error messages."""
        line = f" (line {self.line})" if self.line else ""
        return f"{self.file}, item {self.index}{line}"


def read_items(path: str | Path) -> Iterator[Item]:
    """The objects of a JSON array or of JSON Lines, in order. The first character of the file determines the format.

    Raises ValueError, naming file and item, for a file that is unreadable, empty or not UTF-8, and for JSON that is
    invalid, truncated, or contains anything other than objects.
    """
    name = str(path)
    with open_file(path) as file:
        text = _Text(file, name)
        first = text.skip_space()
        if not first:
            raise ValueError(f"{name} is empty. Pass a file with at least one item.")
        if first not in "[{":
            raise ValueError(
                f"{name} begins with {first!r}. Expected a JSON array, which begins with '[', or JSON Lines, one "
                "object on each line."
            )
        items = _array(text, name) if first == "[" else _lines(text, name)
        item = None
        for item in items:
            yield item
        if item is None:
            raise ValueError(f"{name} is an array without items. Pass a file with at least one item.")


def open_file(path: str | Path) -> IO[bytes]:
    """Open a file for reading bytes. Raises ValueError if there is no such file."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror}. Check the path.") from error


def item_at(file: IO[bytes], offset: int, size: int) -> Object:
    """The item of an open file at a position returned by `read_items`."""
    file.seek(offset)
    return json.loads(file.read(size))


# -- the two layouts -------------------------------------------------------------------------------------------------


def _array(text: _Text, name: str) -> Iterator[Item]:
    text.take("[")
    index = 0
    is_open = text.skip_space() != "]"
    while is_open:
        yield _object(text, name, index)
        behind = text.skip_space()
        if behind not in ("]", ","):
            raise _fault(text, name, index, "',' or ']' is missing after it")
        is_open = behind == ","
        if is_open:
            text.take(",")
        index += 1
    text.take("]")
    if text.skip_space():
        raise ValueError(
            f"{name} continues after the end of its array, in line {text.line}. If several files were concatenated, "
            "pass them separately, or write one object on each line."
        )


def _lines(text: _Text, name: str) -> Iterator[Item]:
    index = 0
    while text.skip_space():
        line = text.line
        yield _object(text, name, index)
        if text.skip_space() and text.line == line:
            raise _fault(text, name, index, "more text follows on its line")
        index += 1


def _object(text: _Text, name: str, index: int) -> Item:
    first, line, offset = text.skip_space(), text.line, text.offset
    if first != "{":
        if not first:
            raise _fault(text, name, index, None)
        raise ValueError(
            f"{name}, item {index} (line {line}) begins with {first!r}; expected an object: "
            "{'prompt': ..., ...}. Fix the item or remove it."
        )
    try:
        value = text.take_object()
    except json.JSONDecodeError as error:
        at_end = text.at_end and (error.msg.startswith("Unterminated") or error.pos >= len(text.buffer.rstrip()))
        raise _fault(text, name, index, None if at_end else f"{error.msg} (line {text.line_of(error.pos)})") from None
    except RecursionError:
        raise _fault(text, name, index, "it is nested too deeply") from None
    except ValueError as error:  # a number with more digits than Python parses
        raise _fault(text, name, index, str(error)) from None
    return Item(value, name, index, line, offset, text.offset - offset)


def _fault(text: _Text, name: str, index: int, problem: str | None) -> ValueError:
    if problem is None or not text.skip_space():
        return ValueError(
            f"{name} is truncated: it ends in or before item {index} (line {text.line}), perhaps because the process "
            f"that wrote it was killed. Write it again, or remove everything after item {index - 1} (and close an "
            "array with ']')."
            if index
            else f"{name} is truncated: it ends in its first item. Write it again."
        )
    return ValueError(f"{name}, item {index} (line {text.line}) is invalid JSON: {problem}. Fix the item.")


class _Text:
    """The text of a file, of which only the part being read is kept in memory."""

    def __init__(self, file: IO[bytes], name: str):
        self.file, self.name = file, name
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.buffer, self.at = "", 0
        self.offset = 0  # bytes of the file before `at`
        self.line = 1
        self.at_end = False
        if file.read(3) == codecs.BOM_UTF8:
            self.offset = 3
        else:
            file.seek(0)

    def fill(self, size: int = _CHUNK) -> bool:
        """Drop consumed text and read more of the file. Returns whether there was more."""
        if self.at_end:
            return False
        data = self.file.read(size)
        self.at_end = not data
        try:
            more = self.decoder.decode(data, final=self.at_end)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.name} is not valid UTF-8 ({error.reason} near line {self.line}). Convert it to UTF-8."
            ) from None
        if more:
            self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(data)

    def take(self, what: str | int) -> None:
        """Consume a text, or a number of characters."""
        end = self.at + (what if isinstance(what, int) else len(what))
        taken = self.buffer[self.at : end]
        self.offset += len(taken) if taken.isascii() else len(taken.encode("utf-8"))
        self.line += taken.count("\n")
        self.at = end

    def skip_space(self) -> str:
        """Skip white space and return the next character; "" at the end of the file."""
        while True:
            rest = self.at
            while rest < len(self.buffer) and self.buffer[rest] in _SPACE:
                rest += 1
            self.take(rest - self.at)
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.fill():
                return ""

    def take_object(self) -> Object:
        """Consume the object that starts here. Raises `json.JSONDecodeError`."""
        size = _CHUNK
        while True:
            try:
                value, end = _decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - _LONGEST_TOKEN
                if not is_cut or not self.fill(size):
                    raise
                size *= 2  # so that a long object is not parsed again after every chunk
            else:
                self.take(end - self.at)
                return value

    def line_of(self, position: int) -> int:
        """The line number of a position in the buffer."""
        return self.line + self.buffer.count("\n", self.at, position)


__all__ = ["Item", "Object", "item_at", "open_file", "read_items"]
