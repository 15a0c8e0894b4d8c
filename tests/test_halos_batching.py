"""HALOs' batches and tokenization, compared with output of its own loaders (`tests/data/halos/batching.json`)."""

import copy
import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from halos_trl.data.halos import HalosPrompt, HalosTokenizer, load_prompts, microbatches, padded

FOLDER = Path(__file__).parent / "data" / "halos"
RECORDED = json.loads((FOLDER / "batching.json").read_text())
SPLITS = [(name, split) for name, splits in RECORDED["loaded"].items() for split in splits]


def feedback(name):
    return FOLDER / f"{name}.json"


# -- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_prompts_are_loaded_as_by_halos(name, split):
    expected = RECORDED["loaded"][name][split]
    loaded = load_prompts(feedback(name), split)
    assert [
        {
            "key": prompt.key,
            "prompt_sha256": prompt.prompt_id,
            "generations": [turns[0]["content"] for turns in prompt.generations],
            "scores": prompt.scores,
            "pairs": [list(pair) for pair in prompt.pairs],
            "desirable": prompt.desirable,
            "sft_index": prompt.sft_index % len(prompt.generations),
        }
        for prompt in loaded
    ] == [
        {k: v for k, v in prompt.items() if k != "prompt"}
        | {"sft_index": prompt["sft_index"] % len(prompt["generations"])}
        for prompt in expected
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "sample"}, "item 1 (line 2) is of type 'sample', but the first item with its `prompt_id` ('q01')"),
        ({"reward": None}, "item 1 (line 2) has no `reward`"),
        (
            {"prompt_id": "q99", "type": "sample"},
            "item 1 (line 2) is of type 'sample'; expected one of ['binary_feedback'",
        ),
    ],
)
def test_items_without_feedback_are_named(change, message, tmp_path):
    item = json.loads(feedback("binary_feedback").read_text())[0]
    path = tmp_path / "feedback.jsonl"
    path.write_text("\n".join(map(json.dumps, [item, item | change])))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_prompts(path)


def test_ids_of_prompts_are_those_of_halos():
    ids = {p.key: p.prompt_id for split in ("train", "test") for p in load_prompts(feedback("binary_feedback"), split)}
    assert ids == RECORDED["prompt_sha256"]


# -- order ---------------------------------------------------------------------------------------------------------


def source_of(run):
    """The file of a run; for the two sets without scores, their prompts."""
    if not run["data"].startswith("noscore"):
        return feedback(run["data"])
    threshold, pairs = RECORDED["noscore"]["desirable_threshold"], RECORDED["noscore"]["pairs"]
    loaded = RECORDED["loaded"]["binary_feedback"]["train"]
    plain = [{name: prompt[name] for name in ("key", "prompt", "generations")} for prompt in loaded]
    if run["data"] == "noscore_pairs":
        return [p | {"pairs": [tuple(pair) for pair in pairs[p["key"]]]} for p in plain if p["key"] in pairs]
    return [
        p | {"desirable": [score >= threshold for score in whole["scores"]]}
        for p, whole in zip(plain, loaded, strict=True)
    ]


SETTINGS = (
    "microbatch_size", "global_batch_size", "num_processes", "seed", "n_epochs", "n_examples", "max_prompt_count",
    "frac_unique_desirable", "frac_unique_undesirable", "num_skip",
)  # fmt: skip


@pytest.mark.parametrize("case", range(len(RECORDED["batching"])))
def test_microbatches_are_those_of_halos(case):
    run = RECORDED["batching"][case]
    settings = {name: run[name] for name in SETTINGS}
    made = [
        list(microbatches(source_of(run), run["loader"], process_index=process, **settings))
        for process in range(run["num_processes"])
    ]
    assert made == run["processes"]


def pairs_of(n):
    """A prompt with `n` pairs."""
    return [HalosPrompt("a", "a", list(range(n + 1)), pairs=[(0, i + 1) for i in range(n)])]


def labels_of(n):
    """`n` prompts of one labelled completion each."""
    return [HalosPrompt(str(i), str(i), ["x"], desirable=[True]) for i in range(n)]


@pytest.mark.parametrize(
    ("loader", "source", "processes"),
    [("paired", pairs_of(3), 1), ("unpaired", labels_of(3), 1), ("group", labels_of(7), 2)],
)
def test_a_run_that_would_never_end_is_refused(loader, source, processes):
    settings = {"microbatch_size": 4, "num_processes": processes}
    with pytest.raises(ValueError, match="`n_examples` would never be reached"):
        microbatches(source, loader, process_index=processes - 1, n_examples=8, **settings)
    # The same data end by themselves after an epoch.
    ends = list(microbatches(source, loader, process_index=processes - 1, n_epochs=1, n_examples=8, **settings))
    assert [len(batch) for batch in ends] == ([3] if loader == "paired" else [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loader": "pair"}, "`loader` is 'pair'; expected one of"),
        ({"n_epochs": None}, "Neither `n_epochs` nor `n_examples`"),
        ({"n_epochs": 0}, "`n_epochs=0` cannot work"),
        ({"microbatch_size": True}, "`microbatch_size=True` cannot work"),
        ({"process_index": 1}, "`process_index` is 1; expected 0 to 0 for 1 processes"),
        ({"num_processes": 2, "global_batch_size": 3}, "`global_batch_size=3` cannot be split evenly over 2"),
        ({"loader": "unpaired", "microbatch_size": 1}, "leaves no other completion for the KL term"),
        ({"loader": "group", "microbatch_size": 1}, "leaves no other completion for the KL term"),
        ({"source": feedback("scalar_feedback")}, "None of the 11 prompts has a pair"),
        ({"source": feedback("scalar_feedback"), "loader": "unpaired"}, "has neither pairs nor labels"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        microbatches(
            **{"source": feedback("pairwise_feedback"), "loader": "paired", "microbatch_size": 2, "n_epochs": 1}
            | settings
        )


# -- tokenization --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halos_tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "tokenizer")


def test_special_tokens_of_the_recorded_tokenizer(halos_tokenizer):
    ids = {name: getattr(halos_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    assert ids == RECORDED["special_tokens"]


@pytest.mark.parametrize(
    "case", range(len(RECORDED["tokenization"])), ids=lambda i: RECORDED["tokenization"][i]["note"]
)
def test_tokenization_is_that_of_halos(case, halos_tokenizer):
    recorded = RECORDED["tokenization"][case]
    expected, budgets = recorded["expected"], {name: recorded[name] for name in ("max_prompt_length", "max_length")}
    tokenizer = copy.deepcopy(halos_tokenizer)
    tokenizer.chat_template = RECORDED["chat_templates"][recorded["chat_template"]]
    given = copy.deepcopy((recorded["conversation"], recorded["generation"]))
    made = HalosTokenizer(tokenizer, **budgets)(*given)
    assert given == (recorded["conversation"], recorded["generation"])  # which HALOs edits
    names = set(made._fields) & set(expected)
    assert len(names) == 8
    assert {name: getattr(made, name) for name in names} == {name: expected[name] for name in names}
    batch = padded([made], pad_token_id=tokenizer.pad_token_id, **budgets)
    assert {name: table[0].tolist() for name, table in batch.items()} == expected["padded"]


@pytest.mark.parametrize("case", range(len(RECORDED["repeated_tokenization"])))
def test_tokenization_does_not_depend_on_what_was_tokenized_before(case, halos_tokenizer):
    recorded = RECORDED["repeated_tokenization"][case]
    tokenize = HalosTokenizer(
        halos_tokenizer, **{name: recorded[name] for name in ("max_prompt_length", "max_length")}
    )
    first, *later = [tokenize(recorded["conversation"], generation) for generation in recorded["generations"]]
    expected = recorded["expected_calls"][0]
    assert {name: getattr(first, name) for name in expected} == expected
    assert all(made.prompt == first.prompt for made in later)


def test_dropped_turns_do_not_come_back(halos_tokenizer):
    """In HALOs they do: the turn that was cut for the first completion fits for the second."""
    recorded = RECORDED["repeated_tokenization"][2]
    tokenize = HalosTokenizer(
        halos_tokenizer, **{name: recorded[name] for name in ("max_prompt_length", "max_length")}
    )
    turns = [len(tokenize(recorded["conversation"], generation).prompt) for generation in recorded["generations"]]
    assert turns == [3, 3]
    assert [len(call["prompt"]) for call in recorded["expected_calls"]] == [3, 4]


@pytest.mark.parametrize("empty", ["prompt", "completion"])
def test_rows_without_a_turn_are_refused(empty, halos_tokenizer):
    turns = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match=f"Row 3 has a {empty} without a turn"):
        HalosTokenizer(halos_tokenizer)(**turns | {empty: []}, where="Row 3")
