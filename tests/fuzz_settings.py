"""Changes of the fuzz suite to settings."""

from __future__ import annotations

import math
import random
from typing import Any

from fuzz_cases import Case, Change
from fuzz_rows import shown

import halos_trl

OWN = {
    "beta": ("DPO", "CDPO", "SimPO", "SLiC", "KTO", "GRPO"),
    "label_smoothing": ("DPO",),
    "ld_alpha": ("DPO",),
    "loss_weights": ("DPO",),
    "f_alpha_divergence_coef": ("DPO",),
    "discopop_tau": ("DPO",),
    "epsilon": ("CDPO", "GRPO"),
    "epsilon_high": ("GRPO",),
    "tau": ("IPO",),
    "gamma_beta_ratio": ("SimPO",),
    "lambda_coef": ("SLiC",),
    "desirable_weight": ("KTO",),
    "undesirable_weight": ("KTO",),
    "cliprange": ("PPO",),
    "critic_coef": ("PPO",),
    "kl_coef": ("PPO",),
    "gamma": ("PPO",),
    "lam": ("PPO",),
    "ppo_epochs": ("PPO",),
    "v_head_max_grad_norm": ("PPO",),
    "reward_batch_size": ("PPO",),
    "center_rewards_coefficient": ("BradleyTerry",),
    "log_epsilon_p": (),
    "log_epsilon_r": (),
    "humanline_sync_steps": (),
    "ref_model_mixup_alpha": (),
    "ref_model_sync_steps": (),
    "max_length": (),
    "precompute_ref_batch_size": (),
    "router_aux_loss_coef": (),
    "pad_to_multiple_of": (),
    "dataset_num_proc": (),
}
"""Numeric settings of methods, and the trainers that read them (empty: all)."""

SWITCHED_ON_BY = {
    "log_epsilon_p": "humanline",
    "log_epsilon_r": "humanline",
    "humanline_sync_steps": "humanline",
    "ref_model_mixup_alpha": "sync_ref_model",
    "ref_model_sync_steps": "sync_ref_model",
    "precompute_ref_batch_size": "precompute_ref_log_probs",
}

HOSTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "warmup_steps",
    "logging_steps",
    "eval_steps",
    "eval_delay",
    "eval_accumulation_steps",
    "save_steps",
    "save_total_limit",
    "seed",
    "data_seed",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "torch_empty_cache_steps",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "ddp_timeout",
)
"""Numeric settings of transformers."""

MAY_STAND_STILL = {
    *OWN,
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "max_grad_norm",
    "warmup_steps",
    "weight_decay",
    "adam_epsilon",
}
"""With some values of these, a run has nothing to learn or no step."""

NUMBERS = ("abc", "3", None, [1], True, math.nan, math.inf, -math.inf, -1, 0, 0.5, 2.5, -0.5, 10**9, 1e-300, {}, 1j)
NO_NUMBERS = ("abc", [1], True, {}, 1j)
NOT_HUGE = {"dataloader_num_workers": 1, "dataset_num_proc": 1, "dataloader_prefetch_factor": 2}
"""In place of 10**9, which would start as many processes."""
NOT_HUGE["pad_to_multiple_of"] = 512  # which would fill the memory with padding

SWITCHES = (
    "humanline",
    "sync_ref_model",
    "precompute_ref_log_probs",
    "use_weighting",
    "scale_rewards",
    "sequence_level",
    "disable_dropout",
    "padding_free",
    "activation_offloading",
    "gradient_checkpointing",
    "dataloader_drop_last",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "remove_unused_columns",
    "bf16",
    "logging_first_step",
    "include_num_input_tokens_seen",
    "eval_on_start",
    "batch_eval_metrics",
    "full_determinism",
    "auto_find_batch_size",
    "load_best_model_at_end",
    "average_tokens_across_devices",
    "trust_remote_code",
)
OWN_SWITCHES = SWITCHES[:9]
NO_SWITCHES = ("false", "no", "yes", "True", 2, [], {}, 0.5)

CHOICES = {
    "loss_type": ("bogus", [], ["sigmoid", "sigmoid"], ["hinge"], "ipo", 5, [5], None, "", "apo_zero_unpaired"),
    "f_divergence_type": ("bogus", "js_divergence", None, 5),
    "truncation_mode": ("bogus", "keep_end", None, 5),
    "train_sampling_strategy": ("bogus", "sequential", "group_by_length", None, 5, True),
    "lr_scheduler_type": ("bogus", "cosine", None, 5),
    "lr_scheduler_kwargs": ("bogus", {"bogus": 1}, 5, []),
    "optim": ("bogus", "adamw_torch", None, 5),
    "optim_args": ("bogus", 5, {}),
    "eval_strategy": ("bogus", "steps", None, 5, True),
    "logging_strategy": ("bogus", "epoch", None, 5),
    "save_strategy": ("bogus", "best", None, 5),
    "report_to": ("bogus", [], None, 5),
    "model_init_kwargs": ({"dtype": "bogus"}, {"bogus": 1}, "bogus", 5, []),
    "gradient_checkpointing_kwargs": ({"use_reentrant": "bogus"}, "bogus", 5, []),
    "accelerator_config": ({"split_batches": True}, {"bogus": 1}, "bogus", 5),
    "label_names": (["label"], [], "bogus", 5, [5]),
    "include_for_metrics": (["loss"], ["bogus"], 5, "bogus"),
    "metric_for_best_model": ("bogus", 5, []),
    "output_dir": (5, None, [], ""),
    "run_name": (5, [], ""),
    "pad_token": ("bogus", 5, "", "<|end|>", []),
    "eos_token": ("bogus", 5, "", "<|pad|>", []),
    "chat_template_path": ("bogus", 5, ""),
    "dataloader_multiprocessing_context": ("bogus", 5),
    "bogus": (1,),
}
READ = ("loss_type", "f_divergence_type", "truncation_mode", "train_sampling_strategy", "optim", "lr_scheduler_type")
"""Choices that a run needs."""


def settings(rng: random.Random, case: Case) -> Change:
    """One field with a value of another type, out of range, or not among the choices."""
    known = set(config_class(case).__dataclass_fields__)
    pool = rng.choice(["own", "own", "host", "host", "switch", "choice"])
    if pool == "own":
        names = [
            name for name, trainers in OWN.items() if name in known and (not trainers or case.trainer in trainers)
        ]
        return _number(rng, case, rng.choice(names))
    if pool == "host":
        return _number(rng, case, rng.choice([name for name in HOSTS if name in known]))
    if pool == "switch":
        return _switch(rng, rng.choice([name for name in SWITCHES if name in known]))
    name = rng.choice([name for name in CHOICES if name in known or name == "bogus"])
    value = rng.choice(CHOICES[name])
    return _change(name, value, learns=name != "lr_scheduler_kwargs", trains=value != "bogus" or name not in READ)


def config_class(case: Case) -> type:
    return getattr(halos_trl, f"{case.trainer}Config")


def _number(rng: random.Random, case: Case, name: str) -> Change:
    value = rng.choice(NUMBERS)
    if value == 10**9:
        value = NOT_HUGE.get(name, value)
    switch = SWITCHED_ON_BY.get(name)
    known = config_class(case).__dataclass_fields__
    also = {switch: True} if switch in known else {}
    meaningless = name in OWN and (value in NO_NUMBERS or value != value)
    return _change(name, value, also, learns=name not in MAY_STAND_STILL, trains=not meaningless)


def _switch(rng: random.Random, name: str) -> Change:
    value = rng.choice((*NO_SWITCHES, None, True, False))
    may_train = name not in OWN_SWITCHES or value in (None, True, False)
    # Under the clamp a method without reference may have nothing to learn from an untrained model.
    return _change(name, value, learns=name != "humanline", trains=may_train)


def _change(name: str, value: Any, also: dict[str, Any] | None = None, **promises: bool) -> Change:
    made = {**(also or {}), name: value}

    def apply(case: Case) -> None:
        case.settings |= made
        case.evaluates = case.evaluates or name.startswith(("eval", "per_device_eval"))

    text = ", ".join(f"{key}={shown(each)}" for key, each in made.items())
    names = tuple(rf"(?<![\w]){key}(?![\w])" for key in made) + RELATED.get(name, ())
    return Change(text, apply, names, hosts_speak=True, **promises)


RELATED = {
    "per_device_train_batch_size": (r"\bbatch.size",),
    "eval_strategy": ("eval_steps", "eval_dataset", "IntervalStrategy"),
    "load_best_model_at_end": ("eval_strategy", "save_strategy"),
    "save_strategy": ("metric_for_best_model", "SaveStrategy"),
    "learning_rate": ("learning rate",),
    "weight_decay": ("weight_decay",),
    "lr_scheduler_kwargs": ("lr_scheduler_type",),
    "optim": ("OptimizerNames",),
    "accelerator_config": ("AcceleratorConfig",),
    "lr_scheduler_type": ("SchedulerType",),
    "logging_strategy": ("IntervalStrategy",),
    "dataloader_persistent_workers": ("dataloader_num_workers", "persistent_workers"),
    "dataloader_prefetch_factor": ("dataloader_num_workers", "prefetch_factor"),
    "dataloader_num_workers": ("num_workers",),
    "max_length": (r"prompt.*max_length",),
}
"""What else a message about a field may name."""
