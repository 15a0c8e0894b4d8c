"""The trainers: three bases to extend, and the named methods."""

from .cdpo import CDPOTrainer
from .dpo import DPOTrainer
from .grpo import GRPOTrainer
from .ipo import IPOTrainer
from .kto import KTOTrainer
from .paired import PairedPreferenceTrainer
from .ppo import PPOTrainer
from .reward import BradleyTerryTrainer, load_reward_model
from .scored import ScoredTrainer
from .simpo import SimPOTrainer
from .slic import SLiCTrainer
from .unpaired import UnpairedPreferenceTrainer

__all__ = [
    "BradleyTerryTrainer",
    "CDPOTrainer",
    "DPOTrainer",
    "GRPOTrainer",
    "IPOTrainer",
    "KTOTrainer",
    "PPOTrainer",
    "PairedPreferenceTrainer",
    "SLiCTrainer",
    "ScoredTrainer",
    "SimPOTrainer",
    "UnpairedPreferenceTrainer",
    "load_reward_model",
]
