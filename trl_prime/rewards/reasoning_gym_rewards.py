"""The scorers of reasoning-gym's tasks serve as an outcome reward, right or wrong.

A row's `tests` is the JSON object {"task", "config", "entry"} that the adapter writes. *Not covered* are tasks whose scorer
runs the answer as Python (`eval`, or sympy's `parse_expr`, which is `eval` too): the answer is written by a model
that is rewarded for what the scorer says, and the scorer runs in the training process. `load_scorer` refuses them.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from ..texts import completion_text

# These names turn text into running code
RUNS_CODE = {"eval", "exec", "parse_expr", "sympify"}
# This function evaluates the problem and converts the answer by `int` (read in reasoning-gym 0.1.25)
_RUNS_THE_PROBLEM = {"reasoning_gym.arithmetic.bitwise_arithmetic.verify_solution"}


def reasoning_gym_reward(
    completions: list,
    tests: list[str | None],
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward 1 where the scorer of the row's task gives full marks, else 0. The scorers give partial credit down to any text at all
    (0.01 to 0.9), which says nothing about being right, so there is nothing between. An answer on which a scorer raises
    is wrong: some parse without checking.

    The answer is the last `<answer>...</answer>`, else the last `\boxed{}` (without inner braces), else the whole text.

    Args:
        completions (`list`): (B,) completions, as strings or messages.
        tests (`list[str | None]`): (B,) JSON objects with `task`, `config` and `entry`; None is not judged.
        log_extra, log_metric (`Callable`, *optional*): TRL's hooks; the extracted answers are logged.
        kwargs: Further columns, unused.

    Returns:
        `list[float | None]`: (B,) rewards, 0 or 1, or None where `tests` is.

    Raises:
        ValueError: A row's task is unknown or refused, see `load_scorer`.
    """
    answers = [extract_answer(completion) for completion in completions]
    rewards = [
        None if test is None else float(is_right(answer, test)) for answer, test in zip(answers, tests, strict=True)
    ]
    if log_extra is not None:
        log_extra("answer", answers)
    return rewards


def extract_answer(completion: str | list[dict[str, str]]) -> str:
    r"""Take the last `<answer>`, else the last `\boxed{}`, else the whole text."""
    text = completion_text(completion)
    for pattern in (r"<answer>(.*?)</answer>", r"\\boxed\{([^{}]*)\}"):
        found = re.findall(pattern, text, flags=re.DOTALL)
        if found:
            return found[-1].strip()
    return text.strip()


def is_right(answer: str, test: str) -> bool:
    """Tell whether the scorer gives full marks; see `reasoning_gym_reward`."""
    row = json.loads(test)
    score = load_scorer(row["task"], json.dumps(row["config"], sort_keys=True))
    try:
        return score(answer, row["entry"]) >= 1
    except Exception:
        return False


@functools.lru_cache(maxsize=256)
def load_scorer(task: str, config: str = "{}") -> Callable[[str, dict[str, Any]], float]:
    """
    Load the scorer of a reasoning-gym task.

    Args:
        task (`str`): Its name.
        config (`str`): Its settings, a JSON object; a few scorers depend on them.

    Returns:
        `Callable`: score of an answer and an entry, full marks being 1.

    Raises:
        ValueError: The task is unknown, its settings are wrong, or its scorer runs answers as Python.
    """
    scorer = make_task(task, json.loads(config)).score_answer
    names = sorted(_runs_code(scorer))
    if names:
        raise ValueError(
            f"reasoning-gym's scorer of {task!r} runs the model's answer as Python (by {', '.join(names)}), which is not "
            "safe in the training process. Choose another task."
        )
    return scorer


def make_task(task: str, config: dict[str, Any]) -> Any:
    """
    Make a reasoning-gym data set, which makes problems and scores answers.

    Args:
        task (`str`): Its name.
        config (`dict`): Its settings, `size` and `seed` among them.

    Returns:
        `reasoning_gym.dataset.ProceduralDataset`: the data set.

    Raises:
        ValueError: The task is unknown or its settings are wrong.
        ImportError: reasoning-gym is not installed.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ImportError(
            f"reasoning-gym's tasks need the package and its requirements ({error}). Install them by "
            "`pip install reasoning-gym`."
        ) from error

    from ..specs import nearest

    # A composite hands answers on to other tasks' scorers, past the check of `load_scorer`
    if task == "composite":
        raise ValueError("reasoning-gym's 'composite' is not offered. Load its tasks one by one and concatenate them.")
    if task not in DATASETS:
        raise ValueError(f"The reasoning-gym task {task!r} is unknown. {nearest(task, sorted(DATASETS))}")
    try:
        return create_dataset(task, **config)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's task {task!r} does not take the settings {config}: {error}.") from error


def _runs_code(scorer: Callable) -> set[str]:
    """Find the names of `RUNS_CODE` that a scorer uses, itself or through functions, methods and classes of its package."""
    package, task = _package(scorer), type(scorer.__self__)
    found: set[str] = set()
    seen: set[FunctionType] = set()
    waiting = [scorer.__func__]
    while waiting:
        function = waiting.pop()
        if function in seen or f"{function.__module__}.{function.__qualname__}" in _RUNS_THE_PROBLEM:
            continue
        seen.add(function)
        for name in _names(function.__code__):
            value, method = function.__globals__.get(name), getattr(task, name, None)
            # reasoning-gym has a parser of its own, which is safe, and an import can rename one that is not
            if _package(value) != package:
                found |= {name, getattr(value, "__name__", name)} & RUNS_CODE
            waiting += [inner for own in (value, method) if _package(own) == package for inner in _functions(own)]
    return found


def _names(code: CodeType) -> set[str]:
    """List the names that a function uses, inner functions and comprehensions included."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None)).partition(".")[0]


def _functions(value: Any) -> list[FunctionType]:
    """Take the decorators off a function, or list the functions of a class."""
    members = vars(value).values() if isinstance(value, type) else [value]
    functions = (inspect.unwrap(getattr(member, "__func__", member)) for member in members)
    return [function for function in functions if isinstance(function, FunctionType)]
