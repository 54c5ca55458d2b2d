"""Split a quantity into its number and its unit; the table of units gives their sizes."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from .cleaning import FUNCTIONS, TEXT, TRIGONOMETRIC

_MULTIPLIERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# The table maps dimension -> names of a unit -> its size in the first unit of the dimension
_UNIT_SIZES = {
    "length": {
        "m meter metre": 1,
        "km kilometer kilometre": 1000,
        "cm centimeter centimetre": (1, 100),
        "mm millimeter millimetre": (1, 1000),
        "inch inches in": (254, 10_000),
        "foot feet ft": (3048, 10_000),
        "yard yd": (9144, 10_000),
        "mile mi": (1_609_344, 1000),
    },
    "time": {
        "s sec second": 1,
        "min minute": 60,
        "h hr hour": 3600,
        "day": 86_400,
        "week": 604_800,
    },
    "mass": {
        "g gram": 1,
        "kg kilogram": 1000,
        "mg milligram": (1, 1000),
        "lb pound": (45_359_237, 100_000),
        "oz ounce": (45_359_237, 1_600_000),
    },
    "volume": {"l liter litre": 1, "ml milliliter millilitre": (1, 1000)},
    "money": {"dollar usd buck": 1, "cent": (1, 100)},
    "speed": {"mph": 1},
    "morning": {"am": 1},
    "afternoon": {"pm": 1},
    "angle": {"degree deg": 1},
    "radians": {"radian rad": 1},
}
_UNITS = {
    name: (dimension, size if isinstance(size, tuple) else (size, 1))
    for dimension, sizes in _UNIT_SIZES.items()
    for names, size in sizes.items()
    for name in names.split()
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_DEGREES = re.compile(r"(.*?)\s?\^\s?\{?\s?\\circ\s?\}?\s?(?:" + TEXT + r"\{)?([CF]?)\}?")
_NAMES = r"[A-Za-z](?:[A-Za-z /.-]|\^-?\d)*"
_UNIT = re.compile(
    rf"(.*(?:[\d)}}\]%]|\\pi))(\s?)(?:{TEXT}\{{\s?({_NAMES})\}}|({_NAMES}))(?:\^\s?(?:\{{([23])\}}|([23])))?"
)


class Unit(NamedTuple):
    """A dimension with its power, `"length^2"`, and the unit's size in the first unit of that dimension."""

    dimension: str
    size: Fraction


def split_unit(text: str, glued: bool = False) -> tuple[str, Unit | None]:
    """
    Split off a quantity's unit if it is one of the table.

    Other words after a number ("5 apples") are dropped, and words like "million" are multiplied into the number.

    Args:
        text (`str`): The quantity, cleaned.
        glued (`bool`): Whether one letter right after a number, "5m", may be a unit.

    Returns:
        `tuple[str, Unit | None]`: the number as LaTeX, and the unit; None if there is none that the table knows.
    """
    degrees = None if TRIGONOMETRIC.search(text) else _DEGREES.fullmatch(text)
    if degrees:
        return degrees[1], Unit(f"angle{degrees[2]}^1", Fraction(1))
    match = _UNIT.fullmatch(text)
    if not match:
        return text, None
    value, space, wrapped, bare, *powers = match.groups()
    names = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", wrapped or bare).strip(" .").split()
    # `2i`, `2ab` and `2 x` are products; `2 m` is a length
    is_number = re.fullmatch(r"[-+\d.,/ ]+", value) is not None
    if not names or {"and", "or"} & set(names) or names[0] in FUNCTIONS:
        return text, None
    known = _unit(names[-1])
    if bare and not (is_number and (space or glued)) and (len(names[0]) < 2 or not known):
        return text, None
    if any(len(name) < 2 and not (known and name == names[-1]) for name in names):
        return text, None

    if names[0].lower() in _MULTIPLIERS:
        value = times(value, Fraction(_MULTIPLIERS[names.pop(0).lower()]))
    exponent = int(powers[0] or powers[1] or _POWERS.get(names[0].lower() if names else "", 1))
    names = names[-1:] if names and names[0].lower() in _POWERS else names
    if len(names) == 1 and known:
        return value, Unit(f"{known.dimension}^{exponent}", known.size**exponent)
    return value, None


def _unit(name: str) -> Unit | None:
    for form in (name, name.lower(), name.lower().removesuffix("s"), name.lower().removesuffix("es")):
        # The litre is the only single letter that is also written as a capital; N, K, C are other units
        if form in _UNITS and (len(name) > 1 or name.islower() or name == "L"):
            dimension, size = _UNITS[form]
            return Unit(dimension, Fraction(*size))
    return None


def times(value: str, factor: Fraction) -> str:
    """Write a value times a factor as LaTeX."""
    return rf"({value}) \cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"
