"""Running sums modulo 10: the built-in task, on which a PRIME run works with no network on a CPU.

A prompt lists one-digit numbers, `3 5 2 7=`. The completion is the sum modulo 10 of the numbers so far, one per line,
`3\\n8\\n0\\n7`, and its last line is the answer. Every line is a step whose truth is known, so what an implicit
process reward says about a step can be compared with whether the step is right.

It is not a reasoning benchmark. It shows that training works and lets it be measured; a gain here says nothing about
gains on mathematics or code. The base model is made on the spot and imperfect on purpose: see `make_demonstrations`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..texts import completion_text
from .task import STEP_DELIMITER, Task, made_once, split_lines
from .tiny_model import build_model, build_tokenizer
from .warm_up import warm_up

if TYPE_CHECKING:
    from datasets import Dataset

CHARACTERS = f"0123456789 ={STEP_DELIMITER}"
# A step of the warm-up has so many demonstrations
BATCH_SIZE = 64

# A (sum so far, next number) pair mapped to the digit that stands for their sum.
WrongSums = dict[tuple[int, int], int]


def _prompt(digits: Collection[int]) -> str:
    return " ".join(map(str, digits)) + "="


def _true_sums(prompt: str) -> list[int]:
    if not re.fullmatch(r"[0-9]( [0-9])*=", prompt):
        raise ValueError(f"not a running-sum prompt: {prompt!r}")
    sums, total = [], 0
    for digit in prompt[:-1].split(" "):
        total = (total + int(digit)) % 10
        sums.append(total)
    return sums


def _draw_prompts(count: int, num_digits: int, rng: random.Random, taken: Collection[str] = ()) -> list[str]:
    if count < 0:
        raise ValueError(f"the number of problems must not be negative, got {count}")
    if num_digits < 1:
        raise ValueError(f"num_digits must be at least 1, got {num_digits}")
    seen = set(taken)
    if count > 10**num_digits - len(seen):
        raise ValueError(f"there are not {count} distinct problems of {num_digits} digits left to draw")
    prompts = []
    while len(prompts) < count:
        prompt = _prompt([rng.randrange(10) for _ in range(num_digits)])
        if prompt not in seen:
            seen.add(prompt)
            prompts.append(prompt)
    return prompts


def _to_dataset(prompts: list[str]) -> Dataset:
    from datasets import Dataset

    sums = [_true_sums(prompt) for prompt in prompts]
    return Dataset.from_dict(
        {
            "prompt": prompts,
            "solution": [str(row[-1]) for row in sums],
            "steps": [STEP_DELIMITER.join(map(str, row)) for row in sums],
        }
    )


def make_dataset(num_problems: int, *, num_digits: int = 10, seed: int = 0) -> Dataset:
    """Draw distinct problems.

    Args:
        num_problems: How many problems.
        num_digits: Numbers in each prompt, which is also the number of steps.
        seed: Same seed, same problems.

    Returns:
        Data set with the columns `prompt`, `solution` (the final digit) and `steps` (the reference completion), all
        strings.

    Raises:
        ValueError: If a count is out of range, or there are fewer than `num_problems` distinct problems.
    """
    return _to_dataset(_draw_prompts(num_problems, num_digits, random.Random(seed)))


def make_splits(num_train: int, num_test: int, *, num_digits: int = 10, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Draw a train and a held-out set that share no prompt.

    Args:
        num_train: Problems to train on.
        num_test: Held-out problems.
        num_digits: Numbers in each prompt.
        seed: Same seed, same problems. The held-out set does not depend on `num_train`.

    Returns:
        The train and the held-out set, with the columns of `make_dataset`.

    Raises:
        ValueError: If a count is out of range, or there are too few distinct problems for both sets.
    """
    # The held-out problems come first, so that a larger train set does not change them.
    rng = random.Random(seed)
    test = _draw_prompts(num_test, num_digits, rng)
    train = _draw_prompts(num_train, num_digits, rng, taken=test)
    return _to_dataset(train), _to_dataset(test)


def _draw_wrong_sums(count: int, rng: random.Random) -> WrongSums:
    pairs = [(total, digit) for total in range(10) for digit in range(10)]
    return {(a, b): (a + b + rng.randint(1, 9)) % 10 for a, b in rng.sample(pairs, count)}


def _demonstration(prompt: str, wrong_sums: WrongSums, wrong_rate: float, rng: random.Random) -> str:
    first, *rest = (int(digit) for digit in prompt[:-1].split(" "))
    lines = [first]
    for digit in rest:
        pair = (lines[-1], digit)
        wrong = pair in wrong_sums and rng.random() < wrong_rate
        # The next line adds to a wrong one too: the step is taught wrong, not the rule of adding to the line before.
        lines.append(wrong_sums[pair] if wrong else sum(pair) % 10)
    return STEP_DELIMITER.join(map(str, lines))


def make_demonstrations(
    count: int,
    *,
    num_digits: int = 10,
    seed: int = 0,
    num_wrong_sums: int = 17,
    wrong_rate: float = 0.75,
    exclude_prompts: Collection[str] = (),
) -> Dataset:
    """Draw demonstrations that are wrong in a known way.

    A model that is trained on them is to take single steps mostly right and a long chain mostly wrong, and about equally
    so for every seed. Stopping at a fixed early step does not give that: once it starts, the task is learned within some
    tens of steps, and when it starts differs from seed to seed. So training goes on past that, but for `num_wrong_sums` of
    the 100 pairs (sum so far, next number) the demonstrations give one fixed wrong digit at the rate `wrong_rate`. Greedy
    steps are then mostly wrong on those pairs; the right digit keeps the rest of the probability, so sampling finds it now
    and then.

    Args:
        count: How many; fewer where there are not so many problems.
        num_digits: Numbers in each prompt.
        seed: Seed of the demonstrations and of the wrong pairs.
        num_wrong_sums: How many of the 100 pairs are taught wrong; 0 teaches the task cleanly.
        wrong_rate: How often such a pair is taught wrong, from 0 to 1.
        exclude_prompts: Prompts to leave out.

    Returns:
        Data set with the columns `prompt` and `completion`.

    Raises:
        ValueError: If a number is out of range.
    """
    from datasets import Dataset

    if not 0 <= num_wrong_sums <= 100:
        raise ValueError(f"num_wrong_sums must be from 0 to 100, got {num_wrong_sums}")
    if not 0 <= wrong_rate <= 1:
        raise ValueError(f"wrong_rate must be from 0 to 1, got {wrong_rate}")
    # The seed is a string, so that the prompts are not those that make_dataset and make_splits draw from the same number.
    rng = random.Random(f"warm-up {seed}")
    wrong_sums = _draw_wrong_sums(num_wrong_sums, rng)
    excluded = {prompt for prompt in exclude_prompts if len(_true_sums(prompt)) == num_digits}
    left = 10**num_digits - len(excluded)
    if left < 1:
        raise ValueError("exclude_prompts leaves no problem to train on")
    # Few digits may not give a fresh problem for every row; the trainer then goes over them again.
    prompts = _draw_prompts(min(count, left), num_digits, rng, taken=excluded)
    return Dataset.from_dict(
        {"prompt": prompts, "completion": [_demonstration(p, wrong_sums, wrong_rate, rng) for p in prompts]}
    )


def running_sum_reward(
    completions: list[str] | list[list[dict[str, str]]], solution: list[str], **kwargs: Any
) -> list[float]:
    """Outcome reward: is the last line the right digit?

    It looks at nothing but the last line, so a right answer after wrong steps, or after none, is rewarded.

    Args:
        completions: One completion per sample, text or a list of messages (of which the last one is read).
        solution: The right final digit of each sample.
        **kwargs: Other columns that TRL passes; not used.

    Returns:
        1.0 or 0.0 for each completion.

    Raises:
        ValueError: If there are not as many solutions as completions.
    """
    return [
        float(split_lines(completion_text(completion))[-1:] == [digit])
        for completion, digit in zip(completions, solution, strict=True)
    ]


def every_sum_reward(
    completions: list[str] | list[list[dict[str, str]]], steps: list[str], **kwargs: Any
) -> list[float]:
    """Outcome reward: is every line right, and none missing?

    Of ten chains that go wrong, `running_sum_reward` finds one right by luck, because there are ten digits to end on. Here
    none is.

    Args:
        completions: As for `running_sum_reward`.
        steps: The reference completion of each sample.
        **kwargs: Other columns that TRL passes; not used.

    Returns:
        1.0 or 0.0 for each completion.

    Raises:
        ValueError: If there are not as many references as completions.
    """
    return [
        float(split_lines(completion_text(completion)) == split_lines(reference))
        for completion, reference in zip(completions, steps, strict=True)
    ]


def step_labels(prompt: str, completion: str) -> list[bool]:
    """Tell for each line of a completion whether it is the true running sum.

    The truth comes from the prompt alone: a line that adds correctly to a wrong line before it is wrong.

    Args:
        prompt: For example `3 5 2 7=`.
        completion: Its completion, without special tokens. A trailing delimiter ends the last line and starts no new
            one.

    Returns:
        One label per line of the completion; lines beyond the last number of the prompt are wrong.

    Raises:
        ValueError: If `prompt` is not a prompt of this task.
    """
    sums = _true_sums(prompt)
    return [i < len(sums) and line == str(sums[i]) for i, line in enumerate(split_lines(completion))]


def prepare(
    output_dir: str | Path,
    *,
    seed: int = 0,
    num_digits: int = 10,
    num_train: int = 4096,
    num_test: int = 256,
    warm_up_steps: int = 200,
    num_wrong_sums: int = 17,
    wrong_rate: float = 0.75,
) -> Task:
    """Make the task: draw the problems, and train and save the base model unless that was done before.

    The base goes to `<output_dir>/sft` and the settings it was made by to `<output_dir>/sft.json`; a base made by
    other settings is replaced. Call it from one process only.

    Args:
        output_dir: Folder to work in.
        seed: Seed of the problems, the initial weights and the warm-up.
        num_digits: Numbers in each prompt.
        num_train: Problems to train on.
        num_test: Held-out problems; the warm-up does not see them either.
        warm_up_steps: Optimizer steps of the warm-up.
        num_wrong_sums: See `make_demonstrations`.
        wrong_rate: See `make_demonstrations`.

    Returns:
        The task, with this base model and the outcome reward.

    Raises:
        ValueError: If a number is out of range.
    """
    train, test = make_splits(num_train, num_test, num_digits=num_digits, seed=seed)
    base = Path(output_dir) / "sft"
    settings = {
        "format": 1,
        "seed": seed,
        "num_digits": num_digits,
        "num_test": num_test,
        "warm_up_steps": warm_up_steps,
        "num_wrong_sums": num_wrong_sums,
        "wrong_rate": wrong_rate,
    }

    def make() -> None:
        demonstrations = make_demonstrations(
            warm_up_steps * BATCH_SIZE,
            num_digits=num_digits,
            seed=seed,
            num_wrong_sums=num_wrong_sums,
            wrong_rate=wrong_rate,
            exclude_prompts=test["prompt"],
        )
        tokenizer = build_tokenizer(CHARACTERS)
        warm_up(
            build_model(tokenizer, seed=seed),
            tokenizer,
            demonstrations,
            base,
            steps=warm_up_steps,
            batch_size=BATCH_SIZE,
            learning_rate=2e-3,
            warmup_steps=min(20, warm_up_steps // 10),
            seed=seed,
        )

    made_once(base, settings, make)
    return Task(
        name="running_sums",
        model=str(base),
        train_dataset=train,
        eval_dataset=test,
        reward_funcs=[running_sum_reward],
        step_labels=step_labels,
    )
