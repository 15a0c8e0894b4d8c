"""Tables and pictures of `humanline_study.py`: between the markers of `docs/evidence.md`, and in `docs/`."""

import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from study_runs import ARMS, LONG, score

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = dict(zip(ARMS, ("#c44e52", "#ccb974", "#dd8452", "#937860", "#4c72b0", "#55a868"), strict=True))
METHODS = {"dpo": "DPO", "kto": "KTO", "grpo": "GRPO"}
PASSES = ("1", "2", "4")
# the 97.5 % point of Student's t, by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values):
    """Mean, and half the width of its 95 % interval by Student's t; None for a single value."""
    if len(values) < 2:
        return statistics.mean(values), None
    return statistics.mean(values), T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def shown(values, sign=""):
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if half is not None else "")


def accuracies(lines, at, **wanted):
    """Accuracy by seed of the runs that match; a run that failed counts as the accuracy it last had."""
    found = {}
    for line in lines:
        if line["split"] == "test" and all(line[name] == value for name, value in wanted.items()):
            values = line["accuracy"]
            found[line["seed"]] = values.get(at, list(values.values())[-1])
    return found


def runs_of(lines, stage, task, method, arm):
    return [
        line for line in lines
        if (line["stage"], line["task"], line["method"], line["arm"]) == (stage, task, method, arm)
    ]  # fmt: skip


def differences(first, second):
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def cells(lines):
    """(task, method) of the runs, in a fixed order."""
    present = {(line["task"], line["method"]) for line in lines if line["stage"] == "test"}
    return [(task, method) for task in ("short", "long") for method in METHODS if (task, method) in present]


def accuracy_table(lines):
    rows = [
        "| task | method | arm | start | 1 pass | 2 passes | 4 passes | completions sampled | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, method in cells(lines):
        for arm in ARMS:
            own = {"stage": "test", "task": task, "method": method, "arm": arm}
            by_pass = [list(accuracies(lines, at, **own).values()) for at in ("0", *PASSES)]
            if not by_pass[0]:
                continue
            sampled = [line["samples"] for line in runs_of(lines, **own) if "samples" in line]
            rows.append(
                f"| {task} | {METHODS[method]} | {arm} | {statistics.mean(by_pass[0]):.3f} | "
                + " | ".join(shown(values) for values in by_pass[1:])
                + f" | {statistics.mean(sampled):,.0f} | {len(by_pass[0])} |"
            )
    return rows


COMPARED = (
    ("offline humanline, sync 1", "offline", "offline: humanline, sync 1 − plain"),
    ("offline humanline", "offline", "offline: humanline − plain"),
    ("offline humanline, sync 32", "offline", "offline: humanline, sync 32 − plain"),
    ("online", "offline humanline", "online plain − offline humanline"),
    ("online", "offline humanline, sync 32", "online plain − offline humanline, sync 32"),
    ("online", "offline", "online plain − offline plain"),
    ("online humanline", "online", "online: humanline − plain"),
)


def difference_table(lines):
    rows = ["| task | method | difference | 1 pass | 2 passes | 4 passes |", "|---|---|---|---|---|---|"]
    for task, method in cells(lines):
        for first, second, name in COMPARED:
            own = {"stage": "test", "task": task, "method": method}
            by_pass = [
                differences(accuracies(lines, at, arm=first, **own), accuracies(lines, at, arm=second, **own))
                for at in PASSES
            ]
            if by_pass[0]:
                values = " | ".join(shown(values, "+") for values in by_pass)
                rows.append(f"| {task} | {METHODS[method]} | {name} | {values} |")
    return rows


def settings_table(lines):
    rows = [
        "| task | method | arm | learning rate | other settings | tune accuracy | failed trials |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, method in cells(lines):
        for arm in ARMS:
            final = runs_of(lines, "test", task, method, arm)
            trials = runs_of(lines, "tune", task, method, arm)
            if not final:
                continue
            settings = final[0]["settings"]
            best = [score(line) for line in trials if line["settings"] == settings]
            others = ", ".join(
                f"`{name}={value:g}`" for name, value in settings.items() if name not in ("learning_rate", "humanline")
            )
            failed = sum(line["failure"] is not None for line in trials)
            rows.append(
                f"| {task} | {METHODS[method]} | {arm} | {settings['learning_rate']:g} | {others} | "
                f"{best[0]:.3f} | {failed} of {len(trials)} |"
            )
    return rows


ABLATIONS = (
    "clamp without sync", "sync without clamp", "sync every 1", "sync every 4", "sync every 16", "sync every 64",
    "loss settings of the plain arm",
)  # fmt: skip


def ablation_table(lines):
    rows = [
        "| task | method | change | 1 pass | 2 passes | 4 passes | minus the tuned arm | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, method in cells(lines):
        base = {"task": task, "method": method, "arm": LONG}
        if not any(line["stage"] in ABLATIONS and line["method"] == method and line["task"] == task for line in lines):
            continue
        for stage in ("test", *ABLATIONS):
            by_pass = [accuracies(lines, at, stage=stage, **base) for at in PASSES]
            tuned = accuracies(lines, "4", stage="test", **base)
            if by_pass[0]:
                values = " | ".join(shown(list(values.values())) for values in by_pass)
                change = "" if stage == "test" else shown(differences(by_pass[-1], tuned), "+")
                name = "none (tuned)" if stage == "test" else stage
                rows.append(f"| {task} | {METHODS[method]} | {name} | {values} | {change} | {len(by_pass[0])} |")
    return rows


def feedback_table(lines):
    rows = [
        "| task | method | arm | feedback from | 1 pass | 2 passes | 4 passes | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    stage = "another model's feedback"
    for task, method in cells(lines):
        for arm in ("offline", LONG):
            own = {"task": task, "method": method, "arm": arm}
            other = accuracies(lines, "1", stage=stage, **own)
            for name, which in (("the model itself", "test"), ("another model", stage)):
                by_pass = [accuracies(lines, at, stage=which, **own) for at in PASSES]
                # the same seeds in both rows, so that they can be compared
                kept = [[value for seed, value in values.items() if seed in other] for values in by_pass]
                if kept[0]:
                    values = " | ".join(shown(values) for values in kept)
                    rows.append(f"| {task} | {METHODS[method]} | {arm} | {name} | {values} | {len(kept[0])} |")
    return rows


def panels(rows, columns):
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.9 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def accuracy_picture(lines, path):
    """Accuracy against passes: mean and 95 % interval over seeds, one panel per task and method."""
    tasks = list(dict.fromkeys(task for task, _ in cells(lines)))
    figure, axes = panels(len(tasks), len(METHODS))
    for row, task in zip(axes, tasks, strict=True):
        for axis, method in zip(row, METHODS, strict=True):
            axis.set_title(f"{METHODS[method]}, task {task}", fontsize=10)
            for shift, arm in enumerate(ARMS):
                own = {"stage": "test", "task": task, "method": method, "arm": arm}
                points = [
                    interval(list(found.values())) for at in ("0", *PASSES) if (found := accuracies(lines, at, **own))
                ]
                if points:
                    axis.errorbar(
                        [at + 0.05 * (shift - 1.5) for at in (0, 1, 2, 4)], [mean for mean, _ in points],
                        [half or 0 for _, half in points], label=arm, color=COLOURS[arm], marker="o", markersize=3.5,
                        linestyle="--" if "humanline" in arm else "-", linewidth=1.5, capsize=2,
                    )  # fmt: skip
            axis.set_ylim(0, 1)
    for axis in axes[-1]:
        axis.set_xlabel("passes (32 steps each)")
        axis.set_xticks([0, 1, 2, 4])
    for row in axes:
        row[0].set_ylabel("accuracy, test prompts")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def tuning_picture(lines, path):
    """Tune accuracy against learning rate, the other settings at their first values."""
    tasks = list(dict.fromkeys(task for task, _ in cells(lines)))
    figure, axes = panels(len(tasks), len(METHODS))
    for row, task in zip(axes, tasks, strict=True):
        for axis, method in zip(row, METHODS, strict=True):
            axis.set_title(f"{METHODS[method]}, task {task}", fontsize=10)
            axis.set_xscale("log")
            for arm in ARMS:
                by_rate = {}
                for line in runs_of(lines, "tune", task, method, arm):
                    # the first trial at a rate is the one with the first settings
                    by_rate.setdefault(line["settings"]["learning_rate"], score(line))
                if by_rate:
                    rates = sorted(by_rate)
                    axis.plot(
                        rates, [by_rate[rate] for rate in rates], label=arm, color=COLOURS[arm], marker="o",
                        markersize=3.5, linestyle="--" if "humanline" in arm else "-", linewidth=1.5,
                    )  # fmt: skip
            axis.set_ylim(0, 1)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    for row in axes:
        row[0].set_ylabel("accuracy, tune prompts")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


WATCHED = {
    "logps/chosen": "log-prob of chosen, nats", "logps/rejected": "log-prob of rejected, nats",
    "entropy": "entropy, nats per token", "unclamped": "unclamped share",
}  # fmt: skip


def curves_picture(lines, task, method, path):
    """What the ablations do to the policy while it trains: mean over seeds."""
    figure, axes = panels(1, len(WATCHED))
    shades = plt.get_cmap("viridis")
    chosen = [stage for stage in (*ABLATIONS, "test") if any(
        line["stage"] == stage and line["task"] == task and line["method"] == method for line in lines)]  # fmt: skip
    for axis, (name, label) in zip(axes[0], WATCHED.items(), strict=True):
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
        for i, stage in enumerate(chosen):
            runs = [line["curves"].get(name) for line in runs_of(lines, stage, task, method, LONG)]
            runs = [run for run in runs if run]
            if runs:
                steps = [step for step, _ in min(runs, key=len)]
                means = [statistics.mean(run[j][1] for run in runs) for j in range(len(steps))]
                axis.plot(
                    steps, means, color="black" if stage == "test" else shades(i / len(chosen)),
                    linewidth=1.5, label="tuned" if stage == "test" else stage,
                )  # fmt: skip
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(7, len(labels) or 1), frameon=False, fontsize=8
    )
    save(figure, path)


def save(figure, path):
    figure.savefig(path, dpi=130)
    plt.close(figure)


def fill(page, name, rows, script):
    """Replaces the lines between the markers of `name` in the file `page`."""
    begin, end = f"<!-- {name}: written by benchmarks/{script} -->", f"<!-- /{name} -->"
    text = page.read_text()
    before, _, rest = text.partition(begin)
    _, closing, after = rest.partition(end)
    if not closing:
        raise ValueError(f"{page} has no markers `{begin}` and `{end}`.")
    page.write_text(before + begin + "\n\n" + "\n".join(rows) + "\n\n" + end + after)


TABLES = {
    "accuracy": accuracy_table, "differences": difference_table, "settings": settings_table,
    "ablations": ablation_table, "feedback": feedback_table,
}  # fmt: skip


def write(lines, docs=DOCS):
    for name, table in TABLES.items():
        fill(docs / "evidence.md", name, table(lines), "humanline_study.py")
    accuracy_picture(lines, docs / "evidence_accuracy.png")
    tuning_picture(lines, docs / "evidence_learning_rate.png")
    curves_picture(lines, "short", "dpo", docs / "evidence_curves.png")
