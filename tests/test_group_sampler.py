"""The group sampler: each example once, groups whole, equal steps on all processes; and formats of grouped rows."""

import datasets
import pytest
import torch
from conftest import assistant, user
from hypothesis import given, settings
from hypothesis import strategies as st

from halos_trl.advantages import group_advantages
from halos_trl.data.group_sampler import FILLER, GroupBatchSampler, StepRows, pack
from halos_trl.data.groups import group_numbers, prompt_key, scored_rows, with_advantages

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=30)


def grouped(sizes):
    return [group for group, size in enumerate(sizes) for _ in range(size)]


def steps_of(samplers, micro_batches):
    """What the processes do together in each optimizer step: `[step][process][micro-batch]`."""
    shares = [list(sampler) for sampler in samplers]
    assert len({len(share) for share in shares}) == 1, "every process has to run the same number of micro-batches"
    return [[share[i : i + micro_batches] for share in shares] for i in range(0, len(shares[0]), micro_batches)]


def examples_of(step):
    return sorted(i for share in step for batch in share for i in batch if i != FILLER)


@given(SIZES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_every_example_once_groups_whole_processes_in_step(sizes, size, micro_batches, processes, shuffle, epoch):
    groups = grouped(sizes)
    samplers = [
        GroupBatchSampler(
            groups,
            micro_batch_size=size,
            micro_batches=micro_batches,
            num_processes=processes,
            process_index=process,
            shuffle=shuffle,
            seed=7,
        )
        for process in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
    steps = steps_of(samplers, micro_batches)
    assert sorted(i for step in steps for i in examples_of(step)) == list(range(len(groups)))
    capacity = size * micro_batches * processes
    for step in steps:
        assert all(0 < len(batch) <= size for share in step for batch in share)
        assert 0 < len(examples_of(step)) <= capacity
    for group, group_size in enumerate(sizes):
        holding = [step for step in steps if any(groups[i] == group for i in examples_of(step))]
        assert len(holding) == -(-group_size // capacity)
    assert samplers[0].oversized == sum(s > capacity for s in sizes)


@given(SIZES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_example_k_of_a_step_goes_to_process_k_mod_p(sizes, size, micro_batches, processes, epoch):
    """As HALOs deals them. One process with room for the whole step shows the step in its order."""

    def epoch_of(micro_batch_size, **split):
        sampler = GroupBatchSampler(grouped(sizes), micro_batch_size=micro_batch_size, seed=7, **split)
        sampler.set_epoch(epoch)
        return list(sampler)

    steps = epoch_of(size * micro_batches * processes)
    split = {"micro_batches": micro_batches, "num_processes": processes}
    for process in range(processes):
        share = epoch_of(size, process_index=process, **split)
        assert len(share) == len(steps) * micro_batches
        for k, step in enumerate(steps):
            batches = share[k * micro_batches : (k + 1) * micro_batches]
            assert [i for batch in batches for i in batch if i != FILLER] == step[process::processes]
            lengths = [sum(i != FILLER for i in batch) for batch in batches]
            assert max(lengths) - min(lengths) <= 1, "a process spreads its examples evenly"


@given(SIZES)
@settings(max_examples=50, deadline=None)
def test_packing_closes_a_step_only_when_nothing_fits(sizes):
    steps = pack(sizes, 7)
    assert sorted(i for step in steps for i in step) == list(range(len(sizes)))
    fills = sorted(sum(sizes[i] for i in step) for step in steps)
    assert fills[-1] <= 7
    assert len(fills) < 2 or fills[0] + fills[1] > 7 or min(sizes) > 7 - fills[0]


def test_shuffle_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = GroupBatchSampler(grouped([3, 5, 2, 4] * 6), micro_batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert len({len(order(0, epoch)) for epoch in range(5)}) == 1, "the schedule counts on equal epochs"


def test_in_order_without_shuffle_and_repeated_for_ppo():
    sampler = GroupBatchSampler(grouped([2] * 4), micro_batch_size=2, micro_batches=2, shuffle=False, repeats=2)
    assert list(sampler) == [[0, 1], [2, 3]] * 2 + [[4, 5], [6, 7]] * 2
    assert len(sampler) == 8


def test_examples_are_dealt_one_by_one_over_processes():
    """As HALOs deals them: example k of a step to process k mod 2. Each spreads its own over two micro-batches."""
    shares = [
        list(
            GroupBatchSampler(
                grouped([5]), micro_batch_size=2, micro_batches=2, num_processes=2, process_index=p, shuffle=False
            )
        )
        for p in (0, 1)
    ]
    assert shares == [[[0], [2, 4]], [[1], [3]]]
    lonely = GroupBatchSampler(grouped([1]), micro_batch_size=1, micro_batches=3)
    assert sorted(map(tuple, lonely)) == [(FILLER,), (FILLER,), (0,)]


def test_filler_row_has_no_completion():
    rows = StepRows(datasets.Dataset.from_dict({"prompt_ids": [[1, 2]], "completion_ids": [[3]], "score": [0.5]}))
    assert rows[FILLER]["completion_ids"] == []
    assert rows[FILLER]["prompt_ids"] == [1, 2, 3]
    assert rows[0]["completion_ids"] == [3]


# -- rows ----------------------------------------------------------------------------------------------------------


def plain(*rows):
    return datasets.Dataset.from_list(list(rows))


def test_forms_of_rows_give_the_same_groups():
    flat = plain(
        {"prompt": "a", "completion": "x", "score": 0.0},
        {"prompt": "b", "completion": "y", "score": 1.0},
        {"prompt": "a", "completion": "z", "score": 2.0},
    )
    lists = plain(
        {"prompt": "a", "completions": ["x", "z"], "scores": [0.0, 2.0]},
        {"prompt": "b", "completions": ["y"], "scores": [1.0]},
    )
    assert scored_rows(flat, "train")["prompt_group"] == [0, 1, 0]
    unfolded = scored_rows(lists, "train")
    assert list(unfolded["completion"]) == ["x", "z", "y"]
    assert list(unfolded["score"]) == [0.0, 2.0, 1.0]
    assert list(unfolded["prompt_group"]) == [0, 0, 1]
    assert list(unfolded["label"]) == [False, True, True]


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_formatted_datasets_give_the_same_rows(form):
    forms = [
        plain(GOOD, GOOD | {"prompt": "b", "score": 2.5}),
        plain({"prompt": "a", "completions": ["x", "z"], "scores": [0.25, 2.0]}),
        plain({"prompt": "a", "completion": "x", "label": True}, {"prompt": "a", "completion": "y", "label": False}),
        plain({"prompt": user("a"), "chosen": assistant("x"), "rejected": assistant("y")}),
    ]
    for rows in forms:
        assert scored_rows(rows.with_format(form), "train").to_list() == scored_rows(rows, "train").to_list()


def test_labels_and_pairs_count_as_plus_and_minus_one():
    labelled = plain(
        {"prompt": "a", "completion": "x", "label": True}, {"prompt": "a", "completion": "y", "label": False}
    )
    assert list(scored_rows(labelled, "train")["score"]) == [1.0, -1.0]
    explicit = plain({"prompt": "a", "chosen": "x", "rejected": "y"})
    implicit = plain({"chosen": [*user("a"), *assistant("x")], "rejected": [*user("a"), *assistant("y")]})
    for pairs in (explicit, implicit):
        rows = scored_rows(pairs, "train")
        assert list(rows["score"]) == [1.0, -1.0]
        assert list(rows["prompt_group"]) == [0, 0]


def test_groups_are_equal_prompts():
    assert group_numbers(plain({"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}), "train") == [0, 1, 0]
    joined = [
        [{"role": "user", "content": "ab"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "system", "content": "ab"}],
        "ab",
    ]
    assert len({prompt_key({"prompt": prompt}) for prompt in joined}) == 4


def test_advantages_are_over_the_whole_group():
    rows = scored_rows(
        plain(
            *({"prompt": p, "completion": "x", "score": s} for p, s in zip("abab", (0.0, 5.0, 1.0, 5.0), strict=True))
        ),
        "train",
    )
    # Group a: mean 1/2, population deviation 1/2. Group b: equal scores.
    expected = [-0.5 / 0.51, 0.0, 0.5 / 0.51, 0.0]
    assert list(with_advantages(rows, "train", scale_by_std=True)["advantage"]) == pytest.approx(expected, abs=1e-12)
    unscaled = with_advantages(rows, "train", scale_by_std=False)["advantage"]
    assert list(unscaled) == pytest.approx([-0.5, 0.0, 0.5, 0.0])
    assert torch.equal(group_advantages(torch.tensor(rows["score"]), rows["prompt_group"])[1:2], torch.zeros(1))


GOOD = {"prompt": "a", "completion": "x", "score": 1.0}
BAD_ROWS = {
    "NaN score": ([GOOD, GOOD | {"score": float("nan")}], r"Row 1 of the train dataset .*score nan"),
    "missing score": ([GOOD, GOOD | {"score": None}], r"Row 1 .*score None"),
    "no score": ([{"prompt": "a", "completion": "x"}], r"neither `score` .* nor `label`.*reward_model"),
    "label of numbers": ([{"prompt": "a", "completion": "x", "label": 0.5}], r"Row 0 .*label 0.5.*rename"),
    "empty completion": ([GOOD, GOOD | {"completion": ""}], r"Row 1 .*empty `completion`"),
    "lists of two lengths": (
        [{"prompt": "a", "completions": ["x", "y"], "scores": [1.0]}],
        r"Row 0 .*2 completions but 1 scores",
    ),
    "empty list": ([{"prompt": "a", "completions": [], "scores": []}], r"Row 0 .*empty list of `completions`"),
    "empty in list": (
        [{"prompt": "a", "completions": ["x", ""], "scores": [0.0, 1.0]}],
        r"Row 0 .*empty `completions`",
    ),
    "NaN in list": (
        [{"prompt": p, "completions": ["x", "y"], "scores": [1.0, s]} for p, s in (("a", 0.0), ("b", float("nan")))],
        r"Row 1 of the train dataset .*score nan",
    ),
    "single score beside a list": (
        [{"prompt": "a", "completions": ["x", "y"], "score": 1.0}],
        r"columns \['completions', 'prompt', 'score'\].*`completions` requires a list of `scores`",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused(case):
    rows, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message):
        scored_rows(plain(*rows), "train")


def test_turn_that_ended_at_once_is_a_completion():
    row = {"prompt": user("a"), "completion": assistant(""), "score": 0.0}
    assert scored_rows(plain(row, row), "train")["prompt_group"] == [0, 0]


def test_streams_are_refused():
    with pytest.raises(ValueError, match="do not stream"):
        scored_rows(plain(GOOD).to_iterable_dataset(), "train")
