"""Is offline feedback under humanline as good as online feedback? Plain and humanline, offline and online.

    OMP_NUM_THREADS=1 python benchmarks/humanline_study.py run --tasks short          # tune, then five fresh seeds
    OMP_NUM_THREADS=1 python benchmarks/humanline_study.py ablate                     # what the clamp and the sync do
    OMP_NUM_THREADS=1 python benchmarks/humanline_study.py report                     # tables and pictures

Protocol. A pass is 32 optimizer steps on 32 rows each (1,024 completions, pairs, or completions in groups of 8), for
every arm; the learning rate is constant after 5 steps of warm-up. The offline arms read the same 1,024 rows again in
every pass, all sampled from the supervised model. The online arms sample 512 new rows from the policy every 16 steps,
for the same stream of prompts. Accuracy is the share of right samples (temperature 1) on 1,000 prompts that no arm has
seen. Each arm of each method has nine trials on seed 100, each two passes long: five learning rates from 3e-6 to 3e-4
with the first settings, then four changes of one setting each at the best of these rates. The trial with the highest
accuracy on 400 prompts of a split used for nothing else, averaged over the evaluations after one and two passes, gives
the arm's settings. A second offline humanline arm has nine trials of its own around a period of 32 steps; the
ablations change its settings. The chosen settings run on seeds 0 to 4, four passes long. A seed decides the model, the
feedback and the order of training. Every run appends one JSON line to the results; runs that are in the file are not
repeated.
"""

import argparse
import copy
import itertools
import json
import tempfile
import time
import warnings
from pathlib import Path

import datasets
import torch
from study_tasks import SAMPLES, TASKS, TOKENIZER, accuracy, feedback
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

import halos_trl

RESULTS = Path(__file__).resolve().parent / "results" / "humanline_study.jsonl"
ROWS, BATCH, ROUND = 1024, 32, 16  # rows of a pass, rows of a step, steps between two samplings
PASS = ROWS // BATCH
TUNING_SEED, SEEDS = 100, range(5)
NEVER = 10**6
LONG = "offline humanline, sync 32"
ARMS = ("offline", "offline humanline", LONG, "online", "online humanline")
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
FIRST = {
    "dpo": {"beta": 1.0},
    "kto": {"beta": 0.1, "undesirable_weight": 0.3},
    "grpo": {"beta": 0.05, "epsilon": 0.2, "epsilon_high": 0.2},
}
# one setting changed at a time, after the learning rate
CHANGES = {
    "dpo": [{"beta": 0.3}, {"beta": 3.0}],
    "kto": [{"undesirable_weight": 1.0}, {"beta": 0.3}],
    "grpo": [{"beta": 0.0}, {"epsilon": 0.5, "epsilon_high": 2.0}],
}
PLAIN = [{"max_grad_norm": 0.1}, {"max_grad_norm": 10.0}]
HUMANLINE = [
    {"max_grad_norm": 0.1}, {"humanline_sync_steps": 1}, {"humanline_sync_steps": 32},
    {"log_epsilon_p": -3.0, "log_epsilon_r": 4.5},
]  # fmt: skip
LONG_PERIODS = [{"humanline_sync_steps": 64}, {"humanline_sync_steps": 128}]
CLASSES = {
    "dpo": (halos_trl.DPOTrainer, halos_trl.DPOConfig),
    "kto": (halos_trl.KTOTrainer, halos_trl.KTOConfig),
    "grpo": (halos_trl.GRPOTrainer, halos_trl.GRPOConfig),
}


def first_settings(method, arm):
    settings = FIRST[method] | {"max_grad_norm": 1.0}
    period = {"humanline": True, "humanline_sync_steps": 32 if arm == LONG else 8}
    return settings | period if "humanline" in arm else settings


def changes(method, arm):
    if arm == LONG:
        return [change for change in HUMANLINE if "humanline_sync_steps" not in change] + LONG_PERIODS
    return HUMANLINE if "humanline" in arm else PLAIN + CHANGES[method]


class Evaluation(TrainerCallback):
    """Accuracy on a split after some of the steps, counted over all rounds."""

    def __init__(self, task, split, seed, n, steps):
        self.task, self.split, self.seed, self.n, self.steps = task, split, seed, n, steps
        self.done, self.accuracy = 0, {}

    def measure(self, model):
        if self.done in self.steps:
            self.accuracy[self.done // PASS] = accuracy(self.task, model, self.split, self.seed, self.n)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.done += 1
        self.measure(model)


def make_trainer(method, settings, model, reference, rows, steps, seed, folder, callback, optimizers):
    trainer, config = CLASSES[method]
    fixed = not settings.get("humanline")
    args = config(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant_with_warmup", warmup_steps=5, logging_steps=8, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, seed=seed, bf16=False, packed="off",
        precompute_ref_log_probs=fixed, **settings,
    )  # fmt: skip
    made = trainer(
        model, reference, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=TOKENIZER,
        callbacks=[callback], optimizers=optimizers,
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def offline(task, method, settings, passes, seed, evaluation, *, source_seed=None):
    """Every pass over the same rows, sampled from the supervised model (of another seed with `source_seed`)."""
    model = task.model(seed)
    source = model if source_seed is None else task.model(source_seed)
    prompts = iter(task.prompts(6 * ROWS, seed, "train"))
    rows, taken = feedback(task, method, source, prompts, ROWS, seed)
    evaluation.measure(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            method, settings, model, copy.deepcopy(model), rows, passes * PASS, seed, folder, evaluation, (None, None)
        )
        trainer.train()
    return trainer.state.log_history, {"rows": len(rows), "samples": taken * SAMPLES[method]}


def online(task, method, settings, passes, seed, evaluation):
    """New rows from the policy every `ROUND` steps; the reference of a plain round is the policy before it.

    Optimizer and learning rate schedule are carried from round to round. Under humanline with a period above `ROUND`
    the reference is carried over too, and moves at the first round that begins on a multiple of the period.
    """
    model = task.model(seed)
    evaluation.measure(model)
    stream = itertools.cycle(task.prompts(6 * ROWS, seed, "train"))
    settings = dict(settings)
    rate = settings["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
    period = settings.get("humanline_sync_steps", ROUND)
    if period > ROUND:
        settings["humanline_sync_steps"] = NEVER
    history, read, drawn, reference = [], 0, 0, None
    for start in range(0, passes * PASS, ROUND):
        if reference is None or period <= ROUND or start % period == 0:
            reference = copy.deepcopy(model)
        rows, taken = feedback(task, method, model, stream, ROUND * BATCH, 10_000 * (start + 1) + seed)
        read, drawn = read + len(rows), drawn + taken * SAMPLES[method]
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(
                method,
                settings,
                model,
                reference,
                rows,
                ROUND,
                seed + start,
                folder,
                evaluation,
                (optimizer, schedule),
            )
            trainer.train()
        history += [row | {"step": row["step"] + start} for row in trainer.state.log_history]
    return history, {"rows": read, "samples": drawn}


CURVES = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "entropy", "unclamped", "kl", "rewards/margins")


def run(key, split, *, source_seed=None):
    """One run; its line for the results."""
    task, begun = TASKS[key["task"]], time.perf_counter()
    passes = key["passes"]
    steps = {0, PASS, 2 * PASS, 4 * PASS}
    evaluation = Evaluation(task, split, key["seed"], 400 if split == "tune" else 1000, steps)
    arm = online if key["arm"].startswith("online") else offline
    other = {} if source_seed is None else {"source_seed": source_seed}
    try:
        history, counts = arm(task, key["method"], key["settings"], passes, key["seed"], evaluation, **other)
        failure = None
    except (RuntimeError, FloatingPointError, ValueError) as error:  # a run that blows up is a result of its settings
        history, counts, failure = [], {}, f"{type(error).__name__}: {error}"[:300]
    curves = {
        name: [[row["step"], round(float(row[name]), 5)] for row in history if name in row]
        for name in CURVES if any(name in row for row in history)
    }  # fmt: skip
    return key | {
        "split": split, "accuracy": evaluation.accuracy, "curves": curves, "failure": failure,
        "seconds": round(time.perf_counter() - begun, 1), **counts,
    }  # fmt: skip


class Results:
    """The lines of the file; a run is looked up by what decides it, and made if it is not there."""

    def __init__(self, path):
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def get(self, stage, task, method, arm, seed, settings, passes, split, **other):
        key = {
            "stage": stage, "task": task, "method": method, "arm": arm, "seed": seed, "settings": settings,
            "passes": passes,
        } | other  # fmt: skip
        for line in self.lines:
            if all(line.get(name) == value for name, value in key.items()) and line["split"] == split:
                return line
        line = json.loads(json.dumps(run(key, split, **other)))
        print(
            {name: line[name] for name in ("task", "method", "arm", "seed", "settings", "accuracy", "seconds")},
            flush=True,
        )
        self.lines.append(line)
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


def score(line):
    """What the trials are compared by: accuracy after one and two passes, averaged; 0 for a run that failed."""
    return sum(line["accuracy"].get(at, 0.0) for at in ("1", "2")) / 2


def tuned(results, task, method, arm):
    """The settings of the best of the arm's nine trials."""

    def trial(settings):
        return score(results.get("tune", task, method, arm, TUNING_SEED, settings, 2, "tune"))

    base = first_settings(method, arm)
    candidates = [base | {"learning_rate": rate} for rate in RATES]
    best = max(candidates, key=trial)
    return max([best, *(best | change for change in changes(method, arm))], key=trial)


def study(results, tasks, methods, arms):
    for task, method in itertools.product(tasks, methods):
        for arm in arms:
            settings = tuned(results, task, method, arm)
            for seed in SEEDS:
                results.get("test", task, method, arm, seed, settings, 4, "test")


def ablations(results, task, methods, seeds):
    """Changes of the tuned humanline arm with a long period, and it and plain offline on another model's feedback."""
    for method in methods:
        settings = tuned(results, task, method, LONG)
        variants = {
            "clamp without sync": settings | {"humanline_sync_steps": NEVER},
            "sync without clamp": settings | {"log_epsilon_p": -1e4, "log_epsilon_r": 1e4},
        } | {f"sync every {n}": settings | {"humanline_sync_steps": n} for n in (1, 4, 16, 64)}
        for (name, changed), seed in itertools.product(variants.items(), seeds):
            results.get(name, task, method, LONG, seed, changed, 4, "test")
        for arm, seed in itertools.product(("offline", LONG), seeds):
            own = tuned(results, task, method, arm)
            results.get("another model's feedback", task, method, arm, seed, own, 4, "test", source_seed=seed + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "ablate", "report"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(CLASSES), default=["dpo", "kto", "grpo"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--ablation_seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    results = Results(options.results)
    if options.what == "run":
        study(results, options.tasks, options.methods, options.arms)
    elif options.what == "ablate":
        for task in options.tasks:
            ablations(results, task, options.methods, options.ablation_seeds)
    else:
        from study_report import write

        write(results.lines)


if __name__ == "__main__":
    main()
