"""Scores from a reward model, computed once when the data are prepared."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokens import RowTokenizer
from ..forward.heads import read_wanted_scores
from ..forward.packing import give_packing
from ..forward.rewards import score_sequences
from ..sharded import shape_of
from .reward_head import refuse_random_head

logger = get_logger(__name__)


def _alone(sums: torch.Tensor) -> torch.Tensor:
    # Processes may score different numbers of batches, since their forward passes do not communicate.
    return sums


class RewardModelScores:
    """Scores completions with an `AutoModelForSequenceClassification` with one logit, or with two, of which the second
    is the score.

    The reward model has its own tokenizer and chat template, which may differ from the policy's. Completions do not
    change, so each is scored once, before training, and the model is not needed afterwards. The rows are distributed
    over the processes in contiguous runs, so that completions of the same prompt are batched together and share its
    tokens.

    Raises ValueError for a model partitioned by ZeRO-3, without a padding token, with another number of labels, or
    with a random head.
    """

    def __init__(
        self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase, batch_size: int = 32,
        packed: str = "auto",
    ):  # fmt: skip
        if isinstance(model, str):
            raise ValueError(
                f"`reward_model` is {model!r}; expected a model. Load it, e.g. with `halos_trl.load_reward_model`."
            )
        if any(shape_of(parameter) != parameter.shape for parameter in model.parameters()):
            raise ValueError(
                "The reward model was partitioned by DeepSpeed ZeRO-3, which does not gather it for scoring. Score "
                "the rows before training (`halos-trl label --feedback scalar`), or launch with ZeRO-2."
            )
        if model.config.num_labels not in (1, 2):
            raise ValueError(
                f"The reward model has {model.config.num_labels} labels. It needs one logit (its score), or two as "
                "in HALOs (the score is logit 1). Pass a reward model, e.g. one trained with `BradleyTerryTrainer`."
            )
        refuse_random_head(model, "`reward_model`")
        pads = (processing_class.pad_token_id, model.config.get_text_config().pad_token_id)
        if None in pads or pads[0] != pads[1]:
            problem = "has no padding token" if None in pads else "and its tokenizer have different padding tokens"
            raise ValueError(
                f"The reward model {problem} (tokenizer: {processing_class.pad_token!r} with id {pads[0]}, "
                f"`model.config.pad_token_id`: {pads[1]}), so it cannot tell where a completion ends in a padded "
                "batch. Set both to the same token, e.g. `tokenizer.pad_token = tokenizer.eos_token` and "
                "`reward_model.config.pad_token_id = tokenizer.pad_token_id`."
            )
        self.model = model
        self.processing_class = processing_class
        self.batch_size = batch_size
        give_packing([model], packed, read_wanted=read_wanted_scores, reduce_sum=_alone)

    def __call__(self, dataset: Dataset) -> list[float]:
        """One score for each row of `prompt` and `completion`, in order, on every process."""
        state = PartialState()
        share = -(-len(dataset) // state.num_processes)
        own = range(len(dataset))[share * state.process_index :][:share]
        # Tokenized as in the reward trainer, with this model's own tokenizer and template.
        tokenize = RowTokenizer(self.processing_class, "scored", ("completion",), whole=True)
        ids = [tokenize(dataset[i], i)["completion_ids"] for i in own]
        self._report_truncation(ids)
        return gather_object(self.of_ids(ids))

    @property
    def limit(self) -> int:
        """Maximum number of tokens of the reward model; longer rows are truncated."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.processing_class.model_max_length, positions or self.processing_class.model_max_length)

    def _report_truncation(self, ids: list[list[int]]) -> None:
        longer = sum(len(row) > self.limit for row in ids)
        if longer:
            logger.warning(
                f"{longer} of {len(ids)} rows are longer than the {self.limit} tokens that the reward model accepts, "
                "and are truncated at the end. Shorten them, or use a reward model with a longer context."
            )

    @torch.no_grad()
    def of_ids(self, ids: list[list[int]]) -> list[float]:
        """One score per list of token ids (prompt and completion), in order, computed on this process."""
        device = PartialState().device
        home, was_training = self.model.device, self.model.training
        self.model.to(device).eval()
        scores: list[float] = []
        for start in range(0, len(ids), self.batch_size):
            rows = [row[: self.limit] for row in ids[start : start + self.batch_size]]
            batch = self.processing_class.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
            logits = score_sequences(self.model, dict(batch.to(device))).logits
            if logits.ndim != 2:
                raise ValueError(
                    f"The reward model ({type(self.model).__name__}) returns logits of shape {tuple(logits.shape)}; "
                    "expected one or two logits per completion. Pass an `AutoModelForSequenceClassification`."
                )
            scores += logits[:, -1].float().tolist()
        self.model.to(home).train(was_training)
        return scores


__all__ = ["RewardModelScores"]
