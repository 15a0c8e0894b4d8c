"""The config class of the reward model."""

from __future__ import annotations

from dataclasses import dataclass

import trl

from .shared import RowsConfig


@dataclass
class BradleyTerryConfig(RowsConfig, trl.RewardConfig):
    """`trl.RewardConfig`; HALOs' Bradley-Terry loss has no parameters of its own."""
