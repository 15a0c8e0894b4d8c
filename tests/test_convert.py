"""`halos-trl convert`: HALOs' files to rows to Parquet and back."""

import datetime
import json
from pathlib import Path

import datasets
import pytest
from test_feedback import answer, chat, scalar, write

from halos_trl.cli.main import main

FILES = Path(__file__).parent / "data" / "halos"


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """`convert("in.json", "out.jsonl", ...flags)`: exit code and what was said; in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(inputs, output, *flags):
        inputs = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
        code = main(["convert", "--input", *inputs, "--output", str(output), *flags])
        return code, capsys.readouterr().err

    return run


def read(path):
    text = Path(path).read_text("utf-8")
    return json.loads(text) if str(path).endswith(".json") else [json.loads(line) for line in text.splitlines()]


def said_of(items):
    """The values that HALOs reads from items, sorted."""
    keys = ("prompt", "output", "output_A", "output_B", "label", "reward", "reward_A", "reward_B", "type")
    return sorted(json.dumps({key: item[key] for key in keys if key in item}) for item in items)


@pytest.mark.parametrize("middle", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize("name", ["binary", "pairwise", "scalar"])
def test_there_and_back(convert, name, middle):
    source = FILES / f"{name}_feedback.json"
    assert convert(source, middle)[0] == 0
    assert convert(middle, "back.json", "--format", "halos")[0] == 0
    items, back = read(source), read("back.json")
    if name == "pairwise":  # A and B may have changed places
        items = [item if item["label"] else swapped(item) for item in items]
    assert said_of(back) == said_of(items)


def swapped(item):
    changed = {f"{key}_{one}": item[f"{key}_{other}"] for key in ("output", "reward") for one, other in ("AB", "BA")}
    return {**item, **changed, "label": 1 - item["label"]}


def test_rows_to_parquet_keep_where_they_come_from(convert):
    code, said = convert(FILES / "binary_feedback.json", "rows.parquet", "--for_", "group", "--split", "test")
    rows = datasets.Dataset.from_parquet("rows.parquet")
    assert (code, len(rows)) == (0, 5)
    assert "Wrote 5 rows to rows.parquet." in said
    assert convert("rows.parquet", "pairs.jsonl", "--for_", "paired")[0] == 0
    assert all(source.startswith("rows.parquet#") for row in read("pairs.jsonl") for source in row["sources"])


def test_rows_without_scores_get_rewards_that_halos_can_read(convert, tmp_path):
    pairs = [{"prompt": chat("p"), "chosen": answer("a"), "rejected": [answer("b"), answer("c")], "own": 1}]
    code, said = convert(write(tmp_path, pairs), "out.json", "--format", "halos")
    assert code == 0
    assert "Wrote 2 items to out.json. Dropped keys: `own`." in said
    assert [(item["output_B"], item["label"], item["reward_A"], item["reward_B"]) for item in read("out.json")] == [
        (answer("b"), 1, 1.0, -1.0),
        (answer("c"), 1, 1.0, -1.0),
    ]
    assert Path("out.json").read_text().startswith("[\n{\n")


def test_nothing_is_overwritten_unasked_and_nothing_written_in_part(convert, tmp_path):
    path = write(tmp_path, [scalar("p", "a", 1.0), scalar("q", "b", 2.0)])
    Path("out.jsonl").write_text("mine")
    code, said = convert(path, "out.jsonl")
    assert (code, Path("out.jsonl").read_text()) == (2, "mine")
    assert "`--output out.jsonl` exists. Pass `--overwrite`" in said
    assert convert(path, "out.jsonl", "--overwrite")[0] == 0
    assert len(read("out.jsonl")) == 2
    broken = tmp_path / "broken.json"
    broken.write_text(path.read_text()[:-30])
    assert convert(broken, "out.jsonl", "--overwrite", "--format", "halos")[0] == 2
    assert len(read("out.jsonl")) == 2
    said = convert(path, "feedback.json", "--overwrite")[1]
    assert said.strip().endswith("is one of the inputs. Choose another file.")


def test_other_columns_of_a_table_may_be_of_any_type(convert):
    rows = {"prompt": ["p"], "completion": ["c"], "label": [True], "asked": [datetime.date(2026, 1, 1)]}
    datasets.Dataset.from_dict(rows).to_parquet("rows.parquet")
    assert convert("rows.parquet", "out.jsonl")[1].strip().endswith("Dropped keys: `asked`.")
    datasets.Dataset.from_dict({**rows, "prompt": [b"p"]}).to_parquet("bytes.parquet")
    code, said = convert("bytes.parquet", "bytes.jsonl")
    assert code == 2 and "bytes.parquet, row 0 cannot be written as JSON" in said


def test_a_folder_in_the_way_of_the_output_is_one_line(convert, tmp_path):
    path = write(tmp_path, [scalar("p", "a", 1.0), scalar("q", "b", 2.0)])
    Path("out.jsonl").mkdir()
    code, said = convert(path, "out.jsonl", "--overwrite")
    assert code == 2 and "Traceback" not in said and "s a directory" in said


def test_a_single_input_of_a_config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [scalar("p", "a", 1.0), scalar("q", "b", 2.0)])
    Path("convert.yaml").write_text("input: feedback.json\noutput: rows.jsonl\n")
    assert main(["convert", "--config", "convert.yaml"]) == 0
    assert len(read("rows.jsonl")) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("rows.csv", "out.json"), "has the suffix '.csv'; supported are .json, .jsonl, .parquet"),
        (("feedback.json", "out.parquet", "--format", "halos"), "HALOs reads JSON, not Parquet"),
        (("feedback.json", "out.json", "--format", "halos", "--for_", "sft"), "`--for_` applies to"),
        (("feedback.json", "out.json", "--format", "halos", "--pair_mode", "min"), "`--pair_mode min` has no effect"),
        (("feedback.json", "out.json", "--format", "halos", "--label_threshold", "1"), "`--label_threshold 1` has no"),
        (("feedback.json", "out.json", "--format", "halos", "--pair_threshold", "1"), "`--pair_threshold 1.0` has no"),
        (("feedback.json", "out.json", "--for_", "dpo"), "`for_` is 'dpo'; expected one of"),
        (("text.json", "out.json", "--format", "halos"), "text.json, item 0 has a text as prompt"),
        (("text.parquet", "out.json"), "text.parquet cannot be read as Parquet"),
    ],
)
def test_what_cannot_be_converted(convert, tmp_path, flags, message):
    write(tmp_path, [scalar("p", "a", 1.0)])
    write(tmp_path, [{"prompt": "p", "completion": "a", "label": True}], "text.json")
    Path("text.parquet").write_text("no table")
    code, said = convert(*flags)
    assert code == 2
    assert message in said
