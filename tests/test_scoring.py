"""Samples, their scores from functions and reward models, and the resulting rows and items."""

import json
import math
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from halos_trl import toy
from halos_trl.scoring.feedback import Rule, feedback_rows
from halos_trl.scoring.function import FunctionScorer
from halos_trl.scoring.reward_model import RewardModelScorer
from halos_trl.scoring.samples import read_samples

USER = [{"role": "user", "content": "2 + 2?"}]


def read(*rows):
    return read_samples((f"s.json, item {i}", row) for i, row in enumerate(rows))


def reply(text):
    return [{"role": "assistant", "content": text}]


# -- samples -------------------------------------------------------------------------------------------------------


def test_every_form_of_samples_is_read():
    found = read(
        {"prompt": USER, "output": "4", "prompt_id": 7, "sample_id": 0, "type": "sample"},
        {"prompt": USER, "output": reply("5"), "prompt_id": 7, "sample_id": 1, "reward": 0.5},
        {"instruction": "2 + 2?", "output": "6", "prompt_id": 7, "sample_id": 2},
        {"prompt": "2 + 2 =", "completion": " 4", "answer": 4},
        {"prompt": "2 + 2 =", "completions": [" 4", " 5"], "scores": [1, 0]},
        {"prompt": USER, "output": "", "prompt_id": 7, "sample_id": 3},
        {"prompt": "2 + 2 =", "completion": ""},
    )
    samples = found.samples
    assert found.empty == 2
    assert [sample.prompt for sample in samples] == [USER, USER, USER, "2 + 2 =", "2 + 2 =", "2 + 2 ="]
    assert [sample.completion for sample in samples[:3]] == [reply("4"), reply("5"), reply("6")]
    assert [sample.text for sample in samples] == ["4", "5", "6", " 4", " 4", " 5"]
    assert [sample.given_score for sample in samples] == [None, 0.5, None, None, 1, 0]
    assert len({sample.group for sample in samples[:3]}) == len({sample.group for sample in samples[3:]}) == 1
    assert samples[3].columns == {"answer": 4}
    assert samples[5].where == "s.json, item 4, completion 1"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"output": "4"}], "item 0 has no `prompt`. It has `output`"),
        ([{"prompt": USER}], "item 0 has no `completion`, `output` or `completions`"),
        ([{"prompt": USER, "output": "4", "completion": "4"}], "has `completion` and `output`. Keep one"),
        ([{"prompt": USER, "chosen": "4", "rejected": "5"}], "contains a pair"),
        ([{"prompt": USER, "output_A": "4", "output_B": "5"}], "contains a pair"),
        ([{"prompt": USER, "completions": "4"}], "expected a list of completions"),
        ([{"prompt": 4, "output": "4"}], "item 0 has prompt 4 of type int"),
        ([{"prompt": USER, "output": 4}], "item 0 has `output` 4 of type int"),
        ([{"prompt": [], "output": "4"}], "item 0 has an empty prompt"),
        ([{"prompt": [USER[0] | {"role": "system"}], "output": "4"}], "item 0 has a prompt without a user turn"),
        ([{"prompt": USER, "output": "4"}, {"prompt": USER, "output": [{"role": "x"}]}], "item 1 has"),
        ([{"prompt": USER, "output": "4", "prompt_id": [1]}], "`prompt_id` .*expected a number or a text"),
        (
            [{"prompt": "a", "completion": "4", "prompt_id": 1}, {"prompt": "b", "completion": "4", "prompt_id": 1}],
            "item 0 and s.json, item 1 have the same `prompt_id`, 1, but different prompts",
        ),
        (
            [{"prompt": USER, "output": text, "prompt_id": 1, "sample_id": 5} for text in ("4", "5")],
            "item 0 and s.json, item 1 are the same sample: `prompt_id` 1 and `sample_id` 5 occur twice",
        ),
    ],
)
def test_malformed_samples_are_refused_by_item(rows, message):
    with pytest.raises(ValueError, match=message):
        read(*rows)


# -- functions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes rewards.py; returns `<path>:<function>`."""

    def write(code, name="score"):
        path = tmp_path / "rewards.py"
        path.write_text(textwrap.dedent(code))
        return f"{path}:{name}"

    return write


def scores_of(name, *rows):
    scorer = FunctionScorer(name)
    return [verdict.score for verdict in scorer(list(enumerate(read(*rows).samples)))]


ROWS = (
    {"prompt": USER, "output": "4", "answer": "4", "sample_id": 0},
    {"prompt": USER, "output": "5", "answer": "4", "sample_id": 1},
)


@pytest.mark.parametrize(
    "code",
    [
        "def score(prompt, completion, answer): return float(completion == answer)",
        "def score(completion, **row): return int(row['answer'] == completion and 'prompt' in row)",
        "def score(completion, answer, missing=1): return missing * (completion == answer) + 0",
        "import numpy as np\ndef score(*, completion, answer): return np.float32(completion == answer)",
        # As TRL calls reward functions.
        "def score(prompts, completions, answer, **kwargs):\n"
        "    return [float(c[0]['content'] == a) for c, a in zip(completions, answer, strict=True)]",
        "class Score:\n    def __call__(self, completion, answer): return completion == answer and 1.0 or 0.0\n"
        "score = Score()",
    ],
)
def test_functions_get_what_their_parameters_name(script, code):
    assert scores_of(script(code), *ROWS) == [1.0, 0.0]


def test_functions_of_modules_are_found_beside_the_caller(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_this_test.py").write_text("def length(completion): return len(completion)")
    monkeypatch.chdir(tmp_path)
    assert scores_of("my_rewards_of_this_test:length", *ROWS) == [1.0, 1.0]


def test_none_leaves_a_row_unscored(script):
    name = script("def score(completion): return None if completion == '4' else 2")
    assert scores_of(name, *ROWS) == [None, 2.0]


def test_an_exception_names_the_row_and_is_kept(script):
    name = script("def score(completion): return 1 / (5 - int(completion))")
    with pytest.raises(ValueError, match=r"raised ZeroDivisionError for s\.json, item 1: division by zero") as error:
        scores_of(name, *ROWS)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert error.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name == "score"


@pytest.mark.parametrize(
    "value", ["'1'", "True", "float('nan')", "float('inf')", "[1.0]", "__import__('numpy').True_", "10**400"]
)
def test_what_is_no_finite_number_is_refused_by_row(script, value):
    name = script(f"def score(completion): return 1 if completion == '4' else {value}")
    with pytest.raises(ValueError, match=r"returned for s\.json, item 1 is invalid"):
        scores_of(name, *ROWS)


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("def score(completion): pass", "scroe", "has no function `scroe`. Did you mean `score`"),
        ("score = 4", "score", "is of type int, not a function"),
        ("def score(a, b): pass", "score", r"takes \(a, b\).*rename one parameter to `completion`"),
        ("import nowhere_to_be_found", "score", "cannot be imported: ModuleNotFoundError"),
        ("def score(:", "score", "cannot be imported: SyntaxError"),
        ("def score(completion): pass", "", "expected `module:function`"),
    ],
)
def test_names_that_cannot_be_resolved_are_refused(script, code, name, message):
    with pytest.raises(ValueError, match=message):
        FunctionScorer(script(code, name))


def test_missing_files_modules_and_columns_are_named(script):
    with pytest.raises(ValueError, match=r"no file nowhere\.py"):
        FunctionScorer("nowhere.py:score")
    with pytest.raises(ValueError, match=r"write `nowhere\.py:score`"):
        FunctionScorer("nowhere:score")
    with pytest.raises(ValueError, match=r"parameter `anser`, which s\.json, item 0 does not hold.*mean `answer`"):
        scores_of(script("def score(completion, anser): pass"), *ROWS)


def test_settings_change_with_the_code(script):
    first = FunctionScorer(script("def score(completion): return 1")).settings
    assert FunctionScorer(script("def score(completion): return 1")).settings == first
    assert FunctionScorer(script("def score(completion): return 2")).settings != first


# -- reward models -------------------------------------------------------------------------------------------------


def saved_classifier(tokenizer, folder, labels):
    config = toy.tiny_model(tokenizer).config
    config.num_labels = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForSequenceClassification(config).double().eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


SORTED = [{"prompt": f"Sort {'cba' * n}", "completion": "abc" * n} for n in (1, 3, 2, 2, 1)]


@pytest.mark.parametrize("labels", [1, 2])
def test_scores_of_a_reward_model_are_its_last_logit(tokenizer, tmp_path, labels):
    model = saved_classifier(tokenizer, tmp_path, labels)
    scorer = RewardModelScorer(str(tmp_path), batch_size=2, dtype="auto")
    verdicts = sorted(scorer(list(enumerate(read(*SORTED).samples))))
    assert [verdict.position for verdict in verdicts] == list(range(5))
    for row, verdict in zip(SORTED, verdicts, strict=True):
        ids = [*tokenizer(row["prompt"])["input_ids"], *tokenizer(row["completion"])["input_ids"]]
        alone = model(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits[0, -1]
        assert verdict.score == pytest.approx(alone.item(), abs=1e-6)


def test_longer_samples_are_cut_and_counted(tokenizer, tmp_path, caplog):
    model = saved_classifier(tokenizer, tmp_path, 1)
    scorer = RewardModelScorer(str(tmp_path), max_length=12)
    (_, longest, *_) = sorted(scorer(list(enumerate(read(*SORTED).samples))))
    ids = tokenizer(SORTED[1]["prompt"] + SORTED[1]["completion"])["input_ids"][:12]
    assert longest.score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-6)
    assert "3 of 5 samples are longer than 12 tokens" in caplog.text


def test_other_classifiers_are_refused(tokenizer, tmp_path):
    saved_classifier(tokenizer, tmp_path, 3)
    with pytest.raises(ValueError, match=r"has 3 labels\. A reward model has one logit"):
        RewardModelScorer(str(tmp_path))
    with pytest.raises(ValueError, match="expected at least 1"):
        RewardModelScorer(str(tmp_path), batch_size=0)
    with pytest.raises(ValueError, match=r"'\./nowhere' cannot be loaded"):
        RewardModelScorer("./nowhere")


# -- feedback ------------------------------------------------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "data" / "halos" / "label.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    """The samples of a recorded set, and their scores."""
    samples = read(*GOLDEN["sample_sets"]["tied"]).samples
    return samples, [sample.given_score for sample in samples]


@pytest.mark.parametrize("kind", ["binary", "pairwise"])
def test_items_of_halos_files_are_those_of_halos(recorded, kind):
    samples, scores = recorded
    case = next(
        c for c in GOLDEN[kind] if c["sample_set"] == "tied" and c["threshold"] == 1 and c.get("mode", "max") == "max"
    )
    items = feedback_rows(samples, scores, Rule(kind, 1, "max", seed=0), "halos")
    own = {"sample_id", "sample_id_A", "sample_id_B"}
    assert all(sorted(item.keys() - own) == case["fields"] and item["type"] == f"{kind}_feedback" for item in items)
    if kind == "binary":
        assert [item["label"] for item in items] == [case["labels"][key] for key in case["order"]]
        return
    for item, expected in zip(items, case["items"], strict=True):
        assert item["prompt_id"] == expected["prompt_id"]
        assert item["output_A"] == reply(f"answer {expected['A_with_this_seed']}")
        assert item["label"] == expected["label_with_this_seed"]
        assert item["reward_difference"] == expected["reward_difference"]
        assert abs(item["reward_A"] - item["reward_B"]) == expected["reward_difference"]


def test_scalar_items_keep_the_other_fields():
    row = {"prompt_id": 3, "sample_id": 0, "prompt": USER, "output": "4", "generator": "m", "type": "sample"}
    (item,) = feedback_rows(read(row).samples, [0.5], Rule("scalar"), "halos")
    assert item == row | {"output": reply("4"), "reward": 0.5, "type": "scalar_feedback"}


def test_rows_for_trainers():
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        {"prompt": USER, "output": text, "prompt_id": "a", "sample_id": i, "tools": tools, "type": "sample"}
        for i, text in enumerate(["4", "5", "6"])
    ]
    samples, scores = read(*rows).samples, [2.0, -1.0, 0.0]

    def made(kind, **rule):
        return feedback_rows(samples, scores, Rule(kind, **rule), "trl")

    prompt = {"prompt": USER, "tools": tools}
    assert made("binary") == [
        prompt | {"completion": reply(text), "label": label}
        for text, label in [("4", True), ("5", False), ("6", True)]
    ]
    assert made("pairwise") == [prompt | {"chosen": reply("4"), "rejected": reply("5")}]
    assert made("groups") == [
        prompt | {"prompt_id": "a", "completions": [reply("4"), reply("5"), reply("6")], "scores": scores}
    ]
    assert made("scalar")[1] == prompt | {"prompt_id": "a", "sample_id": 1, "completion": reply("5"), "score": -1.0}


def test_what_halos_files_cannot_hold_is_refused():
    samples = read({"prompt": "2 + 2 =", "completion": " 4"}).samples
    with pytest.raises(ValueError, match=r"item 0 has the text '2 \+ 2 =' as its prompt"):
        feedback_rows(samples, [1.0], Rule("binary"), "halos")
    with pytest.raises(ValueError, match="no format for groups"):
        feedback_rows(samples, [1.0], Rule("groups"), "halos")
    with pytest.raises(ValueError, match="Score 0 of 1: nan"):
        feedback_rows(samples, [math.nan], Rule("binary"), "trl")
