"""Every alignment method on the same task with the same tuning, and TRL's own trainer where TRL has the loss.

    OMP_NUM_THREADS=1 python benchmarks/methods.py run    # tune, then five fresh seeds; skips what is in the results
    python benchmarks/methods.py report                   # the tables of README.md and docs/methods.md

The task is `short` of `study_tasks.py`. A pass is 32 optimizer steps on 32 rows each: 1,024 pairs, completions with a
label, or scored completions in groups of eight, sampled once from the supervised model. The second pass reads the same
rows again. Every method has nine trials of two passes on seed 100: five learning rates from 3e-6 to 3e-4, then four
changes of one setting each at the best rate. The trial with the highest accuracy on 400 tune prompts, averaged over
the evaluations after one and two passes, gives the settings. They run on seeds 0 to 4, and accuracy is the share of
right samples (temperature 1) on 1,000 test prompts. A seed decides the model, the feedback and the order of training.

TRL's trainers get the settings that were tuned for the trainers here, the same rows, and the same seeds. The plain
offline arms of `humanline_study.py` are the same runs, so its results are used for DPO, KTO and GRPO.
"""

import argparse
import copy
import functools
import itertools
import json
import tempfile
from pathlib import Path

import datasets
import humanline_study
import study_runs
import trl
from study_report import accuracies, differences, fill, interval, shown
from study_runs import GRADIENT_LIMITS, PASS, RATES, ROWS, SEEDS, Results, score
from study_tasks import SAMPLES, TASKS, TOKENIZER, feedback
from transformers import PrinterCallback
from trl.experimental import cpo

import halos_trl

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "methods.jsonl"
TASK = "short"
OURS, THEIRS = "halos_trl", "TRL"
IN_ORDER = "halos_trl, rows in order"  # as TRL's KTO reads them, which cannot shuffle
# method -> (name, trainer, config, feedback)
METHODS = {
    "kto": ("KTO", halos_trl.KTOTrainer, halos_trl.KTOConfig, "kto"),
    "dpo": ("DPO", halos_trl.DPOTrainer, halos_trl.DPOConfig, "dpo"),
    "cdpo": ("cDPO", halos_trl.CDPOTrainer, halos_trl.CDPOConfig, "dpo"),
    "ipo": ("IPO", halos_trl.IPOTrainer, halos_trl.IPOConfig, "dpo"),
    "simpo": ("SimPO", halos_trl.SimPOTrainer, halos_trl.SimPOConfig, "dpo"),
    "slic": ("SLiC", halos_trl.SLiCTrainer, halos_trl.SLiCConfig, "dpo"),
    "grpo": ("GRPO", halos_trl.GRPOTrainer, halos_trl.GRPOConfig, "grpo"),
    "ppo": ("PPO", halos_trl.PPOTrainer, halos_trl.PPOConfig, "grpo"),
}
WITHOUT_REFERENCE = ("simpo", "slic")
FIRST = humanline_study.FIRST | {
    "cdpo": {"beta": 1.0, "epsilon": 0.2},
    "ipo": {"tau": 1.0},
    "simpo": {"beta": 10.0, "gamma_beta_ratio": 0.3},
    "slic": {"beta": 1.0, "lambda_coef": 0.1},
    "ppo": {"cliprange": 0.5, "kl_coef": 0.01},
}
# one setting changed at a time, after the learning rate
CHANGES = humanline_study.CHANGES | {
    "cdpo": [{"beta": 0.3}, {"epsilon": 0.05}],
    "ipo": [{"tau": 0.3}, {"tau": 3.0}],
    "simpo": [{"beta": 3.0}, {"gamma_beta_ratio": 1.0}],
    "slic": [{"lambda_coef": 1.0}, {"beta": 3.0}],
    "ppo": [{"kl_coef": 0.0}, {"cliprange": 2.0}],
}


def trl_trainer(method, settings):
    """TRL's trainer and config with the same loss, and the settings by TRL's names."""
    settings = dict(settings)
    if method == "ipo":
        settings |= {"loss_type": "ipo", "beta": settings.pop("tau")}
    if method == "simpo":
        gamma = settings["beta"] * settings.pop("gamma_beta_ratio")
        settings |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": gamma}
        return cpo.CPOTrainer, cpo.CPOConfig, settings
    if method == "kto":
        return trl.KTOTrainer, trl.KTOConfig, settings
    return trl.DPOTrainer, trl.DPOConfig, settings


IN_TRL = ("kto", "dpo", "ipo", "simpo")


@functools.cache
def sampled(kind, seed):
    """The rows of a seed, and the number of completions sampled for them; the same for all methods with such rows."""
    task = TASKS[TASK]
    prompts = iter(task.prompts(6 * ROWS, seed, "train"))
    rows, taken = feedback(task, kind, task.model(seed), prompts, ROWS, seed)
    return datasets.Dataset.from_list(rows), taken * SAMPLES[kind]


def train(task, key, evaluation):
    """One run: its log history and counts."""
    method, settings, model = key["method"], key["settings"], task.model(key["seed"])
    rows, samples = sampled(METHODS[method][3], key["seed"])
    if key["arm"] == THEIRS:
        trainer, config, settings = trl_trainer(method, settings)
    else:
        _, trainer, config, _ = METHODS[method]
        settings = settings | {"packed": "off"}
    models = {"model": model}
    if method not in WITHOUT_REFERENCE:
        models |= {"ref_model": copy.deepcopy(model)}
        settings = settings | {"precompute_ref_log_probs": True}
    evaluation.measure(model)
    with tempfile.TemporaryDirectory() as folder:
        common = study_runs.arguments(folder, key["passes"] * PASS, key["seed"])
        common["gradient_checkpointing"] = False  # same numbers, less time
        made = trainer(
            **models, args=config(**common, **settings), train_dataset=rows, processing_class=TOKENIZER,
            callbacks=[evaluation],
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        made.train()
    return made.state.log_history, {"rows": len(rows), "samples": samples}


def from_study(path):
    """The study's runs of the same methods; the first two of its four passes are a run of two passes."""
    for line in map(json.loads, path.read_text().splitlines()):
        if (line["task"], line["arm"]) == (TASK, "offline") and line["stage"] in ("tune", "test"):
            yield line | {"arm": OURS, "passes": 2}


def tuned(results, method):
    """The settings of the best of the method's nine trials."""
    first = FIRST[method] | {"max_grad_norm": 1.0}
    return study_runs.tuned(results, TASK, method, OURS, first, GRADIENT_LIMITS + CHANGES[method])


def study(results, methods):
    for method in methods:
        chosen = tuned(results, method)
        arms = {OURS: chosen}
        if method in IN_TRL:
            arms[THEIRS] = chosen
        if method == "kto":
            arms[IN_ORDER] = chosen | {"train_sampling_strategy": "sequential"}
        for (arm, own), seed in itertools.product(arms.items(), SEEDS):
            results.get("test", TASK, method, arm, seed, own, 2, "test")


def accuracy_table(results):
    rows = [
        "| method | start | 1 pass | 2 passes | TRL, 1 pass | TRL, 2 passes | difference, 2 passes |",
        "|---|---|---|---|---|---|---|",
    ]
    listed = [(method, name, OURS) for method, (name, *_) in METHODS.items()]
    listed.insert(1, ("kto", "KTO, rows in TRL's order", IN_ORDER))
    for method, name, arm in listed:
        ours, theirs = (
            [accuracies(results.lines, at, stage="test", task=TASK, method=method, arm=own) for at in "012"]
            for own in (arm, THEIRS)
        )
        if not ours[0]:
            continue
        cells = [shown(list(found.values())) for found in (*ours[1:], *theirs[1:])]
        cells.append(shown(differences(ours[2], theirs[2]), "+"))
        rows.append(f"| {name} | {interval(list(ours[0].values()))[0]:.3f} | " + " | ".join(cells) + " |")
    return rows


def settings_table(results):
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    rows = [
        f"| method | tune accuracy at the learning rates {rates} | then tried | chosen | tune accuracy |",
        "|---|---|---|---|---|",
    ]
    for method, (name, *_) in METHODS.items():
        trials, final = (
            [line for line in results.lines if (line["stage"], line["method"], line["arm"]) == (stage, method, OURS)]
            for stage in ("tune", "test")
        )
        if not final:
            continue
        by_rate = {}
        for line in trials:  # the first trial at a rate is the one with the first settings
            by_rate.setdefault(line["settings"]["learning_rate"], score(line))
        best = max(score(line) for line in trials)
        rows.append(
            f"| {name} | {', '.join(f'{by_rate[rate]:.3f}' for rate in RATES)} | "
            f"{'; '.join(map(as_text, CHANGES[method]))} | {as_text(final[0]['settings'])} | {best:.3f} |"
        )
    return rows


def as_text(settings):
    return ", ".join(f"`{name}={value:g}`" for name, value in settings.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    study_runs.quiet()
    results = Results(options.results, train)
    results.lines += from_study(humanline_study.RESULTS)
    if options.what == "run":
        study(results, options.methods)
    else:
        fill(ROOT / "README.md", "methods", accuracy_table(results), "methods.py")
        fill(ROOT / "docs" / "methods.md", "settings", settings_table(results), "methods.py")


if __name__ == "__main__":
    main()
