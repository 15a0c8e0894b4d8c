"""The settings that every method with a reference shares."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..humanline import Humanline
from .checks import require, require_count
from .field_types import check_types
from .secrets import PickledWithoutTokens

ASSISTANT_HELP = (
    "Train only on tokens of the assistant's turns if a completion also has turns of users or tools. The turns are "
    "found by the generation markers of the chat template, or else by their boundaries."
)


@dataclass
class CompletionConfig:
    """The tokens of a row to train on.

    Parameters:
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Train only on tokens of the assistant's turns if a completion also has turns of users or tools. Defaults to
            `True` for GRPO and PPO.
    """

    assistant_only_loss: bool = field(default=False, metadata={"help": ASSISTANT_HELP})


@dataclass
class HumanlineConfig:
    """Settings of humanline (arXiv:2509.24207).

    Parameters:
        humanline (`bool`, *optional*, defaults to `False`):
            Clamp the per-token log-ratios and let the reference follow the policy one step behind.
        log_epsilon_p (`float`, *optional*, defaults to `-1.0`):
            Lower bound of a token's log-ratio, in nats, at most 0.
        log_epsilon_r (`float`, *optional*, defaults to `1.5`):
            Upper bound of a token's log-ratio, in nats, at least 0.
        humanline_sync_steps (`int`, *optional*, defaults to `1`):
            Copy the policy into the reference before every n-th optimizer step.
    """

    humanline: bool = field(
        default=False,
        metadata={"help": "Clamp per-token log-ratios and let the reference follow the policy (arXiv:2509.24207)."},
    )
    log_epsilon_p: float = field(
        default=-1.0, metadata={"help": "Humanline's lower bound of a token's log-ratio, in nats, at most 0."}
    )
    log_epsilon_r: float = field(
        default=1.5, metadata={"help": "Humanline's upper bound of a token's log-ratio, in nats, at least 0."}
    )
    humanline_sync_steps: int = field(
        default=1,
        metadata={"help": "Humanline copies the policy into the reference before every n-th optimizer step."},
    )

    @property
    def humanline_clamp(self) -> Humanline | None:
        """The clamp as an argument for the losses; `None` if humanline is off."""
        return Humanline(self.log_epsilon_p, self.log_epsilon_r) if self.humanline else None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if not self.humanline:
            for f in (f for f in fields(HumanlineConfig) if f.name in HumanlineConfig.__annotations__):
                value = getattr(self, f.name)
                require(
                    value == f.default, f.name, value, "it has no effect while `humanline` is off.",
                    "Set `humanline=True` (`--humanline`), or leave it out.",
                )  # fmt: skip
            return
        self.humanline_clamp  # noqa: B018  (its constructor checks the bounds)
        require_count(
            self, "humanline_sync_steps", "it is a number of optimizer steps; humanline requires a moving reference."
        )
        if getattr(self, "precompute_ref_log_probs", False):
            raise ValueError(
                "`humanline=True` and `precompute_ref_log_probs=True` cannot be combined: humanline moves the "
                "reference every few steps, so log-probs computed before training become stale. Disable one of them."
            )
        if getattr(self, "sync_ref_model", False):
            raise ValueError(
                "`humanline=True` and `sync_ref_model=True` cannot be combined, because both control how the "
                "reference moves: humanline copies the policy before every `humanline_sync_steps`-th step, TR-DPO "
                "mixes it in afterwards. Disable one of them."
            )


@dataclass
class RowsConfig(PickledWithoutTokens):
    """The fields that every trainer shares.

    Parameters:
        drop_invalid_rows (`bool`, *optional*, defaults to `False`):
            Drop rows that would be refused (an empty completion, an invalid label or score, ...), and report their
            number in a warning.
    """

    drop_invalid_rows: bool = field(
        default=False,
        metadata={
            "help": (
                "Drop rows that would be refused, and report their number in a warning, with the first one and its "
                "problem."
            )
        },
    )

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()  # type: ignore[misc]


STORAGES = ("same", "bf16", "8bit", "4bit", "cpu")
"""Formats in which a reference that is a second model can be stored."""


@dataclass
class ReferenceConfig:
    """How a reference that is a second model is stored.

    Parameters:
        reference_storage (`str`, *optional*, defaults to `"same"`):
            `"same"`: as the policy. `"bf16"`: rounded to bfloat16. `"8bit"` and `"4bit"`: linear layers quantized by
            bitsandbytes (LLM.int8; NF4 with double quantization), the rest in bfloat16. `"cpu"`: as the policy, in
            CPU memory; each module's weights are on the device only while it runs.
    """

    reference_storage: str = field(
        default="same",
        metadata={
            "help": "How a reference that is a second model is stored: `same` (as the policy), `bf16`, `8bit` or "
            "`4bit` (linear layers quantized by bitsandbytes, the rest in bfloat16), `cpu` (in CPU memory, each "
            "module's weights on the device only while it runs).",
            "choices": list(STORAGES),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.reference_storage == "same":
            return
        require(
            not getattr(self, "precompute_ref_log_probs", False), "reference_storage", self.reference_storage,
            "`precompute_ref_log_probs=True` needs no reference model during training.", "Leave one of them out.",
        )  # fmt: skip
        require(
            self.reference_storage not in ("8bit", "4bit") or not getattr(self, "sync_ref_model", False)
            or self.ref_model_mixup_alpha == 1.0,  # type: ignore[attr-defined]
            "reference_storage", self.reference_storage,
            "`sync_ref_model` mixes in a fraction of the policy, and changes smaller than the quantization step would "
            "be lost.",
            "Use 'bf16' or 'cpu', or `ref_model_mixup_alpha=1`, which copies the policy.",
        )  # fmt: skip


SYNC_HELP = (
    "Let the reference follow the policy (TR-DPO, arXiv:2404.09656): every `ref_model_sync_steps` steps, mix the "
    "policy into it with weight `ref_model_mixup_alpha`. Works with adapters; not with `precompute_ref_log_probs`."
)


REFERENCE_FIELDS = (
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "reference_storage",
)


@dataclass
class ForwardConfig:
    """How the sequences of a micro-batch are arranged for the forward pass.

    Parameters:
        packed (`str`, *optional*, defaults to `"auto"`):
            `"auto"`: completions of the same prompt share its tokens, and nothing is padded, if the model gives the
            same results as with padded rows. This is checked on the first batch; otherwise padded rows are used.
            `"on"`: raise an error instead. `"off"`: always use padded rows.
    """

    packed: str = field(
        default="auto",
        metadata={
            "help": (
                "Compute shared prompts once and avoid padding: `auto` (if the model gives the same results; "
                "checked on the first batch), `on` (an error if it does not), `off`."
            ),
            "choices": ["auto", "on", "off"],
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.packed, bool):  # `on` and `off` are booleans in YAML
            self.packed = "on" if self.packed else "off"
        super().__post_init__()  # type: ignore[misc]
