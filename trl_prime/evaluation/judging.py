"""The outcomes of sampled completions: a reward function is called as a trainer calls it, without a trainer."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def as_completions(prompts: Sequence[Any], texts: Sequence[str]) -> list[Any]:
    """
    Sampled texts in the format of their prompts.

    Args:
        prompts (`list`): N prompts, text or messages.
        texts (`list[str]`): The text that was sampled for each.

    Returns:
        `list[str]` or `list[list[dict]]`: a text for a text, one assistant message for messages.
    """
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def judge(
    reward_func: Callable, problems: Dataset, completions: Sequence[Any]
) -> tuple[list[float | None], dict[str, list]]:
    """
    Rewards of completions.

    Args:
        reward_func (`Callable`): Outcome reward in TRL's form, plain or async.
        problems ([`~datasets.Dataset`]): N rows with a `prompt` and the columns that `reward_func` reads.
        completions (`list`): A completion for each row, in the format of its prompt.

    Returns:
        `tuple[list[float | None], dict[str, list]]`: a reward for each row, None where the function could not judge; and the
        columns that it logs.
    """
    logged: dict[str, list] = {}
    rewards = reward_func(
        prompts=problems["prompt"][:],
        completions=list(completions),
        completion_ids=None,
        trainer_state=None,
        log_extra=logged.__setitem__,
        log_metric=lambda *_: None,
        **{name: problems[name][:] for name in problems.column_names if name not in ("prompt", "completion")},
    )
    if inspect.isawaitable(rewards):
        rewards = asyncio.run(rewards)
    return [None if reward is None else float(reward) for reward in rewards], logged
