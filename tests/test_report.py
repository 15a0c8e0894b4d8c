"""The report on a run: reading its folder, findings, contents of the page."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from halos_trl.cli.main import main
from halos_trl.report import findings as rules
from halos_trl.report.findings import findings
from halos_trl.report.panels import panels_of, series, thinned
from halos_trl.report.runs import Run, Series, read_run, read_runs

pytest.importorskip("matplotlib")


def lines(**metrics):
    """Log lines, one for each value of the metrics, which are named with `__` for `/`."""
    named = {name.replace("__", "/"): values for name, values in metrics.items()}
    count = max(map(len, named.values()))
    return [
        {"step": 10 * (i + 1), **{name: values[i] for name, values in named.items() if i < len(values)}}
        for i in range(count)
    ]


def run_of(trainer="DPOTrainer", settings=None, data=None, error=None, **metrics):
    summary = {"trainer": trainer, "settings": settings or {}, "error": error}
    return Run("run", lines(**metrics), summary, data or {})


def titles(run):
    return [finding.title for finding in findings(run)]


HEALTHY = {
    "loss": [0.69, 0.6, 0.5, 0.45, 0.4, 0.38],
    "grad_norm": [0.5, 0.9, 0.8, 1.2, 0.7, 0.6],
    "learning_rate": [1e-6] * 6,
    "rewards__margins": [0.0, 0.2, 0.5, 0.9, 1.2, 1.3],
    "rewards__chosen": [0.0, 0.1, 0.2, 0.3, 0.3, 0.4],
    "logps__chosen": [-50.0, -49.0, -50.5, -48.0, -47.5, -47.0],
    "unclamped": [0.9, 0.92, 0.91, 0.9, 0.95, 0.93],
}
LIMIT = {"max_grad_norm": 1.0}

# What changes in the healthy run, the finding that it gives, and the figures that its text has to hold.
CASES = {
    "nan": ({"loss": [0.69, 0.6, math.nan, 0.5, 0.4, 0.4]}, "The loss is not finite", ["step 30", "1 of 6"]),
    "loss": ({"loss": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]}, "The loss rises", ["0.5", "0.95", "1.9 times"]),
    "chosen": (
        {"logps__chosen": [-40.0, -45.0, -50.0, -55.0, -58.0, -60.0]},
        "Chosen completions become less likely",
        ["-40.0", "-60.0"],
    ),
    "saturated": ({"rewards__margins": [0.0, 2.0, 5.0, 8.0, 11.0, 12.5]}, "The rewards are saturated", ["12.5"]),
    "clamped": ({"unclamped": [0.3] * 6}, "Humanline clamps most tokens", ["30%"]),
    "unclamped": ({"unclamped": [1.0] * 6}, "Humanline clamps hardly any token", ["100.00%"]),
    "limit": ({"grad_norm": [3.0, 2.0, 0.9, 4.0, 5.0, 2.5]}, "The gradient is at its limit", ["5 of 6", "=1"]),
    "clip": ({"clip_fraction": [0.1, 0.3, 0.5, 0.6, 0.7, 0.8]}, "Most tokens are clipped", ["80%", "10%"]),
    "longer": (
        {"eval_generation_length": [20.0, 25.0, 40.0]},
        "Samples become longer",
        ["20.0", "40.0"],
    ),
    "shorter": ({"eval_generation_length": [20.0, 12.0]}, "Samples become shorter", ["20.0", "12.0"]),
    "overfit": ({"eval_loss": [0.6, 0.4, 0.5]}, "The evaluation loss rises again", ["step 20", "0.4", "0.5"]),
    "worse": (
        {"eval_win_rate": [0.5, 0.3], "eval_generation_score": [0.6, 0.4]},
        "Samples are worse than at the start",
        ["30%", "0.6", "0.4"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_stands_out_is_said_with_its_figures(case):
    change, title, figures = CASES[case]
    (found,) = findings(run_of(settings=LIMIT, **{**HEALTHY, **change}))
    assert found.title == title
    assert [figure for figure in figures if figure not in found.text] == []


def test_nothing_stands_out_in_a_healthy_run():
    assert findings(run_of(settings=LIMIT, **HEALTHY)) == []
    assert findings(run_of("SimPOTrainer", **{**HEALTHY, "rewards__margins": [20.0] * 6})) == []  # not of a sigmoid


def test_a_loss_against_a_moving_reference_begins_anew():
    losses = {"loss": [0.2, 0.2, 0.2, 0.2, 0.6, 0.69], "eval_loss": [0.69, 0.2, 0.69]}
    assert titles(run_of(**{**HEALTHY, **losses})) == ["The loss rises", "The evaluation loss rises again"]
    assert titles(run_of(settings={"humanline": True}, **{**HEALTHY, **losses})) == []


def test_few_lines_say_nothing_of_a_course():
    short = {name: values[-2:] for name, values in HEALTHY.items()}
    assert findings(run_of(settings=LIMIT, **{**short, "loss": [0.1, 9.0], "grad_norm": [50.0, 60.0]})) == []


def test_a_kl_estimate_at_zero_stands_out_where_desirable_completions_lose():
    kl = {**HEALTHY, "kl": [0.0] * 6}
    assert titles(run_of("KTOTrainer", **kl)) == []
    lost = run_of("KTOTrainer", **{**kl, "rewards__chosen": [0.0, -0.1, -0.2, -0.3, -0.4, -0.5]})
    (found,) = findings(lost)
    assert found.title == "The KL estimate is pinned at 0" and "-0.5" in found.text and "6 of 6" in found.text
    assert titles(run_of("GRPOTrainer", **{**kl, "rewards__chosen": [-1.0] * 6})) == []


def test_an_evaluation_set_that_is_trained_on_is_named():
    counts = {"prompts": 200, "shared_prompts": 2, "rows": 400, "shared_rows": 3}
    (found,) = findings(run_of(data={"overlap": {"mine": counts}}, **HEALTHY))
    assert found.title == "Evaluation and training share data"
    assert "2 of the 200" in found.text and "3 of its 400 rows" in found.text and "`mine`" in found.text
    assert titles(run_of(data={"overlap": {"mine": counts | {"shared_prompts": 1}}}, **HEALTHY)) == []


def test_two_signs_of_a_run_thrown_off_name_the_learning_rate():
    blown = {"loss": [0.7, 0.9, 3.0, 5.0, 4.0, 6.0], "logps__chosen": [-50.0, -90, -200, -300, -310, -400]}
    first = findings(run_of(**{**HEALTHY, **blown, "learning_rate": [1e-4, 5e-4, 5e-4, 4e-4, 2e-4, 1e-4]}))[0]
    assert first.title == "The learning rate is the likely cause" and first.severe
    assert all(figure in first.text for figure in ("0.0005", "0.7", "6", "-50.0", "-400.0"))
    one_sign = findings(run_of(**{**HEALTHY, "loss": blown["loss"]}))
    assert [finding.title for finding in one_sign] == ["The loss rises"]


RUNS = Path(__file__).parent / "data" / "runs"
"""Logs of runs on the embedded task, `python examples/train_<method>.py` with `--eval_strategy steps --eval_steps 20
--logging_steps 4`; one of them with `--learning_rate 3e-2`, a hundred times the task's default, and cut off.
"""


@pytest.mark.parametrize("name", ["kto", "dpo-humanline", "grpo"])
def test_nothing_stands_out_in_recorded_runs_that_went_well(name):
    assert findings(read_run(RUNS / name)) == []


def test_the_report_of_a_recorded_run_that_failed_names_the_learning_rate():
    cause, *others = findings(read_run(RUNS / "kto-learning-rate-100"))
    assert cause.title == "The learning rate is the likely cause" and cause.severe
    assert "0.03," in cause.text and "from -10.3 to -22" in cause.text and "gradient vanished" in cause.text
    assert "Chosen completions become less likely" in [finding.title for finding in others]


def test_a_run_that_was_stopped_by_a_loss_that_is_not_finite_says_so():
    run = run_of(error="ValueError: The loss is NaN or infinite at step 7.", loss=[0.7, 0.9])
    assert titles(run) == ["The loss is not finite"]


def test_docs_name_every_finding_and_threshold():
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    named = set(re.findall(r'Finding\(\s*f?"([^"{]+)', Path(rules.__file__).read_text()))
    for title in named | {title for _, title, _ in CASES.values()}:
        assert title.split(" become")[0].split(" hardly")[0] in text, title


# -- reading ---------------------------------------------------------------------------------------------------------


def write_run(folder, history, summary=None, file="train_log.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    if file == "train_log.jsonl":
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in history))
    else:
        (folder / file).write_text(json.dumps({"log_history": history}))
    if summary is not None:
        (folder / "run_summary.json").write_text(json.dumps(summary))
    return folder


REFUSED = {
    "not there": (lambda folder: folder / "none", "is missing"),
    "a file": (lambda folder: (folder / "file").write_text("") or folder / "file", "is not a folder"),
    "no run": (lambda folder: folder, "contains no run"),
    "rounds": (lambda folder: (folder / "round-01").mkdir() or folder, "contains online rounds.*round-01"),
    "above a run": (lambda folder: write_run(folder / "kto", lines(loss=[1.0])).parent, "Did you mean .*kto"),
    "not begun": (lambda folder: write_run(folder, [], {"status": "running"}), "logged nothing yet"),
    "no loss": (lambda folder: write_run(folder, [{"train_runtime": 3.0, "step": 2}]), "logging_steps"),
    "broken": (
        lambda folder: (folder / "trainer_state.json").write_text('{"log_hist') and folder,
        "trainer_state.json is not JSON",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_without_a_run_is_refused(tmp_path, capsys, case):
    make, message = REFUSED[case]
    assert main(["report", str(make(tmp_path))]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_run_that_is_still_going_is_read_up_to_its_last_whole_line(tmp_path):
    write_run(tmp_path, lines(loss=[0.7, 0.6]), {"status": "running"})
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    run = read_run(tmp_path)
    assert run.series("loss") == Series([10, 20], [0.7, 0.6])
    assert "still in progress" in run.notes[0]


def test_checkpoints_alone_give_the_log_of_the_last_one(tmp_path):
    for step in (9, 10):
        write_run(tmp_path / f"checkpoint-{step}", lines(loss=[1.0] * step), file="trainer_state.json")
    run = read_run(tmp_path)
    assert len(run.history) == 10 and "checkpoint-10" in run.notes[0]
    assert len(read_run(tmp_path / "checkpoint-9").history) == 9


def test_the_state_adds_what_was_logged_after_training(tmp_path):
    own = [line | {"seconds": 1.0} for line in lines(loss=[0.7, 0.6])]
    write_run(tmp_path, own)
    after = {"step": 20, "eval_loss": 0.5}
    write_run(tmp_path, [*lines(loss=[0.7, 0.6]), after], file="trainer_state.json")
    assert read_run(tmp_path).history == [*own, after]


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / name / "out", lines(loss=[1.0])) for name in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/out", "b/out"]
    with pytest.raises(ValueError, match="passed twice"):
        read_runs([folders[0], folders[0]])


# -- the page --------------------------------------------------------------------------------------------------------


def test_throughput_is_tokens_over_training_time_also_after_a_resume():
    rows = [(10, 1000, 2.0), (20, 3000, 4.0), (30, 500, 6.0), (40, 1500, 7.0)]  # a new process counts from 0
    run = Run("run", [{"step": s, "loss": 1.0, "num_tokens": n, "seconds": t} for s, n, t in rows])
    assert series(run, "tokens_per_second") == Series([20, 40], [1000.0, 1000.0])


def test_scores_of_samples_begin_before_the_first_step():
    rows = [
        {"step": step, "prompt": p, "score": s, "tokens": 4}
        for step, p, s in ((0, "a", 1.0), (0, "b", 0.0), (5, "a", 1.0))
    ]
    run = Run("run", [{"step": 5, "loss": 1.0, "eval_generation_score": 1.0}], generations=rows)
    assert series(run, "eval_generation_score") == Series([0, 5], [0.5, 1.0])
    assert series(run, "eval_generation_length") == Series([0, 5], [4.0, 4.0])


def test_many_points_are_thinned_to_means_of_neighbours():
    values = Series(list(range(1000)), [float(i) for i in range(1000)])
    steps, numbers = thinned(values, most=100)
    assert len(steps) == 100 and numbers[0] == 4.5 and steps[0] == 5


def test_page_of_a_run_is_one_file_that_loads_nothing(tmp_path, capsys):
    summary = {
        "trainer": "KTOTrainer",
        "steps": 60,
        "settings": {"beta": 0.5, "max_grad_norm": 1.0, "seed": 42},
        "changed": ["beta"],
        "versions": {"trl": "1.16.0"},
    }
    folder = write_run(tmp_path / "mine & yours", lines(**HEALTHY), summary)
    data = {"train": {"rows": 64, "labels": {"desirable": 40, "undesirable": 24}, "notes": {"are cut": 3}}}
    (folder / "data_summary.json").write_text(json.dumps(data))
    rows = [
        {"step": step, "prompt": [{"role": "user", "content": "<b>?"}], "completion": text, "score": score}
        for step, text, score in ((0, "before it", 0.25), (60, "after it", 0.75))
    ]
    (folder / "_generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(folder), "--png"]) == 0
    written = capsys.readouterr().out.split("\n")[:-1]
    page = (folder / "report.html").read_text()
    assert written[0] == str(folder / "report.html")
    assert {path.rsplit("report-")[-1] for path in written[1:]} == {
        f"{panel.key}.png" for panel in panels_of([read_run(folder)])
    }
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|<script|@import', page)
    for text in ("mine &amp; yours", "&lt;b&gt;?", "before it", "after it", "0.25", "0.75", "No findings"):
        assert text in page, text
    for text in (
        "40 desirable, 24 undesirable",
        "3 are cut",
        "2 settings at their defaults",
        "1.16.0",
        "60 of 60 steps",
    ):
        assert text in page, text
    assert page.index("<code>beta</code>") < page.index("<code>seed</code>")


def test_comparison_shows_what_differs_and_draws_runs_over_each_other(tmp_path):
    one = write_run(tmp_path / "one", lines(**HEALTHY), {"settings": {"beta": 0.1, "seed": 1}})
    two = write_run(tmp_path / "two", lines(loss=[0.7, 0.5], kl=[0.1, 0.2]), {"settings": {"beta": 0.5, "seed": 1}})
    assert main(["report", str(one), str(two), "--output", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    settings = page[page.index('id="settings"') : page.index('id="data"')]
    assert "<code>beta</code>" in settings and "<code>seed</code>" not in settings
    assert {'id="loss"', 'id="kl"', 'id="logps_chosen"'} <= set(re.findall(r'id="\w+"', page))


def test_missing_matplotlib_is_said_with_the_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write_run(tmp_path, lines(loss=[1.0]))
    assert main(["report", str(folder)]) == 2
    assert "halos_trl[plots]" in capsys.readouterr().err
