"""The flags of `halos-trl rounds`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RoundsArguments:
    """Rounds of sampling from the policy, labelling the samples, and training on the feedback."""

    rounds: int = field(default=4, metadata={"help": "Number of rounds."})
    prompts_per_round: int = field(
        default=512, metadata={"help": "Number of prompts per round; each prompt is used once."}
    )
    samples_per_prompt: int = field(default=8, metadata={"help": "Number of completions per prompt."})
    reference: Literal["previous", "first"] = field(
        default="previous",
        metadata={
            "help": "The reference of a round: the policy at its start, or the model of the first round. Under "
            "humanline, the reference moves and is carried over."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, local file or folder with prompts. Without dataset and model: the embedded task."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split that provides the prompts."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=0.95, metadata={"help": "Top-p of sampling."})
    max_tokens: int = field(default=2048, metadata={"help": "Maximum number of tokens per sample."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Stop strings, which end a sample."})
    sample_batch_size: int = field(default=64, metadata={"help": "Number of samples generated in one batch."})
    engine: Literal["auto", "vllm", "transformers"] = field(
        default="auto", metadata={"help": "Sampling engine; `auto`: vLLM if it is installed."}
    )
    reward_function: str | None = field(
        default=None, metadata={"help": "Function that scores the samples: `module:function` or `file.py:function`."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Reward model that scores the samples: Hub id or folder."}
    )
    judge_model: str | None = field(
        default=None, metadata={"help": "Judge that scores the samples: a model on an OpenAI-compatible server."}
    )
    judge_url: str = field(default="https://api.openai.com/v1", metadata={"help": "Base URL of that server."})
    threshold: str | None = field(
        default=None,
        metadata={"help": "As in `halos-trl label`: threshold for labels (`median`) or for score differences (0)."},
    )
    pair_mode: Literal["random", "max", "min"] = field(
        default="max", metadata={"help": "Which samples are paired, as in `halos-trl label`."}
    )


EMBEDDED = {
    "output_dir": "outputs/rounds",
    "seed": 0,
    "prompts_per_round": 256,
    "samples_per_prompt": 2,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_tokens": 12,
    "sample_batch_size": 1024,
    "engine": "transformers",
    "reward_function": "halos_trl.toy:reward",
    "threshold": "0.5",
    "rounds": 8,
}
"""Defaults on the embedded task."""

__all__ = ["EMBEDDED", "RoundsArguments"]
