"""Checks of `reference_storage` against the adapter, the engine and an explicit `ref_model`."""

from __future__ import annotations

from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import DistributedType, parse_flag_from_env

from .._trl import is_peft_model

logger = get_logger(__name__)


def refuse_unfit_storage(args: Any, model: Any, ref_model: Any, new_adapter: Any) -> None:
    """Raise ValueError if `reference_storage` has no effect or is not supported."""
    storage = args.reference_storage
    if storage == "same":
        return
    setting = f"`reference_storage={storage!r}`"
    has_adapter = new_adapter is not None or (not isinstance(model, str) and is_peft_model(model))
    if ref_model is None and has_adapter:
        raise ValueError(
            f"{setting} has no effect: with an adapter the reference is the policy's own base model, not a second "
            "model. Leave it out; to store the base model in fewer bits, load it with a `quantization_config`."
        )
    if ref_model is not None and storage != "cpu":
        how = "dtype=torch.bfloat16" if storage == "bf16" else "quantization_config=BitsAndBytesConfig(...)"
        raise ValueError(
            f"{setting} would change the weights of the `ref_model` that was passed. Load it in that form "
            f"(`from_pretrained(..., {how})`) and leave the setting out, or leave `ref_model` out."
        )
    _refuse_unfit_engine(args, setting)
    if storage == "cpu" and args.device.type == "cpu":
        logger.warning(f"{setting} saves nothing on a CPU, where every model is in CPU memory.")


def _refuse_unfit_engine(args: Any, setting: str) -> None:
    plugin = args.deepspeed_plugin
    if _is_fsdp(args) and args.reference_storage != "bf16":
        remedy = (
            "use `fsdp_offload_params` of accelerate's config, which streams all models"
            if args.reference_storage == "cpu"
            else "use 'bf16'"
        )
        raise ValueError(
            f"{setting} cannot work under FSDP, which splits the weights of the reference over the processes: "
            f"quantized weights and streamed ones have no shards. Leave it out ({remedy}), or launch with DDP."
        )
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            f"{setting} cannot work under DeepSpeed ZeRO-3, which splits the weights of the reference and gives them "
            "its own dtype. Leave it out (`bf16` and `offload_param` of DeepSpeed's config do the same), or launch "
            "with ZeRO-2."
        )


def _is_fsdp(args: Any) -> bool:
    """Whether accelerate will shard the models. Its state says so only after an `Accelerator` has been created."""
    distributed = args.distributed_state.distributed_type != DistributedType.NO
    return distributed and (bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP"))


__all__ = ["refuse_unfit_storage"]
