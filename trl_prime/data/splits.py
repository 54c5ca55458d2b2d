"""A held-out part of a data set, without a prompt that is on both sides."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from ..texts import prompt_text

if TYPE_CHECKING:
    from datasets import Dataset


def check_split_size(size: float) -> None:
    """Raise a ValueError unless a size is a share between 0 and 1, or a whole number from 2 on: 1 could be either."""
    if not 0 < size < 1 and not (size > 1 and float(size).is_integer()):
        raise ValueError(
            f"eval_split_size is {size:g}. Give a whole number of prompts, 2 or more, or a share of them between 0 and 1."
        )


def split_by_prompt(dataset: Dataset, size: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Hold out some of the prompts with all of their rows. Prompts that differ in white space alone count as the same.

    Args:
        dataset ([`~datasets.Dataset`]): Rows with a `prompt`, text or messages.
        size (`float`): A number of prompts, or a share of them, which is rounded up to whole ones.
        seed (`int`): Seed of the choice.

    Returns:
        `tuple[Dataset, Dataset]`: the rest and the held-out rows, both in their order.

    Raises:
        ValueError: The size is neither, see [`check_split_size`], or nothing would be left to train on.
    """
    check_split_size(size)
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(dataset["prompt"][:]):
        groups.setdefault(" ".join(prompt_text(prompt).split()), []).append(row)
    num_held_out = math.ceil(size * len(groups)) if size < 1 else int(size)
    if num_held_out >= len(groups):
        raise ValueError(
            f"eval_split_size is {size:g}, which holds out {num_held_out} prompts, but the data set has {len(groups)} different "
            "ones, and some have to be left to train on. Give a smaller one."
        )
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    held_out = sorted(row for rows in shuffled[:num_held_out] for row in rows)
    rest = sorted(row for rows in shuffled[num_held_out:] for row in rows)
    return dataset.select(rest), dataset.select(held_out)
