"""`halos-trl label`: input and output files, refusals, interrupted and resumed runs."""

import dataclasses
import datetime
import json
import multiprocessing
import re
import time
from pathlib import Path

import pytest
from datasets import Dataset
from judge_server import Behaviour, judge_server

from halos_trl.cli.label import label
from halos_trl.cli.label_flags import LabelArguments
from halos_trl.cli.main import main

KEY = "sk-secret-0123456789"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(prompt, number, output, **columns):
    prompt_turns = [{"role": "user", "content": f"prompt {prompt}"}]
    return {"prompt_id": prompt, "sample_id": number, "prompt": prompt_turns, "output": output, **columns}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(**settings):
    return label(LabelArguments(**{"samples": ["samples.jsonl"], "output": "out.jsonl"} | settings))


@pytest.fixture
def rows(folder):
    """Two prompts of three samples; `length` scores them 1, 2, 4 and 3, 5, 3."""
    (folder / "rewards.py").write_text("def length(completion): return len(completion)\n")
    outputs = [["a", "bb", "cccc"], ["ddd", "eeeee", "fff"]]
    return write(
        folder / "samples.jsonl",
        [sample(p, n, output) for p, group in enumerate(outputs) for n, output in enumerate(group)],
    )


def test_labels_of_a_function(rows, folder):
    report = run(reward_function="rewards.py:length", threshold="3.5")
    out = read(folder / "out.jsonl")
    assert [row["label"] for row in out] == [False, False, True, False, True, False]
    assert out[1] == {
        "prompt": rows[1]["prompt"],
        "completion": [{"role": "assistant", "content": "bb"}],
        "label": False,
    }
    assert str(report) == (
        "6 samples of 2 prompts: 6 scored, 1 to 5, mean 3.\n"
        "Wrote 6 labels (threshold 3.5: 2 desirable, 4 undesirable) to out.jsonl."
    )


def test_scores_are_labelled_again_without_scoring(rows, folder):
    run(reward_function="rewards.py:length", feedback="scalar", output="scores.json", format="halos")
    assert json.loads((folder / "scores.json").read_text())[2] == rows[2] | {
        "output": [{"role": "assistant", "content": "cccc"}],
        "reward": 4.0,
        "type": "scalar_feedback",
    }
    report = run(samples=["scores.json"], output="pairs.jsonl", feedback="pairwise", threshold="2")
    (pair,) = read(folder / "pairs.jsonl")
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("cccc", "a")
    assert "Wrote 1 pair (max, difference above 2) to pairs.jsonl" in str(report)


def test_datasets_and_lists_of_completions(folder):
    rows = [{"prompt": "2 + 2 =", "completions": [" 4", " 5"], "answer": " 4"}]
    Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    (folder / "rewards.py").write_text("def right(completion, answer): return float(completion == answer)\n")
    run(samples=["data.parquet"], reward_function="rewards.py:right", feedback="groups")
    assert read(folder / "out.jsonl") == [{"prompt": "2 + 2 =", "completions": [" 4", " 5"], "scores": [1.0, 0.0]}]


def test_what_is_left_out_is_counted(folder):
    write(folder / "samples.jsonl", [sample(0, i, text) for i, text in enumerate(["a", "", "b", "none"])])
    (folder / "rewards.py").write_text("def score(completion): return None if completion == 'none' else 1\n")
    report = run(reward_function="rewards.py:score", feedback="scalar")
    assert len(read(folder / "out.jsonl")) == 2
    left_out = "1 sample left out: empty completion.\n1 sample left out: the function returned None.\n"
    assert left_out in str(report)
    (folder / "rewards.py").write_text("def score(completion): return None\n")
    with pytest.raises(ValueError, match=r"None of the 3 samples was scored.*3: the function returned None"):
        run(reward_function="rewards.py:score", output="other.jsonl")
    assert not (folder / "other.jsonl").exists()


# -- stopped and gone on with ----------------------------------------------------------------------------------------


def test_a_run_that_failed_goes_on_where_it_was(rows, folder):
    (folder / "rewards.py").write_text(
        "import os, pathlib\n"
        "def length(completion):\n"
        "    with open('calls', 'a') as calls: calls.write(completion + ' ')\n"
        "    if completion == 'cccc' and not os.path.exists('ready'): raise RuntimeError('not ready')\n"
        "    return len(completion)\n"
    )
    with pytest.raises(ValueError, match=r"RuntimeError for samples\.jsonl, item 2 \(line 3\): not ready"):
        run(reward_function="rewards.py:length")
    assert not (folder / "out.jsonl").exists()
    (folder / "ready").touch()
    run(reward_function="rewards.py:length")
    assert (folder / "calls").read_text().split() == ["a", "bb", "cccc", "cccc", "ddd", "eeeee", "fff"]
    assert len(read(folder / "out.jsonl")) == 6


def test_other_samples_or_settings_are_not_mixed_with_old_scores(rows, folder):
    (folder / "rewards.py").write_text(
        "def length(completion):\n"
        "    with open('calls', 'a') as calls: calls.write(completion + ' ')\n"
        "    return len(completion)\n"
    )
    run(reward_function="rewards.py:length", threshold="2")
    with pytest.raises(ValueError, match=r"`--output out\.jsonl` exists"):
        run(reward_function="rewards.py:length", threshold="2")
    # The same scores, labelled otherwise; the scorer is not called.
    run(reward_function="rewards.py:length", threshold="5", overwrite=True)
    assert sum(row["label"] for row in read(folder / "out.jsonl")) == 1
    assert len((folder / "calls").read_text().split()) == 6
    (folder / "out.jsonl").unlink()
    (folder / "rewards.py").write_text("def length(completion): return -len(completion)\n")
    with pytest.raises(
        ValueError, match=r"out\.jsonl\.scores` was started with other settings: `function_source` was"
    ):
        run(reward_function="rewards.py:length")
    write(folder / "samples.jsonl", rows[:4])
    with pytest.raises(ValueError, match="`content` was"):
        run(reward_function="rewards.py:length")
    run(reward_function="rewards.py:length", overwrite=True, feedback="scalar")
    assert [row["score"] for row in read(folder / "out.jsonl")] == [-1, -2, -4, -3]


def test_nothing_is_lost_or_asked_twice_when_the_process_is_killed(folder, monkeypatch):
    n = 40
    write(folder / "samples.jsonl", [sample(i, 0, f"answer {i}") for i in range(n)])
    (folder / "ask.txt").write_text("{completion}")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def behave(text, number):
        i = int(text.split()[-1])
        if number == 0 and i % 7 == 1:  # fails once
            return Behaviour(status=429, headers={"Retry-After": "0"}) if i % 2 else Behaviour(drop=True)
        return Behaviour("no idea" if i == 5 else f"Score: {i % 10}", delay=0.05)

    with judge_server(behave) as (url, log):
        settings = {"judge_model": "m", "judge_url": url, "judge_template": "ask.txt", "judge_concurrency": 3}
        # Forked, since a new interpreter takes seconds to import everything.
        process = multiprocessing.get_context("fork").Process(target=run, kwargs={"feedback": "scalar", **settings})
        process.start()
        while len(log.answered) < 12:
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        kept = [item["position"] for item in read(folder / "out.jsonl.scores")]
        asked_before = len(log.texts)
        run(feedback="scalar", **settings)
        asked_after = {int(text.split()[-1]) for text in log.texts[asked_before:]}
        answered = [int(text.split()[-1]) for text in log.answered]
    assert 0 < len(kept) < n
    assert asked_after == set(range(n)) - set(kept)
    # Only what the kill caught on its way back is answered a second time.
    assert sorted(set(answered)) == list(range(n)) and len(answered) <= n + 3
    scores = {row["prompt_id"]: row["score"] for row in read(folder / "out.jsonl")}
    assert scores == {i: i % 10 for i in range(n) if i != 5}
    assert all(KEY.encode() not in path.read_bytes() for path in folder.rglob("*") if path.is_file())


# -- the command -----------------------------------------------------------------------------------------------------


def test_flags_and_config_files(rows, folder, capsys):
    (folder / "label.yaml").write_text(
        "samples: samples.jsonl\nreward_function: rewards.py:length\nthreshold: 3.5\njudge_options: {top_p: 1}\n"
    )
    assert main(["label", "--config", "label.yaml", "--output", "labels.json"]) == 0
    printed = capsys.readouterr()
    assert "threshold: 3.5\n" in printed.err and "to labels.json.\n" in printed.out
    assert [row["label"] for row in json.loads((folder / "labels.json").read_text())] == [0, 0, 1, 0, 1, 0]


def test_errors_are_one_line_and_those_of_functions_a_traceback(rows, folder, capsys):
    assert main(["label", "--feedback", "pairwise", "--threshold", "mean"]) == 2
    assert capsys.readouterr().err.endswith("halos-trl label: The threshold is 'mean'; expected a number.\n")
    (folder / "rewards.py").write_text("def length(completion): return {}[completion]\n")
    with pytest.raises(ValueError, match="raised KeyError for samples") as error:
        main(["label", "--reward_function", "rewards.py:length"])
    assert isinstance(error.value.__cause__, KeyError)


def test_several_processes_are_refused(rows, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["label", "--reward_function", "rewards.py:length"]) == 2
    assert "runs in one process" in capsys.readouterr().err


def test_flags_in_the_documentation_exist():
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    lines = [
        line
        for page in pages
        for line in page.read_text().replace("\\\n", " ").splitlines()
        if line.startswith("halos-trl label ")
    ]
    flags = {flag for line in lines for flag in re.findall(r"--(\w+)", line)}
    assert flags and flags <= {field.name for field in dataclasses.fields(LabelArguments)}


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": []}, "no samples to label"),
        ({"output": "out.csv"}, "ends in '.csv'"),
        ({"output": "samples.jsonl", "overwrite": True}, "is one of the inputs"),
        ({"samples": ["nowhere.jsonl"]}, "nowhere.jsonl cannot be opened"),
        ({"samples": ["nowhere.parquet"]}, "nowhere.parquet"),
        ({"threshold": "median", "feedback": "pairwise"}, "'median'; expected a number"),
        ({"threshold": "1", "feedback": "scalar"}, "no effect on `--feedback scalar`"),
        ({"feedback": "groups", "format": "halos"}, "no format for groups"),
        ({"reward_function": "rewards.py:length", "judge_model": "m"}, "Both `--reward_function` and `--judge_model`"),
        ({"judge_model": "m", "judge_options": "{"}, "is not JSON"),
        ({"judge_model": "m", "judge_options": "[]"}, "not a JSON object"),
        ({"judge_model": "m", "judge_key_variable": "NO_SUCH_KEY"}, "`--judge_key_variable` names is not set"),
        ({"judge_model": "m", "judge_template": "nowhere.txt"}, "nowhere.txt` cannot be read"),
        ({}, r"item 0 \(line 1\) has neither `reward` nor `score`"),
    ],
)
def test_settings_that_cannot_work_are_refused(rows, folder, settings, message):
    with pytest.raises(ValueError, match=message):
        run(**settings)
    assert sorted(path.name for path in folder.iterdir()) == ["rewards.py", "samples.jsonl"]


@pytest.mark.parametrize("score", ["0.5", True, float("nan"), float("inf")])
def test_scores_that_are_no_finite_numbers_are_refused_by_item(folder, score):
    write(folder / "samples.jsonl", [sample(0, 0, "a", reward=1.0), sample(0, 1, "b", reward=score)])
    with pytest.raises(ValueError, match=r"samples\.jsonl, item 1 \(line 2\) has an invalid score"):
        run()


@pytest.mark.parametrize(
    ("content", "feedback", "message"),
    [
        ({"output": "\ud83d"}, "binary", r"samples\.jsonl, item 1 \(line 2\) has a `completion` that cannot"),
        ({"output": "b", "note": "\ud83d"}, "scalar", r"item 1 \(line 2\) has a `note` that cannot"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_scored(folder, content, feedback, message):
    (folder / "rewards.py").write_text("def length(completion): return len(completion)\n")
    write(folder / "samples.jsonl", [sample(0, 0, "a"), {**sample(0, 1, "b"), **content}])
    with pytest.raises(ValueError, match=message):
        run(reward_function="rewards.py:length", feedback=feedback)
    assert not list(folder.glob("*.scores"))


def test_dates_of_a_dataset_are_refused_by_column(folder):
    rows = {"prompt": ["p"], "completion": ["c"], "score": [1.0], "asked": [datetime.date(2026, 1, 1)]}
    Dataset.from_dict(rows).to_parquet(folder / "rows.parquet")
    with pytest.raises(ValueError, match=r"Row 0 of rows\.parquet \(train\) has a `asked` that cannot be written"):
        run(samples=["rows.parquet"], feedback="scalar")


def test_duplicates_over_several_files_are_refused(rows, folder):
    write(folder / "more.jsonl", rows[2:3])
    with pytest.raises(ValueError, match=r"samples\.jsonl, item 2 .* and more\.jsonl, item 0 .* are the same sample"):
        run(samples=["samples.jsonl", "more.jsonl"], reward_function="rewards.py:length")


def test_scores_without_any_pair_are_an_error(folder):
    write(
        folder / "samples.jsonl",
        [sample(0, 0, "a", reward=1), sample(0, 1, "b", reward=1), sample(1, 0, "c", reward=2)],
    )
    with pytest.raises(ValueError, match="The 3 scores yield no pair"):
        run(feedback="pairwise")
    assert not (folder / "out.jsonl").exists()
