"""Collators that add to batches of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Rows = list[dict[str, Any]]


class TurnMaskCollator:
    """Removes the tokens that the assistant did not write from the `completion_mask` of another collator.

    `<side>_mask` of the rows marks which tokens of a completion are the assistant's. However a batch was truncated and
    padded, the ones in a row's `completion_mask` are the first tokens of its completion, or the last ones with
    `keep_end`.
    """

    def __init__(self, collate: Callable[[Rows], dict[str, Any]], sides: tuple[str, ...], *, keep_end: bool = False):
        self.collate = collate
        self.sides = sides
        self.keep_end = keep_end

    def __call__(self, rows: Rows) -> dict[str, Any]:
        batch = self.collate(rows)
        masks = [row[f"{side}_mask"] for side in self.sides for row in rows]  # chosen first, then rejected
        batch["completion_mask"] = self._restricted(batch["completion_mask"], masks)
        if "KL_completion_mask" in batch and "KL_mask" in rows[0]:
            batch["KL_completion_mask"] = self._restricted(
                batch["KL_completion_mask"], [row["KL_mask"] for row in rows]
            )
        return batch

    def _restricted(self, mask_BS: torch.Tensor, is_trained: list[list[bool]]) -> torch.Tensor:
        mask_BS = mask_BS.clone()
        for mask_S, trained in zip(mask_BS, is_trained, strict=True):
            at = mask_S.nonzero().flatten()
            kept = trained[len(trained) - len(at) :] if self.keep_end else trained[: len(at)]
            mask_S[at] = torch.tensor(kept, dtype=mask_S.dtype)
        return mask_BS


__all__ = ["TurnMaskCollator"]
