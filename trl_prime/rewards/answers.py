r"""Final answers of mathematical text: find them, and judge one against the gold answer with Math-Verify.

Covered: extraction from completions and gold fields in bounded time; numbers, fractions, percentages, units, sets,
intervals, tuples, matrices, equations, words and multiple choice. Parsing and comparing expressions is Math-Verify's;
this module cleans what Math-Verify is given, reads what it has no notion of (words, units, percentages as numbers), and
checks its verdict where it is known to be too generous.

Not covered: limits of time and memory. `judge` can run for ever (`9^{9^{9^9}}`), see `worker_pool`. A worker loads this
file on its own, so it imports nothing of the package.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction
from typing import Any, NamedTuple

MAX_ANSWER_LENGTH = 4096  # characters; what is longer is not judged

# ---------------------------------------------------------------------------------------------------------------------
# Extraction

# Bounds that keep extraction fast on any text: boxes looked back at, and how much of the end the fallbacks read
_MAX_BOXES = 16
_TAIL = 32_768

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s{0,4}")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_JOINED = re.compile(r"[\s$]*(?:\\[\])])?[\s$]*(?:,|;|,?\s?and|,?\s?or)[\s$]*(?:\\[\[(])?[\s$]*")
_NUMBER = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_MARKER = re.compile(
    r"\banswers?(?:\s(?:to|of|for)\s[^.\n:=]{1,80}?)?(?:\*\*|\s){0,4}(?:is|are|:|=)(?:\*\*|\s|:){0,8}(?=\S)",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"\n|[.;!?](?=\s|\*|$)|,?\s(?:because|since|as|which|where|so|but|when)\s")
# As in pandoc: an opening dollar touches its formula, so does the closing one, and no digit follows; "$5 and $6" and
# "2 * $5 = $10" are money
_INLINE = r"(?<![\\$])\$(?![\s$])[^$\n]+?(?<![\s\\=+*/-])\$(?![\d$])"
_FORMULA = rf"(?:\$\$[^$]+\$\$|\\\[.+?\\\]|\\\(.+?\\\)|{_INLINE})"
_FORMULAS = re.compile(rf"{_FORMULA}(?:\s?(?:,|,?\s?and|,?\s?or)\s?{_FORMULA})*", re.DOTALL)
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,} [a-zA-Z]{2,}")
_LAST_NUMBER = re.compile(rf"(?<![\w.])[$£€]?({_NUMBER}(?:\s?/\s?\d+)?(?:\s?\\?%)?)(?!\w)")


def extract_answer(text: str, boxed_only: bool = False) -> str | None:
    r"""
    The final answer of a completion, in time that grows at most linearly, whatever the text.

    If there is a `</think>`, only what follows the last one counts. Then the first of these that is there:

    1. the last `\boxed{}` or `\fbox{}` that is not empty; nested braces are kept, an unclosed box reaches to the end of
       its line, and boxes joined by a comma, "and" or "or" are a list;
    2. the number after the last `####`, GSM8K's format;
    3. what follows the last "the answer is", "Answer:" and the like: its formulas, else the words to the end of the clause;
    4. the last formula, `$...$`, `$$...$$`, `\(...\)` or `\[...\]`;
    5. the last number.

    2 to 5 read the last 32,768 characters only.

    Args:
        text (`str`): The completion.
        boxed_only (`bool`, *optional*, defaults to `False`): Stop after 1, to train the format too.

    Returns:
        `str` or `None`: the answer as written, cut a little above `MAX_ANSWER_LENGTH`; None if there is none.
    """
    text = text.rpartition("</think>")[2]
    answer = _last_boxes(text)
    if answer is not None or boxed_only:
        return answer
    tail = text[-_TAIL:]
    return _after_hashes(tail) or _after_marker(tail) or _last_formula(tail) or _last_number(tail)


def extract_gold(gold: Any) -> str | None:
    r"""
    The gold answer in a field of a data set: bare LaTeX, `$...$`, text with a `\boxed{}`, GSM8K's `#### 42` at the end of
    its solution, "The answer is ...", or a number.

    Args:
        gold (`Any`): The field.

    Returns:
        `str` or `None`: the answer as written; None if the field is None or empty.
    """
    if gold is None:
        return None
    gold = str(gold).strip()
    answer = _last_boxes(gold)
    if answer is None:
        solution, hashes, answer = gold.rpartition("####")
        answer = answer.strip() if hashes else _after_marker(gold[-_TAIL:]) or gold
    return answer or None


def _last_boxes(text: str) -> str | None:
    """The last box that is not empty, after those before it that it is joined to."""
    contents: list[str] = []
    end, next_start = len(text), None
    for _ in range(_MAX_BOXES):
        end = max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))
        box = _BOX.match(text, end) if end >= 0 else None
        if end < 0:
            break
        content, stop = _box_content(text, box.end()) if box else ("", end)
        if not content:
            continue
        if next_start is not None and not (
            stop <= next_start <= stop + 32 and _JOINED.fullmatch(text, stop, next_start)
        ):
            break
        contents.append(content)
        next_start = end
    return ", ".join(reversed(contents)) or None


def _box_content(text: str, start: int) -> tuple[str, int]:
    r"""What the box holds whose argument begins at `start`, and where it ends; `\boxed 5` has an argument too."""
    if text[start : start + 1] != "{":
        token = re.compile(r"[^\s$.,]{0,64}").match(text, start)
        return token.group(), token.end()
    limit = start + MAX_ANSWER_LENGTH + 8
    depth = 0
    for token in _BRACE.finditer(text, start, limit):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[start + 1 : token.start()].strip(), token.end()
    line = re.compile(r"[^\n$]*").match(text, start + 1, limit)
    return line.group().strip(), line.end()


def _after_hashes(text: str) -> str | None:
    rest = text.rpartition("####")[2] if "####" in text else ""
    # Also the mark of a Markdown heading: "#### Step 2"
    match = re.match(rf"\s?(?:[-+]?\\?[$£€]\s?)?{_NUMBER}[^\n]{{0,64}}", rest)
    return _clause(match.group()) if match else None


def _after_marker(text: str) -> str | None:
    start = max((match.end() for match in _MARKER.finditer(text)), default=None)
    if start is None:
        return None
    rest = text[start : start + MAX_ANSWER_LENGTH]
    clause = _clause(rest)
    formulas = _FORMULAS.search(rest)
    # Not a formula that comes after the clause, or after a number
    if formulas and formulas.start() <= len(clause) and not re.search(r"\d", rest[: formulas.start()]):
        return formulas.group()
    return clause or None


def _clause(text: str) -> str:
    end = _CLAUSE_END.search(text)
    return (text[: end.start()] if end else text).strip(" *")


def _last_formula(text: str) -> str | None:
    # Two words in a row are not a formula but what is between two sums of money
    inline = (match for match in re.finditer(_INLINE, text) if not _PROSE.search(match.group()))
    spans = [(match.start(), match.end()) for match in inline][-1:]
    for opening, closing in (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)")):
        end = text.rfind(closing)
        start = text.rfind(opening, 0, max(end, 0))
        if start >= 0:
            spans.append((start, end + 2))
    start, end = max(spans, default=(0, 0))
    return text[start:end] or None


def _last_number(text: str) -> str | None:
    return max(((match.start(), match.group(1)) for match in _LAST_NUMBER.finditer(text)), default=(0, None))[1]


# ---------------------------------------------------------------------------------------------------------------------
# Cleaning

_SYMBOLS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u00f7": "/",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u221a": r"\sqrt ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2260": r"\ne ",
        "\u222a": r"\cup ",
        "\u2229": r"\cap ",
        "\u2208": r"\in ",
        "\u2205": r"\emptyset ",
        "\u00b1": r"\pm ",
        "\u00b0": r"^\circ ",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u00bd": r"\frac{1}{2}",
        "\u00bc": r"\frac{1}{4}",
        "\u00be": r"\frac{3}{4}",
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
    }
)
# In this order. Spacing and delimiters first, then forms that Math-Verify misreads
_CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\\(?:displaystyle|textstyle|limits|bf|rm|it)(?![a-zA-Z])|\\phantom\{[^{}]*\}", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?=[\s()\[\]|.\\])\s?", ""),
        (r"\\(?:langle|lparen)(?![a-zA-Z])", "("),
        (r"\\(?:rangle|rparen)(?![a-zA-Z])", ")"),
        (r"\\leqslant(?![a-zA-Z])", r"\\le"),
        (r"\\geqslant(?![a-zA-Z])", r"\\ge"),
        (r"\\varnothing(?![a-zA-Z])|^\\?\{\s?\\?\}$", r"\\emptyset "),
        (r"(?<=\d)(?:\{,\}|,\\! ?|\\[,! ]|~| )(?=\d{3}(?!\d))", ","),  # thousands
        (r"\\(?:,|;|:|!|>|quad|qquad|hspace\{[^{}]*\})|~|(?<!\\)\\ ", " "),
        (r"\\?\$|[£€]|\*\*", ""),  # delimiters, and money
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"(?i)\\?%|\s?\bper\s?cent\b|\\text\{\s?per\s?cent\s?\}", r"\\%"),
        (r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d+)(?![\w.])", r"\1\\times 10^{\2}"),
        (r"(?<![a-zA-Z\\{])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?:\\|(?<![a-zA-Z\\]))sqrt\s?(?:\{([^{}()]*)\}|\(([^()]*)\))", r"\\sqrt{\1\2}"),
        (r"(?i)(?<![a-zA-Z\\{])infinity(?![a-zA-Z])", r"\\infty "),
        (r"\{,\}", ","),
        (r"(?<![\w.])(\d+) (\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),  # 1 1/2
        (r"\\(?:boldsymbol|bm|underline)\s?\{([^{}]*)\}", r"\1"),
        (r"^\\\{\s?[a-z](?:\s?\\in\s?\\mathbb\s?\{?R\}?)?\s?(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # {x | x > 3}
        (r"^\s?(?:\\approx(?![a-zA-Z])|=)", ""),
        (r"\s+", " "),
    )
]
# A decimal is equal within Math-Verify's six places, and four digits
_ABSOLUTE_TOLERANCE, _RELATIVE_TOLERANCE = Fraction(1, 2 * 10**6), Fraction(1, 10**4)
_SEQUENCE = re.compile(r"([(\[]|\\\{)([^()\[\]]*)([)\]]|\\\})")
_PLAIN_NUMBER = re.compile(
    r"([-+]?)(?:(\d{1,64}(?:\.\d{0,64})?|\.\d{1,64})"
    r"|\\frac\{(-?\d{1,64})\}\{(-?\d{1,64})\}|(-?\d{1,64})/(\d{1,64}))"
)
_GROUPED_INTEGER = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def clean(text: str) -> str:
    r"""
    An answer without what carries no meaning: delimiters, spacing commands, currency signs, thousands separators, a full
    stop at the end; and with Unicode symbols, `1.1e1`, `percent` and bare `pi` and `sqrt` as LaTeX.

    Args:
        text (`str`): The answer as written, at most `MAX_ANSWER_LENGTH` long.

    Returns:
        `str`: the same answer.
    """
    text = text.translate(_SYMBOLS)
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    text = text.lstrip(" :,;").rstrip(" :,;\\")
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip(" \\")
    return text.replace(",", "") if _GROUPED_INTEGER.fullmatch(text) else text


def quick_verdict(answer: str, gold: str) -> bool | None:
    """
    The verdict where comparing text is enough: the same text after `clean`, two plain decimals or fractions, or two tuples,
    intervals or sets of them.

    Args:
        answer (`str`): The answer as written.
        gold (`str`): The gold answer as written.

    Returns:
        `bool` or `None`: None if it takes `judge`.
    """
    answer, gold = clean(answer), clean(gold)
    if _without_spaces(answer) == _without_spaces(gold) != "":
        return True
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


def _plain_numbers(text: str) -> tuple[str, list[Fraction]] | None:
    """The brackets of a sequence of plain numbers and the numbers; of one number alone, no brackets."""
    match = _SEQUENCE.fullmatch(text)
    numbers = [_plain_number(item) for item in (match[2].split(",") if match else [text])]
    if None in numbers or (match and len(numbers) < 2):
        return None
    return (match[1] + match[3] if match else "", numbers)


def _plain_number(text: str) -> Fraction | None:
    match = _PLAIN_NUMBER.fullmatch(_without_spaces(text))
    if not match:
        return None
    sign, number, *terms = match.groups()
    numerator, denominator = (int(term) for term in terms if term) if not number else (Fraction(number), 1)
    if denominator == 0:
        return None
    return Fraction(numerator) / denominator * (-1 if sign == "-" else 1)


def _without_spaces(text: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


# ---------------------------------------------------------------------------------------------------------------------
# Judging

_TEXT = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s?"
_WRAPPED = re.compile(_TEXT + r"\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '\u2019.,/&()-]*")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "frac", "max", "min", "gcd", "lcm"}
_CHOICE = re.compile(r"\(?([A-Ja-j])\)(?:[.:]?\s?(.*))?|([A-J])(?:[.:]\s?(.*))?")

_MULTIPLIERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Dimension: names of units, their size in the first one
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
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_DEGREE_SIGN = re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)")
_DEGREES = re.compile(r"(.*?)\s?\^\s?\{?\s?\\circ\s?\}?\s?(?:" + _TEXT + r"\{)?([CF]?)\}?")
_NAMES = r"[A-Za-z](?:[A-Za-z /.-]|\^-?\d)*"
_UNIT = re.compile(
    rf"(.*(?:[\d)}}\]%]|\\pi))(\s?)(?:{_TEXT}\{{\s?({_NAMES})\}}|({_NAMES}))(?:\^\s?(?:\{{([23])\}}|([23])))?"
)
_BASE = re.compile(r"(\d+)_(?:\{(\d+)\}|(\d+))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s?(?:\{(\d+)\}|(\d))")


def judge(answer: str, gold: str) -> bool | None:
    r"""
    Whether an answer equals the gold answer. May take for ever and any amount of memory: run it in a `WorkerPool`.

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
        ImportError: Math-Verify is not installed.
    """
    verdict = quick_verdict(answer, gold)
    if verdict is not None:
        return verdict
    answer, gold = clean(answer), clean(gold)
    if not gold:
        return None

    gold_choice, answer_choice = _choice(gold), _choice(answer)
    if gold_choice and answer_choice:
        return gold_choice == answer_choice
    gold_words, answer_words = _words(gold), _words(answer)
    if gold_words or (answer_words and _words(gold, 2)):
        return (gold_words or _words(gold, 2)) == (answer_words or _words(answer, 2))
    if answer_words:
        return False if _parse(_split_unit(gold)[0]) is not None else None
    return _judge_quantity(answer, gold)


def _choice(text: str) -> str | None:
    """The letter of a multiple-choice answer, `B`, `(B)`, `b)` or `B. its text`; None if other letters follow."""
    match = _CHOICE.fullmatch(_WRAPPED.sub(r"\1", text).strip())
    if not match:
        return None
    letter, rest = match.group(1) or match.group(3), match.group(2) or match.group(4) or ""
    return None if re.search(r"(?:^|[\s(,])(?:[A-J](?:[\s).,]|$)|or\s|and\s)", rest) else letter.upper()


def _words(text: str, least: int | None = None) -> tuple[str, ...] | None:
    """A text answer in lower case without articles; None if it is mathematics, or no word has `least` letters."""
    plain = _WRAPPED.sub(r" \1 ", text).strip()
    words = re.findall(r"[a-z']+", plain.lower())
    if least is None:
        # Few letters that are not marked as text are a product of variables, for which Math-Verify knows that ab = ba
        least = 4 if re.search(r"[A-Za-z]", _WRAPPED.sub("", text)) else 2
    longest = max((len(word) for word in words if word not in ("and", "or")), default=0)
    if not _WORDS.fullmatch(plain) or longest < least or _FUNCTIONS & set(words):
        return None
    words = [word for word in words if word not in ("a", "an", "the")]
    # "Ann and Bob" is an unordered pair; a list with commas may be an order
    return tuple(sorted(words)) if "and" in words and "," not in plain else tuple(w for w in words if w != "and")


def _judge_quantity(answer: str, gold: str) -> bool | None:
    # Of "1/3 \approx 0.333" what has the gold's form counts
    if r"\approx" in answer and r"\approx" not in gold:
        answer = answer.split(r"\approx")[-1 if "." in gold else 0].strip()
    gold_base, answer_base = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if gold_base or answer_base:
        return _judge_base(answer_base or answer, gold_base or gold)

    gold, gold_unit = _split_unit(gold)
    # 5m is five metres only where no variable is expected
    answer, answer_unit = _split_unit(answer, glued=not re.search("[a-zA-Z]", gold))
    if gold_unit and answer_unit:
        if gold_unit.dimension != answer_unit.dimension:
            return False
        if gold_unit.size != answer_unit.size:
            gold, answer = _times(gold, gold_unit.size), _times(answer, answer_unit.size)

    gold_number, answer_number = gold.removesuffix(r"\%"), answer.removesuffix(r"\%")
    verdict = _equal(answer_number, gold_number)
    if verdict is False and (gold_number != gold) != (answer_number != answer):
        if gold_number != gold:
            gold_number = _times(gold_number, Fraction(1, 100))
        else:
            answer_number = _times(answer_number, Fraction(1, 100))
        verdict = _equal(answer_number, gold_number)
    return verdict


def _judge_base(answer: re.Match | str, gold: re.Match | str) -> bool:
    """Numerals like 4210_5. The problem usually names the base, so it may be left out."""
    digits, bases = zip(
        *((m, None) if isinstance(m, str) else (m[1], m[2] or m[3]) for m in (answer, gold)), strict=True
    )
    if None in bases or bases[0] == bases[1]:
        return digits[0].lstrip("0") == digits[1].lstrip("0")
    try:
        return int(digits[0], int(bases[0])) == int(digits[1], int(bases[1]))
    except ValueError:  # no base, or no digit of it
        return False


class _Unit(NamedTuple):
    dimension: str
    size: Fraction


def _split_unit(text: str, glued: bool = False) -> tuple[str, _Unit | None]:
    """
    A quantity's number, and its unit if it is one of the table. Other words after a number ("5 apples") are dropped,
    words like "million" are multiplied into the number. `glued` says that one letter right after a number may be a unit.
    """
    degrees = None if _TRIGONOMETRIC.search(text) else _DEGREES.fullmatch(text)
    if degrees:
        return degrees[1], _Unit(f"angle{degrees[2]}^1", Fraction(1))
    match = _UNIT.fullmatch(text)
    if not match:
        return text, None
    value, space, wrapped, bare, *powers = match.groups()
    names = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", wrapped or bare).strip(" .").split()
    # `2i`, `2ab` and `2 x` are products; `2 m` is a length
    is_number = re.fullmatch(r"[-+\d.,/ ]+", value) is not None
    if not names or {"and", "or"} & set(names) or names[0] in _FUNCTIONS:
        return text, None
    known = _unit(names[-1])
    if bare and not (is_number and (space or glued)) and (len(names[0]) < 2 or not known):
        return text, None
    if any(len(name) < 2 and not (known and name == names[-1]) for name in names):
        return text, None

    if names[0].lower() in _MULTIPLIERS:
        value = _times(value, Fraction(_MULTIPLIERS[names.pop(0).lower()]))
    exponent = int(powers[0] or powers[1] or _POWERS.get(names[0].lower() if names else "", 1))
    names = names[-1:] if names and names[0].lower() in _POWERS else names
    if len(names) == 1 and known:
        return value, _Unit(f"{known.dimension}^{exponent}", known.size**exponent)
    return value, None


def _unit(name: str) -> _Unit | None:
    for form in (name, name.lower(), name.lower().removesuffix("s"), name.lower().removesuffix("es")):
        # Of single letters only the litre is also written as a capital; N, K, C are others
        if form in _UNITS and (len(name) > 1 or name.islower() or name == "L"):
            dimension, size = _UNITS[form]
            return _Unit(dimension, Fraction(*size))
    return None


def _times(value: str, factor: Fraction) -> str:
    return rf"({value}) \cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"


def _equal(answer: str, gold: str) -> bool | None:
    """Math-Verify's verdict, overruled where it is too generous; None if it does not understand the gold answer."""
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
    if _differ_numerically(answer_expression, gold_expression):
        return False
    return verify(gold_expression, answer_expression, allow_set_relation_comp=True, timeout_seconds=None)


@functools.lru_cache(maxsize=256)  # the completions of a group share their gold answer
def _parse(text: str) -> Any:
    """The SymPy expression of a LaTeX text; None if Math-Verify does not understand it."""
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse
    except ImportError as error:
        raise ImportError("Judging answers needs Math-Verify: pip install trl-prime[math]") from error
    # Without a time limit, which is the pool's, each call would warn
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = _REPEATING.sub(_repeating_fraction, text)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREE_SIGN.sub(r"\\cdot\\frac{\\pi}{180}", text)
    # Not its units: those take the variables of "5m" and "x + 3t" for units
    normalization = NormalizationConfig(
        basic_latex=True, malformed_operators=True, nits=True, units=False, boxed="none"
    )
    config = LatexExtractionConfig(normalization_config=normalization)
    expressions = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return _union_of_inequalities(expressions[0]) if expressions else None


def _union_of_inequalities(expression: Any) -> Any:
    """The set that "x < 1 or x > 2" describes, which Math-Verify reads as a set of two inequalities; others unchanged."""
    import sympy

    parts = expression.args if isinstance(expression, sympy.FiniteSet) else ()
    if len(parts) < 2 or not all(isinstance(part, sympy.Rel) and not isinstance(part, sympy.Eq) for part in parts):
        return expression
    if len(expression.free_symbols) != 1:
        return expression
    try:
        return sympy.Union(*(part.as_set() for part in parts))
    except (NotImplementedError, TypeError, ValueError):  # periodic or not solvable
        return expression


def _repeating_fraction(match: re.Match) -> str:
    whole, fixed, repeating = match[1] or "0", match[2], match[3] or match[4]
    denominator = (10 ** len(repeating) - 1) * 10 ** len(fixed)
    numerator = int(whole + fixed + repeating) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _differ_numerically(first: Any, second: Any) -> bool:
    """
    Whether two expressions certainly have different values, seen by evaluating them, with small numbers for variables.

    Math-Verify's tolerances are absolute, so for it 1/2^99 equals 1/2^98 and 0.0000671 equals 0.0000672; and where it is
    right that two expressions differ, this takes a tenth of the time.
    """
    import sympy

    if isinstance(first, sympy.Eq) and isinstance(second, sympy.Eq) and first.lhs != second.lhs:
        return False
    (first_kind, first), (second_kind, second) = _values(first), _values(second)
    if first_kind != second_kind or len(first) != len(second):
        return False
    for pair in zip(first, second, strict=True):
        variables = pair[0].free_symbols | pair[1].free_symbols
        # A lone symbol can be a word, which Math-Verify compares with a product of letters
        is_word = pair[0].free_symbols != pair[1].free_symbols and any(value.is_Symbol for value in pair)
        if pair[0] == pair[1] or is_word or any(value.has(*_lazy_types()) for value in pair):
            continue
        tolerance = _RELATIVE_TOLERANCE if any(value.has(sympy.Float) for value in pair) else Fraction(1, 10**12)
        # By name: whether a symbol is assumed to be real depends on the text it is in
        primes = dict(zip(sorted({str(symbol) for symbol in variables}), sympy.primerange(3, 200), strict=False))
        places = {symbol: primes.get(str(symbol), 2) for symbol in variables}
        a, b = (sympy.N(value.subs(places), 30) for value in pair)
        if not all(number.is_number and number.is_finite for number in (a, b)):
            continue
        distance, scale = abs(a - b), max(abs(a), abs(b))
        # Zero written as a difference of radicals evaluates to about 1e-120
        if distance > scale * sympy.Rational(tolerance) and distance > sympy.Float("1e-90"):
            return True
    return False


def _lazy_types() -> tuple[type, ...]:
    """What cannot be evaluated at a point, or takes long."""
    import sympy

    return sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit, sympy.MatrixBase


def _values(expression: Any) -> tuple[str, list]:
    """What has a value in an expression, in an order that is the same for equal ones; none where there is no such order."""
    import sympy

    if isinstance(expression, sympy.Eq) and expression.lhs.is_Symbol:
        return _values(expression.rhs)
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
