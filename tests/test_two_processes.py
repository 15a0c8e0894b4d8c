"""One optimizer step over two real processes (gloo), under each engine, is the same step as in one process."""

import functools
from pathlib import Path

import pytest
import torch
from conftest import unpaired_rows
from launch import ENGINES, launch
from policy_runs import scored

SCRIPT = Path(__file__).with_name("every_engine.py")
RUNS = [
    "kto, accumulated", "kto, streamed", "kto, humanline", "kto, precomputed",
    "dpo, robust", "dpo, humanline, lora", "dpo, humanline, never resharded",
    "grpo, accumulated", "grpo, precomputed", "ppo, humanline, accumulated, two epochs", "ppo, reward model",
    "reward model",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By engine, each launched when a test first asks for it."""

    @functools.cache
    def launched(engine):
        out = tmp_path_factory.mktemp(engine or "one")
        unpaired_rows(24).save_to_disk(out / "rows")
        scored(10).save_to_disk(out / "scored rows")
        try:
            return launch(SCRIPT, out, engine)
        except AssertionError as error:  # kept, so that a launch that failed is not started again by each test
            return error

    def of(engine=None):
        ended = launched(engine)
        if isinstance(ended, AssertionError):
            raise ended
        return ended

    return of


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(results, name, engine):
    if (name, engine) == ("ppo, reward model", "zero3"):
        pytest.skip("refused: no engine gathers a reward model that ZeRO-3 has split")
    one, two = results()[name], results(engine)[name]
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-6)
    assert len(one["logs"]) == len(two["logs"]) >= 3
    for alone, together in zip(one["logs"], two["logs"], strict=True):
        assert set(alone) == set(together)
        assert "loss" in alone or "eval_loss" in alone
        for metric, value in alone.items():
            assert together[metric] == pytest.approx(value, rel=1e-5, abs=5e-6), metric  # float32 sums of 30 nats


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_under_an_engine_resumes_exactly(results, engine):
    run = results(engine)["resumed"]
    assert run["problem"] is None, run["files"]
    assert run["last"] == "checkpoint-4"
    assert torch.equal(run["resumed"], run["whole"])
    assert run["finished"][0] == 4
    assert torch.equal(run["finished"][1], run["whole"])


@pytest.mark.slow
def test_fsdp2_cannot_restore_an_optimizer_without_state(results):
    assert "Pass the folder as `model`" in results("fsdp2")["resumed"]["refused"]


@pytest.mark.slow
def test_ppo_under_fsdp2_resumes_with_its_value_head(results):
    whole, resumed = results("fsdp2")["resumed"]["ppo"]
    assert torch.equal(resumed, whole)


def test_table_names_every_run_of_the_scripts():
    source = "".join(SCRIPT.with_name(name).read_text() for name in ("two_processes.py", "two_processes_policy.py"))
    assert all(f'"{name}": run(' in source for name in RUNS)
    assert source.count(": run(") == len(RUNS)
