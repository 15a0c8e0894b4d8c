"""References that are computed: a second model, or the policy read through another adapter or none."""

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
    """What the policy is compared with."""

    can_move: ClassVar[bool] = False
    moved: bool = False
    """Whether it has left its start, so that a checkpoint has to hold it."""

    def log_probs(self, batch: dict[str, Any]) -> torch.Tensor:
        """Per-token log-probs `(B, T)` in nats of a collated batch, without gradient; 0 outside the completion."""
        with self.reading() as model:
            return score_tokens(model, batch).logps_BT

    def log_probs_of(self, batches: list[dict[str, Any]]) -> list[torch.Tensor]:
        """The same of several batches, which share a forward pass where their rows are packed."""
        with self.reading() as model:
            return score_together(model, batches)

    def reading(self) -> AbstractContextManager[torch.nn.Module]:
        """A context in which a forward pass of the model that it yields is one of the reference, without gradient."""
        raise NotImplementedError

    def sync(self, policy: torch.nn.Module, mix: float = 1.0) -> None:
        """reference := mix * policy + (1 - mix) * reference; `mix=1` copies bit for bit."""
        raise ValueError(
            f"{type(self).__name__} cannot follow the policy. Switch off `humanline` or `sync_ref_model`, or leave "
            "out what fixes the reference (`precompute_ref_log_probs`)."
        )

    def tensors(self, policy: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The tensors that move, by name."""
        return {}

    def keep_start(self) -> list[str]:
        """Note the values of what trains and would change this reference along with the policy.

        To be called before the first update that can reach them, and as often as one likes: what is noted stays.
        Returns the names of the parameters that are new.
        """
        return []


class NoReference(Reference):
    """For methods that compare with nothing."""

    def log_probs(self, batch: dict[str, Any]) -> None:  # type: ignore[override]
        return None

    def log_probs_of(self, batches: list[dict[str, Any]]) -> list[None]:  # type: ignore[override]
        return [None] * len(batches)


class FrozenCopy(Reference):
    """A second model of the policy's shape."""

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
        # By name, since a policy may hold more than the reference does: PPO's has a value head.
        plain = {name: (own[name], all_of_policy[name]) for name in own if name not in quantized}
        _move(plain, mix)
        for name, layer in quantized.items():
            write_quantized(layer, whole(all_of_policy[name]))

    def tensors(self, policy: torch.nn.Module) -> dict[str, torch.Tensor]:
        return weights_of(self._unwrap(self.model))


class AdapterOff(Reference):
    """The base model of the policy: its adapter is new, so switching it off gives the initial policy.

    What trains outside the adapter (biases with `bias="all"`, modules that somebody unfroze) has no switch. `outside`
    holds its values, which stand in while the reference is read.
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
        # The policy's adapter is read again before anybody calls `backward`; else its gradients would be None.
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
            # PPO's value head is no part of the policy's log-probs.
            if VALUE_HEAD not in name.split(".")
        }
        self.outside |= {name: parameter.detach().clone() for name, parameter in new.items()}
        return list(new)

    def _has_switch(self, model: torch.nn.Module) -> set[int]:
        """`id` of the parameters that are not read while the reference is."""
        return restored_by_switch(model)


class FrozenAdapter(AdapterOff):
    """A frozen adapter beside the policy's own, on one base model. Moving it copies adapter weights only."""

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
                    f"to this model: {error} Change the adapter's configuration, or switch the setting off."
                ) from error
        for name, module in peft_model.named_modules():
            # TRL's own losses ask for it in the policy's mode.
            if isinstance(module, torch.nn.Dropout) and name.endswith(f".{REFERENCE_ADAPTER}"):
                module.p = 0.0
        for reference, policy in _adapter_pairs(peft_model).values():
            # Same dtype too: a quantized policy's adapter is bfloat16, and rounding has to happen in the same places.
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
    """The parameters read as `values`. Gradients of a graph that exists already are not touched."""
    for name, value in values.items():
        if value.device != named[name].device or value.dtype != named[name].dtype:
            values[name] = value.to(named[name])  # the model was moved, or cast by an engine
    before = {name: named[name].data for name in values}
    try:
        for name, value in values.items():
            named[name].data = value
        yield
    finally:
        for name, data in before.items():
            named[name].data = data


def _policys_name(name: str) -> str | None:
    """Where the policy's adapter holds what the reference's holds under `name`."""
    # The last part of this name: a module of the base model may be called the same.
    head, found, tail = f"{name}.".rpartition(f".{REFERENCE_ADAPTER}.")
    return f"{head}.{POLICY_ADAPTER}.{tail}".removesuffix(".") if found else None


def _adapter_pairs(peft_model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(reference, policy) parameters of the two adapters, by the name of the first."""
    named = parameters_by_name(peft_model)
    return {name: (named[name], named[source]) for name in named if (source := _policys_name(name)) in named}


def _move(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], mix: float) -> None:
    """Of each (reference, policy) move the first. What ZeRO-3 has split is whole for one layer at a time."""
    for names in by_layer(pairs):
        targets, sources = zip(*(pairs[name] for name in names), strict=True)
        _move_layer(targets, sources, mix)


def _move_layer(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], mix: float) -> None:
    # FSDP2 shards policy and reference alike, so each process moves its own shard; the fused copy knows no DTensor.
    with collected(read=sources, written=targets):
        own, theirs = [own_shard(t) for t in targets], [own_shard(s) for s in sources]
        if mix == 1.0:
            torch._foreach_copy_(own, theirs)
        else:
            torch._foreach_mul_(own, 1.0 - mix)
            torch._foreach_add_(own, [s.to(t.dtype) for s, t in zip(theirs, own, strict=True)], alpha=mix)


__all__ = ["AdapterOff", "ForwardContext", "FrozenAdapter", "FrozenCopy", "NoReference", "Reference"]
