"""Does a PRM find the first wrong step? The measures of ProcessBench (Zheng et al. 2024, arXiv 2412.06559).

A row is a problem, the steps of one solution, and a label: the index of the first wrong step, or -1 where all are right.
The PRM's prediction is the first step whose reward is below a threshold, or -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .statistics import bootstrap_weights, first_error_auc, interval

if TYPE_CHECKING:
    from ..implicit_prm import ImplicitPRM

ALL_RIGHT = -1


def predict_first_error(step_rewards: Sequence[Sequence[float]], threshold: float) -> np.ndarray:
    """
    The first step of each solution whose reward is below the threshold.

    Args:
        step_rewards (`list[list[float]]`): For each of R solutions the rewards of its steps, `(n_steps,)`.
        threshold (`float`): In units of reward.

    Returns:
        `np.ndarray`: `(R,)` index of the step, or -1.
    """
    below = _padded(step_rewards) < threshold
    return np.where(below.any(axis=1), below.argmax(axis=1), ALL_RIGHT)


def process_bench_scores(predictions: Sequence[int], labels: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """
    Accuracy on wrong solutions (the first wrong step is found), on right ones (none is), and their harmonic mean F1, each with
    its 95 % bootstrap interval over solutions.

    Args:
        predictions (`list[int]`): R predictions, see [`predict_first_error`].
        labels (`list[int]`): R indices of the first wrong step, or -1.
        seed (`int`): Seed of the bootstrap.

    Returns:
        `dict`: `erroneous`, `correct`, `f1`: each `{"value", "low", "high"}`, NaN without solutions of the kind.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    found, is_right = predictions == labels, labels == ALL_RIGHT
    once = np.ones((1, len(labels)))
    resampled = bootstrap_weights(len(labels), seed=seed) if len(labels) else once
    result = {}
    for name, value, replicates in zip(
        ("erroneous", "correct", "f1"),
        _accuracies(found, is_right, once),
        _accuracies(found, is_right, resampled),
        strict=True,
    ):
        low, high = interval(replicates)
        result[name] = {"value": float(value[0]), "low": low, "high": high}
    return result


def choose_threshold(step_rewards: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """
    The threshold with the highest F1, in the middle of the range that has it.

    A solution is judged rightly for thresholds t in one interval: above the reward of its first wrong step, and not above
    any reward before it. F1 only changes at the ends of these intervals, so trying the upper ends tries everything.

    Args:
        step_rewards (`list[list[float]]`): For each of R solutions the rewards of its steps.
        labels (`list[int]`): R indices of the first wrong step, or -1.

    Returns:
        `float`

    Raises:
        ValueError: There are only right solutions, or only wrong ones: F1 needs both.
    """
    check_has_both_kinds(labels)
    labels = np.asarray(labels)
    is_right = labels == ALL_RIGHT
    rewards = _padded(step_rewards)
    first = np.where(is_right, rewards.shape[1], labels)
    before = np.where(np.arange(rewards.shape[1]) < first[:, None], rewards, np.inf).min(axis=1)
    at = np.where(is_right, -np.inf, np.take_along_axis(rewards, np.maximum(labels, 0)[:, None], 1)[:, 0])
    # A first step that is wrong has no upper end
    highest = np.nextafter(rewards[np.isfinite(rewards)].max(), np.inf)
    upper = np.minimum(before, highest)
    candidates = np.unique(upper)
    possible = at < upper
    erroneous, correct = (
        _num_containing(candidates, at[kind & possible], upper[kind & possible]) / kind.sum()
        for kind in (~is_right, is_right)
    )
    best = candidates[_harmonic_mean(erroneous, correct).argmax()]
    ends = np.concatenate([at[np.isfinite(at)], upper])
    lower = ends[ends < best]
    return float((best + lower.max()) / 2) if lower.size else float(best)


def check_has_both_kinds(labels: Sequence[int]) -> None:
    """
    Refuse labels that no threshold can be chosen on.

    Raises:
        ValueError: There are only right solutions, or only wrong ones.
    """
    is_right = np.asarray(labels) == ALL_RIGHT
    if is_right.all() or not is_right.any():
        raise ValueError(
            f"Of {len(labels)} solutions {is_right.sum()} are right, but choosing a threshold needs right and wrong ones. Give "
            "more rows, or give `threshold`."
        )


def step_auc(step_rewards: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """
    How well a low step reward tells the first wrong step from right steps, whatever the threshold: see
    [`~trl_prime.evaluation.statistics.first_error_auc`].
    """
    truth = [
        [True] * len(rewards) if label == ALL_RIGHT else [True] * label + [False]
        for rewards, label in zip(step_rewards, labels, strict=True)
    ]
    return first_error_auc(step_rewards, truth)


def score_steps(
    prm: ImplicitPRM, prompts: Sequence[Any], steps: Sequence[Sequence[str]], separator: str = "\n\n"
) -> list[list[float]]:
    """
    The PRM's reward of each given step: the sum over the tokens that begin in it. A separator belongs to the step before
    it, the end-of-sequence token to the last step.

    The PRM's own step delimiter does not count here, because the steps of ProcessBench hold newlines.

    Args:
        prm ([`~trl_prime.ImplicitPRM`]): The PRM. Its tokenizer has to be a fast one, which knows where in the text a token is.
        prompts (`list`): R prompts, text or messages.
        steps (`list[list[str]]`): The steps of R solutions.
        separator (`str`): The text that joins the steps, the one that stood between them when they were written.

    Returns:
        `list[list[float]]`: R lists of rewards.
    """
    texts = [[*(step + separator for step in row[:-1]), row[-1]] for row in steps]
    completions = ["".join(row) for row in texts]
    result = []
    for scored, row, completion in zip(prm.score(prompts, completions), texts, completions, strict=True):
        encoded = prm.tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
        starts = np.array([start for start, _ in encoded["offset_mapping"]] + [len(completion)], dtype=np.int64)
        step_of_token = np.searchsorted(np.cumsum([len(step) for step in row]), starts, side="right")
        rewards = np.bincount(
            np.minimum(step_of_token, len(row) - 1), scored.token_rewards.double().numpy(), minlength=len(row)
        )
        result.append(rewards.tolist())
    return result


def _padded(step_rewards: Sequence[Sequence[float]]) -> np.ndarray:
    """`(R, S)`, infinite where there is no step."""
    rewards = np.full((len(step_rewards), max(map(len, step_rewards), default=0) or 1), np.inf)
    for row, values in zip(rewards, step_rewards, strict=True):
        row[: len(values)] = values
    return rewards


def _accuracies(found: np.ndarray, is_right: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """`(R',)` accuracies on erroneous and on correct solutions and F1, for `(R', R)` weights of the solutions."""
    with np.errstate(invalid="ignore"):
        erroneous = weights @ (found & ~is_right) / (weights @ ~is_right)
        correct = weights @ (found & is_right) / (weights @ is_right)
    return erroneous, correct, _harmonic_mean(erroneous, correct)


def _num_containing(values: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """`(C,)` how many of the R intervals (lower, upper], none of them empty, contain each of the C values."""
    return np.searchsorted(np.sort(lower), values) - np.searchsorted(np.sort(upper), values)


def _harmonic_mean(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    total = first + second
    return np.where(total == 0, 0.0, 2 * first * second / np.where(total == 0, 1.0, total))
