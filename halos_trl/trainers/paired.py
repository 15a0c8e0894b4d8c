"""Pairs of a chosen and a rejected completion."""

from __future__ import annotations

from typing import Any

import torch

from .._trl import PairedHost, TokenTable
from ..configs import DPO_LOSS_FIELDS, DPOConfig
from ..data.checks import Rows, check_paired_rows
from ..metrics import Sums, accuracy_sums, logps_sums, side_sums, total
from ..records import LossOutput, PairedLogps, check_output
from .base import AlignmentTrainer, ConfigT
from .step import weighted


class PairedPreferenceTrainer(AlignmentTrainer[ConfigT], PairedHost):
    """Base of every method on rows of `chosen` and `rejected` completions (and a `prompt`).

    A new method is a subclass that writes `loss`. It gets a record of per-token log-probs `(B, T)` in nats and returns
    a `LossOutput`; everything else (loading, adapters, batching, metrics, saving) is there. A method that compares
    with no reference says `needs_reference = False`, and none is loaded. Extends `trl.DPOTrainer` and takes the same
    arguments.
    """

    config_class = DPOConfig
    trl_loss_fields = DPO_LOSS_FIELDS

    def loss(self, record: PairedLogps) -> LossOutput:
        """The losses `(B,)` of a micro-batch and its rewards."""
        raise NotImplementedError(f"{type(self).__name__} has to write `loss(self, record) -> LossOutput`.")

    def batch_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        tokens = self.policy_tokens(model, inputs)
        reference_BT = self.reference.log_probs(inputs)
        self.refuse_non_finite(tokens, reference_BT)
        # A collated batch holds the chosen completions first, then the rejected ones.
        pairs, kept = self.batch_size(inputs), self.real_rows(self.batch_size(inputs))
        if kept < pairs:
            index_B = torch.cat([torch.arange(kept), torch.arange(pairs, pairs + kept)]).to(tokens.logps_BT.device)
            tokens = tokens.rows(index_B)
            reference_BT = None if reference_BT is None else reference_BT[index_B]
        is_chosen_B = torch.arange(2 * kept, device=tokens.logps_BT.device) < kept
        output = check_output(self.loss(_pairs(tokens, reference_BT)), kept)
        self.record_metrics(self.loss_sums(output) | accuracy_sums(output) | self._sums(tokens, is_chosen_B))
        self.record_metrics(self.clamp_sums(tokens, reference_BT, is_chosen_B))
        self.count_tokens(inputs)
        loss = output.losses.sum() / max(kept, 1)
        loss = weighted(self.with_aux_loss(loss, tokens), inputs)
        return (loss, self.logits_for_metrics(model, inputs)) if return_outputs else loss

    def _sums(self, tokens: TokenTable, is_chosen_B: torch.Tensor) -> Sums:
        sums = self.token_sums(tokens) | logps_sums(tokens.logps_BT, is_chosen_B)
        if tokens.mean_logits_BT is not None:
            sums |= side_sums("logits", tokens.mean_logits_BT, tokens.mask_BT, is_chosen_B)
        if tokens.is_top1_BT is not None:
            sums["mean_token_accuracy"] = total(tokens.is_top1_BT.float(), tokens.mask_BT & is_chosen_B[:, None])
        return sums

    def batch_size(self, batch: dict[str, Any]) -> int:
        return batch["completion_mask"].shape[0] // 2

    def check_rows(self, dataset: Rows, name: str) -> Rows:
        return check_paired_rows(dataset, name, drop_invalid=self.drops_invalid_rows)


def _pairs(tokens: TokenTable, reference_BT: torch.Tensor | None) -> PairedLogps:
    policy_chosen, policy_rejected = tokens.logps_BT.chunk(2)
    chosen_mask, rejected_mask = tokens.mask_BT.chunk(2)
    reference_chosen, reference_rejected = (None, None) if reference_BT is None else reference_BT.chunk(2)
    return PairedLogps(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_mask, rejected_mask
    )
