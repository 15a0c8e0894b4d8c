"""Access to private parts of `trl.GRPOTrainer`, which samples during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import trl

from .construct import built_our_way, own_reference_adapter
from .host import TrainerHost
from .overridden import overridden
from .saving import SavesPolicy

LogRatios = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class OnlineHost(SavesPolicy, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with a hook for the loss of a micro-batch and one for checkpoints."""

    trl_class: ClassVar[type] = trl.GRPOTrainer
    needs_reference: ClassVar[bool] = True

    _tag_names = [*trl.GRPOTrainer._tag_names, "halos-trl"]

    def build(self, model: Any, args: Any, **trl_arguments: Any) -> None:
        """Run TRL's constructor such that it creates a reference (a copy, or an adapter's base) for any `beta`.

        Only `loss_against_reference` reads that reference: `beta` is 0 while TRL samples.
        """
        beta = args.beta
        with (
            overridden(args, beta=beta or 1.0),
            built_our_way(self, model),
            own_reference_adapter(model, self.needs_reference),
        ):
            super().__init__(model=model, args=args, **trl_arguments)
        self.beta = 0.0

    no_grad_forward = TrainerHost.no_grad_forward

    def loss_against_reference(
        self, model: Any, inputs: dict[str, Any], reference: Callable[[], Any], log_ratios: LogRatios
    ) -> torch.Tensor:
        """TRL's loss of a micro-batch, with the reference in place of the sampling policy.

        Args:
            model: the policy.
            inputs: TRL's micro-batch; completions `(B, T)`.
            reference: returns a context manager that yields the reference model for a forward pass.
            log_ratios: maps policy log-probs, reference log-probs and mask, each `(B, T)`, to the log-ratios that
                TRL's loss uses, `(B, T)` in nats.
        """
        completion_mask = inputs["completion_mask"]
        mask_BT = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
        score = self._get_per_token_logps_and_entropies
        own = dict(inputs)

        def scored(model: Any, *args: Any, **kwargs: Any) -> Any:
            with reference() as reference_model:
                reference_BT, _, _ = score(
                    reference_model, *args, **kwargs | {"compute_entropy": False, "compute_aux_loss": False}
                )
            policy_BT, entropies_BT, aux_loss = score(model, *args, **kwargs)
            # TRL subtracts this from the policy's log-probs, which gives `log_ratios`, gradient included.
            own["old_per_token_logps"] = policy_BT - log_ratios(policy_BT, reference_BT, mask_BT)
            own["ref_per_token_logps"] = reference_BT
            return policy_BT, entropies_BT, aux_loss

        with overridden(self, _get_per_token_logps_and_entropies=scored, beta=self.args.beta):
            return super()._compute_loss(model, own)

    def online_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Hook: the loss of a micro-batch."""
        return super()._compute_loss(model, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return self.online_loss(model, inputs)

    def log_share(self, name: str, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Add part / whole, each summed over processes, to the next log line, as the mean over calls."""
        mode = "train" if self.model.training else "eval"
        part, whole = self.accelerator.reduce(torch.stack([part, whole]).double(), reduction="sum")
        self._metrics[mode][name].append((part / whole.clamp(min=1)).item())
