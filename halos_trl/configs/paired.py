"""The config classes of the methods on pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import ClassVar

import trl

from .batch_order import BatchOrderConfig
from .checks import check_sync, defaults_of, is_number, is_share, require, require_not_negative, require_positive
from .shared import (
    REFERENCE_FIELDS,
    SYNC_HELP,
    CompletionConfig,
    ForwardConfig,
    HumanlineConfig,
    ReferenceConfig,
    RowsConfig,
)

_TRL_FIELDS = {f.name: f for f in fields(trl.DPOConfig)}


@dataclass
class DPOConfig(
    BatchOrderConfig, ForwardConfig, HumanlineConfig, ReferenceConfig, CompletionConfig, RowsConfig, trl.DPOConfig
):
    """`trl.DPOConfig` plus humanline; all other fields have the same meaning as in TRL."""

    sync_ref_model: bool = field(default=False, metadata={"help": SYNC_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")
        check_sync(self)
        self._check_trl_losses()
        if self.humanline and self.use_weighting:
            raise ValueError(
                "`humanline=True` and `use_weighting=True` cannot be combined: WPO weights pairs by the policy's "
                "own probabilities, which the clamp replaces. Disable one of them."
            )

    def _check_trl_losses(self) -> None:
        weights = [] if self.loss_weights is None else self.loss_weights
        require(
            all(map(is_number, weights)), "loss_weights", weights, "each loss type is multiplied by its weight.",
            "Use one finite number for each loss type.",
        )  # fmt: skip
        require(len(self.loss_type) > 0, "loss_type", self.loss_type, "no loss is selected.", "Pass one or more.")
        for name, values in (("loss_type", self.loss_type), ("f_divergence_type", [self.f_divergence_type])):
            # Newer releases of TRL may support more of them, and list those here.
            listed = _TRL_FIELDS[name].metadata["help"]
            for value in values:
                require(
                    re.search(rf"[`']{re.escape(str(value))}[`']", listed) is not None, name, value,
                    "the installed TRL does not have it.", f"TRL says: {listed}",
                )  # fmt: skip
        require(
            self.ld_alpha is None or is_share(self.ld_alpha), "ld_alpha", self.ld_alpha,
            "it is the weight of the tokens beyond the length of the shorter completion.", "Use a number in [0, 1].",
        )  # fmt: skip
        require(
            is_share(self.label_smoothing), "label_smoothing", self.label_smoothing,
            "it is the fraction of flipped labels.", "Use a number in [0, 1].",
        )  # fmt: skip
        require(
            "robust" not in self.loss_type or self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing,
            "the `robust` loss divides by 1 - 2 * `label_smoothing`.", "Use a number in [0, 0.5).",
        )  # fmt: skip


DPO_LOSS_FIELDS = (
    "loss_type",
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "use_weighting",
    "discopop_tau",
)


@dataclass
class _PairedConfig(DPOConfig):
    """Base of the paired methods other than DPO. TRL's DPO-only options are refused instead of ignored."""

    _refused: ClassVar[tuple[str, ...]] = DPO_LOSS_FIELDS

    def __post_init__(self) -> None:
        # Checked before TRL normalizes any value.
        defaults = defaults_of(type(self))
        for name in self._refused:
            require(
                getattr(self, name) == defaults[name], name, getattr(self, name),
                f"{type(self).__name__.removesuffix('Config')} has no such option.",
                "Leave it out, or use `DPOConfig` and `DPOTrainer`, which have it.",
            )  # fmt: skip
        super().__post_init__()


@dataclass
class CDPOConfig(_PairedConfig):
    """Conservative DPO.

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`):
            Inverse temperature, per nat.
        epsilon (`float`, *optional*, defaults to `0.2`):
            Assumed fraction of flipped labels, in [0, 0.5).
    """

    epsilon: float = field(default=0.2, metadata={"help": "Assumed fraction of flipped labels, in [0, 0.5)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            is_share(self.epsilon) and self.epsilon < 0.5, "epsilon", self.epsilon,
            "it is the fraction of flipped labels.", "Use a number in [0, 0.5).",
        )  # fmt: skip


@dataclass
class IPOConfig(_PairedConfig):
    """Identity preference optimization.

    Parameters:
        tau (`float`, *optional*, defaults to `0.1`):
            Strength of the regularization: the target of the per-token margin is 1 / (2 tau) nats. TRL calls it
            `beta`.
    """

    _refused = (*DPO_LOSS_FIELDS, "beta")

    tau: float = field(default=0.1, metadata={"help": "The target of the per-token margin is 1 / (2 tau) nats."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "tau")


@dataclass
class SimPOConfig(_PairedConfig):
    """SimPO, which needs no reference.

    Parameters:
        beta (`float`, *optional*, defaults to `10.0`):
            Inverse temperature, per nat per token.
        gamma_beta_ratio (`float`, *optional*, defaults to `0.3`):
            Margin between the mean log-probs, in nats per token, at least 0.
    """

    _refused = (*DPO_LOSS_FIELDS, *REFERENCE_FIELDS, "humanline_sync_steps")

    beta: float = field(default=10.0, metadata={"help": "Inverse temperature, per nat per token."})
    gamma_beta_ratio: float = field(
        default=0.3, metadata={"help": "Margin between the mean log-probs, in nats per token, at least 0."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "gamma_beta_ratio", "a negative margin rewards preferring the rejected completion.")


@dataclass
class SLiCConfig(_PairedConfig):
    """SLiC, which needs no reference.

    Parameters:
        beta (`float`, *optional*, defaults to `1.0`):
            Margin between the summed log-probs, in nats.
        lambda_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the chosen completion's negative log-likelihood, at least 0.
    """

    _refused = (*DPO_LOSS_FIELDS, *REFERENCE_FIELDS, "humanline_sync_steps")

    beta: float = field(default=1.0, metadata={"help": "Margin between the summed log-probs, in nats."})
    lambda_coef: float = field(
        default=0.1, metadata={"help": "Weight of the chosen completion's negative log-likelihood, at least 0."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "lambda_coef", "a negative weight makes the chosen completion less likely.")
