"""Preparation of a trainer's datasets: checks, tokenization, collation with only selected tokens in the loss."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data.checks import columns_of, plain_splits
from ..data.collators import TurnMaskCollator
from ..data.tokens import RowTokenizer
from .rows import drop_foreign_columns, groups_by_length, token_limits, tokenized_rows
from .user_functions import CheckedCollator

if TYPE_CHECKING:
    from trl import DPOTrainer as _Mixin
else:
    _Mixin = object


class NotesRows(_Mixin):
    """Records how many rows of each dataset were dropped or changed, and why."""

    row_notes: dict[str, dict[str, int]]
    """Numbers of dropped and changed rows, by dataset and reason."""

    def note_rows(self, name: str, counts: dict[str, int]) -> None:
        self.row_notes = {**getattr(self, "row_notes", {}), name: counts}


class SamplesByLength(NotesRows):
    """Computes row lengths from the token id columns; transformers needs `input_ids`, which rows do not have."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = self._by_length(self.train_dataset if train_dataset is None else train_dataset, "train")
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler = self._by_length(eval_dataset, "eval")
        return super()._get_eval_sampler(eval_dataset) if sampler is None else sampler

    def _by_length(self, data: Any, mode: str) -> LengthGroupedSampler | None:
        strategy = getattr(self.args, "train_sampling_strategy", None)
        if not isinstance(data, Dataset) or not (strategy == "group_by_length" or groups_by_length(self.args)):
            return None
        columns = [c for c in ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids") if c in data.column_names]
        lengths = [sum(map(len, row)) for row in zip(*(data[column] for column in columns), strict=True)]
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(together if mode == "train" else self.args.eval_batch_size, lengths=lengths)


class PreparesRows(SamplesByLength):
    """Data preparation of a trainer."""

    _assistant_only: bool
    _is_sampled: bool = False
    """Whether to train on the token ids that a sampler stored with the completions."""

    drops_invalid_rows: bool

    sides: ClassVar[tuple[str, ...]]
    """The columns with completions, in the format in which rows are tokenized."""

    def _checked_before_trl(self, dataset: Any, name: str) -> Any:
        """Check datasets that TRL's constructor would fail on or would not pass to `_prepare_dataset`."""
        dataset = plain_splits(dataset, name)
        if isinstance(dataset, dict):
            return type(dataset)({key: self._checked_before_trl(part, key) for key, part in dataset.items()})
        if dataset is None:
            return dataset
        if not {"image", "images"} & columns_of(dataset, name):
            return dataset
        if self._assistant_only:
            raise ValueError(
                f"The {name} dataset has images. Its rows are tokenized only when a batch is collated, so "
                "`assistant_only_loss=True` cannot locate turns. Set `assistant_only_loss=False`."
            )
        # TRL prepares images in its collator.
        return self.check_rows(dataset, name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = drop_foreign_columns(self.check_rows(dataset, dataset_name), dataset_name)

        def tokenizer(prompt_is_explicit: bool) -> RowTokenizer:
            return self._row_tokenizer(processing_class, args, dataset_name, prompt_is_explicit)

        return tokenized_rows(dataset, tokenizer, args, functools.partial(self.note_rows, dataset_name))

    def _row_tokenizer(self, processing_class: Any, args: Any, name: str, prompt_is_explicit: bool) -> RowTokenizer:
        return RowTokenizer(
            processing_class,
            name,
            self.sides,
            assistant_only=self._assistant_only,
            prompt_is_explicit=prompt_is_explicit,
            max_length=args.max_length,
            keep_end=self._keeps_end(args),
            limits=token_limits(self, processing_class),
            drop_invalid=self.drops_invalid_rows,
            sampled=self._is_sampled,
        )

    @staticmethod
    def _keeps_end(args: Any) -> bool:
        return getattr(args, "truncation_mode", "keep_start") == "keep_end"

    def _leave_out_other_turns(self) -> None:
        """With `assistant_only_loss`, wrap the collator so that only the assistant's tokens count."""
        collate: Any = self.data_collator
        if self._assistant_only and not isinstance(collate, TurnMaskCollator):
            self.data_collator: Any = TurnMaskCollator(
                CheckedCollator(collate), self.sides, keep_end=self._keeps_end(self.args)
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        masks = [f"{side}_mask" for side in self.sides] + ["KL_mask"] if self._assistant_only else []
        self._signature_columns += [column for column in masks if column not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._leave_out_other_turns()
        return super()._precompute_ref_logps(dataset, name, batch_size)
