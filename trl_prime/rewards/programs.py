"""Find the program in a completion, and compare its output with the expected one.

All functions are pure and safe on hostile text: they make one pass of regular expressions that cannot backtrack, and do not
parse model-written code.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

# Its groups are quote marks and indentation, the mark of a list item that begins on this line, and the fence
_FENCE = re.compile(r"^([ \t>]*)((?:[-*+]|\d{1,9}[.)])[ \t]{1,4})?(`{3,}|~{3,})", re.MULTILINE)
_QUOTE = re.compile(r"[ \t]*>")
_FUNCTION = re.compile(r"^(?:async[ \t]+)?def[ \t]+([A-Za-z_]\w*)[ \t]*\(", re.MULTILINE)
BYTE_ORDER_MARK = "\ufeff"
_PYTHON = {"", "python", "py", "python3", "py3", "ipython"}
_READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bfileinput\b|\bopen\s*\(\s*0")
_WRITES_OUTPUT = re.compile(r"\bprint\s*\(|\bstdout\b")
# This matches a number that is written as a real one, whose last digits are a matter of rounding
_REAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", re.ASCII)


def code_blocks(completion: str) -> list[str]:
    """
    List the fenced Python blocks of a completion, in order. Fences without a language count; a block that is never closed
    goes to the end. A fence within a list or a quotation is indented, and so is its code: what is indented with the fence
    is taken off; one that is indented by four columns more than the block's own does not close it. Text before the last
    `</think>` is left out.

    Args:
        completion (`str`): Text of a completion.

    Returns:
        `list[str]`: their contents; empty where there are no fences.
    """
    text = completion.rpartition("</think>")[2].removeprefix(BYTE_ORDER_MARK)
    blocks = []
    opened: tuple[str, bool, int, str] | None = None
    for match in _FENCE.finditer(text):
        line_end = text.find("\n", match.end())
        line_end = len(text) if line_end < 0 else line_end
        margin, mark, fence = match.groups(default="")
        info = text[match.end() : line_end].strip()
        if opened is None:
            if "`" not in info:  # with one it would be code within a line
                margin += " " * len(mark)
                opened = fence, info.partition(" ")[0].lower() in _PYTHON, line_end + 1, margin
        elif fence.startswith(opened[0]) and not info and not mark and _columns(margin) < _columns(opened[3]) + 4:
            if opened[1]:
                blocks.append(_without_margin(text[opened[2] : match.start()], opened[3]))
            opened = None
    if opened is not None and opened[1]:
        blocks.append(_without_margin(text[opened[2] :], opened[3]))
    return [block for block in blocks if block.strip()]


def _without_margin(block: str, margin: str) -> str:
    """Take the quote marks and the indentation of a fence off its lines, as far as they have them."""
    block = block.removeprefix(BYTE_ORDER_MARK)
    if not margin:
        return block
    quotes = margin.count(">")
    width = _columns(margin.rpartition(">")[2])
    lines = []
    for line in block.split("\n"):
        start = columns = 0
        for _ in range(quotes):
            if not (found := _QUOTE.match(line, start)):
                break
            start = found.end()
        while start < len(line) and line[start] in " \t" and columns < width:
            columns = _columns(line[start], columns)
            start += 1
        lines.append(line[start:])
    return "\n".join(lines)


def _columns(space: str, columns: int = 0) -> int:
    for character in space:
        columns += 4 - columns % 4 if character == "\t" else 1
    return columns


def defined_functions(completion: str, prompt: str = "") -> list[str]:
    """List the functions at the top level of a completion's code, those that its prompt defines too at the end."""
    names = _FUNCTION.findall("\n".join(map(flush_left, code_blocks(completion))) or completion)
    asked = set(_FUNCTION.findall(prompt))
    return sorted(names, key=lambda name: name in asked)


def flush_left(source: str) -> str:
    """Take the indentation of a program's first line off all lines that have it: no program begins with an indented line."""
    first = next((line for line in source.split("\n") if line.strip()), "")
    margin = first[: len(first) - len(first.lstrip(" \t"))]
    if not margin:
        return source
    return "\n".join(line.removeprefix(margin) for line in source.split("\n"))


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
        text = completion.rpartition("</think>")[2].removeprefix(BYTE_ORDER_MARK)
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
    lines, expected_lines = (
        [words for line in text.removeprefix(BYTE_ORDER_MARK).splitlines() if (words := line.split())]
        for text in (output, expected)
    )
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
    Tell whether the value that a function returned is the expected one, which comes from JSON.

    Equality is Python's, with these rules for what JSON cannot say: tuples, deques and ranges are lists; a set is any order of
    a list without duplicates; dictionary keys are text; a linked list is the list of its values; a binary tree is the list
    of its values in level order with None where a child is missing. An integer is only equal to itself; where a real number
    is expected the value may differ by `tolerance`. Compares the forms of [`~trl_prime.sandbox.inside.wire.encode`] and
    those that [`~trl_prime.sandbox.inside.candidate`] adds, without building the values: what a hostile solution sends
    costs no more than reading it.

    Args:
        form: The returned value in wire form.
        expected: The expected value, of JSON's types.
        tolerance (`float`): Of real numbers, absolute or relative.

    Returns:
        `bool`
    """
    if isinstance(form, dict):
        if len(form) != 1:
            return False
        ((tag, body),) = form.items()
        return tag in _SAME and _SAME[tag](body, expected, tolerance)
    if isinstance(expected, list):
        return (
            isinstance(form, list)
            and len(form) == len(expected)
            and all(same_value(item, wanted, tolerance) for item, wanted in zip(form, expected, strict=True))
        )
    if isinstance(form, (int, float)) and isinstance(expected, (int, float)):
        return form == expected or (isinstance(expected, float) and _close(form, expected, tolerance))
    return type(form) is type(expected) and form == expected


def _close(value: float, expected: float, tolerance: float) -> bool:
    # An integer too large for a float is close to none
    return abs(value) < 1e300 and math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)


def _same_list(body: Any, expected: Any, tolerance: float) -> bool:
    return isinstance(body, list) and same_value(body, expected, tolerance)


def _same_range(body: Any, expected: Any, tolerance: float) -> bool:
    if not (isinstance(body, list) and len(body) == 3 and all(type(number) is int for number in body) and body[2]):
        return False
    start, stop, step = body
    length = max(0, (stop - start + step - (1 if step > 0 else -1)) // step)
    return isinstance(expected, list) and length == len(expected) and list(range(*body)) == expected


def _same_integer(body: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, float):
        digits = isinstance(body, str) and re.fullmatch("-?[0-9a-f]+", body)
        return bool(digits) and _close(int(body, 16), expected, tolerance)
    return isinstance(expected, int) and format(expected, "x") == body


def _same_special(body: Any, expected: Any, tolerance: float) -> bool:
    return isinstance(expected, float) and body == str(expected)


def _same_set(body: Any, expected: Any, tolerance: float) -> bool:
    if not (isinstance(body, list) and isinstance(expected, list) and len(body) == len(expected)):
        return False
    try:
        return set(map(_key, body)) == set(map(_key, expected))
    except (ValueError, RecursionError):
        return False


def _key(value: Any) -> Any:
    """Make of a form, or of a value of JSON's types, something that is equal where they are."""
    if isinstance(value, dict):
        if len(value) != 1 or not isinstance(value.get("tuple"), list):
            raise ValueError("not a form of what a set holds here")
        value = value["tuple"]
    if isinstance(value, list):
        return tuple(map(_key, value))
    return value


def _same_dict(pairs: Any, expected: Any, tolerance: float) -> bool:
    if not isinstance(pairs, list) or not isinstance(expected, dict) or len(pairs) != len(expected):
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


def _same_nodes(body: Any, expected: Any, tolerance: float) -> bool:
    """Compare the values of a tree or a linked list with a list, with None for an empty one, or with the value of its root."""
    if not isinstance(body, list):
        return False
    if isinstance(expected, list):
        count = len(expected)
        while count and expected[count - 1] is None:
            count -= 1
        return same_value(body, expected[:count], tolerance)
    return not body if expected is None else bool(body) and same_value(body[0], expected, tolerance)


_SAME = {
    "tuple": _same_list,
    "deque": _same_list,
    "range": _same_range,
    "int": _same_integer,
    "float": _same_special,
    "set": _same_set,
    "frozenset": _same_set,
    "dict": _same_dict,
    "TreeNode": _same_nodes,
    "ListNode": _same_nodes,
}
