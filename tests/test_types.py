"""Type checkers understand the public classes: signatures, return types, a script with deliberate mistakes."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import halos_trl

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("typed_script.py")
TRAINERS = sorted({name for name in halos_trl.__all__ if name.endswith("Trainer")})
CONFIGS = sorted({name for name in halos_trl.__all__ if name.endswith("Config")})


@pytest.mark.parametrize("name", TRAINERS + CONFIGS)
def test_signature_names_every_argument(name):
    signature = inspect.signature(getattr(halos_trl, name))
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    expected = {"model", "args", "train_dataset", "peft_config"} if name in TRAINERS else set()
    assert expected <= signature.parameters.keys()


@pytest.mark.parametrize("name", [name for name in halos_trl.__all__ if name.islower()])
def test_functions_say_what_they_return(name):
    function = getattr(halos_trl, name)
    if function.__module__.startswith("halos_trl"):
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty


# Modules that the script's types do not come from, and that take most of the time.
MYPY_SETTINGS = """
[mypy]
ignore_missing_imports = true
follow_imports = silent

[mypy-transformers.models.*,transformers.integrations.*,torch._inductor.*,torch._dynamo.*,torch.distributed.*]
follow_imports = skip

[mypy-peft.tuners.*,huggingface_hub.inference.*,wandb.*]
follow_imports = skip
"""


def wrong_lines():
    return {number for number, line in enumerate(SCRIPT.read_text().splitlines(), 1) if line.endswith("  # error")}


@pytest.mark.slow
def test_mypy_finds_each_mistake_and_no_other(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(MYPY_SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), str(SCRIPT)]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache")],
        cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    found = re.findall(r"typed_script\.py:(\d+): error: ", done.stdout)
    assert sorted(set(map(int, found))) == sorted(wrong_lines()), done.stdout + done.stderr


@pytest.mark.slow
def test_pyright_finds_each_mistake_and_no_other():
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(SCRIPT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [e for e in json.loads(done.stdout)["generalDiagnostics"] if e["severity"] == "error"]
    found = {error["range"]["start"]["line"] + 1 for error in errors}
    assert sorted(found) == sorted(wrong_lines()), errors
