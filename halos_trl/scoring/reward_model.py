"""Scores from a reward model, computed in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.logging import get_logger
from transformers import AutoTokenizer

from ..data.tokens import RowTokenizer
from ..trainers.reward import load_reward_model
from ..trainers.reward_scores import RewardModelScores
from .samples import Sample
from .verdict import Verdict

logger = get_logger(__name__)


class RewardModelScorer:
    """Scores with an `AutoModelForSequenceClassification` of one label, or of HALOs' two (the second is the score).

    Parameters:
        name_or_path: Hub id or folder of the model (or of an adapter) and its tokenizer.
        batch_size: Samples in one forward pass.
        max_length: Longer samples are truncated at the end to this many tokens, with a warning that counts them. The
            default is the model's limit.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.

    Raises ValueError for a model that cannot be loaded, is not a reward model, or has another number of labels.
    """

    def __init__(self, name_or_path: str, batch_size: int = 16, max_length: int | None = None, dtype: str = "auto"):
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"batch_size is {batch_size} and max_length {max_length}; expected at least 1.")
        try:
            model = load_reward_model(name_or_path, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except OSError as error:  # missing model, no access or no network, according to the message of huggingface_hub
            raise ValueError(f"The reward model {name_or_path!r} cannot be loaded: {error}") from error
        if model.config.get_text_config().pad_token_id is None and tokenizer.pad_token_id is not None:
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if max_length is not None:
            tokenizer.model_max_length = min(max_length, tokenizer.model_max_length)
        self._scores = RewardModelScores(model, tokenizer, batch_size)
        self._tokenize = RowTokenizer(tokenizer, "samples", ("completion",), whole=True)
        self.settings: dict[str, Any] = {"reward_model": name_or_path, "max_length": max_length, "dtype": dtype}

    def __call__(self, todo: Sequence[tuple[int, Sample]]) -> Iterator[Verdict]:
        size = self._scores.batch_size
        longer = 0
        # Keeps the input order, so that samples of the same prompt are in one batch and share its tokens.
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            ids = [self._ids(sample) for _, sample in batch]
            longer += sum(len(row) > self._scores.limit for row in ids)
            for (position, _), score in zip(batch, self._scores.of_ids(ids), strict=True):
                yield Verdict(position, score)
        if longer:
            logger.warning(
                f"{longer} of {len(todo)} samples are longer than {self._scores.limit} tokens and are truncated at "
                "the end."
            )

    def _ids(self, sample: Sample) -> list[int]:
        row = {"prompt": sample.prompt, "completion": sample.completion} | {
            name: value
            for name in ("tools", "chat_template_kwargs")
            if (value := sample.columns.get(name)) is not None
        }
        try:
            return self._tokenize(row, 0)["completion_ids"]
        except ValueError as error:
            raise ValueError(f"{sample.where} cannot be scored by the reward model. {error}") from error


__all__ = ["RewardModelScorer"]
