"""Contents of an installed wheel: the package, its templates, the examples and the configs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from halos_trl.cli import main

ROOT = Path(__file__).parents[1]
SHIPPED = {
    path.relative_to(ROOT).as_posix()
    for pattern in ("examples/*.py", "examples/*.ipynb", "configs/**/*.yaml")
    for path in ROOT.glob(pattern)
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built without network in a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("halos_trl", "examples", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_package_examples_and_configs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "halos_trl").rglob("*.py")}
    assert package | {"halos_trl/py.typed", "halos_trl/templates/model_card.md"} <= names
    assert "halos-trl = halos_trl.cli.main:main" in entry_points
    assert {name.partition("share/halos_trl/")[2] for name in names if "share/halos_trl/" in name} == SHIPPED


@pytest.mark.slow
def test_installed_command_copies_the_examples(wheel, tmp_path):
    """Installed with pip, without the checkout, in an empty folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    # Otherwise pip would uninstall the checkout from the environment of the tests.
    apart = ["--ignore-installed", "--prefix", str(tmp_path / "prefix")]
    subprocess.run([*pip, *apart, str(wheel)], check=True)
    (empty := tmp_path / "empty").mkdir()
    command = next((tmp_path / "prefix").glob("*/halos-trl*"))
    packages = next((tmp_path / "prefix").glob("**/site-packages"))
    environment = os.environ | {"PYTHONPATH": str(packages)}
    subprocess.run([sys.executable, str(command), "examples"], cwd=empty, env=environment, check=True)
    assert {p.relative_to(empty).as_posix() for p in empty.rglob("*") if p.is_file()} == SHIPPED


def test_examples_are_copied_and_not_replaced(tmp_path, capsys):
    assert main.main(["examples", "--output", str(tmp_path)]) == 0
    copied = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert copied == SHIPPED
    script = tmp_path / "examples" / "train_kto.py"
    script.write_text("mine")
    assert main.main(["examples", "--output", str(tmp_path)]) == 2
    assert "Pass `--overwrite`" in capsys.readouterr().err and script.read_text() == "mine"
    assert main.main(["examples", "--output", str(tmp_path), "--overwrite"]) == 0
    assert script.read_text() == (ROOT / "examples" / "train_kto.py").read_text()
