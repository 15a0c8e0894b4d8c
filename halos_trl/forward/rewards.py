"""One forward pass of a reward model: a score for each sequence of a batch, from packed rows or from padded ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import packed_forward
from .heads import wanted_scores
from .layout import Layout, shared_prefix_layout
from .packing import both_ways, language_model, packing_of

_NO_MODEL_INPUTS = {"margin", "use_cache"}


def score_sequences(model: torch.nn.Module, batch: dict[str, Any]) -> Any:
    """The outputs of a sequence classifier for a collated batch; `logits` is `(B, labels)`.

    Rows are packed if the model's `Packing` allows it, which is decided by comparing its first batch with padded rows.
    """
    packing = packing_of(model)
    inputs = {name: value for name, value in batch.items() if name not in _NO_MODEL_INPUTS}
    if packing is not None and packing.serves(inputs, lambda: _difference(model, batch)):
        return _packed(model, _layout_of(model, batch))
    return model(**batch)


def _layout_of(model: torch.nn.Module, batch: dict[str, Any]) -> Layout:
    ids_BS, attention_mask = batch["input_ids"], batch.get("attention_mask")
    # As in transformers' classifiers: the last token that is not the padding token, regardless of the mask.
    config: Any = language_model(model).config
    real_BS = ids_BS != config.get_text_config().pad_token_id
    columns = torch.arange(ids_BS.shape[1], device=ids_BS.device)
    last_B = (columns * real_BS).argmax(-1)
    mask_BS = torch.ones_like(ids_BS) if attention_mask is None else attention_mask
    return shared_prefix_layout(ids_BS, mask_BS, last_B.tolist())


def _packed(model: torch.nn.Module, layout: Layout) -> Any:
    with packed_forward(), wanted_scores(layout.wanted):
        return model(input_ids=layout.input_ids, position_ids=layout.position_ids, layout=layout, use_cache=False)


def _difference(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """Absolute difference of the scores of packed and padded rows, and number of layers that used the packed row."""
    layout = _layout_of(model, batch)
    padded, packed = both_ways(
        model, lambda: model(**batch | {"use_cache": False}).logits, lambda: _packed(model, layout).logits
    )
    size = padded.float().abs().mean().clamp(min=1)
    return (packed.float() - padded.float()).abs().flatten() / size, len(layout.seen_by)


__all__ = ["score_sequences"]
