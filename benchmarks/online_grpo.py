"""Held-out accuracy of online GRPO on the embedded task, per seed: TRL's trainer, and this package's with and without
humanline.

    OMP_NUM_THREADS=1 python benchmarks/online_grpo.py

The settings are those of `examples/train_grpo_online.py`, the same for all three. A seed determines the model, the
prompts and the samples. Prints each run when it ends, then a Markdown table.
"""

import argparse
import statistics
import tempfile
import time

import datasets
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_trl import online, toy

TRAINERS = {
    "`trl.GRPOTrainer`": (trl.GRPOTrainer, trl.GRPOConfig, {}),
    "`halos_trl.online.GRPOTrainer`": (online.GRPOTrainer, online.GRPOConfig, {}),
    "the same, `humanline=True`": (online.GRPOTrainer, online.GRPOConfig, {"humanline": True}),
}


def reward(prompts, completions, **columns):
    """1 for a correct answer, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(toy.verify(p[-1]["content"], c[0]["content"])) for p, c in pairs]


def run(name, seed, steps):
    """Accuracy before and after training, and the CPU seconds of training."""
    trainer_class, config_class, own = TRAINERS[name]
    path = toy.load_model_path(seed=seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in toy.make_prompts(4096, seed, "feedback")]
    before = toy.accuracy(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder, seed=seed, max_steps=steps, learning_rate=3e-4, per_device_train_batch_size=64,
            num_generations=8, max_completion_length=12, logging_steps=1000, save_strategy="no", report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, **own,
        )  # fmt: skip
        trainer = trainer_class(
            model=model,
            reward_funcs=[reward],
            args=args,
            train_dataset=datasets.Dataset.from_list(prompts),
            processing_class=tokenizer,
        )
        begun = time.process_time()
        trainer.train()
    return {"before": before, "after": toy.accuracy(model, tokenizer), "seconds": time.process_time() - begun}


def row(name, runs):
    before, after = (statistics.mean(run[key] for run in runs) for key in ("before", "after"))
    seeds = ", ".join(f"{run['after']:.3f}" for run in runs)
    return f"| {name} | {before:.3f} | {after:.3f} | {seeds} | {statistics.mean(run['seconds'] for run in runs):.0f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    found = {name: [] for name in TRAINERS}
    for seed in args.seeds:
        for name, runs in found.items():
            runs.append(run(name, seed, args.steps))
            print(f"seed {seed}, {name}: {runs[-1]}", flush=True)
    print("| trainer | before | after, mean | after, per seed | CPU seconds |\n|---|---|---|---|---|")
    print("\n".join(row(name, runs) for name, runs in found.items()))


if __name__ == "__main__":
    main()
