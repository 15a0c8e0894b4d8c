"""From a collated batch to its loss, in the same way for every method.

    batch -> policy and reference -> record -> loss -> metrics -> mean -> weight in the optimizer step

The functions in this module implement this pipeline. Methods differ only in the hooks that it calls on a trainer:
`record`, `loss`, `checked`, `own_rows` and `metric_sums`, defined in the class of the method or in its public base
class, and `prepare_step` for what is computed before the forward passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import metrics
from .._trl import TokenTable
from ..humanline import Humanline, log_ratios, unclamped_counts
from ..logprobs import apply_mask
from ..metrics import Sums
from ..records import LossOutput
from .step import share_in, weighted, without_share

if TYPE_CHECKING:
    from .base import AlignmentTrainer


class BatchTables(NamedTuple):
    """A collated batch with the outputs of the models.

    `reference_BT` holds log-probs in nats like `tokens.logps_BT`, or is None without a reference. `prepared` is what
    the method computed beforehand: KTO's KL estimate, PPO's rollout.
    """

    batch: dict[str, Any]
    tokens: TokenTable
    reference_BT: Any
    prepared: Any = None
    index_B: torch.Tensor | None = None
    """Which rows of the batch the tables contain; None for all."""

    def rows(self, index_B: torch.Tensor | None) -> BatchTables:
        """The tables of the selected rows; of all rows for None."""
        if index_B is None:
            return self
        index_B = index_B.to(self.tokens.logps_BT.device)
        reference_BT = None if self.reference_BT is None else self.reference_BT[index_B]
        return self._replace(tokens=self.tokens.rows(index_B), reference_BT=reference_BT, index_B=index_B)

    def of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Select from a tensor with one entry per row of the batch those of the rows in the tables."""
        return values if self.index_B is None else values[self.index_B]


def batch_loss(
    trainer: AlignmentTrainer[Any], model: Any, inputs: dict[str, Any], return_outputs: bool = False
) -> Any:
    """The loss of a collated batch, weighted by its share of the optimizer step, as `compute_loss` returns it.

    It depends only on the batch, the weights and the random state, so a second call gives the same loss.
    """
    share, batch = share_in(inputs), without_share(inputs)
    prepared = trainer.prepare_batch(batch) if share is None else share.prepared
    tables = batch_tables(trainer, model, batch, prepared)
    loss = weighted(trainer.mean_loss(tables), inputs)
    return (loss, trainer.logits_for_metrics(model, batch)) if return_outputs else loss


def batch_tables(trainer: AlignmentTrainer[Any], model: Any, batch: dict[str, Any], prepared: Any) -> BatchTables:
    """The forward passes. Raises ValueError if a model gives NaN or infinite log-probs."""
    tokens = trainer.policy_tokens(model, batch)
    reference_BT = trainer.reference_logps(batch, prepared)
    trainer.refuse_non_finite(tokens, reference_BT)
    return BatchTables(batch, tokens, reference_BT, prepared)


def mean_loss(trainer: AlignmentTrainer[Any], tables: BatchTables) -> torch.Tensor:
    """The method's loss of a batch, averaged over its rows or tokens. Records its metrics.

    The mean is 0, with a gradient of 0, if there is nothing to average over.
    """
    own = tables.rows(trainer.own_rows(tables.batch))
    record = trainer.record(own)
    output = trainer.checked(trainer.loss(record), record)
    trainer.record_metrics(trainer.metric_sums(output, own))
    loss = mean(output.losses, own.tokens.mask_BT)
    if not trainer.aux_loss_enabled:
        return loss
    return loss + trainer.router_aux_loss_coef * tables.tokens.aux_loss  # that balances a mixture of experts


def mean(losses: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean of losses `(B,)` over rows or pairs, or of losses `(B, T)` over completion tokens."""
    if losses.ndim == 1:
        return losses.sum() / max(len(losses), 1)
    return apply_mask(losses, mask_BT).sum() / mask_BT.sum().clamp(min=1)


def repeats_left_out(trainer: AlignmentTrainer[Any], batch: dict[str, Any], sides: int = 1) -> torch.Tensor | None:
    """Indices of the rows, without those that accelerate repeats to fill the last evaluation batch; None for all.

    A batch contains all rows of one side, then those of the other: the chosen completions, then the rejected ones.
    """
    size = len(batch["completion_mask"]) // sides
    kept = trainer.real_rows(size)
    if kept == size:
        return None
    return torch.cat([torch.arange(side * size, side * size + kept) for side in range(sides)])


# -- metrics -------------------------------------------------------------------------------------------------------

_UNCLAMPED = ("unclamped", "unclamped/chosen", "unclamped/rejected")


def loss_sums(output: LossOutput) -> Sums:
    """Sums of the rewards and of the method's own metrics."""
    # A micro-batch's unclamped fraction cannot be averaged; `clamp_sums` logs its parts instead.
    return {name: sums for name, sums in metrics.loss_sums(output).items() if name not in _UNCLAMPED}


def clamp_sums(tables: BatchTables, is_chosen_B: torch.Tensor | None, humanline: Humanline | None) -> Sums:
    """Under humanline, the counts for the unclamped fraction: of all tokens, and of each side if the method
    has sides.
    """
    if humanline is None:
        return {}
    ratios_BT, _ = log_ratios(tables.tokens.logps_BT, tables.reference_BT, tables.tokens.mask_BT)
    if is_chosen_B is None:
        return {"unclamped": unclamped_counts(ratios_BT, humanline)}
    return metrics.unclamped_sums(ratios_BT, is_chosen_B, humanline)


def token_sums(tokens: TokenTable) -> Sums:
    """Metrics of the forward pass that every method logs."""
    sums: Sums = {}
    if tokens.entropy_BT is not None:
        sums["entropy"] = metrics.total(tokens.entropy_BT, tokens.mask_BT)
    if tokens.aux_loss is not None:
        sums["aux_loss"] = metrics.total(tokens.aux_loss.reshape(1))
    return sums


__all__ = [
    "BatchTables",
    "batch_loss",
    "batch_tables",
    "clamp_sums",
    "loss_sums",
    "mean",
    "mean_loss",
    "repeats_left_out",
    "token_sums",
]
