"""Estimates of a training run's memory on each device, computed from the sizes of the model and the engine's settings.

All results are in bytes. No model is loaded or run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["one_device", "ddp", "fsdp2", "zero2", "zero3"]
Tuning = Literal["full", "lora", "qlora"]

ENGINES: tuple[Engine, ...] = ("one_device", "ddp", "fsdp2", "zero2", "zero3")
TUNINGS: tuple[Tuning, ...] = ("full", "lora", "qlora")
STORAGES = ("same", "bf16", "8bit", "4bit", "cpu")

FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight in NF4: half a byte, plus one byte per 64 weights and one float32 per 256 of those bytes."""

TILE = (4096, 32768)
"""Numbers of tokens and vocabulary entries in a tile of TRL's fused LM head."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model."""

    parameters: int
    quantizable: int
    """Parameters of the linear layers without the LM head."""
    quantizable_rows: int
    """Number of rows of their weights; 8-bit layers have one scale per row."""
    head: int
    """Parameters of the LM head, even if it is tied to the embeddings."""
    largest_module: int
    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP; in a mixture of experts, the total width of all experts that process a token."""
    attention: int
    """Width of the queries of all heads."""
    key_value: int
    """Width of keys and values of all heads together."""
    vocabulary: int
    adapter_per_rank: int
    """Parameters that LoRA on all linear layers adds for each rank."""


@dataclass(frozen=True)
class Run:
    """Settings of a training run. `tokens`: tokens in a micro-batch on one device, including padding."""

    engine: Engine = "one_device"
    devices: int = 1
    weight_bytes: int = 4
    """4 for float32 weights, 2 for bfloat16."""
    compute_bytes: int = 2
    """2 under `bf16=True`."""
    tokens: int = 4096
    lora_rank: int = 16
    checkpointing: bool = False
    moves: bool = False
    """Whether the reference follows the policy (humanline, `sync_ref_model`)."""

    @property
    def half_engine(self) -> bool:
        """Whether DeepSpeed casts the models to 16 bits."""
        return self.engine in ("zero2", "zero3") and self.compute_bytes == 2

    @property
    def weight(self) -> int:
        """Bytes per weight during training."""
        return 2 if self.half_engine else self.weight_bytes


def state(shape: Shape, run: Run, tuning: Tuning) -> dict[str, float]:
    """Memory of policy, gradients and AdamW's state on each device, by part.

    Under ZeRO in 16 bits, the engine keeps 16-bit weights and gradients, and for each weight a float32 copy and
    AdamW's two moments. Adapters and their gradients are float32.
    """
    sharded = {"one_device": "", "ddp": "", "zero2": "go", "zero3": "pgo", "fsdp2": "pgo"}[run.engine]
    parts = {"p": 1, "g": 1, "o": 1} | dict.fromkeys(sharded, run.devices)
    half, weight = run.half_engine, run.weight
    if tuning == "full":
        optimizer = 12 if half else 2 * run.weight_bytes
        return {
            "policy": shape.parameters * weight / parts["p"],
            "gradients": shape.parameters * weight / parts["g"],
            "AdamW": shape.parameters * optimizer / parts["o"],
        }
    adapter = run.lora_rank * shape.adapter_per_rank
    base = quantized(shape, "4bit") if tuning == "qlora" else shape.parameters * weight
    trained = 2 if half else 4
    return {
        "policy": (base + adapter * trained) / parts["p"],
        "gradients": adapter * trained / parts["g"],
        "AdamW": adapter * (12 if half else 8) / parts["o"],
    }


def cast_weights(shape: Shape, run: Run, tuning: Tuning) -> float:
    """The 16-bit copies of float32 weights that autocast keeps from the forward to the backward pass.

    These exist for all linear layers; with gradient checkpointing, for one layer at a time and the head. There are no
    copies of frozen weights.
    """
    if tuning != "full" or run.compute_bytes >= run.weight:
        return 0
    layers = shape.quantizable / (shape.layers if run.checkpointing or run.engine == "fsdp2" else 1)
    return run.compute_bytes * (layers + shape.head)


def quantized(shape: Shape, storage: str) -> float:
    """A complete model with its linear layers in `"8bit"` or `"4bit"` and the rest in bfloat16."""
    linear = shape.quantizable * FOUR_BITS if storage == "4bit" else shape.quantizable + 4 * shape.quantizable_rows
    return linear + 2 * (shape.parameters - shape.quantizable)


def references(shape: Shape, run: Run, tuning: Tuning) -> dict[str, float | None]:
    """The reference on each device by `reference_storage`, and with precomputed log-probs; None if unsupported."""
    if tuning != "full":
        adapter = run.lora_rank * shape.adapter_per_rank * 4 if run.moves else 0
        return {"the policy's base model": adapter}
    found: dict[str, float | None] = {
        "same": shape.parameters * run.weight,
        "bf16": shape.parameters * 2,
        "8bit": quantized(shape, "8bit"),
        "4bit": quantized(shape, "4bit"),
        "cpu": (shape.head + shape.largest_module) * run.weight,
        "precomputed": None if run.moves else 0,
    }
    if run.engine in ("fsdp2", "zero3"):
        refused = ("8bit", "4bit", "cpu") if run.engine == "fsdp2" else ("bf16", "8bit", "4bit", "cpu")
        found = {name: None if name in refused else size and size / run.devices for name, size in found.items()}
    return found


def activations(shape: Shape, run: Run) -> float:
    """Tensors that the forward pass of a micro-batch keeps for the backward pass, without the LM head.

    For each token, a Llama-like layer keeps three vectors of the hidden width for each of its two norms (the input in
    float32, the normalized vector, the input of the linear layers), queries, keys, values and the attention output,
    and four vectors of the MLP's width. With gradient checkpointing, each layer keeps its input, and only one layer at
    a time keeps the rest.
    """
    norm = shape.hidden * (4 + run.weight + run.compute_bytes)
    per_layer = (
        2 * norm
        + (2 * shape.attention + shape.key_value) * run.compute_bytes
        + 4 * shape.intermediate * run.compute_bytes
    )
    if run.checkpointing:
        return run.tokens * (shape.layers * shape.hidden * run.weight + per_layer + norm)
    return run.tokens * (shape.layers * per_layer + norm)


def logits(shape: Shape, run: Run) -> float:
    """The tile of float32 logits that the fused LM head has in memory at a time."""
    return 4.0 * min(run.tokens, TILE[0]) * min(shape.vocabulary, TILE[1])


def unfused_logits(shape: Shape, run: Run) -> float:
    """All float32 logits of a micro-batch, which are never in memory at once."""
    return 4.0 * run.tokens * shape.vocabulary


def total(shape: Shape, run: Run, tuning: Tuning, reference: float) -> float:
    """Total memory on a device at its peak, the end of a forward pass."""
    return (
        sum(state(shape, run, tuning).values())
        + cast_weights(shape, run, tuning)
        + reference
        + activations(shape, run)
        + logits(shape, run)
    )


__all__ = [
    "ENGINES", "STORAGES", "TUNINGS", "Engine", "Run", "Shape", "Tuning", "activations", "cast_weights", "logits",
    "quantized", "references", "state", "total", "unfused_logits",
]  # fmt: skip
