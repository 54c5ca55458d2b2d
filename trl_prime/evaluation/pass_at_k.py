"""Accuracy of repeated sampling, and its uncertainty: pass@k and the bootstrap over problems.

P problems with n samples each. Covered: numbers from numbers. Not covered: sampling (`sampling.py`), judging
(`trl_prime.rewards`), choosing among the samples (`best_of_n.py`).
"""

from __future__ import annotations

import numpy as np


def pass_at_k(num_samples: np.ndarray | int, num_correct: np.ndarray, k: int) -> np.ndarray:
    """
    Chance that at least one of k samples of a problem is right, by the unbiased estimator of Chen et al. 2021
    (arXiv 2107.03374, equation 1): `1 - C(n - c, k) / C(n, k)`, as a product of k ratios, which cannot overflow.

    Args:
        num_samples (`np.ndarray` or `int`): `(P,)` or one number, n samples of each problem.
        num_correct (`np.ndarray`): `(P,)`, c right ones among them.
        k (`int`): How many samples are drawn.

    Returns:
        `np.ndarray`: `(P,)` between 0 and 1. With k = 1 it is the share of right samples.

    Raises:
        ValueError: k is not between 1 and n, or more samples are right than there are.
    """
    num_correct = np.asarray(num_correct)
    num_samples = np.broadcast_to(np.asarray(num_samples), num_correct.shape)
    if num_correct.size == 0:
        return np.zeros(0)
    if not 1 <= k <= num_samples.min():
        raise ValueError(f"k is {k}, but must lie between 1 and the number of samples, {num_samples.min()}.")
    if (num_correct < 0).any() or (num_correct > num_samples).any():
        raise ValueError("num_correct must lie between 0 and num_samples.")
    drawn = np.arange(k)
    num_wrong = num_samples - num_correct
    all_wrong = np.clip(num_wrong[:, None] - drawn, 0, None) / (num_samples[:, None] - drawn)
    return 1.0 - all_wrong.prod(axis=1)


def bootstrap_weights(num_problems: int, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """
    How often each problem is drawn in each resample of the problems, with replacement.

    Args:
        num_problems (`int`): P.
        num_resamples (`int`): R.
        seed (`int`): The same seed gives the same resamples, so that two models can be compared on them.

    Returns:
        `np.ndarray`: `(R, P)` counts; each row sums to P.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_problems, np.full(num_problems, 1.0 / num_problems), size=num_resamples)


def interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """
    The percentile interval of bootstrap replicates `(R,)`; replicates that are NaN are left out.

    It has no width where all problems have the same value: 0 of 30 right says little, and this interval does not show it.
    """
    replicates = replicates[~np.isnan(replicates)]
    if not replicates.size:
        return float("nan"), float("nan")
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_with_interval(values: np.ndarray, num_resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """
    Mean of a value per problem with its 95 % bootstrap interval over problems.

    Args:
        values (`np.ndarray`): `(P,)`.
        num_resamples, seed (`int`): as in [`bootstrap_weights`].

    Returns:
        `dict[str, float]`: `value`, `low`, `high`; NaN without problems.
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        return dict.fromkeys(("value", "low", "high"), float("nan"))
    replicates = bootstrap_weights(len(values), num_resamples, seed) @ values / len(values)
    low, high = interval(replicates)
    return {"value": float(values.mean()), "low": low, "high": high}
