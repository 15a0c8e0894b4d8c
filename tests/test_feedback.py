"""From feedback files to rows: HALOs' files compared with HALOs' loader, merged prompts, invalid input."""

import json
import math
from pathlib import Path

import datasets
import pytest
import trl

from halos_trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    cli,
    load_feedback,
    toy,
)

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


# -- HALOs' own files -----------------------------------------------------------------------------------------------


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


# -- merging --------------------------------------------------------------------------------------------------------


def test_a_second_file_adds_labels_scores_and_pairs_to_a_prompt(load, tmp_path):
    """HALOs appends only the completions of a prompt that it knows, and never uses them."""
    first = write(tmp_path, [binary("p", "good", 1, 2.0), binary("q", "alone", 0, 0.5)], "a.json")
    second = write(tmp_path, [binary("p", "bad", 0, -1.0)], "b.jsonl", lines=True)
    third = write(tmp_path, [pairwise("q", "x", "y", 1, (1.5, 0.25))], "c.json")
    files = [first, second, third]
    unpaired = load(files, "unpaired")
    assert [(text(r["prompt"]), text(r["completion"]), r["label"], r["score"]) for r in unpaired] == [
        ("p", "good", True, 2.0),
        ("p", "bad", False, -1.0),
        ("q", "alone", False, 0.5),
        ("q", "x", True, 1.5),
        ("q", "y", False, 0.25),
    ]
    sources = [f"{first}#0", f"{second}#0", f"{first}#1", f"{third}#0", f"{third}#0"]
    assert [row["sources"] for row in unpaired] == [[source] for source in sources]
    paired = load(files, "paired")
    assert [(text(row["chosen"]), text(row["rejected"])) for row in paired] == [("good", "bad"), ("x", "y")]
    assert [row["scores"] for row in load(files, "group")] == [[2.0, -1.0], [0.5, 1.5, 0.25]]
    assert [text(row["completion"]) for row in load(files, "sft")] == ["good", "x"]


def test_equal_completions_are_one_across_formats_and_two_within_one(load, tmp_path):
    labels = write(tmp_path, [binary("p", "same", 1, sample_id=0), binary("p", "same", 0, sample_id=1)], "a.json")
    scores = write(tmp_path, [scalar("p", "same", 3.0), scalar("p", "same", 2.0)], "b.json")
    rows = load([labels, scores], "unpaired")
    assert [(row["label"], row["score"], row["sample_ids"]) for row in rows] == [
        (True, 3.0, ["0"]),
        (False, 2.0, ["1"]),
    ]


def test_prompts_that_share_their_texts_but_not_their_roles_stay_apart(load, tmp_path):
    one = {**scalar("", "x", 1.0), "prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
    other = {**scalar("", "y", 2.0), "prompt": chat("ab")}
    assert len(load(write(tmp_path, [one, other]), "group")) == 2


def test_fields_of_turns_that_only_some_items_have(load, tmp_path):
    named = {**scalar("p", "x", 1.0), "prompt": [{"role": "user", "name": "Ada", "content": "p"}]}
    rows = load(write(tmp_path, [named, scalar("q", "y", 2.0)]), "group")
    assert [row["prompt"][0]["name"] for row in rows] == ["Ada", None]


# -- what rows are made for -----------------------------------------------------------------------------------------


def test_scores_become_pairs_and_labels_as_halos_label_makes_them(load, tmp_path):
    items = [scalar("p", key, score) for key, score in (("a", 1.0), ("b", 5.0), ("c", 2.0))] + [scalar("q", "d", 4.0)]
    path = write(tmp_path, items)
    (best_and_worst,) = load(path, "paired")
    assert (text(best_and_worst["chosen"]), text(best_and_worst["rejected"])) == ("b", "a")
    (closest,) = load(path, "paired", pair_mode="min", pair_threshold=2)
    assert (text(closest["chosen"]), text(closest["rejected"])) == ("b", "c")
    assert load(path, "unpaired")["label"] == [False, True, False, True]  # the median is 3
    assert load(path, "unpaired", label_threshold=2)["label"] == [False, True, True, True]


def test_labels_and_pairs_without_scores_count_one_in_a_group(load, tmp_path):
    path = write(tmp_path, [binary("p", "a", True), binary("p", "b", False)])
    assert load(path, "group")[0]["scores"] == [1.0, -1.0]
    chain = write(tmp_path, [pairwise("p", "a", "b", 1), pairwise("p", "c", "b", 0), pairwise("p", "a", "c", 1)])
    row = load(chain, "group")[0]
    assert dict(zip(map(text, row["completions"]), row["scores"], strict=True)) == {"a": 1.0, "b": 0.0, "c": -1.0}
    assert "score_chosen" not in load(chain, "paired").column_names
    assert text(load(chain, "sft")[0]["completion"]) == "a"


def test_a_tie_is_no_preference(load, tmp_path, said):
    """HALOs labels a pair of equal scores 0, which it reads as a preference for B."""
    path = write(tmp_path, [pairwise("p", "a", "b", 0, (1.0, 1.0)), pairwise("q", "c", "d", 0, (1.0, 2.0))])
    (row,) = load(path, "paired")
    assert text(row["chosen"]) == "d"
    assert "1 pairs have equal scores" in said()
    assert "1 of 2 prompts yield no row" in said()


def test_a_text_is_not_preferred_to_itself(load, tmp_path):
    items = [pairwise("p", "a", "b", 1, (2.0, 1.0)), pairwise("q", "a", "a", 1, (2.0, 1.0))]
    path = write(tmp_path, items)
    for for_ in ("paired", "group"):
        with pytest.raises(
            ValueError, match=r"item 1 .*has a pair of equal completions with different scores, 2\.0 and 1\.0"
        ):
            load(path, for_)


def test_ranked_lists_become_pairs(load, tmp_path):
    ranked = {"prompt": chat("p"), "chosen": answer("best"), "rejected": [answer("good"), answer("bad")]}
    rows = load(write(tmp_path, [ranked]), "paired")
    assert [(text(row["chosen"]), text(row["rejected"])) for row in rows] == [("best", "good"), ("best", "bad")]
    texts = {"prompt": "p", "chosen": "best", "rejected": ["good", "bad"]}
    assert load(write(tmp_path, [texts]), "paired")["rejected"] == ["good", "bad"]


def test_samples_are_rows_for_sft_only(load, tmp_path):
    samples = [
        {"type": "sample", "prompt_id": 0, "sample_id": i, "prompt": chat("p"), "output": output, "dataset": "d_train"}
        for i, output in enumerate(("one", "two"))
    ]
    path = write(tmp_path, samples)
    rows = load(path, "sft")
    assert [(row["completion"], row["sample_ids"]) for row in rows] == [(answer("one"), ["0"]), (answer("two"), ["1"])]
    with pytest.raises(ValueError, match=r"feedback.json#0 has no label, score or preference.*halos-trl label"):
        load(path, "unpaired")
    for_alpaca_eval = [{**{k: v for k, v in samples[0].items() if k != "prompt"}, "instruction": "p"}]
    assert load(write(tmp_path, for_alpaca_eval), "sft")[0]["prompt"] == chat("p")


def test_control_tokens_come_once(load, tmp_path):
    """HALOs puts one more before the completion at every visit."""
    path = write(tmp_path, [pairwise("p", "a", "b", 1)])
    for _ in range(2):
        assert [text(row["completion"]) for row in load(path, "csft")] == ["<|good|>a", "<|bad|>b"]
    own = load(path, "csft", control_tokens=("+", "-"))
    assert [text(row["completion"]) for row in own] == ["+a", "-b"]


# -- selection ------------------------------------------------------------------------------------------------------


def test_rows_per_prompt(load, tmp_path):
    items = [pairwise("p", f"a{i}", f"b{i}", 1) for i in range(10)] + [pairwise("q", "c", "d", 1)]
    path = write(tmp_path, items)
    few = load(path, "paired", max_per_prompt=3)
    drawn = [int(text(row["chosen"])[1]) for row in few if text(row["prompt"]) == "p"]
    assert len(few) == 4
    assert drawn == sorted(drawn)
    assert few["chosen"] == load(path, "paired", max_per_prompt=3)["chosen"]
    assert any(few["chosen"] != load(path, "paired", max_per_prompt=3, seed=seed)["chosen"] for seed in (1, 2))
    assert len(load(path, "unpaired", max_per_prompt=4)) == 4 + 2
    assert [len(row["scores"]) for row in load(path, "group", max_per_prompt=4)] == [4, 2]


def test_part_of_the_different_completions(load, tmp_path):
    """HALOs takes the fraction of all completions, and the first rows of the file."""
    chain = [pairwise("p", f"c{i}", f"c{j}", 1) for i in range(4) for j in range(i + 1, 4)]
    path = write(tmp_path, chain)
    assert load(path, "unpaired")["label"] == [True, False] * 6
    each_once = load(path, "unpaired", frac_unique_desirable=1.0, frac_unique_undesirable=1.0)
    sides = {label: [text(r["completion"]) for r in each_once if r["label"] == label] for label in (True, False)}
    assert sorted(sides[True]) == ["c0", "c1", "c2"]
    assert sorted(sides[False]) == ["c1", "c2", "c3"]
    part = load(path, "unpaired", frac_unique_desirable=0.34, frac_unique_undesirable=0.0)
    assert part["label"] == [True]
    one_side = load(path, "unpaired", frac_unique_undesirable=2 / 3)
    assert sorted(one_side["label"]) == [False] * 2 + [True] * 6


@pytest.mark.parametrize(
    ("for_", "options", "message"),
    [
        ("paired", {"max_per_prompt": 0}, "`max_per_prompt` is 0; expected an integer of at least 1"),
        ("unpaired", {"frac_unique_desirable": 1.5}, "expected a number from 0 to 1"),
        ("paired", {"frac_unique_desirable": 0.5}, "'paired' rows have no labels"),
        ("unpaired", {"frac_unique_desirable": 0, "frac_unique_undesirable": 0}, "No row is left after the selection"),
        ("pairs", {}, "`for_` is 'pairs'; expected one of 'paired'"),
        ("paired", {"duplicates": True}, "`duplicates` is True"),
        ("paired", {"pair_threshold": -1}, "cannot be negative"),
        ("sft", {"label_threshold": "medain"}, "The threshold is 'medain'"),
        ("sft", {"pair_mode": "best"}, "The pair mode is 'best'"),
        ("unpaired", {"split": "dev"}, "has split 'dev'; the splits are \\['train'\\]"),
    ],
)
def test_options_that_cannot_work(load, tmp_path, for_, options, message):
    path = write(tmp_path, [scalar("p", "a", 1.0, split="train"), scalar("p", "b", 2.0, split="train")])
    with pytest.raises(ValueError, match=message):
        load(path, for_, **options)


# -- bad files ------------------------------------------------------------------------------------------------------

GOOD = json.dumps(scalar("p", "a", 1.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad.json is empty"),
        (" \n ", "bad.json is empty"),
        ("[]", "is an array without items"),
        ("hello", "begins with 'h'. Expected a JSON array"),
        (f"[{GOOD},\n", r"is truncated: it ends in or before item 1 \(line 2\)"),
        (f"[{GOOD}", r"is truncated: it ends in its first item"),
        (f'[{GOOD},\n{{"prompt": "cut in', r"is truncated: it ends in or before item 1 \(line 2\)"),
        (f"[{GOOD},\n{GOOD[:-1]},]", r"item 1 \(line 2\) is invalid JSON: .* \(line 2\)"),
        (f"[{GOOD} {GOOD}]", r"item 0 \(line 1\) is invalid JSON: ',' or ']' is missing after it"),
        (f"[{GOOD},]", r"item 1 \(line 1\) begins with '\]'"),
        (f"[{GOOD}]\n[{GOOD}]", "continues after the end of its array, in line 2"),
        (f"[{GOOD}, 3]", r"item 1 \(line 1\) begins with '3'; expected an object"),
        (f'{GOOD}\n\n{{"prompt": nul}}\n{GOOD}', r"item 1 \(line 3\) is invalid JSON"),
        (f"{GOOD}\n{GOOD[:40]}", r"is truncated: it ends in or before item 1 \(line 2\)"),
        (f"{GOOD}{GOOD}", r"item 0 \(line 1\) is invalid JSON: more text follows on its line"),
        (b"\xff\xfe[\x00", "is not valid UTF-8"),
        (f"[{GOOD}, {{}}]", "item 1 .* has an unknown format: no `type`, and the keys \\[\\]"),
        (f'[{GOOD}, {{"score": 1{"0" * 5000}}}]', r"item 1 \(line 1\) is invalid JSON: .*digits"),
        ('[{"type": "ranking"}]', "item 0 .* has `type` 'ranking'; expected one of 'sample', 'binary_feedback'"),
    ],
)
def test_files_that_cannot_be_read(load, tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load(path, "group")
    assert not (tmp_path / "cache").exists(), "nothing is loaded in part"


def test_a_file_that_is_not_there(load):
    with pytest.raises(ValueError, match=r"no/such\.json cannot be opened"):
        load("no/such.json")
    with pytest.raises(ValueError, match="No feedback file was passed"):
        load([])
    with pytest.raises(TypeError, match="3 is of type int; expected a path"):
        load([3])


def without(item, key):
    return {k: v for k, v in item.items() if k != key}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (without(scalar("p", "b", 1.0), "reward"), "lacks `reward`; items of format 'scalar_feedback' have `prompt`"),
        (without(scalar("p", "b", 1.0), "output"), "lacks `output`"),
        (scalar("p", "b", None), "has score None"),
        (scalar("p", "b", float("nan")), "has score nan"),
        (scalar("p", "b", float("-inf")), "has score -inf"),
        (scalar("p", "b", "1.0"), "has score '1.0'"),
        (scalar("p", "b", True), "has score True"),
        ({**scalar("p", "b", 1.0), "prompt": []}, "has an empty prompt"),
        ({**scalar("p", "b", 1.0), "prompt": "p"}, "has the text 'p' as prompt; expected a conversation"),
        ({**scalar("p", "b", 1.0), "prompt": answer("p")}, "has a prompt without a user turn"),
        ({**scalar("p", "b", 1.0), "prompt": [{"role": "user"}]}, "whose `content` is None"),
        (
            {**scalar("p", "b", 1.0), "output": [{"role": "assistant", "content": [{"type": "text"}]}]},
            "all fields of a turn must be text",
        ),
        ({**scalar("p", "b", 1.0), "output": answer("\ud83d")}, "contains half of a surrogate pair"),
        (
            binary("p", "b", 1, 1.0),
            "has format 'binary_feedback', but the items before it have format 'scalar_feedback'",
        ),
    ],
)  # fmt: skip
def test_items_that_cannot_be_meant(load, tmp_path, item, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([scalar("p", "a", 1.0), item]))
    with pytest.raises(ValueError, match=rf"bad.json, item 1 \(line 1\) .*{message}"):
        load(path, "group")


@pytest.mark.parametrize("label", [None, "1", 2, 0.5])
def test_labels_that_are_none(load, tmp_path, label):
    with pytest.raises(ValueError, match=r"item 0 .* has label"):
        load(write(tmp_path, [binary("p", "a", label)]), "unpaired")


@pytest.mark.parametrize(
    ("item", "key"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": []}, "rejected"),
        ({"prompt": "p", "chosen": None, "rejected": ["a", "b"]}, "chosen"),
        ({"prompt": "p", "chosen": "c", "rejected": ["a", []]}, "rejected"),
        ({"prompt": "p", "completions": ["a", 3], "scores": [1, 2]}, "completions"),
        (
            {"type": "pairwise_feedback", "prompt": chat("p"), "output_A": "a", "output_B": None, "label": 1},
            "output_B",
        ),
    ],
)
def test_completions_are_named_by_their_key(load, tmp_path, item, key):
    with pytest.raises(ValueError, match=f"`{key}`"):
        load(write(tmp_path, [item]), "paired")


def test_scores_of_some_items_only(load, tmp_path):
    path = write(tmp_path, [binary("p", "a", 1, 1.0), binary("p", "b", 0)])
    with pytest.raises(ValueError, match=r"item 1 .* lacks `reward`, but the items before it have it"):
        load(path, "unpaired")
    mixed = [write(tmp_path, [binary("p", "a", 1, 1.0)], "a.json"), write(tmp_path, [binary("p", "b", 0)], "b.json")]
    with pytest.raises(ValueError, match=r"b.json#0 has no score, but other completions of its prompt have one"):
        load(mixed, "group")


def test_duplicates_are_named(load, tmp_path, said):
    items = [scalar("p", "a", 1.0), scalar("p", "b", 2.0), scalar("p", "a", 1.0)]
    path = write(tmp_path, items)
    with pytest.raises(ValueError, match=r"feedback.json#2 repeats .*feedback.json#0 in all fields"):
        load(path, "group")
    assert len(load(path, "group", duplicates="keep")[0]["scores"]) == 3
    assert load(path, "group", duplicates="drop")[0]["scores"] == [1.0, 2.0]
    assert "Dropped 1 of 3 items" in said()
    assert (
        len(load(write(tmp_path, [{**item, "sample_id": i} for i, item in enumerate(items)]), "group")[0]["scores"])
        == 3
    )
    with pytest.raises(ValueError, match="repeats"):
        load([path, path], "group")


def test_a_changed_file_is_read_anew(load, tmp_path):
    assert text(load(write(tmp_path, [binary("p", "old", 1)]), "sft")[0]["completion"]) == "old"
    assert text(load(write(tmp_path, [binary("p", "new", 1)]), "sft")[0]["completion"]) == "new"


def test_rows_name_their_items_after_the_file_has_changed(load, tmp_path):
    kept = binary("p", "a", 1, split="train")
    assert load(write(tmp_path, [kept]), "unpaired", "train")[0]["sources"][0].endswith("#0")
    other = binary("p", "b", 0, split="test")
    assert load(write(tmp_path, [other, kept]), "unpaired", "train")[0]["sources"][0].endswith("#1")


def test_a_split_may_be_null_or_a_number(load, tmp_path):
    path = write(tmp_path, [binary("p", name, 1, split=split) for name, split in (("a", None), ("b", 1), ("c", 2))])
    assert [text(row["completion"]) for row in load(path, "unpaired", "1")] == ["a", "b"]


def test_long_items_and_chunks_that_cut_characters(load, tmp_path):
    """Chunks of a file end anywhere: in a character of several bytes, in an escape, in a number."""
    items = [scalar("p", "ü" * (33_000 + i) + "\n\"'😀", -1234.5678 + i) for i in range(8)]
    for path in (write(tmp_path, items), write(tmp_path, items, "lines.jsonl", lines=True)):
        (row,) = load(path, "group")
        assert [text(completion) for completion in row["completions"]] == [text(item["output"]) for item in items]
        assert row["scores"] == [item["reward"] for item in items]


# -- in the trainers -------------------------------------------------------------------------------------------------


def toy_items(make, n=8):
    """Items whose texts the toy's tokenizer knows."""
    prompts = toy.make_prompts(n, 0, "feedback")
    return [make(prompt, toy.answer(prompt), "ba") for prompt in prompts]


def paired_items():
    return toy_items(lambda prompt, good, bad: pairwise(prompt, good, bad, 1, (1.0, -1.0)))


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "for_"),
    [(KTOTrainer, KTOConfig, "unpaired"), (DPOTrainer, DPOConfig, "paired"), (GRPOTrainer, GRPOConfig, "group")],
)
def test_the_trainers_take_the_rows(load, tmp_path, make_config, model, tokenizer, trainer_class, config_class, for_):
    data = load(write(tmp_path, paired_items()), for_)
    args = make_config(config_class, max_steps=1, max_length=32)
    trainer = trainer_class(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    assert trainer.train().training_loss > 0 or for_ == "group"


@pytest.mark.parametrize("for_", ["sft", "csft"])
def test_sft_takes_the_rows(load, tmp_path, make_config, model, tokenizer, for_):
    data = load(write(tmp_path, paired_items()), for_)
    args = make_config(trl.SFTConfig, max_steps=2, max_length=32)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    assert math.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("streams", [False, True])
def test_an_error_about_a_row_names_the_item(load, tmp_path, make_config, model, tokenizer, streams, said):
    items = paired_items()
    items[3]["output_B"][0]["content"] = ""
    path = write(tmp_path, items)
    data = load(path, "paired")
    data = data.to_iterable_dataset() if streams else data
    args = make_config(DPOConfig, max_steps=1)
    with pytest.raises(ValueError, match=r"Row 3 of the train dataset \(.*feedback.json#3\) has an empty `rejected`"):
        DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()
    args = make_config(DPOConfig, max_steps=1, drop_invalid_rows=True)
    DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()
    assert f"row 3 ({path}#3), has an empty `rejected`" in said()


def test_an_error_of_the_chat_template_names_the_item(load, tmp_path, make_config, model, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no such turn') }}"
    path = write(tmp_path, toy_items(lambda prompt, good, bad: binary(prompt, good, 1)))
    with pytest.raises(ValueError, match=r"Row 0 of the train dataset \(.*feedback.json#0\) cannot be rendered"):
        KTOTrainer(
            model=model,
            args=make_config(KTOConfig),
            train_dataset=load(path, "unpaired"),
            processing_class=tokenizer,
        )


# -- by `--dataset_name` ---------------------------------------------------------------------------------------------


@pytest.fixture
def load_data(monkeypatch, tmp_path):
    """`load_data(path, for_, ...)`: what `--dataset_name` loads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load_data(path, for_, evaluates=False, **settings):
        arguments = cli.HalosScriptArguments(dataset_name=str(path), **settings)
        return cli.load_data(arguments, trl.DatasetMixtureConfig(), for_, evaluates=evaluates)

    return load_data


@pytest.mark.parametrize("lines", [False, True])
def test_files_of_halos_are_recognized_by_their_content(load_data, tmp_path, lines):
    path = write(tmp_path, [scalar("p", "a", 1.0), scalar("p", "b", 2.0)], "rows.json", lines=lines)
    assert text(load_data(path, "paired")["train"][0]["chosen"]) == "b"
    assert load_data(path, "unpaired")["train"]["label"] == [False, True]
    assert load_data(path, None)["train"].column_names == list(scalar("p", "a", 1.0))
    assert isinstance(load_data(path, "group", dataset_streaming=True)["train"], datasets.IterableDataset)
    ranked = {"prompt": "p", "chosen": "best", "rejected": ["good", "bad"]}
    assert len(load_data(write(tmp_path, [ranked]), "paired")["train"]) == 2
    with pytest.raises(ValueError, match="has `type` 'scalar'; expected one of"):
        load_data(write(tmp_path, [{**scalar("p", "a", 1.0), "type": "scalar"}]), "paired")
    rows = {"prompt": "p", "chosen": "best", "rejected": "bad", "type": "mine"}
    assert load_data(write(tmp_path, [rows], "own.json"), "paired")["train"].column_names == list(rows)


def test_splits_of_a_file(load_data, tmp_path):
    path = FILES / "binary_feedback.json"
    data = load_data(path, "unpaired", evaluates=True)
    assert {split: len(rows) for split, rows in data.items()} == {
        split: sum(len(prompt["desirable"]) for prompt in halos_reading("binary", split))
        for split in ("train", "test")
    }
    assert list(load_data(path, "unpaired", dataset_train_split="test")) == ["test"]
    without_splits = write(tmp_path, [binary("p", "a", 1)])
    assert list(load_data(without_splits, "unpaired", evaluates=True)) == ["train"]
    with pytest.raises(ValueError, match="has split 'dev'; the splits are"):
        load_data(write(tmp_path, [binary("p", "a", 1, split="train")]), "unpaired", dataset_train_split="dev")


def test_a_folder_of_files_of_halos(load_data, tmp_path):
    write(tmp_path, [binary("p", "a", 1)], "train.json")
    with pytest.raises(ValueError, match=r"is a folder, and train.json in it is in one of HALOs' formats"):
        load_data(tmp_path, "unpaired")


def test_duplicates_by_flag(load_data, tmp_path):
    path = write(tmp_path, [binary("p", "a", 1)] * 2)
    with pytest.raises(ValueError, match="repeats"):
        load_data(path, "unpaired")
    assert len(load_data(path, "unpaired", dataset_duplicates="keep")["train"]) == 2
