"""The HALOs alignment methods as an extension of Hugging Face TRL."""

from typing import TYPE_CHECKING, Any

from ._trl import helpers
from .configs import (
    BradleyTerryConfig,
    CDPOConfig,
    DPOConfig,
    GRPOConfig,
    IPOConfig,
    KTOConfig,
    PPOConfig,
    SimPOConfig,
    SLiCConfig,
)
from .data.feedback import load_feedback
from .humanline import Humanline
from .patching import TRLPatch, patch_trl
from .trainers import (
    BradleyTerryTrainer,
    CDPOTrainer,
    DPOTrainer,
    GRPOTrainer,
    IPOTrainer,
    KTOTrainer,
    PairedPreferenceTrainer,
    PPOTrainer,
    ScoredTrainer,
    SimPOTrainer,
    SLiCTrainer,
    UnpairedPreferenceTrainer,
    load_reward_model,
)

if TYPE_CHECKING:
    from ._trl.helpers import (
        DatasetMixtureConfig,
        LogCompletionsCallback,
        ModelConfig,
        RichProgressCallback,
        ScriptArguments,
        TrlParser,
        apply_chat_template,
        clone_chat_template,
        create_reference_model,
        extract_prompt,
        get_dataset,
        get_peft_config,
        get_quantization_config,
        init_zero_verbose,
        is_conversational,
        maybe_apply_chat_template,
        maybe_extract_prompt,
        maybe_unpair_preference_dataset,
        unpair_preference_dataset,
    )

__version__ = "0.1.0"

RewardTrainer = BradleyTerryTrainer
"""TRL's name of it."""

RewardConfig = BradleyTerryConfig
"""TRL's name of it."""

__all__ = [
    "BradleyTerryConfig",
    "BradleyTerryTrainer",
    "CDPOConfig",
    "CDPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DatasetMixtureConfig",
    "GRPOConfig",
    "GRPOTrainer",
    "Humanline",
    "IPOConfig",
    "IPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "LogCompletionsCallback",
    "ModelConfig",
    "PPOConfig",
    "PPOTrainer",
    "PairedPreferenceTrainer",
    "RewardConfig",
    "RewardTrainer",
    "RichProgressCallback",
    "SLiCConfig",
    "SLiCTrainer",
    "ScoredTrainer",
    "ScriptArguments",
    "SimPOConfig",
    "SimPOTrainer",
    "TRLPatch",
    "TrlParser",
    "UnpairedPreferenceTrainer",
    "apply_chat_template",
    "clone_chat_template",
    "create_reference_model",
    "extract_prompt",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
    "init_zero_verbose",
    "is_conversational",
    "load_feedback",
    "load_reward_model",
    "maybe_apply_chat_template",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "patch_trl",
    "unpair_preference_dataset",
]

if not TYPE_CHECKING:  # a type checker should know a wrong name when it sees one

    def __getattr__(name: str) -> Any:
        """The helpers that TRL's scripts import beside trainer and config: TRL's own, fetched when first asked for."""
        if name in helpers.__all__:
            return getattr(helpers, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
