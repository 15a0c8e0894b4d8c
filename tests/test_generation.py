"""Completions at evaluations: scores as metrics and in files, and unchanged training."""

import copy
import json
import random

import pytest
import torch
from conftest import cpu_config, paired_rows, unpaired_rows, user, weights
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback

from halos_trl import (
    BradleyTerryConfig,
    DPOConfig,
    DPOTrainer,
    GenerationCallback,
    KTOConfig,
    KTOTrainer,
    cli,
)
from halos_trl.cli.main import main
from halos_trl.report.runs import read_run
from halos_trl.report.samples import before_and_after
from halos_trl.sampling import SamplingSettings

EIGHT_TOKENS = SamplingSettings(max_tokens=8, batch_size=4)


def trainer_of(folder, model, tokenizer, peft_config=None, **settings):
    config = cpu_config(KTOConfig, folder, **{"eval_strategy": "steps", "eval_steps": 1, **settings})
    return KTOTrainer(
        model=model,
        args=config,
        train_dataset=unpaired_rows(24),
        eval_dataset=unpaired_rows(8, seed=1),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def scores_by_call(*means):
    """A reward function that scores the prompts of the n-th call alike, by the n-th of the numbers."""
    calls = iter([mean for mean in means for _ in range(4)])
    return lambda completion: next(calls)


def evaluations(trainer):
    return [line for line in trainer.state.log_history if "eval_loss" in line]


def test_every_evaluation_has_the_mean_score_and_the_win_rate_against_the_start(model, tokenizer, tmp_path):
    trainer = trainer_of(tmp_path, model, tokenizer)
    # Of the start, then of three evaluations: half of the prompts win, one ties; all win; one is left unscored.
    scores = iter([1, 1, 1, 1, 2, 2, 1, 0, 3, 3, 3, 3, None, 0, 2, 1])
    seen = []

    def reward(prompt, completion, label=None):
        seen.append((prompt, completion))
        return next(scores)

    trainer.add_callback(GenerationCallback(trainer, reward, num_prompts=4, sampling=EIGHT_TOKENS))
    trainer.train()
    found = [(line["eval_generation_score"], line["eval_win_rate"]) for line in evaluations(trainer)]
    assert found == [(5 / 4, 2.5 / 4), (3.0, 1.0), (1.0, 1.5 / 3)]
    # The same prompts each time, the first of the evaluation set, and what the report shows of them.
    prompts = trainer.eval_dataset["prompt"][:4]
    assert [prompt for prompt, _ in seen] == [*prompts] * 4
    lines = read_run(tmp_path).generations
    assert [line["step"] for line in lines] == [step for step in (0, 1, 2, 3) for _ in range(4)]
    assert [line["completion"] for line in lines] == [completion for _, completion in seen]
    lengths = [sum(line["tokens"] for line in lines if line["step"] == step) / 4 for step in (1, 2, 3)]
    assert [line["eval_generation_length"] for line in evaluations(trainer)] == lengths
    shown = before_and_after(lines)
    assert (shown.first, shown.last, shown.total, shown.mean_before) == (0, 3, 4, 1.0)


def test_the_run_ends_with_the_weights_that_it_has_without(model, tokenizer, tmp_path):
    """Dropout draws from the generator that a reward draws from too."""
    trained = {}
    for name in ("plain", "sampled"):
        trainer = trainer_of(
            tmp_path / name,
            copy.deepcopy(model),
            tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5),
            disable_dropout=False,
        )
        if name == "sampled":
            trainer.add_callback(GenerationCallback(trainer, _draws, sampling=EIGHT_TOKENS))
        trainer.train()
        trained[name] = weights(trainer.model)
    assert torch.equal(trained["plain"], trained["sampled"])


def _draws(completion):
    """A reward that draws itself."""
    return random.random() + torch.rand(()).item()


class _Order(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.seen.append(metrics.get("eval_generation_score"))


def test_the_score_chooses_the_best_model_and_stops_early(model, tokenizer, tmp_path):
    trainer = trainer_of(
        tmp_path,
        model,
        tokenizer,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_generation_score",
    )
    order = _Order()
    trainer.add_callback(order)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    reward = scores_by_call(0.5, 0.6, 0.9, 0.7, 0.8, 1.0)
    trainer.add_callback(GenerationCallback(trainer, reward, num_prompts=4, sampling=EIGHT_TOKENS))
    trainer.train()
    assert order.seen == pytest.approx([0.6, 0.9, 0.7, 0.8])  # also by callbacks that were added before
    assert trainer.state.global_step == 4 and trainer.state.best_global_step == 2


def test_a_resumed_run_compares_with_the_start_and_keeps_one_line_for_each_step(model, tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    first = trainer_of(tmp_path, copy.deepcopy(model), tokenizer, **settings)
    reward = scores_by_call(0.5, 0.6, 0.9)
    first.add_callback(GenerationCallback(first, reward, num_prompts=4, sampling=EIGHT_TOKENS))
    first.train()
    again = trainer_of(tmp_path, copy.deepcopy(model), tokenizer, **settings)
    again.add_callback(GenerationCallback(again, scores_by_call(0.4), num_prompts=4, sampling=EIGHT_TOKENS))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert evaluations(again)[-1]["eval_win_rate"] == 0.0  # 0.4 against the 0.5 of the start
    lines = [json.loads(line) for line in (tmp_path / "_generations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["score"]) for line in lines[::4]] == [(0, 0.5), (1, 0.6), (2, 0.4)]
    assert len(lines) == 12


def test_an_adapter_samples_with_the_policy_and_trains_on(model, tokenizer, make_config):
    args = make_config(DPOConfig, eval_strategy="steps", eval_steps=2, humanline=True, max_steps=2)
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=paired_rows(24),
        eval_dataset={"one": paired_rows(4, seed=1), "two": paired_rows(4, seed=2)},
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    prompts = [{"prompt": user(f"Sort {text}"), "wanted": text} for text in ("cab", "dac", "cab")]
    asked = []

    def reward(completion, wanted):
        asked.append(wanted)
        return float(len(completion))

    trainer.add_callback(GenerationCallback(trainer, reward, prompts, sampling=EIGHT_TOKENS))
    trainer.train()
    assert asked == ["cab", "dac"] * 2
    (line,) = [line for line in trainer.state.log_history if "eval_generation_score" in line]
    assert "eval_one_loss" in line  # once, with the first of several sets


def test_what_cannot_be_sampled_or_scored_is_refused(model, tokenizer, make_config, tmp_path):
    trainer = trainer_of(tmp_path, model, tokenizer)
    for arguments, message in (
        ({"reward": "nowhere:score"}, "cannot be imported"),
        ({"reward": lambda text: 1.0}, "`completion`"),
        ({"reward": _draws, "num_prompts": 0}, "num_prompts"),
        ({"reward": _draws, "prompts": []}, "no prompts"),
        ({"reward": _draws, "sampling": SamplingSettings(n=2)}, "sampling.n"),
        ({"reward": _draws, "prompts": [{"text": "a"}]}, "Row 0 .* no prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationCallback(trainer, **arguments)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="Pass `prompts`"):
        GenerationCallback(trainer, _draws)


REFUSED = {
    "--generate_on_eval 4": "--eval_strategy",
    "--generate_on_eval 4 --eval_strategy steps": "needs scores for the completions",
    "--generate_on_eval 0 --eval_strategy steps --reward_model x": "at least 1",
    "--generate_on_eval 4 --eval_strategy steps --reward_model x --reward_function y:z": "Leave one",
    "--reward_function y:z": "--generate_on_eval",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_do_not_go_together_are_refused(flags, tmp_path):
    named = ["--model_name_or_path", "a/b", "--dataset_name", "c/d", "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(ValueError, match=REFUSED[flags]):
        cli.parse(KTOConfig, "unpaired", None, [*named, "--output_dir", str(tmp_path), *flags.split()])


def test_a_reward_model_has_no_completions_to_sample(tmp_path):
    flags = ["--generate_on_eval", "4", "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="generates no completions"):
        cli.parse(BradleyTerryConfig, "paired", None, flags)


def test_the_flag_of_the_scripts_samples_and_scores(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    unpaired_rows(12).to_json(tmp_path / "rows" / "train.jsonl")
    unpaired_rows(4, seed=1).to_json(tmp_path / "rows" / "test.jsonl")
    (tmp_path / "rewards.py").write_text("def score(prompt, completion):\n    return float(len(completion))\n")
    flags = {
        **{"model_name_or_path": tmp_path / "tiny", "dataset_name": tmp_path / "rows", "output_dir": tmp_path / "out"},
        **{"generate_on_eval": 3, "generate_max_tokens": 5, "reward_function": f"{tmp_path}/rewards.py:score"},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 2, "report_to": "none"},
        **{"metric_for_best_model": "eval_generation_score", "use_cpu": "true", "bf16": "false"},
        **{"gradient_checkpointing": "false", "per_device_train_batch_size": 4, "disable_tqdm": "true"},
    }
    assert main(["train", "kto", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]) == 0
    run = read_run(tmp_path / "out")
    means = [sum(line["score"] for line in run.generations if line["step"] == step) / 3 for step in (1, 2)]
    assert run.series("eval_generation_score").values == means
    assert max(line["tokens"] for line in run.generations) <= 5
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["best_metric"] == max(means)
