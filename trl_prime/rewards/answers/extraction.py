r"""Find the final answer in a completion, and the gold answer in a field of a data set.

Both take time that grows at most linearly with the text, whatever it holds.
"""

from __future__ import annotations

import re
from typing import Any

MAX_ANSWER_LENGTH = 4096  # characters; a longer answer is not judged

# These bounds keep extraction fast on any text: boxes looked back at, and how much of the end the fallbacks read
_MAX_BOXES = 16
_TAIL = 32_768

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s{0,4}")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_JOINED = re.compile(
    r"[\s$]*(?:\\[\])])?[\s$]*(?:,|;|,?\s?(?:and|or|\\text\{\s?(?:and|or)\s?\}))[\s$]*(?:\\[\[(])?[\s$]*"
)
_NUMBER = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_MARKER = re.compile(
    r"\banswers?(?:\s(?:to|of|for)\s[^.\n:=]{1,80}?)?(?:\*\*|\s){0,4}(?:is|are|:|=)(?:\*\*|\s|:){0,8}(?=\S)",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"\n|[.;!?](?=\s|\*|$)|,?\s(?:because|since|as|which|where|so|but|when)\s")
# As in pandoc, both dollars touch the formula and no digit follows; "$5 and $6" and "2 * $5 = $10" are money
_INLINE = r"(?<![\\$])\$(?![\s$])[^$\n]+?(?<![\s\\=+*/-])\$(?![\d$])"
_FORMULA = rf"(?:\$\$[^$]+\$\$|\\\[.+?\\\]|\\\(.+?\\\)|{_INLINE})"
_FORMULAS = re.compile(rf"{_FORMULA}(?:\s?(?:,|,?\s?and|,?\s?or)\s?{_FORMULA})*", re.DOTALL)
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,} [a-zA-Z]{2,}")
_LAST_NUMBER = re.compile(rf"(?<![\w.])[$£€]?({_NUMBER}(?:\s?/\s?\d+)?(?:\s?\\?%)?)(?!\w)")


def extract_answer(text: str, boxed_only: bool = False) -> str | None:
    r"""
    Find the final answer of a completion, in time that grows at most linearly, whatever the text.

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


def extract_gold(gold: Any, marked_only: bool = False) -> str | None:
    r"""
    Find the gold answer in a field of a data set: bare LaTeX, `$...$`, text with a `\boxed{}`, GSM8K's `#### 42` at the end
    of its solution, "The answer is ...", or a number.

    Args:
        gold (`Any`): The field.
        marked_only (`bool`, *optional*, defaults to `False`): Whether to find only what is in a box or after `####`, because
            the field holds a worked solution, which is no answer as a whole. A box that is not closed is then no answer either:
            the solution was cut off.

    Returns:
        `str` or `None`: the answer as written; None if the field is None or empty, or has no mark with `marked_only`.
    """
    if gold is None:
        return None
    gold = str(gold).strip()
    answer = _last_boxes(gold, closed_only=marked_only)
    if answer is None:
        _, hashes, after_hashes = gold.rpartition("####")
        if hashes:
            answer = after_hashes.strip()
        elif not marked_only:
            answer = _after_marker(gold[-_TAIL:]) or gold
    return answer or None


def _last_boxes(text: str, closed_only: bool = False) -> str | None:
    """Read the last box that is not empty, and before it the boxes that it is joined to."""
    contents: list[str] = []
    end, next_start = len(text), None
    for _ in range(_MAX_BOXES):
        end = max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))
        box = _BOX.match(text, end) if end >= 0 else None
        if end < 0:
            break
        content, stop, is_closed = _box_content(text, box.end()) if box else ("", end, True)
        if closed_only and not is_closed:
            return None
        if not content:
            continue
        if next_start is not None and not (
            stop <= next_start <= stop + 32 and _JOINED.fullmatch(text, stop, next_start)
        ):
            break
        contents.append(content)
        next_start = end
    return ", ".join(reversed(contents)) or None


def _box_content(text: str, start: int) -> tuple[str, int, bool]:
    r"""Read the box whose argument begins at `start`: its content, its end, and whether it is closed, as `\boxed 5` is."""
    if text[start : start + 1] != "{":
        token = re.compile(r"[^\s$.,]{0,64}").match(text, start)
        return token.group(), token.end(), True
    limit = start + MAX_ANSWER_LENGTH + 8
    depth = 0
    for token in _BRACE.finditer(text, start, limit):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[start + 1 : token.start()].strip(), token.end(), True
    line = re.compile(r"[^\n$]*").match(text, start + 1, limit)
    return line.group().strip(), line.end(), False


def _after_hashes(text: str) -> str | None:
    rest = text.rpartition("####")[2] if "####" in text else ""
    # Only a number counts, because `####` also begins a Markdown heading, "#### Step 2"
    match = re.match(rf"\s?(?:[-+]?\\?[$£€]\s?)?{_NUMBER}[^\n]{{0,64}}", rest)
    return _clause(match.group()) if match else None


def _after_marker(text: str) -> str | None:
    start = max((match.end() for match in _MARKER.finditer(text)), default=None)
    if start is None:
        return None
    rest = text[start : start + MAX_ANSWER_LENGTH]
    clause = _clause(rest)
    formulas = _FORMULAS.search(rest)
    # A formula that comes after the clause, or after a number, is not the answer
    if formulas and formulas.start() <= len(clause) and not re.search(r"\d", rest[: formulas.start()]):
        return formulas.group()
    return clause or None


def _clause(text: str) -> str:
    end = _CLAUSE_END.search(text)
    return (text[: end.start()] if end else text).strip(" *")


def _last_formula(text: str) -> str | None:
    # Two words in a row are no formula but stand between two sums of money
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
