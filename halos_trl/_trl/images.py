"""`precompute_ref_log_probs` for rows with images, which TRL refuses: its collator makes batches of raw rows."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset, Features, concatenate_datasets

from ..data.checks import columns_of
from ..data.kl_partners import partners
from .overridden import overridden

if TYPE_CHECKING:
    from trl import DPOTrainer as _Mixin
else:
    _Mixin = object

logger = get_logger(__name__)

IMAGES = ("image", "images")
PARTNER = "KL_completion"
"""Column with the completion of each row's KL partner."""

_OF_PAIRS = ("ref_chosen_logps", "ref_rejected_logps")
_OF_COMPLETIONS = ("ref_logps", "ref_KL_logps")
_SEQUENCES = ("input_ids", "attention_mask", "completion_mask", "token_type_ids", "mm_token_type_ids")
_MODULUS = 16_777_213
"""The largest prime below 2**24, so that checksums are exact in float32."""


class StoresImageReference(_Mixin):
    """Reference log-probs of rows with images, stored with a checksum of the tokens that they belong to."""

    trl_class: ClassVar[Any]
    sides: ClassVar[tuple[str, ...]]
    _stores_images: bool = False
    """Whether this run stores them. Set before TRL's constructor runs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self._stores_images:
            # The flag is hidden from TRL's check of the arguments, which comes before this call. What follows it in
            # the constructor (the reference, the hash of its weights, the pass over the datasets) is TRL's.
            self.args.precompute_ref_log_probs = self.precompute_ref_logps = True

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._stores_images:
            added = (*(_OF_PAIRS if len(self.sides) == 2 else _OF_COMPLETIONS), PARTNER)
            self._signature_columns += [column for column in added if column not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self._stores_images or not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if dataset.format["type"] is not None:
            raise ValueError(
                f"The {name} dataset has a transform or format ({dataset.format['type']!r}), which would be lost when "
                "`precompute_ref_log_probs=True` stores the log-probs. Store the images in the dataset (an `Image` "
                "column holds paths or bytes), or set `precompute_ref_log_probs=False`."
            )
        if not isinstance(self.data_collator, StoredCollator):
            self.data_collator: Any = StoredCollator(self.data_collator)
        with overridden(sys.modules[self.trl_class.__module__], concatenate_datasets=beside):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def in_stored_form(self, sums: tuple[Any, Any], batch: dict[str, Any]) -> tuple[Any, Any]:
        """Sums `(B,)` in nats as they are stored in columns of a dataset: `(B, 2)` with the checksum of the tokens."""
        if not self._stores_images:
            return sums
        of_batch = _checksums(batch, len(self.sides) == 2)
        first, second = (
            None if sums_B is None else torch.stack([sums_B, checksum_B.to(sums_B.dtype)], -1)
            for sums_B, checksum_B in zip(sums, of_batch, strict=True)
        )
        return first, second


class StoredCollator:
    """Adds the stored log-probs and the KL partners of rows to the batch that a collator makes of them.

    Raises ValueError if the tokens of a row are not those of its stored log-probs.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]):
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        added = {*_OF_PAIRS, *_OF_COMPLETIONS, PARTNER} & set(rows[0])
        raw = [{name: value for name, value in row.items() if name not in added} for row in rows]
        batch = self.collate([dict(row) for row in raw])  # TRL's collator changes the rows
        if PARTNER in added:
            others = self.collate([row | {"completion": own[PARTNER]} for row, own in zip(raw, rows, strict=True)])
            batch.update({f"KL_{name}": others[name] for name in _SEQUENCES if name in others})
        columns = _OF_PAIRS if _OF_PAIRS[0] in added else _OF_COMPLETIONS
        for column, checksum_B in zip(columns, _checksums(batch, columns is _OF_PAIRS), strict=True):
            if column in added:
                batch[column] = _checked([row[column] for row in rows], checksum_B, raw)
        return batch


def _checked(stored: list[list[float]], checksum_B: torch.Tensor, rows: list[dict[str, Any]]) -> torch.Tensor:
    sums_B, stored_B = torch.tensor(stored).unbind(-1)
    other = (stored_B.long() != checksum_B.cpu()).nonzero().flatten().tolist()
    if other:
        raise ValueError(
            f"The row with the prompt {str(rows[other[0]].get('prompt'))[:200]!r} has other tokens than when its "
            "reference log-probs were computed, so these do not apply. The processor or the data collator has "
            "changed since the trainer was created, or is not deterministic. Use the same, deterministic ones "
            "throughout, or set `precompute_ref_log_probs=False`."
        )
    return sums_B


def _checksums(batch: Any, paired: bool) -> tuple[Any, Any]:
    """A checksum of each row's tokens, for the two columns of a method; None without KL partners."""
    own_B = _checksum(batch, "")
    if paired:
        chosen_B, rejected_B = own_B.chunk(2)
        return chosen_B, rejected_B
    return own_B, _checksum(batch, "KL_") if "KL_input_ids" in batch else None


def _checksum(batch: Any, prefix: str) -> torch.Tensor:
    """`(B,)`: of ids and positions of prompt and completion, independent of padding."""
    ids, attended, completion = (batch[prefix + name].long() for name in _SEQUENCES[:3])
    return ((ids + 1) * attended.cumsum(-1) * attended * (1 + completion)).sum(-1) % _MODULUS


# -- datasets --------------------------------------------------------------------------------------------------------


def has_images(dataset: Any, name: str) -> bool:
    """Whether TRL takes the rows for rows with images, which it does not tokenize in advance."""
    return dataset is not None and bool(set(IMAGES) & columns_of(dataset, name))


def beside(parts: list[Dataset], axis: int = 1) -> Dataset:
    """The columns of two datasets, as `concatenate_datasets(parts, axis=1)`.

    That function copies a dataset of selected or shuffled rows, with its images, to disk. Here, the rows stay where
    they are, and the second dataset is brought into their order.
    """
    rows, added = parts
    if rows._indices is None:
        return concatenate_datasets(parts, axis=axis)
    positions = rows._indices.column(0).to_pylist()
    row_at = {position: row for row, position in enumerate(positions)}
    if len(row_at) < len(positions):  # a row that was selected twice has two values
        return concatenate_datasets(parts, axis=axis)
    whole = Dataset(rows.data, info=rows.info.copy(), split=rows.split, fingerprint=rows._fingerprint)
    order = pa.array([row_at.get(position) for position in range(len(whole))], pa.int64())
    moved = Dataset(added.data.table.take(order), info=added.info.copy(), fingerprint=added._fingerprint)
    return concatenate_datasets([whole, moved], axis=axis).select(positions)


def with_image_partners(dataset: Dataset, name: str) -> Dataset:
    """The dataset with the completion of each row's KL partner, a row with another prompt or image."""
    of_row = partners(_questions(dataset))
    if of_row is None:
        raise ValueError(
            f"All {len(dataset)} rows of the {name} dataset have the same prompt and image. KTO's KL term pairs each "
            "prompt with a completion of another one. Add rows, or use `loss_type='apo_zero_unpaired'`."
        )
    if PARTNER in dataset.column_names:
        logger.warning(f"The column {PARTNER!r} of the {name} dataset is replaced by the KL partners.")
        dataset = dataset.remove_columns(PARTNER)
    completions = list(dataset.select_columns("completion")["completion"])
    features = Features({PARTNER: dataset.features["completion"]})
    return beside([dataset, Dataset.from_dict({PARTNER: [completions[i] for i in of_row]}, features)])


def _questions(dataset: Dataset) -> list[bytes]:
    """A digest of the prompt and the images of each row, which are not decoded."""
    columns = [column for column in ("prompt", *IMAGES) if column in dataset.column_names]
    tables = dataset.select_columns(columns).with_format("arrow").iter(batch_size=100)
    return [hashlib.sha256(repr(row).encode()).digest() for table in tables for row in table.to_pylist()]


def image_files(dataset: Any) -> dict[str, tuple[int, int]]:
    """Size and time of change of the files that hold a dataset's images; its fingerprint covers their names only."""
    paths: set[str] = set()
    for name in set(IMAGES) & set(dataset.column_names) if isinstance(dataset, Dataset) else ():
        column = dataset.data.column(name)
        while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = pc.list_flatten(column)
        if pa.types.is_struct(column.type) and {"bytes", "path"} <= {field.name for field in column.type}:
            inside = pc.struct_field(column, "bytes").is_valid()
            column = pc.struct_field(column, "path").filter(pc.invert(inside))
        if pa.types.is_string(column.type):
            paths |= {path for path in column.to_pylist() if path and os.path.isfile(path)}
    return {path: (os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths}
