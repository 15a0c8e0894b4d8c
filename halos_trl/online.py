"""Humanline for TRL's online GRPO, which samples completions during training.

    from halos_trl.online import GRPOConfig, GRPOTrainer  # was: from trl import

Sampling (transformers or vLLM), reward functions, tools and environments are TRL's. With `humanline=True`, the ratios
in the loss compare the policy with the reference, while TRL's compare it with the model that generated the samples. In
addition,

- each token's log-ratio is clamped to [`log_epsilon_p`, `log_epsilon_r`] before the ratio is formed;
- the reference follows the policy: the policy is copied into it before every `humanline_sync_steps`-th optimizer step.
  With LoRA, it is a second, frozen adapter on the same base model. Checkpoints include it.

The KL penalty (`beta`) uses the same reference and is not clamped, as in `halos_trl.losses.grpo`. Humanline is
described in arXiv:2509.24207. Without it, runs are bit-identical to TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from accelerate.utils import DistributedType

from ._trl import OnlineHost, is_peft_model, refuse_unfit_adapters
from .configs import HumanlineConfig
from .humanline import clamp, log_ratios, unclamped_counts
from .reference import FrozenAdapter, FrozenCopy, Reference, ReferenceSync, restore_reference, write_reference
from .trainers.checkpoints import (
    begin_checkpoint,
    lasting_settings,
    refuse_other_settings,
    stops_finished_run,
    train_from,
    write_settings,
)

_UNCLAMPABLE = {
    "cispo": "detaches the ratio and takes the gradient of the log-probability itself",
    "vespo": "detaches the ratio and takes the gradient of the log-probability itself",
}


@dataclass
class GRPOConfig(HumanlineConfig, trl.GRPOConfig):
    """`trl.GRPOConfig` with humanline.

    Parameters:
        use_bias_correction_kl (`bool`, *optional*):
            TRL's option: multiply the KL term by the ratio of the loss. Defaults to `True`, as in TRL. Under
            humanline, where the ratio is not an importance weight, it defaults to `False`, and `True` is refused.

    Raises ValueError for bounds that do not enclose 0, for humanline's settings without `humanline`, for `humanline`
    with `sync_ref_model`, and for `humanline` with a `loss_type` whose gradient the clamp does not affect.
    """

    use_bias_correction_kl: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": (
                "Multiply the KL term by the ratio of the loss (TRL's option and default). Off under `humanline`, "
                "whose ratio is not an importance weight."
            )
        },
    )

    def __post_init__(self) -> None:
        if self.use_bias_correction_kl is None:
            self.use_bias_correction_kl = not self.humanline
        super().__post_init__()
        if self.humanline and self.use_bias_correction_kl:
            raise ValueError(
                "`use_bias_correction_kl=True` weights the KL term by the ratio of the policy and the model that "
                "generated the samples, but under `humanline` the ratio compares policy and reference. Leave it out."
            )
        if self.humanline and self.loss_type in _UNCLAMPABLE:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` {_UNCLAMPABLE[self.loss_type]}, so tokens that `humanline` clamps "
                "would still be trained on. Use 'dapo', 'grpo', 'bnpo' or 'dr_grpo', or leave `humanline` out."
            )


class GRPOTrainer(OnlineHost):
    """`trl.GRPOTrainer` with humanline if `args.humanline` is set. Takes TRL's arguments.

    Logs `unclamped` under humanline: the fraction of completion tokens whose log-ratio lies inside the bounds.

    Raises ValueError for a `PeftModel` whose active adapter is not called `default`, for checkpoints with other
    humanline settings, and for humanline under DeepSpeed, whose engine updates the weights inside `backward`.
    """

    args: GRPOConfig

    def __init__(self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, **trl_arguments: Any):
        self.sync_callback: ReferenceSync | None = None
        self.reference: Reference | None = None
        if args is None or not getattr(args, "humanline", False):
            super().__init__(model, reward_funcs, args, **trl_arguments)
            return
        if args.deepspeed or args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "`humanline=True` moves the reference before each update, but DeepSpeed updates the weights inside "
                "`backward`. Launch with DDP or FSDP2, or leave `humanline` out."
            )
        refuse_unfit_adapters(model)
        self.build(model, args, reward_funcs=reward_funcs, **trl_arguments)
        self.reference = self._make_reference()
        self.sync_callback = ReferenceSync(
            self.reference, every=args.humanline_sync_steps, before_step=True, steps_in_backward=False
        )
        self.add_callback(self.sync_callback)

    def _make_reference(self) -> Reference:
        shared = (self.accelerator.unwrap_model, self.no_grad_forward)
        if is_peft_model(self.model):
            return FrozenAdapter(self.model, *shared)
        self.ref_model.eval()
        return FrozenCopy(self.ref_model, *shared)

    def online_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self.reference is None:
            return super().online_loss(model, inputs)
        return self.loss_against_reference(model, inputs, self.reference.reading, self._clamped_log_ratios)

    def _clamped_log_ratios(
        self, policy_BT: torch.Tensor, reference_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> torch.Tensor:
        raw_BT, _ = log_ratios(policy_BT, reference_BT, mask_BT)
        humanline = self.args.humanline_clamp
        assert humanline is not None
        self.log_share("unclamped", *unclamped_counts(raw_BT, humanline))
        return clamp(raw_BT, humanline)

    # -- loops --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, from a complete checkpoint or the start, with exclusive use of the output directory."""
        train = super().train
        return train_from(self, resume_from_checkpoint, lambda checkpoint: train(checkpoint, *args, **kwargs))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The host's batches, or none if a finished run is resumed."""
        return ([], None) if stops_finished_run(self) else super().get_batch_samples(*args, **kwargs)

    # -- checkpoints -------------------------------------------------------------------------------------------

    @property
    def lasting_settings(self) -> dict[str, Any]:
        """The settings that must be the same in a resumed run as in the run that wrote the checkpoint."""
        return lasting_settings(self.args)

    def before_checkpoint(self, checkpoint_dir: str) -> None:
        if self.reference is None:
            return
        if self.args.should_save:
            begin_checkpoint(checkpoint_dir)
        write_settings(self.lasting_settings, self.state)
        write_reference(self.reference, self.model, self.state, checkpoint_dir, keep=self.args.should_save)

    def restore(self, folder: str) -> None:
        if self.reference is not None:
            restore_reference(self.reference, self.sync_callback, self.model, folder)
        refuse_other_settings(self.lasting_settings, folder)


__all__ = ["GRPOConfig", "GRPOTrainer"]
