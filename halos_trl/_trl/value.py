"""The value head as part of the policy during training."""

from __future__ import annotations

import contextlib
import functools
import types
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate.utils import is_peft_model
from trl.trainer.utils import FusedCausalLMOutput

from ..forward.heads import only_wanted
from ..sharded import whole
from ..value_head import NAME as VALUE_HEAD
from ..value_head import ValueHead, load_value_head, save_value_head, taken_off
from .scored import ScoredHost
from .zero import OwnLimit, give_own_groups


@dataclass
class _WithValues(FusedCausalLMOutput):
    """Model output with values, as a field because DDP and autocast rebuild outputs from their fields."""

    state_values: torch.Tensor | None = None


_LAST_HIDDEN = "_hidden_for_value_head"


def _attach(head: ValueHead, causal_lm: Any) -> None:
    """Make the head part of the policy, whose forward pass with the fused LM head then also returns `state_values`."""
    causal_lm.add_module(VALUE_HEAD, head)
    # Code that saves the policy without this package must get the plain model, too.
    own = {f"{VALUE_HEAD}.{name}" for name in head.state_dict()}
    causal_lm._keys_to_ignore_on_save = own | set(causal_lm._keys_to_ignore_on_save or ())
    causal_lm.base_model.register_forward_hook(_keep_last_hidden)
    fused_forward = causal_lm.forward.__func__

    # The closure does not refer to this model, so that a deep copy uses its own weights.
    @functools.wraps(fused_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = fused_forward(self, *args, **kwargs)
        hidden_BSH = vars(self.base_model).pop(_LAST_HIDDEN, None)  # None if another trainer has replaced the head
        if not kwargs.get("fused_lm_head"):
            return outputs
        wanted_BTH = hidden_BSH if only_wanted() else hidden_BSH[:, :-1]
        return _WithValues(**outputs, state_values=getattr(self, VALUE_HEAD)(wanted_BTH))

    causal_lm.forward = types.MethodType(forward, causal_lm)


def _keep_last_hidden(backbone: torch.nn.Module, args: Any, output: Any) -> None:
    vars(backbone)[_LAST_HIDDEN] = output.last_hidden_state


class ValueHost(ScoredHost):
    """A host whose policy has a value head during training and is saved without it."""

    value_head: ValueHead
    _own_limit: OwnLimit | None = None

    def attach_value_head(self) -> None:
        """Add a new value head to the policy. Raises ValueError if its gradient cannot be clipped separately."""
        if not hasattr(transformers.Trainer, "_clip_grad_norm"):
            raise ValueError(
                f"{type(self).__name__} clips the gradient of the value head separately from the policy's, which "
                f"transformers {transformers.__version__} does not support. Use transformers 5."
            )
        if self.is_deepspeed_enabled and "optimizer" in self.accelerator.state.deepspeed_plugin.deepspeed_config:
            raise ValueError(
                "The `optimizer` section of DeepSpeed's configuration puts all parameters into one group, but "
                f"{type(self).__name__} clips the gradient of the value head separately from the policy's. Leave that "
                "section out, and set `optim` and `learning_rate` instead."
            )
        causal_lm = self._causal_lm()
        config = causal_lm.config.get_text_config()
        size = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
        self.value_head = ValueHead(size, self.args.seed).to(causal_lm.get_output_embeddings().weight.device)
        _attach(self.value_head, causal_lm)

    def _causal_lm(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.refuse_non_finite_weights(state_dict)
        folder = self.args.output_dir if output_dir is None else output_dir
        if state_dict is None:
            head = self.value_head.state_dict()
        else:  # already gathered from shards
            marker = f"{VALUE_HEAD}."
            head = {name.split(marker, 1)[1]: t for name, t in state_dict.items() if marker in name}
            state_dict = {name: t for name, t in state_dict.items() if marker not in name}
        if head and self.args.should_save:  # FSDP calls this on every process, but gathers on only one
            save_value_head(head, folder)
        with taken_off(self._causal_lm()):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._as_in_checkpoints():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _as_in_checkpoints(self) -> AbstractContextManager[None]:
        """Keep the head on the policy if the engine's checkpoints contain it; otherwise remove it temporarily."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return contextlib.nullcontext()
        return taken_off(self._causal_lm())

    def _load_best_model(self) -> None:
        with self._as_in_checkpoints():
            super()._load_best_model()
        load_value_head(self.value_head, self.state.best_model_checkpoint)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.is_deepspeed_enabled:
            give_own_groups(optimizer, self.value_head.parameters())
        return optimizer

    def limit_value_head(self, max_norm: float) -> None:
        """Hook into DeepSpeed, which updates the weights before the trainer can clip their gradients."""
        zero = self.deepspeed.optimizer if self.is_deepspeed_enabled else None
        if zero is not None and (self._own_limit is None or self._own_limit.zero is not zero):
            self._own_limit = OwnLimit(zero, self.value_head.parameters(), max_norm)

    def limited_value_head_norm(self, max_norm: float) -> torch.Tensor:
        """Clip the value head's gradient, unless DeepSpeed has done so, and return its norm before clipping."""
        if self._own_limit is not None:
            return self._own_limit.norm
        return whole(torch.nn.utils.clip_grad_norm_(self.value_head.parameters(), max_norm))

    def _clip_grad_norm(self, model: Any) -> Any:
        own = {id(parameter) for parameter in self.value_head.parameters()}
        policy = [parameter for parameter in model.parameters() if id(parameter) not in own]
        return self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)
