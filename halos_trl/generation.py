"""Completions of a fixed set of prompts at each evaluation, with their scores.

    callback = GenerationCallback(trainer, "rewards.py:score", num_prompts=64)
    trainer.add_callback(callback)

adds `eval_generation_score`, `eval_win_rate` and `eval_generation_length` to the metrics of every evaluation. They can
be used for `metric_for_best_model` and early stopping.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from ._trl import unwrapped_for_generation
from .data.prompts import unique_prompts
from .run_folder import GENERATIONS, read_lines
from .sampling import SamplingSettings, TransformersSampler, samples
from .scoring.function import FunctionScorer
from .scoring.samples import Sample
from .trainers.run import TrainingRun

logger = get_logger(__name__)

Row = dict[str, Any]

_OF_TRAINING = (
    *("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "completion_mask", "chosen_mask", "rejected_mask"),
    *("prompt_mask", "KL_mask", "advantage", "prompt_group", "ref_logps", "ref_chosen_logps", "ref_rejected_logps"),
)
"""Columns added by the trainer."""


class GenerationCallback(TrainerCallback):
    """Samples completions at each evaluation, scores them, and compares them with those from before training.

    Parameters:
        trainer: A trainer of this package that trains a language model.
        reward: Scores a completion: `module:function` or `file.py:function`, a function with a parameter
            `completion` (and `prompt`, or columns of the rows), or a scorer such as
            `halos_trl.scoring.reward_model.RewardModelScorer`. Higher is better.
        prompts: Rows with a `prompt` (a text or a list of messages); by default those of the trainer's (first)
            evaluation set. Equal prompts count once.
        num_prompts: Maximum number of prompts; the first ones are used. By default all.
        sampling: Settings of the sampler, which generates one completion per prompt. By default at most 256 tokens,
            and otherwise the defaults of `SamplingSettings`, in batches of `per_device_eval_batch_size`.

    Before the first step, and at each evaluation whose metrics begin with `eval` (with several evaluation sets, only
    at the first one), every process samples its share of the prompts with the current policy. The main process scores
    the completions and writes `_generations.jsonl`. Metrics: `eval_generation_score`, the mean score; `eval_win_rate`,
    the share of prompts whose score is above that of the sample from before training, where a tie counts half;
    `eval_generation_length`, the mean number of tokens. A completion without a score (the reward returned None) is
    left out of the first two. The completions are logged as a table to W&B and Trackio if these are enabled.

    Every evaluation uses the same seeds, and the random state of the run is restored, so the run ends with the same
    weights as without the callback. A resumed run reads the samples from before training from the file.

    Raises ValueError if there are no prompts, if the trainer samples on its own or does not train a language model, or
    if the reward cannot be called.
    """

    def __init__(
        self,
        trainer: Any,
        reward: str | Callable[..., Any],
        prompts: Iterable[Row] | None = None,
        num_prompts: int | None = None,
        sampling: SamplingSettings | None = None,
    ) -> None:
        _refuse_other_trainers(trainer)
        self.trainer = trainer
        self.scorer = _scorer(reward)
        self.rows = _fixed_prompts(trainer, prompts, num_prompts)
        default = SamplingSettings(max_tokens=256, batch_size=trainer.args.per_device_eval_batch_size)
        self.sampling = sampling or default
        if self.sampling.n != 1:
            raise ValueError(
                f"`sampling.n` is {self.sampling.n}, but one completion is sampled for each prompt. Set it to 1."
            )
        self._start: list[float | None] | None = None

    @property
    def file(self) -> Path:
        return Path(self.trainer.args.output_dir) / GENERATIONS

    # -- where the trainer calls ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample before the first step; a resumed run reads these samples instead."""
        lines: list[Row] = []
        if state.global_step and state.is_world_process_zero:
            lines = [line for line in read_lines(self.file) if line.get("step", 0) <= state.global_step]
        start = _scores_of([line for line in lines if line.get("step") == 0], self.rows)
        found = broadcast_object_list([start])[0]
        if state.is_world_process_zero:
            _write(self.file, lines, "w")
        if found is None:
            if state.global_step:
                logger.warning(
                    f"{self.file} does not contain samples of these prompts from before training, so `eval_win_rate` "
                    f"compares with step {state.global_step}, from which this run resumes."
                )
            made = self._sampled(state.global_step)
            found = made and [line["score"] for line in made]
        self._start = found

    def evaluation_metrics(self, prefix: str) -> dict[str, float]:
        """The metrics of an evaluation whose metrics begin with `prefix`; empty for a prediction, and for all but the
        first of several evaluation sets. All processes must call this.
        """
        sets = self.trainer.eval_dataset
        later = [f"eval_{name}" for name in list(sets)[1:]] if isinstance(sets, dict) else []
        if not prefix.startswith("eval") or prefix in later:
            return {}
        lines = self._sampled(self.trainer.state.global_step)
        scores = [line["score"] for line in lines]
        if self._start is None:  # an evaluation before training
            self._start = scores
        metrics = {"eval_generation_length": sum(line["tokens"] for line in lines) / len(lines)}
        known = [score for score in scores if score is not None]
        if known:
            metrics["eval_generation_score"] = sum(known) / len(known)
        pairs = zip(scores, self._start, strict=True)
        wins = [_win(now, then) for now, then in pairs if now is not None and then is not None]
        if wins:
            metrics["eval_win_rate"] = sum(wins) / len(wins)
        return metrics

    # -- samples and scores --------------------------------------------------------------------------------------

    def _sampled(self, step: int) -> list[Row]:
        """A line of the file for each prompt, on every process."""
        with _random_state_kept():
            completions = self._completions()
            lines = self._scored(step, completions) if self.trainer.accelerator.is_main_process else []
        holder = [lines]
        broadcast_object_list(holder)
        lines = holder[0]
        if self.trainer.accelerator.is_main_process:
            _write(self.file, lines, "a")
            _log_table(lines, self.trainer.args.report_to)
        return lines

    def _completions(self) -> list[Any]:
        """A completion for each prompt, in order. All processes sample equally many, as sharded models require."""
        accelerator = self.trainer.accelerator
        processes, own = accelerator.num_processes, accelerator.process_index
        share = -(-len(self.rows) // processes)
        mine = [self.rows[min(i * processes + own, len(self.rows) - 1)] for i in range(share)]
        with unwrapped_for_generation(self.trainer) as model:
            sampler = TransformersSampler(
                model,
                self.trainer.processing_class,
                replace(self.sampling, seed=self.sampling.seed + own),
                in_step=self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled,
            )
            made = [completions[0] for completions in samples(sampler, mine)]
        gathered = gather_object(made)
        return [gathered[(i % processes) * share + i // processes] for i in range(len(self.rows))]

    def _scored(self, step: int, completions: Sequence[Any]) -> list[Row]:
        lines = [
            {
                "step": step,
                "prompt": row["prompt"],
                "completion": completion.text,
                "score": None,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            for row, completion in zip(self.rows, completions, strict=True)
        ]
        todo = [
            _sample(i, row, line["completion"]) for i, (row, line) in enumerate(zip(self.rows, lines, strict=True))
        ]
        for verdict in self.scorer(list(enumerate(todo))):
            lines[verdict.position]["score"] = verdict.score
        return lines


def _sample(number: int, row: Row, text: str) -> Sample:
    prompt = row["prompt"]
    completion: Any = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    columns = {name: value for name, value in row.items() if name != "prompt"}
    return Sample(f"Prompt {number} of the evaluation", prompt, completion, number, columns)


def _win(now: float, then: float) -> float:
    return 1.0 if now > then else 0.5 if now == then else 0.0


def _refuse_other_trainers(trainer: Any) -> None:
    if not isinstance(trainer, TrainingRun):
        raise ValueError(
            f"{type(trainer).__name__} is not an offline trainer of this package. TRL's online trainers sample and "
            "score completions at each evaluation by themselves. Remove the callback."
        )
    if not getattr(trainer.model, "can_generate", lambda: False)():
        raise ValueError(
            f"{type(trainer).__name__} trains a model that cannot generate completions. Remove the callback."
        )


def _scorer(reward: Any) -> Any:
    if not isinstance(reward, str) and hasattr(reward, "settings"):
        return reward
    return FunctionScorer(reward)


def _fixed_prompts(trainer: Any, prompts: Iterable[Row] | None, number: int | None) -> list[Row]:
    if number is not None and number < 1:
        raise ValueError(f"`num_prompts` must be at least 1, got {number}.")
    data = trainer.eval_dataset if prompts is None else prompts
    if data is None:
        raise ValueError("The trainer has no evaluation set to take prompts from. Pass `prompts`.")
    if isinstance(data, dict):
        data = next(iter(data.values()))
    if not hasattr(data, "__len__"):
        if number is None:
            raise ValueError("The evaluation set is streamed. Pass `num_prompts`, the number of its rows to read.")
        data = itertools.islice(data, number)
    rows = ({name: value for name, value in row.items() if name not in _OF_TRAINING} for row in data)
    found = unique_prompts(rows, "evaluation")[:number]
    if not found:
        raise ValueError("There are no prompts to sample completions for. Pass at least one row in `prompts`.")
    return found


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# -- the file --------------------------------------------------------------------------------------------------------


def _scores_of(lines: Sequence[Row], rows: Sequence[Row]) -> list[float | None] | None:
    """The scores of the prompts of `rows`; None where one is missing."""
    found = {json.dumps(line["prompt"]): line.get("score") for line in lines}
    keys = [json.dumps(row["prompt"]) for row in rows]
    return [found[key] for key in keys] if all(key in found for key in keys) else None


def _write(path: Path, lines: Sequence[Row], mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _log_table(lines: Sequence[Row], report_to: Sequence[str]) -> None:
    """Log the completions of an evaluation as a table to W&B and Trackio, if they are enabled."""
    columns: list[Any] = ["step", "prompt", "completion", "score"]
    values = [[str(line[name]) if name == "prompt" else line[name] for name in columns] for line in lines]
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            table = wandb.Table(columns=columns, data=values)
            wandb.log({"generations": table, "train/global_step": lines[0]["step"]})
    if "trackio" in report_to:
        import pandas
        import trackio

        trackio.log({"generations": trackio.Table(dataframe=pandas.DataFrame(values, columns=columns))})


__all__ = ["GenerationCallback"]
