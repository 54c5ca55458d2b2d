"""The outcome reward of code runs the completion's program against tests, in a sandbox."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

from ..sandbox import Limits, open_sandbox
from ..texts import completion_text
from .code_tests import ProblemTests, UnreadableTests, complete_prompt, read_tests, size_of
from .programs import defined_functions, flush_left, pick_solution, same_output, same_value

logger = logging.getLogger(__name__)
# This process prints each kind of warning once, and these it has printed
_warned: set[str] = set()


class CodeReward:
    """
    Outcome reward of code: the share of tests that the completion's program passes, or 1 where it passes all.

    An instance is a reward function for TRL. It reads the column `tests`, see
    [`~trl_prime.rewards.code_tests.read_tests`]. A completion without a program scores 0; a row without tests, or with tests
    that cannot be read, is None, which leaves it out of training.

    Args:
        scoring (`str`): `"all"`: 1.0 if every test passes, else 0.0, and the first failure ends it. `"fraction"`: share of
            passed tests.
        sandbox (`str`): See [`~trl_prime.sandbox.open_sandbox`].
        test_seconds (`float`): Time for one test.
        total_seconds (`float`): Time for all tests of one completion; tests beyond it count as failed.
        memory_mb (`int`): Memory of one program.
        float_tolerance (`float`): Of real numbers in outputs, absolute or relative.
        num_workers (`int`, *optional*): Programs that run at the same time. Defaults to the processors of this machine,
            shared among its training processes.
        packages (`list[str]`): Installed distributions that programs may import. Programs do without those that are not
            installed, which is said once.

    Raises:
        ValueError: An option has an impossible value.
        SandboxUnavailable: Programs cannot be run safely on this machine; says what to do.
    """

    def __init__(
        self,
        *,
        scoring: str = "all",
        sandbox: str = "auto",
        test_seconds: float = 5.0,
        total_seconds: float = 30.0,
        memory_mb: int = 1024,
        float_tolerance: float = 1e-6,
        num_workers: int | None = None,
        packages: list[str] | tuple[str, ...] = ("numpy", "sortedcontainers"),
    ):
        if scoring not in ("all", "fraction"):
            raise ValueError(f"scoring is {scoring!r}. Choose 'all' or 'fraction'.")
        for name, value in (
            ("test_seconds", test_seconds),
            ("total_seconds", total_seconds),
            ("memory_mb", memory_mb),
        ):
            if value <= 0:
                raise ValueError(f"{name} is {value}. Give a positive number.")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}. Give at least 1.")
        self.__name__ = "code_reward"
        self.scoring = scoring
        self.sandbox = sandbox
        self.packages = tuple(packages)
        self.limits = Limits(wall_seconds=test_seconds, memory_mb=memory_mb)
        self.total_seconds = total_seconds
        self.float_tolerance = float_tolerance
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.num_workers = num_workers or max(1, len(os.sched_getaffinity(0)) // local_processes)
        if not sandbox.startswith(("http://", "https://")):
            _warn_of_missing(self.packages)
        open_sandbox(sandbox, self.packages)  # fails now, not after an hour of loading and generating

    def __call__(
        self,
        completions: list[Any],
        tests: list[Any],
        entry_point: list[str | None] | None = None,
        prompts: list[Any] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        Score completions.

        Args:
            completions (`list`): B completions, texts or message lists.
            tests (`list`): The tests of each row.
            entry_point (`list[str]`, *optional*): The function under test of each row, for tests that do not say it.
            prompts (`list`, *optional*): B prompts. Where tests are HumanEval's `check(candidate)` alone, the function under
                test is the last one that prompt and completion define, else the last that the completion does.
            log_extra, log_metric (`Callable`, *optional*): TRL's; get the verdict of each row and the shares of
                completions without a program and of rows without tests.

        Returns:
            `list[float | None]`: B rewards.
        """
        count = len(completions)
        jobs = []
        read: dict[tuple, ProblemTests | None] = {}
        unreadable: dict[str, list[str]] = {}
        for completion, row, name, prompt in zip(
            completions, tests, entry_point or [None] * count, prompts or [None] * count, strict=True
        ):
            row_key = (row if isinstance(row, str) else json.dumps(row, default=str), name)
            if row_key not in read:
                try:
                    read[row_key] = read_tests(row, name)
                except UnreadableTests as error:
                    read[row_key] = None
                    unreadable.setdefault(error.kind, []).append(str(error))
            row_tests = read[row_key]
            text, source = completion_text(completion), None
            if row_tests and row_tests.unnamed:
                named = row_tests.named(defined_functions(text, _prompt_text(prompt)))
                source = solution_of(text, named) if named else None
                row_tests = named or row_tests
            elif row_tests:
                source = solution_of(text, row_tests)
            # Completions of a group often agree, and tests can be long, so equal ones share one verdict
            jobs.append((source, row_tests, (source, row_key, row_tests and row_tests.name)))
        for kind, errors in unreadable.items():
            _warn_once(
                kind,
                f"The tests of {len(errors)} rows cannot be read, so their completions are not judged: {errors[0]}",
            )
        distinct = {key: (source, row_tests) for source, row_tests, key in jobs if source is not None}
        with ThreadPoolExecutor(min(self.num_workers, max(1, len(distinct)))) as pool:
            results = dict(zip(distinct, pool.map(lambda job: self.judge(*job), distinct.values()), strict=True))
        rewards: list[float | None] = []
        verdicts = []
        for _, row_tests, key in jobs:
            reward, verdict = (None, "no tests") if row_tests is None else results.get(key, (0.0, "no program"))
            rewards.append(reward)
            verdicts.append(verdict)
        if log_extra:
            log_extra("code_verdict", verdicts)
        if log_metric and verdicts:
            log_metric("code_reward/no_program", verdicts.count("no program") / len(verdicts))
            log_metric("code_reward/no_tests", verdicts.count("no tests") / len(verdicts))
        return rewards

    def judge(self, source: str, tests: ProblemTests) -> tuple[float, str]:
        """
        Run one solution.

        Args:
            source (`str`): Its source.
            tests ([`ProblemTests`]): The tests.

        Returns:
            `tuple[float, str]`: the score, and a verdict to read: "passed" or what went wrong first.

        Raises:
            SandboxUnavailable: The sandbox failed, which says nothing of the solution.
        """
        outcomes = {"stdin": self._stdin, "call": self._call, "assert": self._assert}[tests.kind](source, tests)
        passed, verdict = 0, "passed"
        with contextlib.closing(outcomes):
            for number, problem in enumerate(islice(outcomes, len(tests.inputs)), start=1):
                if problem is None:
                    passed += 1
                elif verdict == "passed":
                    verdict = f"test {number}: {problem}"
                    if self.scoring == "all":
                        return 0.0, verdict
        if passed < len(tests.inputs) and verdict == "passed":
            verdict = "the program ended before its tests"
        score = passed / len(tests.inputs)
        return (score if self.scoring == "fraction" else float(score == 1)), verdict

    # Each of these yields one value a test: None if it passed, else what went wrong

    def _stdin(self, source: str, tests: ProblemTests) -> Iterator[str | None]:
        sandbox = open_sandbox(self.sandbox, self.packages)
        deadline = time.monotonic() + self.total_seconds
        for stdin, expected in zip(tests.inputs, tests.outputs, strict=True):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                yield "time limit of all tests"
                continue
            limits = replace(self._limits([expected]), wall_seconds=min(self.limits.wall_seconds, remaining))
            result = sandbox.run(source, stdin, limits)
            if result.reason:
                yield f"{result.reason} limit"
            elif result.exit_code != 0:
                yield (
                    result.stderr.decode(errors="replace").strip().rpartition("\n")[2]
                    or f"exit code {result.exit_code}"
                )
            elif same_output(result.stdout.decode(errors="replace"), expected, self.float_tolerance):
                yield None
            else:
                yield "wrong answer"

    def _call(self, source: str, tests: ProblemTests) -> Iterator[str | None]:
        sandbox = open_sandbox(self.sandbox, self.packages)
        calls, limits = tests.inputs, self._limits(tests.outputs)
        answers = sandbox.call(source, tests.name + tests.signature, calls, limits, self.total_seconds)
        with contextlib.closing(answers):
            for answer, expected in zip(answers, tests.outputs, strict=False):
                if not isinstance(answer, dict) or "value" not in answer:
                    yield _error(answer)
                elif any(
                    same_value(answer["value"], value, self.float_tolerance)
                    for value in ([expected, expected[0]] if tests.wrapped else [expected])
                ):
                    yield None
                else:
                    yield "wrong answer"

    def _limits(self, expected: list[Any]) -> Limits:
        """Make room for the longest expected output, white space and the marks of the wire included."""
        longest = max(map(size_of, expected))
        return replace(self.limits, output_bytes=max(self.limits.output_bytes, 2 * longest + (1 << 20)))

    def _assert(self, source: str, tests: ProblemTests) -> Iterator[str | None]:
        sandbox = open_sandbox(self.sandbox, self.packages)
        request = {"setup": tests.setup, "asserts": tests.inputs, "entry_point": tests.name, "names": tests.tested}
        answers = sandbox.examine(source, request, self.limits, self.total_seconds)
        with contextlib.closing(answers):
            for answer in answers:
                if isinstance(answer, dict) and answer.get("passed") is True:
                    yield None
                else:
                    yield str(answer.get("error") if isinstance(answer, dict) else "no verdict") or "failed"


def _error(answer: Any) -> str:
    problem = answer.get("error") if isinstance(answer, dict) else None
    return ": ".join(map(str, problem))[:300] if isinstance(problem, list) else "no answer"


def solution_of(completion: str, tests: ProblemTests) -> str | None:
    """
    Make the program to run: the completion's solution, after the problem's own code where it brings some (imports, helpers).

    Args:
        completion (`str`): Text of a completion.
        tests ([`ProblemTests`]): The problem's tests.

    Returns:
        `str` or `None`: None if the completion has no program.
    """
    source = pick_solution(completion, tests.names())
    if tests.prompt:
        if source is None:
            return tests.prompt + completion  # a base model goes on where the prompt ends
        if "__future__" not in source:
            return f"{complete_prompt(tests.prompt)}\n{source}"
    return source and flush_left(source)


def _prompt_text(prompt: Any) -> str:
    """Join the messages of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content")) for message in prompt or ())


def _warn_of_missing(packages: tuple[str, ...]) -> None:
    for name in packages:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            _warn_once(
                f"missing {name}",
                f"Programs cannot import {name}, which is not installed: those that need it score 0. Install it "
                f"(`pip install {name}`) or leave it out of `packages`.",
            )


def _warn_once(kind: str, message: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("%s", message)


_default: CodeReward | None = None


def code_reward(
    completions: list[Any],
    tests: list[Any],
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    Outcome reward of code with the default options of [`CodeReward`]: 1.0 where the completion's program passes all tests
    of its row, 0.0 where it does not, None where there are no tests.

    Args:
        completions (`list`): B completions, texts or message lists.
        tests (`list`): The tests of each row, see [`~trl_prime.rewards.code_tests.read_tests`].
        log_extra, log_metric (`Callable`, *optional*): TRL's.
        kwargs: Other columns, of which [`CodeReward`] takes `entry_point` and `prompts`.

    Returns:
        `list[float | None]`: B rewards.

    Raises:
        SandboxUnavailable: Programs cannot be run safely on this machine; says what to do.
    """
    global _default
    if _default is None:
        _default = CodeReward()
    return _default(completions, tests, log_extra=log_extra, log_metric=log_metric, **kwargs)
