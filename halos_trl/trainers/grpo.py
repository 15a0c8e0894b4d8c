"""GRPO: group-relative policy optimization, offline."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from .. import losses
from .._trl import Method
from ..configs import GRPO_LOSS_FIELDS, GRPOConfig
from ..records import GroupLogps, LossOutput
from .scored import ScoredTrainer


class GRPOTrainer(ScoredTrainer[GRPOConfig]):
    """GRPO (arXiv:2402.03300) on groups of existing, scored completions; nothing is generated.

    As in HALOs, and unlike in the paper, the probability ratio is against the reference, which takes the place of the
    model that generated the completions; with `old_policy="sampler"`, it is against that model itself. Advantages are
    relative to the whole group and stored in the dataset; all completions of a prompt are part of the same optimizer
    step; loss and gradient are means over the tokens of the step. Takes the arguments of `trl.KTOTrainer`.

    Rows have `prompt`, `completion`, `score` and optionally `prompt_id`; or `prompt` with lists `completions` and
    `scores`; or labelled or paired rows, which count as scores of +1 and -1. Standard or conversational.
    """

    config_class = GRPOConfig
    takes_humanline = True
    takes_options = GRPO_LOSS_FIELDS
    method = Method(
        name="GRPO",
        title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        arxiv="2402.03300",
        citation="""\
@article{shao2024deepseekmath,
    title  = {{DeepSeekMath}: Pushing the Limits of Mathematical Reasoning in Open Language Models},
    author = {Shao, Zhihong and Wang, Peiyi and Zhu, Qihao and Xu, Runxin and Song, Junxiao and Bi, Xiao and Zhang, Haowei and Zhang, Mingchuan and Li, Y. K. and Wu, Y. and Guo, Daya},
    year   = {2024},
    eprint = {arXiv:2402.03300},
}""",  # noqa: E501
    )
    card_fields = ("beta", "epsilon", "epsilon_high", "scale_rewards", "sequence_level", "old_policy")

    if not TYPE_CHECKING:  # which would take any argument for right

        @functools.wraps(ScoredTrainer.__init__)
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            online = sorted(
                {"reward_funcs", "reward_processing_classes", "rollout_func", "environment_factory"} & set(kwargs)
            )
            if online:
                raise ValueError(
                    f"`{online[0]}` belongs to `trl.GRPOTrainer`, which generates its completions. This trainer is "
                    "offline: its rows contain completions and scores. Score them beforehand, or use "
                    "`halos_trl.online.GRPOTrainer`."
                )
            super().__init__(*args, **kwargs)

    def loss(self, record: GroupLogps) -> LossOutput:
        """The per-token losses `(B, T)` of a micro-batch."""
        output = losses.grpo(
            record,
            epsilon=self.args.epsilon,
            beta=self.args.beta,
            humanline=self.args.humanline_clamp,
            epsilon_high=self.args.epsilon_high,
            sequence_level=self.args.sequence_level,
        )
        logged = {"kl": "kl", "weighted_advantage": "weighted_advantage", "clip_fraction": "clipfrac"}
        return output._replace(metrics={name: output.metrics[of_loss] for name, of_loss in logged.items()})


__all__ = ["GRPOTrainer"]
