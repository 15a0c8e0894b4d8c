"""The methods of `halos-trl train` and `rounds`: trainer, config, feedback, defaults on the embedded task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import get_peft_config, get_quantization_config

from ..configs import (
    BradleyTerryConfig,
    CDPOConfig,
    DPOConfig,
    GRPOConfig,
    IPOConfig,
    KTOConfig,
    PPOConfig,
    SimPOConfig,
    SLiCConfig,
)
from ..spelling import did_you_mean
from ..trainers import (
    BradleyTerryTrainer,
    CDPOTrainer,
    DPOTrainer,
    GRPOTrainer,
    IPOTrainer,
    KTOTrainer,
    PPOTrainer,
    SimPOTrainer,
    SLiCTrainer,
)
from .flags import HalosScriptArguments


@dataclass
class PPOScriptArguments(HalosScriptArguments):
    """The script arguments, and PPO's reward model."""

    reward_model_path: str | None = field(
        default=None, metadata={"help": "Reward model (Hub id or folder) for rows without a score column."}
    )


@dataclass(frozen=True)
class Method:
    """Trainer, config, feedback and default settings of a method."""

    trainer: Any
    config: Any
    feedback: Literal["unpaired", "paired", "scored"]
    toy: Mapping[str, Any]
    """Default settings on the embedded task, the same as in `examples/train_<method>.py`."""
    script: type[HalosScriptArguments] = HalosScriptArguments
    toy_humanline: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that differ with `--humanline`."""


_PAIRED = {"learning_rate": 3e-4, "per_device_train_batch_size": 64, "num_train_epochs": 1}
_SCORED = {"learning_rate": 3e-4, "per_device_train_batch_size": 64, "num_train_epochs": 3}
_KTO = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "adam_beta2": 0.98,
    "per_device_train_batch_size": 64,
    "num_train_epochs": 4,
}
_SELDOM = {"humanline_sync_steps": 32}

METHODS: dict[str, Method] = {
    "kto": Method(KTOTrainer, KTOConfig, "unpaired", _KTO, toy_humanline=_SELDOM | {"undesirable_weight": 0.3}),
    "dpo": Method(DPOTrainer, DPOConfig, "paired", _PAIRED | {"beta": 1.0}, toy_humanline=_SELDOM),
    "cdpo": Method(CDPOTrainer, CDPOConfig, "paired", _PAIRED | {"beta": 1.0}),
    "ipo": Method(IPOTrainer, IPOConfig, "paired", _PAIRED | {"tau": 1.0}),
    "simpo": Method(SimPOTrainer, SimPOConfig, "paired", _PAIRED),
    "slic": Method(SLiCTrainer, SLiCConfig, "paired", _PAIRED),
    "grpo": Method(GRPOTrainer, GRPOConfig, "scored", _SCORED | {"epsilon": 0.5, "epsilon_high": 2.0, "beta": 0.05}),
    "ppo": Method(PPOTrainer, PPOConfig, "scored", _SCORED | {"kl_coef": 0.01}, PPOScriptArguments),
    "reward": Method(BradleyTerryTrainer, BradleyTerryConfig, "paired", _PAIRED),
}


def method_of(words: list[str], command: str, methods: Mapping[str, Method]) -> tuple[str, list[str]]:
    """The method at the start of the command line, and the flags after it. Raises ValueError for an unknown method."""
    if not words or words[0].startswith("-"):
        raise ValueError(
            f"`halos-trl {command}` needs a method: {', '.join(methods)}. E.g. `halos-trl {command} kto`; `halos-trl "
            f"{command} kto --help` lists the flags."
        )
    name, *flags = words
    if name not in methods:
        raise ValueError(f"`{name}` is not a method; choose one of {', '.join(methods)}.{did_you_mean(name, methods)}")
    return name, flags


def make_trainer(method: Method, model: str, training_args: Any, model_args: Any, **arguments: Any) -> Any:
    """The method's trainer, with the quantization and adapter that the flags specify."""
    return method.trainer(
        model=model,
        args=training_args,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **arguments,
    )


__all__ = ["METHODS", "Method", "make_trainer", "method_of"]
