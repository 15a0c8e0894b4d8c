"""What TRL must not do, or must get in another form, while it builds a trainer."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

from .adapters import POLICY_ADAPTER, REFERENCE_ADAPTER, add_reference_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .host import TrainerHost

logger = get_logger(__name__)


@contextlib.contextmanager
def overridden(target: Any, **values: Any) -> Iterator[None]:
    """Set instance attributes for the duration of a block."""
    own = vars(target)
    before = {name: own[name] for name in values if name in own}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name in values:
            if name in before:
                setattr(target, name, before[name])
            else:
                delattr(target, name)


@contextlib.contextmanager
def own_reference_adapter(model: Any, wanted: bool) -> Iterator[None]:
    """Decide what TRL gets when it adds a reference adapter to a `PeftModel` and fills it."""
    if isinstance(model, str) or not is_peft_model(model):
        yield
        return
    if wanted:
        with overridden(model, add_adapter=lambda name, config: add_reference_adapter(model)):
            yield
        return

    def policys_parameter(name: str) -> torch.nn.Parameter:
        return type(model).get_parameter(model, name.replace(f".{REFERENCE_ADAPTER}.", f".{POLICY_ADAPTER}."))

    # It copies the policy's parameters onto themselves.
    with overridden(model, add_adapter=lambda name, config: None, get_parameter=policys_parameter):
        yield


def _copy_of(policy: PreTrainedModel) -> PreTrainedModel:
    reference = copy.deepcopy(policy)
    reference.gradient_checkpointing_disable()
    return reference.requires_grad_(False).eval()


def _is_partitioned(model: torch.nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 holds only shards of the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def reference_like_policy(trainer: TrainerHost, model: Any) -> Iterator[None]:
    """Decide what TRL gets when it asks for a second model from the policy's hub id."""
    host = sys.modules[trainer.trl_class.__module__]
    load = host.create_model_from_path  # type: ignore[attr-defined]

    def create_model_from_path(path: str, *args: Any, **kwargs: Any) -> PreTrainedModel | None:
        policy = getattr(trainer, "model", None)
        if policy is None:  # TRL is loading the policy itself
            return load(path, *args, **kwargs)
        if not trainer.needs_reference:
            return None
        if isinstance(model, str):
            return load(path, *args, **kwargs)
        if _is_partitioned(policy):
            logger.warning(
                "The policy was passed as an instance and is partitioned by DeepSpeed ZeRO-3, so it cannot be copied; "
                f"the reference is loaded from {path!r} instead. If the instance's weights differ from that "
                "checkpoint, pass `ref_model` explicitly."
            )
            return load(path, *args, **kwargs)
        return _copy_of(policy)

    host.create_model_from_path = create_model_from_path  # type: ignore[attr-defined]
    try:
        yield
    finally:
        host.create_model_from_path = load  # type: ignore[attr-defined]
