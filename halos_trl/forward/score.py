"""One forward pass: the per-token table of a collated batch, from packed rows or from padded ones.

The one border between batches and models. Whatever is above it sees tables `(B, T)` and does not know how they were
made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .attention import PackedForwardError, packed_forward
from .layout import Layout, shared_prompt_layout
from .packing import packing_of, wanted_positions, without_dropout

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

    logps_BT: Tensor
    mask_BT: Tensor
    entropy_BT: Tensor | None = None
    mean_logits_BT: Tensor | None = None
    is_top1_BT: Tensor | None = None
    aux_loss: Tensor | None = None
    values_BT: Tensor | None = None
    log_sum_sq_probs_BT: Tensor | None = None

    def rows(self, index: Tensor) -> TokenTable:
        """Some of the rows."""
        tables = {n: t[index] for n, t in self._asdict().items() if t is not None and n != "aux_loss"}
        return self._replace(**tables)


def score_tokens(model: torch.nn.Module, batch: dict[str, Any], *, output_router_logits: bool = False) -> TokenTable:
    """Log-probs of the completion tokens of a collated batch, through TRL's fused LM head.

    Rows are packed where the model's `Packing` says so; its first batch decides, by a comparison with padded rows.
    """
    packing = packing_of(model)
    if packing is not None and packing.takes(model_inputs(batch)):
        if packing.is_open:
            packing.decide(lambda: _difference(model, batch))
        if packing.active:
            return _packed(model, batch, output_router_logits)
    return _padded(model, batch, output_router_logits)


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a collated batch the model reads."""
    return {k: v for k, v in batch.items() if k not in NOT_MODEL_INPUTS and not k.startswith("KL_")}


# Policy, reference and rollout read the same batch; the layout goes when the batch goes.
_layouts: Any = WeakTensorKeyDictionary()


def layout_of(batch: dict[str, Any]) -> Layout:
    """The batch's layout, made once for all forward passes over it."""
    mask = batch["completion_mask"]
    if mask not in _layouts:
        _layouts[mask] = shared_prompt_layout(batch["input_ids"], batch["attention_mask"], mask)
    return _layouts[mask]


def _packed(model: torch.nn.Module, batch: dict[str, Any], output_router_logits: bool) -> TokenTable:
    layout = layout_of(batch)
    inputs: dict[str, Any] = {"output_router_logits": True} if output_router_logits else {}
    with packed_forward(), wanted_positions(layout.wanted):
        outputs = model(
            input_ids=layout.input_ids,
            position_ids=layout.position_ids,
            layout=layout,
            use_cache=False,
            shift_labels=layout.labels[None],
            fused_lm_head=True,
            **inputs,
        )

    def table(values_1M: Tensor | None) -> Tensor | None:
        return None if values_1M is None else layout.table(values_1M[0])

    return _table_of(outputs, table, layout.mask_BT)


def _padded(model: torch.nn.Module, batch: dict[str, Any], output_router_logits: bool) -> TokenTable:
    inputs = model_inputs(batch)
    if output_router_logits:
        inputs["output_router_logits"] = True
    mask_BT = batch["completion_mask"][:, 1:].bool()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outputs = model(**inputs, use_cache=False, labels=labels, fused_lm_head=True)

    def table(values: Tensor | None) -> Tensor | None:
        # Prompt-learning adapters prepend virtual tokens.
        return None if values is None else values[:, -mask_BT.shape[1] :]

    return _table_of(outputs, table, mask_BT)


def _table_of(outputs: Any, table: Any, mask_BT: Tensor) -> TokenTable:
    return TokenTable(
        table(outputs.log_probs),
        mask_BT,
        table(outputs.entropy),
        table(outputs.mean_logits),
        table(outputs.is_top1),
        outputs.aux_loss,
        table(getattr(outputs, "state_values", None)),
        table(outputs.log_sum_sq_probs),
    )


@torch.no_grad()
def _difference(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """How far packed and padded rows are apart at each wanted token, nats, and how many layers saw the packed row."""
    layout = layout_of(batch)
    with without_dropout(model):
        padded_BT = _padded(model, batch, False).logps_BT
        try:
            packed_BT = _packed(model, batch, False).logps_BT
        except (PackedForwardError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the code of a model does with arguments that it does not know
            raise PackedForwardError(f"it fails on a packed row ({type(error).__name__}: {error})") from error
    return (packed_BT - padded_BT)[layout.mask_BT].abs().float(), len(layout.seen_by)


__all__ = ["NOT_MODEL_INPUTS", "STEP_SHARE", "TokenTable", "layout_of", "model_inputs", "score_tokens"]
