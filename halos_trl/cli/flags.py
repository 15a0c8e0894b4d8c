"""The flags of a training script: script, training, model and mixture arguments, from the command line and YAML."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
from accelerate import PartialState
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from .. import toy
from ..data.feedback.plan import Purpose
from ..data.feedback.prompts import Duplicates
from ..trainers.checkpoints import last_complete_checkpoint, problem_of
from .arguments import refuse_unknown, split_off_config
from .data import check_splits, dataset_names, is_path, load_data
from .generation import check_generation, toy_generation

_USAGE = "%(prog)s [--config FILE.yaml] [--flag [value ...]] ..."
_DESCRIPTION = """\
The flags of TRL's own script for this method, and a few more. `--config FILE.yaml` sets flags by name; flags on the
command line take precedence. `--model_name_or_path` and `--dataset_name` are Hub ids or local paths. Without both, the
script runs on the embedded task, which needs no network and has its own defaults for some settings.
"""

# Settings for the small embedded model; flags take precedence.
TOY_DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/toy",
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 20,
    "max_length": 64,
}


# Purpose of the rows from a file in one of HALOs' formats, by the type of feedback that a method uses.
_PURPOSES: dict[str, Purpose] = {"unpaired": "unpaired", "paired": "paired", "scored": "group"}


@dataclass
class HalosScriptArguments(ScriptArguments):
    """TRL's script arguments, with additions.

    Parameters:
        dataset_name (`str`, *optional*):
            Hub id, local file (JSON, JSONL, Parquet, CSV, Arrow), folder of such files, or folder written by
            `save_to_disk`. JSON files in one of HALOs' formats are recognized by their content.
        dataset_duplicates (`str`, *optional*, defaults to `"error"`):
            What to do with exact duplicates in such a file: "error", "drop" or "keep".
        merge_adapter (`bool`, *optional*, defaults to `False`):
            After training an adapter, also save the merged model to `<output_dir>-merged` (and push it to
            `<hub_model_id>-merged` with `--push_to_hub`).
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": (
                "Hub id, local file (JSON, JSONL, Parquet, CSV, Arrow; HALOs' feedback files), folder of such files "
                "with the split in each name, or folder written by `save_to_disk`. Cannot be combined with "
                "`datasets`."
            )
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of the Hub dataset, if it has several. Cannot be combined with `datasets`."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on; only read if `eval_strategy` is not `no`."}
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Stream the dataset `dataset_name`; requires `max_steps`. With `datasets`, use `streaming`."
        },
    )
    dataset_duplicates: Duplicates = field(
        default="error",
        metadata={"help": "What to do with exact duplicates in a HALOs file: `error`, `drop`, or `keep`."},
    )
    ignore_bias_buffers: bool = field(
        default=False,
        metadata={
            "help": (
                "Same as `--ddp_broadcast_buffers false`, for old models whose boolean mask buffers cannot be "
                "broadcast between processes."
            )
        },
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "With `use_peft`: also save the model with its adapter merged into the unquantized base, to "
            "`<output_dir>-merged`; with `push_to_hub`, also push it to `<hub_model_id>-merged`."
        },
    )

    generate_on_eval: int | None = field(
        default=None,
        metadata={
            "help": "At each evaluation, sample completions for this number of prompts of the evaluation split and "
            "score them with `reward_function` or `reward_model`. Logs `eval_generation_score`, and "
            "`eval_win_rate` against the samples from before training, which can be used for "
            "`metric_for_best_model`."
        },
    )
    generate_max_tokens: int = field(
        default=256, metadata={"help": "Maximum number of tokens of a completion for `generate_on_eval`."}
    )
    reward_function: str | None = field(
        default=None,
        metadata={
            "help": "Function that scores these completions: `module:function` or `file.py:function`, called with "
            "`prompt` and `completion`."
        },
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Reward model that scores these completions: Hub id or local path."}
    )

    samples_itself: ClassVar[bool] = False
    """Whether the method samples completions itself and scores them with `reward_function`."""

    # Set by `parse`, not by a flag.
    embedded: bool = field(default=False, init=False)
    used_datasets: list[str] = field(default_factory=list, init=False)


def parse(
    config_class: type,
    toy_kind: str,
    toy_defaults: dict[str, Any] | None = None,
    argv: list[str] | None = None,
    arguments: type[HalosScriptArguments] = HalosScriptArguments,
    toy_humanline: dict[str, Any] | None = None,
) -> tuple[Any, Any, ModelConfig, datasets.DatasetDict]:
    """Read the flags (and `--config FILE.yaml`), and load the data.

    If neither a model nor a dataset is given, the embedded task is used: its model, its feedback of `toy_kind`
    ("unpaired", "paired", "scored"), and `toy_defaults` for all settings that no flag or config file sets. With
    `--humanline`, `toy_humanline` takes precedence over these. `arguments` is the dataclass of the flags outside the
    training config; a script with its own flags passes a subclass of it.

    Returns (script arguments, training config, model config, dataset splits). Raises ValueError for invalid flags and
    paths, before any model is loaded.
    """
    dataclass_types: Any = (arguments, config_class, ModelConfig, DatasetMixtureConfig)
    parser: Any = TrlParser(dataclass_types, usage=_USAGE, description=_DESCRIPTION)
    argv, config = split_off_config(sys.argv[1:] if argv is None else argv)
    given = refuse_unknown(parser, argv, config)
    embedded = _names_nothing(given, config)
    if embedded:
        known = {f.name for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type)}
        humanline = given.get("humanline") or config.get("humanline")
        defaults = TOY_DEFAULTS | (toy_defaults or {}) | ((toy_humanline or {}) if humanline else {})
        defaults |= toy_generation(given, config)
        parser.set_defaults_with_config(**{name: value for name, value in defaults.items() if name in known})
    script_args, training_args, model_args, mixture = parser.parse_args_and_config(args=argv)
    script_args.embedded = embedded
    _refuse_what_cannot_work(script_args, model_args, mixture)
    check_generation(script_args, training_args)
    training_args.resume_from_checkpoint = _checkpoint(training_args)
    if script_args.ignore_bias_buffers:
        training_args.ddp_broadcast_buffers = False
    if embedded:
        with PartialState().main_process_first():
            model_args.model_name_or_path = toy.load_model_path()
            data = toy.load_feedback_data(toy_kind)  # type: ignore[arg-type]
    else:
        _check_model_path(model_args)
        data = load_data(script_args, mixture, _PURPOSES[toy_kind], evaluates=training_args.eval_strategy != "no")
        script_args.used_datasets = dataset_names(script_args, mixture)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    check_splits(script_args, training_args, data)
    return script_args, training_args, model_args, data


def _names_nothing(given: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether neither a model nor a dataset is given. Raises ValueError if only one of them is."""
    has_model, *has_data = (
        bool(given[name] or config.get(name)) for name in ("model_name_or_path", "dataset_name", "datasets")
    )
    refuse_half_named(has_model, any(has_data))
    return not has_model


def refuse_half_named(has_model: bool, has_data: bool) -> None:
    """Raise ValueError for a model without data, or data without a model."""
    if has_model != has_data:
        named, missing = ("a model", "dataset_name") if has_model else ("a dataset", "model_name_or_path")
        raise ValueError(
            f"The flags name {named} but not `--{missing}`. Pass both (Hub ids or local paths), or neither to run on "
            "the embedded task."
        )


def _refuse_what_cannot_work(
    script_args: HalosScriptArguments, model_args: ModelConfig, mixture: DatasetMixtureConfig
) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    lora = [
        name
        for name, default in defaults.items()
        if name.startswith(("lora_", "use_rslora", "use_dora")) and getattr(model_args, name) != default
    ]
    four_bit = [name for name, default in defaults.items() if "bnb" in name and getattr(model_args, name) != default]
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    no_peft = not model_args.use_peft
    refusals = (
        (
            script_args.merge_adapter and no_peft,
            "`--merge_adapter` was set without `--use_peft`, so there is no adapter to merge: the whole model is "
            "trained and saved. Add `--use_peft`, or leave `--merge_adapter` out.",
        ),
        (
            quantized and no_peft,
            "`--load_in_4bit` and `--load_in_8bit` need `--use_peft`: quantized weights cannot be trained, only an "
            "adapter on them. Add `--use_peft`, or leave the quantization out.",
        ),
        (
            lora and no_peft,
            f"{', '.join(f'`--{name}`' for name in lora)} would have no effect without `--use_peft`: the whole model "
            "is trained. Add `--use_peft`, or leave the LoRA settings out.",
        ),
        (
            four_bit and not model_args.load_in_4bit,
            f"{', '.join(f'`--{name}`' for name in four_bit)} would have no effect without `--load_in_4bit`. Add it, "
            "or leave the settings out.",
        ),
        (
            mixture.datasets and script_args.dataset_name,
            "Both `dataset_name` and a `datasets` mixture are given. Leave one of them out.",
        ),
        (
            mixture.datasets and (script_args.dataset_streaming or script_args.dataset_config),
            "`dataset_streaming` and `dataset_config` apply to `dataset_name` and have no effect on a `datasets` "
            "mixture. Use `streaming`, and `name` inside the mixture.",
        ),
        (
            not mixture.datasets and (mixture.streaming or mixture.test_split_size is not None),
            "`streaming` and `test_split_size` apply to a `datasets` mixture, but none is given. To stream "
            "`dataset_name`, use `--dataset_streaming`; to split it, list it under `datasets` in a `--config` file.",
        ),
    )
    for applies, message in refusals:
        if applies:
            raise ValueError(message)


def _checkpoint(training_args: Any) -> str | None:
    """The checkpoint to resume from; for `true`, the last one in the output directory."""
    wanted = str(training_args.resume_from_checkpoint or "false")
    if wanted.lower() in ("false", "none"):
        return None
    output_dir = training_args.output_dir
    if wanted.lower() == "true":
        last = last_complete_checkpoint(output_dir)
        if last is None:
            raise ValueError(
                f"`--resume_from_checkpoint true` was set, but `{output_dir}` has no complete checkpoint. Check "
                "`--output_dir`, or leave the flag out to start from the beginning."
            )
        return last
    # The folder of a finished run has a trainer state, too, but cannot be resumed from.
    problem = problem_of(Path(wanted)) if os.path.isdir(wanted) else "there is no such folder"
    if problem:
        raise ValueError(
            f"`--resume_from_checkpoint {wanted}` cannot be resumed from: {problem}. Pass a `checkpoint-<step>` "
            "folder that was not written with `save_only_model`, or `true` for the last one in the output directory."
        )
    return wanted


def _check_model_path(model_args: ModelConfig) -> None:
    name = str(model_args.model_name_or_path)
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            adapter = os.path.isfile(os.path.join(name, "adapter_config.json"))
            raise ValueError(
                f"`--model_name_or_path {name}` is a folder without `config.json`. "
                + (
                    "It contains an adapter: merge it into its base model first (`--merge_adapter` does so after "
                    "training), or resume its training with `--resume_from_checkpoint`."
                    if adapter
                    else "Pass the folder that `save_pretrained` wrote."
                )
            )
    elif os.path.exists(name) or is_path(name):
        raise ValueError(
            f"`--model_name_or_path {name}` is a local path, but there is no such folder. Pass the folder that "
            "`save_pretrained` wrote, or a Hub id."
        )
