"""The config class of KTO."""

from __future__ import annotations

from dataclasses import dataclass, field

import trl

from .batch_order import BatchOrderConfig
from .checks import check_sync, require, require_not_negative, require_positive
from .shared import SYNC_HELP, CompletionConfig, ForwardConfig, HumanlineConfig, ReferenceConfig, RowsConfig

KTO_LOSS_FIELDS = ("loss_type", "desirable_weight", "undesirable_weight")


@dataclass
class KTOConfig(
    BatchOrderConfig, ForwardConfig, HumanlineConfig, ReferenceConfig, CompletionConfig, RowsConfig, trl.KTOConfig
):
    """`trl.KTOConfig` plus humanline, with shuffling on.

    The KL partners are taken from the same optimizer step, so the data can be in any order: `train_sampling_strategy`
    defaults to `"random"` (TRL: `"sequential"`), and `per_device_train_batch_size=1` works. Defaults are those of TRL
    and HALOs, which agree (`beta=0.1`, both weights 1).
    """

    sync_ref_model: bool = field(default=False, metadata={"help": SYNC_HELP})
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Order of the training data. Any order works, since KL partners come from the same step.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")
        check_sync(self)
        require(
            self.batch_order == "trl" or not self.precompute_ref_log_probs, "precompute_ref_log_probs", True,
            "with `batch_order='halos'` the KL term pairs a prompt with different completions in each epoch.",
            "Leave it out, or set `batch_order='trl'`.",
        )  # fmt: skip
        for name in ("desirable_weight", "undesirable_weight"):
            require_not_negative(self, name, "a negative weight flips the sign of that term.")
        require(
            self.desirable_weight + self.undesirable_weight > 0, "desirable_weight", self.desirable_weight,
            "`undesirable_weight` is also 0, so nothing would be learned.", "Set one of them above 0.",
        )  # fmt: skip
        known = ("kto", "apo_zero_unpaired")
        require(
            self.loss_type in known,
            "loss_type",
            self.loss_type,
            "KTOTrainer does not have this loss type.",
            f"Use one of {known}.",
        )
