"""Choosing one of N samples, against enumerating every subset of N and choosing by hand."""

import itertools
from collections import defaultdict

import numpy as np
import pytest

from trl_prime.evaluation.best_of_n import aggregate_step_rewards, best_of_n, draws, sizes_up_to, vote
from trl_prime.evaluation.majority import group_answers
from trl_prime.evaluation.pass_at_k import pass_at_k


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
