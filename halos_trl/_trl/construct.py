"""Changes to TRL's constructor: how it loads models, adds the fused head and creates the reference."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

from ..storage import store
from .adapters import POLICY_ADAPTER, REFERENCE_ADAPTER, add_reference_adapter
from .dropout import switch_off_dropout
from .fused_head import add_copyable_head
from .overridden import overridden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .host import TrainerHost

logger = get_logger(__name__)


@contextlib.contextmanager
def own_reference_adapter(model: Any, wanted: bool) -> Iterator[None]:
    """Replace the step of TRL's constructor that adds a reference adapter to a `PeftModel` and fills it."""
    if isinstance(model, str) or not is_peft_model(model):
        yield
        return
    if wanted:
        with overridden(model, add_adapter=lambda name, config: add_reference_adapter(model)):
            yield
        return

    def policys_parameter(name: str) -> torch.nn.Parameter:
        return type(model).get_parameter(model, name.replace(f".{REFERENCE_ADAPTER}.", f".{POLICY_ADAPTER}."))

    # TRL's copy then copies the policy's parameters onto themselves, which changes nothing.
    with overridden(model, add_adapter=lambda name, config: None, get_parameter=policys_parameter):
        yield


def _copy_of(policy: PreTrainedModel) -> PreTrainedModel:
    reference = copy.deepcopy(policy)
    reference.gradient_checkpointing_disable()
    return reference.requires_grad_(False).eval()


def _is_partitioned(model: torch.nn.Module) -> bool:
    """Whether the parameters are sharded by DeepSpeed ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def built_our_way(trainer: TrainerHost, model: Any) -> Iterator[None]:
    """Replace helpers that TRL's constructor calls: loading a second model, adding the fused head to models, and
    disabling dropout.
    """
    host = sys.modules[trainer.trl_class.__module__]
    load = host.create_model_from_path  # type: ignore[attr-defined]
    with overridden(
        host,
        create_model_from_path=functools.partial(_reference_like_policy, trainer, model, load),
        add_fused_lm_head=add_copyable_head,
        disable_dropout_in_model=switch_off_dropout,
        **_no_engine_for_stored(trainer),
    ):
        yield


def _storage(trainer: TrainerHost) -> str:
    return getattr(trainer, "reference_storage", "same")


def _no_engine_for_stored(trainer: TrainerHost) -> dict[str, Any]:
    """Keep a stored reference out of DeepSpeed's engine, which would cast it and move it to the device."""

    def as_it_is(model: PreTrainedModel, accelerator: Any) -> PreTrainedModel:
        return model.to(accelerator.device)

    return {} if _storage(trainer) == "same" else {"prepare_deepspeed": as_it_is}


def _reference_like_policy(
    trainer: TrainerHost, model: Any, load: Callable[..., Any], path: str, *args: Any, **kwargs: Any
) -> PreTrainedModel | None:
    """Load the policy; when TRL loads a second model, return the reference, copied if the policy was an instance."""
    policy = getattr(trainer, "model", None)
    if policy is None:  # TRL is loading the policy itself
        return load(path, *args, **kwargs)
    if not trainer.needs_reference:
        return None
    if _storage(trainer) == "cpu":
        kwargs["device_map"] = None
    reference = _loaded_or_copied(model, policy, load, path, *args, **kwargs)
    return store(reference, _storage(trainer), trainer.args.device)


def _loaded_or_copied(
    model: Any, policy: PreTrainedModel, load: Callable[..., Any], path: str, *args: Any, **kwargs: Any
) -> PreTrainedModel:
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
