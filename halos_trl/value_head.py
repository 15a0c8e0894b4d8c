"""The value head, a small network on the policy's last hidden states, and its file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .sharded import assign_whole, shape_of

VALUE_HEAD_FILE = "value_head.safetensors"
"""File name of the value head, next to a saved policy and in every checkpoint."""

NAME = "v_head"
"""Its name as a submodule of the policy while training."""


class ValueHead(nn.Module):
    """Value of every position, computed from its hidden state: two hidden layers of the policy's width, in float32.

    As in HALOs: the hidden states are detached, so the critic's loss trains only the head, and the layers have HALOs'
    names (`summary.0`, `summary.3`, `summary.6`). HALOs' dropout between them never takes effect, since its PPO runs
    in evaluation mode, and is omitted here.
    """

    def __init__(self, hidden_size: int, seed: int = 0):
        super().__init__()
        # Initialized from the seed alone, so that the global random state, and thus the data order, is unaffected.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.summary = nn.Sequential(
                nn.Linear(hidden_size, hidden_size, dtype=torch.float32),
                nn.Identity(),
                nn.ReLU(),
                nn.Linear(hidden_size, hidden_size, dtype=torch.float32),
                nn.Identity(),
                nn.ReLU(),
                nn.Linear(hidden_size, 1, dtype=torch.float32),
            )

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Hidden states (B, T, H) of any float dtype -> values (B, T), in units of the score."""
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            dtype = next(self.parameters()).dtype  # an engine may have cast it
            values_BT = self.summary(hidden_BTH.detach().to(dtype)).squeeze(-1)
            return values_BT.to(torch.promote_types(dtype, torch.float32))


@contextlib.contextmanager
def taken_off(causal_lm: Any) -> Iterator[None]:
    """Context in which the policy has no value head, to save or load the plain model."""
    head = getattr(causal_lm, NAME)
    delattr(causal_lm, NAME)
    try:
        yield
    finally:
        causal_lm.add_module(NAME, head)


def save_value_head(tensors: dict[str, Tensor], folder: str) -> None:
    """Write a head's state to a folder, atomically."""
    path = Path(folder) / VALUE_HEAD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def load_value_head(head: nn.Module, folder: str) -> None:
    """Restore a head in place. Raises ValueError if the file is missing, damaged, or has another shape."""
    path = Path(folder) / VALUE_HEAD_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, so this checkpoint was not written by PPO. Training cannot resume exactly from it, "
            "because the critic would be reset. Resume from a checkpoint of PPOTrainer, or pass the folder as "
            "`model`."
        )
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is probably truncated. Use an earlier checkpoint."
        ) from error
    own = dict(head.named_parameters())
    expected = {name: tuple(shape_of(tensor)) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if expected != found:
        raise ValueError(
            f"{path} contains the value head of a different model: shapes {found}, expected {expected}. Use the "
            "model that it was trained with."
        )
    for name, tensor in own.items():
        assign_whole(tensor, stored[name])


__all__ = ["NAME", "VALUE_HEAD_FILE", "ValueHead", "load_value_head", "save_value_head", "taken_off"]
