"""The tutorial notebook runs from the first cell to the last, in its own kernel."""

from dataclasses import asdict
from pathlib import Path

import pytest

from halos_trl.toy.cache import cached
from halos_trl.toy.model import MODEL_FILES, RECIPE

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tutorial.ipynb"


@pytest.mark.slow
def test_tutorial_runs(tmp_path, monkeypatch, tokenizer, model):
    """On an untrained model of 25,000 parameters in place of the one that takes a minute to train, and 64 rows."""

    def build(directory):
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    monkeypatch.setenv("HALOS_TRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUTORIAL_ROWS", "64")
    monkeypatch.setenv("TUTORIAL_PROMPTS", "20")
    cached("toy-model", None, build, MODEL_FILES, seed=0, **asdict(RECIPE))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout").splitlines()
    assert len([line for line in printed if line.startswith("accuracy")]) == 3
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 2
    assert (tmp_path / "tutorial-humanline" / "model.safetensors").is_file()
