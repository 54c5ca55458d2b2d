"""Names of reward functions and hooks in a recipe: TRL's own rewards, and dotted paths to anything else."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from ..prime_config import nearest

TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


def load_object(path: str) -> Any:
    """
    The object at a dotted path, `package.module.name`; modules of the current folder are found too.

    Args:
        path (`str`): Dotted path.

    Returns:
        The object.

    Raises:
        ValueError: There is no such module or name.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"'{path}' is not a dotted path; write module.name.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"'{path}' could not be loaded: {error}.") from error
    if not hasattr(module, name):
        public = [attribute for attribute in vars(module) if not attribute.startswith("_")]
        raise ValueError(f"'{module_name}' has no {name!r}. {nearest(name, public)}")
    return getattr(module, name)


def load_reward_func(name: str) -> Callable:
    """
    A reward function by one of TRL's names or by dotted path.

    Args:
        name (`str`): For instance `"accuracy_reward"` or `"my_module.my_reward"`.

    Returns:
        `Callable`: the reward function.

    Raises:
        ValueError: The name is unknown.
    """
    if name in TRL_REWARDS:
        return getattr(importlib.import_module("trl.rewards"), name)
    if "." in name:
        return load_object(name)
    raise ValueError(f"The reward function {name!r} is unknown. {nearest(name, TRL_REWARDS)} Or give a dotted path.")
