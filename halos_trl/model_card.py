"""The model card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ._trl import card_identity, get_config_model_id, run_urls

_PACKAGES = ("halos_trl", "trl", "transformers", "torch", "datasets", "tokenizers", "peft", "accelerate")
_TRAINING_FIELDS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "bf16",
    "fp16",
    "seed",
)
_HUMANLINE_FIELDS = ("humanline", "log_epsilon_p", "log_epsilon_r", "humanline_sync_steps")
_LORA_FIELDS = {"r": "lora_r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"}


def write(
    trainer: Any,
    model_name: str | None,
    dataset_name: str | Sequence[str] | None,
    tags: str | list[str] | None,
    *,
    merged_dir: str | None = None,
) -> None:
    """Write the card of a trainer's model to `output_dir/README.md`.

    With `merged_dir`, write the card of the merged model there. Of local paths, only the last part is shown, without a
    link.
    """
    identity = card_identity(trainer)
    base_id, base_text = base_model(trainer.model)
    peft_type = _peft_type(trainer.model)
    is_adapter = peft_type is not None and merged_dir is None
    repo_id, directory = trainer.hub_model_id, trainer.args.output_dir
    name = model_name or repo_id or os.path.basename(os.path.abspath(directory))
    if merged_dir is not None:
        name, repo_id, directory = merged_name(name), repo_id and merged_name(repo_id), merged_dir
    dataset_names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or [])
    own_tags = [tags] if isinstance(tags, str) else list(tags or [])
    humanline = getattr(trainer.args, "humanline", False)
    if humanline:
        own_tags.append("humanline")
    data = ModelCardData(
        base_model=base_id,
        datasets=[name for name in dataset_names if is_hub_id(name)] or None,
        library_name="peft" if is_adapter else "transformers",
        model_name=name.split("/")[-1],
        tags=sorted({"generated_from_trainer", *identity["tags"], *own_tags}),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(files(__package__) / "templates" / "model_card.md"),
        model_name=name.split("/")[-1],
        model_id=repo_id or os.path.basename(os.path.abspath(directory)),
        artifact=f"This {peft_type} adapter" if is_adapter else "This model",
        base_text=base_text,
        base_is_local=is_adapter and base_id is None,
        merged=f"{peft_type} adapter" if peft_type and not is_adapter else None,
        dataset_text=" and ".join(_link(name, "datasets/") for name in dataset_names),
        is_reward_model="SequenceClassification" in type(_unwrapped(trainer.model)).__name__,
        has_chat_template=bool(getattr(trainer.processing_class, "chat_template", None)),
        method=identity["name"],
        paper=identity["paper"],
        humanline=humanline,
        hyperparameters={name: _cell(value) for name, value in hyperparameters(trainer).items()},
        run_urls={tracker: _without_key(tracker, url) for tracker, url in run_urls().items()},
        versions=versions(),
    )
    os.makedirs(directory, exist_ok=True)
    card.save(os.path.join(directory, "README.md"))


def hyperparameters(trainer: Any) -> dict[str, Any]:
    """The method's own settings, then those of the run, by the name of their flag, without settings that have no
    effect.
    """
    args = trainer.args
    names = list(trainer.card_fields) + (list(_HUMANLINE_FIELDS) if getattr(args, "humanline", False) else [])
    table = {name: getattr(args, name) for name in (*names, *_TRAINING_FIELDS) if hasattr(args, name)}
    table.pop("num_train_epochs" if args.max_steps > 0 else "max_steps", None)
    for precision in ("bf16", "fp16"):
        if not table.get(precision):
            table.pop(precision, None)
    table["processes"] = args.world_size
    quantization = getattr(trainer.model.config, "quantization_config", None)
    if quantization is not None:
        table["base_quantization"] = _quantization(quantization)
    table |= adapter_settings(trainer.model)
    return {name: getattr(value, "value", value) for name, value in table.items() if value is not None}


def adapter_settings(model: Any) -> dict[str, Any]:
    """Kind and sizes of a model's adapter, by the name of their flag; empty without an adapter."""
    for config in getattr(model, "peft_config", {}).values():
        sizes = {flag: getattr(config, name) for name, flag in _LORA_FIELDS.items() if getattr(config, name, None)}
        return {"adapter": _peft_type(model), **sizes}
    return {}


def base_model(model: Any) -> tuple[str | None, str]:
    """(Hub id or None, text for the card). A local path is shown without a link, and a new model is described."""
    path = get_config_model_id(model.config)
    if not path:
        return None, f"a `{model.config.model_type}` model that was built in memory"
    return (path, _link(path)) if is_hub_id(path) else (None, f"the local model {_link(path)}")


def merged_name(name: str) -> str:
    """Name of the merged model: a folder or a repository next to the adapter's."""
    return f"{name}-merged"


def is_hub_id(name: str) -> bool:
    """Whether a name is a Hub repository and not a local path."""
    return is_repo_id(name) and not os.path.exists(name)


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a repository id, `name` or `user/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _link(name: str, kind: str = "") -> str:
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{_last_part(name)}`"


def _last_part(name: str) -> str:
    """The last part of a path or URL. A URL may contain a password or, in its query, a signature."""
    inner = name.split("::")[0]  # fsspec's "file::archive"
    if "://" not in inner:
        return os.path.basename(os.path.abspath(inner))
    parts = urlsplit(inner)
    return os.path.basename(parts.path.rstrip("/")) or parts.hostname or parts.scheme


def _without_key(tracker: str, url: str) -> str:
    # An anonymous W&B run is opened by a key in the query; Trackio's query names the run.
    return url if tracker == "trackio" else urlsplit(url)._replace(query="", fragment="").geturl()


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _peft_type(model: Any) -> str | None:
    for config in getattr(model, "peft_config", {}).values():
        name = str(getattr(config.peft_type, "value", config.peft_type))
        return "LoRA" if name == "LORA" else name
    return None


def _quantization(config: Any) -> str:
    values = config if isinstance(config, dict) else config.to_dict()
    if values.get("load_in_4bit"):
        return f"4 bit ({values.get('bnb_4bit_quant_type')})"
    return "8 bit" if values.get("load_in_8bit") else str(getattr(values.get("quant_method"), "value", "yes"))


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def versions() -> dict[str, str]:
    """Installed versions of the packages that a run depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # e.g. this package on the import path, but not installed
            continue
    return found
