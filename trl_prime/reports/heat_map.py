"""From process rewards to colours, positions and text that is safe to show.

Covered: the diverging scale (orange below zero, blue above, which colour-blind readers tell apart), where in a completion the
reward falls, curves of the cumulated reward, and characters that would act on a page or a terminal. Not covered: markup, which
the templates and `terminal.py` make. All functions are pure.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch

# Rewards below this many log-odds are rounding, as in a PRM that still equals its reference, and stay pale.
MIN_SCALE = 1e-3
NUM_BINS = 10

Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Theme:
    """
    Colours of a heat map; a token's text keeps its colour and its background goes from `page` to an end of the scale.

    Attributes:
        page (`tuple[int, int, int]`): Red, green and blue, 0 to 255, of the background, which is the colour of zero.
        text (`tuple[int, int, int]`): The text.
        negative, positive (`tuple[int, int, int]`): The ends of the scale.
    """

    page: Colour
    text: Colour
    negative: Colour
    positive: Colour


THEMES = {
    "light": Theme(page=(255, 255, 255), text=(22, 24, 29), negative=(245, 146, 50), positive=(96, 165, 245)),
    "dark": Theme(page=(21, 24, 30), text=(236, 239, 244), negative=(158, 78, 0), positive=(22, 94, 178)),
    # This theme brings its own background: a terminal's is not known
    "terminal": Theme(page=(238, 238, 238), text=(0, 0, 0), negative=(245, 146, 50), positive=(96, 165, 245)),
}


def colour_scale(rewards: Sequence[torch.Tensor]) -> float:
    """
    The absolute reward that gets the full colour: the 95th percentile, so that a few outliers do not leave the rest pale.

    Args:
        rewards (`list[torch.Tensor]`): Rewards of all completions that share the scale. NaN and infinity are left out.

    Returns:
        `float`: At least `MIN_SCALE`.
    """
    values = np.concatenate([np.zeros(0), *(reward.double().numpy() for reward in rewards)])
    values = np.abs(values[np.isfinite(values)])
    return max(float(np.percentile(values, 95)), MIN_SCALE) if values.size else MIN_SCALE


def intensities(rewards: torch.Tensor, scale: float) -> list[float]:
    """
    Place of each reward on the scale.

    Args:
        rewards (`torch.Tensor`): `(n,)` rewards.
        scale (`float`): The reward of full intensity.

    Returns:
        `list[float]`: n numbers from -1 to 1; 0 for NaN.
    """
    return (rewards.double() / scale).nan_to_num(nan=0.0).clamp(-1, 1).tolist()


def colour(intensity: float, theme: Theme) -> Colour:
    """Background of a token, as the page paints it: the end of the scale over `theme.page` with opacity `|intensity|`."""
    end, opacity = (theme.negative if intensity < 0 else theme.positive), abs(intensity)
    red, green, blue = (round(page + (full - page) * opacity) for page, full in zip(theme.page, end, strict=True))
    return red, green, blue


def relative_positions(num_units: int) -> list[float]:
    """Middle of each of n steps or tokens between 0, the start of the completion, and 1, its end."""
    return [(unit + 0.5) / num_units for unit in range(num_units)]


def lowest_step(step_rewards: torch.Tensor) -> int | None:
    """Index of the step with the lowest reward, the first of equals; `None` without two steps to compare, or if all are 0."""
    finite = step_rewards.isfinite()
    if finite.sum() < 2 or not step_rewards[finite].any():
        return None
    return int(step_rewards.masked_fill(~finite, math.inf).argmin())


def position_counts(positions: Sequence[float], num_bins: int = NUM_BINS) -> list[int]:
    """How many relative positions fall into each of `num_bins` equal parts of a completion."""
    return np.histogram(positions, bins=num_bins, range=(0, 1))[0].tolist()


def mean_by_position(rewards: Sequence[torch.Tensor], num_bins: int = NUM_BINS) -> list[float | None]:
    """
    Mean token reward in each of `num_bins` equal parts of a completion.

    Args:
        rewards (`list[torch.Tensor]`): `(t,)` token rewards of each completion, of any lengths.
        num_bins (`int`): Parts of a completion.

    Returns:
        `list[float | None]`: mean over the tokens of all completions in a part, `None` where none has any.
    """
    positions = np.concatenate([np.zeros(0), *(np.asarray(relative_positions(len(reward))) for reward in rewards)])
    values = np.concatenate([np.zeros(0), *(reward.double().numpy() for reward in rewards)])
    positions, values = positions[np.isfinite(values)], values[np.isfinite(values)]
    counts = np.histogram(positions, bins=num_bins, range=(0, 1))[0]
    sums = np.histogram(positions, bins=num_bins, range=(0, 1), weights=values)[0]
    return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]


def curve_points(values: Sequence[float], low: float, high: float, width: float, height: float) -> str:
    """
    Points of an SVG polyline through values at equal distances.

    Args:
        values (`list[float]`): The curve; what is not finite is left out.
        low, high (`float`): Values at the lower and upper edge.
        width, height (`float`): Size of the picture.

    Returns:
        `str`: `"x,y x,y ..."`
    """
    step = width / max(len(values) - 1, 1)
    span = (high - low) or 1.0
    return " ".join(
        f"{i * step:.1f},{height - (value - low) / span * height:.1f}"
        for i, value in enumerate(values)
        if math.isfinite(value)
    )


def finite(value: float | None, digits: int = 4) -> float | None:
    """The number with so many significant digits, `None` if it is not finite, which JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


# These characters turn the direction of the text around them
_TURNS = {*"\u061c\u200e\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def visible_text(text: str, mark_whitespace: bool = True) -> str:
    """
    Text by a model with what would not be seen, or would act on a terminal or a page, made visible.

    Control characters (a terminal obeys the escape character), those that turn the direction of the text, and lone surrogates
    become their code, `<U+001B>`.

    Args:
        text (`str`): The text.
        mark_whitespace (`bool`): Whether a newline gets an arrow before it and a tab becomes an arrow.

    Returns:
        `str`: Text to show, still to be escaped.
    """
    return "".join(_visible(character, mark_whitespace) for character in text)


def _visible(character: str, mark_whitespace: bool) -> str:
    if character in "\n\t":
        return {"\n": "↵\n", "\t": "⇥"}[character] if mark_whitespace else character
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNS:
        return f"<U+{ord(character):04X}>"
    return character
