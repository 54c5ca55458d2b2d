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
# Between boxes, spacing and the marks of formulas mean nothing; a comma or a word joins
_GAP = r"(?:[\s$~&]|\\[\[\]()]|\\[,;:! ]|\\\\|\\q?quad(?![a-zA-Z]))*"
_JOINT = r"(?:[,;\uff0c\uff1b\u3001]|\u548c|\u6216|(?:and|or)\b|\\(?:text(?:bf|it|rm)?|mathrm|mbox)\s?\{[\s,]{0,4}(?:and|or)\s{0,4}\})"
_JOINED = re.compile(rf"{_GAP}{_JOINT}{_GAP}(?:{_JOINT}{_GAP})?(?:[a-zA-Z](?:_\w)?\s?=\s?)?{_GAP}")
# In a gold answer that begins with a box, spacing joins too
_LOOSELY_JOINED = re.compile(rf"(?:{_JOINED.pattern}|{_GAP})")
_FARTHEST = 64  # characters between two boxes that are joined
_NUMBER = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_MARKER = re.compile(
    r"\banswers?(?:\s(?:to|of|for)\s[^.\n:=]{1,80}?)?(?:\*\*|\s){0,4}(?:is|are|:|=)(?:\*\*|\s|:){0,8}(?=\S)"
    r"|\u7b54\u6848\s?(?:\u662f|\u4e3a|[:\uff1a])\s{0,4}(?=\S)",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(
    r"\n|[\u3002\uff1b\uff01\uff1f]|[.;!?](?=\s|\*|$)|,?\s(?:because|since|as|which|where|so|but|when)\s"
)
# As in pandoc, both dollars touch the formula and no digit follows; "$5 and $6" and "2 * $5 = $10" are money
_TOUCHING = r"(?<![\\$])\$(?![\s$])[^$\n]+?(?<![\s\\=+*/-])\$(?![\d$])"
# Else both have a space inside, and what is between is a number or has a mark of LaTeX
_PADDED = r"(?<![\\$])\$ (?=[-+\d.,/ ]+ \$|[^$\n]{0,200}[\\^_])[^$\n]{1,400} \$(?![\w$])"
_INLINE = rf"(?:{_TOUCHING}|{_PADDED})"
_FORMULA = rf"(?:\$\$[^$]+\$\$|\\\[.+?\\\]|\\\(.+?\\\)|{_INLINE})"
_FORMULAS = re.compile(rf"{_FORMULA}(?:\s?(?:,|,?\s?and|,?\s?or)\s?{_FORMULA})*", re.DOTALL)
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,} [a-zA-Z]{2,}")
# "The largest $n$ is 34"
_IS = re.compile(
    r"\s(?:is|are|equals?|(?:must|should|would|will|can) be)\s(?:(?:equal to|exactly|approximately|about|therefore|thus|then|only)\s)?"
    rf"(?:\*\*)?(?=[$\u00a3\u20ac]?{_NUMBER}|\\|\$)"
)
# A number in prose and what is written to it: "12.5cm", "3/4", "50%", "7:30"
_SIMPLE = re.compile(
    rf"{_NUMBER}(?:/\d+|(?::\d+)+)?(?:\\?%|[a-zA-Z\u00b5\u03bc\u00b0][a-zA-Z\u00b2\u00b3/^2]{{0,12}}|[\u3400-\u9fff]{{1,8}})?"
)
_IN_PARTS = re.compile(rf"({_NUMBER})\s?(?:(/)\s?(\d+)|(?:x|\*|\u00d7|\\times|\\cdot)\s?(10\^(?:\d+|\{{-?\d+\}})))$")
_ORDINAL = re.compile(r"\d+(?:st|nd|rd|th)\b")
_FUNCTION_NAME = re.compile(r"\\[a-zA-Z]+|sqrt|log|sin|cos|tan")
_PUNCTUATION = ".,;:!?*\"'\u201c\u201d\u2018\u2019\u3002\uff0c"


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
    joint = _LOOSELY_JOINED if _BOX.match(gold.lstrip("$\\[( ")) or _BOX.match(gold) else _JOINED
    answer = _last_boxes(gold, closed_only=marked_only, joint=joint)
    if answer is None:
        _, hashes, after_hashes = gold.rpartition("####")
        if hashes:
            answer = after_hashes.strip()
        elif not marked_only:
            answer = _after_marker(gold[-_TAIL:]) or gold
    return answer or None


def _last_boxes(text: str, closed_only: bool = False, joint: re.Pattern = _JOINED) -> str | None:
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
            stop <= next_start <= stop + _FARTHEST and joint.fullmatch(text, stop, next_start)
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
    stated = max(
        (match.end() for match in _IS.finditer(clause) if not re.search(r"\d", clause[: match.start()])), default=0
    )
    rest, clause = rest[stated:], clause[stated:]
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
    stated = None if re.search(r"\d", text[start:end]) else _IS.match(text, end)
    number = _SIMPLE.match(text, stated.end()) if stated else None
    return number.group() if number else text[start:end] or None


def _last_number(text: str) -> str | None:
    r"""
    Read the last word that is a number or has one in it.

    A word is read as a whole, so that "2^10" is not 10 and "12.5cm" not 12; names ("x2") and ordinals ("3rd") are no numbers.
    """
    end = len(text)
    following = ""
    for word in reversed(text.split()):
        start = text.rindex(word, 0, end)
        number = _number_of_word(word) if any(map(str.isdigit, word)) else None
        if number is not None:
            stop = start + len(word.rstrip(_PUNCTUATION))
            in_parts = _IN_PARTS.search(text, max(start - 32, 0), stop) if len(word) <= 32 else None
            if in_parts and in_parts.start() < start:
                whole, slash, denominator, power = in_parts.groups()
                return f"{whole}/{denominator}" if slash else rf"{whole} \times {power}"
            return number + following if number[-1].isdigit() else number
        end, following = start, "%" if word.strip(_PUNCTUATION) in ("%", r"\%") else ""
    return None


def _number_of_word(word: str) -> str | None:
    word = re.split("[=\u2248]", word.strip(_PUNCTUATION))[-1]
    word = re.sub(r"^[a-zA-Z]+:|^[-+]?\\?[$\u00a3\u20ac]", lambda sign: sign[0][0] if sign[0][0] in "-+" else "", word)
    for opening, closing in ("()", "[]", "{}"):
        # Brackets around one number, and those of a pair that stands around several words
        if word.startswith(opening) and (closing not in word or _SIMPLE.fullmatch(word[1:-1])):
            word = word[1:].removesuffix(closing)
        elif word.endswith(closing) and opening not in word:
            word = word[:-1]
    word = word.strip(_PUNCTUATION + "$")
    if _SIMPLE.fullmatch(word):
        return None if _ORDINAL.fullmatch(word) else word
    if not any(map(str.isdigit, word)) or (word.isalnum() and word[0].isalpha() and word.isascii()):
        return None
    if re.search("[a-zA-Z]{3}", _FUNCTION_NAME.sub("", word)):  # "2-digit", "10/month", "page5"
        number = re.match(rf"{_NUMBER}(?=[-/])", word)
        return number.group() if number else None
    return word[: MAX_ANSWER_LENGTH + 8]
