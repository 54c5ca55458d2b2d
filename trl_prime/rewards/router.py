"""One reward function serves a mixed data set: every row goes to the verifier of its kind.

The kind of a row is what its `ability` says. Where that is empty, its `data_source` is looked up in `DATA_SOURCES`; where
that is empty or not in the table, the columns decide: `solution` alone is mathematics, `tests` alone is code. An ability
that names another kind is final: a logic puzzle has a solution too, but the math verifier would judge it wrongly. Rows
of unknown kind get None, which the trainer leaves out, and their share is logged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from .registry import load_verifier

# Kinds map to patterns of data set names, without the owner, in lower case, with `_` for `-`
DATA_SOURCES = {
    "math": (
        "numina_*",
        "numinamath*",
        "gsm8k*",
        "math",
        "math_*",
        "math500",
        "hendrycks_math",
        "competition_math",
        "aime*",
        "amc*",
        "minerva*",
        "olympiadbench*",
        "deepmath*",
        "deepscaler*",
        "dapo_math*",
        "openr1_math*",
        "orca_math*",
    ),
    "code": (
        "apps",
        "codecontests",
        "code_contests",
        "codeforces",
        "taco",
        "*humaneval*",
        "mbpp*",
        "leetcode*",
        "livecodebench*",
    ),
}
# Every kind maps to the column that its verifier reads
TRUTH_COLUMN = {"math": "solution", "code": "tests", "reasoning_gym": "tests"}


class VerifierReward:
    """
    Outcome reward that picks the verifier by the row. Each verifier is called once, with all its rows in their order.

    Args:
        math (`Callable` or `dict`, *optional*): Reward function of the mathematics rows, or options of `MathReward`.
            Defaults to `math_reward`.
        code (`Callable` or `dict`, *optional*): The same of code rows; `CodeReward`, `code_reward`.
        reasoning_gym (`Callable`, *optional*): The same of reasoning-gym rows. Defaults to `reasoning_gym_reward`.

    Example:

    ```python
    reward = VerifierReward(code={"scoring": "fraction"})
    reward(completions, ability=["math", "code"], solution=["4", None], tests=[None, '{"asserts": ["assert f() == 1"]}'])
    ```
    """

    def __init__(
        self,
        math: Callable | Mapping[str, Any] | None = None,
        code: Callable | Mapping[str, Any] | None = None,
        reasoning_gym: Callable | None = None,
    ):
        self.__name__ = "verifier_reward"
        # Options are applied here and now, so that a wrong one ends the run before it starts
        self.verifiers: dict[str, Callable | None] = {
            "math": _from_options("math", math),
            "code": _from_options("code", code),
            "reasoning_gym": reasoning_gym,
        }

    def __call__(
        self,
        completions: list,
        ability: list[str | None] | None = None,
        data_source: list[str | None] | None = None,
        solution: list[str | None] | None = None,
        tests: list[str | None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float | None]:
        """
        Judge a batch.

        Args:
            completions (`list`): (B,) completions, as strings or messages.
            ability (`list[str | None]`, *optional*): (B,) kind of each row: `"math"`, `"code"` or `"reasoning_gym"`.
            data_source (`list[str | None]`, *optional*): (B,) name of the data set that the row is from.
            solution (`list[str | None]`, *optional*): (B,) right answers of the mathematics rows.
            tests (`list[str | None]`, *optional*): (B,) tests of the code rows, as the code reward takes them.
            log_extra, log_metric (`Callable`, *optional*): TRL's hooks. A column that a verifier logs comes out in the
                length of the batch, with None for the rows of other kinds.
            kwargs: Further columns (lists of B values are cut to the verifier's rows) and anything else (passed on).

        Returns:
            `list[float | None]`: (B,) rewards; None where the kind is unknown or the verifier cannot judge.

        Raises:
            ValueError: The column is missing that a verifier with rows in the batch reads, or it returned too few
                rewards. What a verifier raises is not caught.
        """
        batch_size = len(completions)
        columns = {"ability": ability, "data_source": data_source, "solution": solution, "tests": tests}
        kinds = [
            row_kind(*(None if values is None else values[i] for values in columns.values()))
            for i in range(batch_size)
        ]
        kwargs |= {name: values for name, values in columns.items() if values is not None}
        rewards: list[float | None] = [None] * batch_size
        extra: dict[str, list] = {}
        for kind in self.verifiers:
            rows = [i for i in range(batch_size) if kinds[i] == kind]
            if not rows:
                continue
            if TRUTH_COLUMN[kind] not in kwargs:
                raise ValueError(
                    f"{len(rows)} of {batch_size} rows are {kind}, but the data set has no column "
                    f"{TRUTH_COLUMN[kind]!r}, which their verifier reads. Load it with a dataset_format that makes it."
                )
            judged = self._verifier(kind)(
                completions=[completions[i] for i in rows],
                log_extra=functools.partial(_scatter_column, extra, rows, batch_size) if log_extra else None,
                log_metric=log_metric,
                **{name: _select(values, rows, batch_size) for name, values in kwargs.items()},
            )
            if len(judged) != len(rows):
                raise ValueError(f"The {kind} verifier returned {len(judged)} rewards for {len(rows)} completions.")
            for i, reward in zip(rows, judged, strict=True):
                rewards[i] = reward
        for name, values in extra.items():
            log_extra(name, values)
        if log_metric is not None and batch_size:
            log_metric("verifier/unknown_kind", kinds.count(None) / batch_size)
        return rewards

    def _verifier(self, kind: str) -> Callable:
        # A verifier is imported when a row of its kind comes, so that mathematics needs no sandbox and code no Math-Verify
        if self.verifiers[kind] is None:
            self.verifiers[kind] = load_verifier(kind)
        return self.verifiers[kind]


def row_kind(
    ability: str | None = None, data_source: str | None = None, solution: str | None = None, tests: str | None = None
) -> str | None:
    """
    Tell the kind of a row, see the top of this file.

    Args:
        ability, data_source, solution, tests (`str`, *optional*): What the row says.

    Returns:
        `str` or `None`: `"math"`, `"code"`, `"reasoning_gym"`, or None where it is unknown.
    """
    if ability and ability.strip():
        kind = ability.strip().casefold()
        return kind if kind in TRUTH_COLUMN else None
    kind = data_source_kind(data_source or "")
    if kind is not None:
        return kind
    if bool(solution) != bool(tests):
        return "math" if solution else "code"
    return None


@functools.lru_cache(maxsize=1024)
def data_source_kind(data_source: str) -> str | None:
    """
    Tell the kind of a data set by its name.

    Args:
        data_source (`str`): For instance `"numina_olympiads"`, `"openai/gsm8k"`, `"HuggingFaceH4/MATH-500"`, `"taco"`.

    Returns:
        `str` or `None`: its key in `DATA_SOURCES`.
    """
    name = data_source.strip().casefold().replace("-", "_").rpartition("/")[2]
    for kind, patterns in DATA_SOURCES.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return kind
    return None


def _from_options(kind: str, verifier: Callable | Mapping[str, Any] | None) -> Callable | None:
    if not isinstance(verifier, Mapping):
        return verifier
    return load_verifier(kind, dict(verifier))


def _select(values: Any, rows: list[int], batch_size: int) -> Any:
    """Select rows of a column; a value that is no column stays as it is."""
    return [values[i] for i in rows] if isinstance(values, (list, tuple)) and len(values) == batch_size else values


def _scatter_column(extra: dict[str, list], rows: list[int], batch_size: int, name: str, values: list) -> None:
    column = extra.setdefault(name, [None] * batch_size)
    for i, value in zip(rows, values, strict=True):
        column[i] = value


# All who ask for the router by name share this one, and with it the verifiers' pools
_DEFAULT = VerifierReward()


def verifier_reward(
    completions: list,
    ability: list[str | None] | None = None,
    data_source: list[str | None] | None = None,
    solution: list[str | None] | None = None,
    tests: list[str | None] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """
    Outcome reward by the verifier of each row's kind: [`VerifierReward`] with default verifiers; its arguments.

    Returns:
        `list[float | None]`: (B,) rewards; None where the kind is unknown or the verifier cannot judge.
    """
    return _DEFAULT(completions, ability, data_source, solution, tests, log_extra, log_metric, **kwargs)
