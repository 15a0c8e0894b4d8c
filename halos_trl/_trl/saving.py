"""Saving and loading of the policy without the reference adapter, and of additional checkpoint files."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from accelerate.utils import is_peft_model
from safetensors import SafetensorError

from .adapters import REFERENCE_ADAPTER
from .overridden import overridden


class SavesPolicy:
    """Saves and loads the policy. Use it in front of a TRL trainer class in the list of bases."""

    model: Any
    accelerator: Any
    state: Any
    is_fsdp_enabled: bool
    _get_output_dir: Any

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        policy = self.accelerator.unwrap_model(self.model if model is None else model)
        dtypes = {name: parameter.dtype for name, parameter in policy.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        # PEFT loads adapters in float32, but the adapter of a quantized model was bfloat16 before the interruption.
        for name, parameter in policy.named_parameters():
            dtype = dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if is_peft_model(self.model) and REFERENCE_ADAPTER in self.model.peft_config:
            kept = [name for name in self.model.peft_config if name != REFERENCE_ADAPTER]
            save = functools.partial(self.model.save_pretrained, selected_adapters=kept)
            with overridden(self.model, save_pretrained=save):
                super()._save(output_dir, state_dict)  # type: ignore[misc]
        else:
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def restore_best(self, folder: str) -> None:
        """Hook: restore from the best checkpoint the state that `before_checkpoint` wrote along with its policy."""

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self.restore_best(self.state.best_model_checkpoint)

    def before_checkpoint(self, checkpoint_dir: str) -> None:
        """Hook: write additional files into a checkpoint."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Runs first, so that every checkpoint with a trainer state also has this hook's files.
        folder = f"checkpoint-{self.state.global_step}"
        path = os.path.join(self._get_output_dir(trial=trial), folder)
        with _explained(path):
            self.before_checkpoint(path)
            # It removes files of an older checkpoint, of every process, which must not be those of this one.
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        except AssertionError as error:
            if not self.is_fsdp_enabled:
                raise
            raise ValueError(
                f"The optimizer of {checkpoint} cannot be restored under FSDP, because torch does not support "
                f"optimizers without state, e.g. `optim='sgd'` without momentum ({error}). Pass the folder as `model` "
                "to start a new run from its weights, with an optimizer that has state, e.g. `optim='adamw_torch'`."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        # The trainer state is written next and marks the checkpoint as complete, so wait for all processes.
        self.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _explained(folder: str) -> Iterator[None]:
    """Add to the error of a failed write which checkpoint it was and how to continue the run."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        of_torch_save = ("PytorchStreamWriter", "inline_container", "unexpected pos")
        if type(error) is RuntimeError and not any(sign in str(error) for sign in of_torch_save):
            raise
        raise OSError(
            f"{folder} could not be written ({error}). It is incomplete and will not be used for resuming. Free disk "
            "space, or keep fewer checkpoints with `save_total_limit`; `resume_from_checkpoint=True` then resumes "
            "from the last complete one."
        ) from error
