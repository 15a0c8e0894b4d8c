"""What paired and unpaired trainers share: the optimizer step as one batch, the reference, checks, the model card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.logging import get_logger
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .. import model_card
from .._trl import POLICY_ADAPTER, REFERENCE_ADAPTER, TokenTable, edits_base_weights
from ..configs import REFERENCE_FIELDS, defaults_of
from ..humanline import log_ratios
from ..metrics import Sums, loss_sums, total, unclamped_sums
from ..records import LossOutput
from ..reference import (
    REFERENCE_FILE,
    AdapterOff,
    FrozenAdapter,
    FrozenCopy,
    NoReference,
    PrecomputedColumn,
    Reference,
    ReferenceSync,
    gathered,
    load_reference,
    save_reference,
)
from ..sharded import parameters_by_name, shape_of

if TYPE_CHECKING:
    from .._trl import TrainerHost as _Host
else:
    _Host = object

logger = get_logger(__name__)

_UNCLAMPED = ("unclamped", "unclamped/chosen", "unclamped/rejected")

_MOVED = "halos_trl.moved_reference"
"""Stands in the trainer state of a checkpoint that holds a moved reference."""


@dataclass
class Step:
    """The optimizer step in progress."""

    examples: torch.Tensor
    """Examples of the whole step, over all micro-batches and processes."""
    microbatches_left: int


class StepAsBatch(_Host):
    """One optimizer step is one batch, however it is split over micro-batches and processes. And the model card."""

    _step: Step | None = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of the next optimizer step, after `begin_step` has seen them together."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.model.train()
            self.begin_step([self.on_device(batch) for batch in batches])
        return batches, num_items

    def begin_step(self, batches: list[dict[str, Any]]) -> None:
        """Hook: what has to be known about the whole step before its first micro-batch."""
        examples = torch.tensor(sum(map(self.batch_size, batches)), device=self.accelerator.device)
        self._step = Step(self.accelerator.reduce(examples, reduction="sum"), len(batches))

    def batch_size(self, batch: dict[str, Any]) -> int:
        """Number of examples (rows or pairs) in a collated batch."""
        raise NotImplementedError

    def share_of_step(self, mean_loss: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Scale a micro-batch's mean loss so that the step's gradient is that of the mean over all its examples.

        Micro-batches are summed and processes averaged, so the weight is `own examples * processes / examples of the
        step`. Evaluation averages over examples by itself.
        """
        if self.mode == "eval" or self._step is None:
            return mean_loss
        weight = self.batch_size(batch) * self.accelerator.num_processes / self._step.examples
        self._step.microbatches_left -= 1
        if self._step.microbatches_left == 0:
            self._step = None
            self.before_last_backward()
        return mean_loss * weight

    def before_last_backward(self) -> None:
        """Hook: all losses of an optimizer step are there, and its last gradient is not."""

    # -- model card --------------------------------------------------------------------------------------------

    card_fields: tuple[str, ...] = ("beta",)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into the output directory: method, paper, base model, hyper-parameters, versions.

        Differs from TRL's card: a local base model is named as such instead of being linked as `None`, and the
        hyper-parameters are listed.
        """
        if self.is_world_process_zero():
            model_card.write(self, model_name, dataset_name, tags)


class AlignmentTrainer(StepAsBatch):
    """Mixed in front of a host trainer. Subclasses turn a batch into a record, and a record into a loss."""

    # -- construction ------------------------------------------------------------------------------------------

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sync_callback: ReferenceSync | None = None
        self.reference = self._make_reference()

    takes_precomputed: ClassVar[bool] = False
    """Whether precomputed reference log-probs serve `loss`: only a sum for each completion is stored."""

    stores_token_logps: ClassVar[bool] = False
    """Whether `precompute_ref_log_probs` stores a number for each token instead, which serves any loss."""

    takes_humanline: ClassVar[bool] = False
    """Whether `loss` clamps log-ratios by `self.args.humanline_clamp`."""

    takes_options: ClassVar[tuple[str, ...]] = ()
    """Which options of TRL's losses `loss` reads."""

    trl_loss_fields: ClassVar[tuple[str, ...]] = ()
    """The options of TRL's losses that the config brings along."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "loss" in vars(cls):  # what was said of another class's loss
            for name in ("takes_precomputed", "takes_humanline", "takes_options"):
                if name not in vars(cls):
                    setattr(cls, name, getattr(AlignmentTrainer, name))

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        super().check_arguments(args, model, ref_model)
        self._refuse_what_nobody_reads(args)
        adapter = getattr(self, "_new_adapter", None)
        if args.precompute_ref_log_probs and adapter is not None and edits_base_weights(adapter):
            raise ValueError(
                f"`precompute_ref_log_probs=True` reads the base model without its adapter, but this adapter "
                f"(`init_lora_weights={adapter.init_lora_weights!r}`) starts with a part of the base weights, so that "
                "is not what the policy starts from. Switch it off, or initialize the adapter in another way."
            )
        if args.precompute_ref_log_probs and not (self.takes_precomputed or self.stores_token_logps):
            raise ValueError(
                f"`precompute_ref_log_probs=True` stores one sum for each completion, but the loss of "
                f"{type(self).__name__} may read single tokens of the reference. Switch it off; or, if the loss uses "
                "nothing but sums over a row, say so with `takes_precomputed = True` in the class."
            )
        if ref_model is not None and not self.needs_reference:
            raise ValueError(
                f"`ref_model` was passed to {type(self).__name__}, which compares with no reference. Leave it out."
            )

    def _refuse_what_nobody_reads(self, args: Any) -> None:
        defaults = defaults_of(type(args))
        unread = {name: f"the loss of {type(self).__name__} does not read it" for name in self.trl_loss_fields}
        unread = {name: why for name, why in unread.items() if name not in self.takes_options}
        if not self.needs_reference:
            unread |= {name: f"{type(self).__name__} compares with no reference" for name in REFERENCE_FIELDS}
        for name, why in unread.items():
            if getattr(args, name, defaults.get(name)) != defaults.get(name):
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` has no effect: {why}. Leave it out; or, in a class of your "
                    "own whose loss reads it, name it in `takes_options`."
                )
        if args.humanline and not self.takes_humanline:
            raise ValueError(
                f"`humanline=True` was set, but nothing says that the loss of {type(self).__name__} clamps. Take the "
                "log-ratios from `halos_trl.humanline.log_ratios(..., self.args.humanline_clamp)` and set "
                "`takes_humanline = True` in the class, or leave `humanline` out."
            )

    def _make_reference(self) -> Reference:
        if not self.needs_reference:
            return NoReference()
        if getattr(self.args, "precompute_ref_log_probs", False):
            return PrecomputedColumn()
        sync = self._sync_settings()
        shared = (self.accelerator.unwrap_model, self.no_grad_forward)
        reference: Reference
        adapters = getattr(self.model, "peft_config", {})
        if self.ref_model is not None:
            if sync:
                self._refuse_unlike_reference()
            self.ref_model.eval()  # not every engine's returns the model
            reference = FrozenCopy(self.ref_model, *shared)
        elif sync or REFERENCE_ADAPTER in adapters or edits_base_weights(adapters[POLICY_ADAPTER]):
            # Where a new adapter took a part of the base weights, the base alone is not what the policy was.
            reference = FrozenAdapter(self.model, *shared)
        else:
            reference = AdapterOff(self.model, *shared)
        if sync:
            self.sync_callback = ReferenceSync(reference, steps_in_backward=self.is_deepspeed_enabled, **sync)
            self.add_callback(self.sync_callback)
        return reference

    def before_last_backward(self) -> None:
        if self.sync_callback is not None:
            self.sync_callback.before_backward(self.state, self.model)

    def _refuse_unlike_reference(self) -> None:
        unwrapped = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model)]
        shapes = [{n: shape_of(p) for n, p in parameters_by_name(model).items()} for model in unwrapped]
        if shapes[0] != shapes[1]:
            remedy = "Leave it out: the reference then is a second adapter on the same base model."
            raise ValueError(
                "`humanline` and `sync_ref_model` copy the policy into the reference, but the parameters of "
                "`ref_model` are not those of the policy. "
                + (remedy if hasattr(self.model, "peft_config") else "Pass a reference of the policy's architecture.")
            )

    def _sync_settings(self) -> dict[str, Any] | None:
        args = self.args
        if args.humanline:
            return {"every": args.humanline_sync_steps, "before_step": True}
        if args.sync_ref_model:
            return {"every": args.ref_model_sync_steps, "mix": args.ref_model_mixup_alpha, "before_step": False}
        return None

    # -- one forward -------------------------------------------------------------------------------------------

    def refuse_non_finite(self, policy: TokenTable, reference_BT: torch.Tensor | None) -> None:
        """Raise before a NaN or infinity can reach the weights."""
        tables = {"policy": policy.logps_BT, "reference": reference_BT}
        for name, table in tables.items():
            if table is not None and not torch.isfinite(table).all():
                rows = (~torch.isfinite(table)).any(-1).nonzero().flatten().tolist()
                raise ValueError(
                    f"The {name} model gave log-probabilities that are NaN or infinite at {self.moment}, in rows "
                    f"{rows} of the batch. The weights were not updated with them. Look for NaN in the model's "
                    "weights (a broken checkpoint), lower `learning_rate`, or use `bf16`/`float32` instead of `fp16`."
                )

    def loss_sums(self, output: LossOutput) -> Sums:
        """Rewards and the method's own metrics."""
        # A micro-batch's unclamped fraction cannot be averaged; `clamp_sums` logs its parts instead.
        return {name: sums for name, sums in loss_sums(output).items() if name not in _UNCLAMPED}

    def clamp_sums(self, tokens: TokenTable, reference_BT: torch.Tensor | None, is_chosen_B: torch.Tensor) -> Sums:
        """Under humanline: the unclamped fraction of all tokens, and of each side's."""
        clamp = self.args.humanline_clamp
        if clamp is None:
            return {}
        ratios_BT, _ = log_ratios(tokens.logps_BT, reference_BT, tokens.mask_BT)
        return unclamped_sums(ratios_BT, is_chosen_B, clamp)

    def token_sums(self, tokens: TokenTable) -> Sums:
        """Metrics of the forward pass that every method logs."""
        sums: Sums = {}
        if tokens.entropy_BT is not None:
            sums["entropy"] = total(tokens.entropy_BT, tokens.mask_BT)
        if tokens.aux_loss is not None:
            sums["aux_loss"] = total(tokens.aux_loss.reshape(1))
        return sums

    def with_aux_loss(self, loss: torch.Tensor, tokens: TokenTable) -> torch.Tensor:
        """Add the load-balancing loss of mixture-of-experts models."""
        return loss + self.router_aux_loss_coef * tokens.aux_loss if self.aux_loss_enabled else loss

    # -- checkpoints -------------------------------------------------------------------------------------------

    def before_checkpoint(self, checkpoint_dir: str) -> None:
        if self.reference.moved:
            tensors = gathered(self.reference.tensors(self.model), keep=self.args.should_save)
            if self.args.should_save:
                save_reference(tensors, checkpoint_dir)
            # Into the trainer's state, so that a later run knows what has to be there.
            self.state.stateful_callbacks[_MOVED] = {"args": {}, "attributes": {}}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; a resumed run also gets back the reference that its checkpoint holds.

        `resume_from_checkpoint=True` takes the last *complete* checkpoint of the output directory: one whose writing
        was interrupted is passed over with a warning.
        """
        self._step = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir!r} holds no complete checkpoint. Start "
                    "without it, or pass the path of a checkpoint."
                )
        if resume_from_checkpoint:
            self._restore_reference(os.fspath(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _restore_reference(self, folder: str) -> None:
        state_file = os.path.join(folder, TRAINER_STATE_NAME)
        if not os.path.isfile(state_file):
            return  # transformers has its own message for what is no checkpoint
        state = TrainerState.load_from_json(state_file)
        stored = os.path.isfile(os.path.join(folder, REFERENCE_FILE)) or _MOVED in state.stateful_callbacks
        if stored and self.sync_callback is None:
            raise ValueError(
                f"{folder} holds a reference that has moved ({REFERENCE_FILE}), but this run's stands still: "
                "it would silently be another one. Resume with the `humanline` or `sync_ref_model` setting of the run "
                "that wrote it."
            )
        if stored or (self.sync_callback and self.sync_callback.syncs_until(state.global_step)):
            load_reference(self.reference.tensors(self.model), folder)
            self.reference.moved = True
        elif self.reference.moved:
            raise ValueError(
                f"The reference of {folder} had not left its start, but this trainer has trained before and its "
                "reference has. Make a new trainer and resume with that one."
            )


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint with a trainer state, which is written last; None where there is none."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and p.name.split("-")[-1].isdigit()]
    for folder in sorted(found, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            TrainerState.load_from_json(folder / TRAINER_STATE_NAME)
        except (OSError, ValueError) as error:
            logger.warning(
                f"{folder} is incomplete ({TRAINER_STATE_NAME}: {error}), so the checkpoint before it is used."
            )
        else:
            return str(folder)
    return None


__all__ = ["AlignmentTrainer", "StepAsBatch", "last_complete_checkpoint"]
