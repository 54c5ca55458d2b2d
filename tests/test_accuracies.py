"""Accuracies of the implicit PRM: pairwise, absolute, and in groups of any size."""

import itertools
import math
import random
import statistics

import pytest
import torch
from slow_reference import NAN, groups_of, random_batch, slow_ragged_pairwise, tensor

from trl_prime.implicit_prm.accuracies import absolute_accuracy, pad_groups, pairwise_accuracy

BATCHES = [(seed, k) for seed in range(8) for k in (2, 3, 4, 5)]


def slow_pairwise(scores, labels, k):
    wins = []
    for group, marks in zip(groups_of(scores, k)[::k], groups_of(labels, k)[::k], strict=True):
        for i, j in itertools.permutations(range(k), 2):
            if marks[i] > marks[j] and not math.isnan(group[i] - group[j]):
                wins.append(0.5 if group[i] == group[j] else float(group[i] > group[j]))
    return statistics.fmean(wins) if wins else NAN


def slow_absolute(scores, labels):
    hits = [
        0.5 if score == 0 else float((score > 0) == (label > 0.5))
        for score, label in zip(scores, labels, strict=True)
        if not math.isnan(label) and not math.isnan(score)
    ]
    return statistics.fmean(hits) if hits else NAN


def test_accuracies_against_the_slow_reference():
    for (seed, k), dtype in itertools.product(BATCHES, (torch.float64, torch.float32, torch.bfloat16)):
        labels, rng = random_batch(seed, k).outcomes, random.Random(seed)
        scores = [rng.choice([0.0, -1.0, 1.0, 0.5, 2.0, NAN]) for _ in labels]
        given = tensor(scores, dtype), tensor(labels, dtype)
        assert pairwise_accuracy(*given, k) == pytest.approx(slow_pairwise(scores, labels, k), nan_ok=True)
        assert absolute_accuracy(*given) == pytest.approx(slow_absolute(scores, labels), nan_ok=True)


@pytest.mark.parametrize("k", [2, 4])
def test_point_13_ties_count_one_half_whatever_the_order(k):
    for labels in ([1.0, 0.0] * 2, [0.0, 1.0] * 2):
        assert pairwise_accuracy(torch.zeros(4), torch.tensor(labels), k) == 0.5
        assert absolute_accuracy(torch.zeros(4), torch.tensor(labels)) == 0.5


def test_rounding_between_equal_models_ranks_nothing():
    labels, rounding = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([1e-6, -2e-6, -3e-6, 4e-6])
    assert pairwise_accuracy(rounding, labels, 4) == absolute_accuracy(rounding, labels) == 0.5
    # A score that a model has learnt, little as it may be, is told from rounding
    learnt = torch.tensor([1e-4, -2e-4, 4e-4, -3e-4])
    assert pairwise_accuracy(learnt, labels, 4) == absolute_accuracy(learnt, labels) == 1.0


def test_point_13_uniform_groups_are_left_out():
    scores, labels = torch.tensor([3.0, 1.0, 5.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert pairwise_accuracy(scores, labels, 2) == 1.0
    assert math.isnan(pairwise_accuracy(scores, torch.ones(4), 2))


def test_pairs_are_within_a_group_and_weigh_the_same():
    # 3 pairs in the first group, all lost; 1 pair in the second (a NaN and a tie in labels), won
    scores, labels = tensor([0.0, 1.0, 2.0, 3.0, 8.0, 7.0, 9.0, 9.0]), tensor([1.0, 0, 0, 0, 1, 0, NAN, NAN])
    assert pairwise_accuracy(scores, labels, 4) == 0.25


def test_accuracies_of_nothing_judged_are_nan():
    assert math.isnan(pairwise_accuracy(torch.zeros(2), torch.full((2,), NAN), 2))
    assert math.isnan(absolute_accuracy(torch.zeros(2), torch.full((2,), NAN)))


def test_absolute_accuracy_example():
    assert absolute_accuracy(tensor([2.0, -1.0, 0.5, -3.0]), tensor([1.0, 1.0, 0.0, 0.0])) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairwise_accuracy_in_ragged_groups_against_the_slow_reference(dtype):
    for seed in range(20):
        rng = random.Random(seed)
        groups = [rng.choice([7, -2, 900, 4]) for _ in range(rng.randint(1, 25))]
        scores = [rng.choice([-1.0, 0.5, rng.gauss(0, 1)]) for _ in groups]
        labels = [rng.choice([0.0, 1.0, 1.0, NAN]) for _ in groups]
        ids = torch.tensor(groups)
        padded = [pad_groups(tensor(values, dtype), ids) for values in (scores, labels)]
        assert padded[0].shape == (len(set(groups)), max(groups.count(group) for group in groups))
        accuracy = pairwise_accuracy(*(values.flatten() for values in padded), padded[0].shape[1])
        assert accuracy == pytest.approx(slow_ragged_pairwise(scores, labels, groups), nan_ok=True)


def test_padded_groups_keep_their_rows_in_order():
    padded = pad_groups(tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5, 3, 5, 5]))
    assert torch.equal(padded.nan_to_num(-1), tensor([[2.0, -1.0, -1.0], [1.0, 3.0, 4.0]]))
    assert pad_groups(torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0, 1)
