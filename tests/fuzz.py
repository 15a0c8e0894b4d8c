"""Runs cases of the fuzz suite and classifies their outcomes.

python tests/fuzz.py --case 1234          # the inputs of one case and what happened
python tests/fuzz.py --cases 0:2000       # outcomes by cause
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: F401  (environment variables, threads)
import fuzz_rows
import torch
import transformers
from fuzz_cases import Case, make_case
from fuzz_objects import UsersOwnError, llama, plain_tokenizer
from fuzz_rows import shown

import halos_trl

PACKAGE = str(Path(halos_trl.__file__).parent)
SECONDS = 60
"""Seconds after which a case counts as hanging."""
MOST_STEPS = 4

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("dataset: interleaved streams", "ArrowInvalid"): "`datasets` cannot read a joined stream of values of two types",
    ("data_collator: transformers' default", "data_collator.py"): "what a collator of the user's choice raises passes",
    ("model: a hub id that nobody has", "OSError"): "transformers' message of a model that cannot be loaded",
}
"""Accepted failures: (a pattern of the change, a pattern of the failure) -> the reason."""

REMEDY = re.compile(
    r"\b(Add|Apply|Ask|Build|Call|Check|Choose|Convert|Create|Cut|Disable|Drop|Expected|Fill|Fix|Give|"
    r"Install|Keep|Leave|Let|Load|Look|Lower|Make|Mend|Move|Name|Needs|Omit|Pass|Point|Provide|Put|Raise|Free|"
    r"Read|Remove|Rename|Replace|Rescale|Resize|Return|Sample|Save|Score|Set|Shorten|Split|Start|Switch|"
    r"Take|Train|Turn|Unexpected keyword argument|Unfreeze|Use|Wrap|Write)\b",
    re.IGNORECASE,
)


class Outcome(NamedTuple):
    """How a case ended."""

    kind: str
    """`trained`, `refused`, or the kind of failure."""
    cause: str
    detail: str

    @property
    def failed(self) -> bool:
        return self.kind not in ("trained", "refused", "excepted")


class Hangs(BaseException):
    """Raised by the alarm; not caught accidentally."""


class _Stop(transformers.TrainerCallback):
    """Ends a run of a billion steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= MOST_STEPS


def run_case(case: Case) -> Outcome:
    """Run it in a folder of its own, and judge."""
    home, folder = os.getcwd(), tempfile.mkdtemp(prefix="fuzz-")
    os.chdir(folder)
    try:
        with _alarm(SECONDS), _quiet():
            problem = _run(case)
    except Exception as error:
        return _excepted(case, judge(case, error))
    except Hangs:
        return _excepted(case, Outcome("hangs", f"longer than {SECONDS} s", traceback.format_exc()))
    finally:
        os.chdir(home)
        shutil.rmtree(folder, ignore_errors=True)
        transformers.set_seed(0)
    if problem is not None:
        return _excepted(case, problem)
    senseless = next((change for change in case.changes if not change.trains), None)
    if senseless is None or (case.leaves_rows_out and senseless.what.startswith("`")):
        return Outcome("trained", "", "")
    return _excepted(case, Outcome("misread", senseless.what.split(" of ")[0], "trained on what has no meaning"))


def _run(case: Case) -> Outcome | None:
    """The problem of a run; None if it is finite."""
    torch.manual_seed(case.number)
    dataset = (case.dataset or fuzz_rows.as_dataset)(case.rows)
    arguments: dict[str, Any] = {
        "model": (case.model or (lambda: llama(case)))(),
        "processing_class": (case.tokenizer or plain_tokenizer)(),
        "train_dataset": dataset,
    }
    if case.evaluates:
        arguments["eval_dataset"] = fuzz_rows.as_dataset(case.rows)
    made = {name: make(case) for name, make in case.arguments.items()}
    if "args" not in made:
        made["args"] = getattr(halos_trl, f"{case.trainer}Config")(**{"output_dir": "out", **case.settings})
    trainer = getattr(halos_trl, f"{case.trainer}Trainer")(**(arguments | made))
    trainer.add_callback(_Stop())
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train(**case.train_arguments)
    if case.evaluates:
        trainer.evaluate()
    return _look_at(case, trainer, before)


def _look_at(case: Case, trainer: Any, before: dict[str, torch.Tensor]) -> Outcome | None:
    for line in trainer.state.log_history:
        for name, value in line.items():
            if isinstance(value, float) and value - value != 0 and not name.endswith("nan"):
                return Outcome("not finite", f"logged {name}", f"{name}={value} in {line}")
    after = dict(trainer.model.named_parameters())
    for name, parameter in after.items():
        if not torch.isfinite(parameter).all() and torch.isfinite(before.get(name, torch.zeros(()))).all():
            return Outcome("not finite", "weights", name)
    if all(change.learns for change in case.changes):
        if trainer.state.global_step == 0:
            return Outcome("stands still", "no step", "")
        if all(torch.equal(before[name], after[name]) for name in before if name in after):
            return Outcome("stands still", "no weight moved", "")
    return None


def judge(case: Case, error: Exception) -> Outcome:
    """Whether an error is raised by this package, or is a good enough one of TRL's, and names the row or argument."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    message = str(error)
    detail = "".join(traceback.format_exception(error))
    where = f"{'/'.join(Path(last.filename).parts[-2:])}:{last.name}"
    names = [name for change in case.changes for name in change.names]
    named = any(re.search(name, message, re.S) for name in names)
    if isinstance(error, UsersOwnError):
        return Outcome("refused", "by the user's own function", "")
    if not isinstance(error, ValueError | TypeError):
        return Outcome("raw", f"{type(error).__name__} in {where}", detail)
    if last.filename.startswith(PACKAGE):
        if not named:
            return Outcome("names nothing", f"{where}: {message[:60]}", detail)
        if not REMEDY.search(message):
            return Outcome("no remedy", f"{where}: {message[:60]}", detail)
        return Outcome("refused", where, message)
    if named and any(change.hosts_speak for change in case.changes):
        return Outcome("refused", f"by a host: {where}", message)
    return Outcome("raw", f"{type(error).__name__} in {where}", detail)


def _excepted(case: Case, outcome: Outcome) -> Outcome:
    if not outcome.failed:
        return outcome
    for (change, failure), reason in EXCEPTIONS.items():
        if any(re.search(change, each.what) for each in case.changes) and re.search(failure, " ".join(outcome)):
            return outcome._replace(kind="excepted", cause=reason)
    return outcome


@contextlib.contextmanager
def _alarm(seconds: int) -> Any:
    def ring(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def freeze() -> None:
    """Exempt loaded objects from garbage collection, which TRL runs twice per training run."""
    gc.collect()
    gc.freeze()


# -- the command ---------------------------------------------------------------------------------------------------


def describe(case: Case) -> str:
    lines = [f"case {case.number}: {case.trainer}Trainer, rows of the form {case.form!r}"]
    lines += [f"  change: {change.what}" for change in case.changes]
    lines += [f"  row {i}: {shown_row(row)}" for i, row in enumerate(case.rows)]
    lines.append(f"  settings: {case.settings}")
    return "\n".join([*lines, f"  evaluates: {case.evaluates}"])


def shown_row(row: Any) -> str:
    return "{" + ", ".join(f"{name!r}: {shown(value)}" for name, value in row.items()) + "}"


def outcome_of(number: int) -> tuple[int, Outcome, list[str], float]:
    start = time.perf_counter()
    case = make_case(number)
    outcome = run_case(case)
    return number, outcome, [change.what for change in case.changes], time.perf_counter() - start


def report(results: list[tuple[int, Outcome, list[str], float]]) -> None:
    print("| outcome | cause | cases | for example |\n|---|---|---|---|")
    kinds = Counter(outcome.kind for _, outcome, _, _ in results)
    for kind, count in kinds.most_common():
        print(f"| **{kind}** | | {count} | |")
        causes: dict[str, list[int]] = {}
        for number, outcome, _, _ in results:
            if outcome.kind == kind:
                causes.setdefault(outcome.cause, []).append(number)
        for cause, numbers in sorted(causes.items(), key=lambda item: -len(item[1])):
            if cause:
                print(f"| | {cause} | {len(numbers)} | {', '.join(map(str, numbers[:4]))} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--case", type=int, help="one case: print its inputs and what happened")
    group.add_argument("--cases", help="a range, e.g. 0:2000: print a table of outcomes")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run them")
    parser.add_argument("--failures", action="store_true", help="print each failure when it happens")
    options = parser.parse_args()
    if options.case is not None:
        case = make_case(options.case)
        print(describe(case))
        outcome = run_case(case)
        print(f"\n{outcome.kind}: {outcome.cause}\n{outcome.detail}")
        return int(outcome.failed)
    start = time.perf_counter()
    numbers = range(*map(int, options.cases.split(":")))
    freeze()
    results = []
    with contextlib.ExitStack() as stack:
        if options.jobs > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.jobs, freeze))
            outcomes = pool.imap(outcome_of, numbers, chunksize=25)
        else:
            outcomes = map(outcome_of, numbers)
        for result in outcomes:
            results.append(result)
            number, outcome, changes, _ = result
            if options.failures and outcome.failed:
                last = outcome.detail.strip().splitlines()[-1:] or [""]
                print(f"{number} {changes} {outcome.kind}: {outcome.cause}: {last[0][:300]}", flush=True)
    report(results)
    failed = [result for result in results if result[1].failed]
    slowest = max(results, key=lambda result: result[3])
    print(
        f"\n{len(results)} cases, {len(failed)} failures, {time.perf_counter() - start:.0f} s; "
        f"the slowest is {slowest[0]} with {slowest[3]:.1f} s"
    )
    return int(bool(failed))


__all__ = ["EXCEPTIONS", "Outcome", "describe", "freeze", "make_case", "run_case"]

if __name__ == "__main__":
    sys.exit(main())
