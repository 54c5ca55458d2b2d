"""Read answers that are words, and letters of multiple choice."""

from __future__ import annotations

import re

from .cleaning import FUNCTIONS, TEXT

_WRAPPED = re.compile(TEXT + r"\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '\u2019.,/&()-]*")
_LETTERS = r"[A-Za-z\u0400-\u04ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
_FOREIGN_WORDS = re.compile(r"(?:(?![A-Za-z])" + _LETTERS + r"|[ ,.-])+")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)(?:[.:]?\s?(.*))?|([A-J])(?:[.:]\s?(.*))?")
_OPTION = re.compile(r"(?i)(?:(?:the )?(?:option|choice|answer)s?\s|\u9009\u9879?)\s?(?=\(?[A-J](?:\)|\b))")
# Several choices are in alphabetical order, "ABD", or have something between them
_CHOICES = re.compile(r"[A-J]{2,8}|(?:\(?[A-J]\)?(?:\s?[,;]\s?(?:and )?|\s(?:and |& )?|(?<=\))))+\(?[A-J]\)?")


def read_choices(text: str) -> frozenset[str] | None:
    """
    Read the letters of a multiple-choice answer: `B`, `(B)`, `b)`, `option B` or `B. its text`; `ABD`, `A, B, D` or `(A)(B)`.

    Args:
        text (`str`): The answer, cleaned.

    Returns:
        `frozenset[str]` or `None`: capital letters; None if other letters follow, or the text is no choice.
    """
    text = _OPTION.sub("", _WRAPPED.sub(r"\1", text).strip(), count=1).strip()
    if _CHOICES.fullmatch(text):
        letters = re.findall("[A-J]", text)
        in_order = letters == sorted(set(letters))
        return frozenset(letters) if in_order or not text.isalpha() else None
    match = _CHOICE.fullmatch(text)
    if not match:
        return None
    letter, rest = match.group(1) or match.group(3), match.group(2) or match.group(4) or ""
    other_letters = re.search(r"(?:^|[\s(,])(?:[A-J](?:[\s).,]|$)|or\s|and\s)", rest)
    return None if other_letters else frozenset(letter.upper())


def read_words(text: str, least: int | None = None) -> tuple[str, ...] | None:
    """Read a text answer, in lower case, without articles; None if it is mathematics or no word has `least` letters."""
    plain = _WRAPPED.sub(r" \1 ", text).strip()
    if plain and not plain.isascii() and _FOREIGN_WORDS.fullmatch(plain):
        return tuple(plain.lower().split())
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
