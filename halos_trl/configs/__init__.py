"""One dataclass per method: TRL's config plus that method's own fields, checked at construction."""

from .checks import defaults_of
from .paired import DPO_LOSS_FIELDS, CDPOConfig, DPOConfig, IPOConfig, SimPOConfig, SLiCConfig
from .reward import BradleyTerryConfig
from .scored import GRPO_LOSS_FIELDS, GRPOConfig, PPOConfig
from .shared import REFERENCE_FIELDS, HumanlineConfig
from .unpaired import KTO_LOSS_FIELDS, KTOConfig

__all__ = [
    "DPO_LOSS_FIELDS",
    "GRPO_LOSS_FIELDS",
    "KTO_LOSS_FIELDS",
    "REFERENCE_FIELDS",
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
    "defaults_of",
]
