"""IPO: identity preference optimization, whose target margin is bounded."""

from __future__ import annotations

from .. import losses
from .._trl import Method
from ..configs import IPOConfig
from ..logprobs import sequence_sum
from ..records import LossOutput, PairedLogps
from .paired import PairedPreferenceTrainer


class IPOTrainer(PairedPreferenceTrainer[IPOConfig]):
    """Identity preference optimization (arXiv:2310.12036), averaged per token like TRL's `loss_type="ipo"`."""

    config_class = IPOConfig
    takes_humanline = True
    takes_precomputed = True
    method = Method(
        name="IPO",
        title="A General Theoretical Paradigm to Understand Learning from Human Preferences",
        arxiv="2310.12036",
        citation="""\
@inproceedings{azar2024general,
    title     = {A General Theoretical Paradigm to Understand Learning from Human Preferences},
    author    = {Azar, Mohammad Gheshlaghi and Guo, Zhaohan Daniel and Piot, Bilal and Munos, Remi and
                 Rowland, Mark and Valko, Michal and Calandriello, Daniele},
    booktitle = {International Conference on Artificial Intelligence and Statistics},
    year      = {2024},
    eprint    = {2310.12036},
}""",
    )
    card_fields = ("tau",)

    def loss(self, record: PairedLogps) -> LossOutput:
        tau = self.args.tau
        output = losses.ipo(record, tau=tau, humanline=self.args.humanline_clamp)
        # The function's rewards are per token (HALOs); what is logged has TRL's scale, tau times the sum.
        return output._replace(
            chosen_rewards=tau * output.chosen_rewards * sequence_sum(record.chosen_mask, record.chosen_mask),
            rejected_rewards=tau * output.rejected_rewards * sequence_sum(record.rejected_mask, record.rejected_mask),
        )
