"""Suggestions for unknown setting names: HALOs' names and similar spellings."""

import difflib
from collections.abc import Iterable

# Settings of HALOs (and of older transformers) whose name here does not resemble theirs; docs/from_halos.md has all.
_HALOS_NAMES = {
    "lr": "learning_rate",
    "n_epochs": "num_train_epochs",
    "n_examples": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "name_or_path": "model_name_or_path",
    "load_from": "model_name_or_path",
    "from_checkpoint": "resume_from_checkpoint",
    "train_datasets": "dataset_name",
    "exp_name": "output_dir",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "optimizer": "optim",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "eval_every": "eval_steps",
    "save_every": "save_steps",
    "do_first_eval": "eval_on_start",
    "policy_dtype": "dtype",
    "cache_reference_logprobs": "precompute_ref_log_probs",
    "sync_reference": "sync_ref_model",
    "target_modules": "lora_target_modules",
}


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error message about an unknown `name`: a suggestion from `known`, if there is one."""
    bare = name.lstrip("-+").split("=")[0].replace("-", "_").split(".")[-1]
    meant = _HALOS_NAMES.get(bare, bare)
    close = [other for other in known if other.lower() == meant.lower()]
    close = close or difflib.get_close_matches(meant.lower(), known, n=1)
    return (f" Did you mean `{prefix}{close[0]}`?" if close else "") + " `--help` lists all names."
