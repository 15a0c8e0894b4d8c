"""Parameters that an engine has renamed or split over the processes: FSDP2, DeepSpeed ZeRO-3, `torch.compile`.

Tensors that are not split are returned unchanged. For split tensors, `whole` and `assign_whole` are collective: all
processes must call them for the same tensors in the same order.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def parameters_by_name(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters by their names in the bare model, regardless of wrappers around its layers."""
    named = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = parameter
    return named


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor assembled from its shards, without gradient."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    with collected(read=[tensor]):
        return tensor.detach().clone() if _in_zero3(tensor) else tensor.detach()


@torch.no_grad()
def assign_whole(target: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole tensor into one that may be split, in place."""
    value = value.to(target.device)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    with collected(written=[target]):
        target.copy_(value)


def shape_of(tensor: torch.Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return getattr(tensor, "ds_shape", tensor.shape)  # ZeRO-3 replaces the tensor by an empty one


def own_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's FSDP2 shard of the tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: torch.nn.Module) -> None:
    """Reshard parameters that a forward pass of FSDP2 may leave unsharded, which do not match other shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def collected(read: Sequence[torch.Tensor] = (), written: Sequence[torch.Tensor] = ()) -> Iterator[None]:
    """Context in which the ZeRO-3 parameters among the tensors are whole on every process.

    Changes to those in `written` persist; all processes must make the same changes.
    """
    split = [[tensor for tensor in tensors if _in_zero3(tensor)] for tensors in (read, written)]
    if not any(split):
        yield
        return
    import deepspeed

    gather = deepspeed.zero.GatheredParameters
    with gather(split[0], modifier_rank=None), gather(split[1], modifier_rank=0):
        yield


_IN_LAYER = re.compile(r"(?:.*?\.)?(?:layers|layer|h|blocks|block)\.\d+(?=\.)")


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names of parameters in groups to gather at a time: a layer of the model, or a module outside the layers."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = _IN_LAYER.match(name)
        groups.setdefault(layer[0] if layer else name.rpartition(".")[0], []).append(name)
    return list(groups.values())


def _in_zero3(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")


__all__ = ["assign_whole", "by_layer", "collected", "own_shard", "parameters_by_name", "reshard", "shape_of", "whole"]
