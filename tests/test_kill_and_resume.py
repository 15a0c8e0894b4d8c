"""Three random kill points; `python tests/kill_and_resume.py --points 12` runs more."""

import random

import kill_and_resume
import pytest

# With this seed one is in the middle of an accumulation, one within a checkpoint, one between gradient and update.
RNG = random.Random(178)
POINTS = [(*run, *kill_and_resume.kill_point(RNG)) for run in [("dpo", "lora"), ("kto", "full"), ("kto", "lora")]]


def test_points_lie_where_nothing_is_complete():
    events = [event for *_, event, _ in POINTS]
    assert "on_substep_end" in events
    assert set(events) & set(kill_and_resume.WHILE_SAVING)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "adapter", "event", "step"), POINTS)
def test_killed_run_resumes_bit_for_bit(tmp_path, method, adapter, event, step):
    expected = kill_and_resume.uninterrupted(method, adapter, tmp_path / "whole")
    resumed = kill_and_resume.killed_and_resumed(method, adapter, tmp_path / "killed", event, step)
    assert kill_and_resume.equal(expected, resumed)
