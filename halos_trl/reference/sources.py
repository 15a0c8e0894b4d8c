"""Where reference log-probs come from, and how the reference follows the policy.

One object per source, all answering `log_probs(batch)`; those that can move also answer `sync(policy)`:

===================  ==================================================  =====
class                the reference is                                    moves
===================  ==================================================  =====
`FrozenCopy`         a second model: a copy of the policy or `ref_model`  yes
`AdapterOff`         the policy with its adapter switched off            no
`FrozenAdapter`      a second adapter on the policy's base model         yes
`PrecomputedColumn`  sums stored with the dataset                        no
`NoReference`        absent (SimPO, SLiC)                                no
===================  ==================================================  =====
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ._trl import (
    POLICY_ADAPTER,
    REFERENCE_ADAPTER,
    add_reference_adapter,
    reading_adapter,
    restored_by_switch,
    score_tokens,
)
from .forward.packing import without_dropout
from .sharded import assign_whole, collected, own_shard, parameters_by_name, reshard, shape_of, whole
from .value_head import NAME as VALUE_HEAD

REFERENCE_FILE = "reference.safetensors"
"""A moving reference lies under this name in every checkpoint."""

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


class PrecomputedColumn(Reference):
    """Log-probs that TRL summed over each completion and stored with the dataset.

    Only the sum is known. It is spread evenly over the completion, so every loss that reads sums is exact and none
    may read single tokens; humanline, which does, is refused together with `precompute_ref_log_probs`.
    """

    def log_probs(self, batch: dict[str, Any]) -> torch.Tensor:
        if "ref_chosen_logps" in batch:
            sums_B = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        else:
            sums_B = batch["ref_logps"]
        return spread_evenly(sums_B, batch["completion_mask"][:, 1:])


def spread_evenly(sums_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """`(B, T)` tables with these row sums, the same number at each completion token of a row."""
    mask_BT = mask_BT.to(sums_B.dtype)
    return mask_BT * (sums_B / mask_BT.sum(-1).clamp(min=1))[:, None]


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
        own = self.tensors(policy)
        all_of_policy = parameters_by_name(self._unwrap(policy))
        # By name, since a policy may hold more than the reference does: PPO's has a value head.
        _move(list(own.values()), [all_of_policy[name] for name in own], mix)

    def tensors(self, policy: torch.nn.Module) -> dict[str, torch.Tensor]:
        return dict(parameters_by_name(self._unwrap(self.model)))


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
        for reference, policy in _adapter_pairs(peft_model):
            # Same dtype too: a quantized policy's adapter is bfloat16, and rounding has to happen in the same places.
            reference.data = policy.data.clone()
            reference.requires_grad_(False)

    @torch.no_grad()
    def sync(self, policy: torch.nn.Module, mix: float = 1.0) -> None:
        self.moved = True
        model = self._unwrap(policy)
        named, pairs = parameters_by_name(model), _adapter_pairs(model)
        references = [*(reference for reference, _ in pairs), *self.outside.values()]
        _move(references, [*(source for _, source in pairs), *(named[name] for name in self.outside)], mix)

    def tensors(self, policy: torch.nn.Module) -> dict[str, torch.Tensor]:
        named = parameters_by_name(self._unwrap(policy))
        return {name: parameter for name, parameter in named.items() if _policys_name(name) in named} | self.outside

    def _has_switch(self, model: torch.nn.Module) -> set[int]:
        return {id(policys) for _, policys in _adapter_pairs(model)}


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


def _adapter_pairs(peft_model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """(reference, policy) parameters of the two adapters."""
    named = parameters_by_name(peft_model)
    return [(named[name], named[source]) for name in named if (source := _policys_name(name)) in named]


def _move(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], mix: float) -> None:
    # FSDP2 shards policy and reference alike, so each process moves its own shard; the fused copy knows no DTensor.
    with collected([*targets, *sources]):
        own, theirs = [own_shard(t) for t in targets], [own_shard(s) for s in sources]
        if mix == 1.0:
            torch._foreach_copy_(own, theirs)
        else:
            torch._foreach_mul_(own, 1.0 - mix)
            torch._foreach_add_(own, [s.to(t.dtype) for s, t in zip(theirs, own, strict=True)], alpha=mix)


# -- following the policy ------------------------------------------------------------------------------------------


class ReferenceSync(TrainerCallback):
    """Moves the reference.

    Humanline (arXiv:2509.24207): reference := policy as it is *before* the optimizer step, every `every` steps.
    TR-DPO (arXiv:2404.09656, `sync_ref_model`): after the step, mixed with weight `mix`.
    """

    def __init__(
        self, reference: Reference, *, every: int, mix: float = 1.0, before_step: bool, steps_in_backward: bool = False
    ):
        self.reference = reference
        self.every = every
        self.mix = mix
        self.before_step = before_step
        # DeepSpeed's engine updates the weights inside `backward`, before anybody is told.
        self.steps_in_backward = steps_in_backward

    def syncs_until(self, step: int) -> int:
        """How often the reference has moved once `step` optimizer steps are done."""
        return step // self.every

    def before_update(self, state: Any, model: Any) -> None:
        """To be called between the last loss of an optimizer step and its update."""
        if self.before_step and (state.global_step + 1) % self.every == 0:
            self.reference.sync(model, self.mix)

    def before_backward(self, state: Any, model: Any) -> None:
        """To be called between the last loss of an optimizer step and its gradient."""
        if self.steps_in_backward:
            self.before_update(state, model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.steps_in_backward:
            self.before_update(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.before_step and state.global_step % self.every == 0:
            self.reference.sync(model, self.mix)


def gathered(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, where they are kept. Every process has to call this, since each may hold a shard."""
    kept = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            kept[name] = value.cpu()
    return kept


def save_reference(
    tensors: dict[str, torch.Tensor], checkpoint_dir: str, metadata: dict[str, str] | None = None
) -> None:
    """Write a moved reference into a checkpoint folder, whole or not at all."""
    folder = Path(checkpoint_dir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{REFERENCE_FILE}.partial"
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata)
    partial.replace(folder / REFERENCE_FILE)


def load_reference(tensors: dict[str, torch.Tensor], checkpoint_dir: str) -> None:
    """Restore a moved reference in place. Raises ValueError when the file is missing, damaged or of another model."""
    path = Path(checkpoint_dir) / REFERENCE_FILE
    consequence = "Training cannot resume exactly without it, and would silently restart from another reference."
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: this run moves its reference (`humanline` or `sync_ref_model`), and so must have the "
            f"run that wrote the checkpoint. {consequence} Resume from another checkpoint, or train with the settings "
            "that the checkpoint was written with."
        )
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is probably truncated. {consequence} Resume from an "
            "earlier checkpoint."
        ) from error
    differing = sorted(set(stored) ^ set(tensors)) or sorted(
        name
        for name, tensor in tensors.items()
        if (stored[name].shape, stored[name].dtype) != (shape_of(tensor), tensor.dtype)
    )
    if differing:
        raise ValueError(
            f"{path} holds another model's reference: {differing[0]!r} and {len(differing) - 1} more tensors do not "
            "match. Resume with the model and adapter configuration that the checkpoint was written with."
        )
    for name, tensor in tensors.items():
        assign_whole(tensor, stored[name])
