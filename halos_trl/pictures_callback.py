"""The charts of a report in the trackers of a run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from transformers import TrainerCallback

from .report.panels import panels_of
from .report.pictures import as_array, draw
from .report.runs import read_run

logger = get_logger(__name__)


class PicturesCallback(TrainerCallback):
    """At the end of training, sends the charts of `halos-trl report` to W&B, TensorBoard and Trackio.

    They are named `report/<chart>`, and are sent by the main process to the trackers in `report_to`, with the last log
    line, before the trackers are closed. Without matplotlib, nothing is sent.

    Parameters:
        trainer: A trainer of this package.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        trackers = {"wandb", "tensorboard", "trackio"} & set(args.report_to or ())
        is_last = "train_runtime" in (logs or {})
        if not (is_last and trackers and state.is_world_process_zero and find_spec("matplotlib")):
            return
        try:
            run = read_run(args.output_dir)
        except ValueError as error:  # e.g. nothing was logged; the model is saved nevertheless
            logger.warning(f"No charts are sent to {sorted(trackers)}: {error}")
            return
        images = {f"report/{panel.key}": as_array(draw(panel, [run])) for panel in panels_of([run])}
        if "tensorboard" in trackers:
            _to_tensorboard(self.trainer, images, state.global_step)
        if "wandb" in trackers:
            _to_wandb(images)
        if "trackio" in trackers:
            _to_trackio(images)


def _to_tensorboard(trainer: Any, images: dict[str, np.ndarray], step: int) -> None:
    writers = (getattr(callback, "tb_writer", None) for callback in trainer.callback_handler.callbacks)
    for writer in filter(None, writers):
        for name, image in images.items():
            writer.add_image(name, image, step, dataformats="HWC")


def _to_wandb(images: dict[str, np.ndarray]) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log({name: wandb.Image(image) for name, image in images.items()})


def _to_trackio(images: dict[str, np.ndarray]) -> None:
    import trackio

    trackio.log({name: trackio.Image(image) for name, image in images.items()})


__all__ = ["PicturesCallback"]
