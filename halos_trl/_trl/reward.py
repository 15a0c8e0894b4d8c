"""Access to private parts of `trl.RewardTrainer`."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from trl import RewardTrainer as HostTrainer
from trl.trainer.utils import get_config_model_id

from ..data.checks import columns_of, plain_rows, plain_splits
from ..data.row_texts import split_prompt
from ..data.tokens import RowTokenizer
from ..forward.heads import read_wanted_scores
from ..forward.packing import compiled_rows, give_packing
from .arguments import check_optimizer_parameters, check_types
from .dropout import switch_off_dropout
from .halos_order import HalosOrder, halos_rows
from .host import NamedTrainer
from .overridden import overridden
from .prepare import SamplesByLength
from .rows import check_token_ids, noting_policy, refuse_without_special_tokens, token_limits, tokenized_rows
from .saving import SavesPolicy

logger = get_logger(__name__)


class RewardHost(HalosOrder, SamplesByLength, SavesPolicy, NamedTrainer, HostTrainer):
    """Host of the reward model trainer, based on `trl.RewardTrainer`."""

    trl_class = HostTrainer

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *trl_args: Any,
        **trl_kwargs: Any,
    ) -> None:
        given = inspect.signature(HostTrainer.__init__).bind_partial(
            self, model, args, data_collator, train_dataset, eval_dataset, *trl_args, **trl_kwargs
        )
        check_types(given.arguments, needs_language_head=False)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-{self._name}")
        self._refuse_foreign_config(args)
        self.check_loops(args)
        self.drops_invalid_rows = args.drop_invalid_rows
        self._in_halos_order = args.batch_order == "halos"
        refuse_without_special_tokens(trl_kwargs.get("processing_class"), args)
        datasets = plain_splits(train_dataset, "train"), plain_splits(eval_dataset, "eval")
        host = sys.modules[HostTrainer.__module__]
        with noting_policy(self, model), overridden(host, disable_dropout_in_model=switch_off_dropout):
            super().__init__(model, args, data_collator, *datasets, *trl_args, **trl_kwargs)
        check_optimizer_parameters(given.arguments.get("optimizers", (None, None))[0], self.model)
        give_packing([self.model], args.packed, compiled_rows(args), read_wanted_scores)

    def host_loss(self, outputs: Any, batch: dict[str, Any], return_outputs: bool, num_items_in_batch: Any) -> Any:
        """TRL's loss and metrics, from a model's outputs for a batch."""
        return super().compute_loss(lambda **inputs: outputs, batch, return_outputs, num_items_in_batch)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = plain_rows(dataset, dataset_name)
        if self._in_halos_order:
            return self._in_order_of_halos(dataset, processing_class, args, dataset_name)
        if {"chosen_ids", "chosen_input_ids"} & columns_of(dataset, dataset_name):
            return self._tokenized_before(dataset, processing_class, args, dataset_name)
        dataset = self.check_rows(dataset, dataset_name)

        def row_tokenizer(prompt_is_explicit: bool) -> RowTokenizer:
            return RowTokenizer(
                processing_class,
                dataset_name,
                ("chosen", "rejected"),
                whole=True,
                prompt_is_explicit=prompt_is_explicit,
                max_length=args.max_length,
                limits=token_limits(self, processing_class),
                drop_invalid=self.drops_invalid_rows,
            )

        return tokenized_rows(dataset, row_tokenizer, args, functools.partial(self.note_rows, dataset_name))

    def _in_order_of_halos(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        def prepare(rows: Dataset) -> Any:
            rows = self.check_rows(rows, name)
            if "prompt" not in rows.column_names:
                rows = rows.map(split_prompt)
            tokenizer = self._halos_tokenizer(processing_class, args, name, ("chosen", "rejected"), whole=True)
            return tokenized_rows(rows, lambda prompt_is_explicit: tokenizer, args)

        return halos_rows(dataset, name, prepare)

    def _tokenized_before(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) < len(dataset):
            logger.warning(
                f"TRL dropped {len(dataset) - len(prepared)} of {len(dataset)} rows of the {dataset_name} dataset, "
                f"because `chosen` or `rejected` is longer than `max_length`={args.max_length}. Raise it to keep them."
            )
        limits = token_limits(self, processing_class)
        return check_token_ids(prepared, ("chosen_ids", "rejected_ids"), limits, dataset_name)
