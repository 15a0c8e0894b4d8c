"""`halos-trl train METHOD`: equivalent to `examples/train_<method>.py`, for every method."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from ..trainers.reward import load_reward_model
from .arguments import show
from .data import eval_split
from .flags import parse
from .methods import METHODS, make_trainer, method_of
from .training import run, save_and_push

HELP = f"""\
usage: halos-trl train METHOD [--config FILE.yaml] [--flag [value ...]] ...

Align a model on a dataset of feedback. METHOD is one of {", ".join(METHODS)} (a reward model).
`halos-trl train METHOD --help` lists the flags: those of TRL's own script for the method, and a few more.
On several processes: `accelerate launch -m halos_trl.cli.main train METHOD ...`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        print(HELP)
        return
    name, flags = method_of(words, "train", METHODS)
    method = METHODS[name]
    script_args, training_args, model_args, data = parse(
        method.config, method.feedback, dict(method.toy), flags, method.script, dict(method.toy_humanline)
    )
    if training_args.process_index == 0:
        show(set_by_the_user(script_args, training_args, model_args), f"train {name}")
    held_out = eval_split(script_args, training_args, data)
    if name == "reward":
        held_out = data.get(script_args.dataset_test_split)
    trainer = make_trainer(
        method,
        model_args.model_name_or_path,
        training_args,
        model_args,
        train_dataset=data[script_args.dataset_train_split],
        eval_dataset=held_out,
        **_reward_model(getattr(script_args, "reward_model_path", None)),
    )
    if name == "reward":
        _train_reward(trainer, script_args, held_out)
    else:
        run(trainer, script_args)


def _reward_model(path: str | None) -> dict[str, Any]:
    """PPO's reward model and its tokenizer."""
    if path is None:
        return {}
    return {"reward_model": load_reward_model(path), "reward_processing_class": AutoTokenizer.from_pretrained(path)}


def _train_reward(trainer: Any, script_args: Any, held_out: Any) -> None:
    before = trainer.evaluate()["eval_accuracy"] if held_out else None
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    save_and_push(trainer, script_args)
    if held_out:
        after = trainer.evaluate()["eval_accuracy"]
        trainer.accelerator.print(f"held-out pair accuracy: {before:.3f} -> {after:.3f}")


def set_by_the_user(*arguments: Any) -> dict[str, Any]:
    """The settings that differ from their defaults, without access tokens."""
    found: dict[str, Any] = {}
    for settings in arguments:
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name, None)
            default = field.default_factory() if callable(field.default_factory) else field.default
            plain = isinstance(value, str | int | float | bool | list | dict)
            if field.init and plain and value != default and not field.name.endswith("token"):
                found[field.name] = getattr(value, "value", value)
    return found


__all__ = ["main", "set_by_the_user"]
