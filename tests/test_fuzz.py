"""Invalid rows, settings and arguments, one or two at a time: a finite run, or an error that names the cause."""

import re

import fuzz
import pytest

NORMAL = range(200)
TIER = range(200, 2200)
CHUNK = 20


def chunks(numbers):
    return [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]


def named(numbers):
    return f"{numbers[0]}-{numbers[-1]}"


def check(numbers):
    failures = []
    for number in numbers:
        case = fuzz.make_case(number)
        outcome = fuzz.run_case(case)
        if outcome.failed:
            failures.append(f"{fuzz.describe(case)}\n  {outcome.kind}: {outcome.cause}\n{outcome.detail}")
    assert not failures, "python tests/fuzz.py --case NUMBER runs one alone.\n" + "\n\n".join(failures)


@pytest.mark.parametrize("numbers", chunks(NORMAL), ids=named)
def test_ends_well(numbers):
    check(numbers)


def test_exceptions_are_rare():
    """Below one case in a hundred, even if all that have the change of an exception would fail."""
    cases = [fuzz.make_case(number) for number in (*NORMAL, *TIER)]
    patterns = [change for change, _ in fuzz.EXCEPTIONS]
    excepted = [
        case.number
        for case in cases
        if any(re.search(pattern, change.what) for change in case.changes for pattern in patterns)
    ]
    assert len(excepted) < len(cases) / 100


@pytest.mark.fuzz
@pytest.mark.parametrize("numbers", chunks(TIER), ids=named)
def test_ends_well_too(numbers):
    check(numbers)
