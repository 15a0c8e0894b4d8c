"""Checks before the first update: the models match, parameters are trained, and the reference is correct."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.logging import get_logger
from transformers import AutoConfig

from .._trl import is_peft_model, rates_in_config, saved_with_adapter, score_tokens
from ..reference import FrozenAdapter, NoReference, PrecomputedColumn, spread_evenly
from ..sharded import parameters_by_name
from ..value_head import NAME as VALUE_HEAD

if TYPE_CHECKING:
    from .base import AlignmentTrainer

logger = get_logger(__name__)

_STORED_AS = {"same": "float32", "cpu": "float32", "bf16": "half", "8bit": "8bit", "4bit": "4bit"}

PADDING_ROWS = 1024
"""Models with the same tokenizer may differ by this many embedding rows, because embeddings are padded to round sizes.
"""

TOLERANCE = {"float32": 1e-4, "half": 0.05, "8bit": 0.1, "4bit": 0.5}
"""Average difference, in nats per completion token, that two computations of the same log-probs may have, by precision
or by the storage of one model's weights.
"""


# -- the models that were passed -------------------------------------------------------------------------------------


def refuse_unfit_models(model: Any, ref_model: Any, args: Any) -> None:
    """Refuse a policy, before it is loaded, that is not a decoder or whose vocabulary differs from that of
    `ref_model`.
    """
    config = _config_of(model, args)
    if config is not None and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"`model` ({model!r}) is of type {config.model_type!r}, which has an encoder and a decoder. The methods "
            "of this package train on prompt and completion as one sequence: pass a decoder-only model."
        )
    if config is not None and ref_model is not None:
        _refuse_other_vocabulary(config, ref_model.config)


def _refuse_other_vocabulary(policy: Any, reference: Any) -> None:
    sizes: list[int] = [config.get_text_config().vocab_size for config in (policy, reference)]
    if abs(sizes[0] - sizes[1]) > PADDING_ROWS:
        raise ValueError(
            f"The policy has a vocabulary of {sizes[0]} tokens and `ref_model` one of {sizes[1]}: the same token ids "
            "mean different tokens, so their log-probs cannot be compared. Pass a `ref_model` with the policy's "
            "tokenizer, or leave it out."
        )


def _config_of(model: Any, args: Any) -> Any:
    if isinstance(model, torch.nn.Module):
        return getattr(model, "config", None)
    options = {k: v for k, v in (args.model_init_kwargs or {}).items() if k in ("revision", "trust_remote_code")}
    with contextlib.suppress(OSError, ValueError):  # TRL raises an error for models that cannot be loaded
        return AutoConfig.from_pretrained(model, **options)
    return None


# -- something trains ------------------------------------------------------------------------------------------------


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The policy's trainable parameters by name, without PPO's value head."""
    named = parameters_by_name(model).items()
    return {name: p for name, p in named if p.requires_grad and VALUE_HEAD not in name.split(".")}


def refuse_frozen(model: torch.nn.Module) -> None:
    """Raise ValueError if no weight of the policy would change."""
    if trained_parameters(model):
        return
    if is_peft_model(model):
        remedy = (
            "An adapter that was loaded for inference is frozen; load it with `PeftModel.from_pretrained(base, "
            "folder, is_trainable=True)`."
        )
    else:
        remedy = "Call `model.requires_grad_(True)`, unfreeze a part of it, or pass a `peft_config`."
    raise ValueError(
        f"Nothing would be trained: none of the parameters of the model ({type(model).__name__}) has "
        f"`requires_grad=True`. {remedy}"
    )


def refuse_missing_gradients(model: torch.nn.Module) -> None:
    """Raise ValueError if a backward pass left every trainable parameter of the policy without a gradient."""
    trained = trained_parameters(model)
    if all(parameter.grad is None for parameter in trained.values()):
        raise ValueError(
            f"None of the {len(trained)} trainable parameters received a gradient in the first step, so nothing "
            f"would be trained. The loss does not depend on them: {_some(trained)}. Choose modules that are used in "
            "the forward pass of this dataset (an adapter on a vision tower needs images)."
        )


# -- the reference does not train along ------------------------------------------------------------------------------


def hold_reference(trainer: AlignmentTrainer, resuming: bool = False) -> None:
    """Keep the initial values of parameters that train outside the adapter. Raises ValueError if that is
    not possible.
    """
    # Needed with stored log-probs, too, to compute those of datasets that are passed later.
    new = (trainer.adapter_reference or trainer.reference).keep_start()
    if not new:
        return
    engine = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else None
    if engine is not None:
        raise ValueError(
            f"{len(new)} parameters train outside the adapter ({_some(new)}). The reference is this model without "
            f"its adapter, so it would change with them, and their initial values cannot be restored under {engine}, "
            "which splits or copies parameters. Freeze them (`bias='none'`, or `modules_to_save` for whole "
            "modules), train without that engine, or pass a separate `ref_model`."
        )
    _say_what_is_not_saved(trainer, new, resuming)


def _say_what_is_not_saved(trainer: AlignmentTrainer, names: list[str], resuming: bool) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    saved, named = saved_with_adapter(model), parameters_by_name(model)
    unsaved = [name for name in names if named[name].data_ptr() not in saved]
    if not unsaved:
        return
    message = (
        f"{len(unsaved)} parameters outside the adapter are trainable ({_some(unsaved)}), but PEFT saves only the "
        "adapter: neither checkpoints nor the saved model contain them"
    )
    remedy = "Name their modules in `modules_to_save` of the adapter's config instead of unfreezing them."
    if resuming:
        raise ValueError(f"{message}, so a resumed run would reset them. {remedy}")
    logger.warning(f"{message}, and no run can resume. {remedy}")


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# -- policy and reference start out equal ----------------------------------------------------------------------------


class _Distance(NamedTuple):
    """Difference between two computations of log-probs, in nats."""

    mean: float
    """Mean over completion tokens."""
    largest: float

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats per completion token on average, {self.largest:.2g} at most"


def check_start(trainer: AlignmentTrainer, batch: dict[str, Any]) -> None:
    """Check on the first batch of a run that the policy has no unwanted noise and that the reference equals it.

    Takes at most two forward passes without gradient if everything is fine, and does not change the random state.
    """
    start_BT = _reference_at_start(trainer, batch)
    noise_is_wanted = not trainer.args.disable_dropout or trainer.args.neftune_noise_alpha is not None
    if start_BT is None and noise_is_wanted:
        return
    policy_BT, mask_BT = _policy_logps(trainer, batch, training=not noise_is_wanted)
    if not torch.isfinite(policy_BT).all():
        return  # the loss raises an error for that
    tolerance = TOLERANCE["half" if _in_half_precision(trainer) else "float32"]
    compared_BT = _as_stored(trainer, policy_BT, mask_BT)
    if start_BT is not None and _distance(compared_BT, start_BT, mask_BT).mean <= tolerance:
        return
    if not noise_is_wanted:
        quiet_BT, _ = _policy_logps(trainer, batch, training=False)
        _refuse_noise(trainer, _distance(policy_BT, quiet_BT, mask_BT), tolerance)
    if start_BT is not None:
        coarse = TOLERANCE[_STORED_AS[trainer.reference_storage]]
        _compare_starts(trainer, _distance(compared_BT, start_BT, mask_BT), max(tolerance, coarse))


def _refuse_noise(trainer: AlignmentTrainer, noise: _Distance, tolerance: float) -> None:
    if noise.mean <= tolerance:
        return
    rates = rates_in_config(trainer.accelerator.unwrap_model(trainer.model))
    settings = ", ".join(f"{name}={value}" for name, value in rates.items())
    raise ValueError(
        "`disable_dropout=True`, but the policy's log-probs in training mode differ from those in evaluation mode by "
        f"{noise}: the model applies dropout or other noise whose rate is not stored in any module. Load it with "
        f"these settings of its config set to 0 ({settings or 'see its configuration'}), e.g. with "
        "`model_init_kwargs` or `from_pretrained(..., attention_dropout=0.0)`, or set `disable_dropout=False`."
    )


def _compare_starts(trainer: AlignmentTrainer, distance: _Distance, tolerance: float) -> None:
    if distance.mean <= tolerance:
        return
    message = f"Before the first update the policy differs from its reference by {distance}"
    if is_peft_model(trainer.model) and not isinstance(trainer.reference, FrozenAdapter):
        logger.warning(
            f"{message}: the reference is the model without its adapter, and this adapter changes it from the start. "
            "To use the initial policy as the reference, pass a `PeftModel` instead of `peft_config`; its adapter "
            "is copied."
        )
        return
    raise ValueError(
        f"{message}, but no `ref_model` was passed, so they must be equal. Possible causes: the policy was changed "
        "after the trainer was built; loading it twice gives different weights, because the checkpoint lacks some; "
        "the stored log-probs are those of another model; `reference_storage` is too coarse for this model. Pass "
        "`ref_model` if the difference is intended."
    )


def _reference_at_start(trainer: AlignmentTrainer, batch: dict[str, Any]) -> torch.Tensor | None:
    """Log-probs of the reference, if they must equal those of the policy."""
    reference = trainer.reference
    if isinstance(reference, NoReference) or reference.moved or not trainer.is_at_start:
        return None
    if isinstance(reference, PrecomputedColumn) and getattr(trainer.args, "ld_alpha", None) is not None:
        return None  # the stored sums weight tokens differently
    return reference.log_probs(batch)


def _as_stored(trainer: AlignmentTrainer, logps_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The log-probs in the form that the reference provides: for a stored one, only the sum per row."""
    if isinstance(trainer.reference, PrecomputedColumn):
        return spread_evenly(logps_BT.sum(-1), mask_BT)
    return logps_BT


def _policy_logps(
    trainer: AlignmentTrainer, batch: dict[str, Any], training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    model = trainer.model_wrapped
    was_training = model.training
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), trainer.no_grad_forward():
        model.train(training)
        try:
            tokens = score_tokens(model, batch)
        finally:
            model.train(was_training)
    return tokens.logps_BT, tokens.mask_BT


def _distance(one_BT: torch.Tensor, other_BT: torch.Tensor, mask_BT: torch.Tensor) -> _Distance:
    apart_BT = (one_BT.double() - other_BT.double()).abs() * mask_BT
    return _Distance((apart_BT.sum() / mask_BT.sum().clamp(min=1)).item(), apart_BT.max().item())


def _in_half_precision(trainer: AlignmentTrainer) -> bool:
    dtypes = {p.dtype for p in trainer.model.parameters()}
    return trainer.accelerator.mixed_precision != "no" or dtypes != {torch.float32}


__all__ = [
    "check_start",
    "hold_reference",
    "refuse_frozen",
    "refuse_missing_gradients",
    "refuse_unfit_models",
    "trained_parameters",
]
