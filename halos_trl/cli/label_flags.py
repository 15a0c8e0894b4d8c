"""The flags of `halos-trl label`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.labelling import PAIR_MODES
from ..scoring.feedback import FEEDBACK_FORMATS, FEEDBACK_KINDS


@dataclass
class LabelArguments:
    """Score samples with a reward model, a Python function or a judge, and write labels, pairs or scores.

    Scores are appended to `<output>.scores` as they are computed: an interrupted run continues when it is started
    again with the same flags.
    """

    samples: list[str] = field(
        default_factory=lambda: ["samples.jsonl"],
        metadata={
            "help": (
                "Files of samples (`halos-trl sample`, HALOs' `train.sample`, any JSON array or JSON Lines), or a "
                "dataset (Hub id, Parquet, CSV, folder), with `prompt` and `completion`, `output` or the list "
                "`completions`."
            )
        },
    )
    output: str = field(
        default="feedback.jsonl",
        metadata={"help": "Output file: `.jsonl` (JSON Lines) or `.json` (one array, as HALOs expects)."},
    )
    feedback: str = field(
        default="binary",
        metadata={
            "help": (
                "binary: one label per sample. pairwise: pairs of samples of the same prompt. scalar: one score per "
                "sample. groups: the completions and scores of each prompt."
            ),
            "choices": list(FEEDBACK_KINDS),
        },
    )
    format: str = field(
        default="trl",
        metadata={"help": "trl: rows for trainers. halos: HALOs' feedback files.", "choices": list(FEEDBACK_FORMATS)},
    )
    reward_model: str | None = field(
        default=None,
        metadata={
            "help": (
                "Score with this reward model (Hub id or folder), which has one label, or two as in HALOs. Without "
                "this, `reward_function` and `judge_model`, the samples' own `reward` or `score` is used."
            )
        },
    )
    reward_function: str | None = field(
        default=None,
        metadata={
            "help": (
                "Score with this function: `module:function` or `file.py:function`. It is called with the keyword "
                "arguments `prompt`, `completion` (its text) and the row's other columns, and returns a number, or "
                "None to skip the sample. With a parameter `completions`, it is called as TRL calls reward "
                "functions."
            )
        },
    )
    judge_model: str | None = field(
        default=None, metadata={"help": "Score with this model of an OpenAI-compatible server."}
    )
    judge_url: str = field(
        default="https://api.openai.com/v1", metadata={"help": "Base URL of the server, without `/chat/completions`."}
    )
    judge_key_variable: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "Environment variable with the API key. Local servers often need none."},
    )
    judge_template: str | None = field(
        default=None,
        metadata={
            "help": (
                "File with the prompt for the judge, a text with `{prompt}`, `{completion}` and `{<column>}`. The "
                "default asks for a score from 0 to 10 on a last line `Score: ...`."
            )
        },
    )
    judge_pattern: str | None = field(
        default=None,
        metadata={
            "help": (
                "Regular expression whose first group is the score in a reply; the last match is used. The default "
                "finds `Score: 7.5`, and replies that consist of a number."
            )
        },
    )
    judge_options: str = field(
        default='{"temperature": 0}',
        metadata={
            "help": "Additional fields of each request, as JSON. Use `{}` for models that do not accept a temperature."
        },
    )
    judge_concurrency: int = field(default=8, metadata={"help": "Number of concurrent requests."})
    judge_timeout: float = field(
        default=120.0, metadata={"help": "Timeout in seconds for a server that sends nothing."}
    )
    judge_retries: int = field(
        default=7,
        metadata={
            "help": (
                "Number of retries after a connection error, a server error or a rate limit, with delays of 1, 2, 4, "
                "... seconds or as long as the server requests."
            )
        },
    )
    threshold: str | None = field(
        default=None,
        metadata={
            "help": (
                "binary: `mean` or `median` of all scores, or a number; samples with at least this score are "
                "desirable (default: median). pairwise: a number that the difference of scores must exceed "
                "(default: 0)."
            )
        },
    )
    pair_mode: str = field(
        default="max",
        metadata={
            "help": "max: best and worst sample of each prompt. min: the closest scores at least `threshold` apart. "
            "random: random disjoint pairs. Equal scores are never paired.",
            "choices": list(PAIR_MODES),
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Random seed for pairs, and for which sample of a pair is `output_A`."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset."})
    batch_size: int = field(default=16, metadata={"help": "Number of samples per batch of the reward model."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens of a sample for the reward model (default: the model's limit)."},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the reward model; auto: the checkpoint's.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace an existing output, and scores in `<output>.scores` made with other settings."},
    )


__all__ = ["LabelArguments"]
