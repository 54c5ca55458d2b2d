r"""The outcome reward of problems with a final answer asks Math-Verify, in processes that can be killed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import Any

from ..texts import completion_text
from .answers import MAX_ANSWER_LENGTH, extract_answer, extract_gold, judge, quick_verdict
from .worker_pool import WorkerPool

# A worker imports Math-Verify and pint and learns most of the grammar by it, outside the time limit
_WARM_UP = (r"[-\frac{\pi^2}{8}, 2\sqrt{x})\text{ km}", r"\{1, (x+1)^2\}")


def check_installed() -> None:
    """Raise an ImportError that says what to install, if answers cannot be judged."""
    for module, name in (("math_verify", "Math-Verify"), ("pint", "pint")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"Judging answers needs {name}: pip install trl-prime[math]")


class MathReward:
    r"""
    Reward function for TRL: 1.0 if the final answer of a completion equals the gold answer, 0.0 if not, None if that could
    not be told.

    Options are arguments of the constructor, because TRL passes every column of the data set to the call. See
    [`~trl_prime.rewards.answers.extract_answer`] for where the answer is looked for and
    [`~trl_prime.rewards.answers.judge`] for what is equal.

    | case | reward |
    |---|---|
    | no answer in the completion, or one longer than 4096 characters | 0.0 |
    | the gold answer is None (a row of another task), empty, too long or not understood | None |
    | the gold answer alone takes longer than `timeout`, twice | None |
    | the answer takes longer than `timeout`, or all memory, twice | `undecided` |

    Each distinct pair of answer and gold answer in a batch is judged once, in one of `num_workers` processes that start
    with the first call that needs one.

    Args:
        timeout (`float`, *optional*, defaults to `3.0`):
            Seconds that judging one answer may take. An answer that takes longer is given to a second process.
        num_workers (`int`, *optional*):
            Largest number of processes. Defaults to the number of available cores, at most 8.
        undecided (`float` or `None`, *optional*):
            Reward of an answer that could not be judged in time. None, the default, leaves the completion out of the
            training. With 0.0, a policy that learns to write answers that take for ever is taught not to.
        boxed_only (`bool`, *optional*, defaults to `False`):
            Whether only an answer in `\boxed{}` counts.

    Raises:
        ImportError: Math-Verify or pint is not installed.
        ValueError: An option is out of range.

    Example:
    ```python
    >>> reward = MathReward(timeout=2.0)
    >>> reward([r"So it is \boxed{\frac{1}{2}}.", "The answer is 3."], [r"0.5", "#### 4"])
    [1.0, 0.0]
    ```
    """

    def __init__(
        self,
        timeout: float = 3.0,
        num_workers: int | None = None,
        undecided: float | None = None,
        boxed_only: bool = False,
    ):
        check_installed()
        if undecided is not None and not isinstance(undecided, (int, float)):
            raise ValueError(f"undecided is {undecided!r}, but must be a number or None.")
        self.__name__ = "math_reward"  # TRL logs it by this name
        self.undecided = undecided
        self.boxed_only = boxed_only
        self.pool = WorkerPool(judge, num_workers=num_workers, timeout=timeout, warm_up=_WARM_UP)

    def __call__(
        self,
        completions: list[str] | list[list[dict]],
        solution: list,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        Judge a batch.

        Args:
            completions (`list[str]` or `list[list[dict]]`):
                Texts, or lists of messages of which the last holds the answer.
            solution (`list`):
                The gold answers, see [`~trl_prime.rewards.answers.extract_gold`].
            log_extra (`Callable`, *optional*):
                Gets the column `answer`, what was found in each completion.
            log_metric (`Callable`, *optional*):
                Gets `math_reward/undecided` and `math_reward/no_answer`, the shares of completions that could not be
                judged, and in which there was no answer.
            **kwargs:
                Other columns; not used.

        Returns:
            `list[float | None]`: rewards in the order of the completions.
        """
        answers = [extract_answer(completion_text(completion), self.boxed_only) for completion in completions]
        golds = [extract_gold(gold) for gold in solution]
        pairs = list(zip(answers, golds, strict=True))
        verdicts = self.judge_pairs(dict.fromkeys(pairs))
        rewards = [verdicts[pair] for pair in pairs]
        if log_extra is not None:
            log_extra("answer", [answer if answer is not None else "[none]" for answer in answers])
        if log_metric is not None and rewards:
            log_metric("math_reward/undecided", rewards.count(None) / len(rewards))
            log_metric("math_reward/no_answer", answers.count(None) / len(rewards))
        return rewards

    def close(self) -> None:
        """Stop the worker processes; they stop with the program in any case."""
        self.pool.close()

    def judge_pairs(
        self, pairs: Collection[tuple[str | None, str | None]]
    ) -> dict[tuple[str | None, str | None], float | None]:
        """
        Judge pairs of an answer and a gold answer, both as extracted.

        Args:
            pairs (`Collection[tuple]`): Distinct pairs.

        Returns:
            `dict`: pair -> 1.0, 0.0, or None if that could not be told.
        """
        rewards: dict[tuple[str | None, str | None], float | None] = {}
        for answer, gold in pairs:
            if gold is None or len(gold) > MAX_ANSWER_LENGTH:
                rewards[answer, gold] = None
            elif answer is None or len(answer) > MAX_ANSWER_LENGTH:
                rewards[answer, gold] = 0.0
            elif (verdict := quick_verdict(answer, gold)) is not None:
                rewards[answer, gold] = float(verdict)
        hard = [pair for pair in pairs if pair not in rewards]
        # Pairs with one gold answer go to one worker, which parses it once
        results = self.pool.map(hard, keys=[gold for _, gold in hard])
        failed_golds = []
        for pair, result in zip(hard, results, strict=True):
            rewards[pair] = None if result.value is None else float(result.value)
            if result.failure:
                failed_golds.append(pair[1])
        if self.undecided is not None and failed_golds:
            # The answer "0" takes no time, so if it fails too, the gold answer is at fault
            golds = list(dict.fromkeys(failed_golds))
            sound = {
                gold
                for gold, result in zip(golds, self.pool.map([("0", gold) for gold in golds]), strict=True)
                if not result.failure
            }
            for pair, result in zip(hard, results, strict=True):
                if result.failure and pair[1] in sound:
                    rewards[pair] = float(self.undecided)
        return rewards


_default: MathReward | None = None


def math_reward(
    completions: list[str] | list[list[dict]],
    solution: list,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    [`MathReward`] with its defaults: 1.0 for a right final answer, 0.0 for a wrong or missing one, None if undecided.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Texts, or lists of messages of which the last holds the answer.
        solution (`list`):
            The gold answers: bare LaTeX, `$...$`, with `\boxed{}`, or GSM8K's `#### 42`; None for rows of another task.
        log_extra (`Callable`, *optional*):
            Gets the column `answer`.
        log_metric (`Callable`, *optional*):
            Gets `math_reward/undecided` and `math_reward/no_answer`.
        **kwargs:
            Other columns; not used.

    Returns:
        `list[float | None]`: rewards in the order of the completions.

    Raises:
        ImportError: Math-Verify or pint is not installed.

    Example:
    ```python
    >>> math_reward([r"\boxed{50\%}", r"\boxed{50}"], ["0.5", "0.5"])
    [1.0, 0.0]
    ```
    """
    global _default
    if _default is None:
        _default = MathReward()
    return _default(completions, solution, log_extra=log_extra, log_metric=log_metric, **kwargs)
