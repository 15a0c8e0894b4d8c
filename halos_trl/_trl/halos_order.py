"""`batch_order="halos"`: rows and batches in the same order as in HALOs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.logging import get_logger
from datasets import Dataset
from transformers.trainer_utils import seed_worker

from ..data.checks import columns_of
from ..data.halos.batches import HalosBatches, HalosPairedBatches
from ..data.halos.rows import PROMPT, HalosRowTokenizer, in_flat_order, with_positions
from ..data.tokens import RowTokenizer
from .prepare import PreparesRows
from .rows import token_limits
from .user_functions import CheckedCollator

if TYPE_CHECKING:
    from trl import DPOTrainer as _Mixin
else:
    _Mixin = object

logger = get_logger(__name__)

_LOADER_SETTINGS = (
    "num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order"
)  # fmt: skip


def loader_of_batches(trainer: Any, rows: Any, sampler: Any) -> torch.utils.data.DataLoader:
    """A data loader of batches for this process, which accelerate must not distribute over processes again."""
    args = trainer.args
    names = {name: f"dataloader_{name}" for name in _LOADER_SETTINGS if hasattr(args, f"dataloader_{name}")}
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        rows,
        batch_sampler=sampler,
        collate_fn=CheckedCollator(trainer.data_collator),
        worker_init_fn=functools.partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        ),
        **{name: getattr(args, setting) for name, setting in names.items()},
    )
    return prepare_data_loader(
        loader,
        trainer.accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        non_blocking=trainer.accelerator.non_blocking,
    )


class HalosOrder(_Mixin):
    """Adds HALOs' batches to a trainer, used with `batch_order="halos"`."""

    _in_halos_order: bool = False
    """Whether the config has `batch_order="halos"`; set before TRL's constructor prepares data."""

    drops_invalid_rows: bool

    @property
    def halos_batches(self) -> type[HalosBatches]:
        """The sampler class that corresponds to HALOs' data loader for this method."""
        return HalosPairedBatches

    @property
    def fewest_examples(self) -> int:
        """Minimum number of examples in a micro-batch, over all processes."""
        return 1

    @property
    def passes_per_batch(self) -> int:
        """Number of consecutive optimizer steps that use the same batch."""
        return 1

    def _halos_tokenizer(
        self, processing_class: Any, args: Any, name: str, sides: tuple[str, ...], *, whole: bool = False
    ) -> HalosRowTokenizer:
        return HalosRowTokenizer(
            processing_class,
            name,
            sides,
            whole=whole,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            limits=token_limits(self, processing_class),
            drop_invalid=self.drops_invalid_rows,
        )

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Data loader of this process's micro-batches, in the order given by `batch_order`."""
        if not self._in_halos_order:
            return super().get_train_dataloader()
        args, processes, data = self.args, self.accelerator.num_processes, self.train_dataset
        size = self._train_batch_size
        if size * processes < self.fewest_examples:
            raise ValueError(
                f"`per_device_train_batch_size={size}` on one process leaves no other completion for the KL term, "
                "which `batch_order='halos'` computes within a micro-batch. Set it to at least 2, or use "
                "`batch_order='trl'`."
            )
        sampler = self.halos_batches(
            list(data[PROMPT]),
            microbatch_size=size,
            microbatches=args.gradient_accumulation_steps,
            num_processes=processes,
            process_index=self.accelerator.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            repeats=self.passes_per_batch,
        )
        self._report_left_out(sampler)
        rows = self._remove_unused_columns(data, description="training") if args.remove_unused_columns else data
        return loader_of_batches(self, rows, sampler)

    def _report_left_out(self, sampler: HalosBatches) -> None:
        step = sampler.microbatch_size * sampler.microbatches * sampler.num_processes
        if not len(sampler):
            raise ValueError(
                f"The train dataset has {sampler.rows} rows, but `batch_order='halos'` drops examples that do not "
                f"fill a batch (an optimizer step has {step} examples over all processes), so none is left. Lower "
                "`per_device_train_batch_size` or `gradient_accumulation_steps`, or set `batch_order='trl'`."
            )
        if sampler.left_out:
            logger.warning(
                f"`batch_order='halos'` leaves {sampler.left_out} of {sampler.rows} rows out of every epoch, "
                "different ones each time, because they do not fill a batch. `batch_order='trl'` uses all rows."
            )


def halos_rows(dataset: Any, name: str, prepare: Callable[[Dataset], Any]) -> Dataset:
    """Prepare the rows of a dataset and sort them into HALOs' flat list. Raises ValueError for streams."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The {name} dataset is a {type(dataset).__name__}, but `batch_order='halos'` orders all rows before the "
            "first batch. Pass a map-style `datasets.Dataset` (do not stream), or set `batch_order='trl'`."
        )
    return in_flat_order(prepare(with_positions(dataset)), name)


class PreparesHalosRows(HalosOrder, PreparesRows):
    """Data preparation of a trainer, with HALOs' rows and batches if `batch_order="halos"`."""

    def _checked_before_trl(self, dataset: Any, name: str) -> Any:
        dataset = super()._checked_before_trl(dataset, name)
        if self._in_halos_order and isinstance(dataset, Dataset) and {"image", "images"} & columns_of(dataset, name):
            raise ValueError(
                f"The {name} dataset has images, which HALOs does not support. Set `batch_order='trl'`, or remove the "
                "column."
            )
        return dataset

    def _row_tokenizer(self, processing_class: Any, args: Any, name: str, prompt_is_explicit: bool) -> RowTokenizer:
        if not self._in_halos_order:
            return super()._row_tokenizer(processing_class, args, name, prompt_is_explicit)
        return self._halos_tokenizer(processing_class, args, name, self.sides)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        def prepare(rows: Any) -> Any:
            return super(PreparesHalosRows, self)._prepare_dataset(rows, processing_class, args, dataset_name)

        return halos_rows(dataset, dataset_name, prepare) if self._in_halos_order else prepare(dataset)


__all__ = ["HalosOrder", "PreparesHalosRows", "halos_rows", "loader_of_batches"]
