"""The online prompt filter: accuracy band, spread within a group, truncation."""

import math
import random
import statistics

import pytest
import torch
from slow_reference import NAN, random_batch, tensor

from trl_prime.prompt_filter import select_groups


def slow_select(outcomes, num_generations, low, high, truncated):
    keep = []
    for first in range(0, len(outcomes), num_generations):
        judged = [o for o in outcomes[first : first + num_generations] if not math.isnan(o)]
        good = bool(judged) and not any(truncated[first : first + num_generations])
        if good and (low, high) != (0.0, 1.0):
            mean = statistics.fmean(judged)
            in_band = low - 1e-9 <= mean <= high + 1e-9
            good = in_band and max(judged) > min(judged)
        keep.append(good)
    return keep


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("low, high", [(0.2, 0.8), (0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.75), (0.4, 0.6)])
def test_against_the_slow_reference(low, high, dtype):
    for seed in range(10):
        for k in (2, 3, 4, 5):
            outcomes = random_batch(seed, k, num_groups=12, num_tokens=1).outcomes
            rng = random.Random(seed)
            truncated = [rng.random() < 0.1 for _ in outcomes]
            keep = select_groups(
                tensor(outcomes, dtype), k, low=low, high=high, truncated=tensor(truncated, torch.bool)
            )
            assert keep.dtype == torch.bool
            assert keep.tolist() == slow_select(outcomes, k, low, high, truncated)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_ends_of_the_band_are_inclusive_and_rounding_does_not_matter(dtype):
    for right, kept in enumerate([False, True, True, True, True, False]):
        outcomes = tensor([1.0] * right + [0.0] * (5 - right), dtype)
        assert select_groups(outcomes, 5).tolist() == [kept]


def test_default_band_drops_what_is_outside_by_one_completion():
    groups = [[1.0] + [0.0] * 5, [1.0] * 5 + [0.0], [1.0, 1.0] + [0.0] * 4, [1.0] * 4 + [0.0] * 2]
    assert select_groups(tensor(groups).flatten(), 6).tolist() == [False, False, True, True]


def test_point_12_partial_credit_without_spread_is_dropped():
    outcomes = tensor([0.5, 0.5, 0.5, 0.5, 0.4, 0.6, 0.5, 0.5], torch.float32)
    assert select_groups(outcomes, 4).tolist() == [False, True]


def test_point_17_unjudged_completions_are_left_out_of_the_mean():
    # 1 of 2 judged is right; NaN as 0 would give 1 of 8, below the band
    outcomes = tensor([1.0, 0.0] + [NAN] * 6)
    assert select_groups(outcomes, 8).tolist() == [True]
    # all but one unjudged: nothing to compare; all unjudged: nothing at all, even where the filter is off
    assert select_groups(tensor([NAN, 1.0, NAN, NAN]), 2).tolist() == [False, False]
    assert select_groups(tensor([NAN, 1.0, NAN, NAN]), 2, low=0.0, high=1.0).tolist() == [True, False]


def test_point_11_a_truncated_completion_drops_its_whole_group_and_no_other():
    outcomes = tensor([0.0, 1.0] * 3)
    truncated = tensor([0, 0, 0, 1, 0, 0], torch.bool)
    for band in ({}, {"low": 0.0, "high": 1.0}):
        assert select_groups(outcomes, 2, truncated=truncated, **band).tolist() == [True, False, True]


def test_full_band_keeps_uniform_groups():
    assert select_groups(tensor([1.0, 1.0, 0.0, 0.0]), 2, low=0.0, high=1.0).tolist() == [True, True]


@pytest.mark.parametrize("low, high", [(0.8, 0.2), (0.5, 0.5)])
def test_point_5_an_empty_band_is_refused(low, high):
    with pytest.raises(ValueError, match="accuracy band"):
        select_groups(torch.zeros(4), 2, low=low, high=high)


def test_input_is_left_alone():
    outcomes = tensor([1.0, NAN, 0.0, 1.0])
    before = outcomes.clone()
    select_groups(outcomes, 2)
    assert torch.equal(outcomes.nan_to_num(7.0), before.nan_to_num(7.0))
