"""The table of data formats says which columns and options each takes, and which columns it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features, Value

from . import rows

# The PRIME authors append these to every prompt of their data and in the model card of Eurus-2
PROMPT_SUFFIXES = {
    "math": "Present the answer in LaTex format: \\boxed{Your answer}",
    "code": "Write Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.",
}

_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
# Types are stated because a column of nothing but None would get another type, and data sets could not be concatenated
PROMPT_FEATURES = Features(
    {
        "prompt": _MESSAGES,
        "solution": Value("string"),
        "tests": Value("string"),
        "ability": Value("string"),
        "data_source": Value("string"),
        "index": Value("string"),
    }
)
SFT_FEATURES = Features({"messages": _MESSAGES, "data_source": Value("string"), "index": Value("string")})
PROCESS_BENCH_FEATURES = Features(
    {"prompt": _MESSAGES, "steps": [Value("string")], "label": Value("int64"), "index": Value("string")}
)


@dataclass(frozen=True)
class DatasetFormat:
    """
    This is how rows of one kind of data set are adapted.

    Attributes:
        adapt: Makes the adapted row of the columns below and of options.
        columns: Argument of `adapt` -> name of the column, or names of which the first present is taken. An option of the
            argument's name gives another column.
        optional: The same for columns that may be missing.
        options: Options that make `adapt` fit this format.
        features: Columns of the adapted data set.
        generate: Makes the rows, where there is nothing to load.
    """

    adapt: Callable[..., dict[str, Any]]
    columns: dict[str, str | tuple[str, ...]]
    optional: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    features: Features = field(default_factory=lambda: PROMPT_FEATURES)
    generate: Callable[..., Dataset] | None = None


_INDEX = {"index": ("index", "id", "unique_id", "task_id")}
DATASET_FORMATS = {
    "eurus2_rl": DatasetFormat(
        rows.eurus2_rl,
        {name: name for name in ("prompt", "reward_model", "ability", "data_source")},
        {"extra_info": "extra_info"},
    ),
    "eurus2_sft": DatasetFormat(
        rows.eurus2_sft,
        {"conversations": "conversations"},
        {"system": "system", "source": ("dataset", "source"), **_INDEX},
        features=SFT_FEATURES,
    ),
    "humaneval": DatasetFormat(rows.humaneval, {name: name for name in ("prompt", "test", "entry_point")}, _INDEX),
    "leetcode": DatasetFormat(
        rows.leetcode,
        {"question": ("prompt_sft", "query"), "test": "test"},
        {"prompt": "prompt", "entry_point": "entry_point", **_INDEX},
    ),
    "mbpp": DatasetFormat(
        rows.mbpp,
        {"question": ("text", "prompt"), "asserts": "test_list"},
        {"setup": "test_setup_code", "imports": "test_imports", "code": "code", **_INDEX},
    ),
    "gsm8k": DatasetFormat(
        rows.question_answer,
        {"question": "question", "answer": "answer"},
        _INDEX,
        {"worked_solution": True, "data_source": "gsm8k"},
    ),
    "math500": DatasetFormat(
        rows.question_answer,
        {"question": "problem", "answer": ("answer", "expected_answer")},
        _INDEX,
        {"data_source": "math500"},
    ),
    "math": DatasetFormat(
        rows.question_answer,
        {"question": "problem", "answer": "solution"},
        _INDEX,
        {"worked_solution": True, "data_source": "math"},
    ),
    "question_answer": DatasetFormat(
        rows.question_answer,
        {"question": ("question", "problem"), "answer": ("answer", "final_answer", "solution")},
        {"source": ("data_source", "source"), **_INDEX},
    ),
    "process_bench": DatasetFormat(
        rows.process_bench,
        {name: name for name in ("problem", "steps", "label")},
        _INDEX,
        features=PROCESS_BENCH_FEATURES,
    ),
    "reasoning_gym": DatasetFormat(
        rows.reasoning_gym,
        {name: name for name in ("question", "answer", "tests")},
        {"index": "index"},
        generate=rows.reasoning_gym_rows,
    ),
}
