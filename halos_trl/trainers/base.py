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
from .._trl import REFERENCE_ADAPTER, TokenTable
from ..humanline import log_ratios, unclamped_counts
from ..metrics import Sums, loss_sums, total
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

if TYPE_CHECKING:
    from .._trl import TrainerHost as _Host
else:
    _Host = object

logger = get_logger(__name__)


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
        return mean_loss * weight

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

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        super().check_arguments(args, model, ref_model)
        if args.precompute_ref_log_probs and self.needs_reference and not self.takes_precomputed:
            raise ValueError(
                f"`precompute_ref_log_probs=True` stores one sum for each completion, but the loss of "
                f"{type(self).__name__} may read single tokens of the reference. Switch it off; or, if the loss uses "
                "nothing but sums over a row, say so with `takes_precomputed = True` in the class."
            )
        if ref_model is not None and not self.needs_reference:
            raise ValueError(
                f"`ref_model` was passed to {type(self).__name__}, which compares with no reference. Leave it out."
            )

    def _make_reference(self) -> Reference:
        if not self.needs_reference:
            return NoReference()
        if getattr(self.args, "precompute_ref_log_probs", False):
            return PrecomputedColumn()
        sync = self._sync_settings()
        shared = (self.accelerator.unwrap_model, self.no_grad_forward)
        reference: Reference
        if self.ref_model is not None:
            if sync:
                self._refuse_unlike_reference()
            reference = FrozenCopy(self.ref_model.eval(), *shared)
        elif sync or REFERENCE_ADAPTER in self.model.peft_config:
            reference = FrozenAdapter(self.model, *shared)
        else:
            reference = AdapterOff(self.model, *shared)
        if sync:
            self.sync_callback = ReferenceSync(reference, **sync)
            self.add_callback(self.sync_callback)
        return reference

    def _refuse_unlike_reference(self) -> None:
        if self.args.save_strategy != "no" and any(hasattr(p, "ds_id") for p in self.ref_model.parameters()):
            raise ValueError(
                "Under DeepSpeed ZeRO-3 a reference that moves cannot be written into checkpoints, and a resumed run "
                "would go on from another one. Use ZeRO-2 or FSDP, or set `save_strategy='no'`."
            )
        unwrap = self.accelerator.unwrap_model
        shapes = [{n: p.shape for n, p in unwrap(m).named_parameters()} for m in (self.model, self.ref_model)]
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
                    f"The {name} model gave log-probabilities that are NaN or infinite at "
                    f"{'step ' + str(self.state.global_step + 1) if self.mode == 'train' else 'evaluation'}, in rows "
                    f"{rows} of the batch. The weights were not updated with them. Look for NaN in the model's "
                    "weights (a broken checkpoint), lower `learning_rate`, or use `bf16`/`float32` instead of `fp16`."
                )

    def loss_sums(self, output: LossOutput) -> Sums:
        """Rewards and the method's own metrics."""
        # A micro-batch's unclamped fraction cannot be averaged; `clamp_sums` logs its parts instead.
        return {name: sums for name, sums in loss_sums(output).items() if not name.startswith("unclamped")}

    def clamp_sums(self, tokens: TokenTable, reference_BT: torch.Tensor | None, is_chosen_B: torch.Tensor) -> Sums:
        """Under humanline: the unclamped fraction of all tokens, and of each side's."""
        clamp = self.args.humanline_clamp
        if clamp is None:
            return {}
        ratios_BT, _ = log_ratios(tokens.logps_BT, reference_BT, tokens.mask_BT)
        sides = {"": ratios_BT, "/chosen": ratios_BT[is_chosen_B], "/rejected": ratios_BT[~is_chosen_B]}
        return {f"unclamped{side}": unclamped_counts(table, clamp) for side, table in sides.items()}

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
            tensors = gathered(self.reference.tensors(self.model))  # on every process: sharded ones gather together
            if self.is_world_process_zero():
                save_reference(tensors, checkpoint_dir)

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
        step = TrainerState.load_from_json(state_file).global_step
        stored = os.path.isfile(os.path.join(folder, REFERENCE_FILE))
        if stored and self.sync_callback is None:
            raise ValueError(
                f"{folder} holds a reference that has moved ({REFERENCE_FILE}), but this run's stands still: "
                "it would silently be another one. Resume with the `humanline` or `sync_ref_model` setting of the run "
                "that wrote it."
            )
        if stored or (self.sync_callback and self.sync_callback.syncs_until(step)):
            load_reference(self.reference.tensors(self.model), folder)
            self.reference.moved = True


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint with a trainer state, which is written last; None where there is none."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and p.name.split("-")[-1].isdigit()]
    for folder in sorted(found, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        if (folder / TRAINER_STATE_NAME).is_file():
            return str(folder)
        logger.warning(f"{folder} is incomplete (no {TRAINER_STATE_NAME}), so the checkpoint before it is used.")
    return None


__all__ = ["AlignmentTrainer", "StepAsBatch", "last_complete_checkpoint"]
