"""`halos-trl plan`: estimates the memory of a training run, and lists the engines on which it fits."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ..memory import (
    ENGINES,
    TUNINGS,
    Engine,
    Run,
    Shape,
    Tuning,
    activations,
    cast_weights,
    logits,
    references,
    state,
    total,
    unfused_logits,
)
from .arguments import read_arguments

SIZES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
"""The shapes of Llama 3.2 1B and of Llama 3.1 8B and 70B."""

SIZE_RANGE = (0.3e9, 1e12)
"""Range of parameters: from the shape of 1B with a single layer (0.32 billion) to models that take a minute to build.
"""

SEQUENCES = {"dpo": 2, "cdpo": 2, "ipo": 2, "simpo": 2, "slic": 2, "kto": 1, "grpo": 1, "ppo": 1}
"""Number of sequences per example."""

WITHOUT_REFERENCE = ("simpo", "slic")


@dataclass
class PlanArguments:
    """Print the estimated memory of a training run on each device, part by part, and the engines on which it fits."""

    model: list[str] = field(
        default_factory=lambda: ["8B"],
        metadata={
            "help": "Folder, `config.json`, Hub id, or a size such as 8B (the shapes of Llama 3). Several: a table in "
            "Markdown."
        },
    )
    method: Literal["kto", "dpo", "cdpo", "ipo", "simpo", "slic", "grpo", "ppo"] = field(
        default="kto",
        metadata={"help": "Determines the number of sequences per example, and whether there is a reference."},
    )
    engine: Literal["one_device", "ddp", "fsdp2", "zero2", "zero3"] = field(
        default="ddp", metadata={"help": "Engine of the detailed list; the summary covers all of them."}
    )
    num_processes: int = field(default=8, metadata={"help": "Number of devices."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Examples per micro-batch on each device."})
    max_length: int = field(default=1024, metadata={"help": "Tokens per sequence, prompt and completion together."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Data type in which weights are loaded."}
    )
    bf16: bool = field(default=True, metadata={"help": "Compute in bfloat16."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Keep one hidden state per layer and recompute the rest."}
    )
    humanline: bool = field(default=False, metadata={"help": "The reference follows the policy (humanline)."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters, on all linear layers."})
    packed_share: float = field(
        default=0.44,
        metadata={
            "help": "Number of distinct real tokens divided by the tokens of padded rows (chat-like pairs: 0.44)."
        },
    )
    gpu_memory: float = field(default=80.0, metadata={"help": "Memory of a device in GB."})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    arguments = read_arguments(PlanArguments, argv, "plan")
    check(arguments)
    shapes = [(name, *shape_of(name)) for name in arguments.model]
    if len(shapes) > 1:
        print(table(arguments, [(name, shape) for name, shape, _ in shapes]))
        return
    ((name, shape, assumed),) = shapes
    print(listing(arguments, name, shape, assumed))


def check(arguments: PlanArguments) -> None:
    """Raise ValueError for numbers out of range."""
    for name in ("num_processes", "per_device_train_batch_size", "max_length", "lora_r", "gpu_memory"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise ValueError(f"`--{name}` is {getattr(arguments, name)}; expected a finite number above 0.")
    if not 0 < arguments.packed_share <= 1:
        raise ValueError(f"`--packed_share` is {arguments.packed_share}; expected a share in (0, 1].")


def run_of(arguments: PlanArguments, engine: Engine | None = None) -> Run:
    """The run that the flags describe, on their engine or another one."""
    engine = engine or arguments.engine
    return Run(
        engine=engine,
        devices=1 if engine == "one_device" else arguments.num_processes,
        weight_bytes=4 if arguments.dtype == "float32" else 2,
        compute_bytes=2 if arguments.bf16 or arguments.dtype == "bfloat16" else 4,
        tokens=arguments.per_device_train_batch_size * SEQUENCES[arguments.method] * arguments.max_length,
        lora_rank=arguments.lora_r,
        checkpointing=arguments.gradient_checkpointing,
        moves=arguments.humanline,
    )


# -- the model -----------------------------------------------------------------------------------------------------


def shape_of(name: str) -> tuple[Shape, str]:
    """The sizes of a model, and the assumption behind them. Weights are neither loaded nor allocated.

    Raises ValueError if `name` is neither a model nor a size.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)([BM])", name, re.IGNORECASE)
    if size and not Path(name).exists():
        config, assumed = _config_of_size(name, float(size[1]) * (1e9 if size[2].upper() == "B" else 1e6))
    else:
        try:
            config, assumed = AutoConfig.from_pretrained(name), f"the config of {name}"
        except (OSError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
            raise ValueError(
                f"`--model {name}` is no folder, `config.json` or Hub id of a model, and no size such as 8B: "
                f"{str(error).splitlines()[0]}"
            ) from error
    try:
        with torch.device("meta"):
            return shape_of_model(AutoModelForCausalLM.from_config(config)), assumed
    except Exception as error:  # models raise all kinds of errors for values that they do not support
        raise ValueError(
            f"`--model {name}` is not supported, because estimates need a decoder-only language model with attention "
            f"and `torch.nn.Linear` layers: {str(error).splitlines()[0]}"
        ) from error


def shape_of_model(model: Any) -> Shape:
    """The sizes of a causal LM of transformers.

    Raises ValueError or AttributeError for a model without attention, whose config does not contain the width of the
    MLP, or whose layers are not `torch.nn.Linear` (GPT-2).
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    if not linear:
        raise ValueError(f"{type(model).__name__} has none.")
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        quantizable=sum(m.weight.numel() for m in linear),
        quantizable_rows=sum(m.out_features for m in linear),
        head=head.weight.numel(),
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size),
        attention=heads * width,
        key_value=2 * (getattr(config, "num_key_value_heads", None) or heads) * width,
        vocabulary=config.vocab_size,
        adapter_per_rank=sum(m.in_features + m.out_features for m in linear),
    )


def _config_of_size(name: str, parameters: float) -> tuple[LlamaConfig, str]:
    """The nearest of the known shapes, with more or fewer layers.

    Raises ValueError for sizes out of range.
    """
    if not SIZE_RANGE[0] <= parameters <= SIZE_RANGE[1]:
        raise ValueError(
            f"`--model {name}`: sizes must be from 0.3B to 1000B. Pass the `config.json` of the model instead."
        )
    known = {size: float(size[:-1]) * 1e9 for size in SIZES}
    nearest = min(known, key=lambda size: abs(known[size] - parameters))
    shape = {"num_key_value_heads": 8, "vocab_size": 128256} | SIZES[nearest]
    assumed = f"the shape of Llama 3 {nearest}"
    if known[nearest] != parameters:
        h, f, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
        layer = 2 * h * h + 2 * h * 8 * h // heads + 3 * h * f
        embeddings = 128256 * h * (1 if shape.get("tie_word_embeddings") else 2)
        shape["num_hidden_layers"] = max(1, round((parameters - embeddings) / layer))
        assumed += f" with {shape['num_hidden_layers']} layer{'s' * (shape['num_hidden_layers'] > 1)}"
    return LlamaConfig(**shape), assumed


# -- what is printed -----------------------------------------------------------------------------------------------


def listing(arguments: PlanArguments, name: str, shape: Shape, assumed: str) -> str:
    """The detailed listing: each part on a device, the reference in each storage, the engines that fit."""
    run = run_of(arguments)
    packed = dataclasses.replace(run, tokens=round(run.tokens * arguments.packed_share))
    lines = [
        f"{name}: {shape.parameters / 1e9:.2f} billion parameters ({assumed}); {arguments.method}, {run.engine} on "
        f"{run.devices} device{'s' * (run.devices > 1)}, {run.tokens} tokens in a micro-batch.",
        "GB on each device:",
        "",
        _row("", TUNINGS),
    ]
    states = [state(shape, run, tuning) for tuning in TUNINGS]
    lines += [_row(part, [parts[part] for parts in states]) for part in states[0]]
    lines.append(_row("16-bit copies of weights", [cast_weights(shape, run, tuning) for tuning in TUNINGS]))
    if arguments.method not in WITHOUT_REFERENCE:
        lines += _reference_rows(shape, run)
    for kept in (False, True):
        label = ", gradient checkpointing" if kept else ""
        for rows, numbers in (("padded", run), ("packed", packed)):
            size = activations(shape, dataclasses.replace(numbers, checkpointing=kept))
            lines.append(_row(f"activations, {rows} rows{label}", [size] * 3))
    lines.append(_row("tile of logits", [logits(shape, run)] * 3))
    lines += ["", *_fits(arguments, shape), "", *_assumptions(arguments, shape, run)]
    return "\n".join(lines)


def _row(label: str, cells: Sequence[float | str | None]) -> str:
    shown = ["-" if c is None else c if isinstance(c, str) else f"{c / 1e9:.2f}" for c in cells]
    return f"{label:52}" + "".join(f"{cell:>10}" for cell in shown)


def _reference_rows(shape: Shape, run: Run) -> list[str]:
    adapter = references(shape, run, "lora")["the policy's base model"]
    rows = references(shape, run, "full").items()
    return [_row(f"reference: {name}", [size, *[adapter if name == "same" else None] * 2]) for name, size in rows]


def smallest(arguments: PlanArguments, shape: Shape, engine: Engine, tuning: Tuning) -> dict[str, float]:
    """Total bytes on each device, by kind of reference."""
    run = run_of(arguments, engine)
    run = dataclasses.replace(run, tokens=round(run.tokens * arguments.packed_share))
    kinds: dict[str, float | None] = {"none": 0}
    if arguments.method not in WITHOUT_REFERENCE:
        kinds = references(shape, run, tuning)
    return {kind: total(shape, run, tuning, size) for kind, size in kinds.items() if size is not None}


def _fits(arguments: PlanArguments, shape: Shape) -> list[str]:
    """For each engine the sum with the default reference, and the first kind of reference that fits."""
    lines = [f"All parts, packed rows; what fits on {arguments.gpu_memory:g} GB:", _row("", TUNINGS)]
    for engine in ENGINES:
        cells = []
        for tuning in TUNINGS:
            sizes = smallest(arguments, shape, engine, tuning)
            fitting = [kind for kind, size in sizes.items() if size <= arguments.gpu_memory * 1e9]
            default = next(iter(sizes))
            mark = "" if default in fitting else f" {fitting[0]}" if fitting else " no"
            cells.append(f"{sizes[default] / 1e9:.1f}{mark}")
        lines.append(f"{engine:24}" + "".join(f"{cell:>20}" for cell in cells))
    lines[1] = f"{'':24}" + "".join(f"{tuning:>20}" for tuning in TUNINGS)
    return [*lines, "`no`: too large; `bf16`, `cpu`, ...: fits with this `reference_storage`."]


def _assumptions(arguments: PlanArguments, shape: Shape, run: Run) -> list[str]:
    kept = "with" if arguments.gradient_checkpointing else "without"
    return [
        f"Assumed: AdamW, weights in {arguments.dtype}, sums {kept} gradient checkpointing, adapters of rank "
        f"{arguments.lora_r} on all linear layers, packed rows with {arguments.packed_share:.0%} of the padded "
        "tokens, an attention that does not keep its scores (sdpa), reads of a reference without stored activations.",
        f"All logits would take {unfused_logits(shape, run) / 1e9:.2f} GB; the fused LM head has one tile of them in "
        "memory.",
        "Not counted: the CUDA context (about 0.5 GB), communication buffers, fragmentation. Leave 10 % free.",
    ]


def table(arguments: PlanArguments, shapes: Sequence[tuple[str, Shape]]) -> str:
    """Markdown: GB on each device for several models, engines and kinds of reference."""
    columns = ["full, `same`", "full, `bf16`", "full, `4bit`", "full, `cpu`", "full, precomputed", "LoRA", "QLoRA"]
    lines = ["| model | engine | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, shape in shapes:
        for engine in ENGINES:
            full = smallest(arguments, shape, engine, "full")
            cells = [full.get(kind, full.get("none")) for kind in ("same", "bf16", "4bit", "cpu", "precomputed")]
            cells += [next(iter(smallest(arguments, shape, engine, tuning).values())) for tuning in TUNINGS[1:]]
            shown = ["-" if cell is None else f"{cell / 1e9:.1f}" for cell in cells]
            lines.append(f"| {name} | `{engine}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


__all__ = ["PlanArguments", "listing", "main", "shape_of", "shape_of_model", "table"]
