"""pass@k against counting subsets, and the bootstrap against what it estimates."""

import itertools
import math

import numpy as np
import pytest

from trl_prime.evaluation.pass_at_k import bootstrap_weights, interval, mean_with_interval, pass_at_k


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
