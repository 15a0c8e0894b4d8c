"""One optimizer step over two real processes (gloo), under each engine, is the same step as in one process."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import paired_rows, unpaired_rows
from launch import ENGINES, launch
from policy_runs import scored
from two_processes_sampling import N_PROMPTS, SAMPLING
from two_processes_storage import STORAGES

from halos_trl import toy
from halos_trl.data.prompts import unique_prompts
from halos_trl.sampling import TransformersSampler, samples

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


REFUSED = ("ppo, reward model", "zero3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "engine"), [(name, engine) for name in RUNS for engine in ENGINES if (name, engine) != REFUSED]
)
def test_two_processes_equal_one(results, name, engine):
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
def test_reward_model_that_zero3_has_partitioned_is_refused(results):
    assert "was partitioned by DeepSpeed ZeRO-3" in results("zero3")["refused"]


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


# -- references in other storages ----------------------------------------------------------------------------------


REFUSED_STORAGES = {
    ("fsdp2", "8bit"): r"under FSDP, which splits .*\(use 'bf16'\)",
    ("fsdp2", "4bit"): r"under FSDP, which splits .*\(use 'bf16'\)",
    ("fsdp2", "cpu"): "under FSDP, which splits .*`fsdp_offload_params`",
    **{("zero3", storage): "under DeepSpeed ZeRO-3.*launch with ZeRO-2" for storage in STORAGES},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("storage", STORAGES)
def test_stored_references_of_two_processes_are_those_of_one_or_refused(results, storage, engine):
    one, two = results()["stored"][storage], results(engine)["stored"][storage]
    if (engine, storage) in REFUSED_STORAGES:
        assert re.search(REFUSED_STORAGES[engine, storage], two)
        return
    # That the copy under humanline is the policy's, as stored, each process has checked.
    for first, second in ((one["start"], two["start"]), two["end"]):
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, two["start"][name]) for name, tensor in two["end"][0].items())
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-6)


# -- runs that sample ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["humanline", "humanline, lora"])
def test_online_grpo_under_humanline(results, engine, name):
    """The processes sample different completions, and hold the same policy and reference; resumed bit for bit."""
    run = results(engine)["online"][name]
    for part in ("weights", "reference"):
        first, second = run[part]
        assert len(first) and torch.equal(first, second), part
        assert torch.equal(run["resumed"][part][0], first), part
        torch.testing.assert_close(first, results("ddp")["online"][name][part][0], rtol=0, atol=1e-6)
    # Equal in the first step, so no token counts; then one step apart.
    assert run["unclamped"][0] == 0 and all(0 < share < 1 for share in run["unclamped"][1:])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_online_grpo_without_humanline_is_trls(results, engine):
    runs = results(engine)["online"]
    assert torch.equal(runs["plain"]["weights"][0], runs["trl"]["weights"][0])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_online_grpo_under_humanline_is_refused_under_deepspeed(results, engine):
    assert "Launch with DDP or FSDP2" in results(engine)["online"]["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["full", "lora"])
def test_generations_during_evaluation(results, engine, name):
    """Each engine draws what DDP draws, every process gets the metrics, and the run ends as in one process."""
    one, two, ddp = (results(which)["generated"][name] for which in (None, engine, "ddp"))
    assert two["lines"] == ddp["lines"]
    assert [line["step"] for line in two["lines"]] == [step for step in (0, 1, 2) for _ in range(N_PROMPTS)]
    assert {line["finish_reason"] for line in two["lines"]} == {"stop", "length"}, "processes are done at other times"
    assert two["evaluated"][0] == two["evaluated"][1] == ddp["evaluated"][0]
    assert [len(metrics) for metrics in two["evaluated"][0]] == [3, 3]
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_generations_are_those_of_a_sampler_in_each_process(results):
    """Process p draws for every second prompt from p on, with its own seed; the one with fewer repeats the last."""
    tokenizer = toy.build_tokenizer()
    prompts = unique_prompts(paired_rows(8, seed=1).select_columns("prompt"), "test")[:N_PROMPTS]
    drawn = []
    for seed, mine in enumerate((prompts[::2], [*prompts[1::2], prompts[-1]])):
        sampler = TransformersSampler(toy.tiny_model(tokenizer), tokenizer, replace(SAMPLING, seed=seed))
        drawn.append([completion.text for (completion,) in samples(sampler, mine)])
    expected = [drawn[i % 2][i // 2] for i in range(N_PROMPTS)]
    lines = results("ddp")["generated"]["full"]["lines"]
    assert [line["completion"] for line in lines[:N_PROMPTS]] == expected
    assert lines[2 * N_PROMPTS :] != [line | {"step": 2} for line in lines[:N_PROMPTS]], "the policy has moved"


def test_table_names_every_run_of_the_scripts():
    source = "".join(SCRIPT.with_name(name).read_text() for name in ("two_processes.py", "two_processes_policy.py"))
    names = [name for name in RUNS if name != "reward model"]  # a cell of the engine matrix
    assert all(f'"{name}": run(' in source for name in names)
    assert source.count(": run(") == len(names)
