"""Feedback files to rows: HALOs' own files against HALOs' own reading, merged prompts, what is refused."""

import json
from pathlib import Path

import pytest

from halos_trl import load_feedback

FILES = Path(__file__).parent / "data" / "halos"


def write(folder, items, name="feedback.json", lines=False):
    path = folder / name
    texts = [json.dumps(item, ensure_ascii=False) for item in items]
    path.write_text("\n".join(texts) if lines else f"[{','.join(texts)}]", "utf-8")
    return path


@pytest.fixture
def load(tmp_path):
    """`load(paths, for_, ...)` with a cache of the test's own."""
    return lambda paths, *args, **options: load_feedback(paths, *args, cache_dir=tmp_path / "cache", **options)


def chat(text):
    return [{"role": "user", "content": text}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def binary(prompt, output, label, reward=None, **more):
    reward = {} if reward is None else {"reward": reward}
    return {
        "type": "binary_feedback", "prompt_id": prompt, "prompt": chat(prompt), "output": answer(output),
        "label": label, **reward, **more,
    }  # fmt: skip


def scalar(prompt, output, reward, **more):
    return {
        "type": "scalar_feedback", "prompt_id": 0, "prompt": chat(prompt), "output": answer(output), "reward": reward,
        **more,
    }  # fmt: skip


def pairwise(prompt, a, b, label, rewards=None, **more):
    rewards = {} if rewards is None else dict(zip(("reward_A", "reward_B"), rewards, strict=True))
    return {
        "type": "pairwise_feedback", "prompt_id": prompt, "prompt": chat(prompt), "output_A": answer(a),
        "output_B": answer(b), "label": label, **rewards, **more,
    }  # fmt: skip


def text(turns):
    return turns[-1]["content"]


# -- HALOs' own files -------------------------------------------------------------------------------------------------


def halos_reading(name, split):
    """The prompts of a file as HALOs loads them, recorded with the original code."""
    return json.loads((FILES / "batching.json").read_text("utf-8"))["loaded"][f"{name}_feedback"][split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_labelled_rows_are_those_of_halos(load, split):
    rows = load(FILES / "binary_feedback.json", "unpaired", split)
    expected = [
        (generation, label, score)
        for prompt in halos_reading("binary", split)
        for generation, label, score in zip(prompt["generations"], prompt["desirable"], prompt["scores"], strict=True)
    ]
    assert [(text(row["completion"]), row["label"], row["score"]) for row in rows] == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_are_those_of_halos(load, split):
    rows = load(FILES / "pairwise_feedback.json", "paired", split)
    expected = [
        (prompt["generations"][i], prompt["generations"][j], prompt["scores"][i], prompt["scores"][j])
        for prompt in halos_reading("pairwise", split)
        for i, j in prompt["pairs"]
    ]
    found = [(text(row["chosen"]), text(row["rejected"]), row["score_chosen"], row["score_rejected"]) for row in rows]
    assert found == expected


@pytest.mark.parametrize("name", ["binary", "pairwise", "scalar"])
def test_groups_are_the_generations_of_halos(load, name):
    rows = load(FILES / f"{name}_feedback.json", "group", "train")
    found = [([text(completion) for completion in row["completions"]], row["scores"]) for row in rows]
    assert found == [(prompt["generations"], prompt["scores"]) for prompt in halos_reading(name, "train")]


@pytest.mark.parametrize("name", ["binary", "pairwise"])
def test_the_best_completion_is_the_one_of_halos(load, name):
    rows = load(FILES / f"{name}_feedback.json", "sft", "train")
    expected = [prompt["generations"][prompt["sft_index"]] for prompt in halos_reading(name, "train")]
    assert [text(row["completion"]) for row in rows] == expected


def test_a_prompt_with_scores_gives_the_best_completion_where_halos_takes_the_last(load):
    rows = load(FILES / "scalar_feedback.json", "sft", "train")
    for row, prompt in zip(rows, halos_reading("scalar", "train"), strict=True):
        assert text(row["completion"]) == max(zip(prompt["scores"], prompt["generations"], strict=True))[1]


def test_array_and_lines_give_the_same_rows(load, tmp_path):
    items = json.loads((FILES / "scalar_feedback.json").read_text("utf-8"))
    lines = write(tmp_path, items, "lines.jsonl", lines=True)
    array, by_line = load(FILES / "scalar_feedback.json", "group"), load(lines, "group")
    assert by_line.remove_columns("sources").to_list() == array.remove_columns("sources").to_list()
    assert [source.split("#")[1] for source in by_line[2]["sources"]] == [
        source.split("#")[1] for source in array[2]["sources"]
    ]
    assert array[2]["prompt"] == items[7]["prompt"]  # several turns
    assert any(turn["role"] == "system" for row in array for turn in row["prompt"])
