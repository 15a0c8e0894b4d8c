"""Memory and time of a reference in each `reference_storage`: a model with random weights on a CPU.

    python benchmarks/reference_storage.py [--hidden 384] [--layers 8] [--rounds 5]

Times are CPU seconds of this process, so other processes have little effect. Each is divided by that of `same` for the
same round or step, on the same rows; the table shows medians of these ratios.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, logging

from halos_trl import KTOConfig, KTOTrainer, toy
from halos_trl.storage import bytes_of

STORAGES = ("same", "bf16", "8bit", "4bit", "cpu")


def rows(count: int) -> Dataset:
    prompts = toy.make_prompts(count, 0, "feedback")
    return Dataset.from_list(
        [{"prompt": p * 4, "completion": toy.answer(p) * 4, "label": bool(i % 2)} for i, p in enumerate(prompts)]
    )


class StepTimes(TrainerCallback):
    """CPU seconds of each step after the first, from the end of the previous step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments, **named) -> None:
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in itertools.pairwise(self.ends)]


def build(model: LlamaForCausalLM, storage: str, folder: str, steps: int) -> KTOTrainer:
    settings = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none"}
    args = KTOConfig(
        f"{folder}/{storage}", reference_storage=storage, humanline=True, per_device_train_batch_size=4,
        max_steps=steps, save_strategy="no", disable_tqdm=True, logging_strategy="no", **settings,
    )  # fmt: skip
    return KTOTrainer(
        copy.deepcopy(model), args=args, train_dataset=rows(4 * steps), processing_class=toy.build_tokenizer()
    )


def cpu_seconds(function, *arguments) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 384), ("layers", 8), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=len(toy.build_tokenizer()), hidden_size=arguments.hidden, pad_token_id=0, head_dim=64,
        intermediate_size=arguments.hidden * 8 // 3, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        measure(model, arguments.rounds, folder)


def measure(model: LlamaForCausalLM, rounds: int, folder: str) -> None:
    trainers = {storage: build(model, storage, folder, rounds + 1) for storage in STORAGES}
    batches = {s: t.on_device(next(iter(t.get_train_dataloader()))) for s, t in trainers.items()}
    exact = trainers["same"].reference.log_probs(batches["same"])
    mask = batches["same"]["completion_mask"][:, 1:].bool()
    apart = {s: (t.reference.log_probs(batches[s]) - exact)[mask].abs() for s, t in trainers.items()}
    sizes = {storage: bytes_of(trainer.reference.model) for storage, trainer in trainers.items()}
    parts = {
        "reference": lambda storage: trainers[storage].reference.log_probs(batches[storage]),
        "sync": lambda storage: trainers[storage].reference.sync(trainers[storage].model),
    }
    seconds: dict[str, list[float]] = {part: [] for part in (*parts, "step")}
    ratios: dict[str, dict[str, list[float]]] = {part: {s: [] for s in STORAGES} for part in seconds}
    for number in range(rounds + 1):
        for part, run in parts.items():
            taken = {storage: cpu_seconds(run, storage) for storage in STORAGES}
            if number:  # the first round compiles and checks
                seconds[part].append(taken["same"])
                for storage, value in taken.items():
                    ratios[part][storage].append(value / taken["same"])
    watches = {storage: StepTimes() for storage in STORAGES}
    for storage, trainer in trainers.items():
        trainer.add_callback(watches[storage])
        trainer.train()
    seconds["step"] = watches["same"].seconds
    for storage, watch in watches.items():
        ratios["step"][storage] = [a / b for a, b in zip(watch.seconds, seconds["step"], strict=True)]
    tokens = int(mask.numel())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    taken_by_same = ", ".join(f"{part} {statistics.median(values):.2f} s" for part, values in seconds.items())
    print(f"{millions:.1f}M parameters, {tokens} tokens, float32 policy; `same`: {taken_by_same}")
    heads = ["MB", "pass of the reference", "copy under humanline", "step", "nats per token, mean", "largest"]
    print(f"| `reference_storage` | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    for storage in STORAGES:
        cells = [f"{sizes[storage] / 1e6:.1f}"]
        cells += [f"{statistics.median(ratios[part][storage]):.2f}" for part in seconds]
        cells += [f"{apart[storage].mean():.2g}", f"{apart[storage].max():.2g}"]
        print(f"| `{storage}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
