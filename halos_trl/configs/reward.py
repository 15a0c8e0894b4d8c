"""The config class of the reward model."""

from __future__ import annotations

from dataclasses import dataclass

import trl

from .batch_order import BatchOrderConfig
from .checks import require_not_negative
from .shared import ForwardConfig, RowsConfig


@dataclass
class BradleyTerryConfig(BatchOrderConfig, ForwardConfig, RowsConfig, trl.RewardConfig):
    """`trl.RewardConfig`; HALOs' Bradley-Terry loss has no parameters of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center_rewards_coefficient is not None:
            require_not_negative(self, "center_rewards_coefficient", "it pushes the scores away from 0.")
