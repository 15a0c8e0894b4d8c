"""The HALOs alignment methods as an extension of Hugging Face TRL."""

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
from .humanline import Humanline
from .trainers import (
    BradleyTerryTrainer,
    CDPOTrainer,
    DPOTrainer,
    GRPOTrainer,
    IPOTrainer,
    KTOTrainer,
    PairedPreferenceTrainer,
    PPOTrainer,
    SimPOTrainer,
    SLiCTrainer,
    UnpairedPreferenceTrainer,
    load_reward_model,
)

__version__ = "0.1.0"

__all__ = [
    "BradleyTerryConfig",
    "BradleyTerryTrainer",
    "CDPOConfig",
    "CDPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "Humanline",
    "IPOConfig",
    "IPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PairedPreferenceTrainer",
    "SLiCConfig",
    "SLiCTrainer",
    "SimPOConfig",
    "SimPOTrainer",
    "UnpairedPreferenceTrainer",
    "load_reward_model",
]
