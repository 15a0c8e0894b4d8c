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
the arm's settings. Two more offline humanline arms have nine trials each of their own, one with the reference copied
before every step, one around a period of 32 steps; the ablations change the settings of the latter. The settings that
were chosen run on seeds 0 to 4, four passes long. A seed decides the model, the feedback and the order of training.
Every run appends one JSON line to the results; runs that are in the file are not repeated.
"""

import argparse
import copy
import itertools
import tempfile
from pathlib import Path

import datasets
import study_runs
import torch
from study_runs import ARMS, BATCH, EACH, GRADIENT_LIMITS, LONG, PASS, ROWS, SEEDS, Results
from study_tasks import SAMPLES, TASKS, TOKENIZER, feedback
from transformers import PrinterCallback

import halos_trl

RESULTS = Path(__file__).resolve().parent / "results" / "humanline_study.jsonl"
ROUND = 16  # steps between two samplings
NEVER = 10**6
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
    period = {"humanline": True, "humanline_sync_steps": {EACH: 1, LONG: 32}.get(arm, 8)}
    return settings | period if "humanline" in arm else settings


def changes(method, arm):
    if arm in (EACH, LONG):
        other = CHANGES[method] if arm == EACH else LONG_PERIODS
        return [change for change in HUMANLINE if "humanline_sync_steps" not in change] + other
    return HUMANLINE if "humanline" in arm else GRADIENT_LIMITS + CHANGES[method]


def make_trainer(method, settings, model, reference, rows, steps, seed, folder, callback, optimizers):
    trainer, config = CLASSES[method]
    fixed = not settings.get("humanline")
    args = config(
        **study_runs.arguments(folder, steps, seed), packed="off", precompute_ref_log_probs=fixed, **settings
    )
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


def train(task, key, evaluation, *, source_seed=None):
    arm = online if key["arm"].startswith("online") else offline
    other = {} if source_seed is None else {"source_seed": source_seed}
    return arm(task, key["method"], key["settings"], key["passes"], key["seed"], evaluation, **other)


def tuned(results, task, method, arm):
    """The settings of the best of the arm's nine trials."""
    return study_runs.tuned(results, task, method, arm, first_settings(method, arm), changes(method, arm))


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
        plain = tuned(results, task, method, "offline")
        of_plain = settings | {name: plain[name] for name in FIRST[method]}
        if of_plain != settings:
            variants["loss settings of the plain arm"] = of_plain
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
    study_runs.quiet()
    results = Results(options.results, train)
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
