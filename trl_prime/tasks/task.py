"""A task as a PRIME run takes it, and folders that are made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        environment: TRL's `environment_factory`, where a completion has several turns.
    """

    name: str
    model: str
    train_dataset: Dataset
    eval_dataset: Dataset
    reward_funcs: list[Callable[..., list[float]]]
    step_labels: Callable[[str, str], list[bool]] | None = None
    environment: Callable[[], Any] | None = None


# What ends a step in the tasks whose completions are lines
STEP_DELIMITER = "\n"


def split_lines(completion: str) -> list[str]:
    """The lines of a completion. A delimiter at its end ends the last line and starts no new one."""
    return completion.removesuffix(STEP_DELIMITER).split(STEP_DELIMITER) if completion else []


def made_once(folder: Path, settings: Mapping[str, Any], make: Callable[[], None]) -> None:
    """Make a folder, unless it was made by the same settings before. Call it from one process only.

    Args:
        folder: The folder that `make` fills. The settings are recorded beside it, in `<folder>.json`.
        settings: All that the content depends on, of types that JSON has.
        make: Makes the content; may find that of other settings.
    """
    record = folder.with_name(f"{folder.name}.json")
    if record.exists() and json.loads(record.read_text()) == settings:
        return
    # The record is removed first and written last, so that an interrupted run leaves no record of a folder that it did not finish
    record.unlink(missing_ok=True)
    make()
    record.write_text(json.dumps(settings, indent=2) + "\n")
