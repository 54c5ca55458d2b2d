"""Accuracy of choosing one of N samples: by a PRM's score, by vote, by weighted vote.

P problems with n samples each; N <= n of them are drawn without replacement, and what is computed is the expectation over
the draw. For the choice by score it is exact. For votes it is exact where there are at most `max_subsets` subsets, else
the mean over that many random ones, the same for all problems.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from .majority import NO_ANSWER

STEP_AGGREGATIONS = {
    "sum": np.sum,
    "min": np.min,
    "mean": np.mean,
    "last": lambda step_rewards: step_rewards[-1],
}


def aggregate_step_rewards(step_rewards: Sequence[float], aggregation: str) -> float:
    """
    One score for a completion from the rewards of its steps, in log-odds.

    Args:
        step_rewards (`list[float]`): `(n_steps,)`, at least one.
        aggregation (`str`): `"sum"` (q, what the implicit PRM is trained to make right), `"min"`, `"mean"` or `"last"`.

    Returns:
        `float`
    """
    return float(STEP_AGGREGATIONS[aggregation](np.asarray(step_rewards, dtype=np.float64)))


def best_of_n(scores: np.ndarray, correct: np.ndarray, size: int) -> np.ndarray:
    """
    Expected accuracy of the sample with the highest score among N drawn ones; exact, by order statistics.

    Of the samples sorted by score, the one with i samples above it is the best of a draw in `C(n - 1 - i, N - 1)` of the
    `C(n, N)` draws. Among equal scores the choice is random, so that each counts with the mean of its ties.

    Args:
        scores (`np.ndarray`): `(P, n)`.
        correct (`np.ndarray`): `(P, n)` between 0 and 1.
        size (`int`): N.

    Returns:
        `np.ndarray`: `(P,)`.

    Raises:
        ValueError: N is not between 1 and n.
    """
    n = _check_size(scores.shape[1], size)
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, correct = np.take_along_axis(scores, order, 1), np.take_along_axis(correct.astype(np.float64), order, 1)
    # Number of the block of equal scores that a sample is in, different for each problem
    block = np.cumsum(np.diff(scores, axis=1, prepend=np.inf) != 0, axis=1)
    block = (block + (n + 1) * np.arange(len(scores))[:, None]).ravel()
    sums, counts = np.bincount(block, correct.ravel()), np.bincount(block)
    correct = (sums[block] / counts[block]).reshape(scores.shape)
    above = np.arange(n)
    # C(n-1-i, N-1) / C(n, N) by its recurrence: the next is the one before, times (n-N-i) / (n-1-i)
    ratios = np.clip(n - size - above[:-1], 0, None) / np.maximum(n - 1 - above[:-1], 1)
    chance = size / n * np.concatenate([[1.0], np.cumprod(ratios)])
    return correct @ chance


def draws(n: int, size: int, max_subsets: int = 512, seed: int = 0) -> np.ndarray:
    """
    Subsets of N of n samples: all of them where there are at most `max_subsets`, else that many random ones.

    Args:
        n, size, max_subsets, seed (`int`): As above.

    Returns:
        `np.ndarray`: `(S, n)`, 1.0 where a sample is in the subset.
    """
    _check_size(n, size)
    if math.comb(n, size) <= max_subsets:
        chosen = np.array(list(itertools.combinations(range(n), size)))
    else:
        chosen = np.random.default_rng(seed).random((max_subsets, n)).argsort(axis=1)[:, :size]
    subsets = np.zeros((len(chosen), n))
    np.put_along_axis(subsets, chosen, 1.0, axis=1)
    return subsets


def vote(
    groups: np.ndarray, correct: np.ndarray, subsets: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """
    Expected accuracy of the answer with the most votes, or with the largest sum of weights, in a draw.

    Equal answers share one verdict, the mean of their samples'. Of answers with equally many votes one is chosen at random,
    so that their mean counts. Samples without an answer do not vote; where nobody votes, the draw is wrong.

    Args:
        groups (`np.ndarray`): `(P, n)` number of each sample's answer, see
            [`~trl_prime.evaluation.majority.group_answers`].
        correct (`np.ndarray`): `(P, n)` between 0 and 1.
        subsets (`np.ndarray`): `(S, n)`, see [`draws`].
        weights (`np.ndarray`, *optional*): `(P, n)`, not negative. Not given, every sample has one vote.

    Returns:
        `np.ndarray`: `(P,)`.
    """
    accuracy = np.zeros(len(groups))
    weights = np.ones(groups.shape) if weights is None else weights
    # A problem at a time: the number of its answers differs, and S x n x answers of all would not fit in memory
    for problem, group in enumerate(groups):
        is_answer = (group[:, None] == np.arange(group.max(initial=NO_ANSWER) + 1)).astype(np.float64)
        if not is_answer.size:
            continue
        verdicts = correct[problem] @ is_answer / np.maximum(is_answer.sum(0), 1)
        totals = subsets @ (is_answer * weights[problem][:, None])
        drawn = subsets @ is_answer > 0
        # Sums in another order differ by rounding
        wins = drawn & (totals >= totals.max(axis=1, keepdims=True) * (1 - 1e-9))
        accuracy[problem] = (wins @ verdicts / np.maximum(wins.sum(1), 1)).mean()
    return accuracy


def sizes_up_to(n: int, largest: int = 64) -> list[int]:
    """1, 2, 4, ... up to n, at most `largest`."""
    return [2**power for power in range(largest.bit_length()) if 2**power <= min(n, largest)]


def _check_size(n: int, size: int) -> int:
    if not 1 <= size <= n:
        raise ValueError(f"N is {size}, but must lie between 1 and the number of samples, {n}.")
    return n
