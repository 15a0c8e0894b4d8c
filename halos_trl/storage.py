"""Storage of a reference's weights: in lower precision, or in CPU memory and streamed to the device."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from torch import Tensor, nn

from .sharded import parameters_by_name

_STREAMED = "halos_streamed_weights"

OUTLIERS = 6.0
"""8-bit layers multiply activations above this in 16 bits: the threshold of LLM.int8 (arXiv:2208.07339)."""


def store(model: nn.Module, storage: str, device: torch.device) -> nn.Module:
    """Change the storage of the weights of a frozen model that will run on `device`, in place.

    Args:
        model: a causal LM of transformers.
        storage: `"same"` changes nothing. `"bf16"` rounds all parameters. `"8bit"` (LLM.int8) and `"4bit"` (NF4 with
            double quantization, as in QLoRA) quantize the linear layers except the LM head with bitsandbytes, and
            round the rest to bfloat16. `"cpu"` keeps the parameters in CPU memory and copies those of a module to
            `device` only while it runs.

    Raises ValueError if bitsandbytes is missing.
    """
    if storage == "cpu":
        return _stream(model, device)
    if storage in ("8bit", "4bit"):
        _quantize(model, storage)
    if storage != "same":
        for parameter in model.parameters():
            # Parameters only, not buffers: rounding the frequencies of rotary embeddings would shift every position.
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a stored model that a checkpoint must contain, by name; they can be written in place.

    These are its parameters, wherever they are; for a quantized parameter, the packed values and, under
    `<name>.<statistic>`, the statistics needed to unpack them.
    """
    found = parameters_of(model)
    for name, layer in quantized_layers(model).items():
        found |= {".".join(filter(None, (name, part))): tensor for part, tensor in _parts(layer).items()}
    return found


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """`parameters_by_name`; for a streamed model, the tensors in CPU memory."""
    streamed = getattr(model, _STREAMED, None)
    return dict(parameters_by_name(model)) if streamed is None else dict(streamed)


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The quantized layers, by the name of their weight."""
    layers = (
        (f"{name}.weight", module)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit")
    )
    return {name: module for name, module in layers if isinstance(module, nn.Linear)}


@torch.no_grad()
def write_quantized(layer: nn.Linear, weight: Tensor) -> None:
    """Quantize `weight`, a full tensor, and write it to the layer in place."""
    packed = _packed(layer, weight.to(_parts(layer)[""].device))
    for part, tensor in _parts(layer).items():
        tensor.copy_(packed[part])


def bytes_of(model: nn.Module, device: torch.device | None = None) -> int:
    """Bytes of the weights, or only of those on `device` if given. Each storage is counted once."""
    storages = {}
    for tensor in weights_of(model).values():
        if device is None or tensor.device == device:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


# -- quantized layers ----------------------------------------------------------------------------------------------


def _quantize(model: nn.Module, storage: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"`reference_storage={storage!r}` requires bitsandbytes, which is not installed. Run "
            "`pip install bitsandbytes`, or use 'bf16' or 'cpu'."
        )
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_warning)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _quantized(layer, storage))


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    """Log filter that drops bitsandbytes' warning about inputs of 8-bit layers being cast to float16."""
    return "inputs will be cast" not in record.getMessage()


def _quantized(layer: nn.Linear, storage: str) -> nn.Linear:
    """A copy of the layer with its weight quantized on the same device; the bias is shared."""
    import bitsandbytes as bnb

    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    made: Any
    if storage == "8bit":
        made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
        parts = _packed(made, layer.weight.detach())
        values = parts[""]
        made.weight = bnb.nn.Int8Params(
            values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=parts["SCB"]
        )
    else:
        made = bnb.nn.Linear4bit(
            *shape, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta"
        )
        # On some CPUs the weights would be repacked permanently, in a format that cannot be updated.
        made.support_avx512bf16_for_cpu = False
        values, state = _four_bits(layer.weight.detach())
        made.weight = bnb.nn.Params4bit(
            values, requires_grad=False, quant_state=state, quant_type="nf4", compress_statistics=True,
            bnb_quantized=True, module=made,
        )  # fmt: skip
        made.quant_state = state
    made.bias = layer.bias
    return made.train(layer.training)


def _packed(layer: Any, weight: Tensor) -> dict[str, Tensor]:
    """Quantize a weight in the layer's format; tensors by the names of `_parts`."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return {"": values, "SCB": scales}
    values, state = _four_bits(weight)
    return {"": values, **_statistics(state)}


def _four_bits(weight: Tensor) -> tuple[Tensor, Any]:
    import bitsandbytes as bnb

    weight = weight.to(torch.bfloat16).contiguous()
    return bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")


def _parts(layer: Any) -> dict[str, Tensor]:
    """The packed values of a quantized layer (under the empty name) and their statistics."""
    weight = layer.weight
    if type(layer).__name__ == "Linear4bit":
        return {"": weight.data, **_statistics(weight.quant_state)}
    # The layer moves both from its weight to its state in the first forward pass.
    moved = weight.CB is None
    return {"": layer.state.CB, "SCB": layer.state.SCB} if moved else {"": weight.CB, "SCB": weight.SCB}


def _statistics(state: Any) -> dict[str, Tensor]:
    return {"absmax": state.absmax, "offset": state.offset, "nested_absmax": state.state2.absmax}


# -- streamed layers -----------------------------------------------------------------------------------------------


def _stream(model: Any, device: torch.device) -> nn.Module:
    if hasattr(model, _STREAMED):  # already the `ref_model` of another trainer
        return model
    if device.type == "cpu":
        # One of several processes has a numbered CPU ("cpu:1"), on which accelerate's hooks fail.
        device = torch.device("cpu")
    # The whole model first, so that tied weights stay one tensor, and the hooks note where each one belongs.
    nn.Module.to(model, "cpu")
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    kept = {name: weights[name] for name in parameters_by_name(model)}
    model = cpu_offload(model, device, state_dict=weights)
    setattr(model, _STREAMED, kept)
    # Engines move models to the device, but this model's parameters are moved there only when needed.
    model.to = lambda *args, **kwargs: model
    head = model.get_output_embeddings()
    if head is not None:
        _bring_with(model, head, device)
    return model


def _bring_with(model: nn.Module, head: nn.Module, device: torch.device) -> None:
    """Keep the head's weight on the device while the model runs, because the fused LM head does not call the head."""
    remove_hook_from_module(head)
    weights = {name: parameter.detach() for name, parameter in head.named_parameters()}
    hook = AlignDevicesHook(device, offload=True, weights_map=weights)
    hook.init_hook(head)

    def bring(*arguments: Any) -> None:
        hook.pre_forward(head)

    def send_back(*arguments: Any) -> None:
        hook.post_forward(head, None)

    model.register_forward_pre_hook(bring)
    model.register_forward_hook(send_back, always_call=True)


__all__ = ["bytes_of", "parameters_of", "quantized_layers", "store", "weights_of", "write_quantized"]
