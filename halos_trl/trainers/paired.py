"""Base trainer for pairs of a chosen and a rejected completion."""

from __future__ import annotations

from typing import Any

import torch

from .._trl import PairedHost
from ..configs import DPO_LOSS_FIELDS, DPOConfig
from ..data.checks import Rows, check_paired_rows
from ..metrics import Sums, accuracy_sums, logps_sums, side_sums, total
from ..records import LossOutput, PairedLogps, check_output
from .base import AlignmentTrainer, ConfigT
from .loss import BatchTables, clamp_sums, loss_sums, repeats_left_out, token_sums


class PairedPreferenceTrainer(AlignmentTrainer[ConfigT], PairedHost):
    """Base class of methods on rows of `chosen` and `rejected` completions (and a `prompt`).

    A new method is a subclass that defines `loss`, which receives a record of per-token log-probs `(B, T)` in nats and
    returns a `LossOutput`. The base class does everything else (loading, adapters, batching, metrics, saving). A
    method without a reference sets `needs_reference = False`, and none is loaded. Extends `trl.DPOTrainer` and takes
    the same arguments.
    """

    config_class = DPOConfig
    loss_fields = DPO_LOSS_FIELDS

    def loss(self, record: PairedLogps) -> LossOutput:
        """The losses `(B,)` of a micro-batch and its rewards."""
        raise NotImplementedError(f"{type(self).__name__} must define `loss(self, record) -> LossOutput`.")

    def record(self, tables: BatchTables) -> PairedLogps:
        """Pairs from tables with the chosen completions first, then the rejected ones."""
        policy_chosen, policy_rejected = tables.tokens.logps_BT.chunk(2)
        chosen_mask, rejected_mask = tables.tokens.mask_BT.chunk(2)
        known = tables.reference_BT
        reference_chosen, reference_rejected = (None, None) if known is None else known.chunk(2)
        return PairedLogps(
            policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_mask, rejected_mask
        )

    def checked(self, output: Any, record: Any) -> LossOutput:
        return check_output(output, (len(record[0]),), "Sum or average over the tokens of a row inside `loss`.")

    def own_rows(self, batch: dict[str, Any]) -> torch.Tensor | None:
        return repeats_left_out(self, batch, sides=2)

    def metric_sums(self, output: LossOutput, tables: BatchTables) -> Sums:
        tokens = tables.tokens
        is_chosen_B = torch.arange(len(tokens.logps_BT), device=tokens.logps_BT.device) < len(tokens.logps_BT) // 2
        sums = loss_sums(output) | accuracy_sums(output) | token_sums(tokens)
        sums |= logps_sums(tokens.logps_BT, is_chosen_B)
        if tokens.mean_logits_BT is not None:
            sums |= side_sums("logits", tokens.mean_logits_BT, tokens.mask_BT, is_chosen_B)
        if tokens.is_top1_BT is not None:
            sums["mean_token_accuracy"] = total(tokens.is_top1_BT.float(), tokens.mask_BT & is_chosen_B[:, None])
        return sums | clamp_sums(tables, is_chosen_B, self.args.humanline_clamp)

    def batch_size(self, batch: dict[str, Any]) -> int:
        return batch["completion_mask"].shape[0] // 2

    def check_rows(self, dataset: Rows, name: str) -> Rows:
        return check_paired_rows(dataset, name, drop_invalid=self.drops_invalid_rows)
