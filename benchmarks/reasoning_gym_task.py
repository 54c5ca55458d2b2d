"""A task of reasoning-gym with a small base model, beside the built-in one: `spell_backward`, 7 to 10 letters.

Problems, gold answers and the judge are reasoning-gym's, through the package's adapter and `reasoning_gym_reward`. A
question becomes its word alone, in small letters, with `=` behind it: `granite=`. The answer is the word backward,
`etinarg`; the judge does not tell small letters from capitals. The base learns from gold answers to other words, in
which some letters are mostly written as a fixed wrong one, see `corrupt`. What there is to learn is these letters, so
a gain says nothing about reasoning-gym at large. A letter is a step and a token. Not covered: the English of the question.

Needs `pip install reasoning-gym`.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from trl_prime.tasks.task import Task, made_once
from trl_prime.tasks.tiny_model import build_model, build_tokenizer
from trl_prime.tasks.warm_up import warm_up

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "spell_backward"
MIN_LETTERS, MAX_LETTERS = 7, 10
# The end of the sequence is one token more
MAX_COMPLETION_LENGTH = MAX_LETTERS + 1
NUM_TRAIN, NUM_HELD_OUT, NUM_DEMONSTRATIONS = 4096, 256, 32_000
# Training on gold answers and stopping at one word in six gave a base from which outcome rewards gained less than 0.1
WARM_UP_STEPS, BATCH_SIZE, LEARNING_RATE = 800, 64, 2e-3
# Letters that are taught wrong are at most this share of the text, and are written wrong at this rate
WRONG_SHARE, WRONG_RATE = 0.2, 0.75


def load_problems(split: str, seed: int, count: int, taken: set[str]) -> Dataset:
    """`count` problems whose words are not among `taken`, to which they are added; only the words as prompts."""
    from trl_prime.data.adapters import load_prime_dataset

    # Row i of reasoning-gym depends on seed + i alone: seeds side by side would give the same problems.
    # More rows than needed, because words come twice
    config = f"size={count * 3 // 2 + 100}, seed={seed * 1_000_000}"
    lengths = f"min_word_len={MIN_LETTERS}, max_word_len={MAX_LETTERS}"
    dataset = load_prime_dataset(NAME, f"reasoning_gym({config}, {lengths})", split=split)
    rows, prompts = [], []
    for row, answer in enumerate(dataset["solution"]):
        prompt = answer[::-1].lower() + "="
        if prompt not in taken and len(rows) < count:
            taken.add(prompt)
            rows.append(row)
            prompts.append(prompt)
    if len(rows) < count:
        raise ValueError(f"reasoning-gym gave {len(rows)} new words for {split!r}, and {count} are needed")
    return dataset.select(rows).remove_columns("prompt").add_column("prompt", prompts)


def corrupt(answers: list[str], seed: int) -> list[str]:
    """
    Answers in which some letters are written as a fixed other one at `WRONG_RATE`.

    Letters are drawn as long as together they make up no more than `WRONG_SHARE` of the text, so that common and rare
    ones give bases about equally good.
    """
    rng = random.Random(f"wrong letters {seed}")
    counts = Counter("".join(answers))
    wrong: dict[str, str] = {}
    left = WRONG_SHARE * counts.total()
    for letter in rng.sample(string.ascii_lowercase, 26):
        if counts[letter] <= left:
            left -= counts[letter]
            wrong[letter] = rng.choice(string.ascii_lowercase.replace(letter, ""))
    return ["".join(wrong[c] if c in wrong and rng.random() < WRONG_RATE else c for c in answer) for answer in answers]


def letter_labels(prompt: str, completion: str) -> list[bool]:
    """Whether each letter of the answer is right and, last, whether it ends where it should."""
    answer = prompt.removesuffix("=")[::-1]
    letters = [i < len(answer) and letter == answer[i] for i, letter in enumerate(completion)]
    return [*letters, len(completion) == len(answer)]


def prepare_reasoning_gym(folder: Path, seed: int) -> tuple[Task, int]:
    """
    The problems and the base model, which is made and saved to `<folder>/sft` unless it is there with these settings.

    Args:
        folder (`Path`): Folder of this seed alone.
        seed (`int`): Seed of the problems, the initial weights and the order of the demonstrations.

    Returns:
        `tuple[Task, int]`: the task, and the longest completion in tokens.

    Raises:
        ImportError: reasoning-gym is not installed.
    """
    from datasets import Dataset

    from trl_prime.rewards.reasoning_gym_rewards import reasoning_gym_reward

    taken: set[str] = set()
    held_out = load_problems("test", seed, NUM_HELD_OUT, taken)
    train = load_problems("train", seed, NUM_TRAIN, taken)
    base = folder / "sft"
    settings = {
        "format": 1,
        "seed": seed,
        "task": NAME,
        "letters": [MIN_LETTERS, MAX_LETTERS],
        "num_train": NUM_TRAIN,
        "num_held_out": NUM_HELD_OUT,
        "num_demonstrations": NUM_DEMONSTRATIONS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "warm_up_steps": WARM_UP_STEPS,
        "wrong": [WRONG_SHARE, WRONG_RATE],
    }

    def make() -> None:
        demonstrations = load_problems("warm-up", seed, NUM_DEMONSTRATIONS, taken)
        answers = corrupt([answer.lower() for answer in demonstrations["solution"]], seed)
        tokenizer = build_tokenizer(string.ascii_lowercase + "=")
        warm_up(
            build_model(tokenizer, seed=seed),
            tokenizer,
            Dataset.from_dict({"prompt": demonstrations["prompt"][:], "completion": answers}),
            base,
            steps=WARM_UP_STEPS,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            warmup_steps=20,
            use_cpu=True,
            seed=seed,
        )

    made_once(base, settings, make)
    task = Task(
        name=NAME,
        model=str(base),
        train_dataset=train,
        eval_dataset=held_out,
        reward_funcs=[reasoning_gym_reward],
        step_labels=letter_labels,
    )
    return task, MAX_COMPLETION_LENGTH
