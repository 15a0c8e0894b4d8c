"""Base of all trainers: the reference, checks of option combinations, the hooks for a batch's loss, checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import TrainingArguments

from .._trl import POLICY_ADAPTER, REFERENCE_ADAPTER, TokenTable, edits_base_weights
from ..configs import REFERENCE_FIELDS, defaults_of
from ..metrics import Sums
from ..records import LossOutput
from ..reference import (
    AdapterOff,
    FrozenAdapter,
    FrozenCopy,
    NoReference,
    PrecomputedColumn,
    Reference,
    ReferenceSync,
    restore_best_reference,
    restore_reference,
    write_reference,
)
from ..sharded import shape_of
from ..storage import parameters_of
from .checkpoints import begin_checkpoint, lasting_settings, refuse_other_settings, tokens_in, write_settings
from .loss import BatchTables, batch_loss, mean_loss
from .processes import write_step_size
from .run import TrainingRun
from .start import check_start, hold_reference, refuse_frozen, refuse_unfit_models
from .stored_reference import refuse_unfit_storage

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        DataCollator,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )

ConfigT = TypeVar("ConfigT", bound=TrainingArguments)
"""The config class of a method, for type checkers: `args` is an instance of it."""

EvalDataset: TypeAlias = (
    Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Dataset | IterableDataset] | None
)
Optimizers: TypeAlias = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]


class AlignmentTrainer(TrainingRun, Generic[ConfigT]):
    """Mixin placed before a host trainer. Subclasses convert a batch to a record, and a record to a loss."""

    # -- construction ------------------------------------------------------------------------------------------

    args: ConfigT

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: ConfigT | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
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
        self.sync_callback: ReferenceSync | None = None
        self.reference = self._make_reference()
        self.is_at_start = not self._reference_was_given
        self.after_construction()

    def after_construction(self) -> None:
        """Hook: called when the trainer has been built."""

    _start_is_checked = False

    takes_precomputed: ClassVar[bool] = False
    """Whether `loss` works with precomputed reference log-probs, of which only the sum per completion is stored."""

    stores_token_logps: ClassVar[bool] = False
    """Whether `precompute_ref_log_probs` stores one number per token instead, which works for any loss."""

    takes_humanline: ClassVar[bool] = False
    """Whether `loss` clamps log-ratios with `self.args.humanline_clamp`."""

    takes_options: ClassVar[tuple[str, ...]] = ()
    """The fields in `loss_fields` that `loss` reads."""

    loss_fields: ClassVar[tuple[str, ...]] = ()
    """Config fields that only some losses read."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "loss" in vars(cls):  # the declarations of a parent class describe another loss
            for name in ("takes_precomputed", "takes_humanline", "takes_options"):
                if name not in vars(cls):
                    setattr(cls, name, getattr(AlignmentTrainer, name))

    is_at_start: bool
    """Whether policy and reference must be equal: no `ref_model` was passed, and nothing has been trained yet."""

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        refuse_unfit_models(model, ref_model, args)
        super().check_arguments(args, model, ref_model)
        refuse_unfit_storage(args, model, ref_model, getattr(self, "_new_adapter", None))
        self._refuse_what_nobody_reads(args)
        self._reference_was_given = ref_model is not None
        if isinstance(model, torch.nn.Module) and getattr(self, "_new_adapter", None) is None:
            refuse_frozen(model)
        adapter = getattr(self, "_new_adapter", None)
        if args.precompute_ref_log_probs and adapter is not None and edits_base_weights(adapter):
            raise ValueError(
                "`precompute_ref_log_probs=True` reads the base model without its adapter, but this adapter "
                f"(`init_lora_weights={adapter.init_lora_weights!r}`) moves a part of the base weights into the "
                "adapter, so the base model differs from the initial policy. Disable it, or initialize the adapter "
                "differently."
            )
        if args.precompute_ref_log_probs and not (self.takes_precomputed or self.stores_token_logps):
            raise ValueError(
                "`precompute_ref_log_probs=True` stores one sum for each completion, but the loss of "
                f"{type(self).__name__} may read single tokens of the reference. Disable it, or, if the loss only "
                "uses sums over a row, set `takes_precomputed = True` in the class."
            )
        if ref_model is not None and not self.needs_reference:
            raise ValueError(
                f"`ref_model` was passed to {type(self).__name__}, which uses no reference. Leave it out."
            )

    def _refuse_what_nobody_reads(self, args: Any) -> None:
        defaults = defaults_of(type(args))
        unread = {name: f"the loss of {type(self).__name__} does not read it" for name in self.loss_fields}
        unread = {name: why for name, why in unread.items() if name not in self.takes_options}
        if not self.needs_reference:
            unread |= {name: f"{type(self).__name__} uses no reference" for name in REFERENCE_FIELDS}
        for name, why in unread.items():
            if getattr(args, name, defaults.get(name)) != defaults.get(name):
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` has no effect: {why}. Leave it out, or, if the loss of your "
                    "class reads it, add it to `takes_options`."
                )
        if args.humanline and not self.takes_humanline:
            raise ValueError(
                f"`humanline=True` is set, but the class does not declare that the loss of {type(self).__name__} "
                "clamps. Compute the log-ratios with `halos_trl.humanline.log_ratios(..., self.args.humanline_clamp)` "
                "and set `takes_humanline = True` in the class, or leave `humanline` out."
            )

    adapter_reference: AdapterOff | None = None

    def live_reference(self, policy: Any, moves: bool = False) -> Reference:
        """The reference model, for log-probs that are not stored. Before training, this may be the policy itself."""
        shared = (self.accelerator.unwrap_model, self.no_grad_forward)
        adapters = getattr(self.accelerator.unwrap_model(policy), "peft_config", {})
        if self.ref_model is not None or not adapters:
            model = policy if self.ref_model is None else self.ref_model
            if self.ref_model is not None:
                self.ref_model.eval()  # a separate statement, because not every engine's `eval` returns the model
            return FrozenCopy(model, *shared)
        if self.adapter_reference is None:
            # If a new adapter has taken over a part of the base weights, the base model is not the initial policy.
            second = moves or REFERENCE_ADAPTER in adapters or edits_base_weights(adapters[POLICY_ADAPTER])
            self.adapter_reference = (FrozenAdapter if second else AdapterOff)(policy, *shared)
        return self.adapter_reference

    def _make_reference(self) -> Reference:
        if not self.needs_reference:
            return NoReference()
        if getattr(self.args, "precompute_ref_log_probs", False):
            return PrecomputedColumn()
        sync = self._sync_settings()
        if sync and self.ref_model is not None and self.reference_storage not in ("8bit", "4bit"):
            self._refuse_unlike_reference()
        reference = self.live_reference(self.model, moves=bool(sync))
        if sync:
            self.sync_callback = ReferenceSync(reference, steps_in_backward=self.is_deepspeed_enabled, **sync)
            self.add_callback(self.sync_callback)
            if self.is_deepspeed_enabled:
                self._sync_before_last_backward(self.sync_callback)
        return reference

    def _sync_before_last_backward(self, callback: ReferenceSync) -> None:
        # Once per optimizer step, after its last loss and before the update, which DeepSpeed runs inside `backward`.
        backward = self.accelerator.backward

        @functools.wraps(backward)
        def synced_backward(loss: torch.Tensor, **kwargs: Any) -> None:
            if self.accelerator.sync_gradients:
                callback.before_backward(self.state, self.model)
            backward(loss, **kwargs)

        self.accelerator.backward = synced_backward

    def _refuse_unlike_reference(self) -> None:
        unwrapped = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model)]
        shapes = [{n: shape_of(p) for n, p in parameters_of(model).items()} for model in unwrapped]
        if shapes[0] != shapes[1]:
            remedy = "Leave it out; the reference is then a second adapter on the same base model."
            raise ValueError(
                "`humanline` and `sync_ref_model` copy the policy into the reference, but the parameters of "
                "`ref_model` do not match those of the policy. "
                + (remedy if hasattr(self.model, "peft_config") else "Pass a reference of the policy's architecture.")
            )

    def _sync_settings(self) -> dict[str, Any] | None:
        args = self.args
        if args.humanline:
            return {"every": args.humanline_sync_steps, "before_step": True}
        if args.sync_ref_model:
            return {"every": args.ref_model_sync_steps, "mix": args.ref_model_mixup_alpha, "before_step": False}
        return None

    # -- the first step ----------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and not self._start_is_checked:
            check_start(self, batches[0])
            self._start_is_checked = True
        return batches, num_items

    def before_update(self) -> None:
        super().before_update()
        hold_reference(self)  # parameters may have been unfrozen since the start
        self.is_at_start = False

    # -- the loss of a batch: what `loss.py` calls ---------------------------------------------------------------

    def batch_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        return batch_loss(self, model, inputs, return_outputs)

    def mean_loss(self, tables: BatchTables) -> torch.Tensor:
        """The loss of a batch, computed from its tables."""
        return mean_loss(self, tables)

    def record(self, tables: BatchTables) -> Any:
        """Hook: the record that is passed to `loss`."""
        raise NotImplementedError

    loss: Callable[[Any], LossOutput]
    """Hook: the method itself, a function of its record."""

    def checked(self, output: Any, record: Any) -> LossOutput:
        """Hook: validate what `loss` returned for this record. Raises ValueError if its shape is wrong."""
        raise NotImplementedError

    def own_rows(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """Hook: indices of the rows that count, without those that accelerate repeats to fill the last evaluation
        batch; None for all rows.
        """
        raise NotImplementedError

    def metric_sums(self, output: LossOutput, tables: BatchTables) -> Sums:
        """Hook: the sums that are logged for a batch."""
        raise NotImplementedError

    def reference_logps(self, batch: dict[str, Any], prepared: Any) -> torch.Tensor | None:
        """Log-probs `(B, T)` of the reference in nats; `prepared` is what `prepare_step` made for this batch."""
        return self.reference.log_probs(batch)

    def refuse_non_finite(self, policy: TokenTable, reference_BT: torch.Tensor | None) -> None:
        """Raise before a NaN or infinity can reach the weights."""
        tables = {"policy": policy.logps_BT, "reference": reference_BT}
        for name, table in tables.items():
            if table is not None and not torch.isfinite(table).all():
                rows = (~torch.isfinite(table)).any(-1).nonzero().flatten().tolist()
                raise ValueError(
                    f"The {name} model returned log-probs that are NaN or infinite at {self.moment}, in rows {rows} "
                    "of the batch. The weights were not updated. Check the model's weights for NaN (a damaged "
                    "checkpoint), lower `learning_rate`, or use `bf16` or float32 instead of `fp16`."
                )

    # -- checkpoints -------------------------------------------------------------------------------------------

    @property
    def lasting_settings(self) -> dict[str, Any]:
        """The settings that must be the same in a resumed run as in the run that wrote the checkpoint."""
        return lasting_settings(self.args)

    def before_checkpoint(self, checkpoint_dir: str) -> None:
        if self.args.should_save:
            begin_checkpoint(checkpoint_dir)
        write_settings(self.lasting_settings, self.state, self.trained_tokens())
        write_step_size(self.args, self.state)
        write_reference(self.reference, self.model, self.state, checkpoint_dir, keep=self.args.should_save)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._start_is_checked = False
        hold_reference(self, resuming=bool(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def restore(self, folder: str) -> None:
        self.is_at_start = False
        restore_reference(self.reference, self.sync_callback, self.model, folder)
        refuse_other_settings(self.lasting_settings, folder)
        self.go_on_counting(tokens_in(folder))

    def restore_best(self, folder: str) -> None:
        # The reference that the best policy was evaluated against.
        if self.reference.moved:
            restore_best_reference(self.reference, self.model, folder)


__all__ = ["AlignmentTrainer"]
