"""The one door to private names of TRL and transformers.

TRL is the host: it loads models, tokenizes, prepares adapters, evaluates and saves. What it bakes in and this
package does not want is undone here and nowhere else; every other module uses public names only.

=============================  =========================================================================
what TRL does                  what happens here
=============================  =========================================================================
KTO pairs each prompt with a   TRL is told that there is no KL term, so it neither stores partners nor
neighbour's completion once    refuses shuffling and batch size 1; `UnpairedPreferenceTrainer` pairs inside
and forbids shuffling          the optimizer step
re-loads the reference from    an *instance* is copied, so that policy and reference start out equal
the hub id of the policy
loads a reference for every    none is loaded where `needs_reference` is false
DPO-like method
averages micro-batch means     sums and counts are kept on the device and divided once per log line
drops rows without room for    the same rows are dropped, but counted in a warning
a completion, silently
writes the reference adapter   the other adapters are saved
into the saved model
gives a PeftModel a reference  it is added without editing the base weights a second time (PiSSA and its
adapter, needed or not         kin), and not at all where `needs_reference` is false
finds cached reference sums    also by the settings that decide which tokens they are over
by dataset and model alone
lets NaN gradients through     an error between the gradient and the update
loads the adapter of a         its dtype stays
quantized model as float32
=============================  =========================================================================
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import transformers
import trl
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.integrations import is_wandb_available
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (
    FusedCausalLMOutput,
    get_comet_experiment_url,
    get_config_model_id,
    get_trackio_space_url,
    use_adapter,
)

from .humanline import Humanline, clamp, log_ratios
from .metrics import RunningMeans, Sums, logps_sums, unclamped_sums
from .sharded import whole
from .value_head import NAME as VALUE_HEAD
from .value_head import ValueHead, load_value_head, save_value_head, taken_off

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        DataCollator,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )

logger = get_logger(__name__)

REFERENCE_ADAPTER = "ref"
"""Name of the frozen adapter that holds the reference; TRL uses the same one for pretrained adapters."""

POLICY_ADAPTER = "default"

_NOT_MODEL_INPUTS = {
    "completion_mask",
    "label",
    "score",
    "advantage",
    "ref_logps",
    "ref_KL_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
}


class Method(NamedTuple):
    """How a method is named in logs, tags, the model card and its citation."""

    name: str
    title: str
    arxiv: str
    citation: str


class TokenTable(NamedTuple):
    """What one forward pass says about the completion tokens.

    All tables are `(B, T)` with `T` = sequence length - 1: position `t` scores token `t + 1`; positions outside
    `mask_BT` hold 0. Log-probs in nats. `None` where the model was not asked for the column.
    """

    logps_BT: torch.Tensor
    mask_BT: torch.Tensor
    entropy_BT: torch.Tensor | None = None
    mean_logits_BT: torch.Tensor | None = None
    is_top1_BT: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    values_BT: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> TokenTable:
        """Some of the rows."""
        tables = {n: t[index] for n, t in self._asdict().items() if t is not None and n != "aux_loss"}
        return self._replace(**tables)


def score_tokens(model: torch.nn.Module, batch: dict[str, Any], *, output_router_logits: bool = False) -> TokenTable:
    """Log-probs of the completion tokens of a collated batch, through TRL's fused LM head."""
    inputs = {k: v for k, v in batch.items() if k not in _NOT_MODEL_INPUTS and not k.startswith("KL_")}
    if output_router_logits:
        inputs["output_router_logits"] = True
    mask_BT = batch["completion_mask"][:, 1:].bool()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outputs = model(**inputs, use_cache=False, labels=labels, fused_lm_head=True)

    def real_positions(table: torch.Tensor | None) -> torch.Tensor | None:
        # Prompt-learning adapters prepend virtual tokens.
        return None if table is None else table[:, -mask_BT.shape[1] :]

    logps_BT = real_positions(outputs.log_probs)
    assert logps_BT is not None
    return TokenTable(
        logps_BT,
        mask_BT,
        real_positions(outputs.entropy),
        real_positions(outputs.mean_logits),
        real_positions(outputs.is_top1),
        outputs.aux_loss,
        real_positions(getattr(outputs, "state_values", None)),
    )


class _PlainLogProbs:
    """TRL's fused LM head in plain torch, for TRL 1.15, whose only version of it needs Triton and a GPU.

    Builds the full logits. Newer TRL has a CPU version of its own and never gets here.
    """

    def __init__(self, fused: Any) -> None:
        self.fused = fused

    def apply(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
        temperature: float, chunk_size: int, softcap: float | None, scale: float, outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        if self.fused is not None and hidden.device.type in ("cuda", "xpu"):
            return self.fused.apply(hidden, weight, bias, labels, temperature, chunk_size, softcap, scale, outputs)
        logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        logps = logits.log_softmax(-1)
        columns: dict[str, Callable[[], torch.Tensor]] = {
            "entropy": lambda: -(logps.exp() * logps).sum(-1),
            "log_sum_sq_probs": lambda: (2 * logps.detach()).logsumexp(-1),
            "mean_logits": lambda: logits.detach().mean(-1),
            "is_top1": lambda: logits.argmax(-1) == labels,
        }
        chosen = logps.gather(-1, labels[:, None]).squeeze(-1)
        return (chosen, *(make() if name in outputs else None for name, make in columns.items()))


if Version(trl.__version__) < Version("1.16"):
    trl.trainer.utils._ChunkedLogProbFunction = _PlainLogProbs(trl.trainer.utils._ChunkedLogProbFunction)


@contextlib.contextmanager
def overridden(target: Any, **values: Any) -> Iterator[None]:
    """Set instance attributes for the duration of a block."""
    own = vars(target)
    before = {name: own[name] for name in values if name in own}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name in values:
            if name in before:
                setattr(target, name, before[name])
            else:
                delattr(target, name)


def add_reference_adapter(peft_model: PeftModel) -> None:
    """A second adapter of the policy's configuration. Raises ValueError where PEFT can have only one."""
    config = copy.deepcopy(peft_model.peft_config[POLICY_ADAPTER])
    if edits_base_weights(config):
        config.init_lora_weights = True  # what it starts from is overwritten; the base must not be edited twice
    type(peft_model).add_adapter(peft_model, REFERENCE_ADAPTER, config)


def edits_base_weights(config: PeftConfig) -> bool:
    """Whether adding this adapter moves a part of the base weights into it (PiSSA and its kin)."""
    kind = getattr(config, "init_lora_weights", True)
    return isinstance(kind, str) and kind.startswith(("pissa", "corda", "olora", "loftq", "lora_ga"))


@contextlib.contextmanager
def _own_reference_adapter(model: Any, wanted: bool) -> Iterator[None]:
    """Decide what TRL gets when it adds a reference adapter to a `PeftModel` and fills it."""
    if isinstance(model, str) or not is_peft_model(model):
        yield
        return
    if wanted:
        with overridden(model, add_adapter=lambda name, config: add_reference_adapter(model)):
            yield
        return

    def policys_parameter(name: str) -> torch.nn.Parameter:
        return type(model).get_parameter(model, name.replace(f".{REFERENCE_ADAPTER}.", f".{POLICY_ADAPTER}."))

    # It copies the policy's parameters onto themselves.
    with overridden(model, add_adapter=lambda name, config: None, get_parameter=policys_parameter):
        yield


@contextlib.contextmanager
def reading_adapter(peft_model: PeftModel, name: str | None) -> Iterator[None]:
    """Forward passes without gradient through another adapter, or through none.

    PEFT's own switch also turns every parameter's `requires_grad` over, twice; where nothing is trained inside the
    block, telling the layers which adapter to read is enough.
    """
    layers: list[Any] = [
        m for m in peft_model.modules() if isinstance(m, BaseTunerLayer) or "_active_adapter" in vars(m)
    ]
    if name is None or not layers:  # prompt learning keeps its adapter elsewhere
        with use_adapter(peft_model, name):
            yield
        return
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def _copy_of(policy: PreTrainedModel) -> PreTrainedModel:
    reference = copy.deepcopy(policy)
    reference.gradient_checkpointing_disable()
    return reference.requires_grad_(False).eval()


def _is_partitioned(model: torch.nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 holds only shards of the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def _reference_like_policy(trainer: TrainerHost, model: Any) -> Iterator[None]:
    """Decide what TRL gets when it asks for a second model from the policy's hub id."""
    host = sys.modules[trainer.trl_class.__module__]
    load = host.create_model_from_path  # type: ignore[attr-defined]

    def create_model_from_path(path: str, *args: Any, **kwargs: Any) -> PreTrainedModel | None:
        policy = getattr(trainer, "model", None)
        if policy is None:  # TRL is loading the policy itself
            return load(path, *args, **kwargs)
        if not trainer.needs_reference:
            return None
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

    host.create_model_from_path = create_model_from_path  # type: ignore[attr-defined]
    try:
        yield
    finally:
        host.create_model_from_path = load  # type: ignore[attr-defined]


if TYPE_CHECKING:
    # The mixins below stand in front of a trainer whose attributes they use; the checker takes any for it.
    from trl import DPOTrainer as _Mixin
else:
    _Mixin = object


class NamedTrainer(_Mixin):
    """A trainer that is known by its `method` in tags, the model card and its citation."""

    trl_class: ClassVar[type]
    config_class: ClassVar[type]
    method: ClassVar[Method | None] = None

    # `compute_loss` weighs each micro-batch by its share of the optimizer step, so nobody else may divide.
    loss_is_scaled_for_ga = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        method = cls.__dict__.get("method")
        if method is None and "_name" not in cls.__dict__:
            # A user's own method must not be published under the name and paper of the class it extends.
            cls._name = cls.__name__.removesuffix("Trainer")
            cls._paper = {}
        if method is not None:
            cls._name = method.name
            cls._paper = {"title": method.title, "id": method.arxiv, "citation": method.citation}
        cls._tag_names = ["trl", "halos-trl", cls._name.lower()]

    def _refuse_foreign_config(self, args: Any) -> None:
        # A sibling's config is no better: `IPOConfig` extends `DPOConfig`, but DPO would not read its `tau`.
        own = next((c for c in type(args).__mro__ if c.__module__.split(".")[0] == __package__), object)
        if isinstance(args, self.config_class) and issubclass(self.config_class, own):
            return
        ours = self.config_class.__name__
        # `trl.GRPOConfig` shares the name of ours, and nothing else.
        same = type(args) in self.config_class.__mro__
        advice = "it takes the same arguments" if same else f"`trl.{ours}`, where there is one, has other fields"
        raise ValueError(
            f"{type(self).__name__} got `args` of type {type(args).__module__}.{type(args).__name__}, which has other "
            f"fields than this method. Use `from halos_trl import {ours}`: {advice}."
        )

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`: which log the metrics of a batch belong to."""
        return "train" if self.model.training else "eval"

    @property
    def moment(self) -> str:
        """Where an error appeared, for its message."""
        return f"step {self.state.global_step + 1}" if self.mode == "train" else "evaluation"

    def check_rows(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        """Hook: validate raw rows, before tokenization."""
        return dataset

    def real_rows(self, rows: int) -> int:
        """How many of a batch's `rows` are its own: behind them accelerate repeats rows to fill the last evaluation
        batch of every process.
        """
        state = self.accelerator.gradient_state
        if self.mode == "train" or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - rows * self.accelerator.process_index, 0), rows)

    def without_repeats(self, batch: dict[str, Any], mask: str = "completion_mask") -> dict[str, Any]:
        """The batch without a completion in its repeated rows, so that they add nothing to sums over tokens."""
        rows = len(batch[mask])
        own = self.real_rows(rows)
        if own == rows:
            return batch
        return batch | {mask: torch.cat([batch[mask][:own], torch.zeros_like(batch[mask][own:])])}

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Between the last gradient of a step and its update. Under fp16 the loss scaler skips such a step.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = float(whole(norm)) if isinstance(norm, torch.Tensor) else norm
        if value is not None and self.accelerator.mixed_precision != "fp16" and not math.isfinite(value):
            raise ValueError(
                f"The gradient's norm is {value} at step {self.state.global_step + 1}. The weights were not updated "
                "with it (DeepSpeed, which updates earlier, may have done so). Lower `learning_rate`, or look for "
                "extreme values in the model's weights."
            )
        return norm

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A collated batch, where the model is."""
        return self._prepare_inputs(batch)


class TrainerHost(NamedTrainer):
    """What the package's trainers need from their TRL parent, under public names.

    Mixed in front of a TRL trainer class, which is named by `trl_class`.
    """

    needs_reference: ClassVar[bool] = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: Any = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        **trl_arguments: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-{self._name}")
        self._refuse_foreign_config(args)
        self._new_adapter = peft_config
        self.check_arguments(args, model, ref_model)
        train_dataset = self._checked_before_trl(train_dataset, "train")
        eval_dataset = self._checked_before_trl(eval_dataset, "eval")
        self._means: dict[str, RunningMeans] = {"train": RunningMeans(), "eval": RunningMeans()}
        self._new_tokens: torch.Tensor | None = None
        hidden = self._hidden_from_trl(args)
        with (
            overridden(args, **hidden),
            _reference_like_policy(self, model),
            _own_reference_adapter(model, self.needs_reference),
        ):
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                **trl_arguments,
            )

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        """Hook: refuse combinations that cannot work, before anything is loaded."""
        adapters = [] if isinstance(model, str) or not is_peft_model(model) else list(model.peft_config)
        active = list(model.active_adapters) if adapters else []
        if adapters and (active != [POLICY_ADAPTER] or REFERENCE_ADAPTER in adapters):
            raise ValueError(
                f"The PeftModel has adapters {adapters}, of which {active} is active. The active one is trained and "
                f"must be called {POLICY_ADAPTER!r}; {REFERENCE_ADAPTER!r} is kept for the reference. Load it with "
                f"`PeftModel.from_pretrained(base, folder, adapter_name={POLICY_ADAPTER!r}, is_trainable=True)`."
            )
        own = {id(parameter) for parameter in model.parameters()} if isinstance(model, torch.nn.Module) else set()
        if ref_model is not None and any(id(parameter) in own for parameter in ref_model.parameters()):
            raise ValueError(
                "`ref_model` shares parameters with `model`, so it would change with the policy. Leave it out, and a "
                "reference is made from the policy as it is; or pass a model with weights of its own."
            )

    def _checked_before_trl(self, dataset: Any, name: str) -> Any:
        """What TRL's constructor would trip over, or never hands to `_prepare_dataset`."""
        if isinstance(dataset, dict):
            return type(dataset)({key: self._checked_before_trl(part, key) for key, part in dataset.items()})
        if not isinstance(dataset, Dataset | IterableDataset):
            return dataset
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"The {name} dataset is empty. Pass at least one row.")
        # TRL leaves the preparation of images to its collator.
        return self.check_rows(dataset, name) if {"image", "images"} & set(first) else dataset

    def _hidden_from_trl(self, args: Any) -> dict[str, Any]:
        """Config values that TRL must not see while it builds the trainer."""
        # Its callback refuses adapters and is lost on resume; `reference.py` does the same work without either.
        return {"sync_ref_model": False}

    # -- data --------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = self.check_rows(dataset, dataset_name)
        truncates = args.max_length is not None and getattr(args, "truncation_mode", "keep_start") == "keep_start"
        # TRL drops rows whose prompt fills `max_length` in silence. It sees no limit, and we drop the same rows.
        unlimited = copy.copy(args)
        unlimited.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, unlimited, dataset_name)  # type: ignore[misc]
        return _drop_and_count(dataset, args.max_length, dataset_name) if truncates else dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self.accelerator.num_processes > 1 and isinstance(dataset, Dataset) and not dataset.cache_files:
            raise ValueError(
                f"`precompute_ref_log_probs=True` in {self.accelerator.num_processes} processes hands the log-probs "
                f"over through the cache folder of the {name} dataset, but that dataset exists in memory only. Save "
                "it with `save_to_disk` and load it with `load_from_disk`, or set `precompute_ref_log_probs=False`."
            )
        # TRL's cache is found by dataset and model alone, but these decide which tokens count.
        deciding = [getattr(self.args, field, None) for field in ("max_length", "truncation_mode", "ld_alpha")]
        key = Hasher.hash((self._precompute_model_hash, deciding))
        with overridden(self, _precompute_model_hash=key):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # The host's sampler looks for `input_ids`, which rows get only when they are collated.
        data = self.train_dataset if train_dataset is None else train_dataset
        strategy = getattr(self.args, "train_sampling_strategy", None)
        if not isinstance(data, Dataset) or not (strategy == "group_by_length" or _groups_by_length(self.args)):
            return super()._get_train_sampler(train_dataset)
        columns = [c for c in ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids") if c in data.column_names]
        lengths = [sum(map(len, row)) for row in zip(*(data[column] for column in columns), strict=True)]
        return LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=lengths
        )

    # -- one forward -------------------------------------------------------------------------------------------

    def policy_tokens(self, model: torch.nn.Module, batch: dict[str, Any]) -> TokenTable:
        """The policy's token table, with the MoE auxiliary loss where the model has one."""
        return score_tokens(model, batch, output_router_logits=self.aux_loss_enabled)

    @contextlib.contextmanager
    def no_grad_forward(self) -> Iterator[None]:
        """The context in which a forward pass without gradient runs."""
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.compute_loss_context_manager(),
        ):
            yield

    def logits_for_metrics(self, model: torch.nn.Module, batch: dict[str, Any]) -> Any:
        """Plain model outputs with logits, as `compute_metrics` expects them (one more forward, like TRL's)."""
        inputs = {k: v for k, v in batch.items() if k not in _NOT_MODEL_INPUTS and not k.startswith("KL_")}
        with torch.no_grad():
            return model(**inputs, use_cache=False)

    # -- metrics -----------------------------------------------------------------------------------------------

    def record_metrics(self, sums: Sums) -> None:
        """Add named (sum, count) pairs to what the next log line averages. No communication, no device sync."""
        self._means[self.mode].add(sums)

    def count_tokens(self, batch: dict[str, Any]) -> None:
        """Add a training batch to `num_tokens`."""
        if self.mode == "train":
            tokens = batch["attention_mask"].sum()
            self._new_tokens = tokens if self._new_tokens is None else self._new_tokens + tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = self.mode
        self._metrics[mode].update({k: [v] for k, v in self._means[mode].drain(self._reduce_sum).items()})
        if self._new_tokens is not None:
            tokens = self._reduce_sum(self._new_tokens.to(torch.int64))
            self._total_train_tokens += int(tokens.item()) // self._tp_size
            self._new_tokens = None
        if self._metrics[mode]:
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)  # type: ignore[misc]

    def _reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum")

    # -- saving ------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        policy = self.accelerator.unwrap_model(self.model if model is None else model)
        dtypes = {name: parameter.dtype for name, parameter in policy.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        # PEFT loads an adapter in float32; that of a quantized model was bfloat16 before the interruption.
        for name, parameter in policy.named_parameters():
            dtype = dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if is_peft_model(self.model) and REFERENCE_ADAPTER in self.model.peft_config:
            kept = [name for name in self.model.peft_config if name != REFERENCE_ADAPTER]
            save = functools.partial(self.model.save_pretrained, selected_adapters=kept)
            with overridden(self.model, save_pretrained=save):
                super()._save(output_dir, state_dict)  # type: ignore[misc]
        else:
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def before_checkpoint(self, checkpoint_dir: str) -> None:
        """Hook: write what belongs into a checkpoint and TRL does not know about."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # First, so that a checkpoint with a trainer state is never one without the files of this hook.
        folder = f"checkpoint-{self.state.global_step}"
        self.before_checkpoint(os.path.join(self._get_output_dir(trial=trial), folder))
        super()._save_checkpoint(model, trial)  # type: ignore[misc]


def _groups_by_length(args: Any) -> bool:
    """The name that the setting had before transformers 5.2."""
    return bool(getattr(args, "group_by_length", False))


def _drop_and_count(dataset: Any, max_length: int, name: str) -> Any:
    """Drop rows whose prompt leaves no room for a completion token within `max_length`, and say how many."""
    advice = f"their prompt alone fills `max_length`={max_length}. Raise `max_length` or shorten the prompts."
    if isinstance(dataset, Dataset):
        kept = dataset.filter(lambda prompt_ids: len(prompt_ids) < max_length, input_columns="prompt_ids")
        if len(kept) < len(dataset):
            first = next(i for i, ids in enumerate(dataset["prompt_ids"]) if len(ids) >= max_length)
            logger.warning(
                f"Dropped {len(dataset) - len(kept)} of {len(dataset)} rows of the {name} dataset (the first is row "
                f"{first}): {advice}"
            )
        if len(kept) == 0:
            raise ValueError(f"No row of the {name} dataset can be trained on: {advice}")
        return kept

    dropped = 0

    def has_room(row: dict[str, Any]) -> bool:
        nonlocal dropped
        if len(row["prompt_ids"]) < max_length:
            return True
        dropped += 1
        if dropped & (dropped - 1) == 0:  # 1, 2, 4, 8, ...: a stream has no end at which to report the total
            logger.warning(f"Dropped {dropped} rows of the streamed {name} dataset so far: {advice}")
        return False

    return dataset.filter(has_room)


def card_identity(trainer: NamedTrainer) -> dict[str, Any]:
    """Name, paper and tags of a trainer's method, as the model card shows them."""
    return {"name": trainer._name, "paper": trainer._paper, "tags": trainer._tag_names}


def run_urls() -> dict[str, str]:
    """Where the trackers in use show the run, by tracker name."""
    urls = {"trackio": get_trackio_space_url(), "comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        urls["wandb"] = wandb.run.url if wandb.run is not None else None
    return {name: url for name, url in urls.items() if url}


class RewardHost(NamedTrainer, trl.RewardTrainer):
    """`trl.RewardTrainer` behind the door."""

    trl_class = trl.RewardTrainer

    def __init__(self, model: Any, args: Any = None, *trl_args: Any, **trl_kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-{self._name}")
        self._refuse_foreign_config(args)
        super().__init__(model, args, *trl_args, **trl_kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not {"chosen_ids", "chosen_input_ids"} & set(next(iter(dataset), ())):
            dataset = self.check_rows(dataset, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) < len(dataset):
            logger.warning(
                f"TRL dropped {len(dataset) - len(prepared)} of {len(dataset)} rows of the {dataset_name} dataset, in "
                f"which a side is longer than `max_length`={args.max_length}. Raise it to keep them."
            )
        return prepared


class PairedHost(TrainerHost, trl.DPOTrainer):
    """`trl.DPOTrainer` behind the door."""

    trl_class = trl.DPOTrainer

    def trl_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> tuple[torch.Tensor, Any]:
        """TRL's own DPO loss of a micro-batch (it logs by itself), under the humanline clamp where that is on.

        The clamp is a statement about log-probs: the policy's becomes reference + clamped log-ratio. So TRL gets a
        model that answers with clamped log-probs, and reference sums that are already there; whatever its loss types
        do with the two stays TRL's.
        """
        humanline = self.args.humanline_clamp
        if humanline is None:
            result = trl.DPOTrainer.compute_loss(self, model, inputs, return_outputs)
            return result if return_outputs else (result, None)
        reference_BT = self.reference.log_probs(inputs)
        sums = trl.DPOTrainer.compute_ref_log_probs(self, _Answering(reference_BT), inputs)
        clamped = _Clamped(model, reference_BT, inputs["completion_mask"][:, 1:], humanline)
        inputs = {**inputs, "ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}
        with overridden(self, precompute_ref_logps=True):
            loss = trl.DPOTrainer.compute_loss(self, clamped, inputs)
        is_chosen_B = torch.arange(len(reference_BT), device=reference_BT.device) < len(reference_BT) // 2
        # TRL would log the log-probs that it was given; those of the policy stand in for them.
        self.record_metrics(logps_sums(clamped.policy_BT, is_chosen_B))
        self.record_metrics(unclamped_sums(clamped.ratios_BT, is_chosen_B, humanline))
        return loss, self.logits_for_metrics(model, inputs) if return_outputs else None


class _Answering:
    """Stands in for a model whose log-probs are already known."""

    def __init__(self, logps_BT: torch.Tensor):
        self.log_probs = logps_BT

    def __call__(self, **inputs: Any) -> _Answering:
        return self


class _Clamped:
    """A policy whose per-token log-probs are reference + clamped log-ratio."""

    def __init__(self, model: Any, reference_BT: torch.Tensor, mask_BT: torch.Tensor, humanline: Humanline):
        self.model = model
        self.reference_BT = reference_BT
        self.mask_BT = mask_BT
        self.humanline = humanline

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        policy_BT = outputs.log_probs[:, -self.mask_BT.shape[1] :]
        ratios_BT, _ = log_ratios(policy_BT, self.reference_BT, self.mask_BT)
        self.policy_BT, self.ratios_BT = policy_BT.detach(), ratios_BT.detach()
        outputs.log_probs = self.reference_BT + clamp(ratios_BT, self.humanline)
        return outputs


class UnpairedHost(TrainerHost, trl.KTOTrainer):
    """`trl.KTOTrainer` behind the door."""

    trl_class = trl.KTOTrainer

    needs_kl: ClassVar[bool] = False
    estimates_kl: bool
    """Whether this run estimates a KL term; set before TRL's constructor, which prepares data, runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_type = self.args.loss_type
        if self._is_vision_dataset and self.estimates_kl and hasattr(self.data_collator, "calculate_kl"):
            # Images travel with the prompts, so vision partners come from TRL's collator, inside a micro-batch.
            self.data_collator.calculate_kl = True

    def _hidden_from_trl(self, args: Any) -> dict[str, Any]:
        # The one loss type for which TRL prepares no KL partners.
        self.estimates_kl = self.needs_kl and args.loss_type != "apo_zero_unpaired"
        return {**super()._hidden_from_trl(args), "loss_type": "apo_zero_unpaired"}

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self.estimates_kl and args.precompute_ref_log_probs and isinstance(dataset, Dataset):
            if len(dataset) < 2:
                raise ValueError(
                    f"The {dataset_name} dataset has {len(dataset)} row, but `precompute_ref_log_probs=True` takes "
                    "each row's KL partner from the row after it. Add rows, or set `precompute_ref_log_probs=False`."
                )
            # A fixed partner, so that its reference log-prob can be computed once; any order of training is fine.
            limit = sys.maxsize if args.max_length is None else args.max_length
            rows = zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)
            trained = [completion[: limit - len(prompt)] for prompt, completion in rows]
            dataset = dataset.add_column("KL_completion_ids", trained[1:] + trained[:1])
        elif self.estimates_kl and len(list(islice(dataset, 2))) < 2:
            raise ValueError(
                f"The {dataset_name} dataset has one row. KTO's KL term pairs each prompt with another row's "
                "completion, so it needs at least 2. Add rows, or use `loss_type='apo_zero_unpaired'`."
            )
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.calculate_KL = self.estimates_kl
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self.calculate_KL = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # transformers before 5.2 does not know `train_sampling_strategy`.
        if self.args.train_sampling_strategy == "sequential":
            data = self.train_dataset if train_dataset is None else train_dataset
            return torch.utils.data.SequentialSampler(data) if isinstance(data, Dataset) else None
        return super()._get_train_sampler(train_dataset)


class ScoredHost(TrainerHost, trl.KTOTrainer):
    """`trl.KTOTrainer` behind the door, for scored completions: its tokenization, models and saving, none of its loss.

    TRL's columns of precomputed reference log-probs hold a sum for each completion. Here `ref_logps` holds one number
    per completion token, in as many columns as the longest completion of the dataset has tokens; TRL's cache on disk,
    its fingerprint and its work over several processes stay in use.
    """

    trl_class = trl.KTOTrainer
    columns: ClassVar[tuple[str, ...]] = ("prompt_ids", "completion_ids", "label", "score", "advantage", "ref_logps")
    """What a prepared row brings into a batch."""

    def _hidden_from_trl(self, args: Any) -> dict[str, Any]:
        # The one loss type for which TRL prepares no KL partners.
        return {**super()._hidden_from_trl(args), "loss_type": "apo_zero_unpaired"}

    @property
    def micro_batch_size(self) -> int:
        """Most examples of a micro-batch; `auto_find_batch_size` may have lowered it."""
        return self._train_batch_size

    def check_tokenized(self, dataset: Dataset, name: str) -> Dataset:
        """Hook: validate tokenized rows."""
        return dataset

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        # For a dataset named "train" TRL recommends weights of desirable rows, which have no meaning here.
        dataset = super()._prepare_dataset(dataset, processing_class, args, f"scored {dataset_name}")
        return self.check_tokenized(dataset, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.columns)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        limit = sys.maxsize if self.args.max_length is None else self.args.max_length
        lengths = zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)
        self._precomputed_width = max(min(len(p) + len(c), limit) - len(p) for p, c in lengths)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, None]:
        """Reference log-probs of the completion tokens, moved to the left: `(B, longest completion)`, then zeros."""
        shared = getattr(self.ref_model, "module", self.ref_model) is None and is_peft_model(self.model)
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {})
        with self.no_grad_forward(), contextlib.ExitStack() as stack:
            if shared:
                adapter = REFERENCE_ADAPTER if REFERENCE_ADAPTER in adapters else None
                stack.enter_context(reading_adapter(self.accelerator.unwrap_model(self.model), adapter))
            tokens = score_tokens(model, inputs)
        mask_BT = tokens.mask_BT
        packed_BW = tokens.logps_BT.new_zeros(len(mask_BT), self._precomputed_width)
        for row, (logps_T, mask_T) in enumerate(zip(tokens.logps_BT, mask_BT, strict=True)):
            own = logps_T[mask_T]
            packed_BW[row, : len(own)] = own
        return packed_BW.float(), None


@dataclass
class _WithValues(FusedCausalLMOutput):
    """A field and not an attribute, since DDP and autocast rebuild outputs from their fields."""

    state_values: torch.Tensor | None = None


def _attach(head: ValueHead, causal_lm: Any) -> None:
    """Make the head a part of the policy: its forward pass through the fused LM head also answers `state_values`."""
    causal_lm.add_module(VALUE_HEAD, head)
    # Whoever saves the policy without this package gets the plain model too.
    own = {f"{VALUE_HEAD}.{name}" for name in head.state_dict()}
    causal_lm._keys_to_ignore_on_save = own | set(causal_lm._keys_to_ignore_on_save or ())
    fused_forward = causal_lm.forward
    seen: dict[str, torch.Tensor] = {}
    causal_lm.base_model.register_forward_hook(lambda module, args, out: seen.update(hidden=out.last_hidden_state))

    @functools.wraps(fused_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = fused_forward(*args, **kwargs)
        hidden_BSH = seen.pop("hidden")
        if not kwargs.get("fused_lm_head"):
            return outputs
        return _WithValues(**outputs, state_values=head(hidden_BSH[:, :-1]))

    causal_lm.forward = forward


class ValueHost(ScoredHost):
    """A host whose policy carries a value head while it trains, and is saved without it."""

    value_head: ValueHead

    def attach_value_head(self) -> None:
        """Give the policy a new head. Raises ValueError where its gradients could not be limited apart."""
        if self.is_deepspeed_enabled or not hasattr(transformers.Trainer, "_clip_grad_norm"):
            engine = "DeepSpeed" if self.is_deepspeed_enabled else f"transformers {transformers.__version__}"
            raise ValueError(
                f"{type(self).__name__} limits the gradients of the value head apart from the policy's, which "
                f"{engine} has no place for. Use DDP or FSDP2 with transformers 5."
            )
        causal_lm = self._causal_lm()
        config = causal_lm.config.get_text_config()
        size = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
        self.value_head = ValueHead(size, self.args.seed).to(causal_lm.get_output_embeddings().weight.device)
        _attach(self.value_head, causal_lm)

    def _causal_lm(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        if state_dict is None:
            head = self.value_head.state_dict()
        else:  # gathered from shards
            marker = f"{VALUE_HEAD}."
            head = {name.split(marker, 1)[1]: t for name, t in state_dict.items() if marker in name}
            state_dict = {name: t for name, t in state_dict.items() if marker not in name}
        save_value_head(head, folder)
        with taken_off(self._causal_lm()):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with taken_off(self._causal_lm()):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with taken_off(self._causal_lm()):
            super()._load_best_model()
        load_value_head(self.value_head, self.state.best_model_checkpoint)

    def _clip_grad_norm(self, model: Any) -> Any:
        own = {id(parameter) for parameter in self.value_head.parameters()}
        policy = [parameter for parameter in model.parameters() if id(parameter) not in own]
        return self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)


__all__ = [
    "POLICY_ADAPTER",
    "REFERENCE_ADAPTER",
    "Method",
    "NamedTrainer",
    "PairedHost",
    "RewardHost",
    "ScoredHost",
    "TokenTable",
    "TrainerHost",
    "UnpairedHost",
    "ValueHost",
    "add_reference_adapter",
    "card_identity",
    "edits_base_weights",
    "get_config_model_id",
    "is_peft_model",
    "overridden",
    "reading_adapter",
    "run_urls",
    "score_tokens",
]
