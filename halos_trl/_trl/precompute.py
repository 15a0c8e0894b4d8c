"""Reference log-probs computed once and stored with the dataset, by the same code that computes them live."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from datasets.fingerprint import Hasher

from .images import image_files
from .overridden import overridden

if TYPE_CHECKING:
    from transformers import Trainer as _Mixin
else:
    _Mixin = object

logger = get_logger(__name__)

STORED_COLUMNS = ("ref_logps", "ref_KL_logps", "ref_chosen_logps", "ref_rejected_logps")

_FORMAT = 2
"""Increment it if different numbers are stored for the same key."""

_ARGUMENTS = (
    "max_length", "truncation_mode", "ld_alpha", "pad_to_multiple_of", "loss_type", "tf32", "bf16", "fp16",
    "bf16_full_eval", "fp16_full_eval", "use_liger_kernel", "torch_compile", "packed",
)  # fmt: skip
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


class StoresReference(_Mixin):
    """Implements `precompute_ref_log_probs`, and evaluation with the stored columns."""

    trl_class: ClassVar[Any]
    _stores_images: bool
    _checked_before_trl: Callable[..., Any]
    live_reference: Callable[[Any], Any]
    """Hook: `live_reference(policy)` returns an object with the `log_probs(batch)` of the reference in training."""

    _stored: frozenset[str] = frozenset()
    """Fingerprints of the datasets with log-probs of this trainer's reference."""

    def reference_table(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Reference log-probs `(B, T)` of a collated batch, in at least float32; `model` is the one TRL passes."""
        table_BT = self.live_reference(model).log_probs(batch)
        return table_BT.to(torch.promote_types(table_BT.dtype, torch.float32))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self.accelerator.num_processes > 1 and isinstance(dataset, Dataset) and not dataset.cache_files:
            raise ValueError(
                f"`precompute_ref_log_probs=True` with {self.accelerator.num_processes} processes shares the "
                f"log-probs through the cache folder of the {name} dataset, but that dataset exists only in memory. "
                "Save it with `save_to_disk` and load it with `load_from_disk`, or set "
                "`precompute_ref_log_probs=False`."
            )
        if self._has_stored(dataset):
            return dataset
        there = [column for column in STORED_COLUMNS if column in (dataset.column_names or ())]
        if there:
            logger.warning(
                f"Columns {there} of the {name} dataset may be of a different reference, so they are recomputed."
            )
            dataset = dataset.remove_columns(there)
        with overridden(self, _precompute_model_hash=self._key(dataset)):
            dataset = super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]
        self._stored |= {dataset._fingerprint}
        return dataset

    def _key(self, dataset: Dataset) -> str:
        """Cache key of all settings that affect the stored numbers; TRL's own key covers dataset and weights only."""
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
        config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
        deciding = {
            "format": _FORMAT,
            "weights": self._precompute_model_hash,
            "config": config,
            "attention": getattr(model.config, "_attn_implementation", None),
            "adapters": adapters,
            "method": (self.trl_class.__name__, getattr(self, "stores_token_logps", False)),
            "precision": (self.accelerator.mixed_precision, torch.get_float32_matmul_precision()),
            "device": self.accelerator.device.type,
            "arguments": {name: str(getattr(self.args, name, None)) for name in _ARGUMENTS},
            "collator": _hash_of(self.data_collator),
            "images": sorted(image_files(dataset).items()),
            "versions": {name: version(name) for name in _PACKAGES},
        }
        return Hasher.hash({name: str(value) for name, value in deciding.items()})

    # -- evaluation --------------------------------------------------------------------------------------------

    def _has_stored(self, dataset: Any) -> bool:
        return isinstance(dataset, Dataset) and dataset._fingerprint in self._stored

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; datasets that this trainer has prepared, e.g. `train_dataset`, are used as is."""
        if self._stores_images and isinstance(eval_dataset, Dataset) and not self._has_stored(eval_dataset):
            eval_dataset = self._stored_for_evaluation(eval_dataset)
        # TRL would prepare it again, or raise an error after training, because it would need the reference.
        evaluate = super(self.trl_class, self).evaluate if self._has_stored(eval_dataset) else super().evaluate
        return evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _stored_for_evaluation(self, dataset: Dataset) -> Dataset:
        # As TRL's `evaluate` for rows without images.
        if self.ref_model is None and not is_peft_model(self.model) and self.state.global_step > 0:
            raise ValueError(
                "`precompute_ref_log_probs=True` keeps no reference during training, so those of a dataset that is "
                "passed to `evaluate` after training cannot be computed. Pass it as `eval_dataset` to the trainer, "
                "pass a `ref_model`, or set `precompute_ref_log_probs=False`."
            )
        dataset = self._checked_before_trl(dataset, "eval")
        return self._precompute_ref_logps(
            dataset, "eval", self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._policy_prepared():
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _policy_prepared(self) -> Iterator[None]:
        """Prepare the policy for an evaluation before training. Transformers does so only if no model was prepared
        before, and the reference was.
        """
        prepared = self.accelerator._models
        own = [self.accelerator.unwrap_model(model) for model in prepared]
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.accelerator.unwrap_model(self.model) in own:
            yield
            return
        self.accelerator._models = []
        try:
            yield
        finally:
            self.accelerator._models = prepared + self.accelerator._models


def _hash_of(collator: Any) -> str:
    try:
        return str(Hasher.hash(collator))
    except Exception:  # a user's collator may raise any error; the key is then unique to this run
        return uuid.uuid4().hex
