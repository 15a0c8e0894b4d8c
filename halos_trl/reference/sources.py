"""Computed references: a second model, or the policy with another adapter or without adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch

from .._trl import (
    POLICY_ADAPTER,
    REFERENCE_ADAPTER,
    add_reference_adapter,
    reading_adapter,
    restored_by_switch,
    score_together,
    score_tokens,
)
from ..forward.packing import without_dropout
from ..sharded import by_layer, collected, own_shard, parameters_by_name, reshard, whole
from ..storage import parameters_of, quantized_layers, weights_of, write_quantized
from ..value_head import NAME as VALUE_HEAD

ForwardContext = Callable[[], AbstractContextManager[None]]


class Reference:
    """Base class of the references."""

    can_move: ClassVar[bool] = False
    moved: bool = False
    """Whether the reference has been synced, so that checkpoints must contain it."""

    def log_probs(self, batch: dict[str, Any]) -> torch.Tensor:
        """Per-token log-probs `(B, T)` in nats of a collated batch, without gradient; 0 outside of completions."""
        with self.reading() as model:
            return score_tokens(model, batch).logps_BT

    def log_probs_of(self, batches: list[dict[str, Any]]) -> list[torch.Tensor]:
        """`log_probs` of several batches, which share a forward pass if rows are packed."""
        with self.reading() as model:
            return score_together(model, batches)

    def reading(self) -> AbstractContextManager[torch.nn.Module]:
        """Context manager that yields a model whose forward passes are those of the reference, without gradient."""
        raise NotImplementedError

    def sync(self, policy: torch.nn.Module, mix: float = 1.0) -> None:
        """reference := mix * policy + (1 - mix) * reference; `mix=1` copies bit for bit."""
        raise ValueError(
            f"{type(self).__name__} cannot follow the policy. Disable `humanline` and `sync_ref_model`, or "
            "`precompute_ref_log_probs`, which requires a fixed reference."
        )

    def tensors(self, policy: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The tensors that `sync` changes, by name."""
        return {}

    def keep_start(self) -> list[str]:
        """Store the initial values of trainable parameters that this reference shares with the policy.

        Call it before the first update that can change them. Calling it again keeps the values already stored.
        Returns the names of newly stored parameters.
        """
        return []


class NoReference(Reference):
    """For methods without a reference."""

    def log_probs(self, batch: dict[str, Any]) -> None:  # type: ignore[override]
        return None

    def log_probs_of(self, batches: list[dict[str, Any]]) -> list[None]:  # type: ignore[override]
        return [None] * len(batches)


class FrozenCopy(Reference):
    """A second model with the policy's architecture."""

    can_move = True

    def __init__(self, model: torch.nn.Module, unwrap: Callable[[Any], torch.nn.Module], forward: ForwardContext):
        self.model = model
        self._unwrap = unwrap
        self._forward = forward

    @contextlib.contextmanager
    def reading(self) -> Iterator[torch.nn.Module]:
        with self._forward(), without_dropout(self._unwrap(self.model)):
            yield self.model

    @torch.no_grad()
    def sync(self, policy: torch.nn.Module, mix: float = 1.0) -> None:
        self.moved = True
        reshard(self.model)
        model = self._unwrap(self.model)
        own, quantized = parameters_of(model), quantized_layers(model)
        all_of_policy = parameters_by_name(self._unwrap(policy))
        # Matched by name, since the policy may have additional parameters, such as PPO's value head.
        plain = {name: (own[name], all_of_policy[name]) for name in own if name not in quantized}
        _move(plain, mix)
        for name, layer in quantized.items():
            write_quantized(layer, whole(all_of_policy[name]))

    def tensors(self, policy: torch.nn.Module) -> dict[str, torch.Tensor]:
        return weights_of(self._unwrap(self.model))


class AdapterOff(Reference):
    """The policy's base model. The adapter is new, so the initial policy is the model with its adapter disabled.

    Parameters trained outside the adapter (biases with `bias="all"`, modules unfrozen by the user) cannot be disabled.
    Their initial values are stored in `outside` and used while the reference is computed.
    """

    adapter: ClassVar[str | None] = None

    def __init__(self, model: torch.nn.Module, unwrap: Callable[[Any], torch.nn.Module], forward: ForwardContext):
        self.model = model
        self._unwrap = unwrap
        self._forward = forward
        self.outside: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def reading(self) -> Iterator[torch.nn.Module]:
        model = self._unwrap(self.model)
        # Reactivate the policy's adapter before any call of `backward`; otherwise its gradients would be None.
        with (
            self._forward(),
            without_dropout(model),
            _standing_in(parameters_by_name(model), self.outside),
            reading_adapter(model, self.adapter),
        ):
            yield self.model

    def keep_start(self) -> list[str]:
        model = self._unwrap(self.model)
        has_switch = self._has_switch(model)
        new = {
            name: parameter
            for name, parameter in parameters_by_name(model).items()
            if parameter.requires_grad and name not in self.outside and id(parameter) not in has_switch
            # PPO's value head has no effect on log-probs.
            if VALUE_HEAD not in name.split(".")
        }
        self.outside |= {name: parameter.detach().clone() for name, parameter in new.items()}
        return list(new)

    def _has_switch(self, model: torch.nn.Module) -> set[int]:
        """`id` of the parameters that have no effect while the reference is computed."""
        return restored_by_switch(model)


class FrozenAdapter(AdapterOff):
    """A second, frozen adapter on the policy's base model. Syncing copies adapter weights only."""

    can_move = True
    adapter = REFERENCE_ADAPTER

    def __init__(self, model: torch.nn.Module, unwrap: Callable[[Any], torch.nn.Module], forward: ForwardContext):
        super().__init__(model, unwrap, forward)
        peft_model: Any = unwrap(model)
        if REFERENCE_ADAPTER not in peft_model.peft_config:
            try:
                add_reference_adapter(peft_model)
            except ValueError as error:
                raise ValueError(
                    "`humanline` and `sync_ref_model` keep the reference in a second adapter, and PEFT cannot add one "
                    f"to this model: {error} Change the adapter's configuration, or disable the setting."
                ) from error
        for name, module in peft_model.named_modules():
            # TRL's own losses expect it to be in the same mode as the policy.
            if isinstance(module, torch.nn.Dropout) and name.endswith(f".{REFERENCE_ADAPTER}"):
                module.p = 0.0
        for reference, policy in _adapter_pairs(peft_model).values():
            # Same dtype: a quantized policy's adapter is bfloat16, and both adapters must round in the same places.
            reference.data = policy.data.clone()
            reference.requires_grad_(False)

    @torch.no_grad()
    def sync(self, policy: torch.nn.Module, mix: float = 1.0) -> None:
        self.moved = True
        model = self._unwrap(policy)
        named = parameters_by_name(model)
        outside = {name: (value, named[name]) for name, value in self.outside.items()}
        _move(_adapter_pairs(model) | outside, mix)

    def tensors(self, policy: torch.nn.Module) -> dict[str, torch.Tensor]:
        named = parameters_by_name(self._unwrap(policy))
        return {name: parameter for name, parameter in named.items() if _policys_name(name) in named} | self.outside

    def _has_switch(self, model: torch.nn.Module) -> set[int]:
        return {id(policys) for _, policys in _adapter_pairs(model).values()}


@contextlib.contextmanager
def _standing_in(named: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Replace the parameters' data by `values` temporarily. Existing autograd graphs are not affected."""
    for name, value in values.items():
        if value.device != named[name].device or value.dtype != named[name].dtype:
            values[name] = value.to(named[name])  # the model may have been moved, or cast by an engine
    before = {name: named[name].data for name in values}
    try:
        for name, value in values.items():
            named[name].data = value
        yield
    finally:
        for name, data in before.items():
            named[name].data = data


def _policys_name(name: str) -> str | None:
    """Name of the policy adapter's parameter that corresponds to the reference adapter's `name`."""
    # Only the last match, because a module of the base model may have the same name.
    head, found, tail = f"{name}.".rpartition(f".{REFERENCE_ADAPTER}.")
    return f"{head}.{POLICY_ADAPTER}.{tail}".removesuffix(".") if found else None


def _adapter_pairs(peft_model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(reference, policy) parameters of the two adapters, by the name of the reference's."""
    named = parameters_by_name(peft_model)
    return {name: (named[name], named[source]) for name in named if (source := _policys_name(name)) in named}


def _move(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], mix: float) -> None:
    """Move the reference of each (reference, policy) pair. Under ZeRO-3, one layer at a time is gathered."""
    for names in by_layer(pairs):
        targets, sources = zip(*(pairs[name] for name in names), strict=True)
        _move_layer(targets, sources, mix)


def _move_layer(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], mix: float) -> None:
    # FSDP2 shards policy and reference alike, so each process moves its own shards; fused ops do not support DTensor.
    with collected(read=sources, written=targets):
        own, theirs = [own_shard(t) for t in targets], [own_shard(s) for s in sources]
        if mix == 1.0:
            torch._foreach_copy_(own, theirs)
        else:
            torch._foreach_mul_(own, 1.0 - mix)
            torch._foreach_add_(own, [s.to(t) for s, t in zip(theirs, own, strict=True)], alpha=mix)


__all__ = ["AdapterOff", "ForwardContext", "FrozenAdapter", "FrozenCopy", "NoReference", "Reference"]
