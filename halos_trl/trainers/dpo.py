"""DPO, and through TRL its fourteen relatives."""

from __future__ import annotations

from typing import Any

import torch

from .. import losses
from .._trl import Method
from ..configs import DPO_LOSS_FIELDS, DPOConfig
from ..records import LossOutput, PairedLogps
from .paired import PairedPreferenceTrainer
from .step import weighted, without_share


class DPOTrainer(PairedPreferenceTrainer):
    """DPO (arXiv:2305.18290). A drop-in for `trl.DPOTrainer`: same arguments, same options, same logged values.

    The default loss is computed here. Any option that only TRL has (another `loss_type`, several of them,
    `use_weighting`, `ld_alpha`, `f_divergence_type`) hands the batch to TRL's own loss.
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
        """Whether an option is set that only TRL's own loss has."""
        args = self.args
        return (
            list(args.loss_type) != ["sigmoid"]
            or (args.loss_weights or [1.0]) != [1.0]
            or args.use_weighting
            or args.ld_alpha is not None
            or args.f_divergence_type != "reverse_kl"
        )

    def batch_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        if not self.uses_trl_loss:
            return super().batch_loss(model, inputs, return_outputs)
        loss, outputs = self.trl_loss(model, without_share(inputs), return_outputs)
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {loss.item()} at {self.moment}. The weights were not updated with it. Look for NaN in "
                "the model's weights (a broken checkpoint), lower `learning_rate`, or use `bf16` instead of `fp16`."
            )
        loss = weighted(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def loss(self, record: PairedLogps) -> LossOutput:
        return losses.dpo(record, beta=self.args.beta, humanline=self.args.humanline_clamp)
