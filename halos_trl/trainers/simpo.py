"""SimPO: length-normalized, without a reference."""

from __future__ import annotations

from .. import losses
from .._trl import Method
from ..configs import SimPOConfig
from ..records import LossOutput, PairedLogps
from .paired import PairedPreferenceTrainer


class SimPOTrainer(PairedPreferenceTrainer[SimPOConfig]):
    """SimPO (arXiv:2405.14734). Uses no reference, so none is loaded."""

    config_class = SimPOConfig
    takes_humanline = True
    needs_reference = False
    method = Method(
        name="SimPO",
        title="SimPO: Simple Preference Optimization with a Reference-Free Reward",
        arxiv="2405.14734",
        citation="""\
@inproceedings{meng2024simpo,
    title     = {{SimPO}: Simple Preference Optimization with a Reference-Free Reward},
    author    = {Meng, Yu and Xia, Mengzhou and Chen, Danqi},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2024},
    eprint    = {2405.14734},
}""",
    )
    card_fields = ("beta", "gamma_beta_ratio")

    def loss(self, record: PairedLogps) -> LossOutput:
        args = self.args
        return losses.simpo(
            record, beta=args.beta, gamma_beta_ratio=args.gamma_beta_ratio, humanline=args.humanline_clamp
        )
