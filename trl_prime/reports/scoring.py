"""Completions on their way through the implicit PRM."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers.utils.logging import disable_progress_bar

from ..implicit_prm import ImplicitPRM
from .score_page import Completion


def load_prm(name_or_path: str, **kwargs: Any) -> ImplicitPRM:
    """
    The PRM, on the GPUs if there are any.

    Args:
        name_or_path (`str`): Folder or Hub id.
        **kwargs: as in [`~trl_prime.ImplicitPRM.from_pretrained`].

    Raises:
        ValueError: It could not be loaded; the message names it.
    """
    disable_progress_bar()
    if torch.cuda.is_available():
        kwargs["device_map"] = "auto"
    try:
        return ImplicitPRM.from_pretrained(name_or_path, **kwargs)
    except OSError as error:
        raise ValueError(f"The PRM '{name_or_path}' could not be loaded: {error}") from error


def score_completions(prm: ImplicitPRM, completions: list[Completion]) -> list[Completion]:
    """The same completions, scored, with a progress bar in the terminal."""
    # Large enough that rows of like length meet in a forward pass, small enough that the bar moves
    size = 4 * prm.micro_batch_size
    scored = []
    starts = range(0, len(completions), size)
    for start in track(starts, "scoring", transient=True, disable=not Console().is_terminal):
        chunk = completions[start : start + size]
        scored += prm.score([c.prompt for c in chunk], [c.completion for c in chunk], [c.truncated for c in chunk])
    return [dataclasses.replace(c, scored=result) for c, result in zip(completions, scored, strict=True)]
