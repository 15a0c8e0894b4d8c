"""Merging a saved adapter into its base model: load, merge, check, save and push."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config

from . import model_card
from .value_head import VALUE_HEAD_FILE

logger = get_logger(__name__)


def merge_adapter(trainer: Any, used_datasets: list[str]) -> None:
    """Merge the saved adapter into its base model and save (and push) the result; on one process only.

    The base model is reloaded, unquantized, in the dtype of the run (`--dtype`): merging into quantized weights would
    lose the update to rounding, and the trainer's own model may be sharded. The merged model is reloaded and compared
    with the adapter. Raises ValueError if they differ; no merged model is left behind.
    """
    args = trainer.args
    # DeepSpeed ZeRO-3 would shard every model that is loaded while its configuration is set, with all processes.
    unset_hf_deepspeed_config()
    target = Path(model_card.merged_name(os.path.normpath(args.output_dir)))
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(trainer, partial, used_datasets)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _move_away(target)
    partial.rename(target)
    trainer.accelerator.print(f"Merged model saved to {target}")
    if args.push_to_hub:
        _push(args, model_card.merged_name(trainer.hub_model_id), target)
        trainer.accelerator.print(f"Merged model pushed to {model_card.merged_name(trainer.hub_model_id)}")


def _write(trainer: Any, folder: Path, used_datasets: list[str]) -> None:
    args = trainer.args
    trained = trainer.accelerator.unwrap_model(trainer.model)
    # FSDP inserts a class of its own before the model's.
    model_class: Any = next(c for c in type(trained.get_base_model()).__mro__ if not c.__module__.startswith("torch."))
    settings = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    settings |= {"attn_implementation": "eager"}  # runs on the CPU, too
    if "SequenceClassification" in model_class.__name__:  # a reward model; its base may be a language model
        settings["num_labels"] = trained.config.num_labels
    base = model_class.from_pretrained(trained.active_peft_config.base_model_name_or_path, **settings)
    adapted = PeftModel.from_pretrained(base, args.output_dir).eval()
    ids = _sample_ids(trainer.processing_class)
    expected = outputs_of(adapted, ids)
    with adapted.disable_adapter():
        change = (expected - outputs_of(adapted, ids)).abs().mean().item()

    merged = merged_model(adapted)
    merged.generation_config = getattr(trained, "generation_config", None)
    merged.save_pretrained(folder)
    del base, adapted, merged  # one copy in memory
    reloaded = model_class.from_pretrained(folder, **{k: v for k, v in settings.items() if k != "revision"})
    refuse_other_model(expected, outputs_of(reloaded, ids), change, reloaded.dtype)
    if _comparable(trainer, trained):
        refuse_other_model(outputs_of(trained, ids), outputs_of(reloaded, ids), change, reloaded.dtype)
    value_head = os.path.join(args.output_dir, VALUE_HEAD_FILE)
    if os.path.isfile(value_head):
        shutil.copy(value_head, folder)
    trainer.processing_class.save_pretrained(folder)
    model_card.write(trainer, None, used_datasets, None, merged_dir=str(folder))


def merge_folder(adapter: str, output: str, *, dtype: str = "auto", overwrite: bool = False) -> None:
    """Merge a saved adapter into its unquantized base model, and save model and tokenizer in the folder `output`.

    The result is reloaded and compared with the adapter. With `overwrite`, an existing `output` is renamed first.

    Raises ValueError for a folder without an adapter, for an existing output (without `overwrite`), and if the merged
    model differs from the adapter, in which case nothing is left at `output`.
    """
    if not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        raise ValueError(
            f"`{adapter}` has no `adapter_config.json`, so it is not the folder of an adapter. Pass the `output_dir` "
            "of a run with an adapter."
        )
    target = Path(output)
    if target.exists() and not overwrite:
        raise ValueError(
            f"`{output}` exists. Choose another folder, or pass `--overwrite` to rename the existing one."
        )
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_merged(adapter, partial, dtype)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _move_away(target)
    partial.rename(target)


def _write_merged(adapter: str, folder: Path, dtype: str) -> None:
    config = PeftConfig.from_pretrained(adapter)
    is_classifier = str(config.task_type).endswith("SEQ_CLS")
    model_class: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if is_classifier:
        settings["num_labels"] = _labels_of(adapter)
    base = model_class.from_pretrained(config.base_model_name_or_path, revision=config.revision, **settings)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = _sample_ids(tokenizer)
    expected = outputs_of(adapted, ids)
    with adapted.disable_adapter():
        change = (expected - outputs_of(adapted, ids)).abs().mean().item()
    merged_model(adapted).save_pretrained(folder)
    reloaded = model_class.from_pretrained(folder, **settings)
    refuse_other_model(expected, outputs_of(reloaded, ids), change, reloaded.dtype)
    value_head = os.path.join(adapter, VALUE_HEAD_FILE)
    if os.path.isfile(value_head):
        shutil.copy(value_head, folder)
    tokenizer.save_pretrained(folder)


def _labels_of(adapter: str) -> int:
    """Number of logits of a reward model's head that is saved with its adapter; 1 if there is none."""
    file = os.path.join(adapter, "adapter_model.safetensors")
    if os.path.isfile(file):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if name.endswith("score.weight"):
                    return tensors.get_slice(name).get_shape()[0]
    return 1


# ---------------------------------------------------------------------------------------------------------- the merge


def merged_model(adapted: PeftModel) -> Any:
    """The adapter merged into its base.

    An adapter may change only one of two tied weights, or each one differently. Therefore, weights are untied for the
    merge, and tied again if they are still equal.
    """
    tied = _tied_parameters(adapted)
    for places in tied:
        for module, name in places[1:]:
            setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False))
    merged: Any = adapted.merge_and_unload()
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        still_tied = bool(tied) and torch.equal(head.weight, embeddings.weight)
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = still_tied
    merged.tie_weights()
    return merged


def _tied_parameters(model: torch.nn.Module) -> list[list[tuple[torch.nn.Module, str]]]:
    """Every parameter that several modules share, with its locations."""
    places: dict[int, list[tuple[torch.nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places[id(parameter)].append((module, name))
    return [found for found in places.values() if len(found) > 1]


# ---------------------------------------------------------------------------------------------------------- the check

_TEXT = "Merging 17 apples, 3 pears & one large fig: is the answer (still) the same, or not? Yes; it has to be."


def _sample_ids(processing_class: Any) -> torch.Tensor:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return torch.tensor([tokenizer(_TEXT)["input_ids"][:32]])


@torch.no_grad()
def outputs_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs in nats of the next tokens of one row, or the scores of a classifier, without dropout; in float32."""
    with _evaluating(model):
        logits = model(input_ids=ids.to(model.device)).logits.float().cpu()
    return logits if logits.ndim == 2 else logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _comparable(trainer: Any, trained: Any) -> bool:
    """Whether this process can run the trained model by itself, with the same arithmetic as the merged one."""
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return not sharded and getattr(trained.config, "quantization_config", None) is None


def refuse_other_model(expected: torch.Tensor, got: torch.Tensor, change: float, dtype: torch.dtype) -> None:
    """Raise ValueError if the outputs of the merged model differ from those of the adapter.

    `change` is the mean absolute effect of the adapter. In half precision, the sum of base and adapter is rounded to
    the precision of the base weights.
    """
    floor, share = (1e-3, 0.01) if dtype in (torch.float32, torch.float64) else (0.1, 0.2)
    difference = (expected - got).abs().mean().item()
    if not difference <= floor + share * change:  # NaN too
        raise ValueError(
            f"The outputs of the merged model differ from the adapter's by {difference:.4g} on average; the adapter "
            f"itself changes the outputs of its base model by {change:.4g}. This happens if parameters outside the "
            "adapter were trained, or if an adapter of tied weights cannot be merged. No merged model was written. "
            "The adapter is saved; use it unmerged."
        )


# -------------------------------------------------------------------------------------------------------- the folder


def _move_away(target: Path) -> None:
    """Rename an existing folder, whose files `from_pretrained` and a push would otherwise treat as part of the merged
    model.
    """
    if not target.exists():
        return
    number = 1
    while (aside := target.with_name(f"{target.name}.previous-{number}")).exists():
        number += 1
    target.rename(aside)
    logger.warning(
        f"{target} already existed and was renamed to {aside}, so that its files do not mix with the new ones."
    )


def _push(args: Any, repo: str, folder: Path) -> None:
    api = HfApi(token=args.hub_token)
    api.create_repo(repo, private=args.hub_private_repo, exist_ok=True)
    revision = getattr(args, "hub_revision", None)
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message="Merged model")


__all__ = ["merge_adapter", "merge_folder", "merged_model", "outputs_of", "refuse_other_model"]
