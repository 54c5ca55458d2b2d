"""Names of reward functions and hooks in a recipe: this package's verifiers, TRL's own rewards, and dotted paths.

A *call form* gives options, `code(scoring='fraction', timeout=10)`. It is parsed, never evaluated: keyword arguments with
literal values are all that it may hold.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ..names import nearest

# Spec name -> (module, function for the plain name, class for the call form); imported when they are asked for
VERIFIERS = {
    "math": ("math_rewards", "math_reward", "MathReward"),
    "code": ("code_rewards", "code_reward", "CodeReward"),
    "verifier": ("router", "verifier_reward", "VerifierReward"),
    "reasoning_gym": ("reasoning_gym_rewards", "reasoning_gym_reward", None),
}


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


def parse_call(spec: str) -> tuple[str, dict[str, Any] | None]:
    """
    Split `name(option=value, ...)` into the name and its options, without evaluating anything.

    Args:
        spec (`str`): A name, a dotted path, or either with keyword arguments that are literals.

    Returns:
        `tuple[str, dict | None]`: the name and the options; None for the options if there are no parentheses.

    Raises:
        ValueError: The spec holds anything else.
    """
    name, parenthesis, _ = spec.strip().partition("(")
    if not parenthesis:
        return name, None
    try:
        call = ast.parse(spec.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != name:
            raise ValueError("it is no single call")
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("an argument has no name")
        if len({keyword.arg for keyword in call.keywords}) < len(call.keywords):
            raise ValueError("an argument is given twice")
        return name, {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(
            f"{spec!r} could not be read ({reason}). Write name(option=value, ...), where every value is a literal: a "
            "number, a quoted string, True, False, None, or a list or dict of these."
        ) from error


def trl_rewards() -> dict[str, Callable]:
    """
    The reward functions of the installed TRL by name, and its factories both by their name and without the `get_`.

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
    A reward function by name, with or without options.

    - `math`, `code`, `verifier` (math or code, by the row), `reasoning_gym`: this package's.
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
    One of this package's verifiers.

    Args:
        name (`str`): Key of `VERIFIERS`.
        options (`dict`, *optional*): Arguments of its class. Without them it is the function, whose worker processes are
            shared by all who use it.
        spec (`str`, *optional*): What errors quote.

    Returns:
        `Callable`: the reward function.

    Raises:
        ValueError: An option is unknown.
    """
    module_name, function_name, class_name = VERIFIERS[name]
    module = importlib.import_module(f".{module_name}", __package__)
    if name == "code" and options is None:
        options = {}  # made now: a machine that cannot run programs safely is refused before a model is loaded
    if options is None:
        return getattr(module, function_name)
    if class_name is None:
        raise ValueError(f"reward_funcs has {spec or name!r}, but {name!r} takes no options. Write {name!r}.")
    return _make(getattr(module, class_name), spec or f"{name}({', '.join(options)})", options)


def _make(factory: Callable, spec: str, options: dict[str, Any]) -> Callable:
    """Call a factory, after its arguments were checked: a TypeError from inside it is a bug, not a wrong recipe."""
    if not callable(factory):
        raise ValueError(f"reward_funcs has {spec!r}, but that is no function: give it without parentheses.")
    parameters = inspect.signature(factory).parameters.values()
    _check_names(spec, options, parameters)
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in options
    ]
    if missing:
        template = ", ".join(f"{option}=..." for option in [*options, *missing])
        raise ValueError(
            f"reward_funcs has {spec!r}, which lacks {', '.join(missing)}. Write {parse_call(spec)[0]}({template})."
        )
    return _checked(factory(**options), spec)


def _with_options(reward: Callable, spec: str, options: dict[str, Any]) -> Callable:
    """A plain reward function with some of its optional arguments set."""
    given_by_trainer = ("log_extra", "log_metric", "trainer_state")
    parameters = [
        parameter
        for parameter in inspect.signature(reward).parameters.values()
        if parameter.default is not parameter.empty and parameter.name not in given_by_trainer
    ]
    if not parameters:
        raise ValueError(f"reward_funcs has {spec!r}, but that reward takes no options. Write {reward.__name__!r}.")
    _check_names(spec, options, parameters)
    return functools.update_wrapper(functools.partial(reward, **options), reward)


def _check_names(spec: str, options: Iterable[str], parameters: Iterable[inspect.Parameter]) -> None:
    parameters = list(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "It takes none."
            raise ValueError(f"reward_funcs has {spec!r}, which has no option {option!r}. {hint}")


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
