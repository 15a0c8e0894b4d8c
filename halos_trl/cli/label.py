"""`halos-trl label`: from samples to feedback. Scores are appended to a file as they are computed, and labels derived
at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from trl import DatasetMixtureConfig, ScriptArguments

from ..data.feedback.files import read_items
from ..data.labelling import binary_threshold, group_positions, score_problem
from ..scoring.feedback import Rule, feedback_rows
from ..scoring.samples import Sample, Samples, read_samples
from ..scoring.verdict import Scorer, Verdict
from .arguments import read_arguments
from .data import load_data
from .label_flags import LabelArguments
from .output import OutputFile, begun_with


@dataclass
class LabelReport:
    """Statistics of a run."""

    output: Path
    rows: int
    """Number of rows in the output."""
    samples: int
    empty: int
    """Number of samples left out because of an empty completion; not included in `samples`."""
    scores: list[float]
    unscored: Counter[str]
    """Number of samples without a score, by reason."""
    rule: Rule
    groups: int
    """Number of distinct prompts."""
    single: int
    """Number of prompts with a single scored sample, which yields no pair."""

    def __str__(self) -> str:
        counts = f"{_counted(self.samples, 'sample')} of {_counted(self.groups, 'prompt')}"
        lines = [f"{counts}: {len(self.scores)} scored{self._mean()}."]
        if self.empty:
            lines.append(f"{_counted(self.empty, 'sample')} left out: empty completion.")
        lines += [f"{_counted(n, 'sample')} left out: {reason}." for reason, n in self.unscored.most_common()]
        lines.append(f"Wrote {self._what()} to {self.output}.")
        return "\n".join(lines)

    def _mean(self) -> str:
        if not self.scores:
            return ""
        mean = sum(self.scores) / len(self.scores)
        return f", {min(self.scores):.4g} to {max(self.scores):.4g}, mean {mean:.4g}"

    def _what(self) -> str:
        rule = self.rule
        if rule.kind == "binary":
            bound = binary_threshold(self.scores, "median" if rule.threshold is None else rule.threshold)
            desirable = sum(score >= bound for score in self.scores)
            sides = f"{desirable} desirable, {self.rows - desirable} undesirable"
            one_sided = "; methods on labels need both" if desirable in (0, self.rows) else ""
            return f"{_counted(self.rows, 'label')} (threshold {bound:.6g}: {sides}{one_sided})"
        if rule.kind == "pairwise":
            without = f"; {_counted(self.single, 'prompt')} with a single sample" if self.single else ""
            bound = float(rule.threshold or 0)
            return f"{_counted(self.rows, 'pair')} ({rule.pair_mode}, difference above {bound:g}{without})"
        return _counted(self.rows, "score" if rule.kind == "scalar" else "group")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("`halos-trl label` runs in one process. Start it without `accelerate launch` or `torchrun`.")
    print(label(read_arguments(LabelArguments, argv, "label")))


def label(arguments: LabelArguments) -> LabelReport:
    """Score samples, turn the scores into feedback, and write it.

    Scores are appended to `<output>.scores` as they are computed, so an interrupted run continues when it is called
    again with the same settings. Raises ValueError for invalid settings or samples. The output is written once all
    samples are scored.
    """
    output = _checked_output(arguments)
    scorer = _scorer(arguments)
    found = read_samples(_rows(arguments))
    if not found.samples:
        raise ValueError(f"{', '.join(arguments.samples)}: there are no samples with a completion.")
    for sample in found.samples:
        _check_writable(sample, with_columns=arguments.feedback == "scalar")
    if scorer is None:
        verdicts = [Verdict(i, _given_score(sample)) for i, sample in enumerate(found.samples)]
        return _write(arguments, output, found, verdicts)
    with _scores_file(arguments, output, scorer, found.samples) as file:
        verdicts = _score(scorer, found.samples, file)
        return _write(arguments, output, found, verdicts)


# -- settings --------------------------------------------------------------------------------------------------------


def check_label(arguments: LabelArguments) -> None:
    """Raise ValueError for invalid settings of labels or scorer, without reading samples. Loads a reward model."""
    _check_threshold(arguments)
    _scorer(arguments)


def _checked_output(arguments: LabelArguments) -> Path:
    if not arguments.samples:
        raise ValueError("There are no samples to label. Pass files of samples with `--samples`.")
    output = Path(arguments.output)
    if output.suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"`--output {output}` ends in {output.suffix!r}; expected `.jsonl` (JSON Lines) or `.json` (an array)."
        )
    if output.exists() and not arguments.overwrite:
        raise ValueError(f"`--output {output}` exists. Pass `--overwrite` to replace it, or choose another file.")
    if any(Path(name).resolve() == output.resolve() for name in arguments.samples):
        raise ValueError(f"`--output {output}` is one of the inputs. Choose another file.")
    if arguments.format == "halos" and arguments.feedback == "groups":
        raise ValueError("HALOs has no format for groups. Use `--feedback scalar`, which HALOs groups itself.")
    _check_threshold(arguments)
    return output


def _check_threshold(arguments: LabelArguments) -> None:
    """Check the threshold before anything is scored."""
    rule = _rule(arguments)
    if rule.kind in ("scalar", "groups"):
        if rule.threshold is not None:
            raise ValueError(f"`--threshold` has no effect on `--feedback {rule.kind}`. Leave it out.")
        return
    first = Sample("", [{"role": "user", "content": ""}], "", 0)
    feedback_rows([first], [0.0], rule, "trl")


def _rule(arguments: LabelArguments) -> Rule:
    return Rule(arguments.feedback, arguments.threshold, arguments.pair_mode, arguments.seed)  # type: ignore[arg-type]


def _chosen_scorer(arguments: LabelArguments) -> str | None:
    chosen = [n for n in ("reward_model", "reward_function", "judge_model") if getattr(arguments, n) is not None]
    if len(chosen) > 1:
        raise ValueError(f"Both `--{chosen[0]}` and `--{chosen[1]}` are given. Choose one of them.")
    return chosen[0] if chosen else None


def _scorer(arguments: LabelArguments) -> Scorer | None:
    """Create the scorer. Modules are imported here, since reward models need imports that the others do not."""
    _chosen_scorer(arguments)
    if arguments.reward_model is not None:
        from ..scoring.reward_model import RewardModelScorer

        return RewardModelScorer(arguments.reward_model, arguments.batch_size, arguments.max_length, arguments.dtype)
    if arguments.reward_function is not None:
        from ..scoring.function import FunctionScorer

        return FunctionScorer(arguments.reward_function)
    return _judge(arguments) if arguments.judge_model is not None else None


def _judge(arguments: LabelArguments) -> Scorer:
    from ..scoring.chat_client import ChatClient
    from ..scoring.judge import PATTERN, TEMPLATE, JudgePrompt, JudgeScorer

    options: Any = arguments.judge_options  # in a config file, it may be a mapping
    try:
        options = json.loads(options) if isinstance(options, str) else options
    except ValueError as error:
        raise ValueError(f"`--judge_options {arguments.judge_options}` is not JSON: {error}.") from None
    if not isinstance(options, dict):
        raise ValueError(f"`--judge_options {arguments.judge_options}` is not a JSON object.")
    template = TEMPLATE
    if arguments.judge_template is not None:
        try:
            template = Path(arguments.judge_template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"`--judge_template {arguments.judge_template}` cannot be read: {error}.") from None
    variable = arguments.judge_key_variable
    key = os.environ.get(variable) or None
    if key is None and variable != "OPENAI_API_KEY":
        raise ValueError("The environment variable that `--judge_key_variable` names is not set.")
    client = ChatClient(
        arguments.judge_url,
        str(arguments.judge_model),
        key,
        options,
        timeout=arguments.judge_timeout,
        retries=arguments.judge_retries,
    )
    return JudgeScorer(client, JudgePrompt(template, arguments.judge_pattern or PATTERN), arguments.judge_concurrency)


# -- the input -------------------------------------------------------------------------------------------------------


def _rows(arguments: LabelArguments) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in arguments.samples:
        if Path(name).suffix in (".json", ".jsonl"):
            yield from _file_rows(name)
        else:
            yield from _dataset_rows(name, arguments)


def _file_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for item in read_items(name):
        yield item.where, item.value


def _dataset_rows(name: str, arguments: LabelArguments) -> Iterator[tuple[str, dict[str, Any]]]:
    flags = ScriptArguments(dataset_name=name, dataset_config=arguments.dataset_config)
    splits = load_data(flags, DatasetMixtureConfig())
    if arguments.dataset_split not in splits:
        raise ValueError(
            f"`--dataset_split {arguments.dataset_split}`: {name} has the splits {', '.join(map(str, splits))}."
        )
    for number, row in enumerate(splits[arguments.dataset_split]):
        yield f"Row {number} of {name} ({arguments.dataset_split})", row


def _check_writable(sample: Sample, with_columns: bool) -> None:
    """Check before scoring that samples can be written as JSON: rows may contain other types, and texts lone
    surrogates.
    """
    written = {"prompt": sample.prompt, "completion": sample.completion, **(sample.columns if with_columns else {})}
    for name, value in written.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{sample.where} has a `{name}` that cannot be written as JSON: {error}. Fix the value, or remove "
                "the column."
            ) from None


def _given_score(sample: Sample) -> float:
    if sample.given_score is None:
        raise ValueError(
            f"{sample.where} has neither `reward` nor `score`, and no scorer was given. Pass `--reward_function`, "
            "`--reward_model` or `--judge_model`."
        )
    if problem := score_problem(sample.given_score):
        raise ValueError(f"{sample.where} has an invalid score: {problem}.")
    return float(sample.given_score)


# -- scores ----------------------------------------------------------------------------------------------------------


def _scores_file(arguments: LabelArguments, output: Path, scorer: Scorer, samples: Sequence[Sample]) -> OutputFile:
    digest = hashlib.sha256()
    for sample in samples:
        content = [sample.prompt, sample.completion, sample.group, sample.columns]
        digest.update(json.dumps(content, sort_keys=True, default=repr).encode())
    settings = {"samples": arguments.samples, "content": digest.hexdigest()[:16], **scorer.settings}
    path = output.with_name(f"{output.name}.scores")
    # Scores are expensive: those computed with the same settings are kept when the output is replaced.
    anew = arguments.overwrite and begun_with(path) != settings
    return OutputFile(path, settings, overwrite=anew, reopen=True)


def _score(scorer: Scorer, samples: Sequence[Sample], file: OutputFile) -> list[Verdict]:
    """A verdict for each sample, in order: those in the file, and the missing ones, which are appended."""
    verdicts = {item["position"]: Verdict(**item) for item in file.items()} if file.count else {}
    todo = [(position, sample) for position, sample in enumerate(samples) if position not in verdicts]
    with tqdm(total=len(samples), initial=len(verdicts), desc="scoring", unit="sample") as bar:
        for verdict in scorer(todo):
            if verdict.score is not None and (problem := score_problem(verdict.score)):
                raise ValueError(f"The score of {samples[verdict.position].where} is invalid: {problem}.")
            file.write(
                {name: value for name, value in verdict._asdict().items() if value is not None or name == "score"}
            )
            verdicts[verdict.position] = verdict
            bar.update()
    return [verdicts[position] for position in range(len(samples))]


# -- the output ------------------------------------------------------------------------------------------------------


def _write(arguments: LabelArguments, output: Path, found: Samples, verdicts: list[Verdict]) -> LabelReport:
    scored = [(found.samples[v.position], v.score) for v in verdicts if v.score is not None]
    unscored = Counter(_general(verdict.reason) for verdict in verdicts if verdict.score is None)
    if not scored:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in unscored.most_common())
        raise ValueError(f"None of the {len(verdicts)} samples was scored, so there is no feedback ({reasons}).")
    samples, scores = [sample for sample, _ in scored], [score for _, score in scored]
    rule = _rule(arguments)
    rows = feedback_rows(samples, scores, rule, arguments.format)  # type: ignore[arg-type]
    if not rows:
        raise ValueError(
            f"The {len(scores)} scores yield no pair: prompts have a single scored sample, or scores that differ by "
            f"no more than {float(rule.threshold or 0):g}. Sample more per prompt, or lower `--threshold`."
        )
    _write_rows(output, rows)
    members = group_positions([sample.group for sample in samples])
    return LabelReport(
        output=output,
        rows=len(rows),
        samples=len(found.samples),
        empty=found.empty,
        scores=scores,
        unscored=unscored,
        rule=rule,
        groups=len(group_positions([sample.group for sample in found.samples])),
        single=sum(len(group) == 1 for group in members),
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _general(reason: str | None) -> str:
    """The reason, without the details of the individual sample."""
    return str(reason).split(":")[0]


def _write_rows(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows atomically."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if output.suffix == ".json" else "\n".join(lines) + "\n"
    partial.write_text(text, "utf-8")
    partial.replace(output)


__all__ = ["LabelReport", "check_label", "label", "main"]
