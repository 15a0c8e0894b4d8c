"""Mixins between this package's trainers and the TRL trainer that each of them extends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers.integrations import is_deepspeed_zero3_enabled, is_wandb_available
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url

from ..forward.packing import compiled_rows, give_packing
from ..forward.score import TokenTable, model_inputs, score_tokens
from ..metrics import RunningMeans, Sums, finite
from ..storage import store
from .adapters import refuse_unfit_adapters
from .arguments import check_optimizer_parameters, check_types
from .construct import built_our_way, own_reference_adapter
from .finite import FiniteUpdates
from .fused_head import has_router_logits
from .halos_order import PreparesHalosRows
from .images import StoresImageReference, has_images
from .loops import CleanLoops
from .overridden import overridden
from .precompute import StoresReference
from .rows import noting_policy, refuse_without_special_tokens
from .saving import SavesPolicy
from .user_functions import ChecksUserFunctions

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


class Method(NamedTuple):
    """Name of a method in logs, tags and the model card, and its citation."""

    name: str
    title: str
    arxiv: str
    citation: str


def _is_ours(config_class: type) -> bool:
    return config_class.__module__.split(".")[0] == __name__.split(".")[0]


def _advice_on_config(given: type, wanted: type, name: str) -> str:
    """Advice for an error message: what to pass instead of a config of another class."""
    hosts = [c for c in wanted.__mro__ if c.__module__.split(".")[0] == "trl" and not c.__name__.startswith("_")]
    if given in hosts:
        return f"It lacks the settings of this package. Use `{name}`, which extends it."
    host = next((c for c in given.__mro__ if c in hosts), None)
    if host is not None and not _is_ours(given):
        return (
            f"It derives from `trl.{host.__name__}` and lacks the settings of this package and their checks. Derive "
            f"it from `{name}`, which extends `trl.{host.__name__}`: `class {given.__name__}({name}): ...`. If a "
            "framework defines it, call `halos_trl.patch_trl()` before importing the framework."
        )
    return f"Its settings are not those of this method. Use `{name}`, or a class derived from it."


class NamedTrainer(ChecksUserFunctions, FiniteUpdates, CleanLoops):
    """A trainer whose `method` determines its tags, model card and citation."""

    trl_class: ClassVar[type]
    config_class: ClassVar[type]
    method: ClassVar[Method | None] = None

    drops_invalid_rows: bool = False
    """Whether `check_rows` drops and counts invalid rows instead of raising. Set before TRL's constructor runs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        method = cls.__dict__.get("method")
        if method is None and "_name" not in cls.__dict__:
            # A user's subclass must not be published under the name and paper of the class it extends.
            cls._name = cls.__name__.removesuffix("Trainer")
            cls._paper = {}
        if method is not None:
            cls._name = method.name
            cls._paper = {"title": method.title, "id": method.arxiv, "citation": method.citation}
        cls._tag_names = ["trl", "halos-trl", cls._name.lower()]

    def _refuse_foreign_config(self, args: Any) -> None:
        # Subclasses are refused, too: `IPOConfig` extends `DPOConfig`, but DPO would ignore its `tau`.
        own = next((c for c in type(args).__mro__ if _is_ours(c)), object)
        if isinstance(args, self.config_class) and issubclass(self.config_class, own):
            return
        given, wanted = type(args), self.config_class
        source = wanted.__module__ if not _is_ours(wanted) else __name__.split(".")[0]
        raise ValueError(
            f"{type(self).__name__} got `args` of type {given.__module__}.{given.__qualname__}. "
            + _advice_on_config(given, wanted, f"{source}.{wanted.__name__}")
        )

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`: the log that receives the metrics of the current batch."""
        return "train" if self.model.training else "eval"

    def check_rows(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        """Hook: validate raw rows, before tokenization."""
        return dataset

    def real_rows(self, rows: int) -> int:
        """Number of a batch's `rows` that are not repeats, which accelerate appends to fill the last evaluation batch
        of every process.
        """
        state = self.accelerator.gradient_state
        if self.mode == "train" or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - rows * self.accelerator.process_index, 0), rows)

    def without_repeats(self, batch: dict[str, Any], mask: str = "completion_mask") -> dict[str, Any]:
        """The batch with its mask cleared in repeated rows, so that they add nothing to sums over tokens."""
        rows = len(batch[mask])
        own = self.real_rows(rows)
        if own == rows:
            return batch
        return batch | {mask: torch.cat([batch[mask][:own], torch.zeros_like(batch[mask][own:])])}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`; warns if the run would end before the learning rate reaches its peak."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup >= num_training_steps and self.args.lr_scheduler_type != "constant":
            logger.warning(
                f"The run has {num_training_steps} optimizer steps, but the warm-up of the learning rate takes "
                f"{warmup} (`warmup_steps={self.args.warmup_steps}`), so the run ends before the learning rate "
                "reaches its peak. Lower `warmup_steps`; a number below 1 is a fraction of the run's steps, e.g. 0.1."
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A collated batch, moved to the model's device."""
        return self._prepare_inputs(batch)


class TrainerHost(PreparesHalosRows, StoresImageReference, StoresReference, SavesPolicy, NamedTrainer):
    """Public methods that this package's trainers need from the TRL trainer that they extend.

    Use it in front of a TRL trainer class in the list of bases; `trl_class` is that class.
    """

    needs_reference: ClassVar[bool] = True
    reference_storage: str = "same"
    """`reference_storage` of a reference that is a second model; set before TRL's constructor creates it."""

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
        check_types(locals(), needs_language_head=True)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-{self._name}")
        self._refuse_foreign_config(args)
        self.drops_invalid_rows = args.drop_invalid_rows
        self._new_adapter = peft_config
        self.check_loops(args)
        self.check_arguments(args, model, ref_model)
        self.reference_storage = args.reference_storage
        if ref_model is not None:
            store(ref_model, self.reference_storage, args.device)
        refuse_without_special_tokens(processing_class, args)
        self._assistant_only = bool(getattr(args, "assistant_only_loss", False))
        self._in_halos_order = args.batch_order == "halos"
        train_dataset = self._checked_before_trl(train_dataset, "train")
        eval_dataset = self._checked_before_trl(eval_dataset, "eval")
        self._means: dict[str, RunningMeans] = {"train": RunningMeans(), "eval": RunningMeans()}
        self._stores_images = args.precompute_ref_log_probs and has_images(train_dataset, "train")
        with (
            overridden(args, **self._hidden_from_trl(args)),
            built_our_way(self, model),
            own_reference_adapter(model, self.needs_reference),
            noting_policy(self, model),
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
        self._leave_out_other_turns()
        check_optimizer_parameters(optimizers[0], self.model)
        if not has_router_logits(self.model):
            self.aux_loss_enabled = False
        give_packing([self.model, self.ref_model], args.packed, compiled_rows(args))

    def check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        """Hook: raise an error for unsupported combinations of arguments, before anything is loaded."""
        refuse_unfit_adapters(model)
        own = {id(parameter) for parameter in model.parameters()} if isinstance(model, torch.nn.Module) else set()
        if ref_model is not None and any(id(parameter) in own for parameter in ref_model.parameters()):
            raise ValueError(
                "`ref_model` shares parameters with `model`, so it would change with the policy. Pass a separate "
                "model, or leave `ref_model` out to use a copy of the initial policy."
            )

    def _hidden_from_trl(self, args: Any) -> dict[str, Any]:
        """Config values to override while TRL's constructor runs."""
        # TRL's sync callback does not support adapters or resuming; `ReferenceSync` replaces it.
        hidden = {"sync_ref_model": False}
        # TRL refuses this flag with images, which `StoresImageReference` supports.
        return hidden | ({"precompute_ref_log_probs": False} if self._stores_images else {})

    # -- forward pass ------------------------------------------------------------------------------------------

    def batch_loss(self, model: Any, batch: dict[str, Any], return_outputs: bool = False) -> Any:
        """Hook: the loss of a collated batch, as `compute_loss` returns it."""
        raise NotImplementedError

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        # TRL's `compute_loss` calls this method, so subclasses may override either one.
        result = self.batch_loss(model, inputs, return_outputs)
        self.refuse_non_finite_loss(result[0] if return_outputs else result)
        return result

    def policy_tokens(self, model: torch.nn.Module, batch: dict[str, Any]) -> TokenTable:
        """The policy's token table, with the auxiliary loss of a mixture of experts if it is enabled."""
        return score_tokens(model, batch, output_router_logits=self.aux_loss_enabled)

    @contextlib.contextmanager
    def no_grad_forward(self) -> Iterator[None]:
        """Context for a forward pass without gradient."""
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.compute_loss_context_manager(),
            # A model that has not been prepared for training yet does not use mixed precision by itself.
            self.accelerator.autocast(),
        ):
            yield

    def logits_for_metrics(self, model: torch.nn.Module, batch: dict[str, Any]) -> Any:
        """Model outputs with logits, as `compute_metrics` expects them (costs one more forward pass, as in TRL)."""
        with torch.no_grad():
            return model(**model_inputs(batch), use_cache=False)

    # -- metrics -----------------------------------------------------------------------------------------------

    def forget_metrics(self, mode: str) -> None:
        super().forget_metrics(mode)
        self._means[mode] = RunningMeans()

    def record_metrics(self, sums: Sums) -> None:
        """Add named (sum, count) pairs to the averages of the next log line. No communication, no device sync."""
        self._means[self.mode].add(sums)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = self.mode
        means, dropped = finite(self._means[mode].drain(self._reduce_sum))
        if dropped:
            logger.warning_once(
                f"The metrics {dropped} are NaN or infinite, so they are left out of the log. The loss is finite; "
                "models that assign probability 0 to some tokens have such logits."
            )
        self._metrics[mode].update({name: [mean] for name, mean in means.items()})
        super().log(logs, start_time)

    def _reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum")


@contextlib.contextmanager
def unwrapped_for_generation(trainer: Any) -> Iterator[Any]:
    """Yield the policy for generation: without DDP's wrapper, and with its parameters gathered under ZeRO-3.

    Gradient checkpointing is not changed, because it has no effect in eval mode.
    """
    if not is_deepspeed_zero3_enabled():
        yield trainer.accelerator.unwrap_model(trainer.model_wrapped)
        return
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        yield model
    if trainer.args.gradient_checkpointing:  # TRL has re-enabled it without its settings
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)


def card_identity(trainer: NamedTrainer) -> dict[str, Any]:
    """Name, paper and tags of a trainer's method for the model card."""
    return {"name": trainer._name, "paper": trainer._paper, "tags": trainer._tag_names}


def run_urls() -> dict[str, str]:
    """URLs of the run in active trackers, by tracker name."""
    urls = {"trackio": get_trackio_space_url(), "comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        urls["wandb"] = wandb.run.url if wandb.run is not None else None
    return {name: url for name, url in urls.items() if url}
