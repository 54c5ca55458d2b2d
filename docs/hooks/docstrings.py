"""A Griffe extension: docstrings in the style of TRL and transformers become Google's, which mkdocstrings reads.

Types lose their backticks (the page has its own form for them), defaults come from the signature, `[`Name`]` becomes a link
where the site has that name, and `> Heading` within parameters starts a section of its own.
"""

from __future__ import annotations

import re

import griffe

_SECTIONS = ("Args:", "Parameters:", "Attributes:", "Returns:", "Raises:")
# `name (`type`, *optional*, defaults to `x`):` with the description on the same line or below
_ITEM = re.compile(r"^(\s+)((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*) \((`.*?|\[.*?)\):(.*)$")
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")


class TRLDocstrings(griffe.Extension):
    """Rewrites all docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        objects = list(_objects(pkg))
        paths = {obj.name: obj.path for obj in objects if not obj.is_attribute}
        for obj in objects:
            if obj.docstring is not None:
                obj.docstring.value = google_style(obj.docstring.value, paths)


def _objects(obj: griffe.Object):
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def google_style(docstring: str, paths: dict[str, str]) -> str:
    """
    A docstring in Google's style.

    Args:
        docstring (`str`): In the style of TRL.
        paths (`dict[str, str]`): Name of an object to its dotted path.

    Returns:
        `str`: The same in Google's style.
    """
    lines, section, note = [], "", False
    for line in docstring.split("\n"):
        text = line.strip()
        if text in _SECTIONS:
            section = text
        elif text and not line.startswith(" "):
            section = ""
        if not text and lines and lines[-1].startswith("Parameters: "):
            continue  # a section begins right below its heading
        if text == "> [!NOTE]":
            note = True
            line = '!!! note ""'
        elif note and text.startswith(">"):
            text = text[1:].removeprefix(" ")
            if text.startswith("- ") and not lines[-1].strip().startswith("- "):
                lines.append("")
            line = f"    {text}"
        elif section == "Parameters:" and text.startswith("> "):
            # A section of its own; the first one takes the place of the plain heading
            heading = text[2:].replace("Parameters that control ", "")
            if lines and lines[-1].strip() == section:
                lines.pop()
            line = f"{section} {heading[0].upper()}{heading[1:]}"
        elif text in ("Example:", "Examples:"):
            line = f"**{text}**\n"
        elif section in ("Args:", "Parameters:", "Attributes:") and (item := _ITEM.match(line)):
            indent, names, type_, rest = item.groups()
            line = f"{indent}{names} ({_plain_type(type_)}):{rest}"
        elif section == "Returns:" and (item := re.match(r"^(\s+)((?:`|\[`).*?)(: .*)?$", line)):
            indent, type_, rest = item.groups()
            line = f"{indent}{_plain_type(type_)}{rest or ':'}"
        lines.append(line)
    return _REFERENCE.sub(lambda match: _link(match, paths), "\n".join(lines))


def _plain_type(type_: str) -> str:
    type_ = _REFERENCE.sub(lambda match: match[2].rpartition(".")[2], type_)
    return re.sub(r",? (\*optional\*|defaults to `.*?`)", "", type_).replace("`", "").rstrip(", ")


def _link(match: re.Match, paths: dict[str, str]) -> str:
    tilde, target = match.groups()
    shown = target.rpartition(".")[2] if tilde else target
    name, _, member = target.partition(".")
    path = target if target.startswith("trl_prime.") else f"{paths.get(name, name)}{'.' if member else ''}{member}"
    # `optional`: what the site does not document is shown without a link
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'
