"""Named datasets: from hand-written rows in each source's schema to the rows of the trainers."""

import json
import re
from pathlib import Path

import datasets
import pytest
import trl

from halos_trl import cli
from halos_trl.cli.sample import SampleArguments, prompts_of
from halos_trl.data.named import NAMED, dialogue, load_named


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def shp(post, a, b, preferred, scores, **more):
    names = ("human_ref_A", "human_ref_B", "score_A", "score_B")
    return {"history": post, **dict(zip(names, (a, b, *scores), strict=True)), "labels": preferred, **more}


TREE = [
    ("p", None, "prompter", "Hi", None, "en"),
    ("a0", "p", "assistant", "best", 0, "en"),
    ("a1", "p", "assistant", "good", 1, "en"),
    ("a2", "p", "assistant", "bad", 2, "en"),
    ("q", "a0", "prompter", "More", None, "en"),
    ("b0", "q", "assistant", "yes", 0, "en"),
    ("b1", "q", "assistant", "no", 1, "en"),
    ("c0", "q", "assistant", "ja", 0, "de"),
    ("q0", "a1", "prompter", "ranked prompt", 0, "en"),
    ("q1", "a1", "prompter", "other prompt", 1, "en"),
]
OASST = [dict(zip(("message_id", "parent_id", "role", "text", "rank", "lang"), row, strict=True)) for row in TREE]

YES_NO = {"chosen": [user("Hi"), assistant("yes")], "rejected": [user("Hi"), assistant("no")]}
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: best\n\nHuman: More\n\nAssistant: "
HI, HI_MORE = [user("Hi")], [user("Hi"), assistant("best"), user("More")]

# name: raw rows, and the pairs (prompt, chosen, rejected) they give
PAIRS = {
    "shp": (
        [
            shp("Post?", "few", "many", 0, (5, 10)),
            shp("Post?", "more", "less", 1, (30, 3)),
            shp("Q", "a", "b", 1, (3, 2)),
        ],
        [("Post?", "many", "few"), ("Post?", "more", "less")],
    ),
    "hh": (
        [{"chosen": DIALOGUE + "yes", "rejected": DIALOGUE + "no"}],
        [(HI_MORE, "yes", "no")],
    ),
    "oasst": (OASST, [(HI, "best", "good"), (HI, "good", "bad"), (HI_MORE, "yes", "no")]),
    "ultrabin": (
        [{"prompt": "Hi", "prompt_id": "0", **YES_NO, "score_chosen": 8.0, "score_rejected": 2.5}],
        [("Hi", "yes", "no")],
    ),
    "ultrafeedback_armorm": (
        [{"prompt": "Hi", **YES_NO, "all_rm_scores": [0.1, 0.3, 0.2]}],
        [("Hi", "yes", "no")],
    ),
    "safe_rlhf": (
        [{"prompt": "Hi", "response_0": "no", "response_1": "yes", "better_response_id": 1}],
        [("Hi", "yes", "no")],
    ),
    "trl_ultrafeedback": (
        [{**YES_NO, "score_chosen": 8.0, "score_rejected": 2.5}],
        [("Hi", "yes", "no")],
    ),
    "capybara": (
        [
            {
                "prompt": "ignored",
                "chosen": [*HI_MORE, assistant("yes")],
                "rejected": [*HI_MORE, assistant("no")],
                "rating_chosen": 5,
                "rating_rejected": 2,
                "source": "x",
            },
            {
                "prompt": "Hi",
                "chosen": [assistant("yes")],
                "rejected": [assistant("no")],
                "rating_chosen": 5,
                "rating_rejected": 2,
                "source": "x",
            },
        ],
        [(HI_MORE, "yes", "no"), ("Hi", "yes", "no")],
    ),
    "nectar": (
        [
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant: ",
                "answers": [
                    {"answer": "good", "model": "m", "rank": 2.0},
                    {"answer": "best", "model": "m", "rank": 1.0},
                    {"answer": "bad", "model": "m", "rank": 3.0},
                ],
            }
        ],
        [("Hi", "best", "good"), ("Hi", "best", "bad")],
    ),
}

# name: raw rows, and the completions (prompt, completion, label or score) they give
COMPLETIONS = {
    "ultrachat": (
        [{"prompt": "Hi", "messages": [*HI_MORE, assistant("yes")]}],
        [("Hi", [*HI_MORE[1:], assistant("yes")])],
    ),
    "s1k_11": (
        [{"question": "1+1?", "deepseek_thinking_trajectory": "hm", "deepseek_attempt": "2"}],
        [("1+1?", "<|im_start|>think\nhm\n<|im_start|>answer\n2")],
    ),
    "alpacaeval": ([{"instruction": "Hi", "output": "yes", "generator": "g", "dataset": "d"}], [("Hi", "yes")]),
    "wildbench": (
        [{"conversation_input": [{**turn, "language": "en"} for turn in HI_MORE], "references": {"gpt-4": "yes"}}],
        [(HI_MORE, "yes")],
    ),
    "kto_mix": ([{"prompt": HI, "completion": [assistant("yes")], "label": True}], [("Hi", "yes", True)]),
    "helpsteer": (
        [
            {"prompt": "Hi", "response": "yes", "helpfulness": 3, "verbosity": 1},
            {
                "prompt": "Hi\n<extra_id_1>Assistant\nbest\n<extra_id_1>User\nMore",
                "response": "no",
                "helpfulness": 0,
                "verbosity": 1,
            },
        ],
        [("Hi", "yes", 3.0), (HI_MORE, "no", 0.0)],
    ),
}


def turns(text, role):
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def local_copy(folder, rows, name, split):
    """The dataset as a folder of files, as `huggingface-cli download` gives it."""
    target = folder / "copy" / (NAMED[name].data_dir or "")
    target.mkdir(parents=True)
    hub_split = NAMED[name].splits[split]
    (target / f"{hub_split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = f"configs:\n- config_name: default\n  data_files:\n  - split: {hub_split}\n    path: {hub_split}.jsonl\n"
    (target / "README.md").write_text(f"---\n{card}---\n")
    return folder / "copy"


def split_of(name):
    return next(iter(NAMED[name].splits))


def load(folder, name, rows, for_, **options):
    split = split_of(name)
    return load_named(name, for_, split, path=local_copy(folder, rows, name, split), cache_dir=folder / "c", **options)


def test_the_page_has_every_name_with_its_hub_id_and_splits():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `([\w.-]+/[\w.-]+)`[^|]* \| ([\w, ]+) \|", page, flags=re.M)
    found = {name: (hub, splits) for names, hub, splits in rows for name in re.findall(r"`(\w+)`", names)}
    assert {name: (hub, set(splits.split(", "))) for name, (hub, splits) in found.items()} == {
        name: (source.hub_id, set(source.splits)) for name, source in NAMED.items()
    }


def test_every_name_is_tested():
    alike = {"hh_helpful": "hh", "hh_harmless": "hh", "ultrafeedback_armorm_gemma": "ultrafeedback_armorm"}
    assert {alike.get(name, name) for name in NAMED} == PAIRS.keys() | COMPLETIONS.keys()
    assert all(NAMED[name].items in (NAMED[other].items,) or name != "hh" for name, other in alike.items())


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tmp_path, name):
    rows, expected = PAIRS[name]
    found = load(tmp_path, name, rows, "paired")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in found] == [
        (turns(prompt, "user"), turns(chosen, "assistant"), turns(rejected, "assistant"))
        for prompt, chosen, rejected in expected
    ]
    assert found[0]["sources"][0].endswith(f"{name}-{split_of(name)}.jsonl#0")


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(tmp_path, name):
    rows, expected = COMPLETIONS[name]
    found = load(tmp_path, name, rows, {"kto_mix": "unpaired", "helpsteer": "unpaired"}.get(name, "sft"))
    assert [(row["prompt"], row["completion"]) for row in found] == [
        (turns(prompt, "user"), turns(completion, "assistant")) for prompt, completion, *_ in expected
    ]
    column = {"kto_mix": "label", "helpsteer": "score"}.get(name)
    if column:
        assert found[column] == [judgement for *_, judgement in expected]


def test_scores_of_the_sources(tmp_path):
    for name, scores in (("ultrabin", (8.0, 2.5)), ("ultrafeedback_armorm", (0.3, 0.1)), ("capybara", (5.0, 2.0))):
        row = load(tmp_path / name, name, PAIRS[name][0], "paired")[0]
        assert (row["score_chosen"], row["score_rejected"]) == scores


def test_shp_keeps_five_pairs_of_a_training_post_and_all_for_testing(tmp_path):
    rows = [shp("Post?", f"a{i}", f"b{i}", 1, (9, 3 + i)) for i in range(5)]  # of which 3 and 4 votes are half of 9
    rows += [shp("Other?", f"a{i}", f"b{i}", 1, (10 + i, 1)) for i in range(8)]
    train = list(NAMED["shp"].items(rows, "train"))
    assert [item["prompt"][0]["content"] for item in train] == ["Post?"] * 2 + ["Other?"] * 5
    assert train == list(NAMED["shp"].items(rows, "train"))
    assert len(list(NAMED["shp"].items(rows, "test"))) == 13


def test_hh_dialogues_that_part_early(said):
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: More\n\nAssistant: yes",
        "rejected": "\n\nHuman: Hi\n\nAssistant: b",
    }
    (item,) = NAMED["hh"].items([row], "train")
    assert (item["prompt"], item["rejected"]) == ([user("Hi")], [assistant("b")])
    assert item["chosen"] == [assistant("a"), user("More"), assistant("yes")]
    foreign = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}
    assert list(NAMED["hh"].items([foreign], "train")) == []
    assert "Left out 1 rows of the train split" in said()
    assert dialogue("\n\nHuman: Two:\n\nparagraphs\n\nHuman: Again")[1] == user("Again")


def test_repeated_rows_are_kept(tmp_path):
    assert len(load(tmp_path, "safe_rlhf", PAIRS["safe_rlhf"][0] * 2, "paired")) == 2


def test_names_and_splits_that_do_not_exist():
    with pytest.raises(ValueError, match="Unknown dataset 'ship'; expected one of shp, hh"):
        load_named("ship")
    with pytest.raises(ValueError, match=r"'s1k_11' has splits \['train'\], not 'test'"):
        load_named("s1k_11", "sft", "test")


def test_a_name_behind_dataset_name(tmp_path, monkeypatch):
    """Without a network, the Hub's name leads to a local folder of that name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    copy = local_copy(tmp_path, PAIRS["safe_rlhf"][0], "safe_rlhf", "train")
    (tmp_path / "PKU-Alignment").mkdir()
    copy.rename(tmp_path / "PKU-Alignment" / "PKU-SafeRLHF-single-dimension")
    (prompt,) = prompts_of(SampleArguments(model_name_or_path="m", dataset_name="safe_rlhf"))
    assert prompt == {"prompt": [user("Hi")], "prompt_id": 0}
    arguments = cli.HalosScriptArguments(dataset_name="safe_rlhf")
    data = cli.load_data(arguments, trl.DatasetMixtureConfig(), "unpaired")
    assert data["train"]["label"] == [True, False]
    with pytest.raises(ValueError, match="'safe_rlhf' stands for PKU-Alignment"):
        arguments.dataset_config = "default"
        cli.load_data(arguments, trl.DatasetMixtureConfig(), "unpaired")
