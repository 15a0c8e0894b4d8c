"""Policy and reference adapters on one base model: adding, selecting and disabling them, and what each contains."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from trl.trainer.utils import use_adapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


REFERENCE_ADAPTER = "ref"
"""Name of the frozen reference adapter; TRL uses the same name for pretrained adapters."""

POLICY_ADAPTER = "default"


def refuse_unfit_adapters(model: Any) -> None:
    """Raise ValueError for a `PeftModel` whose policy adapter cannot be identified."""
    adapters = [] if isinstance(model, str) or not is_peft_model(model) else list(model.peft_config)
    active = list(model.active_adapters) if adapters else []
    if adapters and (active != [POLICY_ADAPTER] or REFERENCE_ADAPTER in adapters):
        raise ValueError(
            f"The PeftModel has adapters {adapters}, of which {active} is active. The active one is trained and "
            f"must be called {POLICY_ADAPTER!r}; {REFERENCE_ADAPTER!r} is kept for the reference. Load it with "
            f"`PeftModel.from_pretrained(base, folder, adapter_name={POLICY_ADAPTER!r}, is_trainable=True)`."
        )


def add_reference_adapter(peft_model: PeftModel) -> None:
    """Add a second adapter with the policy adapter's configuration. Raises ValueError if PEFT supports only one."""
    config = copy.deepcopy(peft_model.peft_config[POLICY_ADAPTER])
    if edits_base_weights(config):
        config.init_lora_weights = True  # overwritten later; other inits would modify the base again
    if getattr(config, "bias", "none") != "none":
        config.bias = "none"  # biases belong to the shared base model; `AdapterOff` stores them
    with _flags_kept(peft_model):
        type(peft_model).add_adapter(peft_model, REFERENCE_ADAPTER, config)


def edits_base_weights(config: PeftConfig) -> bool:
    """Whether adding this adapter moves part of the base weights into it (PiSSA and similar methods)."""
    kind = getattr(config, "init_lora_weights", True)
    return isinstance(kind, str) and kind.startswith(("pissa", "corda", "olora", "loftq", "lora_ga"))


@contextlib.contextmanager
def reading_adapter(peft_model: PeftModel, name: str | None) -> Iterator[None]:
    """Run forward passes without gradient through the named adapter, or without adapter if `name` is None.

    PEFT's own switch also changes `requires_grad` of every parameter, and changes it back afterwards. No gradient is
    computed inside the block, so it is enough to tell the layers which adapter to use.
    """
    layers: list[Any] = [
        m for m in peft_model.modules() if isinstance(m, BaseTunerLayer) or "_active_adapter" in vars(m)
    ]
    if name is None or not layers:  # prompt learning has no adapter layers
        # Re-enabling would make the whole adapter trainable, including parameters that the user froze.
        with _flags_kept(peft_model), use_adapter(peft_model, name):
            yield
        return
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


@contextlib.contextmanager
def _flags_kept(model: torch.nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of all parameters that exist before the block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def restored_by_switch(peft_model: PeftModel) -> set[int]:
    """`id` of every parameter that has no effect while the adapter is disabled."""
    owned: set[int] = set()
    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for path in module.adapter_layer_names:
                holder = attrgetter(path)(module)
                owned |= {id(p) for p in _parameters_in(holder)}
    encoder = getattr(peft_model, "prompt_encoder", None)
    return owned | ({id(p) for p in encoder.parameters()} if encoder is not None else set())


def _parameters_in(holder: Any) -> Iterator[torch.nn.Parameter]:
    if isinstance(holder, torch.nn.Parameter):
        yield holder
    elif isinstance(holder, torch.nn.Module):
        yield from holder.parameters()


def saved_with_adapter(peft_model: PeftModel) -> set[int]:
    """Memory addresses of the tensors that `save_pretrained` writes for the policy adapter."""
    state = get_peft_model_state_dict(peft_model, adapter_name=POLICY_ADAPTER)
    return {tensor.data_ptr() for tensor in state.values()}
