"""From scores to labels and preferences: HALOs' recorded output, and intended differences from it."""

import json
import math
from pathlib import Path

import pytest

from halos_trl.data.labelling import binary_labels, binary_threshold, group_positions, preferences

GOLDEN = json.loads((Path(__file__).parent / "data" / "halos" / "label.json").read_text())


def sample_set(name):
    """(keys, scores, groups) of a recorded set; a key is "<prompt id>.<sample id>"."""
    samples = GOLDEN["sample_sets"][name]
    keys = [f"{sample['prompt_id']}.{sample['sample_id']}" for sample in samples]
    return keys, [sample["reward"] for sample in samples], [sample["prompt_id"] for sample in samples]


def case_id(case):
    return "-".join(str(case[key]) for key in ("sample_set", "mode", "threshold", "seed") if key in case)


# -- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in GOLDEN["binary"] if "labels" in c], ids=case_id)
def test_labels_are_those_of_halos_at_its_effective_threshold(case):
    keys, scores, _ = sample_set(case["sample_set"])
    symbolic = case["threshold"] in ("mean", "median")
    threshold = case["threshold"] if symbolic else case["effective_threshold"]
    assert binary_threshold(scores, threshold) == pytest.approx(case["effective_threshold"], rel=1e-12)
    assert dict(zip(keys, binary_labels(scores, threshold), strict=True)) == case["labels"]
    assert keys == case["order"]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.9, [False, False, True, True]),  # HALOs truncates to 0
        ("0.9", [False, False, True, True]),  # HALOs raises
        (-0.9, [False, True, True, True]),  # HALOs truncates to 0
        (1, [False, False, False, True]),
        ("mean", [False, True, True, True]),  # (-2 + 0.25 + 0.9 + 1) / 4 = 0.0375
        ("median", [False, False, True, True]),  # (0.25 + 0.9) / 2 = 0.575
    ],
)
def test_numeric_thresholds_are_used_as_given(threshold, expected):
    assert binary_labels([-2.0, 0.25, 0.9, 1], threshold) == expected


@pytest.mark.parametrize("threshold", ["medain", "", None, True, "nan", math.inf])
def test_unknown_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match=f"The threshold is {threshold!r}; expected `mean`, `median` or a number"):
        binary_labels([0.0, 1.0], threshold)


@pytest.mark.parametrize("score", [None, "0.5", True, math.nan, -math.inf, 1e13, 10**400])
def test_scores_that_are_not_finite_numbers_are_refused_by_position(score):
    with pytest.raises(ValueError, match="Score 1 of 2: "):
        binary_labels([0.0, score])
    with pytest.raises(ValueError, match="Score 1 of 2: "):
        preferences([0.0, score], [0, 0])


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="no scores"):
        binary_labels([])
    with pytest.raises(ValueError, match="no scores"):
        preferences([], [])


# -- preferences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in GOLDEN["pairwise"] if "quirk" not in c], ids=case_id)
def test_preferences_and_their_order_are_those_of_halos(case):
    keys, scores, groups = sample_set(case["sample_set"])
    found = preferences(scores, groups, case["mode"], case["threshold"], case["seed"])
    assert [
        {
            "prompt_id": groups[pair.a],
            "pair": sorted([keys[pair.a], keys[pair.b]]),
            "preferred": keys[pair.chosen],
            "reward_difference": pair.difference,
            "A_with_this_seed": keys[pair.a],
            "label_with_this_seed": pair.label,
        }
        for pair in found
    ] == case["items"]


def closest(scores):
    """The smallest positive difference of two scores of a group, by comparing all."""
    return min((abs(x - y) for x in scores for y in scores if x != y), default=None)


@pytest.mark.parametrize("case", [c for c in GOLDEN["pairwise"] if "quirk" in c], ids=case_id)
def test_no_sample_is_paired_with_itself_or_an_equal_one(case):
    """HALOs' mode `min` with a threshold of 0 pairs samples with themselves."""
    assert case["mode"] == "min" and case["threshold"] == 0
    _, scores, groups = sample_set(case["sample_set"])
    found = preferences(scores, groups, "min", 0, case["seed"])
    assert all(pair.a != pair.b and scores[pair.chosen] > scores[pair.rejected] for pair in found)
    by_group = {
        group: closest([score for score, other in zip(scores, groups, strict=True) if other == group])
        for group in groups
    }
    assert {groups[pair.a] for pair in found} == {group for group, smallest in by_group.items() if smallest}
    assert all(math.isclose(pair.difference, by_group[groups[pair.a]], abs_tol=1e-12) for pair in found)


@pytest.mark.parametrize("mode", ["random", "max", "min"])
@pytest.mark.parametrize("threshold", [0, 1e-13])
def test_ties_are_no_preference(mode, threshold):
    assert preferences([1.0, 1.0, 1.0], ["p", "p", "p"], mode, threshold) == []


def test_ranges_at_the_threshold_give_no_pair_and_single_samples_none():
    scores, groups = [0.0, 2.0, 5.0], ["p", "p", "q"]
    for mode in ("random", "max", "min"):
        assert preferences(scores, groups, mode, 2) == []
        (pair,) = preferences(scores, groups, mode, 1.5)
        assert (pair.chosen, pair.rejected, pair.difference) == (1, 0, 2.0)


def test_negative_thresholds_and_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="cannot be negative"):
        preferences([0.0, 1.0], [0, 0], threshold=-1)
    with pytest.raises(ValueError, match="'median'; expected a number"):
        preferences([0.0, 1.0], [0, 0], threshold="median")
    with pytest.raises(ValueError, match="'best'; expected one of random, max, min"):
        preferences([0.0, 1.0], [0, 0], mode="best")
    with pytest.raises(ValueError, match="2 scores and 1 groups"):
        preferences([0.0, 1.0], [0])


def test_the_order_of_a_pair_does_not_touch_the_global_generator():
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    preferences([0.0, 1.0], [0, 0], "random")
    assert random.random() == expected


def test_groups_keep_the_order_of_appearance():
    assert group_positions(["b", "a", "b", 3]) == [[0, 2], [1], [3]]
