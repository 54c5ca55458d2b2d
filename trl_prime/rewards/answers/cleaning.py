r"""Take from an answer what carries no meaning, and write what is left as LaTeX that Math-Verify reads rightly."""

from __future__ import annotations

import re

# `TEXT` matches commands that wrap words; the names below are functions, not words or units
TEXT = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s?"
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "frac", "max", "min", "gcd", "lcm"}
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")

_SYMBOLS = str.maketrans(
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
    | {
        "\u3001": ",",
        "\u3002": ".",
        "\u2248": r"\approx ",
        "\u2103": r"^\circ C",
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
# The order matters: spacing and delimiters come first, then forms that Math-Verify misreads
_CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\\(?:textcolor|colorbox|fcolorbox\s?\{[^{}]*\})\s?\{[^{}]*\}|\\color\s?\{[^{}]*\}", " "),
        (
            r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it|sf|tt|tiny|scriptsize|footnotesize|small|"
            r"normalsize|[lL]arge|LARGE|[hH]uge|strut|mathstrut|boldmath|centering|bfseries)(?![a-zA-Z])|\\[vh]?phantom\{[^{}]*\}",
            "",
        ),
        (
            r"\\(?:mathrm|mathit|operatorname|text(?:rm|it|up)?|mathbf|rm)\s?\{\s?([ei])\s?\}(?=\s?(?:\^|[-+*/=)}&,\\]|$))",
            r"\1",
        ),
        (r"\\(?:mathbf|mathit|textbf|textit|emph|textup|mathrm|text)\s?\{([-+]?[\d.,]+)\}", r"\1"),
        (r"\\operatorname\s?\{\s?(lg|tg|ctg|arctg|arcctg)\s?\}", r"\\\1 "),
        (r"\\lg(?![a-zA-Z])", r"\\log_{10}"),
        (r"\\(arc)?c(?:o)?tg(?![a-zA-Z])", r"\\\1cot "),
        (r"\\(arc)?tg(?![a-zA-Z])", r"\\\1tan "),
        (r"\\approxeq(?![a-zA-Z])|\\(?:simeq|thickapprox|doteq)(?![a-zA-Z])", r"\\approx "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?=[\s()\[\]|.\\])\s?", ""),
        (r"\\(?:langle|lparen)(?![a-zA-Z])", "("),
        (r"\\(?:rangle|rparen)(?![a-zA-Z])", ")"),
        (r"\\leqslant(?![a-zA-Z])", r"\\le"),
        (r"\\geqslant(?![a-zA-Z])", r"\\ge"),
        (r"\\varnothing(?![a-zA-Z])|^\\?\{\s?\\?\}$", r"\\emptyset "),
        (r"(?<![\d.,])0\{,\}(?=\d)", "0."),
        (r"(?<=\d)(?:\{,\}|,\\! ?|\\[,! ]|~| )(?=\d{3}(?!\d))", ","),  # thousands
        (r"\\(?:,|;|:|!|>|quad|qquad|hspace\{[^{}]*\})|~|(?<!\\)\\ ", " "),
        (r"\\?\$|[£€]|\*\*", ""),  # delimiters, and money
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"(?i)\\?%|\s?\bper\s?cent\b|\\text\{\s?per\s?cent\s?\}", r"\\%"),
        (r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d+)(?![\w.])", r"\1\\times 10^{\2}"),
        (r"(?<![a-zA-Z\\{])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?:\\|(?<![a-zA-Z\\]))sqrt\s?(?:\{([^{}()]*)\}|\(([^()]*)\))", r"\\sqrt{\1\2}"),
        (r"(?i)(?<![a-zA-Z\\{])infinity(?![a-zA-Z])", r"\\infty "),
        (r"(?<=\d)\{,\}(?=\d)", "."),  # thousands are joined by now, so it is a decimal comma
        (r"\{,\}", ","),
        (r"(?<![\w.])(\d+) (\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),  # 1 1/2
        (r"\\(?:boldsymbol|bm|underline)\s?\{([^{}]*)\}", r"\1"),
        (r"^\\\{\s?[a-z](?:\s?\\in\s?\\mathbb\s?\{?R\}?)?\s?(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # {x | x > 3}
        (r"^\s?(?:\\approx(?![a-zA-Z])|=)", ""),
        (
            r"^\s?\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox)\s?\{\s?([-+]?[\d.,]+)\s?([^\W\d][^{}\d]*)\}\s?$",
            r"\1\\text{ \2}",  # a number and its unit
        ),
        (r"\s+", " "),
    )
]
_GROUPED_INTEGER = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")


def clean(text: str) -> str:
    r"""
    Take away what carries no meaning: delimiters, spacing, colours and sizes, currency signs, thousands separators, a full stop at
    the end. Unicode symbols, `1.1e1`, `percent` and bare `pi` and `sqrt` become LaTeX, `\mathrm{e}` becomes `e`, and names of
    functions that Math-Verify does not know (`\lg`, `\tg`) those that it knows.

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


def without_spaces(text: str) -> str:
    """Take away the spaces of a text but for those between two digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)
