"""PPO: proximal policy optimization with a value head, offline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .. import losses
from .._trl import Method, TokenTable, ValueHost, score_tokens
from ..configs import PPOConfig
from ..data.checks import Rows, drop_columns
from ..humanline import log_ratios
from ..logprobs import finite_exp
from ..metrics import Sums, total
from ..records import LossOutput, PolicyStep
from ..value_head import VALUE_HEAD_FILE, load_value_head
from .loss import BatchTables
from .reward_scores import RewardModelScores
from .rollout import Rollout, SavedRollout, digest, load_rollouts, roll_out, rollout_file, save_rollouts
from .scored import ScoredTrainer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, DataCollator, EvalPrediction, ProcessorMixin

    from .base import EvalDataset, Optimizers

logger = get_logger(__name__)


class PPOTrainer(ScoredTrainer[PPOConfig], ValueHost):
    """PPO (arXiv:1707.06347) on existing completions, with a value head and GAE; nothing is generated.

    The reward is placed on the last token of a completion: the row's `score` if there is one, else the score of
    `reward_model`, else +1 or -1 depending on the label. The log-probs in the denominator of the ratio, the advantages
    (whitened over the whole optimizer step) and the critic's targets are computed once, before the first update on a
    batch, and used for `ppo_epochs` optimizer steps. As in HALOs, the ratio is against the reference, which stands in
    for the model that generated the completions, and the critic does not train the policy's weights.

    Takes the arguments of `trl.KTOTrainer` and, in addition:

        reward_model: an `AutoModelForSequenceClassification` with one logit, or with two (the score is logit 1).
        reward_processing_class: its tokenizer, with its chat template.

    Rows are as for `GRPOTrainer`; with a reward model, they need no score. The saved policy is a plain causal LM. Its
    value head is saved next to it in `value_head.safetensors`, and is loaded when that folder is passed as `model`.
    """

    config_class = PPOConfig
    takes_humanline = True
    loss_fields = ()
    method = Method(
        name="PPO",
        title="Proximal Policy Optimization Algorithms",
        arxiv="1707.06347",
        citation="""\
@article{schulman2017proximal,
    title  = {Proximal Policy Optimization Algorithms},
    author = {Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg},
    year   = {2017},
    eprint = {arXiv:1707.06347},
}""",
    )
    card_fields = ("cliprange", "critic_coef", "kl_coef", "gamma", "lam", "ppo_epochs")
    groups_stay_together = False  # advantages come from the critic, not from the other completions of the prompt

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: PPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        reward_model: PreTrainedModel | None = None,
        reward_processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self._reward = (reward_model, reward_processing_class)
        self._saved: SavedRollout | None = None
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
        )
        if self.optimizer is not None:
            raise ValueError(
                "`optimizers` contains an optimizer that was created before the value head and would not train it. "
                "Leave it out, and use `optim` and `learning_rate` instead."
            )
        self.attach_value_head()
        if self._policy_folder is not None:
            load_value_head(self.value_head, self._policy_folder)
            logger.info(f"The value head is loaded from {self._policy_folder}.")
        self.add_callback(_ClipValueHead(self))

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        super().check_arguments(args, model, ref_model)
        has_head = isinstance(model, str) and os.path.isfile(os.path.join(model, VALUE_HEAD_FILE))
        self._policy_folder: str | None = model if has_head else None
        reward_model, tokenizer = self._reward
        if (reward_model is None) != (tokenizer is None):
            given, missing = ("reward_model", "reward_processing_class")[:: 1 if tokenizer is None else -1]
            raise ValueError(f"`{given}` was passed without `{missing}`. Pass both: a model and its own tokenizer.")
        if reward_model is not None and tokenizer is not None:
            self.score_rows = RewardModelScores(reward_model, tokenizer, args.reward_batch_size, args.packed)

    def check_rows(self, dataset: Rows, name: str) -> Dataset:
        checked = self.scored_rows(dataset, name)
        return drop_columns(checked, {"advantage"} & set(checked.column_names), name, "Rows")

    @property
    def passes_per_batch(self) -> int:
        return self.args.ppo_epochs

    # -- the batch before its first update ---------------------------------------------------------------------

    def prepare_step(self, batches: list[dict[str, Any]]) -> list[Rollout]:
        """The rollout of each micro-batch: a new one before the first of `ppo_epochs` steps over a batch."""
        digests = [digest(batch) for batch in batches]
        if self.state.global_step % self.args.ppo_epochs == 0:
            self._saved = SavedRollout(self.roll_out(batches), digests, self._rollout_settings)
        if self._saved is None or list(self._saved.batches) != digests:
            raise ValueError(
                f"The rollout of step {self.state.global_step + 1} does not match the rows of the batch or their "
                "scores. The run was resumed with different data, scores or seed, or with a different split of the "
                "step, than its checkpoint."
            )
        return list(self._saved.rollouts)

    def prepare_batch(self, batch: dict[str, Any]) -> Rollout:
        return self.roll_out([self.without_repeats(batch)])[0]

    def reference_logps(self, batch: dict[str, Any], prepared: Rollout) -> torch.Tensor:
        return prepared.old_policy

    @property
    def _rollout_settings(self) -> dict[str, Any]:
        return {"gamma": self.args.gamma, "lam": self.args.lam}

    def roll_out(self, batches: list[dict[str, Any]]) -> list[Rollout]:
        """Rollout statistics of all micro-batches of a step (or of an evaluation batch) on this process.

        All processes must call this at the same time. Values are those of the current policy, without dropout.
        """
        model = self.model_wrapped if self.mode == "train" else self.model
        with self._evaluation_mode(), self.no_grad_forward():
            tables = [score_tokens(model, batch) for batch in batches]
            old_policy = [known(self.reference.log_probs(batch)) for batch in batches]
        for tokens, old_BT in zip(tables, old_policy, strict=True):
            self.refuse_non_finite(tokens, old_BT)
        rollouts = roll_out(
            old_policy,
            [known(tokens.values_BT) for tokens in tables],
            [batch["score"] for batch in batches],
            [tokens.mask_BT for tokens in tables],
            gamma=self.args.gamma,
            lam=self.args.lam,
            reduce_sum=lambda x: self.accelerator.reduce(x, reduction="sum"),
        )
        for tokens, rollout in zip(tables, rollouts, strict=True):
            self.record_metrics({"returns": total(rollout.returns, tokens.mask_BT)})
        return rollouts

    @contextlib.contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    # -- the update --------------------------------------------------------------------------------------------

    def loss(self, record: PolicyStep) -> LossOutput:  # type: ignore[override]  # it has a record of its own
        """The per-token losses `(B, T)` of a micro-batch: policy, critic and KL penalty."""
        output = losses.ppo(
            record,
            cliprange=self.args.cliprange,
            critic_coef=self.args.critic_coef,
            kl_coef=self.args.kl_coef,
            humanline=self.args.humanline_clamp,
        )
        logged = {
            "policy_loss": "policy_loss",
            "critic_loss": "critic_loss",
            "kl": "policykl",
            "clip_fraction": "clipfrac",
            "values": "values_mean",
        }
        return output._replace(metrics={name: output.metrics[of_loss] for name, of_loss in logged.items()})

    def record(self, tables: BatchTables) -> PolicyStep:
        rollout = Rollout(*map(tables.of_rows, tables.prepared))
        return PolicyStep(
            policy=tables.tokens.logps_BT,
            old_policy=rollout.old_policy,
            mask=tables.tokens.mask_BT,
            values=known(tables.tokens.values_BT),
            advantages=rollout.advantages,
            discounted_future_rewards=rollout.discounted_future_rewards,
        )

    def metric_sums(self, output: LossOutput, tables: BatchTables) -> Sums:
        mask_BT = tables.tokens.mask_BT
        ratios_BT, _ = log_ratios(tables.tokens.logps_BT, tables.reference_BT, mask_BT, self.args.humanline_clamp)
        seqratio = total(finite_exp(ratios_BT.sum(-1)), mask_BT.any(-1))
        return super().metric_sums(output, tables) | {"seqratio": seqratio}

    def refuse_non_finite(self, policy: TokenTable, reference_BT: torch.Tensor | None) -> None:
        super().refuse_non_finite(policy, reference_BT)
        if not torch.isfinite(known(policy.values_BT)).all():
            raise ValueError(
                f"The value head returned NaN or infinite values at step {self.state.global_step + 1}. The weights "
                "were not updated. Lower `learning_rate` or the scale of the scores."
            )

    # -- checkpoints -------------------------------------------------------------------------------------------

    @property
    def lasting_settings(self) -> dict[str, Any]:
        return super().lasting_settings | {"ppo_epochs": self.args.ppo_epochs}

    def _is_between_epochs(self, step: int) -> bool:
        return step % self.args.ppo_epochs != 0

    def before_checkpoint(self, checkpoint_dir: str) -> None:
        super().before_checkpoint(checkpoint_dir)
        path = rollout_file(checkpoint_dir, self.accelerator.process_index)
        if self._saved is not None and self._is_between_epochs(self.state.global_step):
            save_rollouts(self._saved, path)
        else:
            path.unlink(missing_ok=True)  # left by another run that wrote to this folder

    def restore(self, folder: str) -> None:
        super().restore(folder)
        if self._is_between_epochs(TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME)).global_step):
            path = rollout_file(folder, self.accelerator.process_index)
            self._saved = load_rollouts(path, self._rollout_settings, self.accelerator.device)
        load_value_head(self.value_head, folder)


def known(table_BT: torch.Tensor | None) -> torch.Tensor:
    """Narrow the type of a table that PPO's policy and reference always provide."""
    assert table_BT is not None
    return table_BT


class _ClipValueHead(TrainerCallback):
    """Clips the gradient of the value head separately; the trainer clips the rest."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.limit_value_head(args.v_head_max_grad_norm)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = self.trainer.limited_value_head_norm(args.v_head_max_grad_norm)
        if not torch.isfinite(norm):
            if self.trainer.skips_overflow:
                return
            raise ValueError(
                f"The gradient norm of the value head is {norm.item()} at step {state.global_step + 1}. The weights "
                "were not updated. Rescale the scores, e.g. to a few units, or lower `learning_rate`."
            )
        self.trainer.record_metrics({"v_head_grad_norm": (norm.detach(), torch.ones_like(norm))})


__all__ = ["PPOTrainer"]
