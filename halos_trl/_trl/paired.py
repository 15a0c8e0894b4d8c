"""Access to private parts of `trl.DPOTrainer`, and TRL's DPO losses with the humanline clamp."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer as HostTrainer

from ..forward.score import TokenTable
from ..humanline import clamp, log_ratios
from ..metrics import logps_sums, unclamped_sums
from .host import TrainerHost
from .overridden import overridden


class PairedHost(TrainerHost, HostTrainer):
    """Host of the paired methods, based on `trl.DPOTrainer`."""

    trl_class = HostTrainer
    sides = ("chosen", "rejected")

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed reference log-probs of the chosen and of the rejected completions, for TRL's losses."""
        sums = self._sums_of_sides(self.reference_table(model, inputs), inputs)
        return self.in_stored_form(sums, inputs)

    def _sums_of_sides(self, logps_BT: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        known = _Answer(TokenTable(logps_BT, inputs["completion_mask"][:, 1:]))
        with overridden(self, ref_model=known):  # so that TRL does not switch adapters
            return HostTrainer.compute_ref_log_probs(self, known, inputs)

    def trl_loss(self, inputs: dict[str, Any], tokens: TokenTable, reference_BT: torch.Tensor) -> torch.Tensor:
        """TRL's own DPO loss of a micro-batch, which also logs its metrics, with the humanline clamp if it is on.

        TRL receives precomputed values instead of a model: the policy's token table and the reference's sums. The
        clamp replaces the policy's log-probs by reference + clamped log-ratio, so it works with any of TRL's loss
        types.
        """
        humanline = self.args.humanline_clamp
        ratios_BT, _ = log_ratios(tokens.logps_BT, reference_BT, tokens.mask_BT)
        answer = _Answer(tokens)
        if humanline is not None:
            answer.log_probs = reference_BT + clamp(ratios_BT, humanline)
        if not self.args.precompute_ref_log_probs:
            sums = self._sums_of_sides(reference_BT, inputs)
            inputs = {**inputs, "ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}
        with overridden(self, precompute_ref_logps=True):
            loss = HostTrainer._compute_loss(self, answer, inputs, False)
        if humanline is not None:
            is_chosen_B = torch.arange(len(reference_BT), device=reference_BT.device) < len(reference_BT) // 2
            # TRL would log the clamped log-probs; log the policy's own instead.
            self.record_metrics(logps_sums(tokens.logps_BT.detach(), is_chosen_B))
            self.record_metrics(unclamped_sums(ratios_BT.detach(), is_chosen_B, humanline))
        return loss


class _Answer:
    """Replaces a model in TRL's loss and returns an existing token table."""

    def __init__(self, tokens: TokenTable):
        self.log_probs = tokens.logps_BT
        self.entropy = tokens.entropy_BT
        self.log_sum_sq_probs = tokens.log_sum_sq_probs_BT
        self.mean_logits = tokens.mean_logits_BT
        self.is_top1 = tokens.is_top1_BT
        self.aux_loss = tokens.aux_loss

    def __call__(self, **inputs: Any) -> _Answer:
        return self
