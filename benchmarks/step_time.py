"""Time and memory of a whole training step compared with TRL: forward passes of policy and reference, backward,
update.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py
    OMP_NUM_THREADS=1 python benchmarks/step_time.py --cases pairs groups --lora --gradient_checkpointing
    OMP_NUM_THREADS=1 python benchmarks/step_time.py --memory --markdown table.md --picture step_time.svg

`--picture` needs matplotlib (`pip install "halos_trl[plots]"`).

The two trainers take turns in one process, a block of steps each, so that whatever else the machine does hits both. A
ratio compares two neighbouring blocks by CPU time (of all threads; on a GPU by wall-clock time); the median over the
blocks is reported, with its quartiles. Memory is what each trainer's steps add to the peak of a process of its own.
The floor is the number of different real tokens over the number of tokens in TRL's padded batch: no step can cost
less per token than that, as long as its prompts are not cached.

Lengths in tokens: `fixed` has prompts of 384 and completions of 128, `chat` log-normal lengths between 8 and 512 with
medians of 100 and 160. TRL has no trainer for groups that exist already; its KTO trainer without a KL term runs the
same forward passes on the same rows.
"""

import argparse
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import trl
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import halos_trl
from halos_trl import toy

CASES = {
    # name: prompts of a batch, completions of each, our trainer, TRL's, settings of TRL's
    "pairs": (4, 2, "DPO", "DPO", {}),
    "kto": (8, 1, "KTO", "KTO", {}),
    "groups": (1, 8, "GRPO", "KTO", {"loss_type": "apo_zero_unpaired"}),
}
LETTERS = "abcdefghijklmnopqrst"


HEADER = """\
| case | lengths | TRL, s | ours, s | ratio (quartiles) | floor | TRL, MiB | ours, MiB | ratio |
|---|---|---|---|---|---|---|---|---|"""


class Row(NamedTuple):
    """Measurements of one case: seconds per step, quartiles of their ratio, tokens, bytes (0: not measured)."""

    case: str
    lengths: str
    trl: float
    ours: float
    ratio: tuple[float, float, float]
    floor: float
    memory_trl: int
    memory_ours: int

    def __str__(self):
        low, median, high = self.ratio
        memory = ["", "", ""]
        if self.memory_trl:
            memory = [f"{self.memory_trl / 2**20:.0f}", f"{self.memory_ours / 2**20:.0f}"]
            memory.append(f"{self.memory_ours / self.memory_trl:.2f}")
        cells = [self.case, self.lengths, f"{self.trl:.2f}", f"{self.ours:.2f}"]
        cells += [f"{median:.2f} ({low:.2f} to {high:.2f})", f"{self.floor:.2f}", *memory]
        return f"| {' | '.join(cells)} |"


class StepTimer(TrainerCallback):
    """Seconds of each step, from its first micro-batch to the end of its update."""

    def __init__(self, clock):
        self.clock, self.seconds = clock, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.start)

    def now(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock()


def saved_model(tokenizer, folder):
    """A model of 12.7 million parameters, saved to a folder, since TRL loads its reference from the policy's path."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def texts(case, lengths, batches):
    """(prompt, [completions]) of random letters; each letter is a token, and the tokenizer adds an end token."""
    rng = random.Random(0)
    prompts, completions = CASES[case][:2]

    def text(median, spread, fixed):
        n = fixed if lengths == "fixed" else max(8, min(512, int(rng.lognormvariate(median, spread))))
        return "".join(rng.choices(LETTERS, k=n))

    return [
        (text(4.6, 0.9, 384), [text(5.1, 0.7, 128)[:-1] for _ in range(completions)]) for _ in range(batches * prompts)
    ]


def rows_of(kind, prompts):
    if kind == "DPO":
        return [{"prompt": p, "chosen": c[0], "rejected": c[1]} for p, c in prompts]
    if kind == "GRPO":
        return [
            {"prompt": p, "completion": c, "score": float(i % 3)}
            for p, completions in prompts
            for i, c in enumerate(completions)
        ]
    return [
        {"prompt": p, "completion": c, "label": bool((i + j) % 2)}
        for i, (p, completions) in enumerate(prompts)
        for j, c in enumerate(completions)
    ]


def tokens(case, prompts):
    """(distinct real tokens, tokens of the padded batch), summed over batches."""
    size = CASES[case][0]
    unique = padded = 0
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        unique += sum(len(p) + sum(len(c) for c in completions) for p, completions in batch)
        rows = [len(p) + len(c) + 1 for p, completions in batch for c in completions]
        padded += len(rows) * max(rows)
    return unique, padded


def trainer_of(side, case, prompts, options, folder):
    size, completions, ours, theirs, settings = CASES[case]
    name = ours if side == "ours" else theirs
    package = halos_trl if side == "ours" else trl
    tokenizer = toy.build_tokenizer()
    gpu = torch.cuda.is_available()
    args = getattr(package, f"{name}Config")(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=size if name == "DPO" else size * completions,
        learning_rate=1e-6,
        gradient_checkpointing=options.gradient_checkpointing,
        train_sampling_strategy="sequential",
        bf16=gpu,
        use_cpu=not gpu,
        report_to="none",
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
        max_length=None,
        model_init_kwargs={"dtype": "bfloat16" if gpu else "float32"},
        **(settings if side == "trl" else {}),
    )
    timer = StepTimer(time.perf_counter if gpu else time.process_time)
    trainer = getattr(package, f"{name}Trainer")(
        saved_model(tokenizer, f"{folder}/model"),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows_of(name, prompts)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if options.lora else None,
        callbacks=[timer],
    )
    return trainer, timer


def block(trainer, timer):
    """Median seconds per step, without the first one, which includes checks and allocations."""
    timer.seconds.clear()
    trainer.train()
    return statistics.median(timer.seconds[1:])


def peak_memory(side, case, lengths, options):
    """Bytes that the steps of one trainer add to the peak memory of a new process."""
    command = [sys.executable, __file__, "--cases", case, "--lengths", lengths, "--steps", "2", "--only", side]
    command += ["--lora"] * options.lora + ["--gradient_checkpointing"] * options.gradient_checkpointing
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])["bytes"]


def measure_memory(side, case, lengths, options):
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = trainer_of(side, case, texts(case, lengths, options.steps), options, folder)
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            trainer.train()
            return torch.cuda.max_memory_allocated() - before
        before = peak_of_process()
        trainer.train()
        return peak_of_process() - before


def peak_of_process():
    """Peak memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `ru_maxrss` begins with the peak of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(case, lengths, options):
    prompts = texts(case, lengths, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (trainer_of(side, case, prompts, options, folder) for side in ("ours", "trl"))
        seconds = {"ours": [], "trl": []}
        for number in range(options.blocks):
            order = [("ours", ours), ("trl", theirs)]
            for side, pair in order if number % 2 == 0 else reversed(order):
                seconds[side].append(block(*pair))
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["trl"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    unique, padded = tokens(case, prompts)
    memory = [peak_memory(side, case, lengths, options) for side in ("ours", "trl")] if options.memory else [0, 0]
    return Row(
        case, lengths, statistics.median(seconds["trl"]), statistics.median(seconds["ours"]), tuple(quartiles),
        unique / padded, memory[1], memory[0],
    )  # fmt: skip


def draw(rows, path):
    """One group of bars per case: ratio to TRL's time, ratio to TRL's memory, and the floor."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    series = {
        "time": ([row.ratio[1] for row in rows], "#1f77b4"),
        "peak memory": ([row.memory_ours / row.memory_trl if row.memory_trl else 0 for row in rows], "#ff7f0e"),
        "tokens": ([row.floor for row in rows], "#bbbbbb"),
    }
    series = {name: bars for name, bars in series.items() if any(bars[0])}
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.2 * len(rows), 3.2), layout="constrained")
    width = 0.8 / len(series)
    for number, (name, (heights, color)) in enumerate(series.items()):
        drawn = axes.bar(
            [i + number * width for i in range(len(rows))], heights, width * 0.94, label=name, color=color
        )
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(
        [i + width * (len(series) - 1) / 2 for i in range(len(rows))], [f"{r.case}\n{r.lengths}" for r in rows]
    )
    axes.set_ylabel("ratio to TRL (= 1)")
    axes.legend(fontsize=8, frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--lengths", nargs="+", default=["fixed", "chat"], choices=["fixed", "chat"])
    parser.add_argument("--blocks", type=int, default=5, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=4, help="steps per block; the first one is not counted")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 16 on all linear layers")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument(
        "--memory", action="store_true", help="also measure peak memory, each trainer in its own process"
    )
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--picture", type=Path, help="also draw the ratios, as .svg or .png")
    parser.add_argument(
        "--only", choices=["ours", "trl"], help="measure the memory of one trainer and print it as JSON"
    )
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.only:
        print(json.dumps({"bytes": measure_memory(options.only, options.cases[0], options.lengths[0], options)}))
        return
    settings = [name for name in ("lora", "gradient_checkpointing") if getattr(options, name)]
    title = f"{torch.get_num_threads()} threads, trl {trl.__version__}, torch {torch.__version__}"
    title = ", ".join([title, *settings])
    print(f"{title}\n\n{HEADER}")
    rows = []
    for case in options.cases:
        for lengths in options.lengths:
            rows.append(compare(case, lengths, options))
            print(rows[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join([title, "", HEADER, *map(str, rows), ""]))
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
