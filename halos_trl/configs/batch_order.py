"""The setting that selects between TRL's and HALOs' batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .checks import defaults_of, require, require_count


@dataclass
class BatchOrderConfig:
    """How examples are assigned to batches.

    Parameters:
        batch_order (`str`, *optional*, defaults to `"trl"`):
            `"halos"` reproduces HALOs' batches: its order for a `seed`, the examples it drops, its tokenization and
            truncation, and KTO's KL term per micro-batch. Use it to reproduce a run of HALOs. `"trl"` uses every row.
        max_prompt_length (`int`, *optional*):
            Maximum number of prompt tokens with `batch_order="halos"`. HALOs' configs use 625 with `max_length=1250`.
    """

    batch_order: str = field(
        default="trl",
        metadata={
            "help": (
                "`halos` reproduces HALOs' batches (order, dropped examples, truncation, KTO's KL per micro-batch), "
                "`trl` uses every row."
            ),
            "choices": ["trl", "halos"],
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Maximum number of prompt tokens; only with `batch_order=halos`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.batch_order == "halos":
            _check_halos(self)
            return
        require(
            self.max_prompt_length is None, "max_prompt_length", self.max_prompt_length,
            "rows keep their whole prompts with `batch_order='trl'`.",
            "Leave it out, or set `batch_order='halos'`, which truncates as HALOs does.",
        )  # fmt: skip


# Settings that cannot be combined with HALOs' batches, and why.
_NOT_WITH_HALOS = {
    "train_sampling_strategy": "HALOs shuffles with its own random generator.",
    "group_by_length": "HALOs shuffles with its own random generator.",
    "dataloader_drop_last": "HALOs' loaders determine which examples are dropped.",
    "auto_find_batch_size": "a different batch size changes the batches.",
    "truncation_mode": "HALOs truncates turn by turn.",
}


def _check_halos(config: Any) -> None:
    defaults = defaults_of(type(config))
    for name, why in _NOT_WITH_HALOS.items():
        value = getattr(config, name, None)
        require(
            value is None or value == defaults.get(name), name, value, f"`batch_order='halos'` is set, and {why}",
            "Leave it out, or set `batch_order='trl'`.",
        )  # fmt: skip
    for name in ("split_batches", "dispatch_batches"):
        value = getattr(config.accelerator_config, name, None)
        require(
            not value, f"accelerator_config.{name}", value,
            "`batch_order='halos'` is set, which distributes examples over the processes itself.", "Leave it out.",
        )  # fmt: skip
    require(
        not getattr(config, "assistant_only_loss", False), "assistant_only_loss", True,
        "`batch_order='halos'` is set, and HALOs trains on every turn of a completion.",
        "Leave it out, or set `batch_order='trl'`.",
    )  # fmt: skip
    if config.max_prompt_length is None:
        return
    require_count(config, "max_prompt_length", "it counts tokens.")
    require(
        config.max_length is None or config.max_prompt_length < config.max_length, "max_prompt_length",
        config.max_prompt_length, f"`max_length={config.max_length}` includes the completion.",
        "Use a value below `max_length`.",
    )  # fmt: skip
