"""`halos-trl merge`: an adapter merged into its base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..merge import merge_folder
from .arguments import read_arguments


@dataclass
class MergeArguments:
    """Merge an adapter into its unquantized base model, check the result against the adapter, and save it."""

    adapter: str | None = field(default=None, metadata={"help": "Folder of a trained adapter (`--use_peft`)."})
    output: str | None = field(default=None, metadata={"help": "Folder to write. None: `<adapter>-merged`."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Dtype of the base model; auto: the checkpoint's."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Rename an existing output first."})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    arguments = read_arguments(MergeArguments, argv, "merge")
    if arguments.adapter is None:
        raise ValueError("No adapter was given. Pass `--adapter FOLDER`.")
    output = arguments.output or f"{arguments.adapter.rstrip('/')}-merged"
    merge_folder(arguments.adapter, output, dtype=arguments.dtype, overwrite=arguments.overwrite)
    print(f"Merged model saved to {output}")
