"""The files that every run writes for the report: statistics of the data, settings, log lines."""

import json
from pathlib import Path

import datasets
import pytest
from conftest import assistant, unpaired_rows, user

from halos_trl import KTOConfig, KTOTrainer
from halos_trl.run_folder import DATA_SUMMARY, RUN_SUMMARY, TRAIN_LOG, read_lines


def labelled(*rows):
    return datasets.Dataset.from_list(
        [{"prompt": user(p), "completion": assistant(c), "label": good} for p, c, good in rows]
    )


def written(trainer, name):
    return json.loads((Path(trainer.args.output_dir) / name).read_text())


def test_statistics_of_the_data(model, tokenizer, make_config):
    """Letters are one token each, and a completion ends with the end token: `abc` has four."""
    train = labelled(
        ("Sort ba", "ab", True), ("Sort ba", "ba", False), ("Sort cab", "abc", True), ("Sort dcba", "abcd", True)
    )
    evaluation = labelled(
        ("Sort ba", "ab", True), ("Sort ba", "b", False), ("Sort cab", "abc", False), ("Sort fe", "ef", True)
    )
    trainer = KTOTrainer(
        model, args=make_config(KTOConfig, max_steps=1), train_dataset=train, eval_dataset=evaluation,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    found = written(trainer, DATA_SUMMARY)
    assert (found["train"]["rows"], found["train"]["prompts"]) == (4, 3)
    assert found["train"]["labels"] == {"desirable": 3, "undesirable": 1}
    lengths = found["train"]["lengths"]["completion"]
    assert (lengths["min"], lengths["median"], lengths["max"], lengths["mean"]) == (3, 3.5, 5, 3.75)
    # Prompts ba and cab of ba, cab, fe; rows (ba, ab) and (cab, abc), whatever their labels.
    assert found["overlap"]["eval"] == {"prompts": 3, "shared_prompts": 2, "rows": 4, "shared_rows": 2}


def test_dropped_and_cut_rows_are_noted(model, tokenizer, make_config):
    """The prompt `ba` has 6 tokens, so of 9 the completion `abcdefg` keeps three; the long prompt leaves no room."""
    long = "a" * 12
    train = labelled(("Sort ba", "a", True), ("Sort ba", "abcdefg", True), (f"Sort {long}", "b", False))
    trainer = KTOTrainer(
        model, args=make_config(KTOConfig, max_steps=1, max_length=9), train_dataset=train, processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    found = written(trainer, DATA_SUMMARY)["train"]
    assert found["rows"] == 2
    notes = sorted((text.split("`max_length`")[0].strip(), count) for text, count in found["notes"].items())
    assert notes == [("dropped: their prompt alone fills", 1), ("have a completion that is truncated at", 1)]


def test_settings_and_log_lines(model, tokenizer, make_config):
    args = make_config(KTOConfig, beta=0.3, logging_steps=1, max_steps=3, hub_token="hf_secret")
    trainer = KTOTrainer(model, args=args, train_dataset=unpaired_rows(12), processing_class=tokenizer)
    trainer.train()
    summary = written(trainer, RUN_SUMMARY)
    assert (summary["status"], summary["trainer"], summary["steps"]) == ("finished", "KTOTrainer", 3)
    assert summary["settings"]["beta"] == 0.3 and "beta" in summary["changed"]
    assert "desirable_weight" not in summary["changed"]
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert "hf_secret" not in json.dumps(summary)

    log = read_lines(Path(args.output_dir) / TRAIN_LOG)
    stamps = [(line.pop("seconds"), line.pop("memory_bytes")) for line in log]
    assert log == json.loads(json.dumps(trainer.state.log_history))
    assert [seconds for seconds, _ in stamps] == sorted(seconds for seconds, _ in stamps) and stamps[0][1] > 0


def test_an_error_is_recorded(model, tokenizer, make_config):
    trainer = KTOTrainer(
        model, args=make_config(KTOConfig), train_dataset=unpaired_rows(12), processing_class=tokenizer
    )  # fmt: skip

    def broken(*arguments, **named):
        raise RuntimeError("no more")

    trainer.training_step = broken
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert written(trainer, RUN_SUMMARY)["error"] == "RuntimeError: no more"


def test_lines_end_at_an_incomplete_one(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n{"ste')
    assert read_lines(path) == [{"step": 1}, {"step": 3}]
