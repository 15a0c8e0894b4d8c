"""Long runs of every trainer on a tiny model: memory, step time and open files early and late.

    OMP_NUM_THREADS=1 python benchmarks/long_runs.py                  # 500 steps of each

Compares steps 50 to 100 with the last 50. Memory is the resident set size of the process after a garbage collection;
one process runs all trainers, so it may include memory allocated by an earlier one. The step time is the median, in
CPU time of the process. Prints a Markdown table.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time

import datasets
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PrinterCallback, TrainerCallback

import halos_trl
from halos_trl import toy

PAIRED = ("DPO", "CDPO", "IPO", "SimPO", "SLiC", "BradleyTerry")
TRAINERS = (*PAIRED, "KTO", "GRPO", "PPO")
BLOCK = 50
SETTINGS = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-4, "logging_steps": 10, "save_strategy": "no",
    "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip


def rows(name):
    """64 rows: pairs, labels, or scores in groups of two."""
    prompts = toy.make_prompts(64, 0, "feedback")
    right, wrong = ([turn(text) for text in map(change, prompts)] for change in (toy.answer, lambda p: p[:1:-1]))
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    if name in PAIRED:
        found = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(asked, right, wrong, strict=True)]
    else:
        found = [
            {"prompt": p, "completion": c} | ({"label": good} if name == "KTO" else {"score": float(good)})
            for p, a, b in zip(asked[:32], right, wrong, strict=False)
            for c, good in ((a, True), (b, False))
        ]
    return datasets.Dataset.from_list(found)


def turn(text):
    return [{"role": "assistant", "content": text}]


class Meter(TrainerCallback):
    """Seconds of each step, and memory (MB) and open files at the end of some steps."""

    def __init__(self):
        self.seconds, self.memory, self.files = [], {}, {}
        self.begun = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.begun)
        if state.global_step % BLOCK == 0:
            gc.collect()
            with open("/proc/self/statm") as file:
                self.memory[state.global_step] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            self.files[state.global_step] = len(os.listdir("/proc/self/fd"))


def run(name, steps, folder):
    """The meter of a run."""
    tokenizer = toy.build_tokenizer()
    model = toy.tiny_model(tokenizer)
    if name == "BradleyTerry":
        config = LlamaConfig(**(model.config.to_dict() | {"num_labels": 1}))
        model = LlamaForSequenceClassification(config)
    args = getattr(halos_trl, f"{name}Config")(output_dir=folder, max_steps=steps, **SETTINGS)
    meter = Meter()
    trainer = getattr(halos_trl, f"{name}Trainer")(
        model=model, args=args, train_dataset=rows(name), processing_class=tokenizer, callbacks=[meter]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return meter


def row(name, meter, steps):
    early, late = (statistics.median(meter.seconds[end - BLOCK : end]) * 1000 for end in (2 * BLOCK, steps))
    return (
        f"| {name} | {meter.memory[BLOCK]:.0f} | {meter.memory[2 * BLOCK]:.0f} | {meter.memory[steps]:.0f} "
        f"| {early:.1f} | {late:.1f} | {meter.files[BLOCK]} | {meter.files[steps]} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help=f"A multiple of {BLOCK}.")
    parser.add_argument("--trainers", nargs="+", default=TRAINERS, choices=TRAINERS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    print(
        f"| trainer | MB at {BLOCK} | MB at {2 * BLOCK} | MB at {args.steps} "
        f"| ms per step, {BLOCK}-{2 * BLOCK} | ms per step, last {BLOCK} | files at {BLOCK} | files at {args.steps} |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in args.trainers:
        with tempfile.TemporaryDirectory() as folder:
            print(row(name, run(name, args.steps, folder), args.steps), flush=True)


if __name__ == "__main__":
    main()
