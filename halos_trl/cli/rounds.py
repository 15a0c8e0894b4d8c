"""`halos-trl rounds METHOD`: repeatedly sample from the policy, label the samples, and train on the feedback.

Every round has a folder with `samples.jsonl`, `feedback.jsonl`, `policy` (the model), `checkpoint-<step>` (for the
next round) and `metrics.json`, which is written last. A restarted run continues with the first unfinished stage.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig, TrlParser

from .. import toy
from .arguments import refuse_unknown, show, split_off_config
from .flags import TOY_DEFAULTS, refuse_half_named
from .label import check_label, label
from .label_flags import LabelArguments
from .methods import METHODS, Method, method_of
from .output import differences, is_finished, read_items
from .round_training import train_round
from .rounds_flags import EMBEDDED, RoundsArguments
from .rounds_report import write_report
from .sample import SampleArguments, prompts_of, settings_of, write_samples
from .train import set_by_the_user

ONLINE = {name: method for name, method in METHODS.items() if name != "reward"}
_FEEDBACK = {"unpaired": "binary", "paired": "pairwise", "scored": "groups"}

HELP = f"""\
usage: halos-trl rounds METHOD [--config FILE.yaml] [--flag [value ...]] ...

Rounds of sampling from the policy, labelling the samples, and training on the feedback. METHOD is one of
{", ".join(ONLINE)}. `halos-trl rounds METHOD --help` lists the flags.
With several processes (`accelerate launch -m halos_trl.cli.main rounds METHOD ...`), the main process samples and
labels."""


@dataclass(frozen=True)
class Rounds:
    """A run: its method, its flags, and its initial model."""

    method: Method
    flags: RoundsArguments
    training: Any
    model: ModelConfig
    start: str
    """Model of the first round."""
    prompts: list[dict[str, Any]]

    @property
    def embedded(self) -> bool:
        return self.flags.dataset_name is None

    def folder(self, number: int) -> Path:
        """The folder of round `number`, counted from 1."""
        return Path(self.training.output_dir) / f"round-{number:02d}"

    def policy(self, number: int) -> str:
        """The policy after round `number`; 0 is the initial model."""
        return str(self.folder(number) / "policy") if number else self.start


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        print(HELP)
        return
    name, words = method_of(words, "rounds", ONLINE)
    run = read_run(name, words)
    settings_of(_sampling(run.flags, "", "", 0))
    check_label(_labelling(run, "", ""))
    if run.training.process_index == 0:
        _check_settings(run)
    run_rounds(run)


def run_rounds(run: Rounds) -> list[dict[str, Any]]:
    """Run all unfinished rounds, and write the report. Returns the metrics of each round."""
    rounds: list[dict[str, Any]] = [_start(run)]
    for number in range(1, run.flags.rounds + 1):
        if not _prompts(run, number):
            if run.training.process_index == 0:
                print(f"There are no prompts left after {number - 1} rounds.")
            break
        rounds.append(_round(run, number))
    if run.training.process_index == 0:
        write_report(Path(run.training.output_dir), rounds)
    return rounds


# ----------------------------------------------------------------------------------------------------------- the flags


def read_run(name: str, words: list[str]) -> Rounds:
    """The run that the command line specifies. Raises ValueError for invalid settings, before any model is loaded."""
    method = METHODS[name]
    types: Any = (RoundsArguments, method.config, ModelConfig)
    usage = f"halos-trl rounds {name} [--config FILE.yaml] [--flag [value ...]] ..."
    parser: Any = TrlParser(types, usage=usage, description=RoundsArguments.__doc__)
    words, config = split_off_config(words)
    given = refuse_unknown(parser, words, config)
    has_model, has_data = (bool(given[n] or config.get(n)) for n in ("model_name_or_path", "dataset_name"))
    refuse_half_named(has_model, has_data)
    if not has_model:
        parser.set_defaults_with_config(**(TOY_DEFAULTS | dict(method.toy) | EMBEDDED))
    flags, training, model = parser.parse_args_and_config(args=words)
    _refuse_what_cannot_work(flags, training, model, method)
    if training.process_index == 0:
        show(set_by_the_user(flags, training, model), f"rounds {name}")
    if has_model:
        return Rounds(
            method, flags, training, model, model.model_name_or_path, prompts_of(_sampling(flags, "", "", 0))
        )
    with PartialState().main_process_first():
        start = toy.load_model_path(seed=training.seed)
    texts = toy.make_prompts(flags.rounds * flags.prompts_per_round, training.seed, "feedback")
    prompts = [{"prompt": [{"role": "user", "content": text}], "prompt_id": i} for i, text in enumerate(texts)]
    return Rounds(method, flags, training, model, start, prompts)


def _refuse_what_cannot_work(flags: RoundsArguments, training: Any, model: ModelConfig, method: Method) -> None:
    for name in ("rounds", "prompts_per_round", "samples_per_prompt"):
        if getattr(flags, name) < 1:
            raise ValueError(f"`--{name} {getattr(flags, name)}` must be at least 1.")
    if method.feedback != "unpaired" and flags.samples_per_prompt < 2:
        raise ValueError(
            f"`--samples_per_prompt {flags.samples_per_prompt}`: this method compares samples of the same prompt, so "
            "at least 2 are needed."
        )
    if model.use_peft and flags.reference == "previous" and getattr(method.trainer, "needs_reference", False):
        raise ValueError(
            "`--use_peft` keeps the base model as the reference in every round. Pass `--reference first`, or train "
            "the whole model."
        )
    if not (flags.reward_function or flags.reward_model or flags.judge_model):
        raise ValueError(
            "There is no scorer for the samples. Pass `--reward_function`, `--reward_model` or `--judge_model`."
        )
    if training.save_only_model or training.resume_from_checkpoint:
        raise ValueError(
            "`--save_only_model` and `--resume_from_checkpoint` cannot be used with rounds: each round continues "
            "from the complete checkpoint of the previous one, and a restarted run resumes automatically. Leave "
            "them out."
        )


def _check_settings(run: Rounds) -> None:
    """Store the settings of a new run, and refuse to resume with others. Raises a ValueError that names them."""
    path = Path(run.training.output_dir) / "settings.yaml"
    settings = json.loads(json.dumps(set_by_the_user(run.flags, run.training, run.model), default=str))
    free = ("output_dir", "run_name", "logging_dir", "local_rank", "disable_tqdm", "report_to")
    settings = {name: value for name, value in settings.items() if name not in free} | {
        "method": run.method.trainer.__name__,
        "start": run.start,
    }
    if path.exists():
        differing = differences(yaml.safe_load(path.read_text("utf-8")), settings)
        if differing:
            raise ValueError(
                f"`{path.parent}` was started with other settings: {'; '.join(differing)}. Use those, or choose "
                "another `--output_dir`."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "utf-8")


# ---------------------------------------------------------------------------------------------------------- the rounds


def _prompts(run: Rounds, number: int) -> list[dict[str, Any]]:
    size = run.flags.prompts_per_round
    return run.prompts[(number - 1) * size : number * size]


def _start(run: Rounds) -> dict[str, Any]:
    """The initial model of the run."""
    path = run.folder(0).with_name("start.json")
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    metrics = {"round": 0, "accuracy": toy.accuracy(*_loaded(run.start))} if run.embedded else {"round": 0}
    if run.training.process_index == 0:
        _write(path, metrics)
    return metrics


def _round(run: Rounds, number: int) -> dict[str, Any]:
    folder = run.folder(number)
    done = folder / "metrics.json"
    if done.exists():
        return json.loads(done.read_text("utf-8"))
    state, begun = PartialState(), time.perf_counter()
    if state.is_main_process:
        _sample_and_label(run, number)
    state.wait_for_everyone()
    rows = Dataset.from_list(list(read_items(folder / "feedback.jsonl")))
    found = train_round(run, number, rows)
    if run.embedded:
        found["accuracy"] = toy.accuracy(*_loaded(run.policy(number)))
    scores = [item["score"] for item in read_items(folder / "feedback.jsonl.scores") if item.get("score") is not None]
    metrics = {
        "round": number,
        "prompts": len(_prompts(run, number)),
        "samples": len(scores),
        "rows": len(rows),
        "mean_score": sum(scores) / len(scores),
        **found,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    if state.is_main_process:
        _write(done, metrics)
        shown = f"accuracy {metrics['accuracy']:.3f}" if run.embedded else f"mean score {metrics['mean_score']:.4g}"
        print(f"round {number}: {len(scores)} samples, {len(rows)} rows of feedback, {shown}", flush=True)
    state.wait_for_everyone()
    return metrics


def _sample_and_label(run: Rounds, number: int) -> None:
    folder, flags = run.folder(number), run.flags
    samples, feedback = folder / "samples.jsonl", folder / "feedback.jsonl"
    if not is_finished(samples):
        arguments = _sampling(flags, str(samples), run.policy(number - 1), run.training.seed * 10_007 + number)
        arguments.logprobs = getattr(run.training, "old_policy", None) == "sampler"
        write_samples(arguments, settings_of(arguments), _prompts(run, number))
    if not feedback.exists():
        print(label(_labelling(run, str(samples), str(feedback))))


def _labelling(run: Rounds, samples: str, output: str) -> LabelArguments:
    flags, kind = run.flags, _FEEDBACK[run.method.feedback]
    return LabelArguments(
        samples=[samples],
        output=output,
        feedback=kind,
        threshold=None if kind == "groups" else flags.threshold if kind == "binary" else _gap(run),
        pair_mode=flags.pair_mode,
        seed=run.training.seed,
        reward_function=flags.reward_function,
        reward_model=flags.reward_model,
        judge_model=flags.judge_model,
        judge_url=flags.judge_url,
    )


def _gap(run: Rounds) -> str | None:
    """The threshold for pairs; the embedded task's threshold is for labels."""
    return None if run.embedded and run.flags.threshold == EMBEDDED["threshold"] else run.flags.threshold


def _sampling(flags: RoundsArguments, output: str, model: str, seed: int) -> SampleArguments:
    return SampleArguments(
        output=output,
        model_name_or_path=model,
        dataset_name=flags.dataset_name,
        dataset_config=flags.dataset_config,
        dataset_split=flags.dataset_split,
        num_samples_per_prompt=flags.samples_per_prompt,
        temperature=flags.temperature,
        top_p=flags.top_p,
        max_tokens=flags.max_tokens,
        stop=flags.stop,
        seed=seed,
        batch_size=flags.sample_batch_size,
        engine=flags.engine,
    )


def _loaded(path: str) -> tuple[Any, Any]:
    from ..sampling import load_sampler

    return load_sampler(path)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    partial.replace(path)


__all__ = ["ONLINE", "Rounds", "main", "read_run", "run_rounds"]
