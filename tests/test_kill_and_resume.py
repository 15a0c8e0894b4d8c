"""Three random kill points; `python tests/kill_and_resume.py --points 12` takes many more."""

import random

import kill_and_resume
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("method", "adapter"), [("dpo", "full"), ("kto", "full"), ("kto", "lora")])
def test_killed_run_resumes_bit_for_bit(tmp_path, method, adapter):
    expected = kill_and_resume.uninterrupted(method, adapter, tmp_path / "whole")
    event, step = kill_and_resume.kill_point(random.Random(f"{method} {adapter}"))
    resumed = kill_and_resume.killed_and_resumed(method, adapter, tmp_path / "killed", event, step)
    assert kill_and_resume.equal(expected, resumed), f"killed {event} of step {step}"
