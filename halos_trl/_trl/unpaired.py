"""Access to private parts of `trl.KTOTrainer`, without TRL's KL partners."""

from __future__ import annotations

from itertools import islice
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from trl import KTOTrainer as HostTrainer

from ..data.halos.batches import HalosBatches, HalosPartners, HalosUnpairedBatches
from .host import TrainerHost
from .images import with_image_partners
from .user_functions import CheckedCollator

logger = get_logger(__name__)


def _report_balance(desirable: int, rows: int, args: Any) -> None:
    """Recommend weights for unbalanced labels, as TRL does: equation 8 of the KTO paper (arXiv:2402.01306)."""
    undesirable = rows - desirable
    weights: tuple[float, float] = args.desirable_weight, args.undesirable_weight
    if desirable == undesirable or 0 in weights:
        return
    if 0 in (desirable, undesirable):
        missing = "desirable" if desirable == 0 else "undesirable"
        logger.warning(
            f"All {rows} rows of the train dataset have the same label: there is no {missing} example, so weights "
            "cannot balance the two labels."
        )
        return
    ratio = (weights[0] * desirable) / (weights[1] * undesirable)
    if not 0.995 <= ratio <= 1.335:  # TRL's bounds, which are rounded
        low = [weights[1] * undesirable / desirable, weights[0] * desirable / undesirable / (4 / 3)]
        logger.warning(
            f"The train dataset has {desirable} desirable and {undesirable} undesirable rows. Weighted by "
            f"`desirable_weight={weights[0]}` and `undesirable_weight={weights[1]}` their ratio is {ratio:.2f}; the "
            f"KTO paper recommends 1 to 1.33. Set either `desirable_weight` in [{low[0]:.2f}, {low[0] * 4 / 3:.2f}] "
            f"or `undesirable_weight` in [{low[1]:.2f}, {low[1] * 4 / 3:.2f}]."
        )


class UnpairedHost(TrainerHost, HostTrainer):
    """Host of the methods on single completions, based on `trl.KTOTrainer`."""

    trl_class = HostTrainer
    sides = ("completion",)
    needs_kl: ClassVar[bool] = False
    estimates_kl: bool
    """Whether this run estimates a KL term; set before TRL's constructor, which prepares data, runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_type = self.args.loss_type
        if self._is_vision_dataset and self.estimates_kl and hasattr(self.data_collator, "calculate_kl"):
            # Images belong to prompts, so TRL's vision collator makes KL partners within a micro-batch.
            self.data_collator.calculate_kl = True
            self.data_collator: Any = _OtherPrompts(self.data_collator)
        elif self._in_halos_order and self.estimates_kl:
            self.data_collator = HalosPartners(
                CheckedCollator(self.data_collator),
                self._halos_tokenizer(self.processing_class, self.args, "train", self.sides),
                pad_token_id=self.model.config.get_text_config().pad_token_id,
            )

    def _hidden_from_trl(self, args: Any) -> dict[str, Any]:
        # The only loss type for which TRL prepares no KL partners.
        self.estimates_kl = self.needs_kl and args.loss_type != "apo_zero_unpaired"
        return {**super()._hidden_from_trl(args), "loss_type": "apo_zero_unpaired"}

    @property
    def has_fixed_partners(self) -> bool:
        """Whether a batch contains its KL partners: precomputed, made by TRL's vision collator, or as in HALOs."""
        return bool(self.args.precompute_ref_log_probs or self._is_vision_dataset or self._in_halos_order)

    def fixed_partners(
        self, dataset: Dataset, name: str, max_length: int | None, column: str = "completion_ids"
    ) -> list[list[int]]:
        """Hook: for each row of a prepared dataset, the `column` value of a completion of another prompt."""
        raise NotImplementedError

    def _with_fixed_partners(self, dataset: Dataset, name: str, max_length: int | None) -> Dataset:
        # With fixed partners their reference log-probs can be computed once, for any order of training.
        partners = self.fixed_partners(dataset, name, max_length)
        if self._assistant_only:
            masks = self.fixed_partners(dataset, name, max_length, "completion_mask")
            dataset = dataset.remove_columns([column for column in ["KL_mask"] if column in dataset.column_names])
            dataset = dataset.add_column("KL_mask", masks, feature=dataset.features["completion_mask"])
        if "KL_completion_ids" in dataset.column_names:
            if list(dataset["KL_completion_ids"]) == partners:
                return dataset
            # The partners have changed, so their stored log-probs no longer apply.
            stale = {"KL_completion_ids", "ref_logps", "ref_KL_logps"} & set(dataset.column_names)
            logger.warning(
                f"Columns {sorted(stale)} of the {name} dataset were computed for other rows, so they are recomputed."
            )
            dataset = dataset.remove_columns(sorted(stale))
        return dataset.add_column("KL_completion_ids", partners, feature=dataset.features["completion_ids"])

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if dataset_name == "train" and isinstance(dataset, Dataset):
            _report_balance(sum(dataset["label"]), len(dataset), args)
        if self.estimates_kl and args.precompute_ref_log_probs and isinstance(dataset, Dataset):
            if len(dataset) < 2:
                raise ValueError(
                    f"The {dataset_name} dataset has {len(dataset)} row, but `precompute_ref_log_probs=True` takes "
                    "each row's KL partner from another row. Add rows, or set `precompute_ref_log_probs=False`."
                )
            dataset = self._with_fixed_partners(dataset, dataset_name, args.max_length)
        elif self.estimates_kl and len(list(islice(dataset, 2))) < 2:
            raise ValueError(
                f"The {dataset_name} dataset has one row. KTO's KL term pairs each prompt with another row's "
                "completion, so it needs at least 2. Add rows, or use `loss_type='apo_zero_unpaired'`."
            )
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.calculate_KL = self.estimates_kl
        own = self._stores_images and isinstance(dataset, Dataset) and not self._has_stored(dataset)
        if own and self.estimates_kl:
            dataset = with_image_partners(dataset, name)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self.calculate_KL = False

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Summed reference log-probs of the completions, and of their KL partners."""
        sums_B = self.reference_table(model, inputs).sum(-1)
        of_partners_B = None
        if self.calculate_KL:
            partners = {name.removeprefix("KL_"): value for name, value in inputs.items() if name.startswith("KL_")}
            of_partners_B = self.reference_table(model, {**inputs, **partners}).sum(-1)
        return self.in_stored_form((sums_B, of_partners_B), inputs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._in_halos_order:  # KL partners are tokenized together with the prompts of other rows
            texts = ("prompt", "completion", "tools", "chat_template_kwargs")
            self._signature_columns += [column for column in texts if column not in self._signature_columns]

    @property
    def halos_batches(self) -> type[HalosBatches]:
        """The sampler class that corresponds to HALOs' data loader for this method."""
        return HalosUnpairedBatches

    @property
    def fewest_examples(self) -> int:
        """Minimum number of examples in a micro-batch, over all processes. HALOs takes KL partners from it."""
        return 2 if self.estimates_kl else 1

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # transformers before 5.2 does not have `train_sampling_strategy`.
        if self.args.train_sampling_strategy == "sequential":
            data = self.train_dataset if train_dataset is None else train_dataset
            return torch.utils.data.SequentialSampler(data) if isinstance(data, Dataset) else None
        return super()._get_train_sampler(train_dataset)


class _OtherPrompts:
    """TRL's vision collator: the KL partner of row i is row i - 1, ignored if both have the same prompt and image."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        asked = [[row.get(column) for column in ("prompt", "image", "images")] for row in rows]
        equal = [i for i in range(len(rows)) if asked[i] == asked[i - 1]]
        batch = self.collate(rows)
        if equal:
            batch["KL_completion_mask"][equal] = 0
            logger.warning_once(
                "Two neighbouring rows in a batch have the same prompt and image. With images, KTO's KL estimate "
                "pairs each prompt with the completion of the previous row, so such rows do not count. Shuffle the "
                "rows."
            )
        return batch
