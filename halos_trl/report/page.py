"""The report as one self-contained HTML file, for screen and print."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from .findings import Finding, findings
from .panels import panels_of
from .runs import Run
from .samples import before_and_after

CSS = """\
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 24px 60px; background: #fff; color: #1f2933;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; margin: 0 0 2px; }
h2 { font-size: 18px; margin: 34px 0 10px; padding-bottom: 4px; border-bottom: 1px solid #d9dee3; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 6px 0; }
.sub { color: #5b6670; }
nav a { margin-right: 14px; color: #2166ac; text-decoration: none; }
table { border-collapse: collapse; font-size: 13.5px; min-width: 50%; }
.wide { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0; border-bottom: 1px solid #eceff2; }
th { color: #5b6670; font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, .text { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.finding { border-left: 4px solid #d99a2b; background: #fdf8ee; padding: 8px 14px; margin: 10px 0;
  break-inside: avoid; }
.finding.severe { border-color: #c0392b; background: #fcf1ef; }
.finding.none { border-color: #1b7837; background: #f0f7f1; }
.finding b { display: block; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 14px 22px; }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
details summary { cursor: pointer; color: #2166ac; margin: 8px 0; }
footer { margin-top: 40px; color: #5b6670; font-size: 13px; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } nav { display: none; }
  .pictures { grid-template-columns: 1fr 1fr; } h2 { break-after: avoid; } }
"""

_FINAL = (
    *("loss", "eval_loss", "rewards/margins", "eval_rewards/margins", "rewards/accuracies", "eval_rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "kl", "entropy", "unclamped", "clip_fraction", "grad_norm"),
    *("eval_accuracy", "eval_generation_score", "eval_win_rate", "eval_generation_length"),
)


def page(runs: Sequence[Run], pictures: dict[str, str]) -> str:
    """The HTML page of one run, or of several runs for comparison. `pictures` maps panel keys to SVG."""
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    sections = [
        ("findings", "Findings", "".join(map(_findings, _named(runs)))),
        ("settings", "Settings", _settings(runs[0]) if len(runs) == 1 else _differing(runs)),
        ("data", "Data", "".join(_data(run, several=len(runs) > 1) for run in runs)),
        ("charts", "Charts", _pictures(runs, pictures)),
        ("samples", "Samples", "".join(_samples(run, several=len(runs) > 1) for run in runs)),
        ("final", "First and last values", _final(runs)),
        ("versions", "Versions", _versions(runs)),
    ]
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{_text(name)}</a>' for key, name, _ in kept)
    body = "".join(f'<h2 id="{key}">{_text(name)}</h2>{content}' for key, name, content in kept)
    headlines = "".join(_headline(run, several=len(runs) > 1) for run in runs)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head><body><h1>{_text(title)}</h1>{headlines}"
        f"<nav>{links}</nav>{body}<footer>Written by <code>halos-trl report</code>.</footer></body></html>\n"
    )


def _named(runs: Sequence[Run]) -> list[tuple[str | None, Run]]:
    return [(run.name if len(runs) > 1 else None, run) for run in runs]


def _headline(run: Run, *, several: bool) -> str:
    summary = run.summary
    steps = max((row.get("step", 0) for row in run.history), default=0)
    parts = [
        run.name if several else None,
        summary.get("trainer"),
        summary.get("base_model", "").replace("`", "") or None,
        f"{steps:,} of {summary['steps']:,} steps" if summary.get("steps") else f"{steps:,} steps",
        _parameters(summary),
        f"{summary['processes']} processes" if summary.get("processes", 1) > 1 else None,
        summary.get("device"),
        f"started {summary['started']}" if summary.get("started") else None,
    ]
    notes = "".join(f'<p class="finding">{_text(note)}</p>' for note in run.notes)
    return f'<p class="sub">{" · ".join(_text(part) for part in parts if part)}</p>{notes}'


def _parameters(summary: dict[str, Any]) -> str | None:
    total, trained = summary.get("parameters"), summary.get("trained_parameters")
    if not total or not trained:
        return None
    share = "" if trained == total else f", {trained:,} of them trained"
    return f"{total:,} parameters{share}"


# -- findings --------------------------------------------------------------------------------------------------------


def _findings(named: tuple[str | None, Run]) -> str:
    name, run = named
    heading = f"<h3>{_text(name)}</h3>" if name else ""
    found = findings(run)
    if not found:
        return f'{heading}<p class="finding none">No findings.</p>'
    return heading + "".join(map(_finding, found))


def _finding(finding: Finding) -> str:
    kind = "finding severe" if finding.severe else "finding"
    return f'<div class="{kind}"><b>{_text(finding.title)}</b>{_code(finding.text)}</div>'


def _code(text: str) -> str:
    """Convert text to HTML, with parts in backticks as code."""
    parts = _text(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


# -- settings --------------------------------------------------------------------------------------------------------


def _settings(run: Run) -> str:
    if not run.settings:
        return "<p>The run has not recorded its settings (no <code>run_summary.json</code>).</p>"
    changed = [name for name in run.summary.get("changed", ()) if name in run.settings]
    adapter = run.summary.get("adapter") or {}
    first = {**{name: run.settings[name] for name in changed}, **adapter}
    others = {name: run.settings[name] for name in sorted(run.settings.keys() - first.keys())}
    return (
        f"<h3>Set for this run</h3>{_table(('setting', 'value'), _setting_rows(first))}"
        f"<details><summary>{len(others)} settings at their defaults</summary>"
        f"{_table(('setting', 'value'), _setting_rows(others))}</details>"
    )


def _setting_rows(settings: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"<code>{_text(name)}</code>", _text(_value(value))) for name, value in settings.items()]


def _differing(runs: Sequence[Run]) -> str:
    """A table of the settings in which the runs differ, including their method."""
    tables = [{"trainer": r.summary.get("trainer"), "base_model": r.summary.get("base_model")} for r in runs]
    tables = [
        table | run.settings | (run.summary.get("adapter") or {}) for table, run in zip(tables, runs, strict=True)
    ]
    names = list(dict.fromkeys(name for table in tables for name in table))
    shown = [[_value(table[name]) if name in table else "" for table in tables] for name in names]
    rows = [
        (f"<code>{_text(name)}</code>", *map(_text, values))
        for name, values in zip(names, shown, strict=True)
        if len(set(values)) > 1
    ]
    if not rows:
        return "<p>The runs have the same settings.</p>"
    return _table(("setting", *(run.name for run in runs)), rows)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


# -- data ------------------------------------------------------------------------------------------------------------


_QUANTILES = ("min", "10%", "median", "90%", "max", "mean")


def _data(run: Run, *, several: bool) -> str:
    heading = f"<h3>{_text(run.name)}</h3>" if several else ""
    sets = [("training", run.data.get("train") or {})]
    sets += [("evaluation" if n == "eval" else f"evaluation: {n}", d) for n, d in run.data.get("eval", {}).items()]
    sets = [(name, data) for name, data in sets if data]
    if not sets:
        return heading + ("<p>Not recorded.</p>" if several else "<p>The run has not recorded its data.</p>")
    lengths = [
        (_text(name), _text(column), *(_number(quantiles.get(key)) for key in _QUANTILES))
        for name, data in sets
        for column, quantiles in data.get("lengths", {}).items()
    ]
    header = ("dataset", "length in tokens of", "min", "10 %", "median", "90 %", "max", "mean")
    return (
        f"{heading}<ul>{''.join(f'<li>{_text(name)}: {_counts(data)}</li>' for name, data in sets)}"
        f"{''.join(_overlap(name, counts) for name, counts in run.data.get('overlap', {}).items())}</ul>"
        + (_table(header, lengths, numbers=range(2, 8)) if lengths else "")
    )


def _counts(data: dict[str, Any]) -> str:
    if data.get("streamed"):
        return "streamed, not counted"
    parts = [f"{data.get('rows', 0):,} rows"]
    if data.get("prompts"):
        parts.append(f"{data['prompts']:,} distinct prompts")
    labels = data.get("labels")
    if labels:
        parts.append(f"{labels['desirable']:,} desirable, {labels['undesirable']:,} undesirable")
    scores = data.get("scores")
    if scores:
        parts.append(f"scores from {scores['min']:.3g} to {scores['max']:.3g}, mean {scores['mean']:.3g}")
    notes = "".join(f"<br>{count:,} {_code(text)}" for text, count in (data.get("notes") or {}).items())
    return "; ".join(map(_text, parts)) + notes


def _overlap(name: str, counts: dict[str, int]) -> str:
    which = "the evaluation set" if name == "eval" else f"evaluation set {name}"
    parts = [
        f"{counts.get(f'shared_{what}', 0):,} of {counts[what]:,} distinct {what}"
        for what in ("prompts", "rows")
        if counts.get(what)
    ]
    return f"<li>Also in the training set: {_text(' and '.join(parts))} of {_text(which)}</li>" if parts else ""


# -- curves, samples, figures ----------------------------------------------------------------------------------------


def _pictures(runs: Sequence[Run], pictures: dict[str, str]) -> str:
    figures = [
        f'<figure id="{panel.key}"><img alt="{_text(panel.title)}" src="{_data_url(pictures[panel.key])}"></figure>'
        for panel in panels_of(runs)
        if panel.key in pictures
    ]
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _data_url(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _samples(run: Run, *, several: bool) -> str:
    pairs = before_and_after(run.generations)
    if not pairs.rows:
        return ""
    heading = f"<h3>{_text(run.name)}</h3>" if several else ""
    rows = [
        (_pre(row.prompt), _pre(row.before), _number(row.score_before), _pre(row.after), _number(row.score_after))
        for row in pairs.rows
    ]
    header = ("prompt", f"step {pairs.first}", "score", f"step {pairs.last}", "score")
    shown = "" if pairs.total == len(rows) else f" The {len(rows)} of {pairs.total} whose scores changed most."
    before, after = _number(pairs.mean_before), _number(pairs.mean_after)
    means = f"Mean score {before} at step {pairs.first}, {after} at step {pairs.last}."
    return f"{heading}<p>{means}{shown}</p>{_table(header, rows, numbers=(2, 4))}"


def _pre(text: str) -> str:
    return f'<div class="text">{_text(text if len(text) <= 600 else text[:600] + " …")}</div>'


def _final(runs: Sequence[Run]) -> str:
    found = {name: [run.series(name).values for run in runs] for name in _FINAL}
    rows = [
        (f"<code>{_text(name)}</code>", *(cell for values in columns for cell in _first_and_last(values)))
        for name, columns in found.items()
        if any(columns)
    ]
    header = ["metric"]
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        header += [f"{prefix}first", f"{prefix}last"]
    return _table(header, rows, numbers=range(1, len(header)))


def _first_and_last(values: list[float]) -> tuple[str, str]:
    return (_number(values[0]), _number(values[-1])) if values else ("", "")


def _versions(runs: Sequence[Run]) -> str:
    tables = [run.summary.get("versions", {}) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [(_text(name), *(_text(table.get(name, "")) for table in tables)) for name in names]
    return _table(("package", *(run.name if len(runs) > 1 else "version" for run in runs)), rows) if rows else ""


# -- HTML ------------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """An HTML table. Cells are HTML, headers are text. `numbers`: indices of right-aligned columns."""
    right = set(numbers)

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="number"' if i in right else "" for i in range(len(row)))
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", [_text(name) for name in header])}</tr>{body}</table></div>'


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e12 else f"{value:.4g}"


def _text(value: Any) -> str:
    return html.escape(str(value))


__all__ = ["page"]
