"""SLiC: a hinge on sequence log-probs, without a reference."""

from __future__ import annotations

from .. import losses
from .._trl import Method
from ..configs import SLiCConfig
from ..records import LossOutput, PairedLogps
from .paired import PairedPreferenceTrainer


class SLiCTrainer(PairedPreferenceTrainer[SLiCConfig]):
    """SLiC-HF (arXiv:2305.10425). Uses no reference, so none is loaded."""

    config_class = SLiCConfig
    takes_humanline = True
    needs_reference = False
    method = Method(
        name="SLiC",
        title="SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        arxiv="2305.10425",
        citation="""\
@article{zhao2023slic,
    title  = {{SLiC-HF}: Sequence Likelihood Calibration with Human Feedback},
    author = {Zhao, Yao and Joshi, Rishabh and Liu, Tianqi and Khalman, Misha and Saleh, Mohammad and Liu, Peter J.},
    year   = {2023},
    eprint = {2305.10425},
}""",
    )
    card_fields = ("beta", "lambda_coef")

    def loss(self, record: PairedLogps) -> LossOutput:
        args = self.args
        return losses.slic(record, beta=args.beta, lambda_coef=args.lambda_coef, humanline=args.humanline_clamp)
