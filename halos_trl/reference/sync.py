"""The schedule on which the reference follows the policy."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .sources import Reference


class ReferenceSync(TrainerCallback):
    """Updates the reference from the policy.

    Humanline (arXiv:2509.24207): reference := policy as it is *before* the optimizer step, every `every` steps.
    TR-DPO (arXiv:2404.09656, `sync_ref_model`): after the step, mixed with weight `mix`.
    """

    def __init__(
        self, reference: Reference, *, every: int, mix: float = 1.0, before_step: bool, steps_in_backward: bool = False
    ):
        self.reference = reference
        self.every = every
        self.mix = mix
        self.before_step = before_step
        # DeepSpeed updates the weights inside `backward`, before any callback is called.
        self.steps_in_backward = steps_in_backward

    def syncs_until(self, step: int) -> int:
        """Number of syncs after `step` optimizer steps."""
        return step // self.every

    def before_update(self, state: Any, model: Any) -> None:
        """Call this after the last backward pass of an optimizer step and before its update."""
        if self.before_step and (state.global_step + 1) % self.every == 0:
            self.reference.sync(model, self.mix)

    def before_backward(self, state: Any, model: Any) -> None:
        """Call this after the last loss of an optimizer step and before its backward pass."""
        if self.steps_in_backward:
            self.before_update(state, model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.steps_in_backward:
            self.before_update(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.before_step and state.global_step % self.every == 0:
            self.reference.sync(model, self.mix)


__all__ = ["ReferenceSync"]
