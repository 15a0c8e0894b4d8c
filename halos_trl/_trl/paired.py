"""`trl.DPOTrainer` behind the door, and TRL's own DPO losses under the humanline clamp."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer as HostTrainer

from ..humanline import Humanline, clamp, log_ratios
from ..metrics import logps_sums, unclamped_sums
from .host import TrainerHost
from .overridden import overridden


class PairedHost(TrainerHost, HostTrainer):
    """`trl.DPOTrainer` behind the door."""

    trl_class = HostTrainer
    sides = ("chosen", "rejected")

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probs of the chosen and of the rejected completions, summed as TRL's losses want them."""
        known = _Answering(self.reference_table(model, inputs))
        with overridden(self, ref_model=known):  # so that no adapter is switched for it
            return HostTrainer.compute_ref_log_probs(self, known, inputs)

    def trl_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> tuple[torch.Tensor, Any]:
        """TRL's own DPO loss of a micro-batch (it logs by itself), under the humanline clamp where that is on.

        The clamp is a statement about log-probs: the policy's becomes reference + clamped log-ratio. So TRL gets a
        model that answers with clamped log-probs, and reference sums that are already there; whatever its loss types
        do with the two stays TRL's.
        """
        humanline = self.args.humanline_clamp
        if self.args.precompute_ref_log_probs:
            result = HostTrainer._compute_loss(self, model, inputs, return_outputs)
            return result if return_outputs else (result, None)
        # TRL would switch the adapter off by itself, which leaves what trains outside of it.
        reference_BT = self.reference.log_probs(inputs)
        known = _Answering(reference_BT)
        with overridden(self, ref_model=known):  # so that no adapter is switched for it
            sums = HostTrainer.compute_ref_log_probs(self, known, inputs)
        inputs = {**inputs, "ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}
        if humanline is None:
            with overridden(self, precompute_ref_logps=True):
                result = HostTrainer._compute_loss(self, model, inputs, return_outputs)
            return result if return_outputs else (result, None)
        clamped = _Clamped(model, reference_BT, inputs["completion_mask"][:, 1:], humanline)
        with overridden(self, precompute_ref_logps=True):
            loss = HostTrainer._compute_loss(self, clamped, inputs, False)
        is_chosen_B = torch.arange(len(reference_BT), device=reference_BT.device) < len(reference_BT) // 2
        # TRL would log the log-probs that it was given; those of the policy stand in for them.
        self.record_metrics(logps_sums(clamped.policy_BT, is_chosen_B))
        self.record_metrics(unclamped_sums(clamped.ratios_BT, is_chosen_B, humanline))
        return loss, self.logits_for_metrics(model, inputs) if return_outputs else None


class _Answering:
    """Stands in for a model whose log-probs are already known."""

    def __init__(self, logps_BT: torch.Tensor):
        self.log_probs = logps_BT

    def __call__(self, **inputs: Any) -> _Answering:
        return self


class _Clamped:
    """A policy whose per-token log-probs are reference + clamped log-ratio."""

    def __init__(self, model: Any, reference_BT: torch.Tensor, mask_BT: torch.Tensor, humanline: Humanline):
        self.model = model
        self.reference_BT = reference_BT
        self.mask_BT = mask_BT
        self.humanline = humanline

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        policy_BT = outputs.log_probs[:, -self.mask_BT.shape[1] :]
        ratios_BT, _ = log_ratios(policy_BT, self.reference_BT, self.mask_BT)
        self.policy_BT, self.ratios_BT = policy_BT.detach(), ratios_BT.detach()
        outputs.log_probs = self.reference_BT + clamp(ratios_BT, self.humanline)
        return outputs
