"""cDPO: DPO with label smoothing for noisy labels."""

from __future__ import annotations

from .. import losses
from .._trl import Method
from ..configs import CDPOConfig
from ..records import LossOutput, PairedLogps
from .paired import PairedPreferenceTrainer


class CDPOTrainer(PairedPreferenceTrainer[CDPOConfig]):
    """Conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf)."""

    config_class = CDPOConfig
    takes_humanline = True
    takes_precomputed = True
    method = Method(
        name="cDPO",
        title="A note on DPO with noisy preferences & relationship to IPO",
        arxiv="",
        citation="""\
@misc{mitchell2023cdpo,
    title        = {A note on {DPO} with noisy preferences \\& relationship to {IPO}},
    author       = {Mitchell, Eric},
    year         = {2023},
    howpublished = {https://ericmitchell.ai/cdpo.pdf},
}""",
    )
    card_fields = ("beta", "epsilon")

    def loss(self, record: PairedLogps) -> LossOutput:
        args = self.args
        return losses.cdpo(record, beta=args.beta, epsilon=args.epsilon, humanline=args.humanline_clamp)
