"""The helpers that TRL's scripts import in addition to trainer and config.

`trl` does not declare its exports, so type checkers treat these names as private unless they are imported from the
modules that define them.
"""

from typing import TYPE_CHECKING, Any

import trl

if TYPE_CHECKING:
    from trl.chat_template_utils import clone_chat_template
    from trl.data_utils import (
        apply_chat_template,
        extract_prompt,
        is_conversational,
        maybe_apply_chat_template,
        maybe_extract_prompt,
        maybe_unpair_preference_dataset,
        unpair_preference_dataset,
    )
    from trl.models.utils import create_reference_model
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser, get_dataset, init_zero_verbose
    from trl.trainer.callbacks import LogCompletionsCallback, RichProgressCallback
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.utils import get_peft_config, get_quantization_config

__all__ = [
    "DatasetMixtureConfig",
    "LogCompletionsCallback",
    "ModelConfig",
    "RichProgressCallback",
    "ScriptArguments",
    "TrlParser",
    "apply_chat_template",
    "clone_chat_template",
    "create_reference_model",
    "extract_prompt",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
    "init_zero_verbose",
    "is_conversational",
    "maybe_apply_chat_template",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "unpair_preference_dataset",
]

if not TYPE_CHECKING:  # hidden from type checkers, so that they report unknown names

    def __getattr__(name: str) -> Any:
        """Import a TRL helper on first access, since newer TRL releases may have removed unused ones."""
        if name in __all__:
            return getattr(trl, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
