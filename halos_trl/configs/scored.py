"""The config classes of the methods on scored completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import trl

from .batch_order import BatchOrderConfig
from .checks import check_sync, defaults_of, require, require_count, require_not_negative, require_positive
from .shared import ASSISTANT_HELP, CompletionConfig, ForwardConfig, HumanlineConfig, ReferenceConfig, RowsConfig
from .unpaired import KTO_LOSS_FIELDS

GRPO_LOSS_FIELDS = ("epsilon", "epsilon_high", "sequence_level", "old_policy")


@dataclass
class _ScoredConfig(
    BatchOrderConfig, ForwardConfig, HumanlineConfig, ReferenceConfig, CompletionConfig, RowsConfig, trl.KTOConfig
):
    """Base of the methods on scored completions: `trl.KTOConfig` without the fields of KTO's loss."""

    _refused: ClassVar[tuple[str, ...]] = KTO_LOSS_FIELDS

    assistant_only_loss: bool = field(
        default=True,
        metadata={
            "help": (
                f"{ASSISTANT_HELP} Enabled by default, since the policy wrote no other tokens; disabled with "
                "`batch_order=halos`."
            )
        },
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Order of the groups: `random` (reshuffled in each epoch) or `sequential`.",
            "choices": ["random", "sequential"],
        },
    )

    def __post_init__(self) -> None:
        defaults = defaults_of(type(self))
        for name in self._refused:
            require(
                getattr(self, name) == defaults[name], name, getattr(self, name),
                f"{type(self).__name__.removesuffix('Config')} has no such option.", "Leave it out.",
            )  # fmt: skip
        if self.batch_order == "halos":
            self.assistant_only_loss = False  # HALOs trains on every turn of a completion
        super().__post_init__()
        check_sync(self)
        known = ("random", "sequential")
        require(
            self.train_sampling_strategy in known, "train_sampling_strategy", self.train_sampling_strategy,
            "the completions of a prompt must stay together.", f"Use one of {known}.",
        )  # fmt: skip
        require(
            not self.dataloader_drop_last, "dataloader_drop_last", self.dataloader_drop_last,
            "a step may have fewer examples than its size, so that no group is split.", "Leave it out.",
        )  # fmt: skip


@dataclass
class GRPOConfig(_ScoredConfig):
    """Group-relative policy optimization on existing, scored completions (offline).

    Parameters:
        beta (`float`, *optional*, defaults to `0.01`):
            Weight of the KL penalty, at least 0.
        epsilon (`float`, *optional*, defaults to `0.01`):
            The probability ratio is clipped to [1 - epsilon, 1 + epsilon_high].
        epsilon_high (`float`, *optional*):
            Upper clip range; defaults to `epsilon`.
        scale_rewards (`bool`, *optional*, defaults to `True`):
            Divide advantages by the standard deviation of their group (+ 0.01).
        sequence_level (`bool`, *optional*, defaults to `False`):
            One ratio per completion (GSPO) instead of one per token.
        old_policy (`str`, *optional*, defaults to `"reference"`):
            The policy in the denominator of the probability ratio: `"reference"`, as in HALOs, or `"sampler"`, the
            model that generated the completions. The latter requires rows with `token_ids` and `logprobs`, as written
            by `halos-trl sample --logprobs`, and trains on exactly these tokens. The KL penalty is relative to the
            reference in either case.

    Raises ValueError for `old_policy="sampler"` with `humanline` or with `batch_order="halos"`.
    """

    beta: float = field(default=0.01, metadata={"help": "Weight of the KL penalty, at least 0."})
    epsilon: float = field(
        default=0.01, metadata={"help": "The probability ratio is clipped to [1 - epsilon, 1 + epsilon_high]."}
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clip range of the probability ratio; defaults to `epsilon`."}
    )
    scale_rewards: bool = field(
        default=True, metadata={"help": "Divide advantages by the standard deviation of their group (+ 0.01)."}
    )
    sequence_level: bool = field(
        default=False, metadata={"help": "One ratio per completion (GSPO) instead of one per token."}
    )
    old_policy: str = field(
        default="reference",
        metadata={
            "help": "The policy in the denominator of the ratio: `reference`, or `sampler`, which requires rows with "
            "`token_ids` and `logprobs` as written by `halos-trl sample --logprobs`.",
            "choices": ["reference", "sampler"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_old_policy()
        require_not_negative(self, "beta", "a negative weight rewards moving away from the reference.")
        require_positive(self, "epsilon", *(["epsilon_high"] if self.epsilon_high is not None else []))

    def _check_old_policy(self) -> None:
        known = ("reference", "sampler")
        require(
            self.old_policy in known, "old_policy", self.old_policy,
            "the ratio is against the reference or the model that generated the completions.",
            f"Use one of {known}.",
        )  # fmt: skip
        if self.old_policy == "reference":
            return
        require(
            not self.humanline, "old_policy", self.old_policy,
            "`humanline=True` clamps the ratio of the policy and the moving reference.", "Leave one of them out.",
        )  # fmt: skip
        require(
            self.batch_order == "trl", "old_policy", self.old_policy,
            "`batch_order='halos'` tokenizes completions again, as HALOs does.",
            "Leave one of them out.",
        )  # fmt: skip


@dataclass
class PPOConfig(_ScoredConfig):
    """Proximal policy optimization with a value head, on existing completions (offline).

    Parameters:
        cliprange (`float`, *optional*, defaults to `0.5`):
            The probability ratio is clipped to [1 - cliprange, 1 + cliprange].
        critic_coef (`float`, *optional*, defaults to `0.01`):
            Weight of the critic's squared error, at least 0.
        kl_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the KL penalty, at least 0. The penalty is linear in the log-ratio, so on fixed completions it
            lowers the log-probs of all of them without bound; monitor `kl`, and lower the weight at high learning
            rates.
        gamma (`float`, *optional*, defaults to `0.99`):
            Discount per token, in [0, 1].
        lam (`float`, *optional*, defaults to `0.95`):
            Lambda of generalized advantage estimation, in [0, 1]: 0 is the one-step estimate, 1 uses all future
            rewards.
        ppo_epochs (`int`, *optional*, defaults to `1`):
            Optimizer steps on each batch; values and advantages are computed once, before the first of them.
        v_head_max_grad_norm (`float`, *optional*, defaults to `0.1`):
            Gradient-norm limit of the value head. `max_grad_norm` applies to the policy only.
        reward_batch_size (`int`, *optional*, defaults to `32`):
            Number of completions per forward pass of the reward model, on each process.
    """

    _refused = (*KTO_LOSS_FIELDS, "beta")

    cliprange: float = field(
        default=0.5, metadata={"help": "The probability ratio is clipped to [1 - cliprange, 1 + cliprange]."}
    )
    critic_coef: float = field(default=0.01, metadata={"help": "Weight of the critic's squared error, at least 0."})
    kl_coef: float = field(default=0.1, metadata={"help": "Weight of the KL penalty, at least 0."})
    gamma: float = field(default=0.99, metadata={"help": "Discount per token, in [0, 1]."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation, in [0, 1]."})
    ppo_epochs: int = field(
        default=1, metadata={"help": "Optimizer steps on each batch, with values and advantages computed once."}
    )
    v_head_max_grad_norm: float = field(
        default=0.1,
        metadata={"help": ("Gradient-norm limit of the value head; `max_grad_norm` applies to the policy only.")},
    )
    reward_batch_size: int = field(
        default=32, metadata={"help": "Number of completions per forward pass of the reward model, on each process."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "cliprange", "v_head_max_grad_norm")
        for name in ("critic_coef", "kl_coef"):
            require_not_negative(self, name, "a negative weight flips the sign of that term.")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "it is a discount factor.", "Use a number in [0, 1].")
        for name in ("ppo_epochs", "reward_batch_size"):
            require_count(self, name, "it is a number of passes or rows.")
