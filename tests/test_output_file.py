"""The output file of a command: resumed after a kill, never overwritten, never mixing two sets of settings."""

import json
import re

import datasets
import pytest

from halos_trl.cli.output import OutputFile, fingerprint, is_finished, read_items

SETTINGS = {"model": "a", "seed": 0, "stop": ["x"], "temperature": 1.0}
ITEMS = [{"n": i, "text": "é\u2028\n"} for i in range(5)]


def interrupted(path, items, tail=b""):
    """A file as a killed run leaves it: some items and part of a line."""
    with pytest.raises(KeyboardInterrupt), OutputFile(path, SETTINGS) as output:
        output.write(*items)
        raise KeyboardInterrupt
    with path.open("ab") as file:
        file.write(tail)


@pytest.mark.parametrize("done", [0, 1, 3, 5])
@pytest.mark.parametrize("tail", [b"", b'{"n": 9, "te', '{"text": "é'.encode()[:-1]])
def test_resumed_file_is_the_uninterrupted_one(tmp_path, done, tail):
    with OutputFile(tmp_path / "whole.jsonl", SETTINGS) as output:
        output.write(*ITEMS)
    path = tmp_path / "new" / "cut.jsonl"
    interrupted(path, ITEMS[:done], tail)
    assert not is_finished(path)
    with OutputFile(path, SETTINGS) as output:
        assert output.count == done and list(output.items()) == ITEMS[:done]
        assert output.resumed
        for item in ITEMS[done:]:
            output.write(item)
        assert output.count == 5
    assert is_finished(path)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == ITEMS
    assert sorted(p.name for p in path.parent.iterdir()) == [".cut.jsonl.settings.yaml", "cut.jsonl"]


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "out.jsonl"
    interrupted(path, ITEMS[:2])
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"started with other settings: `seed` was 0 and is 1; `top_p` was '\(none\)'"
    ):
        OutputFile(path, {**SETTINGS, "seed": 1, "top_p": 0.9})
    assert path.read_bytes() == before
    with OutputFile(path, {**SETTINGS, "seed": 1}, overwrite=True) as output:
        assert output.count == 0 and not output.resumed
    assert path.read_bytes() == b""


def test_file_without_an_item_may_be_begun_with_other_settings(tmp_path):
    interrupted(tmp_path / "out.jsonl", [])
    with OutputFile(tmp_path / "out.jsonl", {"seed": 5}) as output:
        output.write({})
    assert is_finished(tmp_path / "out.jsonl")


def test_finished_and_foreign_files_are_not_overwritten(tmp_path):
    path = tmp_path / "out.jsonl"
    with OutputFile(path, SETTINGS):
        pass
    with pytest.raises(ValueError, match=r"exists and is finished.*--overwrite"):
        OutputFile(path, SETTINGS)
    foreign = tmp_path / "mine.jsonl"
    foreign.write_text("precious")
    with pytest.raises(ValueError, match=re.escape("`.mine.jsonl.settings.yaml` next to it does not")):
        OutputFile(foreign, SETTINGS)
    assert foreign.read_text() == "precious"


def test_half_a_character_is_written_as_its_escape(tmp_path):
    with OutputFile(tmp_path / "out.jsonl", SETTINGS) as output:
        output.write({"reply": "\ud83d é"})
    assert (tmp_path / "out.jsonl").read_bytes() == '{"reply": "\\ud83d é"}\n'.encode()
    assert list(output.items()) == [{"reply": "\ud83d é"}]


def test_refused_file_leaves_no_lock_and_a_folder_is_none(tmp_path):
    (tmp_path / "mine.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="next to it does not"):
        OutputFile(tmp_path / "mine.jsonl", SETTINGS)
    with pytest.raises(ValueError, match="is a folder"):
        OutputFile(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


def test_two_writers_at_once_are_refused(tmp_path):
    with OutputFile(tmp_path / "out.jsonl", SETTINGS) as output:
        output.write({"n": 0})
        with pytest.raises(ValueError, match="another process"):
            OutputFile(tmp_path / "out.jsonl", SETTINGS)
    assert list(read_items(tmp_path / "out.jsonl")) == [{"n": 0}]


def test_settings_file_is_no_data_to_datasets(tmp_path):
    with OutputFile(tmp_path / "folder" / "train.jsonl", SETTINGS) as output:
        output.write(*ITEMS)
    rows = datasets.load_dataset(str(tmp_path / "folder"))
    assert list(rows) == ["train"] and list(rows["train"]) == ITEMS


@pytest.mark.parametrize(("line", "reason"), [("{", "line 2: not JSON"), ("[1]", "line 2: contains a list")])
def test_damaged_line_is_named(tmp_path, line, reason):
    (tmp_path / "out.jsonl").write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=reason):
        list(read_items(tmp_path / "out.jsonl"))


def test_fingerprint_sees_every_item_and_the_order():
    assert fingerprint([{"a": 1, "b": 2}]) == fingerprint([{"b": 2, "a": 1}])
    assert len({fingerprint(x) for x in ([], [1], [1, 2], [2, 1], [12], ["1"])}) == 6
