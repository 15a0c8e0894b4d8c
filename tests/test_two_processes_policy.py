"""GRPO and PPO over two real processes (gloo): the same optimizer steps as in one, with groups across the border."""

import functools
from pathlib import Path

import pytest
import torch
from launch import ENGINES, launch
from policy_runs import scored

SCRIPT = Path(__file__).with_name("two_processes_policy.py")
RUNS = [
    "grpo", "grpo, accumulated", "grpo, precomputed", "grpo, humanline", "grpo, lora",
    "ppo", "ppo, accumulated, two epochs", "ppo, three epochs", "ppo, lora", "ppo, reward model",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By engine, each launched when a test first asks for it."""

    @functools.cache
    def of(engine=None):
        out = tmp_path_factory.mktemp(engine or "one")
        scored(10).save_to_disk(out / "rows")
        return launch(SCRIPT, out, engine)

    return of


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(results, name, engine):
    one, two = results()[name], results(engine)[name]
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-6)
    assert len(one["logs"]) == len(two["logs"]) == 5
    assert "eval_loss" in one["logs"][-1]
    for alone, together in zip(one["logs"], two["logs"], strict=True):
        assert set(alone) == set(together)
        for metric, value in alone.items():
            assert together[metric] == pytest.approx(value, rel=1e-5, abs=5e-6), metric


def test_table_names_every_run_of_the_script():
    source = SCRIPT.read_text()
    assert all(f'"{name}": run(' in source for name in RUNS)
    assert source.count(": run(") == len(RUNS)
