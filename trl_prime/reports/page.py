"""One HTML file that needs nothing else: templates, style and scripts of this package, filled in and put together.

Whatever a template is given is escaped. A content security policy stands behind that: a browser runs the scripts of this package
only, known by their hashes, and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from .heat_map import THEMES


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A page with NaN in its data would not load
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _source(name: str) -> str:
    return _environment().loader.get_source(_environment(), name)[0]


def render_page(template: str, scripts: Sequence[str], data: Any, **context: Any) -> str:
    """
    A page as text.

    Args:
        template (`str`): Its template.
        scripts (`list[str]`): Names of the scripts that it runs, in order.
        data: The data that the scripts read, as JSON; must hold finite numbers only.
        **context: What the template reads.

    Returns:
        `str`: HTML.

    Raises:
        ValueError: `data` holds NaN or infinity.
    """
    sources = [_source(name) for name in scripts]
    hashes = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources]
    return (
        _environment()
        .get_template(template)
        .render(
            scripts=sources,
            script_hashes=hashes,
            style=_source("page.css"),
            themes=THEMES,
            data=data,
            **context,
        )
    )


def write_page(html: str, path: str | Path) -> Path:
    """Write a page, making its folder if needed; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", errors="replace")
    return path
