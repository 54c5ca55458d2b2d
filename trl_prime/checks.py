"""The functions that a user passes to the trainer, with errors that name them and say what was wrong with their result.

Covered: reward functions, plain and async; rollout functions. Not covered: a function that never returns. It can do so
for good reasons, so a limit of time is its own affair: the verifiers in `rewards/` have one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

if TYPE_CHECKING:
    from .advantages import RewardCombination, RolloutRewards

logger = logging.get_logger(__name__)


def checked_reward_func(func: Callable, name: str) -> Callable:
    """
    A reward function whose errors name it.

    Args:
        func (`Callable`): Reward function in TRL's form, plain or async.
        name (`str`): Its name, which metrics have too.

    Returns:
        `Callable`: The same function. What it raises is raised on, with a note. It returns `list[float | None]`.

    Raises:
        TypeError: When called, if the result is no list, or has an entry that is neither a number nor None.
        ValueError: When called, if the result has another length than the completions.
    """

    def checked(rewards: Any, args: tuple, kwargs: dict[str, Any]) -> list[float | None]:
        if isinstance(rewards, (str, dict)) or not isinstance(rewards, Iterable):
            raise TypeError(
                f"The reward function '{name}' returned {rewards!r:.100}; return a list with one number per completion."
            )
        rewards = list(rewards)
        # TRL passes the completions by name. Who calls the function by hand may pass them by position, or leave them out.
        completions = kwargs.get("completions")
        if completions is None and args:
            completions = inspect.signature(func).bind(*args, **kwargs).arguments.get("completions")
        if completions is not None and len(rewards) != len(completions):
            raise ValueError(
                f"The reward function '{name}' returned {len(rewards)} rewards for {len(completions)} completions; return "
                "one per completion, None for one that it cannot judge."
            )
        return [number(reward, i) for i, reward in enumerate(rewards)]

    def number(reward: Any, i: int) -> float | None:
        try:
            if not isinstance(reward, str):
                return None if reward is None else float(reward)
        except (TypeError, ValueError, RuntimeError):
            pass
        raise TypeError(
            f"The reward function '{name}' returned {reward!r:.100} for completion {i}; return a number, or None for a "
            "completion that it cannot judge."
        )

    @contextlib.contextmanager
    def naming() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            note = f"This was raised in the reward function '{name}'."
            if hasattr(error, "add_note"):
                error.add_note(note)
            else:  # Python 3.10
                logger.error(note)
            raise

    if inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(func.__call__):

        @functools.wraps(func)
        async def wrapper(*args: Any, **kwargs: Any) -> list[float | None]:
            with naming():
                rewards = await func(*args, **kwargs)
            return checked(rewards, args, kwargs)
    else:

        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> list[float | None]:
            with naming():
                rewards = func(*args, **kwargs)
            return checked(rewards, args, kwargs)

    return wrapper


def checked_rollout_func(func: Callable) -> Callable:
    """
    A rollout function that is told when a completion has no token: TRL looks at the last token of each.

    Args:
        func (`Callable`): Rollout function in TRL's form.

    Returns:
        `Callable`: The same function.

    Raises:
        ValueError: When called, if a completion is empty.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> dict[str, Any]:
        output = func(*args, **kwargs)
        lengths = [len(ids) for ids in output.get("completion_ids", [])]
        if 0 in lengths:
            raise ValueError(
                f"The rollout function '{getattr(func, '__name__', type(func).__name__)}' returned no tokens for completion "
                f"{lengths.index(0)} ({lengths.count(0)} of {len(lengths)} are empty). End every completion with the "
                "tokenizer's eos token."
            )
        return output

    return wrapper


def checked_combination(hook: RewardCombination, rewards: RolloutRewards) -> torch.Tensor:
    """
    Advantages from a user's hook, refused when they could harm the run.

    Args:
        hook (`Callable`): Takes [`RolloutRewards`], returns `(B, T)` advantages.
        rewards ([`RolloutRewards`]): The batch.

    Returns:
        `torch.Tensor`: `(B, T)` advantages, zero where masked.

    Raises:
        TypeError: The hook returned no tensor.
        ValueError: The hook returned another shape, or NaN or infinity at an unmasked token.
    """
    function = getattr(hook, "func", hook)  # of a functools.partial
    name = getattr(function, "__qualname__", type(function).__qualname__)
    advantages = hook(rewards)
    if not isinstance(advantages, torch.Tensor):
        raise TypeError(
            f"The reward combination '{name}' returned {type(advantages).__name__}; return a (B, T) tensor of advantages."
        )
    expected = tuple(rewards.completion_mask.shape)
    if tuple(advantages.shape) != expected:
        raise ValueError(
            f"The reward combination '{name}' returned shape {tuple(advantages.shape)}, but one advantage per token was "
            f"expected: {expected}, as `rewards.completion_mask`."
        )
    advantages = advantages.detach().to(rewards.process_rewards.device, torch.float32)
    advantages = advantages.masked_fill(~rewards.completion_mask, 0.0)
    if not advantages.isfinite().all():
        row, token = (~advantages.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"The reward combination '{name}' returned {advantages[row, token].item()} for completion {row}, token {token}. "
            "Outcomes that could not be judged are NaN: leave them out of every mean, or call `rewards.combine()`."
        )
    return advantages
