"""The majority's answer as the label: completions are right if they agree with most others on the same prompt.

For data without gold answers (test-time reinforcement learning, arXiv 2504.16084). Not covered: answers that only a program
can compare.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from ..texts import completion_text
from .answers import MAX_ANSWER_LENGTH, extract_answer, quick_verdict
from .math_rewards import MathReward

# A cheap answer, which can be judged against any gold answer that can be judged at all
_PROBE = "0"


class MajorityReward:
    r"""
    Reward function for TRL: 1.0 if the final answer of a completion agrees with the most frequent answer of its group, 0.0 if
    not, None if the group has no such answer.

    A group is all completions of equal prompts in the generation batch. With several processes their answers are gathered, so
    a group may lie on several of them; every process has to call the function at the same time, as TRL's trainers do. Answers
    are found and compared as by [`MathReward`], so `1/2` and `0.5` are one answer.

    | case | reward |
    |---|---|
    | the answer agrees with the group's most frequent answer | 1.0 |
    | another answer, none, or one longer than 4096 characters | 0.0 |
    | two answers of the group are equally frequent, or no completion has an answer | None for the group |
    | the group is a single completion | None |
    | the answer could not be compared in time | None; for the group, if it could change which answer is most frequent |

    The label is agreement and not truth. A policy that is trained on it can learn to give one answer always, right or wrong.

    Args:
        timeout (`float`, *optional*, defaults to `3.0`):
            Seconds that comparing two answers may take.
        num_workers (`int`, *optional*):
            Largest number of processes. Defaults to the number of available cores, at most 8.
        boxed_only (`bool`, *optional*, defaults to `False`):
            Whether only an answer in `\boxed{}` counts.

    Raises:
        ImportError: Math-Verify or pint is not installed.
        ValueError: An option is out of range.

    Example:
    ```python
    >>> reward = MajorityReward()
    >>> completions = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{2}"]
    >>> reward(completions, prompts=["What is half of one?"] * 3)
    [1.0, 1.0, 0.0]
    ```
    """

    def __init__(self, timeout: float = 3.0, num_workers: int | None = None, boxed_only: bool = False):
        self.__name__ = "majority_reward"  # TRL logs it by this name
        self.boxed_only = boxed_only
        self._equality = MathReward(timeout=timeout, num_workers=num_workers)

    def __call__(
        self,
        completions: list[str] | list[list[dict]],
        prompts: list[str] | list[list[dict]],
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        Label a batch.

        Args:
            completions (`list[str]` or `list[list[dict]]`):
                Texts, or lists of messages of which the last holds the answer.
            prompts (`list[str]` or `list[list[dict]]`):
                The prompt of each completion.
            log_extra (`Callable`, *optional*):
                Gets the columns `answer` and `majority`, what was found in each completion and its group's label.
            log_metric (`Callable`, *optional*):
                Gets `majority_reward/labelled`, the share of groups that have a label, and `majority_reward/agreement`, the
                mean share of completions that agree with it. Agreement that goes to 1 while held-out accuracy does not rise
                means that the policy collapses onto one answer.
            **kwargs:
                Other columns; not used.

        Returns:
            `list[float | None]`: rewards in the order of the completions.
        """
        keys = [json.dumps(prompt, sort_keys=True, default=repr) for prompt in prompts]
        answers = [self._answer(completion) for completion in completions]
        groups: dict[str, list[str | None]] = {key: [] for key in keys}
        for key, answer in _of_all_processes(list(zip(keys, answers, strict=True))):
            if key in groups:
                groups[key].append(answer)
        votes = {key: _Vote(group) for key, group in groups.items()}
        self._count(votes.values())
        rewards = [votes[key].reward(answer) for key, answer in zip(keys, answers, strict=True)]
        labels = [votes[key].label for key in keys]
        if log_extra is not None:
            log_extra("answer", [answer if answer is not None else "[none]" for answer in answers])
            log_extra("majority", [label if label is not None else "[none]" for label in labels])
        if log_metric is not None and votes:
            shares = [vote.agreement for vote in votes.values() if vote.label is not None]
            log_metric("majority_reward/labelled", len(shares) / len(votes))
            if shares:
                log_metric("majority_reward/agreement", sum(shares) / len(shares))
        return rewards

    def close(self) -> None:
        """Stop the worker processes; they stop with the program in any case."""
        self._equality.close()

    def _answer(self, completion: str | list[dict]) -> str | None:
        answer = extract_answer(completion_text(completion), self.boxed_only)
        return answer if answer is None or len(answer) <= MAX_ANSWER_LENGTH else None

    def _count(self, votes: Iterable[_Vote]) -> None:
        """Count the votes of all groups side by side, so that their comparisons fill the worker processes."""
        running = [vote for vote in votes if vote.find_candidate()]
        while running:
            hard = {(_PROBE, v.candidate) for v in running if quick_verdict(_PROBE, v.candidate) is None}
            probes = self._equality.judge_pairs(hard)
            sound = [vote for vote in running if probes.get((_PROBE, vote.candidate), 0.0) is not None]
            verdicts = self._equality.judge_pairs({pair: None for vote in sound for pair in vote.pairs()})
            for vote in running:
                vote.close_candidate(verdicts if vote in sound else None)
            running = [vote for vote in running if vote.find_candidate()]


class _Vote:
    """
    The vote of one group.

    The most frequent answer that is left is the candidate, and takes the answers that equal it. This goes on until what is
    left cannot outvote the first.
    """

    def __init__(self, answers: list[str | None]):
        self.group_size = len(answers)
        self.counts = Counter(answer for answer in answers if answer is not None)
        # Groups on several processes have to be counted in the same order on each
        self.left = sorted(self.counts, key=lambda answer: (-self.counts[answer], answer))
        self.clusters: list[list[str]] = []
        self.undecided: list[str] = []
        self.candidate: str = ""

    def find_candidate(self) -> bool:
        """Choose the next candidate; False if the vote is over."""
        if self.group_size < 2 or not self.left or self._best() > self._size(self.left) + self._size(self.undecided):
            return False
        self.candidate = self.left[0]
        return True

    def pairs(self) -> list[tuple[str, str]]:
        return [(answer, self.candidate) for answer in self.left[1:]]

    def close_candidate(self, verdicts: dict | None) -> None:
        """Give the candidate what equals it. Without verdicts it is set aside, since nothing can be compared with it."""
        self.left.remove(self.candidate)
        if verdicts is None:
            self.undecided.append(self.candidate)
            return
        verdict = {answer: verdicts[answer, self.candidate] for answer in self.left}
        self.clusters.append([self.candidate, *(answer for answer in self.left if verdict[answer])])
        self.undecided += [answer for answer in self.left if verdict[answer] is None]
        self.left = [answer for answer in self.left if verdict[answer] == 0.0]

    @property
    def winner(self) -> list[str] | None:
        """The answers that agree with the majority; None if there is none."""
        sizes = sorted(map(self._size, self.clusters), reverse=True)
        rival = max([*sizes[1:], self._size(self.left)]) if sizes else 0
        if not sizes or sizes[0] <= rival + self._size(self.undecided):
            return None
        return max(self.clusters, key=self._size)

    @property
    def label(self) -> str | None:
        return self.winner[0] if self.winner else None

    @property
    def agreement(self) -> float:
        return self._size(self.winner or ()) / self.group_size

    def reward(self, answer: str | None) -> float | None:
        if self.winner is None or answer in self.undecided:
            return None
        return float(answer in self.winner)

    def _size(self, answers: Iterable[str]) -> int:
        return sum(self.counts[answer] for answer in answers)

    def _best(self) -> int:
        return max(map(self._size, self.clusters), default=0)


def _of_all_processes(rows: list) -> list:
    """Gather rows, in the order of the processes. Every process has to take part."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


_default: MajorityReward | None = None


def majority_reward(
    completions: list[str] | list[list[dict]],
    prompts: list[str] | list[list[dict]],
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    [`MajorityReward`] with its defaults: 1.0 for agreement with the most frequent answer of the prompt's completions, 0.0 for
    another answer or none, None where no answer is most frequent.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Texts, or lists of messages of which the last holds the answer.
        prompts (`list[str]` or `list[list[dict]]`):
            The prompt of each completion; equal prompts are one group, of all processes.
        log_extra (`Callable`, *optional*):
            Gets the columns `answer` and `majority`.
        log_metric (`Callable`, *optional*):
            Gets `majority_reward/labelled` and `majority_reward/agreement`.
        **kwargs:
            Other columns; not used.

    Returns:
        `list[float | None]`: rewards in the order of the completions.

    Raises:
        ImportError: Math-Verify or pint is not installed.

    Example:
    ```python
    >>> majority_reward([r"\boxed{4}", r"\boxed{4.0}", r"\boxed{5}"], prompts=["2+2="] * 3)
    [1.0, 1.0, 0.0]
    ```
    """
    global _default
    if _default is None:
        _default = MajorityReward()
    return _default(completions, prompts, log_extra=log_extra, log_metric=log_metric, **kwargs)
