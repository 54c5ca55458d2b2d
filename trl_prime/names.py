"""Errors that help with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, choices: Iterable[str]) -> str:
    """
    A sentence with the choice nearest to a misspelt name, and all of them.

    Args:
        name (`str`): What was given.
        choices (`Iterable[str]`): What could have been.

    Returns:
        `str`: for instance `"Did you mean 'rloo'? Choose one of: rloo, grpo."`
    """
    choices = list(choices)
    return f"{did_you_mean(name, choices)}Choose one of: {', '.join(choices)}."


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The first half of [`nearest`] with a space at its end, or nothing: where there are too many choices to list."""
    matches = difflib.get_close_matches(str(name), list(choices), n=1)
    return f"Did you mean {matches[0]!r}? " if matches else ""
