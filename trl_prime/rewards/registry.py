"""Load reward functions by the names that a recipe gives: this package's verifiers, TRL's own rewards, and dotted paths.

A name may be a call form with options, see `specs.py`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from ..specs import call_with_options, check_options, load_object, nearest, parse_call

# Each name maps to (module, function for the plain name, class for the call form), imported when asked for
VERIFIERS = {
    "math": ("math_rewards", "math_reward", "MathReward"),
    "majority": ("majority_rewards", "majority_reward", "MajorityReward"),
    "code": ("code_rewards", "code_reward", "CodeReward"),
    "verifier": ("router", "verifier_reward", "VerifierReward"),
    "reasoning_gym": ("reasoning_gym_rewards", "reasoning_gym_reward", None),
}


def trl_rewards() -> dict[str, Callable]:
    """
    List the reward functions of the installed TRL by name, and its factories both by their name and without the `get_`.

    Returns:
        `dict[str, Callable]`: for instance `accuracy_reward`, `soft_overlong_punishment`.
    """
    module = importlib.import_module("trl.rewards")
    functions = {
        name: value
        for name in dir(module)
        if not name.startswith("_") and inspect.isfunction(value := getattr(module, name))
    }
    return functions | {name.removeprefix("get_"): function for name, function in functions.items()}


def load_reward_func(spec: str) -> Callable:
    """
    Load a reward function by name, with or without options.

    - `math`, `code`, `verifier` (math or code, by the row), `reasoning_gym`, `majority` (agreement in place of a gold answer):
      this package's.
    - TRL's names, `accuracy_reward`; its factories without the `get_`,
      `soft_overlong_punishment(max_completion_len=3072, soft_punish_cache=512)`.
    - Dotted paths: `my_module.my_reward`, or of a function or class that makes one, `my_module.make_reward(a=1)`.

    Args:
        spec (`str`): Name or call form. The options are keyword arguments with literal values.

    Returns:
        `Callable`: the reward function.

    Raises:
        ValueError: The name or an option is unknown, an option is missing, or the spec cannot be read.
    """
    name, options = parse_call(spec)
    if name in VERIFIERS:
        return load_verifier(name) if options is None else load_verifier(name, options, spec)
    if "." in name:
        found = load_object(name)
        return _checked(found if options is None else _make(found, spec, options), spec)
    rewards = trl_rewards()
    if name not in rewards:
        names = [*VERIFIERS, *(known for known in rewards if not known.startswith("get_"))]
        raise ValueError(f"The reward function {name!r} is unknown. {nearest(name, names)} Or give a dotted path.")
    reward = rewards[name]
    if reward.__name__.startswith("get_"):
        return _make(reward, spec, options or {})
    return _with_options(reward, spec, options) if options else reward


def load_verifier(name: str, options: dict[str, Any] | None = None, spec: str | None = None) -> Callable:
    """
    Load one of this package's verifiers.

    Args:
        name (`str`): Key of `VERIFIERS`.
        options (`dict`, *optional*): Arguments of its class. Without them it is the function, whose worker processes are
            shared by all who use it.
        spec (`str`, *optional*): What errors quote.

    Returns:
        `Callable`: the reward function.

    Raises:
        ValueError: An option is unknown.
        ImportError: What it judges by is not installed.
    """
    module_name, function_name, class_name = VERIFIERS[name]
    module = importlib.import_module(f".{module_name}", __package__)
    if name == "code" and options is None:
        options = {}  # it is made now, so that an unsafe machine is refused before a model is loaded
    if options is None:
        if name in ("math", "majority"):  # the functions would find out at the first batch
            importlib.import_module(".math_rewards", __package__).check_installed()
        return getattr(module, function_name)
    if class_name is None:
        raise ValueError(f"reward_funcs has {spec or name!r}, but {name!r} takes no options. Write {name!r}.")
    return _make(getattr(module, class_name), spec or f"{name}({', '.join(options)})", options)


def _make(factory: Any, spec: str, options: dict[str, Any]) -> Callable:
    return _checked(call_with_options("reward_funcs", spec, factory, options), spec)


def _with_options(reward: Callable, spec: str, options: dict[str, Any]) -> Callable:
    """Set some of the optional arguments of a plain reward function."""
    given_by_trainer = ("log_extra", "log_metric", "trainer_state")
    known = [
        parameter.name
        for parameter in inspect.signature(reward).parameters.values()
        if parameter.default is not parameter.empty and parameter.name not in given_by_trainer
    ]
    if not known:
        raise ValueError(f"reward_funcs has {spec!r}, but that reward takes no options. Write {reward.__name__!r}.")
    check_options(f"reward_funcs has {spec!r}, which", options, known)
    return functools.update_wrapper(functools.partial(reward, **options), reward)


def _checked(reward: Any, spec: str) -> Callable:
    if isinstance(reward, type):
        raise ValueError(
            f"reward_funcs has {spec!r}, which is a class. Write {spec}() to make a reward function of it."
        )
    if not callable(reward) or not hasattr(reward, "__name__"):
        raise ValueError(
            f"reward_funcs has {spec!r}, which is {type(reward).__name__!r} and no reward function: it has to be "
            "callable and to have a `__name__`, under which it is logged."
        )
    return reward
