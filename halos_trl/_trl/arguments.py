"""Type checks of a trainer's arguments, made before anything is loaded. Each error names the argument."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils.quantization_config import QuantizationConfigMixin


def check_types(given: Mapping[str, Any], needs_language_head: bool) -> None:
    """Raise TypeError or ValueError for the first invalid argument in `given` (name -> value).

    An argument that is absent or None counts as not passed.
    """
    check_model(given.get("model"), needs_language_head)
    if given.get("ref_model") is not None:
        check_loaded_model("ref_model", given["ref_model"], needs_language_head)
    evaluation = given.get("eval_dataset")
    if isinstance(evaluation, dict) and not evaluation:
        raise ValueError(
            "`eval_dataset` is an empty dict. Pass a dict of datasets by name, a single dataset, or leave it out."
        )
    _check_tokenizer(given.get("processing_class"), given.get("model"))
    for name in ("data_collator", "compute_metrics", "preprocess_logits_for_metrics"):
        value = given.get(name)
        _require(value is None or callable(value), name, value, "a function")
    _check_callbacks(given.get("callbacks"))
    _check_optimizers(given.get("optimizers", (None, None)))
    _check_adapter(given.get("peft_config"))
    quantization = given.get("quantization_config")
    wanted = "a configuration such as `transformers.BitsAndBytesConfig(load_in_4bit=True)`"
    accepted = quantization is None or isinstance(quantization, QuantizationConfigMixin)
    _require(accepted, "quantization_config", quantization, wanted)


def shown(value: Any) -> str:
    """A value, shortened if it is long, and its type."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    if value is None:
        return "None"
    simple = isinstance(value, str | int | float | bool)
    return f"{repr(value)[:60]} ({type(value).__name__})" if simple else f"a value of type {type(value).__name__}"


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise TypeError(f"`{name}` is {shown(value)}. Pass {wanted}.")


# -- models --------------------------------------------------------------------------------------------------------

_MODEL = "a Hub id, a folder, or a model loaded with `from_pretrained`"


def check_model(model: Any, needs_language_head: bool) -> None:
    """Raise an error for anything other than a model or a model name."""
    if not isinstance(model, str):
        return check_loaded_model("model", model, needs_language_head)
    looks_like_folder = model.startswith((".", "~", os.sep)) or os.sep * 2 in model
    if not model or (looks_like_folder and not os.path.isdir(model)):
        raise ValueError(f"`model` is {model!r}, and there is no such folder. Pass {_MODEL}.")
    return None


def check_loaded_model(name: str, model: Any, needs_language_head: bool) -> None:
    """Raise an error for a loaded model that cannot be trained or used as a reference."""
    is_model = isinstance(model, torch.nn.Module) and hasattr(model, "config")
    _require(
        is_model, name, model, _MODEL if name == "model" else "a model loaded with `from_pretrained`, or leave it out"
    )
    if any(parameter.device.type == "meta" for parameter in model.parameters()) and not _is_partitioned(model):
        raise ValueError(
            f"`{name}` ({type(model).__name__}) has parameters on the meta device, so their weights are not loaded. "
            "Load it with `from_pretrained` and without `device_map`."
        )
    if needs_language_head:
        _check_language_head(name, model)


def _check_language_head(name: str, model: Any) -> None:
    base = model.get_base_model() if is_peft_model(model) else getattr(model, "module", model)
    if not isinstance(base, PreTrainedModel):
        return
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"`{name}` ({type(base).__name__}) has an encoder and a decoder. The methods of this package train on "
            "prompt and completion as one sequence: pass a decoder-only model, e.g. of `AutoModelForCausalLM`."
        )
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"`{name}` ({type(base).__name__}) has no language-model head to compute log-probs. Load it with "
            "`AutoModelForCausalLM.from_pretrained`."
        )


def _is_partitioned(model: Any) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


# -- the rest ------------------------------------------------------------------------------------------------------


def _check_tokenizer(tokenizer: Any, model: Any) -> None:
    wanted = "the model's tokenizer, e.g. `AutoTokenizer.from_pretrained(...)`"
    is_one = isinstance(tokenizer, PreTrainedTokenizerBase | ProcessorMixin)
    _require(tokenizer is None or is_one, "processing_class", tokenizer, wanted)
    if tokenizer is None and not isinstance(model, str) and not getattr(model.config, "_name_or_path", None):
        raise ValueError(
            "`processing_class` was not passed, and the model's config does not contain the Hub id or folder that it "
            f"was loaded from. Pass {wanted}."
        )


def _check_callbacks(callbacks: Any) -> None:
    wanted = "a list of `transformers.TrainerCallback` objects or classes"
    _require(callbacks is None or isinstance(callbacks, list | tuple), "callbacks", callbacks, wanted)
    for i, callback in enumerate(callbacks or ()):
        kind = callback if isinstance(callback, type) else type(callback)
        _require(issubclass(kind, TrainerCallback), f"callbacks[{i}]", callback, "a `transformers.TrainerCallback`")


def _check_optimizers(optimizers: Any) -> None:
    wanted = "a pair of an optimizer and a learning-rate schedule, each of which may be None"
    is_pair = isinstance(optimizers, list | tuple) and len(optimizers) == 2
    _require(is_pair, "optimizers", optimizers, wanted)
    optimizer, schedule = optimizers
    for i, (value, method) in enumerate(((optimizer, "zero_grad"), (schedule, "step"))):
        is_one = value is None or (hasattr(value, method) and not isinstance(value, type))
        _require(is_one, f"optimizers[{i}]", value, ("an optimizer", "a learning-rate schedule")[i] + ", or None")


def check_optimizer_parameters(optimizer: Any, model: torch.nn.Module) -> None:
    """Raise an error for an optimizer that contains none of the model's parameters."""
    if optimizer is None:
        return
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    groups = getattr(optimizer, "param_groups", [])
    if groups and not any(id(parameter) in own for group in groups for parameter in group["params"]):
        raise ValueError(
            "`optimizers[0]` contains none of the trained parameters, so nothing would be learned. Create it from the "
            "parameters of the model that you pass. With `peft_config`, the adapter is created later; leave "
            "`optimizers` out, and use `optim` and `learning_rate` instead."
        )


def _check_adapter(config: Any) -> None:
    if config is None:
        return
    wanted = "a configuration of `peft`, e.g. `peft.LoraConfig(r=16)`"
    _require(hasattr(config, "peft_type") and not isinstance(config, type), "peft_config", config, wanted)
    rank = getattr(config, "r", 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"`peft_config` has `r={rank!r}`; expected the rank of the adapter. Use an integer of at least 1."
        )
