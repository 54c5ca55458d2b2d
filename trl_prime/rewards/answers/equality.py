r"""Judge an answer against the gold answer.

Parsing and comparing expressions is Math-Verify's. This module reads what Math-Verify has no notion of (words, choices,
units, percentages as numbers, numerals of other bases) and checks its verdict where it is known to be too generous.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction
from typing import Any

from .cleaning import TRIGONOMETRIC, clean, without_spaces
from .units import RADIAN, split_unit, times
from .words import read_choices, read_words

# A decimal is equal if it is so within six places, as for Math-Verify, and within four digits
_ABSOLUTE_TOLERANCE, _RELATIVE_TOLERANCE = Fraction(1, 2 * 10**6), Fraction(1, 10**4)
_MOST_DIGITS = 1000  # with which a difference is evaluated before it counts as zero
_SEQUENCE = re.compile(r"([(\[]|\\\{)([^()\[\]]*)([)\]]|\\\})")
_PLAIN_NUMBER = re.compile(
    r"([-+]?)(?:(\d{1,64}(?:\.\d{0,64})?|\.\d{1,64})"
    r"|\\frac\{(-?\d{1,64})\}\{(-?\d{1,64})\}|(-?\d{1,64})/(\d{1,64}))"
    r"(?:(?:\\times|\\cdot|\*)10\^(?:(\d)|\{([-+]?\d{1,3})\}))?"
)
_SPACED_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:, \d{3})+")
_DECIMAL_COMMA = re.compile(r"[-+]?(?:0|\d{1,64}(?!,\d{3}$)),\d{1,64}")
_DEGREE_SIGN = re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)")
_BASE = re.compile(r"(\d+)_(?:\{(\d+)\}|(\d+))")
_NAME = re.compile(
    r"(?:[A-Za-z]+|\\(?!pi|gamma|frac|sqrt)[a-z]+|\\text\{[^{}]*\})(?:_(?:\w|\{[^{}]*\}))?(?:\([a-z\d]\))?"
)
# Math-Verify reads these as numbers. On the left of "=" they are variables, and the eccentricity in "0 < e < 1" is one, but not
# the bounds of "e < x < 3"
_CONSTANT = re.compile(r"(^\s*|,\s*)(e|I|\\pi|\\gamma|\\Gamma)(?:_(\w|\{[^{}]*\}))?(?=\s*(?:=|\\in(?![a-zA-Z])))")
_INEQUALITY = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-zA-Z])")
_CONSTANT_NAMES = {"e": 1, "I": 2, r"\pi": 3, r"\gamma": 4, r"\Gamma": 5}
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s?(?:\{(\d+)\}|(\d))")


def quick_verdict(answer: str, gold: str) -> bool | None:
    """
    Give the verdict where comparing text is enough: the same text after `clean`, two plain decimals or fractions, or two
    tuples, intervals or sets of them.

    Args:
        answer (`str`): The answer as written.
        gold (`str`): The gold answer as written.

    Returns:
        `bool` or `None`: None if it takes `judge`.
    """
    answer, gold = clean(answer), clean(gold)
    if without_spaces(answer) == without_spaces(gold) != "":
        return True
    if _plain_number(gold) is not None:
        answer = _one_number(answer)
    first, second = _plain_numbers(answer), _plain_numbers(gold)
    if first is None or second is None or first[0] != second[0]:
        return None
    (brackets, numbers), (_, gold_numbers) = first, second
    if brackets == r"\{\}":
        numbers, gold_numbers = sorted(numbers), sorted(gold_numbers)
    if len(numbers) != len(gold_numbers):
        return None if brackets == r"\{\}" else False  # a set may name an element twice
    is_decimal = "." in answer + gold
    return all(
        abs(number - gold_number) <= min(_ABSOLUTE_TOLERANCE, _RELATIVE_TOLERANCE * max(abs(number), abs(gold_number)))
        if is_decimal
        else number == gold_number
        for number, gold_number in zip(numbers, gold_numbers, strict=True)
    )


def _one_number(text: str) -> str:
    """Read "1, 320" as 1320 and "3,14" as 3.14, where one number is expected and no list."""
    if _SPACED_THOUSANDS.fullmatch(text):
        return text.replace(", ", "")
    return text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text


def _plain_numbers(text: str) -> tuple[str, list[Fraction]] | None:
    """Read a sequence of plain numbers: its brackets and the numbers. One number alone has no brackets."""
    match = _SEQUENCE.fullmatch(text)
    numbers = [_plain_number(item) for item in (match[2].split(",") if match else [text])]
    if None in numbers or (match and len(numbers) < 2):
        return None
    return (match[1] + match[3] if match else "", numbers)


def _plain_number(text: str) -> Fraction | None:
    match = _PLAIN_NUMBER.fullmatch(without_spaces(text))
    if not match:
        return None
    sign, number, *terms, digit, exponent = match.groups()
    numerator, denominator = (int(term) for term in terms if term) if not number else (Fraction(number), 1)
    if denominator == 0:
        return None
    return Fraction(numerator) / denominator * Fraction(10) ** int(digit or exponent or 0) * (-1 if sign == "-" else 1)


def judge(answer: str, gold: str) -> bool | None:
    r"""
    Tell whether an answer equals the gold answer. It may take for ever and any amount of memory: run it in a `WorkerPool`.

    What counts as equal beyond mathematics is convention: a unit may be left out, but another unit is converted or wrong
    (500 cm is 5 m, 5 s is not); a percentage equals its value and, as in the answer to "how many percent", its number, so
    50\\% is 0.5 and 50, but 50 is not 0.5; `x=3` equals 3 but not `y=3`; a decimal equals what it is within 6 places and
    4 digits, so 0.333333 is 1/3 and 0.33 is not; words are compared as words, and a choice by its letter.

    Args:
        answer (`str`): The answer, as `extract_answer` returns it.
        gold (`str`): The gold answer, as `extract_gold` returns it.

    Returns:
        `bool` or `None`: None if the gold answer cannot be understood and the answer is not the same text.

    Raises:
        ImportError: Math-Verify or pint is not installed.
    """
    verdict = quick_verdict(answer, gold)
    if verdict is not None:
        return verdict
    answer, gold = clean(answer), clean(gold)
    if not gold:
        return None

    gold_choices, answer_choices = read_choices(gold), read_choices(answer)
    if gold_choices and answer_choices:
        return gold_choices == answer_choices
    gold_words, answer_words = read_words(gold), read_words(answer)
    if gold_words or (answer_words and read_words(gold, 2)):
        return (gold_words or read_words(gold, 2)) == (answer_words or read_words(answer, 2))
    if answer_words:
        return False if _parse(split_unit(gold)[0]) is not None else None
    return _judge_quantity(answer, gold)


def _judge_quantity(answer: str, gold: str) -> bool | None:
    gold, answer = _variable_is_assigned(gold), _variable_is_assigned(answer)
    if r"\approx" in gold and r"\approx" not in answer:
        verdicts = [_judge_quantity(answer, side.strip()) for side in gold.split(r"\approx")]
        return True if True in verdicts else verdicts[0]
    # In "1/3 \approx 0.333" the side that has the gold's form counts
    if r"\approx" in answer and r"\approx" not in gold:
        answer = answer.split(r"\approx")[-1 if "." in gold else 0].strip()
    gold_base, answer_base = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if gold_base or answer_base:
        return _judge_base(answer_base or answer, gold_base or gold)

    gold, gold_unit = split_unit(gold)
    # "5m" is five metres only where no variable is expected
    answer, answer_unit = split_unit(answer, glued=not re.search("[a-zA-Z]", gold))
    # A number of radians is written without the unit
    if gold_unit and not answer_unit and gold_unit.dimension == RADIAN.dimension and r"\pi" in answer:
        answer_unit = RADIAN
    if answer_unit and not gold_unit and answer_unit.dimension == RADIAN.dimension and r"\pi" in gold:
        gold_unit = RADIAN
    if gold_unit and answer_unit:
        if gold_unit.dimension != answer_unit.dimension:
            return False
        if gold_unit != answer_unit:
            answer = answer_unit.convert(answer, gold_unit)

    gold_number, answer_number = gold.removesuffix(r"\%"), answer.removesuffix(r"\%")
    verdict = _equal(answer_number, gold_number)
    if verdict is False and (gold_number != gold) != (answer_number != answer):
        if gold_number != gold:
            gold_number = times(gold_number, Fraction(1, 100))
        else:
            answer_number = times(answer_number, Fraction(1, 100))
        verdict = _equal(answer_number, gold_number)
    return verdict


def _variable_is_assigned(text: str) -> str:
    r"""Write "x \approx 11" as "x = 11": its left side is a name, while that of "\pi \approx 3.14" is a value."""
    name, approx, value = text.partition(r"\approx")
    return f"{name}={value}" if approx and _NAME.fullmatch(name.strip()) else text


def _judge_base(answer: re.Match | str, gold: re.Match | str) -> bool:
    """Compare numerals like 4210_5. The problem usually names the base, so it may be left out."""
    digits, bases = zip(
        *((m, None) if isinstance(m, str) else (m[1], m[2] or m[3]) for m in (answer, gold)), strict=True
    )
    if None in bases or bases[0] == bases[1]:
        return digits[0].lstrip("0") == digits[1].lstrip("0")
    try:
        return int(digits[0], int(bases[0])) == int(digits[1], int(bases[1]))
    except ValueError:  # that is no base, or a digit does not belong to it
        return False


def _equal(answer: str, gold: str) -> bool | None:
    """Ask Math-Verify, and overrule it where it is too generous; None if it does not understand the gold answer."""
    verdict = quick_verdict(answer, gold)
    if verdict is not None:
        return verdict
    gold_expression = _parse(gold)
    if gold_expression is None:
        return None
    answer_expression = _parse(answer)
    if answer_expression is None:
        return False
    from math_verify import verify
    from sympy import Interval, Tuple

    for text, other in ((answer, gold_expression), (gold, answer_expression)):
        if text.startswith(r"\{") and isinstance(other, (Interval, Tuple)):  # {1, 2} is no ordered pair
            return False
    answer_expression, gold_expression = _as_vectors(answer_expression, gold_expression)
    verdict = _compare_values(answer_expression, gold_expression)
    if verdict is not None:
        return verdict
    return verify(gold_expression, answer_expression, allow_set_relation_comp=True, timeout_seconds=None)


def _as_vectors(first: Any, second: Any) -> tuple[Any, Any]:
    """Where one of two expressions is a row or a column and the other a tuple, make both tuples."""
    import sympy

    def is_vector(value: Any) -> bool:
        return isinstance(value, sympy.MatrixBase) and 1 in value.shape

    def as_tuple(value: Any) -> Any:
        if is_vector(value):
            return sympy.Tuple(*value.flat())
        is_pair = isinstance(value, sympy.Interval) and value.left_open and value.right_open
        return sympy.Tuple(value.start, value.end) if is_pair else value

    if is_vector(first) != is_vector(second):
        return as_tuple(first), as_tuple(second)
    return first, second


@functools.lru_cache(maxsize=256)  # the completions of a group share their gold answer
def _parse(text: str) -> Any:
    """Make a SymPy expression of a LaTeX text; None if Math-Verify does not understand it."""
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse
    except ImportError as error:
        raise ImportError("Judging answers needs Math-Verify: pip install trl-prime[math]") from error
    # Math-Verify warns at each call without a time limit, but the limit is the pool's
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = _CONSTANT.sub(_variable, text)
    letters = re.sub(r"\\[a-zA-Z]+|[^a-zA-Z]", "", text) if _INEQUALITY.search(text) else ""
    if letters in _CONSTANT_NAMES:
        text = re.sub(rf"(?<![a-zA-Z\\]){letters}(?![a-zA-Z])", rf"x_{{90{_CONSTANT_NAMES[letters]}}}", text)
    if TRIGONOMETRIC.search(text):
        text = _DEGREE_SIGN.sub(r"\\cdot\\frac{\\pi}{180}", text)
    # Math-Verify's units are off because they take the variables of "5m" and "x + 3t" for units
    normalization = NormalizationConfig(
        basic_latex=True, malformed_operators=True, nits=True, units=False, boxed="none"
    )
    config = LatexExtractionConfig(normalization_config=normalization)
    expressions = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return _union_of_inequalities(expressions[0]) if expressions else None


def _union_of_inequalities(expression: Any) -> Any:
    """Make the set that "x < 1 or x > 2" describes; Math-Verify reads a set of two inequalities. Others stay unchanged."""
    import sympy

    parts = expression.args if isinstance(expression, sympy.FiniteSet) else ()
    if len(parts) < 2 or not all(isinstance(part, sympy.Rel) and not isinstance(part, sympy.Eq) for part in parts):
        return expression
    if len(expression.free_symbols) != 1:
        return expression
    try:
        return sympy.Union(*(part.as_set() for part in parts))
    except (NotImplementedError, TypeError, ValueError):  # it is periodic or not solvable
        return expression


def _variable(match: re.Match) -> str:
    """Write a constant's name as that of a variable, which has a number because such names are parsed."""
    subscript = "".join(str(ord(letter)) for letter in match[3] or "" if letter.isalnum())
    return f"{match[1]}x_{{90{_CONSTANT_NAMES[match[2]]}{subscript}}}"


def _repeating_fraction(match: re.Match) -> str:
    whole, fixed, repeating = match[1] or "0", match[2], match[3] or match[4]
    denominator = (10 ** len(repeating) - 1) * 10 ** len(fixed)
    numerator = int(whole + fixed + repeating) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _compare_values(first: Any, second: Any) -> bool | None:
    """
    Tell whether two expressions have equal values; None if that could not be told.

    Numbers are compared here, because Math-Verify's tolerances are absolute: for it 1/2^99 equals 1/2^98, and 0.0000671 equals
    0.0000672. Of expressions with variables it is found that they differ, by numbers in the place of the variables, which takes a
    tenth of Math-Verify's time.
    """
    import sympy

    if isinstance(first, sympy.Eq) and isinstance(second, sympy.Eq):
        if first.lhs != second.lhs and not (_is_constant(first.lhs) and _is_constant(second.lhs)):
            return None
        first, second = first.rhs, second.rhs
    (first_kind, first), (second_kind, second) = _values(first), _values(second)
    if first_kind != second_kind or len(first) != len(second):
        return None
    verdicts = []
    for pair in zip(first, second, strict=True):
        variables = pair[0].free_symbols | pair[1].free_symbols
        # A lone symbol can be a word, which Math-Verify compares with a product of letters
        is_word = pair[0].free_symbols != pair[1].free_symbols and any(value.is_Symbol for value in pair)
        if is_word or any(value.has(*_lazy_types()) for value in pair):
            verdicts.append(None)
            continue
        # Symbols are matched by name, because whether one is assumed to be real depends on the text it is in
        primes = dict(zip(sorted({str(symbol) for symbol in variables}), sympy.primerange(3, 200), strict=False))
        places = {symbol: sympy.I if str(symbol) == "i" else primes.get(str(symbol), 2) for symbol in variables}
        verdict = _compare_numbers(*(value.subs(places) for value in pair))
        if verdict is False:
            return False
        verdicts.append(verdict if {str(symbol) for symbol in variables} <= {"i"} else None)
    return True if verdicts == [True] and first_kind == "value" else None


def _compare_numbers(first: Any, second: Any) -> bool | None:
    """
    Compare two constants: decimals within the tolerances, other numbers exactly.

    A difference that is 0 to 1000 digits and not found to be 0 by arithmetic counts as 0 (sums of radicals).
    """
    import sympy
    from sympy.core.evalf import PrecisionExhausted

    if first == second:
        return True
    decimals = first.atoms(sympy.Float) | second.atoms(sympy.Float)
    if decimals:
        # A decimal as it was written, 8.7 and not the binary fraction next to it
        first, second = (value.xreplace({d: sympy.Rational(str(d)) for d in decimals}) for value in (first, second))
    a, b = (sympy.N(value, 30) for value in (first, second))
    if not all(number.is_number and number.is_finite for number in (a, b)):
        return None
    distance, scale = abs(a - b), max(abs(a), abs(b))
    if decimals:
        return bool(distance <= min(sympy.Rational(_ABSOLUTE_TOLERANCE), scale * sympy.Rational(_RELATIVE_TOLERANCE)))
    agree = distance <= scale * sympy.Rational(1, 10**12)
    if not agree and not _is_noise(min(a, b, key=abs)):
        return False
    difference = (first - second).doit()
    try:
        return bool(abs(difference.evalf(10, maxn=_MOST_DIGITS, strict=True)) == 0)
    except PrecisionExhausted:
        return bool(agree) or all(map(_is_noise, (a, b)))


def _is_noise(number: Any) -> bool:
    """Tell whether no digit of an evaluated number is sure, as of a zero that is written as a difference of radicals."""
    return all(getattr(part, "_prec", 53) <= 1 or part == 0 for part in number.as_real_imag())


def _lazy_types() -> tuple[type, ...]:
    """Return the types that cannot be evaluated at a point, or that take long."""
    import sympy

    return sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit, sympy.MatrixBase


def _is_constant(expression: Any) -> bool:
    from sympy import Expr
    from sympy.core.function import AppliedUndef

    return isinstance(expression, Expr) and not expression.free_symbols and not expression.has(AppliedUndef)


def _values(expression: Any) -> tuple[str, list]:
    """List the parts that have a value, in an order that is the same for equal expressions; empty if there is no such order."""
    import sympy

    if isinstance(expression, sympy.Eq) and (expression.lhs.is_Symbol or _is_constant(expression.lhs)):
        return _values(expression.rhs)
    if isinstance(expression, sympy.Rel) and not isinstance(expression, sympy.Eq):
        # Relations of one variable, or of none as "1 < 2"
        side = [] if expression.lhs.is_Symbol else [expression.lhs] if _is_constant(expression.lhs) else None
        return (
            ("value", [])
            if side is None
            else (f"{expression.rel_op} {'' if side else expression.lhs}", [*side, expression.rhs])
        )
    if isinstance(expression, sympy.FiniteSet):
        # Math-Verify lets "2, 1" be the pair (2, 1), so a set is only comparable with a set
        is_real = all(value.is_extended_real and value.is_number for value in expression.args)
        kind, values = "set", sorted(expression.args, key=sympy.N) if is_real else []
    elif isinstance(expression, sympy.Interval):
        kind, values = "sequence", [expression.start, expression.end]
    elif isinstance(expression, sympy.Tuple):
        kind, values = "sequence", list(expression)
    elif isinstance(expression, sympy.MatrixBase):
        kind, values = "matrix", list(expression.flat())
    else:
        kind, values = "value", [expression]
    return kind, values if all(isinstance(value, sympy.Expr) for value in values) else []
