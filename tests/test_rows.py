"""Raw rows of all trainers: refused rows, dropped and counted rows, groups."""

import json
import time

import datasets
import pytest
import trl
from accelerate import PartialState
from conftest import assistant, paired_rows, unpaired_rows, user
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import LlamaForSequenceClassification

import halos_trl
from halos_trl import cli, toy
from halos_trl.data.checks import check_paired_rows, check_unpaired_rows
from halos_trl.data.groups import scored_rows, with_advantages
from halos_trl.data.row_texts import split_prompt
from halos_trl.data.row_values import score_problem

TEXT_PAIR = {"prompt": "a", "chosen": " x", "rejected": " y"}
PAIR = {"prompt": user("a"), "chosen": assistant("x"), "rejected": assistant("y")}
LABELLED = {"prompt": user("a"), "completion": assistant("x"), "label": True}
SCORED = {"prompt": "a", "completion": "x", "score": 1.0}
LISTS = {"prompt": "a", "completions": ["x", "y"], "scores": [1.0, 0.0]}


def check(rows, name="train", **how):
    """The check of the methods that take rows of this form."""
    first = next(iter(rows))
    if "chosen" in first:
        return check_paired_rows(rows, name, **how)
    return check_unpaired_rows(rows, name, **how) if "label" in first else scored_rows(rows, name, **how)


def as_json(rows):
    """Rows of any JSON, as a JSON file gives them: Arrow alone cannot mix types in a column."""
    columns = list(rows[0])
    return Dataset.from_list(rows, features=datasets.Features({column: datasets.Json() for column in columns}))


def streamed(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture(autouse=True)
def _state():
    PartialState()  # as any trainer does; warnings come from the main process only


# -- what is refused -----------------------------------------------------------------------------------------------


BAD_TEXTS = {
    "number": (5, "{column}` 5 of type int"),
    "list of texts": (["a"], "'a' of type str in the list `{column}`"),
    "one message": ({"role": "assistant", "content": "x"}, "of type dict.*Wrap the message in a list"),
    "none": (None, "empty `{column}`: None"),
    "other form": ("x", "prompt of type list with a completion of type str in `{column}`: 'x'"),
    "empty text": ("", "empty `{column}`: ''"),
    "empty list": ([], r"empty `{column}`: \[\]"),
    "no role": ([{"content": "x"}], "message without a `role` in `{column}`"),
    "role of a number": ([{"role": 1, "content": "x"}], "message without a `role` in `{column}`"),
    "from and value": ([{"from": "gpt", "value": "x"}], "trl.maybe_convert_to_chatml"),
    "no content": ([{"role": "assistant"}], "`content` is None of type NoneType"),
    "content of a number": ([{"role": "assistant", "content": 5}], "`content` is 5 of type int"),
    "content of texts": ([{"role": "assistant", "content": ["x"]}], "`content` is .'x'. of type list"),
    "no content anywhere": ([{"role": "assistant", "content": ""}], "empty `{column}`"),
    "no text in any part": (assistant([{"type": "text", "text": ""}]), "empty `{column}`"),
}


@pytest.mark.parametrize("make", [as_json, streamed])
@pytest.mark.parametrize("good, column", [(PAIR, "chosen"), (PAIR, "rejected"), (LABELLED, "completion")])
@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_completions_are_refused_by_row(make, good, column, case):
    value, message = BAD_TEXTS[case]
    pattern = f"Row 1 of the train dataset .*{message.format(column=column)}.*drop_invalid_rows=True"
    with pytest.raises(ValueError, match=pattern):
        list(check(make([good, good | {column: value}])))


PROMPTS = {
    "none": (None, "prompt None of type NoneType"),
    "number": (5, "prompt 5 of type int"),
    "dict": ({"role": "user", "content": "a"}, "prompt .* of type dict"),
    "empty": ([], r"empty prompt: \[\]"),
    "no role": ([{"content": "a"}], "message without a `role` in `prompt`"),
    "number inside": ([5], "5 of type int in the list `prompt`"),
    "text": ("a", "prompt of type str with a completion of type list"),
}
SCORED_CHAT = {"prompt": user("a"), "completion": assistant("x"), "score": 1.0}


@pytest.mark.parametrize("good", [PAIR, LABELLED, SCORED_CHAT])
@pytest.mark.parametrize("case", PROMPTS)
def test_bad_prompts_are_refused_by_row(good, case):
    value, message = PROMPTS[case]
    with pytest.raises(ValueError, match=f"Row 1 of the train dataset .*{message}"):
        check(as_json([good, good | {"prompt": value}]))


OTHERS = {
    "score of a text": (SCORED | {"score": "5"}, "score '5'; expected a finite number"),
    "text for a list": (LISTS | {"completions": "abc", "scores": [1, 2, 3]}, "`completions` 'abc' of type str"),
    "number for scores": (LISTS | {"scores": 5}, "`scores` 5 of type int"),
    "number in completions": (LISTS | {"completions": ["x", 5]}, "`completions` 5 of type int"),
    "id of a list": (SCORED | {"prompt_id": [1]}, r"`prompt_id` \[1\] of type list"),
    "missing id": (SCORED | {"prompt_id": None}, "no `prompt_id`"),
    "tools that are no JSON": (PAIR | {"tools": "{oops"}, "`tools` that cannot be read as JSON .*'{oops'"),
    "tools that are too deep": (PAIR | {"tools": "[" * 100_000}, "`tools` that cannot be read as JSON"),
    "tools that are no list": (PAIR | {"tools": "5"}, "`tools` '5'; expected a list of JSON schemas"),
    "tools of texts": (LABELLED | {"tools": ["f"]}, r"`tools` \['f'\]; expected a list of JSON schemas"),
    "kwargs of a list": (PAIR | {"chat_template_kwargs": [1]}, r"`chat_template_kwargs` \[1\] of type list"),
    "label of 2": (LABELLED | {"label": 2}, "label 2 of type int"),
    "label of 1.0": (LABELLED | {"label": 1.0}, "label 1.0 of type float"),
    "label of a text": (LABELLED | {"label": "true"}, "label 'true' of type str"),
    "missing label": (LABELLED | {"label": None}, "label None"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_bad_values_are_refused_by_row(case):
    row, message = OTHERS[case]
    make = {"number in completions": as_json}.get(
        case, Dataset.from_list if "score" in row or "scores" in row else streamed
    )
    with pytest.raises(ValueError, match=f"(?s)Row 0 of the eval dataset .*{message}"):
        list(check(make([row]), "eval"))


def test_numbers_beyond_all_floats_are_no_scores():
    for number in (10**400, -(10**400), float("inf"), float("nan"), 1e13, True):
        assert score_problem(number)


def test_nan_ids_are_missing_ids():
    rows = [SCORED | {"prompt_id": 1.0}, SCORED | {"prompt_id": float("nan")}]
    with pytest.raises(ValueError, match=r"Row 1 of the train dataset has no `prompt_id` .nan."):
        scored_rows(Dataset.from_list(rows), "train")


TEMPLATE = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RESERVED = {
    "chat_template": TEMPLATE,
    "tokenize": False,
    "return_dict": False,
    "tools": [],
    "add_generation_prompt": True,
    "continue_final_message": True,
    "conversation": [],
    "messages": [],
    "max_length": 3,
    "truncation": True,
    "padding": True,
    "return_tensors": "pt",
    "return_assistant_tokens_mask": True,
    "tokenizer_kwargs": {},
}


@pytest.mark.parametrize("key", RESERVED)
@pytest.mark.parametrize("good", [PAIR, LABELLED, SCORED_CHAT])
def test_data_cannot_replace_the_template_or_its_call(good, key):
    rows = [good, good | {"chat_template_kwargs": {key: RESERVED[key], "enable_thinking": False}}]
    rows[0] = good | {"chat_template_kwargs": None}
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"Row 1 of the train dataset has `{key}` in `chat_template_kwargs`"):
        check(as_json(rows))
    assert time.monotonic() - start < 5


def test_kwargs_of_the_template_are_what_the_row_sets():
    """Arrow fills a column of dicts up with None, and a template can tell None from not defined."""
    kwargs = [{"enable_thinking": False}, {"style": "short"}, None]
    rows = [PAIR | {"chat_template_kwargs": value} for value in kwargs]
    expected = [{"enable_thinking": False}, {"style": "short"}, {}]
    data = Dataset.from_list(rows)
    for made in (data, data.to_iterable_dataset(), streamed(rows)):
        assert [row["chat_template_kwargs"] for row in check(made)] == expected


IMPLICIT = {
    "no common text": ("abc", "xyz", "no common beginning"),
    "a common space": (" abc", " xyz", "no common beginning"),
    "one letter that begins the other": ("a", "ab", "no common beginning"),
    "no common turn": (assistant("x"), assistant("y"), "no common beginning"),
    "one turn that begins the other": (
        user("a"),
        user("a") + assistant("x"),
        "`chosen` that is only the beginning of the other side",
    ),
    "a prompt that begins the other": (
        user("a") + assistant("x"),
        user("a") + assistant("x") + user("b"),
        None,
    ),
    "rejected without an answer": (
        user("a") + assistant("b") + user("c") + assistant("x"),
        user("a") + assistant("b") + user("c"),
        "`rejected` that is only the beginning of the other side",
    ),
    "an empty answer": (user("a") + assistant("x"), user("a") + assistant(""), "empty `rejected` after the common"),
    "text and turns": (user("a") + assistant("x"), "ax", "`chosen` of type list with a completion of type str"),
    "text that begins the other": ("a x", "a x y", None),
}


@pytest.mark.parametrize("case", IMPLICIT)
def test_pairs_without_prompt(case):
    """The common start is the prompt, what is left the completion; an empty one is refused as with a `prompt`."""
    chosen, rejected, message = IMPLICIT[case]
    rows = as_json([{"chosen": chosen, "rejected": rejected}])
    if message is None:
        assert len(check(rows)) == 1
        return
    with pytest.raises(ValueError, match=f"Row 0 of the train dataset .*{message}"):
        check(rows)


def test_reward_models_need_no_common_start():
    for pair in ({"chosen": "abc", "rejected": "xyz"}, {"chosen": "a", "rejected": "ab"}):
        assert len(check_paired_rows(Dataset.from_list([pair]), "train", splits_implicit=False)) == 1


def test_text_as_prompt_of_whole_conversations_is_refused_with_the_remedy():
    """As UltraFeedback-binarized has it."""
    row = {"prompt": "a", "chosen": user("a") + assistant("x"), "rejected": user("a") + assistant("y")}
    with pytest.raises(ValueError, match=r"Row 0 .*remove_columns\('prompt'\)"):
        check(Dataset.from_list([row]))
    assert len(check(Dataset.from_list([row]).remove_columns("prompt"))) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first, second", [(PAIR, TEXT_PAIR), (TEXT_PAIR, PAIR)])
def test_rows_of_mixed_form_are_refused(tmp_path, stream, first, second):
    """The form of the first row decides how TRL prepares all of them."""
    (tmp_path / "mixed.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    data = datasets.load_dataset("json", data_files=str(tmp_path / "mixed.jsonl"), split="train", streaming=stream)
    forms = ["conversational", "text"] if first is PAIR else ["text", "conversational"]
    with pytest.raises(ValueError, match=f"Row 1 .* is {forms[1]}, but the first row is {forms[0]}"):
        list(check(data))


def test_long_values_are_shortened():
    with pytest.raises(ValueError) as error:
        check(as_json([LABELLED | {"completion": {"role": "assistant", "content": "x" * 100_000}}]))
    assert len(str(error.value)) < 600


# -- which trainer, which dataset ----------------------------------------------------------------------------------


FITS = {
    "scores for KTO": (
        check_unpaired_rows,
        SCORED,
        r"missing: \['label'\].*for scored rows, or convert the scores to labels for `KTO",
    ),
    "lists for KTO": (check_unpaired_rows, LISTS, "Use `GRPOTrainer` or `PPOTrainer` for lists of"),
    "labels for DPO": (check_paired_rows, LABELLED, "Use `KTOTrainer`, .* for labelled rows"),
    "scores for DPO": (check_paired_rows, SCORED, "Use `GRPOTrainer` or `PPOTrainer` for scored rows"),
    "no judgement": (check_paired_rows, {"prompt": "a", "completion": "x"}, "Use `trl.SFTTrainer`, or"),
    "messages": (check_unpaired_rows, {"messages": user("a")}, "Use `trl.SFTTrainer` for `messages`"),
    "from and value": (check_paired_rows, {"conversations": "a"}, "trl.maybe_convert_to_chatml"),
    "lists without scores": (scored_rows, {"prompt": "a", "completions": ["x"]}, "neither `score` .* nor `label`"),
    "nothing": (scored_rows, {"prompt": "a"}, "Rename or add the columns"),
    "misnamed side": (
        check_paired_rows,
        {"prompt": "a", "chosen": "x", "rejects": "y"},
        r"rename_column\('rejects', 'rejected'\)",
    ),
    "misnamed completion": (
        check_unpaired_rows,
        {"prompt": "a", "completions": "x", "label": True},
        r"rename_column\('completions', 'completion'\)",
    ),
    "misnamed completion of a score": (
        scored_rows,
        {"prompt": "a", "completon": "x", "score": 1.0},
        r"rename_column\('completon', 'completion'\)",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_rows_for_another_trainer_name_it(case):
    checker, row, message = FITS[case]
    with pytest.raises(ValueError, match=message):
        checker(Dataset.from_list([row]), "train")


def test_labels_of_0_and_1_are_booleans():
    rows = [LABELLED | {"label": label} for label in (1, 0)]
    data = Dataset.from_list(rows)
    for made in (data, data.to_iterable_dataset(), streamed(rows)):
        assert [row["label"] for row in check(made)] == [True, False]
        assert all(type(row["label"]) is bool for row in check(made))
    assert list(scored_rows(data, "train")["score"]) == [1.0, -1.0]


def reward_model(tokenizer):
    return LlamaForSequenceClassification(toy.tiny_model(tokenizer).config)


TRAINERS = {
    "DPO": (halos_trl.DPOTrainer, halos_trl.DPOConfig, paired_rows),
    "KTO": (halos_trl.KTOTrainer, halos_trl.KTOConfig, unpaired_rows),
    "GRPO": (halos_trl.GRPOTrainer, halos_trl.GRPOConfig, unpaired_rows),
    "PPO": (halos_trl.PPOTrainer, halos_trl.PPOConfig, unpaired_rows),
    "BradleyTerry": (halos_trl.BradleyTerryTrainer, halos_trl.BradleyTerryConfig, paired_rows),
}


@pytest.fixture
def build(tokenizer, model, make_config):
    """`build("KTO", rows)`: a trainer, not trained."""

    def build(method, rows, eval_dataset=None, **settings):
        trainer_class, config_class, _ = TRAINERS[method]
        if method == "BradleyTerry":
            policy = LlamaForSequenceClassification(
                model.config.__class__(**model.config.to_dict() | {"num_labels": 1})
            )
        else:
            policy = model
        return trainer_class(
            policy,
            args=make_config(config_class, **settings),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )

    return build


def not_datasets(rows):
    import pandas

    return {
        "DatasetDict": (
            datasets.DatasetDict(train=rows),
            r"contains \['train'\]: pass one of them, e.g. `data\['train'\]",
        ),
        "dict": ({"a": rows}, "contains .'a'."),
        "list": (rows.to_list(), "datasets.Dataset.from_list"),
        "DataFrame": (pandas.DataFrame(rows.to_list()), "datasets.Dataset.from_pandas"),
        "name": ("owner/name", r"load_dataset\('owner/name', split='train'\)"),
        "number": (5, "builtins.int; expected"),
    }


@pytest.mark.parametrize("method", TRAINERS)
def test_what_is_no_dataset_is_refused_with_the_call_that_makes_one(build, method):
    rows = TRAINERS[method][2](4)
    for value, message in not_datasets(rows).values():
        with pytest.raises(ValueError, match=f"The train dataset (is of type )?.*{message}"):
            build(method, value)
    with pytest.raises(ValueError, match=r"The eval dataset is of type .*from_list"):
        build(method, rows, eval_dataset=rows.to_list())
    with pytest.raises(ValueError, match="has a transform"):
        build(method, rows.with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="Row 2 of the train dataset has prompt None"):
        build(method, Dataset.from_list([row | ({"prompt": None} if i == 2 else {}) for i, row in enumerate(rows)]))


@pytest.mark.parametrize("method", TRAINERS)
def test_formats_do_not_change_the_rows(build, method):
    rows = TRAINERS[method][2](4)
    plain = build(method, rows).train_dataset
    ids = [column for column in plain.column_names if column.endswith("_ids")]
    expected = plain.select_columns(ids).with_format(None).to_list()
    streams = method not in ("GRPO", "PPO")
    for form in ("torch", "numpy", "pandas", "arrow"):
        made = build(method, rows.with_format(form), eval_dataset={"held": rows.with_format(form)})
        for data in (made.train_dataset, made.eval_dataset["held"]):
            assert data.select_columns(ids).with_format(None).to_list() == expected
        if streams:
            data = build(method, rows.to_iterable_dataset().with_format(form)).train_dataset
            assert [{column: row[column] for column in ids} for row in data] == expected


# -- dropping ------------------------------------------------------------------------------------------------------


BAD_AT_1 = [PAIR, PAIR | {"chosen": []}, PAIR, PAIR | {"prompt": None}]


def test_invalid_rows_are_dropped_and_counted(said):
    kept = check(as_json(BAD_AT_1), drop_invalid=True)
    assert len(kept) == 2
    assert "Dropped 2 of 4 rows of the train dataset. The first, row 1, has an empty `chosen`: []." in said()


def test_invalid_rows_of_a_stream_are_dropped_and_counted(said):
    kept = list(check(streamed([PAIR | {"chosen": []}, PAIR, PAIR | {"prompt": None}]), drop_invalid=True))
    assert kept == [PAIR]
    assert "Dropped 1 rows of the streamed train dataset so far. The last, row 0, has an empty `chosen`" in said()
    assert "Dropped 2 rows of the streamed train dataset so far. The last, row 2, has prompt None" in said()


@pytest.mark.parametrize("make", [as_json, streamed])
def test_nothing_left_is_an_error(make):
    with pytest.raises(ValueError, match=r"All rows of the .*train dataset are invalid"):
        check(make([PAIR | {"chosen": []}] * 3), drop_invalid=True)


def test_rows_of_another_form_than_the_first_are_dropped(said):
    assert list(check(as_json([TEXT_PAIR, PAIR, TEXT_PAIR]), drop_invalid=True)) == [TEXT_PAIR] * 2
    assert "Dropped 1 of 3 rows" in said()


def test_rows_of_lists_are_dropped_as_a_whole():
    rows = as_json([LISTS | {"prompt": p, "scores": [1.0, s]} for p, s in (("a", 0.0), ("b", None))])
    assert list(scored_rows(rows, "train", drop_invalid=True)["prompt"]) == ["a", "a"]


@pytest.mark.parametrize("method", TRAINERS)
def test_every_trainer_drops_where_it_is_told_to(build, said, method):
    rows = TRAINERS[method][2](6).to_list()
    rows[3]["prompt"] = None
    trainer = build(method, Dataset.from_list(rows), drop_invalid_rows=True)
    assert len(trainer.train_dataset) == 5
    assert "Dropped 1 of 6 rows of the train dataset. The first, row 3, has prompt None" in said()


def test_flag_of_the_command_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(TEXT_PAIR | {"chosen": chosen}) for chosen in (" x", "", 5)))
    flags = ["--model_name_or_path", "owner/model", "--dataset_name", str(file), "--output_dir", str(tmp_path)]
    flags += ["--use_cpu", "--bf16", "false", "--drop_invalid_rows"]
    _, config, _, data = cli.parse(halos_trl.DPOConfig, "paired", argv=flags)
    assert config.drop_invalid_rows is True
    assert check(data["train"], drop_invalid=config.drop_invalid_rows).to_list() == [TEXT_PAIR]


# -- groups --------------------------------------------------------------------------------------------------------


def groups_of(*rows):
    return list(scored_rows(as_json(list(rows)), "train")["prompt_group"])


def tool(name):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


DIFFERENT = {
    "tools": [{"tools": [tool("f")]}, {"tools": [tool("g")]}],
    "tools as JSON": [{"tools": json.dumps([tool("f")])}, {"tools": None}],
    "kwargs": [{"chat_template_kwargs": {"enable_thinking": x}} for x in (True, False)],
    "name": [{"prompt": [{"role": "user", "name": name, "content": "a"}]} for name in ("Ann", "Bob")],
    "tool calls": [
        {"prompt": [*user("a"), {"role": "assistant", "content": "", "tool_calls": [{"name": n}]}]} for n in "fg"
    ],
    "reasoning": [{"prompt": [{"role": "user", "content": "a", "reasoning_content": r}]} for r in ("x", None)],
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_groups_are_all_that_reaches_the_template(case):
    """The same messages, but the model sees two prompts: scores 0, 1 and 10, 11 are compared within each."""
    one, other = DIFFERENT[case]
    scores = (0.0, 1.0, 10.0, 11.0)
    rows = [SCORED_CHAT | part | {"score": s} for part, s in zip((one, one, other, other), scores, strict=True)]
    made = scored_rows(as_json(rows), "train")
    assert list(made["prompt_group"]) == [0, 0, 1, 1]
    advantages = list(with_advantages(made, "train", scale_by_std=True)["advantage"])
    # Mean 1/2 (21/2), population deviation 1/2.
    assert advantages == pytest.approx([-0.5 / 0.51, 0.5 / 0.51] * 2, abs=1e-12)


def test_what_the_template_does_not_see_is_no_part_of_the_prompt():
    message = {"role": "user", "content": "a"}
    turned = {"content": "a", "name": None, "role": "user"}
    rows = [
        SCORED_CHAT | {"prompt": [message], "tools": [tool("f")], "source": "x", "group": 7},
        SCORED_CHAT | {"prompt": [turned], "tools": json.dumps([tool("f")]), "source": "y", "group": 8},
    ]
    assert groups_of(*rows) == [0, 0]
    assert list(scored_rows(as_json(rows), "train")["group"]) == [7, 8]  # the user's own column


def test_ids_split_groups_and_never_join_prompts():
    rows = [SCORED | {"prompt": p, "prompt_id": q} for p, q in (("a", 0), ("a", 1), ("a", 0), ("b", 2))]
    assert groups_of(*rows) == [0, 1, 0, 2]
    joined = [SCORED | {"prompt": p, "prompt_id": q} for p, q in (("a", 0), ("b", 1), ("c", 0))]
    with pytest.raises(
        ValueError, match=r"Rows 0 and 2 of the train dataset have the same `prompt_id`, 0, but diff.*'c'"
    ):
        groups_of(*joined)
    lists = [LISTS | {"prompt": p, "prompt_id": 0} for p in "aab"]
    with pytest.raises(ValueError, match="Rows 0 and 2 of"):  # rows as the user has them, not one per completion
        groups_of(*lists)
    tools = [SCORED_CHAT | {"prompt_id": 0, "tools": [tool(name)]} for name in "fg"]
    with pytest.raises(ValueError, match=r"Rows 0 and 1 of .*`tools`"):
        groups_of(*tools)


def test_scored_rows_with_images_are_refused():
    rows = [SCORED_CHAT | {"image": Image.new("RGB", (4, 4), "red")}] * 2
    with pytest.raises(ValueError, match="has images, which `GRPOTrainer` and `PPOTrainer` do not support"):
        scored_rows(Dataset.from_list(rows), "train")


def test_common_start_is_found_where_a_field_of_one_side_is_filled_up():
    """One rejected side has a `name`, so Arrow gives all of them one, which is None."""
    named = [{"role": "assistant", "name": "Bob", "content": "y"}]
    rows = [
        {"chosen": user(p) + assistant("x"), "rejected": user(p) + (named if p == "b" else assistant("y"))}
        for p in "ab"
    ]
    made = check(Dataset.from_list(rows)).map(split_prompt)
    assert made["prompt"][:] == [user("a"), user("b")]
    assert made["chosen"][:] == [assistant("x")] * 2
    assert [turns[0]["content"] for turns in made["rejected"]] == ["y", "y"]
    assert groups_of(*rows, rows[0]) == [0, 1, 0, 0, 1, 0]


def test_columns_that_are_made_are_said_to_replace_the_users(said):
    made = scored_rows(Dataset.from_list([SCORED | {"label": False, "prompt_group": 9}]), "train")
    assert made.to_list() == [SCORED | {"label": True, "prompt_group": 0}]
    assert "columns ['prompt_group'], which are ignored" in said()
    assert "has a column `label` in addition to the scores, which is ignored" in said()


# -- speed ---------------------------------------------------------------------------------------------------------


def test_checks_are_quick():
    """A second or two for 100,000 rows on a machine of its own; here a tenth of them, with room for a busy one."""
    data = Dataset.from_list(paired_rows(500).to_list() * 20)
    start = time.monotonic()
    check(data)
    assert time.monotonic() - start < 5


def test_trl_forms_are_not_refused():
    """Whatever TRL's documentation shows as the forms of its datasets."""
    assert trl.is_conversational(PAIR) and not trl.is_conversational(TEXT_PAIR)
    call = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}]
    rows = [
        PAIR | {"prompt": [{"role": "system", "content": ""}, *user("a")]},
        PAIR | {"prompt": user([{"type": "image"}, {"type": "text", "text": "a"}])},
        PAIR | {"chosen": call, "tools": [tool("f")]},
        PAIR | {"prompt": [*user("a"), *call, {"role": "tool", "name": "f", "content": "1"}]},
        PAIR | {"tools": json.dumps([tool("f")]), "chat_template_kwargs": {"enable_thinking": False, "documents": []}},
        PAIR | {"tools": None, "chat_template_kwargs": None},
    ]
    for row in rows:
        assert len(check(as_json([row]))) == 1
