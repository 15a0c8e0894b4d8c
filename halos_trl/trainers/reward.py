"""The Bradley-Terry reward model, trained on pairs, for PPO and for labelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import find_adapter_config_file

from .._trl import Method, RewardHost
from ..configs import BradleyTerryConfig
from ..data.checks import Rows, check_paired_rows
from ..forward.rewards import score_sequences
from . import reward_head
from .checkpoints import begin_checkpoint, lasting_settings, refuse_other_settings, tokens_in, write_settings
from .processes import write_step_size
from .run import TrainingRun
from .step import weighted, without_share

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import (
        BitsAndBytesConfig,
        DataCollator,
        EvalPrediction,
        PreTrainedTokenizerBase,
        TrainerCallback,
    )

    from .base import EvalDataset, Optimizers


class BradleyTerryTrainer(TrainingRun, RewardHost):
    """Reward model under the Bradley-Terry model: loss = -log sigmoid(score(chosen) - score(rejected)).

    Extends `trl.RewardTrainer` and takes the same arguments. The score is the single logit of an
    `AutoModelForSequenceClassification`; HALOs' checkpoints have two logits, see `load_reward_model`.
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

    args: BradleyTerryConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: BradleyTerryConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        if labels is not None and labels != 1:
            raise ValueError(
                f"The reward model has {labels} labels; expected 1, the score. Load a HALOs checkpoint, which has "
                "two, with `halos_trl.load_reward_model`, or pass the name of a language model, which gets a new "
                "head."
            )
        _refuse_task(peft_config)
        try:
            super().__init__(
                model,
                args,
                data_collator,
                train_dataset,
                eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        except RuntimeError as error:
            if not isinstance(model, str) or "mismatch" not in str(error):
                raise
            raise ValueError(
                f"{model!r} does not fit a reward model with one logit: {error} If it is a HALOs model with two "
                "logits, pass `halos_trl.load_reward_model(...)` instead of its name."
            ) from error
        reward_head.refuse_untrainable_head(self.model)
        reward_head.mark_as_own(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = without_share(inputs)
        outputs = score_sequences(model, batch)
        loss = self.host_loss(outputs, batch, False, num_items_in_batch)
        self.refuse_non_finite_loss(loss)
        loss = weighted(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def batch_size(self, batch: dict[str, Any]) -> int:
        return batch["input_ids"].shape[0] // 2

    def check_rows(self, dataset: Rows, name: str) -> Rows:
        return check_paired_rows(dataset, name, drop_invalid=self.drops_invalid_rows, splits_implicit=False)

    def before_checkpoint(self, checkpoint_dir: str) -> None:
        if self.args.should_save:
            begin_checkpoint(checkpoint_dir)
        write_settings(lasting_settings(self.args), self.state, self.trained_tokens())
        write_step_size(self.args, self.state)

    def restore(self, folder: str) -> None:
        refuse_other_settings(lasting_settings(self.args), folder)
        self.go_on_counting(tokens_in(folder))


def _refuse_task(peft_config: Any) -> None:
    task = getattr(peft_config, "task_type", None)
    if task not in (None, "SEQ_CLS"):
        raise ValueError(
            f"`peft_config` has `task_type={getattr(task, 'value', task)!r}`, but a reward model is a sequence "
            'classifier. Create it with `task_type="SEQ_CLS"` (`--lora_task_type SEQ_CLS`).'
        )


def load_reward_model(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a reward model with one logit, its score.

    `name_or_path` is a Hub id or a folder; `kwargs` are passed to
    `AutoModelForSequenceClassification.from_pretrained`. HALOs trains reward models with two labels, whose score is
    logit 1. Of such a head, only that row is kept, which gives the same scores. A saved adapter is merged into its
    base model. Raises ValueError for any other number of labels, and for a checkpoint without a reward model's head,
    such as one of a language model.
    """
    if find_adapter_config_file(name_or_path, **_only(kwargs, *_PLACE, *_ACCESS)) is not None:
        return _load_adapter(name_or_path, kwargs)
    model, info = AutoModelForSequenceClassification.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name_or_path!r} is not a reward model: it was saved as {model.config.architectures} and has no "
            f"{missing}, so the scores would be those of a random head. Pass a reward model, e.g. one trained with "
            "`BradleyTerryTrainer`."
        )
    labels = model.config.num_labels
    if labels == 2:
        _keep_second_logit(model)
    elif labels != 1:
        raise ValueError(
            f"{name_or_path!r} has {labels} labels. A reward model has one logit (its score), or two as in HALOs "
            "(the score is logit 1). Pass a reward model, e.g. one trained with `BradleyTerryTrainer`."
        )
    return model


_PLACE = ("revision", "subfolder")
_ACCESS = ("token", "cache_dir")


def _only(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}


def _load_adapter(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    """Load a reward model that was trained as an adapter."""
    if settings.get("quantization_config") is not None:
        raise ValueError(
            f"{name!r} is an adapter, which is merged into its base model; merging into quantized weights would lose "
            "precision. Leave `quantization_config` out."
        )
    place = _only(settings, *_PLACE, *_ACCESS)
    base_settings = {key: value for key, value in settings.items() if key not in _PLACE}
    base_name = str(PeftConfig.from_pretrained(name, **place).base_model_name_or_path)
    base_config = AutoConfig.from_pretrained(
        base_name, **_only(base_settings, *_ACCESS, "trust_remote_code", "local_files_only")
    )
    base: Any
    if reward_head.is_classifier(base_config.architectures):
        base = load_reward_model(base_name, **base_settings)
    else:  # a language model, so the head must be part of the adapter
        base = AutoModelForSequenceClassification.from_pretrained(base_name, **{"num_labels": 1} | base_settings)
    adapted = PeftModel.from_pretrained(base, name, **place)
    reward_head.refuse_random_head(adapted, f"The base model {base_name!r} of the adapter {name!r}")
    merged: Any = adapted.merge_and_unload()
    reward_head.mark_as_own(merged)
    return merged


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
