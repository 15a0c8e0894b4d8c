"""Access to private parts of `trl.KTOTrainer`, for scored completions."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from trl import KTOTrainer as HostTrainer

from .host import TrainerHost


class ScoredHost(TrainerHost, HostTrainer):
    """Host of the methods on scored completions: `trl.KTOTrainer`'s tokenization, models and saving, not its loss.

    TRL precomputes one summed reference log-prob per completion. Here `ref_logps` holds one number per completion
    token, with as many columns as the longest completion of the dataset has tokens. TRL's disk cache, fingerprints
    and distribution over processes are still used.
    """

    trl_class = HostTrainer
    sides = ("completion",)
    columns: ClassVar[tuple[str, ...]] = (
        "prompt_ids", "completion_ids", "completion_mask", "label", "score", "advantage", "logprobs",
        "ref_logps",
    )  # fmt: skip
    """The columns of a prepared row that are added to a batch."""

    def _hidden_from_trl(self, args: Any) -> dict[str, Any]:
        # The only loss type for which TRL prepares no KL partners.
        return {**super()._hidden_from_trl(args), "loss_type": "apo_zero_unpaired"}

    @property
    def micro_batch_size(self) -> int:
        """Maximum number of examples in a micro-batch, which `auto_find_batch_size` may have lowered."""
        return self._train_batch_size

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.columns)
        super()._set_signature_columns_if_needed()

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        limit = sys.maxsize if self.args.max_length is None else self.args.max_length
        lengths = zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)
        self._precomputed_width = max(min(len(p) + len(c), limit) - len(p) for p, c in lengths)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, None]:
        """Reference log-probs of the completion tokens, `(B, longest completion)`, left-aligned and padded with 0."""
        table_BT = self.reference_table(model, inputs)
        mask_BT = inputs["completion_mask"][:, 1:].bool()
        packed_BW = table_BT.new_zeros(len(mask_BT), self._precomputed_width)
        for row, (logps_T, mask_T) in enumerate(zip(table_BT, mask_BT, strict=True)):
            own = logps_T[mask_T]
            packed_BW[row, : len(own)] = own
        return packed_BW, None
