"""References stored with the dataset (`precompute_ref_log_probs`)."""

from __future__ import annotations

from typing import Any

import torch

from .sources import Reference


class PrecomputedColumn(Reference):
    """Log-probs that TRL summed over each completion and stored with the dataset.

    Only sums are known. They are spread evenly over the completion tokens, which is exact for losses that use sums but
    not for those that use single tokens; humanline does, so it cannot be combined with `precompute_ref_log_probs`.
    """

    def log_probs(self, batch: dict[str, Any]) -> torch.Tensor:
        if "ref_chosen_logps" in batch:
            sums_B = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        else:
            sums_B = batch["ref_logps"]
        return spread_evenly(sums_B, batch["completion_mask"][:, 1:])

    def log_probs_of(self, batches: list[dict[str, Any]]) -> list[torch.Tensor]:
        return [self.log_probs(batch) for batch in batches]


def spread_evenly(sums_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """A table `(B, T)` with these row sums, constant over the completion tokens of a row."""
    mask_BT = mask_BT.to(sums_B.dtype)
    return mask_BT * (sums_B / mask_BT.sum(-1).clamp(min=1))[:, None]


class PrecomputedTokens(Reference):
    """Reference log-probs of every completion token, stored with the dataset."""

    def log_probs(self, batch: dict[str, Any]) -> torch.Tensor:
        return at_completion_tokens(batch["ref_logps"], batch["completion_mask"][:, 1:])


def at_completion_tokens(stored_BW: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Scatter each row's left-aligned numbers to its completion tokens, where the mask is set; 0 elsewhere."""
    mask_BT = mask_BT.bool()
    # The k-th completion token of a row is stored in the k-th column.
    column_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    return stored_BW.gather(1, column_BT).where(mask_BT, 0.0)


__all__ = ["PrecomputedColumn", "PrecomputedTokens", "at_completion_tokens", "spread_evenly"]
