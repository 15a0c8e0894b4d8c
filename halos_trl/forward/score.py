"""One forward pass: the per-token table of a collated batch, through TRL's fused LM head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

STEP_SHARE = "halos_trl_step_share"
"""Under this name a training batch holds what it has to know about its optimizer step."""

NOT_MODEL_INPUTS = {
    STEP_SHARE,
    "completion_mask",
    "label",
    "score",
    "advantage",
    "ref_logps",
    "ref_KL_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
}


class TokenTable(NamedTuple):
    """What one forward pass says about the completion tokens.

    All tables are `(B, T)` with `T` = sequence length - 1: position `t` scores token `t + 1`; positions outside
    `mask_BT` hold 0. Log-probs in nats. `None` where the model was not asked for the column.
    """

    logps_BT: torch.Tensor
    mask_BT: torch.Tensor
    entropy_BT: torch.Tensor | None = None
    mean_logits_BT: torch.Tensor | None = None
    is_top1_BT: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    values_BT: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> TokenTable:
        """Some of the rows."""
        tables = {n: t[index] for n, t in self._asdict().items() if t is not None and n != "aux_loss"}
        return self._replace(**tables)


def score_tokens(model: torch.nn.Module, batch: dict[str, Any], *, output_router_logits: bool = False) -> TokenTable:
    """Log-probs of the completion tokens of a collated batch, through TRL's fused LM head."""
    inputs = {k: v for k, v in batch.items() if k not in NOT_MODEL_INPUTS and not k.startswith("KL_")}
    if output_router_logits:
        inputs["output_router_logits"] = True
    mask_BT = batch["completion_mask"][:, 1:].bool()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outputs = model(**inputs, use_cache=False, labels=labels, fused_lm_head=True)

    def real_positions(table: torch.Tensor | None) -> torch.Tensor | None:
        # Prompt-learning adapters prepend virtual tokens.
        return None if table is None else table[:, -mask_BT.shape[1] :]

    logps_BT = real_positions(outputs.log_probs)
    assert logps_BT is not None
    return TokenTable(
        logps_BT,
        mask_BT,
        real_positions(outputs.entropy),
        real_positions(outputs.mean_logits),
        real_positions(outputs.is_top1),
        outputs.aux_loss,
        real_positions(getattr(outputs, "state_values", None)),
    )
