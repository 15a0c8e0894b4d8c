"""GRPO: group-relative policy optimization, offline."""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset

from .. import losses
from .._trl import Method
from ..advantages import group_advantages
from ..configs import GRPOConfig
from ..data.checks import Rows
from ..data.groups import GROUP
from ..metrics import Sums, total
from ..records import GroupLogps, LossOutput
from .loss import BatchTables
from .scored import ScoredTrainer

logger = get_logger(__name__)


class GRPOTrainer(ScoredTrainer[GRPOConfig]):
    """GRPO (arXiv:2402.03300) on groups of completions that were scored before training; nothing is generated.

    As in HALOs, and unlike the paper, the probability ratio is against the reference, which stands for the model that
    the completions were sampled from. Advantages are relative to the whole group and part of the dataset; the
    completions of a prompt meet in one optimizer step; loss and gradient are means over the tokens of the step. Takes
    the arguments of `trl.KTOTrainer`.

    Rows are `prompt`, `completion`, `score` (maybe `prompt_id`); or `prompt` with lists `completions` and `scores`; or
    labelled or paired rows, which count as scores of +1 and -1. Standard or conversational.
    """

    config_class = GRPOConfig
    takes_humanline = True
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
    card_fields = ("beta", "epsilon", "epsilon_high", "scale_rewards", "sequence_level")

    if not TYPE_CHECKING:  # which would take any argument for right

        @functools.wraps(ScoredTrainer.__init__)
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            online = sorted(
                {"reward_funcs", "reward_processing_classes", "rollout_func", "environment_factory"} & set(kwargs)
            )
            if online:
                raise ValueError(
                    f"`{online[0]}` belongs to `trl.GRPOTrainer`, which generates its completions. This one is "
                    "offline: its rows bring completions and scores. Score them beforehand, or use TRL's."
                )
            super().__init__(*args, **kwargs)

    def loss(self, record: GroupLogps) -> LossOutput:
        """The per-token losses `(B, T)` of a micro-batch."""
        return losses.grpo(
            record,
            epsilon=self.args.epsilon,
            beta=self.args.beta,
            humanline=self.args.humanline_clamp,
            epsilon_high=self.args.epsilon_high,
            sequence_level=self.args.sequence_level,
        )

    def record(self, tables: BatchTables) -> GroupLogps:
        advantages_B = tables.of_rows(tables.batch["advantage"])
        return GroupLogps(tables.tokens.logps_BT, tables.reference_BT, tables.tokens.mask_BT, advantages_B)

    def metric_sums(self, output: LossOutput, tables: BatchTables) -> Sums:
        names = {"kl": "kl", "weighted_advantage": "weighted_advantage", "clip_fraction": "clipfrac"}
        mask_BT = tables.tokens.mask_BT
        sums = self.token_means(output, names, mask_BT) | self.scored_sums(tables)
        return sums | {"advantages/abs": total(tables.of_rows(tables.batch["advantage"]).abs(), mask_BT.any(-1))}

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        super().check_arguments(args, model, ref_model)
        self._scale_rewards = args.scale_rewards  # the data are prepared before the trainer has its `args`

    def check_rows(self, dataset: Rows, name: str) -> Dataset:
        dataset = super().check_rows(dataset, name)
        return with_advantages(dataset, name, scale_by_std=self._scale_rewards)


def with_advantages(dataset: Dataset, name: str, *, scale_by_std: bool) -> Dataset:
    """Add `advantage`, each score relative to its whole group, in whatever batches the group will be trained."""
    if {"advantage", "completion_ids"} <= set(dataset.column_names):
        return dataset  # prepared before, and passed to `evaluate`
    if "advantage" in dataset.column_names:
        logger.warning(f"The {name} dataset has a column `advantage`. It is replaced: advantages come from scores.")
        dataset = dataset.remove_columns("advantage")
    groups = list(dataset[GROUP])
    sizes = Counter(groups)
    alone = sum(size == 1 for size in sizes.values())
    if alone:
        logger.warning(
            f"{alone} of {len(sizes)} prompts of the {name} dataset have a single completion. Its advantage is 0, so "
            "it only takes part in the KL penalty. Score more completions of these prompts, or drop them."
        )
    scores_B = torch.tensor(dataset["score"], dtype=torch.float64)
    advantages_B = group_advantages(scores_B, groups, scale_by_std=scale_by_std)
    return dataset.add_column("advantage", advantages_B.tolist())


__all__ = ["GRPOTrainer", "with_advantages"]
