"""Read the names that a recipe gives: find what they stand for, check their options, and guess a misspelt one.

A *call form* gives options, `code(scoring='fraction', timeout=10)`. It is parsed, never evaluated: keyword arguments with
literal values are all that it may hold.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable
from typing import Any

# Words that people write for parts of names
_ABBREVIATIONS = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "bsz": "batch_size",
    "ga": "gradient_accumulation_steps",
    "wd": "weight_decay",
    "len": "length",
    "temp": "temperature",
}


def nearest(name: str, choices: Iterable[str]) -> str:
    """
    Write a sentence with the choice nearest to a misspelt name, and all of them.

    Args:
        name (`str`): What was given.
        choices (`Iterable[str]`): What could have been.

    Returns:
        `str`: for instance `"Did you mean 'rloo'? Choose one of: rloo, grpo."`
    """
    choices = list(choices)
    return f"{did_you_mean(name, choices)}Choose one of: {', '.join(choices)}."


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Write the first half of [`nearest`] with a space at its end, or nothing; it serves where choices are too many to list."""
    choices = list(choices)
    words = [_ABBREVIATIONS.get(word, word) for word in str(name).split("_")]
    for meant in ("_".join(words), str(name)):
        matches = difflib.get_close_matches(meant, choices, n=1)
        if matches:
            return f"Did you mean {matches[0]!r}? "
    return ""


def check_installed(option: str, value: Any, is_installed: bool, extra: str) -> None:
    """
    Refuse an option that needs a package which is not installed.

    Args:
        option (`str`): Its name.
        value (`Any`): What was given; nothing is refused where it is off.
        is_installed (`bool`): Whether the package is.
        extra (`str`): The extra of this package that installs it.

    Raises:
        ImportError: The message names the option and how to install the package.
    """
    if value and not is_installed:
        raise ImportError(
            f"{option} is {value!r:.100}, but that needs {extra}, which is not installed. Run `pip install trl-prime[{extra}]`, or "
            f"leave {option} out."
        )


def load_object(path: str) -> Any:
    """
    Load the object at a dotted path, `package.module.name`; modules of the current folder are found too.

    Args:
        path (`str`): Dotted path.

    Returns:
        The object.

    Raises:
        ValueError: There is no such module or name, or the module is no Python.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"'{path}' is not a dotted path; write module.name.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, SyntaxError) as error:
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


def check_options(subject: str, options: Iterable[str], known: Iterable[str]) -> None:
    """
    Refuse an option that does not exist.

    Args:
        subject (`str`): Begins the sentence of the error, for instance `"dataset_format 'gsm8k'"`.
        options (`Iterable[str]`): Names of the options that were given.
        known (`Iterable[str]`): Names of those that there are.

    Raises:
        ValueError: An option is unknown; names the nearest.
    """
    known = list(known)
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "It takes none."
            raise ValueError(f"{subject} has no option {option!r}. {hint}")


def call_with_options(field: str, spec: str, function: Any, options: dict[str, Any]) -> Any:
    """
    Call what a call form names. The options are checked before: a TypeError from inside it is a bug, not a wrong recipe.

    Args:
        field (`str`): Field of the recipe that holds the spec, for errors.
        spec (`str`): The call form, for errors.
        function (`Callable`): What its name stands for.
        options (`dict`): Its keyword arguments.

    Returns:
        What the function returns.

    Raises:
        ValueError: It is no function, or an option is unknown or missing.
    """
    if not callable(function):
        raise ValueError(f"{field} has {spec!r}, but that is no function: give it without parentheses.")
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        check_options(f"{field} has {spec!r}, which", options, [parameter.name for parameter in parameters])
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in options
    ]
    if missing:
        name, template = spec.strip().partition("(")[0], ", ".join(f"{option}=..." for option in [*options, *missing])
        raise ValueError(f"{field} has {spec!r}, which lacks {', '.join(missing)}. Write {name}({template}).")
    return function(**options)
