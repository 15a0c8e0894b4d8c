"""Ratio of the step times with and without humanline, on a model of about ten million parameters.

    python benchmarks/humanline_overhead.py

Two trainers take turns in one process, a block of steps each, so that other load on the machine affects both. A ratio
compares the medians of two neighbouring blocks; the median of the ratios is reported for wall-clock time and for CPU
time (of all threads), which excludes the time of other programs. The memory of the moving reference is printed in
bytes, with the size of one adapter for comparison.
"""

import argparse
import statistics
import tempfile
import time

import datasets
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from halos_trl import DPOConfig, DPOTrainer, toy

CLOCKS = {"wall clock": time.perf_counter, "CPU time": time.process_time}


class StepTimer(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = [clock() for clock in CLOCKS.values()]

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append([clock() - start for clock, start in zip(CLOCKS.values(), self.start, strict=True)])


def build_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=320, intermediate_size=896, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(n, length):
    """Pairs of random letters with the same length, so that all steps cost the same."""
    generator = torch.Generator().manual_seed(0)

    def text(size):
        return "".join(chr(ord("a") + int(i)) for i in torch.randint(26, (size,), generator=generator))

    pairs = [(text(length // 2), text(length // 2), text(length // 2)) for _ in range(n)]
    return datasets.Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs])


def build_trainer(kind, humanline, options, output_dir):
    tokenizer = toy.build_tokenizer()
    timer = StepTimer()
    args = DPOConfig(
        output_dir=output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        humanline=humanline,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
        max_length=None,
    )
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=options.target_modules)
    trainer = DPOTrainer(
        build_model(tokenizer),
        args=args,
        train_dataset=rows(options.steps * options.batch_size, options.length),
        processing_class=tokenizer,
        peft_config=lora if kind == "lora" else None,
        callbacks=[timer],
    )
    return trainer, timer


def block(trainer, timer):
    """Median seconds per step, by clock."""
    timer.seconds.clear()
    trainer.train()
    return [statistics.median(times) for times in zip(*timer.seconds[1:], strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=10, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=6, help="steps per block; the first one is not counted")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs per step")
    parser.add_argument("--length", type=int, default=128, help="characters (tokens) of prompt and completion")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--target_modules", default=None, help="PEFT's default (q_proj and v_proj), or 'all-linear'")
    parser.add_argument("--kinds", nargs="+", default=["full", "lora"])
    options = parser.parse_args()
    datasets.disable_progress_bars()
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            plain, human = (build_trainer(kind, humanline, options, folder) for humanline in (False, True))
            without, with_it = [], []  # (block, clock)
            for number in range(options.blocks):
                order = [plain, human] if number % 2 == 0 else [human, plain]
                seconds = {id(pair): block(*pair) for pair in order}
                without.append(seconds[id(plain)])
                with_it.append(seconds[id(human)])
            trainer = human[0]
            held = sum(t.nbytes for t in trainer.reference.tensors(trainer.model).values())
            size = sum(p.numel() for p in plain[0].model.parameters()) / 1e6
            print(
                f"{kind}: {size:.1f}M parameters, {options.batch_size} pairs of {options.length} tokens, "
                f"{torch.get_num_threads()} threads, {options.blocks} pairs of blocks"
            )
            for clock, a, b in zip(CLOCKS, zip(*without, strict=True), zip(*with_it, strict=True), strict=True):
                ratios = [y / x for x, y in zip(a, b, strict=True)]
                quartiles = statistics.quantiles(ratios, n=4)
                print(
                    f"  {clock}: step without humanline {statistics.median(a):.3f} s, with {statistics.median(b):.3f} "
                    f"s, ratio {statistics.median(ratios):.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})"
                )
            if kind == "lora":
                adapter = sum(p.nbytes for n, p in trainer.model.named_parameters() if ".default." in n)
                print(f"  the reference takes {held} bytes, the adapter {adapter}")


if __name__ == "__main__":
    main()
