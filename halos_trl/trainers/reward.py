"""A reward model from pairs, for PPO and for labelling."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .._trl import Method, RewardHost
from ..configs import BradleyTerryConfig
from ..data.checks import Rows, check_paired_rows
from .base import StepAsBatch


class BradleyTerryTrainer(StepAsBatch, RewardHost):
    """Reward model under the Bradley-Terry model: loss = -log sigmoid(score(chosen) - score(rejected)).

    Extends `trl.RewardTrainer` and takes the same arguments. The score is the single logit of an
    `AutoModelForSequenceClassification`; HALOs' checkpoints have two, see `load_reward_model`.
    """

    config_class = BradleyTerryConfig
    method = Method(
        name="Bradley-Terry",
        title="Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons",
        arxiv="",
        citation="""\
@article{bradley1952rank,
    title   = {Rank Analysis of Incomplete Block Designs: {I}. The Method of Paired Comparisons},
    author  = {Bradley, Ralph Allan and Terry, Milton E.},
    journal = {Biometrika},
    volume  = {39},
    year    = {1952},
}""",
    )
    card_fields = ("center_rewards_coefficient",)
    card_task = "reward"

    def __init__(self, model: str | PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        labels = None if isinstance(model, str) else model.config.num_labels
        if labels is not None and labels != 1:
            raise ValueError(
                f"The reward model has {labels} labels; expected 1, the score. Load a checkpoint of HALOs', which has "
                "two, with `halos_trl.load_reward_model`; or pass the name of a language model, which gets a new head."
            )
        try:
            super().__init__(model, *args, **kwargs)
        except RuntimeError as error:
            if not isinstance(model, str) or "mismatch" not in str(error):
                raise
            raise ValueError(
                f"{model!r} does not fit a reward model with one logit: {error} If it is one of HALOs', with two, "
                "pass `halos_trl.load_reward_model(...)` of it instead of its name."
            ) from error

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        if not torch.isfinite(loss):
            raise ValueError(
                f"The reward model's loss is {loss.item()} at {self.moment}. The weights were not "
                "updated with it. Look for NaN in the model's weights, or lower `learning_rate`."
            )
        loss = self.share_of_step(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def batch_size(self, batch: dict[str, Any]) -> int:
        return batch["input_ids"].shape[0] // 2

    def check_rows(self, dataset: Rows, name: str) -> Rows:
        return check_paired_rows(dataset, name, drop_invalid=self.drops_invalid_rows, splits_implicit=False)


def load_reward_model(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """A reward model with one logit, its score.

    `name_or_path` is a hub id or a folder; `kwargs` go to `AutoModelForSequenceClassification.from_pretrained`. HALOs
    trains reward models with two labels whose score is logit 1; of such a head that row is kept, which gives the same
    scores. Raises ValueError for any other number of labels.
    """
    model = AutoModelForSequenceClassification.from_pretrained(name_or_path, **kwargs)
    labels = model.config.num_labels
    if labels == 2:
        _keep_second_logit(model)
    elif labels != 1:
        raise ValueError(
            f"{name_or_path!r} has {labels} labels. A reward model has one logit (its score), or two as HALOs trains "
            "them (the score is logit 1). Pass a reward model, e.g. one trained with `BradleyTerryTrainer`."
        )
    return model


@torch.no_grad()
def _keep_second_logit(model: PreTrainedModel) -> None:
    name, head = next((n, m) for n, m in reversed(list(model.named_modules())) if isinstance(m, torch.nn.Linear))
    if head.out_features != 2:
        raise ValueError(
            f"The last linear layer of the reward model, {name!r}, has {head.out_features} outputs, not 2."
        )
    single = torch.nn.Linear(head.in_features, 1, bias=head.bias is not None).to(head.weight)
    single.weight.copy_(head.weight[1:2])
    if head.bias is not None:
        single.bias.copy_(head.bias[1:2])
    model.set_submodule(name, single)
    model.config.num_labels = model.num_labels = 1
