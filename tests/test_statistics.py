"""Statistics of repeated sampling, against enumerating subsets, choosing by hand and counting pairs."""

import itertools
import math
import random
from collections import defaultdict

import numpy as np
import pytest
import torch

from trl_prime.evaluation.statistics import (
    aggregate_step_rewards,
    best_of_n,
    bootstrap_weights,
    draws,
    first_error_auc,
    group_answers,
    interval,
    mean_with_interval,
    pass_at_k,
    sizes_up_to,
    vote,
)


def brute_best(scores, correct, size):
    results = []
    for subset in itertools.combinations(range(len(scores)), size):
        best = max(scores[i] for i in subset)
        ties = [correct[i] for i in subset if scores[i] == best]
        results.append(sum(ties) / len(ties))
    return sum(results) / len(results)


def brute_vote(groups, correct, size, weights):
    results = []
    for subset in itertools.combinations(range(len(groups)), size):
        votes = defaultdict(float)
        for i in subset:
            if groups[i] >= 0:
                votes[groups[i]] += weights[i]
        winners = [group for group, total in votes.items() if abs(total - max(votes.values())) < 1e-9]
        verdicts = [next(c for g, c in zip(groups, correct, strict=True) if g == group) for group in winners]
        results.append(sum(verdicts) / len(verdicts) if verdicts else 0.0)
    return sum(results) / len(results)


@pytest.mark.parametrize("num_scores", [3, 1000])
def test_best_of_n_is_the_mean_over_all_subsets(num_scores):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, num_scores, (6, 7)).astype(float)  # with 3 values there are ties
    correct = rng.integers(0, 2, (6, 7)).astype(bool)
    for size in range(1, 8):
        expected = [brute_best(s, c, size) for s, c in zip(scores.tolist(), correct.tolist(), strict=True)]
        assert best_of_n(scores, correct, size) == pytest.approx(expected, abs=1e-12)


def test_best_of_n_of_one_is_random_of_a_perfect_score_is_the_ceiling():
    correct = np.random.default_rng(1).random((20, 64)) < 0.1
    num_correct = correct.sum(axis=1)
    noise = np.random.default_rng(2).random((20, 64))
    assert best_of_n(noise, correct, 1) == pytest.approx(correct.mean(axis=1))
    for size in (1, 8, 64):
        assert best_of_n(correct + noise / 2, correct, size) == pytest.approx(pass_at_k(64, num_correct, size))
    # Scores that are all equal tell nothing
    assert best_of_n(np.zeros((20, 64)), correct, 16) == pytest.approx(correct.mean(axis=1))
    with pytest.raises(ValueError, match="N is 65"):
        best_of_n(noise, correct, 65)


@pytest.mark.parametrize("weighted", [False, True])
def test_vote_is_the_mean_over_all_subsets(weighted):
    rng = np.random.default_rng(3)
    groups = rng.integers(-1, 4, (6, 7))
    verdicts = rng.integers(0, 2, (6, 4))
    correct = np.where(groups >= 0, np.take_along_axis(verdicts, np.maximum(groups, 0), 1), 0).astype(bool)
    weights = rng.random((6, 7)) if weighted else None
    for size in range(1, 8):
        expected = [
            brute_vote(groups[p].tolist(), correct[p].tolist(), size, weights[p] if weighted else [1.0] * 7)
            for p in range(6)
        ]
        assert vote(groups, correct, draws(7, size), weights) == pytest.approx(expected, abs=1e-12)


def test_a_problem_without_answers_is_wrong_and_equal_votes_share():
    groups = np.array([[-1, -1, -1, -1], [0, 0, 1, 1], [0, 1, 1, -1]])
    correct = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert vote(groups, correct, draws(4, 4)).tolist() == [0.0, 0.5, 0.0]
    weights = np.array([[1, 1, 1, 1], [1, 1, 1, 1.5], [3, 1, 1, 9.0]])
    assert vote(groups, correct, draws(4, 4), weights).tolist() == [0.0, 0.0, 1.0]
    # Weights that vanish are votes all the same
    assert vote(groups, correct, draws(4, 4), np.zeros((3, 4))).tolist() == [0.0, 0.5, 0.5]


def test_draws_are_all_subsets_or_seeded_random_ones():
    assert len({tuple(row) for row in draws(6, 3).tolist()}) == 20
    many = draws(64, 16, max_subsets=500)
    assert many.shape == (500, 64) and (many.sum(axis=1) == 16).all()
    assert (many == draws(64, 16, max_subsets=500)).all() and (many != draws(64, 16, max_subsets=500, seed=1)).any()
    assert many.mean(axis=0) == pytest.approx(np.full(64, 0.25), abs=0.08)


def test_random_draws_come_close_to_all_of_them():
    rng = np.random.default_rng(4)
    groups = rng.integers(0, 5, (30, 12))
    correct = groups == 0
    exact, sampled = (vote(groups, correct, draws(12, 6, max_subsets=limit)).mean() for limit in (924, 400))
    assert sampled == pytest.approx(exact, abs=0.02)


def test_aggregations_of_step_rewards():
    rewards = [1.0, -2.0, 0.5]
    scores = {how: aggregate_step_rewards(rewards, how) for how in ("sum", "min", "mean", "last")}
    assert scores == {"sum": -0.5, "min": -2.0, "mean": pytest.approx(-1 / 6), "last": 0.5}
    assert sizes_up_to(100) == [1, 2, 4, 8, 16, 32, 64] and sizes_up_to(12) == [1, 2, 4, 8] and sizes_up_to(0) == []


def test_answers_are_grouped_by_equality_and_no_pair_is_asked_twice():
    asked = []

    def equal(pairs):
        asked.extend(pairs)
        return [float(a) == float(b) for a, b in pairs]

    answers = [["1", "2.0", "2", "1", "2", "02", None, "3"], ["5", "5", None, None, "5.0", "7", "5", "7"]]
    groups = group_answers(answers, equal)
    # "1" and "2" come twice each, "1" first
    assert groups.tolist() == [[0, 1, 1, 0, 1, 1, -1, 2], [0, 0, -1, -1, 0, 1, 0, 1]]
    assert len(asked) == len(set(asked)) and ("2.0", "1") in asked and ("7", "5") in asked
    assert not any(a == b for a, b in asked)
    assert group_answers([[None, None]], equal).tolist() == [[-1, -1]]


def test_answers_are_grouped_by_the_math_verifier():
    from trl_prime.commands.evaluate import _equal_answers

    answers = [
        [r"\frac{1}{2}", "0.5", r"\frac{1}{2}", "1/2", "2", r"\frac12"],
        ["x+1", "1+x", "x-1", "x+1", None, "!"],
    ]
    groups = group_answers(answers, _equal_answers())
    assert groups.tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 1, 0, -1, 2]]


# --- pass@k and the bootstrap ---


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < c for i in range(n)]
        hits = [any(subset) for subset in itertools.combinations(right, k)]
        assert pass_at_k(n, np.array([c]), k)[0] == pytest.approx(sum(hits) / len(hits), abs=1e-15)


def test_pass_at_k_of_many_samples_does_not_overflow_and_numbers_of_samples_may_differ():
    n, c = np.array([10_000, 1000, 64]), np.array([1, 10, 64])
    expected = [
        float(1 - math.comb(a - b, 50) / math.comb(a, 50)) for a, b in zip(n.tolist(), c.tolist(), strict=True)
    ]
    assert pass_at_k(n, c, 50) == pytest.approx(expected, rel=1e-9)


def test_pass_at_k_refuses_what_it_cannot_tell():
    with pytest.raises(ValueError, match="k is 5"):
        pass_at_k(np.array([8, 4]), np.array([1, 1]), 5)
    with pytest.raises(ValueError, match="num_correct"):
        pass_at_k(4, np.array([5]), 1)


def test_bootstrap_interval_has_the_width_of_the_normal_approximation():
    values = (np.arange(400) < 120).astype(float)
    result = mean_with_interval(values, num_resamples=4000)
    error = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert result["value"] == 0.3
    assert result["low"] == pytest.approx(0.3 - error, abs=0.006)
    assert result["high"] == pytest.approx(0.3 + error, abs=0.006)
    assert result == mean_with_interval(values, num_resamples=4000), "the same seed gives the same interval"
    assert result != mean_with_interval(values, num_resamples=4000, seed=1)


def test_bootstrap_weights_draw_as_many_problems_as_there_are():
    weights = bootstrap_weights(7, num_resamples=50)
    assert weights.shape == (50, 7) and (weights.sum(axis=1) == 7).all() and weights.max() > 1


def test_interval_leaves_out_resamples_without_a_value():
    assert interval(np.array([np.nan, 1.0, 2.0, 3.0]), level=0.0) == (2.0, 2.0)
    assert all(math.isnan(end) for end in interval(np.array([np.nan])))
    assert math.isnan(mean_with_interval(np.array([]))["value"])


# --- The first wrong step ---


def slow_auc(step_rewards, step_labels):
    wins = pairs = 0.0
    right, wrong = [], []
    for rewards, labels in zip(step_rewards, step_labels, strict=True):
        for i in range(min(len(labels), len(rewards))):
            if all(labels[: i + 1]):
                right.append(rewards[i].item())
            elif all(labels[:i]):
                wrong.append(rewards[i].item())
    for r in right:
        for w in wrong:
            pairs += 1
            wins += 1.0 if r > w else 0.5 if r == w else 0.0
    return wins / pairs


def test_first_error_auc_agrees_with_counting_pairs():
    rng = random.Random(0)
    for _ in range(20):
        labels = [[rng.random() < 0.8 for _ in range(rng.randint(1, 6))] for _ in range(8)]
        rewards = [torch.tensor([float(rng.randint(-2, 2)) for _ in row]) for row in labels]
        if not any(False in row for row in labels):
            continue
        assert first_error_auc(rewards, labels) == pytest.approx(slow_auc(rewards, labels))


def test_first_error_auc_of_more_steps_than_could_be_paired_in_memory():
    # 100,000 right steps with rewards 0, 1, 2, ... and 100,000 wrong ones half a point below: 80 GB of pairs
    count = 100_000
    rewards = [torch.tensor([float(i), i - 0.5]) for i in range(count)]
    # The right step i beats the wrong steps 0 to i
    expected = sum(i + 1 for i in range(count)) / count**2
    assert first_error_auc(rewards, [[True, False]] * count) == pytest.approx(expected)


def test_first_error_auc_of_a_perfect_and_of_a_reversed_prm():
    labels = [[True, True, False, True], [True, True]]
    perfect = [torch.tensor([1.0, 1.0, -1.0, -9.0]), torch.tensor([1.0, 1.0])]
    assert first_error_auc(perfect, labels) == 1.0
    assert first_error_auc([-rewards for rewards in perfect], labels) == 0.0
    assert first_error_auc([torch.ones(2)], [[True, True]]) != first_error_auc([torch.ones(2)], [[True, True]])  # NaN
