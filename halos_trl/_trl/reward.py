"""`trl.RewardTrainer` behind the door."""

from __future__ import annotations

from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from trl import RewardTrainer as HostTrainer
from trl.trainer.utils import get_config_model_id

from ..data.checks import columns_of, plain_rows
from .host import NamedTrainer

logger = get_logger(__name__)


class RewardHost(NamedTrainer, HostTrainer):
    """`trl.RewardTrainer` behind the door."""

    trl_class = HostTrainer

    def __init__(self, model: Any, args: Any = None, *trl_args: Any, **trl_kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-{self._name}")
        self._refuse_foreign_config(args)
        self.drops_invalid_rows = args.drop_invalid_rows
        super().__init__(model, args, *trl_args, **trl_kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = plain_rows(dataset, dataset_name)
        if not {"chosen_ids", "chosen_input_ids"} & columns_of(dataset, dataset_name):
            dataset = self.check_rows(dataset, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) < len(dataset):
            logger.warning(
                f"TRL dropped {len(dataset) - len(prepared)} of {len(dataset)} rows of the {dataset_name} dataset, in "
                f"which a side is longer than `max_length`={args.max_length}. Raise it to keep them."
            )
        return prepared
