"""Base trainer for scored completions, which are grouped by prompt and batched as whole groups."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from datasets import Dataset

from .._trl import CheckedCollator, ScoredHost
from .._trl.halos_order import loader_of_batches
from ..configs import GRPO_LOSS_FIELDS, GRPOConfig
from ..data.checks import Rows
from ..data.group_sampler import GroupBatchSampler, ScoredCollator, StepRows
from ..data.groups import GROUP, ScoreRows, scored_rows, with_advantages
from ..data.halos import HalosBatches, HalosGroupBatches, HalosUnpairedBatches
from ..metrics import Sums, total
from ..records import GroupLogps, LossOutput, check_output
from ..reference import PrecomputedTokens, Reference, at_completion_tokens
from .base import AlignmentTrainer, ConfigT
from .loss import BatchTables, clamp_sums, loss_sums, repeats_left_out, token_sums

logger = get_logger(__name__)


class ScoredTrainer(AlignmentTrainer[ConfigT], ScoredHost):
    """Base class of methods on rows of `prompt`, `completion` and `score`, in any format that `GRPOTrainer` accepts.

    A new method is a subclass that defines `loss`, which receives a record of per-token log-probs `(B, T)` in nats and
    one advantage per completion, relative to all completions of its prompt. It returns a `LossOutput`, whose metrics
    are logged under their names. The base class does everything else (loading, adapters, batching, saving). The losses
    are `(B, T)`, or `(B,)` if the class sets `averages_over = "rows"`. A method without a reference sets
    `needs_reference = False`, and none is loaded. Extends `trl.KTOTrainer` and takes the same arguments; the config is
    `GRPOConfig` or derives from it.
    """

    config_class = GRPOConfig
    loss_fields: ClassVar[tuple[str, ...]] = GRPO_LOSS_FIELDS
    stores_token_logps = True

    averages_over: ClassVar[str] = "tokens"
    """What the losses of an optimizer step are averaged over: `"tokens"` if `loss` returns `(B, T)`, one loss per
    completion token; `"rows"` if it returns `(B,)`, one per completion.
    """

    groups_stay_together: ClassVar[bool] = True
    """Whether all completions of a prompt must be in the same optimizer step."""

    score_rows: ScoreRows | None = None
    """Scores rows that have no score."""

    def loss(self, record: GroupLogps) -> LossOutput:
        """The losses of a micro-batch: `(B, T)` or `(B,)`, depending on `averages_over`."""
        raise NotImplementedError(f"{type(self).__name__} must define `loss(self, record) -> LossOutput`.")

    def after_construction(self) -> None:
        self.data_collator: Any = ScoredCollator(CheckedCollator(self.data_collator))

    def _make_reference(self) -> Reference:
        return PrecomputedTokens() if self.args.precompute_ref_log_probs else super()._make_reference()

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        super().check_arguments(args, model, ref_model)
        if self.averages_over not in ("tokens", "rows"):
            raise ValueError(
                f"`averages_over` of {type(self).__name__} is {self.averages_over!r}. Use 'tokens' for a `loss` that "
                "returns `(B, T)`, or 'rows' for one that returns `(B,)`."
            )
        # Datasets are prepared before the trainer has its `args`. Not all methods compute advantages from groups.
        self._scale_rewards = getattr(args, "scale_rewards", True)
        self._is_sampled = getattr(args, "old_policy", "reference") == "sampler"
        if getattr(args.accelerator_config, "split_batches", False):
            raise ValueError(
                "`accelerator_config={'split_batches': True}` makes `per_device_train_batch_size` the total over "
                f"all processes, but {type(self).__name__} builds the micro-batches of each process itself, from "
                "whole groups. Leave it out, and divide the batch size by the number of processes."
            )

    # -- data --------------------------------------------------------------------------------------------------

    def scored_rows(self, dataset: Rows, name: str) -> Dataset:
        """One row per completion, with its score."""
        return scored_rows(
            dataset, name, self.score_rows, drop_invalid=self.drops_invalid_rows, sampled=self._is_sampled
        )

    def check_rows(self, dataset: Rows, name: str) -> Dataset:
        return with_advantages(self.scored_rows(dataset, name), name, scale_by_std=self._scale_rewards)

    @property
    def passes_per_batch(self) -> int:
        """Number of consecutive optimizer steps that use the same batch."""
        return 1

    @property
    def halos_batches(self) -> type[HalosBatches]:
        """HALOs' data loader for the method."""
        return HalosGroupBatches if self.groups_stay_together else HalosUnpairedBatches

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Micro-batches of this process, from a sampler that accounts for all processes itself."""
        args, data = self.args, self.train_dataset
        if args.batch_order == "halos":
            return super().get_train_dataloader()
        sampler = GroupBatchSampler(
            list(data[GROUP][:]) if self.groups_stay_together else range(len(data)),
            micro_batch_size=self.micro_batch_size,
            micro_batches=args.gradient_accumulation_steps,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            shuffle=args.train_sampling_strategy == "random",
            seed=args.seed if args.data_seed is None else args.data_seed,
            repeats=self.passes_per_batch,
        )
        _report_packing(sampler, len(data))
        if args.remove_unused_columns:
            data = data.select_columns([column for column in self.columns if column in data.column_names])
        return loader_of_batches(self, StepRows(data), sampler)

    # -- the loss of a batch -----------------------------------------------------------------------------------

    def batch_size(self, batch: dict[str, Any]) -> Any:
        """The weight of a micro-batch in its step: the number of its completion tokens, or of its completions."""
        mask_BT = batch["completion_mask"][:, 1:].bool()
        return mask_BT.sum() if self.averages_over == "tokens" else mask_BT.any(-1).sum()

    def own_size(self, batch: dict[str, Any]) -> Any:
        return self.batch_size(self.without_repeats(batch))

    def own_rows(self, batch: dict[str, Any]) -> torch.Tensor | None:
        if self.averages_over == "tokens":
            return repeats_left_out(self, batch)
        # A micro-batch without examples contains a row without a completion, which has no loss.
        return self.without_repeats(batch)["completion_mask"][:, 1:].any(-1).nonzero().flatten()

    def record(self, tables: BatchTables) -> Any:
        advantages_B = tables.of_rows(tables.batch["advantage"])
        tokens, old_BT = tables.tokens, self.sampler_logps(tables)
        return GroupLogps(tokens.logps_BT, tables.reference_BT, tokens.mask_BT, advantages_B, old_BT)

    def sampler_logps(self, tables: BatchTables) -> torch.Tensor | None:
        """Log-probs `(B, T)` in nats of the model that sampled the completions; None if they are not used."""
        if not self._is_sampled:
            return None
        mask_BS = tables.batch["completion_mask"]
        # Over all positions, because the first token of a completion without a prompt is not scored.
        stored_BT = at_completion_tokens(tables.batch["logprobs"], mask_BS)[:, 1:]
        return tables.of_rows(stored_BT)

    def checked(self, output: Any, record: Any) -> LossOutput:
        by_token, shape = self.averages_over == "tokens", record[0].shape
        other = "rows" if by_token else "tokens"
        advice = (
            f"`{type(self).__name__}.averages_over` is {self.averages_over!r}; for losses of shape "
            f"{tuple(shape[:1] if by_token else shape)} set `averages_over = {other!r}` in the class."
        )
        return check_output(output, tuple(shape if by_token else shape[:1]), advice)

    def metric_sums(self, output: LossOutput, tables: BatchTables) -> Sums:
        """Scores and advantages, the forward pass, the clamp, and the loss's own metrics, which are means over what
        the losses are averaged over.
        """
        tokens = tables.tokens
        has_tokens_B = tokens.mask_BT.any(-1)
        sums = {"scores": total(tables.of_rows(tables.batch["score"]), has_tokens_B)} | token_sums(tokens)
        if "advantage" in tables.batch:
            sums["advantages/abs"] = total(tables.of_rows(tables.batch["advantage"]).abs(), has_tokens_B)
        count = tokens.mask_BT.sum() if self.averages_over == "tokens" else has_tokens_B.sum()
        logged = loss_sums(output)
        # The mean over no rows is undefined, but the name is kept, since all processes must have the same names.
        own = {
            name: (mean.double().where(count > 0, 0.0) * count, count)
            for name, mean in output.metrics.items()
            if name in logged
        }
        old_BT = self.sampler_logps(tables)
        if old_BT is not None:
            sums["sampling_logp_difference"] = total((tokens.logps_BT.detach() - old_BT).abs(), tokens.mask_BT)
        return sums | logged | own | clamp_sums(tables, None, self.args.humanline_clamp)

    def count_tokens(self, batch: dict[str, Any]) -> None:
        # A micro-batch without examples contains a few tokens without a completion.
        real_B1 = batch["completion_mask"].any(-1, keepdim=True)
        super().count_tokens({"attention_mask": batch["attention_mask"] * real_B1})


def _report_packing(sampler: GroupBatchSampler, rows: int) -> None:
    """Warn if the group sizes do not fit the size of a step."""
    if sampler.oversized:
        logger.warning(
            f"{sampler.oversized} groups of the train dataset have more completions than fit into an optimizer step "
            f"({sampler.step_size}), so they are split over several steps. Their advantages are still relative to "
            "the whole group. Raise `gradient_accumulation_steps` to keep them together."
        )
    fill, needed = rows / (sampler.steps * sampler.step_size), math.ceil(rows / sampler.step_size)
    if fill < 3 / 4 and sampler.steps > needed:  # a last step with fewer examples is normal
        logger.warning(
            f"Optimizer steps have {fill:.0%} of up to {sampler.step_size} completions, because groups stay whole: "
            f"an epoch takes {sampler.steps} steps, although {needed} would suffice for all rows. Choose "
            "`per_device_train_batch_size` and `gradient_accumulation_steps` so that a step (their product over all "
            "processes) is a multiple of the usual group size, or several times as large."
        )


__all__ = ["ScoredTrainer"]
