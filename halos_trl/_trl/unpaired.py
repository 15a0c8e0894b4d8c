"""`trl.KTOTrainer` behind the door, without its KL partners."""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any, ClassVar

import torch
from datasets import Dataset
from trl import KTOTrainer as HostTrainer

from .host import TrainerHost


class UnpairedHost(TrainerHost, HostTrainer):
    """`trl.KTOTrainer` behind the door."""

    trl_class = HostTrainer

    needs_kl: ClassVar[bool] = False
    estimates_kl: bool
    """Whether this run estimates a KL term; set before TRL's constructor, which prepares data, runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_type = self.args.loss_type
        if self._is_vision_dataset and self.estimates_kl and hasattr(self.data_collator, "calculate_kl"):
            # Images travel with the prompts, so vision partners come from TRL's collator, inside a micro-batch.
            self.data_collator.calculate_kl = True

    def _hidden_from_trl(self, args: Any) -> dict[str, Any]:
        # The one loss type for which TRL prepares no KL partners.
        self.estimates_kl = self.needs_kl and args.loss_type != "apo_zero_unpaired"
        return {**super()._hidden_from_trl(args), "loss_type": "apo_zero_unpaired"}

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self.estimates_kl and args.precompute_ref_log_probs and isinstance(dataset, Dataset):
            if len(dataset) < 2:
                raise ValueError(
                    f"The {dataset_name} dataset has {len(dataset)} row, but `precompute_ref_log_probs=True` takes "
                    "each row's KL partner from the row after it. Add rows, or set `precompute_ref_log_probs=False`."
                )
            # A fixed partner, so that its reference log-prob can be computed once; any order of training is fine.
            limit = sys.maxsize if args.max_length is None else args.max_length
            rows = zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)
            trained = [completion[: limit - len(prompt)] for prompt, completion in rows]
            dataset = dataset.add_column("KL_completion_ids", trained[1:] + trained[:1])
        elif self.estimates_kl and len(list(islice(dataset, 2))) < 2:
            raise ValueError(
                f"The {dataset_name} dataset has one row. KTO's KL term pairs each prompt with another row's "
                "completion, so it needs at least 2. Add rows, or use `loss_type='apo_zero_unpaired'`."
            )
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.calculate_KL = self.estimates_kl
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self.calculate_KL = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # transformers before 5.2 does not know `train_sampling_strategy`.
        if self.args.train_sampling_strategy == "sequential":
            data = self.train_dataset if train_dataset is None else train_dataset
            return torch.utils.data.SequentialSampler(data) if isinstance(data, Dataset) else None
        return super()._get_train_sampler(train_dataset)
