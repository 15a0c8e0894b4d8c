"""DPO, and TRL's fourteen other DPO losses."""

from __future__ import annotations

from typing import Any

import torch

from .. import losses
from .._trl import Method
from ..configs import DPO_LOSS_FIELDS, DPOConfig, defaults_of
from ..records import LossOutput, PairedLogps
from .loss import BatchTables
from .paired import PairedPreferenceTrainer

_DEFAULTS = defaults_of(DPOConfig)

_READ_BY = {
    "label_smoothing": (
        ("robust", "exo_pair", "aot", "aot_unpaired"),
        "; if a fraction of the labels is flipped, use `CDPOTrainer` and its `epsilon`",
    ),
    "discopop_tau": (("discopop",), ""),
}
"""Options that only some of TRL's losses read: those loss types, and what to use instead."""

_TRL_LOSSES = {
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
}  # fmt: skip
"""The loss types that `_READ_BY` covers; a newer TRL may have more."""

_WITHOUT_ALPHA = ("reverse_kl", "forward_kl", "js_divergence")


class DPOTrainer(PairedPreferenceTrainer[DPOConfig]):
    """DPO (arXiv:2305.18290). A drop-in for `trl.DPOTrainer`: same arguments, same options, same logged values.

    The default loss is computed here. Any option that only TRL has (another `loss_type`, several of them,
    `use_weighting`, `ld_alpha`, `f_divergence_type`) passes the batch to TRL's own loss.
    """

    config_class = DPOConfig
    takes_humanline = True
    takes_precomputed = True
    takes_options = DPO_LOSS_FIELDS
    method = Method(
        name="DPO",
        title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        arxiv="2305.18290",
        citation="""\
@inproceedings{rafailov2023direct,
    title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
    author    = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and
                 Ermon, Stefano and Finn, Chelsea},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2023},
    eprint    = {2305.18290},
}""",
    )
    card_fields = ("loss_type", "loss_weights", "beta", "label_smoothing", "ld_alpha", "f_divergence_type")

    @property
    def uses_trl_loss(self) -> bool:
        """Whether an option is set that only TRL's own loss supports."""
        args = self.args
        return (
            list(args.loss_type) != ["sigmoid"]
            or (args.loss_weights or [1.0]) != [1.0]
            or args.use_weighting
            or args.ld_alpha is not None
            or args.f_divergence_type != "reverse_kl"
        )

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        super().check_arguments(args, model, ref_model)
        if type(self).loss is DPOTrainer.loss:  # a user's own loss may read any option
            _refuse_without_effect(args)

    def mean_loss(self, tables: BatchTables) -> torch.Tensor:
        if self.uses_trl_loss:
            return self.trl_loss(tables.batch, tables.tokens, tables.reference_BT)
        return super().mean_loss(tables)

    def loss(self, record: PairedLogps) -> LossOutput:
        return losses.dpo(record, beta=self.args.beta, humanline=self.args.humanline_clamp)


def _refuse_without_effect(args: DPOConfig) -> None:
    """Refuse options that none of the losses in use reads."""
    named = set(args.loss_type)
    for name, (readers, more) in _READ_BY.items():
        unread = named.isdisjoint(readers) and named <= _TRL_LOSSES
        if getattr(args, name) != _DEFAULTS[name] and unread:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no effect with `loss_type={list(args.loss_type)!r}`. Leave it "
                f"out, or use a loss type that reads it ({', '.join(readers)}){more}."
            )
    name = "f_alpha_divergence_coef"
    if getattr(args, name) != _DEFAULTS[name] and args.f_divergence_type in _WITHOUT_ALPHA:
        raise ValueError(
            f"`{name}={getattr(args, name)!r}` has no effect with `f_divergence_type={args.f_divergence_type!r}`. "
            "Leave it out, or use `f_divergence_type='alpha_divergence'`."
        )
