"""Which batches a run is made of: TRL's way, or those of HALOs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .checks import defaults_of, require, require_count


@dataclass
class BatchOrderConfig:
    """The batches of a run.

    Parameters:
        batch_order (`str`, *optional*, defaults to `"trl"`):
            `"halos"` repeats HALOs' batches: its order from `seed`, what it drops, its tokenization and truncation,
            and KTO's KL term for each micro-batch. For reproducing a run of HALOs; `"trl"` uses every row.
        max_prompt_length (`int`, *optional*):
            Tokens that the prompt may take with `batch_order="halos"`. HALOs' configs set 625 of `max_length=1250`.
    """

    batch_order: str = field(
        default="trl",
        metadata={
            "help": "`halos` repeats HALOs' batches (its order, what it drops, its truncation, KTO's KL for each "
            "micro-batch), `trl` uses every row.",
            "choices": ["trl", "halos"],
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens that the prompt may take, with `batch_order=halos` only."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.batch_order == "halos":
            _check_halos(self)
            return
        require(
            self.max_prompt_length is None, "max_prompt_length", self.max_prompt_length,
            "rows keep their whole prompts with `batch_order='trl'`.",
            "Leave it out, or set `batch_order='halos'`, which cuts as HALOs does.",
        )  # fmt: skip


# What does not go together with HALOs' batches, and why.
_NOT_WITH_HALOS = {
    "train_sampling_strategy": "HALOs' order is that of its own generator.",
    "group_by_length": "HALOs' order is that of its own generator.",
    "dataloader_drop_last": "HALOs' loaders decide themselves what they drop.",
    "auto_find_batch_size": "with another batch size the batches are others.",
    "truncation_mode": "HALOs cuts turn by turn.",
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
            "`batch_order='halos'` is set, which deals examples to the processes itself.", "Leave it out.",
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
        config.max_prompt_length, f"`max_length={config.max_length}` counts the completion too.",
        "Use less than `max_length`.",
    )  # fmt: skip
