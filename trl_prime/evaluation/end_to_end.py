"""An evaluation from end to end: sample and judge problems, score the samples with a PRM, and sum all up.

Sampling and scoring write each batch as they go and skip what an earlier run has written. The summaries are computed from
those rows and cost seconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..texts import completion_text
from .judging import as_completions, judge
from .process_bench import choose_threshold, predict_first_error, process_bench_scores, score_steps, step_auc
from .sampling import sample_seed
from .statistics import (
    STEP_AGGREGATIONS,
    aggregate_step_rewards,
    best_of_n,
    draws,
    group_answers,
    mean_with_interval,
    pass_at_k,
    sizes_up_to,
    vote,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from ..implicit_prm import ImplicitPRM
    from .resumable import ResumableRows
    from .sampling import Sampler

# Samples with this reward count as right; code that passes a part of its tests does not
FULL_REWARD = 1.0
# The math verifier logs this for a completion without an answer
NO_ANSWER = "[none]"


def sample_problems(
    dataset: Dataset,
    make_sampler: Callable[[], Sampler],
    reward_func: Callable,
    rows: ResumableRows,
    *,
    num_samples: int,
    greedy: bool,
    seed: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """
    Sample and judge every problem, from where `rows` ends.

    Args:
        dataset ([`~datasets.Dataset`]): P problems with a `prompt` column and those that `reward_func` reads.
        make_sampler (`Callable`): Loads the policy; called only if something is left to do.
        reward_func (`Callable`): Outcome reward in TRL's form. A column `answer` that it logs is what votes are about.
        rows ([`~trl_prime.evaluation.resumable.ResumableRows`]): Where the samples go.
        num_samples (`int`): n samples of each problem.
        greedy (`bool`): Whether there is a greedy completion too.
        seed (`int`): Every sample has a seed of its own made from it.
        batch_size (`int`): Completions at a time.

    Returns:
        `list[dict]`: a row for each completion, by problem, the greedy one first: `problem` (index), `sample` (index, None
        for greedy), `prompt`, `completion` (text), `reward` (None: could not be judged), `tokens`, `truncated`, and what
        the reward function logs, such as `answer`.
    """
    jobs = [(p, s) for p in range(len(dataset)) for s in ([None] if greedy else []) + list(range(num_samples))]
    batches = _remaining_batches(rows, len(jobs), batch_size)
    sampler = make_sampler() if batches else None
    num_correct = sum(is_correct(row["reward"]) for row in rows.rows)
    with tqdm(total=len(jobs), initial=len(rows.rows), desc="Sampling", unit="completion") as bar:
        for batch_rows in batches:
            batch = jobs[batch_rows]
            problems = dataset.select([problem for problem, _ in batch])
            prompts = problems["prompt"][:]
            seeds = [None if s is None else sample_seed(seed, p, s) for p, s in batch]
            samples = sampler(prompts, seeds)
            completions = as_completions(prompts, [sample.text for sample in samples])
            rewards, logged = judge(reward_func, problems, completions)
            rows.append(
                {
                    "problem": batch[i][0],
                    "sample": batch[i][1],
                    "prompt": prompts[i],
                    "completion": sample.text,
                    "reward": rewards[i],
                    "tokens": sample.num_tokens,
                    "truncated": sample.truncated,
                    **{name: values[i] for name, values in logged.items() if values[i] is not None},
                }
                for i, sample in enumerate(samples)
            )
            num_correct += sum(map(is_correct, rewards))
            bar.set_postfix(accuracy=f"{num_correct / len(rows.rows):.3f}", refresh=False)
            bar.update(len(batch))
    return rows.rows


def is_correct(reward: float | None) -> bool:
    """Whether a reward is full marks; None, which says that it could not be judged, is not."""
    return reward is not None and reward >= FULL_REWARD


class SampleTable:
    """
    The samples of an evaluation as arrays, greedy completions apart.

    Args:
        rows (`list[dict]`): The rows of [`sample_problems`]: P problems with n samples each.
        equal (`Callable`): Whether two answers are the same, see [`~trl_prime.evaluation.statistics.group_answers`].

    Attributes:
        n (`int`): Samples of a problem.
        rows, greedy (`list[dict]`): Rows of the samples, by problem, and of the greedy completions.
        rewards (`np.ndarray`): `(P, n)`, 0 where a sample could not be judged.
        correct (`np.ndarray`): `(P, n)` bool, full marks.
        answered (`np.ndarray`): `(P,)` bool, problems whose samples have answers that can be voted on.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], equal: Callable):
        self.greedy = [row for row in rows if row["sample"] is None]
        self.rows = [row for row in rows if row["sample"] is not None]
        num_problems = len({row["problem"] for row in rows})
        self.n = len(self.rows) // max(num_problems, 1)
        self.rewards = self.array([row["reward"] or 0.0 for row in self.rows])
        self.correct = self.array([is_correct(row["reward"]) for row in self.rows])
        self.answered = self.array(["answer" in row for row in self.rows]).all(axis=1)
        self._equal = equal

    def array(self, values: Sequence[Any]) -> np.ndarray:
        """A value for each sample as `(P, n)`."""
        return np.array(values).reshape(-1, max(self.n, 1))

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """`(P', n)` number of each sample's answer, of the problems with answers."""
        answers = [None if row.get("answer") == NO_ANSWER else row.get("answer") for row in self.rows]
        table = [answers[i * self.n : (i + 1) * self.n] for i in np.flatnonzero(self.answered)]
        return group_answers(table, self._equal)

    def vote(self, subsets: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """`(P',)` accuracy of the (weighted) vote in the subsets, of the problems with answers."""
        if weights is not None:
            weights = weights[self.answered]
        return vote(self.groups, self.correct[self.answered], subsets, weights)


def values_by_metric(samples: SampleTable, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """
    What each problem contributes to each metric.

    Args:
        samples ([`SampleTable`]): P problems with n samples each.
        ks (`list[int]`): For pass@k.

    Returns:
        `dict[str, np.ndarray]`: `(P,)` between 0 and 1 for each of `greedy`, `pass@k`, `avg@n` and `maj@n`, as far as they
        apply. NaN stands for a problem without answers to vote on.
    """
    values = {}
    if samples.greedy:
        values["greedy"] = np.array([is_correct(row["reward"]) for row in samples.greedy], dtype=np.float64)
    if samples.n:
        num_correct = samples.correct.sum(axis=1)
        for k in ks:
            values[f"pass@{k}"] = pass_at_k(samples.n, num_correct, k)
        values[f"avg@{samples.n}"] = samples.rewards.mean(axis=1)
        if samples.answered.any():
            values[f"maj@{samples.n}"] = np.full(len(samples.answered), np.nan)
            values[f"maj@{samples.n}"][samples.answered] = samples.vote(draws(samples.n, samples.n))
    return values


def summarize_samples(samples: SampleTable, ks: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """
    Accuracies of a policy, each with its 95 % bootstrap interval over problems.

    Args:
        samples ([`SampleTable`]): P problems with n samples each.
        ks (`list[int]`): For pass@k.
        seed (`int`): Seed of the bootstrap.

    Returns:
        `dict`: counts, and `metrics`: `greedy`, `pass@k`, `avg@n` (the mean reward, which differs from pass@1 only where
        there are part marks) and, over the problems with answers, `maj@n`, as far as they apply.
    """
    rows = samples.greedy + samples.rows
    return {
        "num_problems": len({row["problem"] for row in rows}),
        "num_samples": samples.n,
        "num_completions": len(rows),
        "num_undecided": sum(row["reward"] is None for row in rows),
        "num_truncated": sum(row["truncated"] for row in rows),
        "num_without_answer": sum(row.get("answer") == NO_ANSWER for row in rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / max(len(rows), 1),
        "metrics": {
            name: mean_with_interval(values[~np.isnan(values)], seed=seed)
            for name, values in values_by_metric(samples, ks).items()
        },
    }


def score_samples(
    samples: SampleTable, make_prm: Callable[[], ImplicitPRM], scores: ResumableRows, batch_size: int
) -> list[dict[str, Any]]:
    """
    Step rewards of every sample by the PRM, from where `scores` ends.

    Args:
        samples ([`SampleTable`]): The samples.
        make_prm (`Callable`): Loads the PRM; called only if something is left to do.
        scores ([`~trl_prime.evaluation.resumable.ResumableRows`]): Where the step rewards go.
        batch_size (`int`): Completions at a time.

    Returns:
        `list[dict]`: `problem`, `sample`, `step_rewards` of every sample, in their order.
    """
    batches = _remaining_batches(scores, len(samples.rows), batch_size)
    prm = make_prm() if batches else None
    with tqdm(total=len(samples.rows), initial=len(scores.rows), desc="PRM", unit="completion") as bar:
        for batch_rows in batches:
            batch = samples.rows[batch_rows]
            columns = ([row[name] for row in batch] for name in ("prompt", "completion", "truncated"))
            scored = prm.score(*columns)
            scores.append(
                {
                    "problem": row["problem"],
                    "sample": row["sample"],
                    "step_rewards": completion.step_rewards.tolist(),
                }
                for row, completion in zip(batch, scored, strict=True)
            )
            bar.update(len(batch))
    return scores.rows


def summarize_best_of_n(samples: SampleTable, scores: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """
    Accuracy of choosing one of N = 1, 2, 4, ... 64 samples, each with its 95 % bootstrap interval over problems.

    Args:
        samples ([`SampleTable`]): The samples.
        scores (`list[dict]`): The rows of [`score_samples`].
        seed (`int`): Seed of the bootstrap and of the subsets that votes are averaged over.

    Returns:
        `list[dict]`: for each N: `n`; `random` (one sample blindly, pass@1); `ceiling` (pass@N); `prm_sum`, `prm_min`,
        `prm_mean`, `prm_last` (highest score, by how step rewards make one score); and over the problems with answers
        `majority` and `weighted_majority` (each vote weighs the PRM's probability, `sigmoid(q)`), with `votes`, whether
        they are exact or a mean over random subsets.
    """
    step_rewards = [row["step_rewards"] for row in scores]
    by_aggregation = {
        how: samples.array([aggregate_step_rewards(rewards, how) for rewards in step_rewards])
        for how in STEP_AGGREGATIONS
    }
    probabilities = 1 / (1 + np.exp(-np.clip(by_aggregation["sum"], -500, 500)))
    num_correct = samples.correct.sum(axis=1)
    table = []
    for size in sizes_up_to(samples.n):
        accuracies = {
            "random": num_correct / samples.n,
            **{f"prm_{how}": best_of_n(values, samples.correct, size) for how, values in by_aggregation.items()},
            "ceiling": pass_at_k(samples.n, num_correct, size),
        }
        row: dict[str, Any] = {"n": size}
        if samples.answered.any():
            subsets = draws(samples.n, size, seed=seed)
            accuracies["majority"] = samples.vote(subsets)
            accuracies["weighted_majority"] = samples.vote(subsets, probabilities)
            exact = len(subsets) == math.comb(samples.n, size)
            row["votes"] = "exact" if exact else f"mean of {len(subsets)} random subsets"
        table.append({**row, **{name: mean_with_interval(values, seed=seed) for name, values in accuracies.items()}})
    return table


def score_process_bench(
    dataset: Dataset, make_prm: Callable[[], ImplicitPRM], rows: ResumableRows, *, separator: str, batch_size: int
) -> list[list[float]]:
    """
    The PRM's reward of each step of each solution, from where `rows` ends.

    Args:
        dataset ([`~datasets.Dataset`]): Solutions in the format `process_bench`.
        make_prm (`Callable`): Loads the PRM; called only if something is left to do.
        rows ([`~trl_prime.evaluation.resumable.ResumableRows`]): Where the step rewards go.
        separator (`str`): The text that joins the steps.
        batch_size (`int`): Solutions at a time.

    Returns:
        `list[list[float]]`: for each solution the rewards of its steps.
    """
    batches = _remaining_batches(rows, len(dataset), batch_size)
    prm = make_prm() if batches else None
    with tqdm(total=len(dataset), initial=len(rows.rows), desc="PRM", unit="solution") as bar:
        for batch_rows in batches:
            batch = dataset[batch_rows]
            prompts = batch["prompt"]
            if prm.tokenizer.chat_template is None:
                prompts = list(map(completion_text, prompts))
            rewards = score_steps(prm, prompts, batch["steps"], separator)
            rows.append(
                {"label": label, "step_rewards": values} for label, values in zip(batch["label"], rewards, strict=True)
            )
            bar.update(len(rewards))
    return [row["step_rewards"] for row in rows.rows]


def summarize_process_bench(
    step_rewards: Sequence[Sequence[float]],
    labels: Sequence[int],
    *,
    threshold: float | None = None,
    calibration_fraction: float = 0.2,
    seed: int = 0,
) -> dict[str, Any]:
    """
    How well a PRM finds the first wrong step.

    Args:
        step_rewards (`list[list[float]]`): For each of R solutions the rewards of its steps.
        labels (`list[int]`): R indices of the first wrong step, or -1.
        threshold (`float`, *optional*): A step below it is called wrong. Not given, it is chosen on a random part of the
            solutions, which are then left out of what is reported.
        calibration_fraction (`float`): Size of that part.
        seed (`int`): Seed of that part and of the bootstrap.

    Returns:
        `dict`: `threshold`, `num_calibration`, `num_solutions`, `metrics` (`erroneous`, `correct`, `f1`, see
        [`~trl_prime.evaluation.process_bench.process_bench_scores`]) and `auc`.

    Raises:
        ValueError: There are too few solutions to choose a threshold on.
    """
    calibration, reported = calibration_split(labels, calibration_fraction if threshold is None else 0.0, seed)
    if threshold is None:
        threshold = choose_threshold([step_rewards[i] for i in calibration], [labels[i] for i in calibration])
    rewards, truth = [step_rewards[i] for i in reported], [labels[i] for i in reported]
    return {
        "threshold": threshold,
        "num_calibration": len(calibration),
        "num_solutions": len(truth),
        "metrics": process_bench_scores(predict_first_error(rewards, threshold), truth, seed),
        "auc": step_auc(rewards, truth),
    }


def calibration_split(labels: Sequence[int], fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """
    The solutions that a threshold is chosen on, drawn at random, and the others.

    Args:
        labels (`list[int]`): R indices of the first wrong step, or -1.
        fraction (`float`): Share of the former.
        seed (`int`): Seed of the draw.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the rows of either.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    size = round(fraction * len(labels))
    return order[:size], order[size:]


def _remaining_batches(rows: ResumableRows, total: int, batch_size: int) -> list[slice]:
    """The batches that are not written yet. A batch that was written in part is done again: its numbers depend on all its rows."""
    if len(rows.rows) < total:
        rows.cut(len(rows.rows) // batch_size * batch_size)
    return [slice(start, min(start + batch_size, total)) for start in range(len(rows.rows), total, batch_size)]
