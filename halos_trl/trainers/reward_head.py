"""Checks that the head of a reward model is trained: only checkpoints of reward models contain one."""

from __future__ import annotations

from typing import Any

import torch

from .._trl import is_peft_model


def head_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters outside the backbone, by name; empty for a model without a separate backbone."""
    base = model.get_base_model() if is_peft_model(model) else model
    backbone = getattr(base, base.base_model_prefix, None)
    if not isinstance(backbone, torch.nn.Module) or backbone is base:
        return {}
    inside = {id(parameter) for parameter in backbone.parameters()}
    named = base.named_parameters(remove_duplicate=False)
    return {n: p for n, p in named if id(p) not in inside and ".original_module." not in n}


def is_classifier(architectures: list[str] | None) -> bool:
    """Whether a checkpoint saved from these classes contains a classification head."""
    return any("SequenceClassification" in name for name in architectures or ())


def is_new(model: Any) -> bool:
    """Whether the head was not in the checkpoint: `from_pretrained` keeps the name of the class that was saved."""
    base = model.get_base_model() if is_peft_model(model) else model
    saved_as = base.config.architectures
    return not is_classifier(saved_as) and type(base).__name__ not in (saved_as or ())


def mark_as_own(model: Any) -> None:
    """Mark the head as part of the weights, as saving and loading would."""
    if not is_peft_model(model):
        model.config.architectures = [type(model).__name__]


def _saved_with_adapter(name: str) -> bool:
    return ".modules_to_save." in name


def refuse_untrainable_head(model: Any) -> None:
    """Raise ValueError if a new head would stay random or would not be saved."""
    if not is_new(model):
        return
    adapter = is_peft_model(model)
    lost = [
        name
        for name, parameter in head_parameters(model).items()
        if not parameter.requires_grad or (adapter and not _saved_with_adapter(name))
    ]
    if not lost:
        return
    modules = sorted({name.split(".")[0] for name in lost})
    remedy = (
        'Create the adapter with `task_type="SEQ_CLS"` (`--lora_task_type SEQ_CLS`), which trains and saves the '
        f"heads that PEFT knows, or list it explicitly: `modules_to_save={modules}`."
        if adapter
        else "Set `requires_grad` on these parameters."
    )
    raise ValueError(
        f"The checkpoint is not a reward model, so its head {modules} is newly initialized, but "
        + (f"the adapter neither trains nor saves {lost}" if adapter else f"{lost} are frozen")
        + f". The scores would be those of a random head. {remedy}"
    )


def refuse_random_head(model: Any, name: str) -> None:
    """Raise ValueError for a model from a checkpoint without a head that has not been trained since."""
    base = model.get_base_model() if is_peft_model(model) else model
    if not base.config.architectures or not is_new(model):
        return  # built in memory, so the origin of the head is unknown
    random = [name for name in head_parameters(model) if not _saved_with_adapter(name)]
    if random:
        raise ValueError(
            f"{name} was loaded from a checkpoint of {base.config.architectures}, which has no reward head: {random} "
            "are newly initialized, so every score would be random. Pass a reward model, e.g. one trained with "
            "`BradleyTerryTrainer`."
        )


__all__ = [
    "head_parameters",
    "is_classifier",
    "is_new",
    "mark_as_own",
    "refuse_random_head",
    "refuse_untrainable_head",
]
