"""One dataclass per method: TRL's config plus that method's own fields, checked at construction."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar

import trl

from .humanline import Humanline


def _require(condition: bool, name: str, value: Any, why: str, remedy: str) -> None:
    if not condition:
        raise ValueError(f"`{name}={value!r}` cannot work: {why} {remedy}")


@dataclass
class HumanlineConfig:
    """The fields that every method shares (arXiv:2509.24207).

    Parameters:
        humanline (`bool`, *optional*, defaults to `False`):
            Clamp the per-token log-ratios and let the reference follow the policy one step behind.
        log_epsilon_p (`float`, *optional*, defaults to `-1.0`):
            Lower bound of a token's log-ratio, nats, at most 0.
        log_epsilon_r (`float`, *optional*, defaults to `1.5`):
            Upper bound of a token's log-ratio, nats, at least 0.
        humanline_sync_steps (`int`, *optional*, defaults to `1`):
            Copy the policy into the reference before every n-th optimizer step.
    """

    humanline: bool = field(
        default=False,
        metadata={"help": "Clamp per-token log-ratios and let the reference follow the policy (arXiv:2509.24207)."},
    )
    log_epsilon_p: float = field(
        default=-1.0, metadata={"help": "Humanline's lower bound of a token's log-ratio, nats, at most 0."}
    )
    log_epsilon_r: float = field(
        default=1.5, metadata={"help": "Humanline's upper bound of a token's log-ratio, nats, at least 0."}
    )
    humanline_sync_steps: int = field(
        default=1,
        metadata={"help": "Humanline copies the policy into the reference before every n-th optimizer step."},
    )

    @property
    def humanline_clamp(self) -> Humanline | None:
        """The clamp as the losses take it; `None` with humanline off."""
        return Humanline(self.log_epsilon_p, self.log_epsilon_r) if self.humanline else None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if not self.humanline:
            for f in fields(HumanlineConfig):
                value = getattr(self, f.name)
                _require(
                    value == f.default, f.name, value, "it has no effect while `humanline` is off.",
                    "Set `humanline=True` (`--humanline`), or leave it out.",
                )  # fmt: skip
            return
        self.humanline_clamp  # noqa: B018  (its constructor checks the bounds)
        _require_count(
            self, "humanline_sync_steps", "it counts optimizer steps; a reference that never moves is no humanline."
        )
        if getattr(self, "precompute_ref_log_probs", False):
            raise ValueError(
                "`humanline=True` and `precompute_ref_log_probs=True` exclude each other: humanline moves the "
                "reference every few steps, so log-probs computed before training are stale at once. Switch one off."
            )
        if getattr(self, "sync_ref_model", False):
            raise ValueError(
                "`humanline=True` and `sync_ref_model=True` both decide how the reference moves: humanline copies the "
                "policy before every `humanline_sync_steps`-th step, TR-DPO mixes it in afterwards. Switch one off."
            )


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(_is_number(value) and value > 0, name, value, "it scales the loss.", "Use a finite number above 0.")


def _require_not_negative(config: Any, name: str, why: str) -> None:
    value = getattr(config, name)
    _require(_is_number(value) and value >= 0, name, value, why, "Use a finite number, 0 or more.")


def _require_count(config: Any, name: str, why: str) -> None:
    value = getattr(config, name)
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    _require(whole and value >= 1, name, value, why, "Use a whole number, 1 or more.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _check_sync(config: Any) -> None:
    if getattr(config, "sync_ref_model", False):
        if config.precompute_ref_log_probs:
            raise ValueError(
                "`sync_ref_model=True` and `precompute_ref_log_probs=True` exclude each other: a reference that moves "
                "makes log-probs computed before training stale. Switch one of them off."
            )
        _require(
            0 < config.ref_model_mixup_alpha <= 1, "ref_model_mixup_alpha", config.ref_model_mixup_alpha,
            "it is the policy's share in the mixed reference.", "Use a number in (0, 1].",
        )  # fmt: skip
        _require_count(config, "ref_model_sync_steps", "it counts optimizer steps.")


def defaults_of(config_class: type) -> dict[str, Any]:
    """The default of each field of a config class that has one."""
    made = {f.name: f.default_factory() for f in fields(config_class) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(config_class) if f.default is not MISSING}


_SYNC_HELP = (
    "Let the reference follow the policy (TR-DPO, arXiv:2404.09656): every `ref_model_sync_steps` steps, mix the "
    "policy into it with weight `ref_model_mixup_alpha`. Works with adapters; not with `precompute_ref_log_probs`."
)


@dataclass
class KTOConfig(HumanlineConfig, trl.KTOConfig):
    """`trl.KTOConfig` plus humanline, with shuffling on.

    The KL partners are taken from inside the optimizer step, so any order of training is fine:
    `train_sampling_strategy` defaults to `"random"` (TRL: `"sequential"`), and `per_device_train_batch_size=1` works.
    Defaults are those of TRL and HALOs, which agree (`beta=0.1`, both weights 1).
    """

    sync_ref_model: bool = field(default=False, metadata={"help": _SYNC_HELP})
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Order of the training data; any order works, since KL partners come from inside the step.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "beta")
        _check_sync(self)
        for name in ("desirable_weight", "undesirable_weight"):
            _require_not_negative(self, name, "a negative weight turns the loss around.")
        _require(
            self.desirable_weight + self.undesirable_weight > 0, "desirable_weight", self.desirable_weight,
            "`undesirable_weight` is 0 too, so there is nothing to learn.", "Set one of them above 0.",
        )  # fmt: skip
        known = ("kto", "apo_zero_unpaired")
        _require(
            self.loss_type in known,
            "loss_type",
            self.loss_type,
            "KTOTrainer does not know it.",
            f"Use one of {known}.",
        )


@dataclass
class DPOConfig(HumanlineConfig, trl.DPOConfig):
    """`trl.DPOConfig` plus humanline; every field means what it means there."""

    sync_ref_model: bool = field(default=False, metadata={"help": _SYNC_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "beta")
        _check_sync(self)
        self._check_trl_losses()
        if self.humanline and self.use_weighting:
            raise ValueError(
                "`humanline=True` and `use_weighting=True` exclude each other: WPO weighs pairs by the policy's own "
                "probabilities, which the clamp replaces. Switch one of them off."
            )

    def _check_trl_losses(self) -> None:
        _require(len(self.loss_type) > 0, "loss_type", self.loss_type, "there is no loss.", "Name one or more.")
        for name, values in (("loss_type", self.loss_type), ("f_divergence_type", [self.f_divergence_type])):
            # Newer releases of TRL may know more of them, and list those here.
            listed = trl.DPOConfig.__dataclass_fields__[name].metadata["help"]
            for value in values:
                _require(
                    re.search(rf"[`']{re.escape(str(value))}[`']", listed) is not None, name, value,
                    "the installed TRL does not know it.", f"TRL says: {listed}",
                )  # fmt: skip
        _require(
            self.ld_alpha is None or _is_share(self.ld_alpha), "ld_alpha", self.ld_alpha,
            "it weighs the tokens beyond the shorter completion.", "Use a number in [0, 1].",
        )  # fmt: skip
        _require(
            _is_share(self.label_smoothing), "label_smoothing", self.label_smoothing,
            "it is the share of flipped labels.", "Use a number in [0, 1].",
        )  # fmt: skip
        _require(
            "robust" not in self.loss_type or self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing,
            "the `robust` loss divides by 1 - 2 * it.", "Use a number in [0, 0.5).",
        )  # fmt: skip


REFERENCE_FIELDS = (
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)
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
    """Base of the paired methods that are not DPO: TRL's DPO-only options are refused instead of ignored."""

    _refused: ClassVar[tuple[str, ...]] = DPO_LOSS_FIELDS

    def __post_init__(self) -> None:
        # Before TRL normalizes any value.
        defaults = defaults_of(type(self))
        for name in self._refused:
            _require(
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
            Assumed share of flipped labels, in [0, 0.5).
    """

    epsilon: float = field(default=0.2, metadata={"help": "Assumed share of flipped labels, in [0, 0.5)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            0 <= self.epsilon < 0.5, "epsilon", self.epsilon, "it is the share of flipped labels.",
            "Use a number in [0, 0.5); at 0.5 the labels would say nothing.",
        )  # fmt: skip


@dataclass
class IPOConfig(_PairedConfig):
    """Identity preference optimization.

    Parameters:
        tau (`float`, *optional*, defaults to `0.1`):
            Strength of the regularization; the per-token margin is drawn to 1 / (2 tau) nats. TRL calls it `beta`.
    """

    _refused = (*DPO_LOSS_FIELDS, "beta")

    tau: float = field(default=0.1, metadata={"help": "The per-token margin is drawn to 1 / (2 tau) nats."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau")


@dataclass
class SimPOConfig(_PairedConfig):
    """SimPO, which compares with no reference.

    Parameters:
        beta (`float`, *optional*, defaults to `10.0`):
            Inverse temperature, per nat per token.
        gamma_beta_ratio (`float`, *optional*, defaults to `0.3`):
            Margin between the mean log-probs, nats per token, at least 0.
    """

    _refused = (*DPO_LOSS_FIELDS, *REFERENCE_FIELDS, "humanline_sync_steps")

    beta: float = field(default=10.0, metadata={"help": "Inverse temperature, per nat per token."})
    gamma_beta_ratio: float = field(
        default=0.3, metadata={"help": "Margin between the mean log-probs, nats per token, at least 0."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_not_negative(
            self, "gamma_beta_ratio", "a negative margin rewards preferring the rejected completion."
        )


@dataclass
class SLiCConfig(_PairedConfig):
    """SLiC, which compares with no reference.

    Parameters:
        beta (`float`, *optional*, defaults to `1.0`):
            Margin between the summed log-probs, nats.
        lambda_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the chosen completion's negative log-likelihood, at least 0.
    """

    _refused = (*DPO_LOSS_FIELDS, *REFERENCE_FIELDS, "humanline_sync_steps")

    beta: float = field(default=1.0, metadata={"help": "Margin between the summed log-probs, nats."})
    lambda_coef: float = field(
        default=0.1, metadata={"help": "Weight of the chosen completion's negative log-likelihood, at least 0."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_not_negative(self, "lambda_coef", "a negative weight makes the chosen completion less likely.")


KTO_LOSS_FIELDS = ("loss_type", "desirable_weight", "undesirable_weight")


@dataclass
class _ScoredConfig(HumanlineConfig, trl.KTOConfig):
    """Base of the methods on scored completions: the fields of `trl.KTOConfig` that are not about KTO's loss."""

    _refused: ClassVar[tuple[str, ...]] = KTO_LOSS_FIELDS

    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Order of the groups: `random` (new in each epoch) or `sequential`.",
            "choices": ["random", "sequential"],
        },
    )

    def __post_init__(self) -> None:
        defaults = defaults_of(type(self))
        for name in self._refused:
            _require(
                getattr(self, name) == defaults[name], name, getattr(self, name),
                f"{type(self).__name__.removesuffix('Config')} has no such option.", "Leave it out.",
            )  # fmt: skip
        super().__post_init__()
        _check_sync(self)
        known = ("random", "sequential")
        _require(
            self.train_sampling_strategy in known, "train_sampling_strategy", self.train_sampling_strategy,
            "the examples of a prompt have to stay together.", f"Use one of {known}.",
        )  # fmt: skip
        _require(
            not self.dataloader_drop_last, "dataloader_drop_last", self.dataloader_drop_last,
            "a step may hold fewer examples than it could, so that no group is torn apart.", "Leave it out.",
        )  # fmt: skip


@dataclass
class GRPOConfig(_ScoredConfig):
    """Group-relative policy optimization on scored completions that exist already (offline).

    Parameters:
        beta (`float`, *optional*, defaults to `0.01`):
            Weight of the KL penalty, at least 0.
        epsilon (`float`, *optional*, defaults to `0.01`):
            The probability ratio is clipped to [1 - epsilon, 1 + epsilon_high].
        epsilon_high (`float`, *optional*):
            Upper clip range; `epsilon` where not set.
        scale_rewards (`bool`, *optional*, defaults to `True`):
            Divide advantages by the standard deviation of their group (+ 0.01).
        sequence_level (`bool`, *optional*, defaults to `False`):
            One ratio per completion (GSPO) instead of one per token.
    """

    beta: float = field(default=0.01, metadata={"help": "Weight of the KL penalty, at least 0."})
    epsilon: float = field(
        default=0.01, metadata={"help": "The probability ratio is clipped to [1 - epsilon, 1 + epsilon_high]."}
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clip range of the probability ratio; `epsilon` where not set."}
    )
    scale_rewards: bool = field(
        default=True, metadata={"help": "Divide advantages by the standard deviation of their group (+ 0.01)."}
    )
    sequence_level: bool = field(
        default=False, metadata={"help": "One ratio per completion (GSPO) instead of one per token."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_not_negative(self, "beta", "a negative weight rewards leaving the reference.")
        _require_positive(self, "epsilon", *(["epsilon_high"] if self.epsilon_high is not None else []))


@dataclass
class PPOConfig(_ScoredConfig):
    """Proximal policy optimization with a value head, on completions that exist already (offline).

    Parameters:
        cliprange (`float`, *optional*, defaults to `0.5`):
            The probability ratio is clipped to [1 - cliprange, 1 + cliprange].
        critic_coef (`float`, *optional*, defaults to `0.01`):
            Weight of the critic's squared error, at least 0.
        kl_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the KL penalty, at least 0. The penalty is linear in the log-ratio, so on fixed completions it
            lowers the log-probs of all of them without a bound; watch `kl`, and lower it at high learning rates.
        gamma (`float`, *optional*, defaults to `0.99`):
            Discount per token, in [0, 1].
        lam (`float`, *optional*, defaults to `0.95`):
            Mixing of the advantage estimates, in [0, 1]: 0 looks one token ahead, 1 to the end.
        ppo_epochs (`int`, *optional*, defaults to `1`):
            Optimizer steps on each batch; values and advantages are computed once, before the first of them.
        v_head_max_grad_norm (`float`, *optional*, defaults to `0.1`):
            Gradient-norm limit of the value head alone. `max_grad_norm` limits the policy alone.
        reward_batch_size (`int`, *optional*, defaults to `32`):
            Completions that the reward model scores at once, on each process.
    """

    _refused = (*KTO_LOSS_FIELDS, "beta")

    cliprange: float = field(
        default=0.5, metadata={"help": "The probability ratio is clipped to [1 - cliprange, 1 + cliprange]."}
    )
    critic_coef: float = field(default=0.01, metadata={"help": "Weight of the critic's squared error, at least 0."})
    kl_coef: float = field(default=0.1, metadata={"help": "Weight of the KL penalty, at least 0."})
    gamma: float = field(default=0.99, metadata={"help": "Discount per token, in [0, 1]."})
    lam: float = field(default=0.95, metadata={"help": "Mixing of the advantage estimates, in [0, 1]."})
    ppo_epochs: int = field(
        default=1, metadata={"help": "Optimizer steps on each batch, with values and advantages computed once."}
    )
    v_head_max_grad_norm: float = field(
        default=0.1, metadata={"help": "Gradient-norm limit of the value head; `max_grad_norm` limits the policy."}
    )
    reward_batch_size: int = field(
        default=32, metadata={"help": "Completions that the reward model scores at once, on each process."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "cliprange", "v_head_max_grad_norm")
        for name in ("critic_coef", "kl_coef"):
            _require_not_negative(self, name, "a negative weight turns the term around.")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            _require(0 <= value <= 1, name, value, "it is a discount.", "Use a number in [0, 1].")
        for name in ("ppo_epochs", "reward_batch_size"):
            _require_count(self, name, "it counts passes or rows.")


@dataclass
class BradleyTerryConfig(trl.RewardConfig):
    """`trl.RewardConfig`; HALOs' Bradley-Terry loss has no parameters of its own."""


__all__ = [
    "BradleyTerryConfig",
    "CDPOConfig",
    "DPOConfig",
    "GRPOConfig",
    "HumanlineConfig",
    "IPOConfig",
    "KTOConfig",
    "PPOConfig",
    "SLiCConfig",
    "SimPOConfig",
]
