"""Find the program in a completion, and compare its output with the expected one.

All functions are pure and safe on hostile text: they make one pass of regular expressions that cannot backtrack, and do not
parse model-written code.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_FENCE = re.compile(r"^[ \t>]*(`{3,}|~{3,})", re.MULTILINE)
_PYTHON = {"", "python", "py", "python3", "py3", "ipython"}
_READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bfileinput\b|\bopen\s*\(\s*0")
_WRITES_OUTPUT = re.compile(r"\bprint\s*\(|\bstdout\b")
# This matches a number that is written as a real one, whose last digits are a matter of rounding
_REAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", re.ASCII)


def code_blocks(completion: str) -> list[str]:
    """
    List the fenced Python blocks of a completion, in order. Fences without a language count; a block that is never closed
    goes to the end. Text before the last `</think>` is left out.

    Args:
        completion (`str`): Text of a completion.

    Returns:
        `list[str]`: their contents; empty where there are no fences.
    """
    text = completion.rpartition("</think>")[2]
    blocks = []
    opened: tuple[str, bool, int] | None = None
    for match in _FENCE.finditer(text):
        line_end = text.find("\n", match.end())
        line_end = len(text) if line_end < 0 else line_end
        fence, info = match.group(1), text[match.end() : line_end].strip()
        if opened is None:
            if "`" not in info:  # with one it would be code within a line
                opened = fence, info.partition(" ")[0].lower() in _PYTHON, line_end + 1
        elif fence.startswith(opened[0]) and not info:
            if opened[1]:
                blocks.append(text[opened[2] : match.start()])
            opened = None
    if opened is not None and opened[1]:
        blocks.append(text[opened[2] :])
    return [block for block in blocks if block.strip()]


def pick_solution(completion: str, names: tuple[str, ...] = ()) -> str | None:
    """
    Pick the block of a completion that holds its solution.

    With `names`, the last block that defines one of them (as a function, class, method or by assignment); without, the
    last block that reads input, else the last that writes output. A usage example after the solution is neither. Where no
    block qualifies it is the last one, and where there are no fences the whole completion, if it looks like a program.

    Args:
        completion (`str`): Text of a completion.
        names (`tuple[str, ...]`): What the tests call.

    Returns:
        `str` or `None`: the source; None if the completion has no program.
    """
    if names:
        alternatives = "|".join(map(re.escape, names))
        wanted = [
            re.compile(
                rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+(?:{alternatives})\b|^(?:{alternatives})[ \t]*=", re.M
            )
        ]
    else:
        wanted = [_READS_INPUT, _WRITES_OUTPUT]
    blocks = code_blocks(completion)
    if not blocks:
        text = completion.rpartition("</think>")[2]
        return text if any(pattern.search(text) for pattern in wanted) else None
    for pattern in wanted:
        for block in reversed(blocks):
            if pattern.search(block):
                return block
    return blocks[-1]


def same_output(output: str, expected: str, tolerance: float = 1e-6) -> bool:
    """
    Tell whether a program's output is the expected one, as judges of programming contests compare: line by line, words apart
    by any white space, empty lines ignored. A word that is expected as a real number (with a point or an exponent) may differ
    by `tolerance`, absolute or relative; every other word must be the same.

    Args:
        output (`str`): What the program wrote.
        expected (`str`): What it should have written.
        tolerance (`float`): Of real numbers.

    Returns:
        `bool`
    """
    lines = [words for line in output.splitlines() if (words := line.split())]
    expected_lines = [words for line in expected.splitlines() if (words := line.split())]
    return len(lines) == len(expected_lines) and all(
        len(words) == len(expected_words)
        and all(
            word == expected_word or _same_real(word, expected_word, tolerance)
            for word, expected_word in zip(words, expected_words, strict=True)
        )
        for words, expected_words in zip(lines, expected_lines, strict=True)
    )


def _same_real(word: str, expected: str, tolerance: float) -> bool:
    if not _REAL.fullmatch(expected) or len(word) > 400:
        return False
    try:
        value = float(word)
    except ValueError:
        return False
    return "_" not in word and math.isclose(value, float(expected), rel_tol=tolerance, abs_tol=tolerance)


def same_value(form: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    """
    Tell whether the value that a function returned is the expected one.

    Equality is Python's, tuples count as lists (the expected value comes from JSON), dictionary keys are compared as JSON
    has them, as text, and real numbers may differ by `tolerance`. Compares the forms of
    [`~trl_prime.sandbox.inside.wire.encode`] without building the values: what a hostile solution sends costs no
    more than reading it.

    Args:
        form: The returned value in wire form.
        expected: The expected value, of JSON's types.
        tolerance (`float`): Of real numbers.

    Returns:
        `bool`
    """
    if isinstance(form, dict) and len(form) == 1:
        ((tag, body),) = form.items()
        if tag == "tuple" and isinstance(body, list):
            form = body
        elif tag == "dict":
            return isinstance(expected, dict) and _same_dict(body, expected, tolerance)
        elif tag == "int":
            return isinstance(expected, int) and format(expected, "x") == body
        else:
            return False
    if isinstance(expected, list):
        return (
            isinstance(form, list)
            and len(form) == len(expected)
            and all(same_value(item, wanted, tolerance) for item, wanted in zip(form, expected, strict=True))
        )
    if isinstance(form, (int, float)) and isinstance(expected, (int, float)):
        if form == expected:
            return True
        real = isinstance(form, float) or isinstance(expected, float)
        # An integer too large for a float is close to none
        return real and abs(form) < 1e300 and math.isclose(form, expected, rel_tol=tolerance, abs_tol=tolerance)
    return type(form) is type(expected) and form == expected


def _same_dict(pairs: Any, expected: dict[str, Any], tolerance: float) -> bool:
    if not isinstance(pairs, list) or len(pairs) != len(expected):
        return False
    values = {}
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (str, int, float, type(None)))):
            return False
        key = pair[0] if isinstance(pair[0], str) else json.dumps(pair[0])
        values[key] = pair[1]
    return values.keys() == expected.keys() and all(
        same_value(values[key], wanted, tolerance) for key, wanted in expected.items()
    )
