"""Completions as TRL hands them to reward functions."""

from __future__ import annotations

from typing import Any


def completion_text(completion: Any) -> str:
    """
    The text of a completion.

    Args:
        completion (`str` or `list[dict]`): A text, or messages, of which the last one counts. Its content may be a text, a
            list of parts, or None.

    Returns:
        `str`: empty where there is no text.
    """
    content = completion
    if isinstance(completion, (list, tuple)):
        content = completion[-1].get("content") if completion else None
    if isinstance(content, (list, tuple)):
        parts = (part if isinstance(part, str) else part.get("text") for part in content)
        content = "".join(part for part in parts if part)
    return content or ""
