"""A MkDocs hook: formulas become MathML while the site is built, so that it needs neither JavaScript nor a network.

A formula on its own is a fenced block of the language `math`, one in a sentence is between `$` and `$` with backticks
inside; GitHub renders both as well.
"""

from __future__ import annotations

import re

from latex2mathml.converter import convert

_BLOCK = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"\$`([^`]+)`\$")


def on_page_markdown(markdown: str, **kwargs) -> str:
    markdown = _BLOCK.sub(lambda match: f'<div class="formula">{convert(match[1], display="block")}</div>', markdown)
    # In a span, because `math` at the start of a line would begin a paragraph of its own
    return _INLINE.sub(lambda match: f"<span>{convert(match[1])}</span>", markdown)
