"""The run of a training script: train, save, push."""

from __future__ import annotations

from typing import Any

from .. import toy
from ..merge import merge_adapter
from ..pictures_callback import PicturesCallback
from .flags import HalosScriptArguments
from .generation import add_generation


def run(trainer: Any, script_args: HalosScriptArguments) -> None:
    """Train, save and push. On the embedded task, print the held-out accuracy before and after."""
    before = toy.accuracy(trainer.model, trainer.processing_class) if script_args.embedded else None
    add_generation(trainer, script_args)
    trainer.add_callback(PicturesCallback(trainer))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    save_and_push(trainer, script_args)
    if before is not None:
        after = toy.accuracy(trainer.model, trainer.processing_class)
        trainer.accelerator.print(f"held-out accuracy: {before:.3f} -> {after:.3f}")
    trainer.accelerator.end_training()


def save_and_push(trainer: Any, script_args: HalosScriptArguments) -> None:
    """Save the model and its card, push it and merge its adapter, as the flags specify."""
    args, say = trainer.args, trainer.accelerator.print
    trainer.save_state()
    if args.push_to_hub:
        # `push_to_hub` also saves; with `save_model`, everything would be pushed twice.
        trainer.push_to_hub(dataset_name=script_args.used_datasets)
        say(f"Model saved to {args.output_dir} and pushed to {trainer.hub_model_id}")
    else:
        trainer.save_model(args.output_dir)
        trainer.create_model_card(dataset_name=script_args.used_datasets)
        say(f"Model saved to {args.output_dir}")
    if script_args.merge_adapter and trainer.is_world_process_zero():
        merge_adapter(trainer, script_args.used_datasets)
