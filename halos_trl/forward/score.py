"""One forward pass: the per-token table of a collated batch, from packed rows or from padded ones.

The callers see tables `(B, T)` only and do not depend on how they were computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from .attention import packed_forward
from .heads import reads_wanted, wanted_positions
from .layout import TokenLayout, shared_prompt_layout, table
from .packing import both_ways, language_model, packing_of

STEP_SHARE = "halos_trl_step_share"
"""Key of a training batch for information about its optimizer step."""

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
    """Per-token results of one forward pass for the completion tokens.

    All tables are `(B, T)` with `T` = sequence length - 1: position `t` scores token `t + 1`; positions outside
    `mask_BT` hold 0. Log-probs are in nats. Columns that were not requested are None.
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
        """The table of the selected rows."""
        tables = {n: t[index] for n, t in self._asdict().items() if t is not None and n != "aux_loss"}
        return self._replace(**tables)


def score_tokens(model: torch.nn.Module, batch: dict[str, Any], *, output_router_logits: bool = False) -> TokenTable:
    """Log-probs of the completion tokens of a collated batch, through TRL's fused LM head.

    Rows are packed if the model's `Packing` allows it, which is decided by comparing its first batch with padded rows.
    """
    packing = packing_of(model)
    packed = packing is not None and packing.serves(model_inputs(batch), lambda: _difference(model, batch))
    return (_packed if packed else _padded)(model, batch, output_router_logits)


def score_together(model: torch.nn.Module, batches: list[dict[str, Any]]) -> list[Tensor]:
    """Log-probs `(B, T)` in nats of the completion tokens of several batches.

    Packed rows take one forward pass with one layout, so that prompts shared by several batches are computed once;
    padded rows take one forward pass per batch.
    """
    packing, first = packing_of(model), batches[0]
    packed = packing is not None and all(packing.takes(model_inputs(batch)) for batch in batches)
    # Also before the first batch decides about packing, so that a resumed run joins the same batches.
    if not (packed and packing and packing.serves(model_inputs(first), lambda: _difference(model, first))):
        return [score_tokens(model, batch).logps_BT for batch in batches]
    tables = score_tokens(model, _joined(batches)).logps_BT.split([len(batch["input_ids"]) for batch in batches])
    return [table[:, : batch["input_ids"].shape[1] - 1] for table, batch in zip(tables, batches, strict=True)]


def _joined(batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The rows of all batches as one batch, padded on the right with masked tokens."""
    width = max(batch["input_ids"].shape[1] for batch in batches)

    def column(name: str) -> Tensor:
        return torch.cat([pad(batch[name], (0, width - batch[name].shape[1])) for batch in batches])

    return {name: column(name) for name in ("input_ids", "attention_mask", "completion_mask")}


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs in a collated batch."""
    return {k: v for k, v in batch.items() if k not in NOT_MODEL_INPUTS and not k.startswith("KL_")}


# Policy, reference and rollout read the same batch; a layout is freed together with its batch.
_layouts: Any = WeakTensorKeyDictionary()


def layout_of(batch: dict[str, Any]) -> TokenLayout:
    """The batch's layout, computed once for all forward passes over it."""
    ids, attended, mask = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    versions = [None if t.is_inference() else t._version for t in (ids, attended, mask)]
    known = _layouts.get(mask)
    # Another batch may use the same mask tensor, and a batch may be changed in place.
    if known is None or known.ids is not ids or known.attended is not attended or known.versions != versions:
        known = _Known(shared_prompt_layout(ids, attended, mask), ids, attended, versions)
        _layouts[mask] = known
    return known.layout


class _Known(NamedTuple):
    """A cached layout, and the inputs it was made from, in addition to the mask that is the cache key."""

    layout: TokenLayout
    ids: Tensor
    attended: Tensor
    versions: list[int | None]


def _packed(model: torch.nn.Module, batch: dict[str, Any], output_router_logits: bool) -> TokenTable:
    layout = layout_of(batch)
    inputs: dict[str, Any] = {"output_router_logits": True} if output_router_logits else {}
    with packed_forward(), wanted_positions(torch.zeros_like(layout.wanted), layout.wanted):
        outputs = model(
            input_ids=layout.input_ids,
            position_ids=layout.position_ids,
            layout=layout,
            use_cache=False,
            shift_labels=layout.labels[None],
            fused_lm_head=True,
            **inputs,
        )
    return _wanted_table(outputs, layout.mask_BT)


def _padded(model: torch.nn.Module, batch: dict[str, Any], output_router_logits: bool) -> TokenTable:
    inputs = model_inputs(batch) | ({"output_router_logits": True} if output_router_logits else {})
    mask_BT = batch["completion_mask"][:, 1:].bool()
    # Each replica of `DataParallel` runs in its own thread on a part of the rows.
    if not reads_wanted(language_model(model)) or isinstance(model, torch.nn.DataParallel):
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        outputs = model(**inputs, use_cache=False, labels=labels, fused_lm_head=True)
        # Prompt-learning adapters prepend virtual tokens.
        return _table_of(outputs, lambda values_BS: values_BS[:, -mask_BT.shape[1] :], mask_BT)
    rows, positions = mask_BT.nonzero(as_tuple=True)
    with wanted_positions(rows, positions - batch["input_ids"].shape[1]):  # negative for the same reason
        labels = batch["input_ids"][:, 1:][mask_BT]
        outputs = model(**inputs, use_cache=False, shift_labels=labels[None], fused_lm_head=True)
    return _wanted_table(outputs, mask_BT)


def _wanted_table(outputs: Any, mask_BT: Tensor) -> TokenTable:
    return _table_of(outputs, lambda values_1M: table(values_1M[0], mask_BT), mask_BT)


def _table_of(outputs: Any, as_table: Callable[[Tensor], Tensor], mask_BT: Tensor) -> TokenTable:
    def column(values: Tensor | None) -> Tensor | None:
        return None if values is None else as_table(values)

    return TokenTable(
        as_table(outputs.log_probs),
        mask_BT,
        column(outputs.entropy),
        column(outputs.mean_logits),
        column(outputs.is_top1),
        outputs.aux_loss,
        column(getattr(outputs, "state_values", None)),
        column(outputs.log_sum_sq_probs),
    )


def _difference(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """Absolute difference of packed and padded rows at each wanted token, in nats, and number of layers that used the
    packed row.
    """
    layout = layout_of(batch)
    layout.seen_by.clear()  # layers of another model, which ran on the same batch
    padded_BT, packed_BT = both_ways(
        model, lambda: _padded(model, batch, False).logps_BT, lambda: _packed(model, batch, False).logps_BT
    )
    return (packed_BT - padded_BT)[layout.mask_BT].abs().float(), len(layout.seen_by)


__all__ = [
    "NOT_MODEL_INPUTS",
    "STEP_SHARE",
    "TokenTable",
    "layout_of",
    "model_inputs",
    "score_together",
    "score_tokens",
]
