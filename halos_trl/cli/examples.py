"""`halos-trl examples`: the example scripts and configs that come with the package, copied to a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from .arguments import read_arguments

FOLDERS = ("examples", "configs")
_CHECKOUT = Path(__file__).parents[2]
_INSTALLED = "share/halos_trl/"  # as in [tool.setuptools.data-files] of pyproject.toml


@dataclass
class ExamplesArguments:
    """Copy the example scripts, the tutorial notebook and the configs to the folders `examples` and `configs`."""

    output: str = field(default=".", metadata={"help": "Folder in which the two folders are created."})
    overwrite: bool = field(default=False, metadata={"help": "Replace files that exist."})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    arguments = read_arguments(ExamplesArguments, argv, "examples")
    target = Path(arguments.output)
    sources = shipped_files()
    existing = [name for name in sources if (target / name).exists()]
    if existing and not arguments.overwrite:
        raise ValueError(
            f"{target / existing[0]} exists. Pass `--overwrite` to replace it, or `--output` with another folder."
        )
    for name, source in sources.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)
    print(f"Copied {len(sources)} files to {' and '.join(str(target / folder) for folder in FOLDERS)}")


def shipped_files() -> dict[str, Path]:
    """Name (`examples/train_kto.py`) -> file, of an installed wheel or of a checkout.

    Raises ValueError if the installation contains none.
    """
    if (_CHECKOUT / "pyproject.toml").is_file():
        found = {p.relative_to(_CHECKOUT).as_posix(): p for folder in FOLDERS for p in (_CHECKOUT / folder).rglob("*")}
    else:
        found = _installed()
    sources = {name: p for name, p in sorted(found.items()) if p.suffix in (".py", ".yaml", ".ipynb") and p.is_file()}
    if not sources:
        raise ValueError(
            "This installation of halos_trl contains no examples. Install the wheel with pip, or copy the folders "
            "`examples` and `configs` from the repository."
        )
    return sources


def _installed() -> dict[str, Path]:
    try:
        listed = files("halos_trl") or []
    except PackageNotFoundError:
        return {}
    return {p.as_posix().partition(_INSTALLED)[2]: Path(str(p.locate())) for p in listed if _INSTALLED in p.as_posix()}
