"""Findings: notable properties of a run in plain language, with the numbers that support them.

Each finding is a pure function of a `Run` that returns a `Finding` or None. The thresholds are the constants below,
which `docs/report.md` explains. "Start" and "end" are means of the first and last fifth of a metric's log lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .panels import series
from .runs import Run

MIN_LINES = 5
"""Minimum number of log lines for a trend."""
LOSS_RISE = 1.5
"""Ratio of the loss at the end to the loss at the start."""
LOGPS_FALL, LOGPS_FALL_NATS = 0.5, 2.0
"""Decrease of chosen log-probs: as a fraction of their start, and in nats per completion."""
COLLAPSE_NATS = 50.0
"""Decrease of chosen log-probs, in nats per completion, at which the policy practically never generates them."""
SATURATED_MARGIN = 10.0
"""Reward margin at which the gradient of a pair is less than 1/20,000 of its maximum."""
KL_ZERO_SHARE = 0.9
"""Fraction of log lines, after the first tenth, in which KTO's KL estimate is 0."""
CLIPPED_SHARE = 0.5
"""Fraction of clipped tokens."""
UNCLAMPED_LOW, UNCLAMPED_HIGH = 0.5, 0.999
"""The unclamped fraction."""
LENGTH_DRIFT = 1.5
"""Ratio of the samples' length at the end to that at the start, or its inverse."""
AT_LIMIT_SHARE = 0.8
"""Fraction of log lines with a gradient norm above `max_grad_norm`."""
LOSS_BLOWUP = 2.0
"""Ratio of the largest loss to the first one."""
NORM_GROWTH, NORM_VANISHED = 20.0, 1e-3
"""Ratio of the largest gradient norm to the first one; ratio of the norm at the end to the first one."""
KL_PER_TOKEN = 5.0
"""KL to the reference in GRPO and PPO, in nats per token."""
OVERLAP_SHARE = 0.01
"""Fraction of an evaluation dataset's prompts that are in the training dataset."""
OVERFIT_RISE = 0.1
"""Relative increase of the last evaluation loss over the lowest one."""
WIN_RATE_LOW = 0.45
"""Win rate of the samples against those from the start of the run."""


class Finding(NamedTuple):
    """A notable property of a run."""

    title: str
    text: str
    panel: str
    """Key of the panel that shows it."""
    severe: bool = False
    """Whether the finding makes the run unusable."""


def _ends(run: Run, metric: str) -> tuple[float, float] | None:
    """Start and end of a metric; None if it has fewer than `MIN_LINES` finite values."""
    values = series(run, metric).finite.values
    if len(values) < MIN_LINES:
        return None
    part = max(1, len(values) // 5)
    return sum(values[:part]) / part, sum(values[-part:]) / part


def _reference_moves(run: Run) -> bool:
    return bool(run.settings.get("humanline") or run.settings.get("sync_ref_model"))


def loss_not_finite(run: Run) -> Finding | None:
    """The loss is NaN or infinite, or the run was stopped for that reason."""
    steps, values = run.series("loss")
    bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    error = str(run.summary.get("error", ""))
    stopped = "NaN or infinite" in error or "not finite" in error
    if not bad and not stopped:
        return None
    where = f"at step {bad[0]}, and in {len(bad)} of {len(steps)} log lines" if bad else f"and ended the run: {error}"
    return Finding("The loss is not finite", f"It is NaN or infinite {where}.", "loss", severe=True)


def loss_rises(run: Run) -> Finding | None:
    """The loss is higher at the end than at the start. Not checked for losses that may be negative, which have no
    meaningful ratio, or with a moving reference, because the loss starts over with each sync.
    """
    ends = None if _reference_moves(run) else _ends(run, "loss")
    if ends is None or ends[0] <= 0 or ends[1] < LOSS_RISE * ends[0]:
        return None
    text = f"It was {ends[0]:.3g} at the start and is {ends[1]:.3g} at the end, {ends[1] / ends[0]:.1f} times as much."
    return Finding("The loss rises", text, "loss", severe=True)


def chosen_logps_fall(run: Run) -> Finding | None:
    """The log-probs of chosen completions decrease."""
    ends = _ends(run, "logps/chosen")
    if ends is None:
        return None
    fall = ends[0] - ends[1]
    if fall < LOGPS_FALL_NATS or fall < LOGPS_FALL * abs(ends[0]):
        return None
    text = (
        f"The mean log-prob of a chosen completion fell from {ends[0]:.1f} to {ends[1]:.1f} nats. The margin may "
        "still grow, if rejected completions fall faster, but the policy moves away from both. Lower the learning "
        "rate, raise `beta`, or train for fewer epochs."
    )
    return Finding("Chosen completions become less likely", text, "logps", severe=fall > COLLAPSE_NATS)


def rewards_saturated(run: Run) -> Finding | None:
    """The reward margins are so large that pairs hardly contribute to the gradient."""
    ends = _ends(run, "rewards/margins") if run.method in ("", "DPO", "KTO", "CDPO") else None
    if ends is None or ends[1] < SATURATED_MARGIN:
        return None
    text = (
        f"Their margin is {ends[1]:.1f} at the end; beyond {SATURATED_MARGIN:g} the sigmoid of the loss is flat, and "
        "most pairs give almost no gradient. Further epochs change little; stop earlier, or lower `beta`."
    )
    return Finding("The rewards are saturated", text, "margins")


def kl_at_zero(run: Run) -> Finding | None:
    """KTO's reference point is mostly 0, its lower bound, and rewards of desirable completions are negative."""
    values = series(run, "kl").finite.values if run.method in ("", "KTO") else []
    values = values[len(values) // 10 :]
    zeros = sum(value == 0 for value in values)
    chosen = _ends(run, "rewards/chosen")
    if len(values) < MIN_LINES or zeros < KL_ZERO_SHARE * len(values) or chosen is None or chosen[1] >= 0:
        return None
    text = (
        f"It is 0 in {zeros} of {len(values)} log lines, and desirable completions end with a mean reward of "
        f"{chosen[1]:.3g}, below it: all completions become less likely, and undesirable rows dominate the gradient. "
        "Raise `desirable_weight` or lower `undesirable_weight`, lower the learning rate, or use more rows per "
        "optimizer step."
    )
    return Finding("The KL estimate is pinned at 0", text, "kl")


def most_tokens_clipped(run: Run) -> Finding | None:
    """GRPO and PPO: most ratios are clipped; clipped tokens give no gradient."""
    ends = _ends(run, "clip_fraction")
    if ends is None or ends[1] < CLIPPED_SHARE:
        return None
    text = (
        f"The clip affects {ends[1]:.0%} of the tokens at the end ({ends[0]:.0%} at the start), and they give no "
        "gradient. Lower the learning rate, train for fewer epochs, or widen the clip."
    )
    return Finding("Most tokens are clipped", text, "clip")


def unclamped_extreme(run: Run) -> Finding | None:
    """Humanline: nearly all tokens, or hardly any, are within the bounds."""
    values = series(run, "unclamped").finite.values
    if len(values) < MIN_LINES:
        return None
    mean = sum(values) / len(values)
    if mean < UNCLAMPED_LOW:
        text = (
            f"On average {mean:.0%} of the tokens are unclamped, and the others give no gradient. Lower the learning "
            "rate, copy the reference more often (`humanline_sync_steps`), or widen the bounds (`log_epsilon_p`, "
            "`log_epsilon_r`)."
        )
        return Finding("Humanline clamps most tokens", text, "unclamped")
    if mean > UNCLAMPED_HIGH:
        text = (
            f"On average {mean:.2%} of the tokens are unclamped, so the clamp has almost no effect. If it should have "
            "one, copy the reference less often (`humanline_sync_steps`) or narrow the bounds."
        )
        return Finding("Humanline clamps hardly any token", text, "unclamped")
    return None


def length_drifts(run: Run) -> Finding | None:
    """Samples become longer or shorter."""
    values = series(run, "eval_generation_length").finite.values
    if len(values) < 2 or min(values[0], values[-1]) <= 0:
        return None
    ratio = values[-1] / values[0]
    if 1 / LENGTH_DRIFT < ratio < LENGTH_DRIFT:
        return None
    text = (
        f"A sample had {values[0]:.1f} tokens on average at the start and has {values[-1]:.1f} at the end. Check "
        "whether the scores or labels favor a certain length."
    )
    return Finding(f"Samples become {'longer' if ratio > 1 else 'shorter'}", text, "generation_length")


def gradient_at_limit(run: Run) -> Finding | None:
    """Gradient clipping scales down most updates."""
    limit = run.settings.get("max_grad_norm")
    values = series(run, "grad_norm").finite.values
    if not isinstance(limit, int | float) or limit <= 0 or len(values) < MIN_LINES:
        return None
    above = sum(value > limit for value in values)
    if above < AT_LIMIT_SHARE * len(values):
        return None
    median = sorted(values)[len(values) // 2]
    text = (
        f"The norm is above `max_grad_norm={limit:g}` in {above} of {len(values)} log lines (median {median:.3g}), so "
        "most updates are clipped to the same norm. With Adam this matters little; otherwise raise the limit or lower "
        "the learning rate."
    )
    return Finding("The gradient is at its limit", text, "grad_norm")


def evaluation_overlaps(run: Run) -> Finding | None:
    """Prompts of an evaluation dataset also occur in the training data."""
    for name, counts in run.data.get("overlap", {}).items():
        what = "prompts" if counts.get("prompts") else "rows"
        number, shared = counts.get(what, 0), counts.get(f"shared_{what}", 0)
        if number and shared >= OVERLAP_SHARE * number:
            which = "evaluation set" if name == "eval" else f"evaluation set `{name}`"
            rows = (
                f", and {counts.get('shared_rows', 0)} of its {counts.get('rows', 0)} rows" if what != "rows" else ""
            )
            text = (
                f"{shared} of the {number} distinct {what} of the {which} are in the training set{rows}. Its metrics "
                "are optimistic. Split by prompt."
            )
            return Finding("Evaluation and training share data", text, "data")
    return None


def overfits(run: Run) -> Finding | None:
    """The evaluation loss was lower earlier in the run, with the same reference."""
    steps, values = run.series("eval_loss").finite
    if len(values) < 3 or min(values) <= 0 or _reference_moves(run):
        return None
    best = values.index(min(values))
    if values[-1] < (1 + OVERFIT_RISE) * values[best]:
        return None
    text = (
        f"It was lowest at step {steps[best]} ({values[best]:.3g}) and is {values[-1]:.3g} at the end. "
        "`load_best_model_at_end=True` keeps the best model."
    )
    return Finding("The evaluation loss rises again", text, "loss")


def samples_worse(run: Run) -> Finding | None:
    """Samples lose against those from the start of the run."""
    rate = series(run, "eval_win_rate").finite.values
    if not rate or rate[-1] >= WIN_RATE_LOW:
        return None
    scores = series(run, "eval_generation_score").finite.values
    means = f" The mean score went from {scores[0]:.3g} to {scores[-1]:.3g}." if len(scores) > 1 else ""
    text = f"At the end they win {rate[-1]:.0%} of the comparisons with the start (a tie counts half).{means}"
    return Finding("Samples are worse than at the start", text, "win_rate", severe=True)


def learning_rate_too_high(run: Run) -> Finding | None:
    """The learning rate is probably too high: at least two signs of an unstable run occur together."""
    signs = [sign for sign in (find(run) for find in _SIGNS) if sign]
    rates = run.series("learning_rate").finite.values
    if len(signs) < 2 or not rates:
        return None
    text = (
        f"It went up to {max(rates):.3g}, and {'; '.join(signs)}. Train again with a tenth to a hundredth of it; the "
        "first log lines show whether that is enough."
    )
    return Finding("The learning rate is the likely cause", text, "learning_rate", severe=True)


def _loss_sign(run: Run) -> str | None:
    if loss_not_finite(run):
        return "the loss became NaN or infinite"
    values = series(run, "loss").finite.values
    if len(values) >= MIN_LINES and values[0] > 0 and max(values) > LOSS_BLOWUP * values[0]:
        return f"the loss went from {values[0]:.3g} up to {max(values):.3g}"
    return None


def _logps_sign(run: Run) -> str | None:
    values = series(run, "logps/chosen").finite.values
    if len(values) < MIN_LINES or values[0] - min(values) < COLLAPSE_NATS:
        return None
    return f"the mean log-prob of a chosen completion fell from {values[0]:.1f} to {min(values):.1f} nats"


def _norm_sign(run: Run) -> str | None:
    values = series(run, "grad_norm").finite.values
    if len(values) < MIN_LINES or values[0] <= 0:
        return None
    if max(values) >= NORM_GROWTH * values[0]:
        return f"the gradient norm grew from {values[0]:.3g} to {max(values):.3g}"
    if _ends(run, "grad_norm")[1] <= NORM_VANISHED * values[0]:  # type: ignore[index]
        return f"the gradient vanished (norm {values[0]:.3g} at the start, {values[-1]:.3g} at the end)"
    return None


def _kl_sign(run: Run) -> str | None:
    ends = _ends(run, "kl") if run.method in ("GRPO", "PPO") else None
    if ends is None or ends[1] < KL_PER_TOKEN:
        return None
    return f"the KL to the reference went from {ends[0]:.3g} to {ends[1]:.3g} nats per token"


def _samples_sign(run: Run) -> str | None:
    scores = series(run, "eval_generation_score").finite.values
    if len(scores) < 2 or not 0 <= scores[-1] < scores[0] / 2:
        return None
    return f"the mean score of samples went from {scores[0]:.3g} to {scores[-1]:.3g}"


_SIGNS = (_loss_sign, _logps_sign, _norm_sign, _kl_sign, _samples_sign)

FINDINGS: tuple[Callable[[Run], Finding | None], ...] = (
    learning_rate_too_high,
    loss_not_finite,
    loss_rises,
    samples_worse,
    chosen_logps_fall,
    evaluation_overlaps,
    overfits,
    rewards_saturated,
    kl_at_zero,
    most_tokens_clipped,
    unclamped_extreme,
    length_drifts,
    gradient_at_limit,
)


def findings(run: Run) -> list[Finding]:
    """All findings about a run, the likely cause first."""
    return [finding for find in FINDINGS if (finding := find(run)) is not None]


__all__ = ["FINDINGS", "Finding", "findings"]
