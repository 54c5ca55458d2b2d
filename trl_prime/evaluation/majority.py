"""Which samples of a problem give the same answer: the groups that majority votes count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

NO_ANSWER = -1


def group_answers(
    answers: Sequence[Sequence[str | None]], equal: Callable[[list[tuple[str, str]]], Sequence[bool]]
) -> np.ndarray:
    """
    Group the answers of each problem: equal texts first, then, from the most frequent text down, those that `equal` accepts.

    One round asks, for all problems at once, which of the remaining texts equal their problem's most frequent one. So a
    pair of texts is asked about once for all problems, and texts that found their group are never asked about again.

    Args:
        answers (`list[list[str | None]]`): `(P, n)` answers as text; None where a sample has none.
        equal (`Callable`): For distinct pairs (answer, more frequent answer), whether they are the same answer.

    Returns:
        `np.ndarray`: `(P, n)` number of the group, counted from 0 in the order of frequency of the groups' first texts;
        `NO_ANSWER` where there is no answer.
    """
    # Counter keeps the order of appearance among texts of one frequency
    remaining = [
        [text for text, _ in Counter(text for text in row if text is not None).most_common()] for row in answers
    ]
    groups: list[dict[str | None, int]] = [{None: NO_ANSWER} for _ in answers]
    number = 0
    while any(remaining):
        pairs = list(dict.fromkeys((text, texts[0]) for texts in remaining for text in texts[1:]))
        verdicts = dict(zip(pairs, equal(pairs), strict=True)) if pairs else {}
        for problem, texts in enumerate(remaining):
            if texts:
                members = [text for text in texts if text == texts[0] or verdicts[text, texts[0]]]
                groups[problem].update(dict.fromkeys(members, number))
                remaining[problem] = [text for text in texts if text not in groups[problem]]
        number += 1
    return np.array(
        [[group[text] for text in row] for group, row in zip(groups, answers, strict=True)], dtype=np.int64
    )
