"""PPO's rollout statistics, computed before the first update on a batch: old log-probs, advantages and
critic targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..advantages import gae


class Rollout(NamedTuple):
    """Rollout statistics of a micro-batch. All tables are (B, T), without gradient, and 0 outside the completions.

    `old_policy` holds the log-probs in the denominator of the ratio, in nats. `advantages` have no unit; the rest is
    in units of the score.
    """

    old_policy: Tensor
    advantages: Tensor
    returns: Tensor
    discounted_future_rewards: Tensor


def last_token_rewards(scores_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Each score placed on the last completion token of its row, (B, T); all zeros in a row without
    completion tokens.
    """
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B1 = (positions_T * mask_BT).amax(-1, keepdim=True)
    is_last_BT = (positions_T == last_B1) & mask_BT
    return scores_B.unsqueeze(-1) * is_last_BT


@torch.no_grad()
def roll_out(
    old_policy: Sequence[Tensor],
    values: Sequence[Tensor],
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    gamma: float,
    lam: float,
    reduce_sum: Callable[[Tensor], Tensor],
) -> list[Rollout]:
    """Statistics of the micro-batches of an optimizer step on one process.

    `old_policy`, `values` and `masks` are tables (B, T), `scores` vectors (B,), one for each micro-batch; `reduce_sum`
    sums a tensor over processes. Equal to `halos_trl.advantages.gae` on all rows of the step at once: advantages are
    whitened over the tokens of the whole step, so they do not depend on how it was split.
    """
    estimates = [
        gae(values_BT, last_token_rewards(scores_B, mask_BT), mask_BT.float(), gamma=gamma, lam=lam)
        for values_BT, scores_B, mask_BT in zip(values, scores, masks, strict=True)
    ]
    # `gae` whitens over a single table; the unwhitened advantages are the returns minus the values.
    raw = [
        (estimate.returns - values_BT).where(mask_BT, 0.0)
        for estimate, values_BT, mask_BT in zip(estimates, values, masks, strict=True)
    ]
    count = torch.stack([mask_BT.sum() for mask_BT in masks]).sum().to(raw[0].dtype)
    total, count = reduce_sum(torch.stack([torch.stack([x.sum() for x in raw]).sum(), count]))
    mean = total / count.clamp(min=1)
    # A second pass around the mean, since the difference of two large sums would lose a small variance.
    squares = [(x - mean).square().where(mask_BT, 0.0).sum() for x, mask_BT in zip(raw, masks, strict=True)]
    variance = reduce_sum(torch.stack(squares).sum()) / count.clamp(min=1)
    if not variance.isfinite():
        raise ValueError(
            f"The variance of the advantages over the step is {variance.item()}: scores or values are too large for "
            f"{variance.dtype}. The weights were not updated. Rescale the scores, e.g. to a few units."
        )
    scale = (variance + 1e-8).rsqrt()
    return [
        Rollout(
            old_BT.detach(),
            ((raw_BT - mean) * scale).where(mask_BT, 0.0),
            estimate.returns,
            estimate.discounted_future_rewards,
        )
        for old_BT, raw_BT, mask_BT, estimate in zip(old_policy, raw, masks, estimates, strict=True)
    ]


# -- checkpoints ---------------------------------------------------------------------------------------------------


class SavedRollout(NamedTuple):
    """The current rollout, with a digest of each micro-batch and the settings it was computed with."""

    rollouts: Sequence[Rollout]
    batches: Sequence[str]
    settings: dict[str, Any]


def digest(batch: dict[str, Any]) -> str:
    """Identifies a micro-batch by the inputs of a rollout: its tokens, their masks and the scores."""
    sha = hashlib.sha256()
    for name in ("input_ids", "attention_mask", "completion_mask", "score"):
        table = batch[name].cpu().contiguous()
        sha.update(f"{name} {table.dtype} {tuple(table.shape)}".encode())
        sha.update(table.numpy().tobytes())
    return sha.hexdigest()


def rollout_file(folder: str, process: int) -> Path:
    """The file with a process's rollout in a checkpoint that was written between two epochs over the same batch."""
    return Path(folder) / f"ppo_rollout_{process}.safetensors"


def save_rollouts(saved: SavedRollout, path: Path) -> None:
    """Write the current rollout atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{i}.{name}": table.cpu().contiguous()
        for i, rollout in enumerate(saved.rollouts)
        for name, table in rollout._asdict().items()
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"batches": json.dumps(saved.batches), "settings": json.dumps(saved.settings)})
    partial.replace(path)


def load_rollouts(path: Path, settings: dict[str, Any], device: torch.device) -> SavedRollout:
    """Load the current rollout. Raises ValueError if the file is missing, damaged, or was written with
    other settings.
    """
    consequence = (
        "The checkpoint was written between two epochs over the same batch. Its advantages cannot be recomputed, "
        "because the policy has changed since. Resume from another checkpoint, with the number of processes and the "
        "`ppo_epochs` that it was written with."
    )
    if not path.is_file():
        raise ValueError(f"{path} is missing. {consequence}")
    names = Rollout.__annotations__
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            noted = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        rollouts = [
            Rollout(*(tensors[f"{i}.{name}"].to(device) for name in names)) for i in range(len(noted["batches"]))
        ]
        saved = SavedRollout(rollouts, noted["batches"], noted["settings"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). {consequence}") from error
    if saved.settings != settings:
        raise ValueError(
            f"{path} contains advantages that were computed with {saved.settings}, but this run has {settings}. "
            "Resume with the settings of the checkpoint, or from a checkpoint between two batches."
        )
    return saved


__all__ = [
    "Rollout",
    "SavedRollout",
    "digest",
    "last_token_rewards",
    "load_rollouts",
    "roll_out",
    "rollout_file",
    "save_rollouts",
]
