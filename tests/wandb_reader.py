"""Reads what a Weights & Biases offline run has logged: `history = read_history(tmp_path)`.

A `run-*.wandb` file is a LevelDB log of protobuf records behind a header of its own. The log is a sequence of 32 KiB
blocks; a record that does not fit into its block continues in the next.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

_BLOCK = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_HEADER = struct.Struct("<IHB")  # crc32, length, kind of fragment


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The logged values of each step, in order. Nested names are joined by dots; W&B adds `_step`, `_timestamp`, ...

    `path` is the file, or a folder with exactly one of them at any depth.
    """
    return [
        {_name(item): json.loads(item.value_json) for item in record.history.item}
        for record in _records(_find(path))
        if record.WhichOneof("record_type") == "history"
    ]


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The run's configuration after all its updates, names as in `read_history`. `_wandb` holds W&B's own entries."""
    config: dict[str, Any] = {}
    for record in _records(_find(path)):
        kind = record.WhichOneof("record_type")
        change = {"run": record.run.config, "config": record.config}.get(kind)
        if change is None:
            continue
        config.update({_name(item): json.loads(item.value_json) for item in change.update})
        for item in change.remove:
            config.pop(_name(item), None)
    return config


def _name(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def _find(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    # `latest-run` is a link to the same folder.
    found = sorted({file.resolve() for file in path.rglob("run-*.wandb")})
    if len(found) != 1:
        raise FileNotFoundError(f"expected one run-*.wandb under {path}, got {[str(file) for file in found]}")
    return found[0]


def _records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is not a W&B run file: it starts with {data[:4]!r}")
    position, payload = 7, b""
    while position + _HEADER.size <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < _HEADER.size:  # too short for a header: zeros up to the next block
            position += room
            continue
        checksum, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        fragment = data[position : position + length]
        if zlib.crc32(fragment, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"{path} is damaged or cut short before byte {position + length}")
        position += length
        payload = fragment if kind in (_FULL, _FIRST) else payload + fragment
        if kind in (_FULL, _LAST):
            yield pb.Record.FromString(payload)  # type: ignore[attr-defined]
