"""What a PRIME run needs to know about a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Task:
    """A base model with the problems and rewards to train it on.

    Attributes:
        name: Short name of the task.
        model: Path of the base model and its tokenizer.
        train_dataset: Problems to train on; has a `prompt` column and whatever columns the rewards read.
        eval_dataset: Held-out problems with the same columns.
        reward_funcs: Outcome rewards in the form TRL calls them.
        step_labels: Maps `(prompt, completion)` to whether each step of the completion is right, or None where the
            task cannot tell.
    """

    name: str
    model: str
    train_dataset: Dataset
    eval_dataset: Dataset
    reward_funcs: list[Callable[..., list[float]]]
    step_labels: Callable[[str, str], list[bool]] | None = None
