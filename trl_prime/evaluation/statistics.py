"""Accuracy of repeated sampling from the verdicts on its samples: pass@k, best of N, votes, and the bootstrap over problems.

P problems with n samples each. Covered: numbers from numbers. Not covered: sampling (`sampling.py`), judging (`judging.py`), the
first wrong step beyond its AUC (`process_bench.py`).

Where one of N <= n samples is chosen, N are drawn without replacement, and the accuracy is the expectation over the draw. For the
choice by score it is exact. For votes it is exact where there are at most `max_subsets` subsets, else the mean over that many random
ones, the same for all problems.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# The number of the group that holds samples without an answer
NO_ANSWER = -1
STEP_AGGREGATIONS = {
    "sum": np.sum,
    "min": np.min,
    "mean": np.mean,
    "last": lambda step_rewards: step_rewards[-1],
}


# --- Accuracy and its interval ---


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


# --- One of N samples ---


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
    # The block of equal scores that a sample is in has a number, different for each problem
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
        n (`int`): Number of samples.
        size (`int`): N.
        max_subsets (`int`): How many subsets are drawn where there are more.
        seed (`int`): Seed of the random subsets.

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
            [`group_answers`].
        correct (`np.ndarray`): `(P, n)` between 0 and 1.
        subsets (`np.ndarray`): `(S, n)`, see [`draws`].
        weights (`np.ndarray`, *optional*): `(P, n)`, not negative. Not given, every sample has one vote.

    Returns:
        `np.ndarray`: `(P,)`.
    """
    accuracy = np.zeros(len(groups))
    weights = np.ones(groups.shape) if weights is None else weights
    # Problems are taken one at a time: their numbers of answers differ, and S x n x answers of all would not fit in memory
    for problem, group in enumerate(groups):
        is_answer = (group[:, None] == np.arange(group.max(initial=NO_ANSWER) + 1)).astype(np.float64)
        if not is_answer.size:
            continue
        verdicts = correct[problem] @ is_answer / np.maximum(is_answer.sum(0), 1)
        totals = subsets @ (is_answer * weights[problem][:, None])
        drawn = subsets @ is_answer > 0
        # Sums in another order differ by rounding, which must not decide a tie
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


# --- Answers to vote on ---


def group_answers(
    answers: Sequence[Sequence[str | None]], equal: Callable[[list[tuple[str, str]]], Sequence[bool]]
) -> np.ndarray:
    """
    Group the answers of each problem: equal texts first, then, from the most frequent text down, those that `equal` accepts.

    One round asks, for all problems at once, which of the remaining texts equal their problem's most frequent one. So a
    pair of texts is asked about once for all problems, and texts that found their group are never asked about again.

    Args:
        answers (`list[list[str | None]]`): `(P, n)` answers as text; None where a sample has none.
        equal (`Callable`): For distinct pairs (answer, more frequent answer), whether they are the same answer.

    Returns:
        `np.ndarray`: `(P, n)` number of the group, counted from 0 in the order of frequency of the groups' first texts;
        `NO_ANSWER` where there is no answer.
    """
    # Counter keeps the order of appearance among texts of one frequency
    remaining = [
        [text for text, _ in Counter(text for text in row if text is not None).most_common()] for row in answers
    ]
    groups: list[dict[str | None, int]] = [{None: NO_ANSWER} for _ in answers]
    number = 0
    while any(remaining):
        pairs = list(dict.fromkeys((text, texts[0]) for texts in remaining for text in texts[1:]))
        verdicts = dict(zip(pairs, equal(pairs), strict=True)) if pairs else {}
        for problem, texts in enumerate(remaining):
            if texts:
                members = [text for text in texts if text == texts[0] or verdicts[text, texts[0]]]
                groups[problem].update(dict.fromkeys(members, number))
                remaining[problem] = [text for text in texts if text not in groups[problem]]
        number += 1
    return np.array(
        [[group[text] for text in row] for group, row in zip(groups, answers, strict=True)], dtype=np.int64
    )


# --- Steps ---


def first_error_auc(step_rewards: Sequence[Any], step_labels: Sequence[Sequence[bool]]) -> float:
    """
    How well a low step reward tells the first wrong step from the right steps before it and elsewhere (area under the ROC).

    Steps after the first wrong one are left out: whether they are wrong follows from it.

    Args:
        step_rewards (`list[list[float]]`): For each completion the rewards of its steps, `(n_steps,)`; may be tensors.
        step_labels (`list[list[bool]]`): For each completion whether each step is right.

    Returns:
        `float`: 1/2 is chance, 1 is perfect, ties count one half; NaN without both kinds of steps.
    """
    wrong, right = [], []
    for rewards, labels in zip(step_rewards, step_labels, strict=True):
        for reward, is_right in zip(np.asarray(rewards, dtype=np.float64).tolist(), labels, strict=False):
            (right if is_right else wrong).append(reward)
            if not is_right:
                break
    if not wrong or not right:
        return float("nan")
    # A binary search counts the wrong steps below each right one and those that tie with it: memory grows with the steps,
    # not with their pairs
    wrong_rewards = np.sort(wrong)
    below = np.searchsorted(wrong_rewards, right)
    not_above = np.searchsorted(wrong_rewards, right, side="right")
    return float((below + not_above).mean() / (2 * len(wrong)))
