"""Split a quantity into its number and its unit. The units, their dimensions and their sizes are pint's."""

from __future__ import annotations

import functools
import re
from collections import Counter
from fractions import Fraction
from typing import Any, NamedTuple

from .cleaning import FUNCTIONS, TEXT, TRIGONOMETRIC

_MULTIPLIERS = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
    "万": 10**4,
    "亿": 10**8,
}
# Money is not pint's, and these names are common in problems
_DEFINITIONS = (
    "dollar = [currency] = _ = usd = USD = buck",
    "cent = dollar / 100",
    "euro = [euro] = _ = eur = EUR",
    "yuan = [yuan] = _ = rmb = RMB = CNY",
    "rupee = [rupee] = _ = INR",
    "yen = [yen] = _ = JPY",
    "kph = kilometer / hour = _ = kmph = kmh",
    "mpg = mile / gallon",
    "decennium = 10 * year",  # for pint a decade is a ratio of frequencies
    "newton_meter = newton * meter = Nm",
    "ampere_hour = ampere * hour = Ah",
    "@alias month = mo",
    "@alias week = wk",
    "KB = 1000 * byte",
)
# Chinese names, longest first where one begins another
_CHINESE = {
    "平方": "square",
    "立方": "cubic",
    "每": "per",
    "厘米": "cm",
    "毫米": "mm",
    "分米": "dm",
    "千米": "km",
    "公里": "km",
    "米": "m",
    "公斤": "kg",
    "千克": "kg",
    "毫克": "mg",
    "克": "g",
    "吨": "tonne",
    "毫升": "mL",
    "升": "L",
    "小时": "hour",
    "分钟": "minute",
    "秒": "second",
    "天": "day",
    "星期": "week",
    "周": "week",
    "个月": "month",
    "年": "year",
    "岁": "year",
    "美元": "dollar",
    "美分": "cent",
    "元": "yuan",
    "度": "degree",
}
# Names of several words, and names that mean something else to pint
_PINTS_NAMES = [
    (re.compile(rf"(?i)\b{pattern}\b"), name)
    for pattern, name in (
        (r"light[- ]?years?", "ly"),
        (r"nautical miles?", "nmi"),
        (r"fluid ounces?", "floz"),
        (r"metric tons?", "tonne"),
        (r"decades?", "decennium"),
        (r"(?:deg(?:ree)?s? )?(?:celsius|centigrade)|(?-i:deg(?:ree)?s? C)", "degC"),
        (r"(?:deg(?:ree)?s? )?fahrenheit|(?-i:deg(?:ree)?s? F)", "degF"),
    )
]
_CHINESE_NAME = re.compile("|".join(_CHINESE))
# Symbols of one letter: the first may also stand bare, "5 m", where other letters are variables
_BARE_LETTERS, _LETTERS = set("mshglL"), set("mshglLNJWVAKCFTHΩÅ")
# Only these take a prefix as a symbol, so that a "unit" is no micronit and "hats" are no hectoatmospheres
_PREFIXED = re.compile(
    "meter|gram|second|ampere|kelvin|mole|candela|hertz|newton|joule|watt|pascal|volt|coulomb|farad|ohm|siemens|tesla|henry|"
    "weber|liter|electron_volt|calorie|bit|byte|bar|watt_hour|becquerel|gray|sievert|lumen|lux|molar|meter_Hg|meter_H2O"
)
# Words that pint takes for units, but people hardly ever do
_NO_UNITS = re.compile(
    "a|an|of|at|to|are|is|as|the|e|c|pi|point|bag|hand|link|pole|perch|dot|count|particle|number|unit"
)
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_OFFSETS = {"degree_Celsius": Fraction(27315, 100), "degree_Fahrenheit": Fraction(45967, 180)}
# pint's value of pi; an angle's size is a fraction of it
_PI = Fraction(31415926535897932384626433832795028841971693993751, 10**49)

_DEGREES = re.compile(r"(.*?)\s?\^\s?\{?\s?\\circ\s?\}?\s?(?:" + TEXT + r"\{)?\s?([CF]?)\s?\}?")
_WRAPPER = re.compile(TEXT + r"\{([^{}]*)\}")
_IS_TEXT = re.compile(TEXT + r"\{|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_FRACTION = re.compile(rf"\\frac\s?\{{\s?({TEXT}\{{[^{{}}]*\}}[^{{}}]*)\}}\s?\{{\s?({TEXT}\{{[^{{}}]*\}}[^{{}}]*)\}}$")
_VALUE_END = re.compile(r"[\d)}\]%]|\\pi(?![a-zA-Z])")
_LONGEST = 100  # characters of a unit
_LETTER = r"A-Za-z\u00b5\u03bc\u03a9\u00c5\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"
_BARE_NAMES = re.compile(rf"[{_LETTER}](?:[{_LETTER} /.*()-]|\^\s?-?\d)*")
_TOKEN = re.compile(rf"([{_LETTER}]+)|\^\s?(-?\d)|([/()])|(.)")


class Unit(NamedTuple):
    """
    A unit, as what its quantities have to be multiplied with.

    Args:
        dimension (`tuple`): Base units and their exponents, sorted.
        size (`Fraction`): The unit in its base units, but for `pi`.
        pi (`int`): Exponent of pi, which the size leaves out.
        offset (`Fraction`): What is added, in base units; not 0 for temperatures.
    """

    dimension: tuple[tuple[str, int], ...]
    size: Fraction
    pi: int = 0
    offset: Fraction = Fraction(0)

    def convert(self, value: str, other: Unit) -> str:
        """Write a number of this unit as LaTeX of the same quantity in another unit of the same dimension."""
        name, equals, number = value.rpartition("=")  # "x = 5" has a unit too
        number = times(number, self.size / other.size)
        if self.pi != other.pi:
            number = rf"{number} \cdot \pi^{{{self.pi - other.pi}}}"
        if self.offset != other.offset:
            number = f"{number} + {_fraction((self.offset - other.offset) / other.size)}"
        return name + equals + number


RADIAN = Unit((("radian", 1),), Fraction(1))


def split_unit(text: str, glued: bool = False) -> tuple[str, Unit | None]:
    """
    Split off a quantity's unit.

    Words after a number that are no unit ("5 apples") are dropped, also beside one ("5 hours of sleep"), and words like
    "million" are multiplied into the number.

    Args:
        text (`str`): The quantity, cleaned.
        glued (`bool`): Whether one letter right after a number, "5m", may be a unit.

    Returns:
        `tuple[str, Unit | None]`: the number as LaTeX, and the unit; None if there is none that pint knows.

    Raises:
        ImportError: pint is not installed.
    """
    degrees = None if TRIGONOMETRIC.search(text) else _DEGREES.fullmatch(text)
    if degrees:
        return degrees[1], _unit_of_name("deg" + degrees[2])
    value, space, names, is_wrapped = _split_names(text)
    words = [word for word, _, _ in names]
    if not words or {"and", "or"} & set(words) or words[0] in FUNCTIONS:
        return text, None
    half_of_day = _half_of_day(value, words)
    if half_of_day:
        return value, half_of_day
    known = {word: _unit_of_name(word) for word in words if word != "in" or word == words[0]}
    if not is_wrapped and words[0].isascii() and _is_product(value, names, known, is_apart=bool(space), glued=glued):
        return text, None
    letters = _LETTERS if is_wrapped or len(words) > 1 else _BARE_LETTERS
    if any(len(word) < 2 and word.isascii() and word not in letters | {"a"} for word in words):
        return text, None
    if words[0].lower() in _MULTIPLIERS:
        value = times(value, Fraction(_MULTIPLIERS[words[0].lower()]))
        names = names[1:]
    return value, _product([(known.get(word), exponent) for word, exponent, _ in names])


def _split_names(text: str) -> tuple[str, str, list[tuple[str, int, int]], bool]:
    """Split off the names of a unit: the value, the space after it, names with exponents and signs, and whether they are marked as text."""
    start = max(len(text) - _LONGEST, 0)
    tail = _FRACTION.sub(r"\1/\2", text[start:])
    for end in _VALUE_END.finditer(tail):
        rest = tail[end.end() :]
        space = rest[: len(rest) - len(rest.lstrip())]
        is_wrapped = _IS_TEXT.match(rest.lstrip()) is not None
        rest = re.sub(r"\\mu(?![a-zA-Z])\s?", "\u00b5", rest.replace(r"\Omega", "\u03a9"))
        rest = re.sub(r"\^\s?\{(-?\d)\}", r"^\1", rest.replace(r"\cdot", " "))
        rest = _WRAPPER.sub(r"\1", rest).strip()
        if _BARE_NAMES.fullmatch(rest):
            return text[:start] + tail[: end.end()], space, _read_names(rest), is_wrapped
    return text, "", [], False


def _read_names(text: str) -> list[tuple[str, int, int]]:
    """Read "kg m/s^2" as names with their exponents, and the sign that stands before each: [("kg", 1, 1), ("m", 1, 1), ("s", -2, -1)]."""
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    for pattern, name in _PINTS_NAMES:
        text = pattern.sub(name, text)
    text = _CHINESE_NAME.sub(lambda match: f" {_CHINESE[match[0]]} ", text)
    names: list[list] = []
    sign, power, depth = 1, 1, 0
    for word, exponent, operator, _ in _TOKEN.findall(text):
        if word in ("per", "each", "every") or operator == "/" or (word in ("a", "an") and names):
            sign = -1
        elif operator:
            depth += 1 if operator == "(" else -1
            sign = sign if depth > 0 else 1
        elif exponent:
            if names:
                names[-1][1] *= int(exponent)
        elif word.lower() in ("squared", "cubed"):
            if names:
                names[-1][1] *= _POWERS[word.lower()]
        elif word.lower() in _POWERS:
            power = _POWERS[word.lower()]
        elif word:
            names.append([word, sign * power, sign])
            sign, power = sign if depth > 0 else 1, 1
    return [tuple(name) for name in names]


def _is_product(value: str, names: list, known: dict[str, Unit | None], is_apart: bool, glued: bool) -> bool:
    """Tell whether bare letters after a value are factors of a product, as in `2i`, `2ab`, `2 x` and `2 m h`; `2 m` is a length."""
    words = [word for word, _, _ in names]
    is_number = re.fullmatch(r"[-+\d.,/ ]+", value) is not None
    first_is_known = bool(known[words[0]])
    if not (is_number and (is_apart or glued)) and (len(words[0]) < 2 or not (first_is_known or known.get(words[-1]))):
        return True
    if not first_is_known and (not is_apart or len(words[0]) < 3) and words[0].lower() not in _POWERS:
        return True
    return any(
        first in _LETTERS and second in _LETTERS and sign > 0
        for (first, _, _), (second, _, sign) in zip(names, names[1:], strict=False)
    )


def _half_of_day(value: str, words: list[str]) -> Unit | None:
    if words[-1].lower() in ("am", "pm") and len(words) == 1 and re.fullmatch(r"\d{1,2}(?::\d\d)?", value.strip()):
        return Unit(((words[-1].lower(), 1),), Fraction(1))
    return None


def _product(factors: list[tuple[Unit | None, int]]) -> Unit | None:
    """Multiply units; words that are none count as 1. None if all of them are none."""
    known = [(unit, exponent) for unit, exponent in factors if unit]
    if any(abs(exponent) > 9 for _, exponent in known):  # it would be a number without end
        return None
    if len(known) == 1 and known[0][1] == 1:
        return known[0][0]
    dimension: Counter[str] = Counter()
    size, pi = Fraction(1), 0
    for unit, exponent in known:
        for base, power in unit.dimension:
            dimension[base] += power * exponent
        size *= unit.size**exponent
        pi += unit.pi * exponent
    return Unit(tuple(sorted(item for item in dimension.items() if item[1])), size, pi) if known else None


@functools.lru_cache(maxsize=4096)
def _unit_of_name(name: str) -> Unit | None:
    """Look a name up as it is written, without its plural s, and in lower case; a kilometre is not a "Km", but people write so."""
    for form in dict.fromkeys((name, name.removesuffix("s"), name.lower(), name.lower().removesuffix("s"))):
        if _NO_UNITS.fullmatch(form) or (len(form) < 2 and form not in _LETTERS) or (len(name) == 1 and form != name):
            continue
        for prefix, unit, _ in _registry().parse_unit_name(form):
            if (
                prefix
                and not form.lower().startswith(prefix)
                and (not _PREFIXED.fullmatch(unit) or form.endswith("s") and unit != "second")
            ):
                continue
            return _make_unit(prefix + unit)
    return None


def _make_unit(name: str) -> Unit | None:
    registry = _registry()
    size, base_units = registry.get_root_units(name)
    dimension = tuple(sorted((base, int(exponent)) for base, exponent in base_units._units.items()))
    if not dimension:  # a percentage, a count or a level in decibels
        return None
    size = Fraction(size)
    if dimension == (("radian", 1),) and (size / _PI).denominator < 10**9:
        return Unit(dimension, size / _PI, pi=1)
    return Unit(dimension, size, offset=_OFFSETS.get(name, Fraction(0)))


@functools.lru_cache(maxsize=1)
def _registry() -> Any:
    try:
        import pint
    except ImportError as error:
        raise ImportError("Judging units needs pint: pip install trl-prime[math]") from error
    registry = pint.UnitRegistry(non_int_type=Fraction, on_redefinition="ignore")
    for definition in _DEFINITIONS:
        registry.define(definition)
    return registry


def times(value: str, factor: Fraction) -> str:
    """Write a value times a factor as LaTeX."""
    return rf"({value}) \cdot {_fraction(factor)}"


def _fraction(number: Fraction) -> str:
    return rf"\frac{{{number.numerator}}}{{{number.denominator}}}"
