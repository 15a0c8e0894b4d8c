"""Two adapters on one base model: adding the reference's, and reading through either of them or through none."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from trl.trainer.utils import use_adapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


REFERENCE_ADAPTER = "ref"
"""Name of the frozen adapter that holds the reference; TRL uses the same one for pretrained adapters."""

POLICY_ADAPTER = "default"


def add_reference_adapter(peft_model: PeftModel) -> None:
    """A second adapter of the policy's configuration. Raises ValueError where PEFT can have only one."""
    config = copy.deepcopy(peft_model.peft_config[POLICY_ADAPTER])
    if edits_base_weights(config):
        config.init_lora_weights = True  # what it starts from is overwritten; the base must not be edited twice
    type(peft_model).add_adapter(peft_model, REFERENCE_ADAPTER, config)


def edits_base_weights(config: PeftConfig) -> bool:
    """Whether adding this adapter moves a part of the base weights into it (PiSSA and its kin)."""
    kind = getattr(config, "init_lora_weights", True)
    return isinstance(kind, str) and kind.startswith(("pissa", "corda", "olora", "loftq", "lora_ga"))


@contextlib.contextmanager
def reading_adapter(peft_model: PeftModel, name: str | None) -> Iterator[None]:
    """Forward passes without gradient through another adapter, or through none.

    PEFT's own switch also turns every parameter's `requires_grad` over, twice; where nothing is trained inside the
    block, telling the layers which adapter to read is enough.
    """
    layers: list[Any] = [
        m for m in peft_model.modules() if isinstance(m, BaseTunerLayer) or "_active_adapter" in vars(m)
    ]
    if name is None or not layers:  # prompt learning keeps its adapter elsewhere
        with use_adapter(peft_model, name):
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
