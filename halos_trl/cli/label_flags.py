"""The flags of `halos-trl label`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.labelling import PAIR_MODES
from ..scoring.feedback import FEEDBACK_FORMATS, FEEDBACK_KINDS


@dataclass
class LabelArguments:
    """Score samples with a reward model, a Python function or a judge, and write labels, pairs or scores.

    Scores are appended to `<output>.scores` as they come: a run that was stopped goes on where it was when it is
    started again with the same flags.
    """

    samples: list[str] = field(
        default_factory=lambda: ["samples.jsonl"],
        metadata={
            "help": "Files of samples (`halos-trl sample`, HALOs' `train.sample`, any JSON array or JSON Lines), or a "
            "dataset (hub id, Parquet, CSV, folder): `prompt` with `completion`, `output` or the list `completions`."
        },
    )
    output: str = field(
        default="feedback.jsonl",
        metadata={"help": "The feedback: `.jsonl` (JSON Lines) or `.json` (one array, as HALOs reads)."},
    )
    feedback: str = field(
        default="binary",
        metadata={
            "help": "binary: a label for each sample. pairwise: pairs of samples of a prompt. scalar: a score for "
            "each sample. groups: the completions and scores of each prompt.",
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
            "help": "Score with this reward model: hub id or folder. It has one label, or two as HALOs trains them. "
            "Without this, `reward_function` and `judge_model`, the samples' own `reward` or `score` is used."
        },
    )
    reward_function: str | None = field(
        default=None,
        metadata={
            "help": "Score with this function: `module:function` or `file.py:function`. It is called by keyword with "
            "`prompt`, `completion` (its text) and the row's other columns, and returns a number, or None to leave "
            "the sample out. With a parameter `completions` it is called as TRL calls its reward functions."
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
        metadata={"help": "Environment variable that holds the API key. Servers of your own often need none."},
    )
    judge_template: str | None = field(
        default=None,
        metadata={
            "help": "File with what the judge is asked: a text with `{prompt}`, `{completion}` and `{<column>}`. The "
            "built-in one asks for a score from 0 to 10 on a last line `Score: ...`."
        },
    )
    judge_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression whose first group is the score in a reply; the last match counts. The "
            "built-in one finds `Score: 7.5`, and replies that are a number only."
        },
    )
    judge_options: str = field(
        default='{"temperature": 0}',
        metadata={"help": "Further fields of each request, as JSON. `{}` for models that refuse a temperature."},
    )
    judge_concurrency: int = field(default=8, metadata={"help": "Requests at the same time."})
    judge_timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for a server that sends nothing."})
    judge_retries: int = field(
        default=7,
        metadata={
            "help": "How often a request is repeated after an error of the connection or the server, or a rate limit, "
            "waiting 1, 2, 4, ... seconds or as long as the server says."
        },
    )
    threshold: str | None = field(
        default=None,
        metadata={
            "help": "binary: `mean` or `median` of all scores, or a number; samples that reach it are desirable "
            "(default: median). pairwise: a number, which the difference of scores exceeds (default: 0)."
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
    seed: int = field(default=0, metadata={"help": "Of random pairs and of which sample of a pair is `output_A`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset."})
    batch_size: int = field(default=16, metadata={"help": "Samples that the reward model scores at once."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens that the reward model sees of a sample (default: all that it takes)."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the reward model; auto: the checkpoint's.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace an existing output, and scores in `<output>.scores` made with other settings."},
    )


__all__ = ["LabelArguments"]
