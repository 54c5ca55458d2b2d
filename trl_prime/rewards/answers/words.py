"""Read answers that are words, and letters of multiple choice."""

from __future__ import annotations

import re

from .cleaning import FUNCTIONS, TEXT

_WRAPPED = re.compile(TEXT + r"\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '\u2019.,/&()-]*")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)(?:[.:]?\s?(.*))?|([A-J])(?:[.:]\s?(.*))?")


def read_choice(text: str) -> str | None:
    """Read the letter of a multiple-choice answer, `B`, `(B)`, `b)` or `B. its text`; None if other letters follow."""
    match = _CHOICE.fullmatch(_WRAPPED.sub(r"\1", text).strip())
    if not match:
        return None
    letter, rest = match.group(1) or match.group(3), match.group(2) or match.group(4) or ""
    return None if re.search(r"(?:^|[\s(,])(?:[A-J](?:[\s).,]|$)|or\s|and\s)", rest) else letter.upper()


def read_words(text: str, least: int | None = None) -> tuple[str, ...] | None:
    """Read a text answer, in lower case, without articles; None if it is mathematics or no word has `least` letters."""
    plain = _WRAPPED.sub(r" \1 ", text).strip()
    words = re.findall(r"[a-z']+", plain.lower())
    if least is None:
        # Few letters that are not marked as text are a product of variables, for which Math-Verify knows that ab = ba
        least = 4 if re.search(r"[A-Za-z]", _WRAPPED.sub("", text)) else 2
    longest = max((len(word) for word in words if word not in ("and", "or")), default=0)
    if not _WORDS.fullmatch(plain) or longest < least or FUNCTIONS & set(words):
        return None
    words = [word for word in words if word not in ("a", "an", "the")]
    # "Ann and Bob" is an unordered pair; a list with commas may be an order
    return tuple(sorted(words)) if "and" in words and "," not in plain else tuple(w for w in words if w != "and")
