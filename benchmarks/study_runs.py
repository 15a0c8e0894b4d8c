"""What `humanline_study.py` and `methods.py` share: the budget of a run, its evaluations, and the file of results."""

import json
import time
import warnings

import datasets
from study_tasks import TASKS, accuracy
from transformers import TrainerCallback
from transformers.utils import logging

ROWS, BATCH = 1024, 32  # rows of a pass, rows of a step
PASS = ROWS // BATCH
EACH, LONG = "offline humanline, sync 1", "offline humanline, sync 32"
ARMS = ("offline", EACH, "offline humanline", LONG, "online", "online humanline")  # of the humanline study
TUNING_SEED, SEEDS = 100, range(5)
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
GRADIENT_LIMITS = [{"max_grad_norm": 0.1}, {"max_grad_norm": 10.0}]
CURVES = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "entropy", "unclamped", "kl", "rewards/margins")


def arguments(folder, steps, seed):
    """The settings of a trainer that are the same in every run."""
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "logging_steps": 8, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": seed, "bf16": False,
    }  # fmt: skip


def quiet():
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


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


def run(train, key, split, **other):
    """The line of one run: `train(task, key, evaluation, **other)` returns its log history and counts."""
    task, begun = TASKS[key["task"]], time.perf_counter()
    steps = {0, PASS, 2 * PASS, 4 * PASS}
    evaluation = Evaluation(task, split, key["seed"], 400 if split == "tune" else 1000, steps)
    try:
        history, counts = train(task, key, evaluation, **other)
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
    """The lines of the file; a run is looked up by what decides it, and made by `train` if it is not there."""

    def __init__(self, path, train):
        self.path, self.train = path, train
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def get(self, stage, task, method, arm, seed, settings, passes, split, **other):
        key = {
            "stage": stage, "task": task, "method": method, "arm": arm, "seed": seed, "settings": settings,
            "passes": passes,
        } | other  # fmt: skip
        for line in self.lines:
            if all(line.get(name) == value for name, value in key.items()) and line["split"] == split:
                return line
        line = json.loads(json.dumps(run(self.train, key, split, **other)))
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


def tuned(results, task, method, arm, first, changes):
    """The settings of the best of the trials: `first` at every rate, then one change each at the best rate."""

    def trial(settings):
        return score(results.get("tune", task, method, arm, TUNING_SEED, settings, 2, "tune"))

    best = max([first | {"learning_rate": rate} for rate in RATES], key=trial)
    return max([best, *(best | change for change in changes)], key=trial)
