"""The HALOs alignment methods as an extension of Hugging Face TRL."""

from typing import TYPE_CHECKING, Any

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
    from .generation import GenerationCallback
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

    RewardTrainer = BradleyTerryTrainer
    RewardConfig = BradleyTerryConfig

__version__ = "0.1.0"

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
    "GenerationCallback",
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

if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept any name
    from importlib import import_module
    from importlib.util import find_spec

    _NAMES_OF_TRL = {"RewardTrainer": "BradleyTerryTrainer", "RewardConfig": "BradleyTerryConfig"}
    _ELSEWHERE = {
        "GenerationCallback": ".generation",
        "Humanline": ".humanline",
        "TRLPatch": ".patching",
        "load_feedback": ".data.feedback",
        "patch_trl": ".patching",
    }

    def __getattr__(name: str) -> Any:
        """A public name or a module, imported lazily, because trainers take seconds to import and `halos-trl --help`
        does not need them.
        """
        if name in __all__:
            value = _public(_NAMES_OF_TRL.get(name, name))
        elif not name.startswith("__") and find_spec(f"{__name__}.{name}"):
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def _public(name: str) -> Any:
        if name in _ELSEWHERE:
            return getattr(import_module(_ELSEWHERE[name], __name__), name)
        homes = (import_module(home, __name__) for home in (".configs", ".trainers", "._trl.helpers"))
        return next(getattr(home, name) for home in homes if name in home.__all__)
