"""Refuse a release whose tag, version and changelog do not agree: `python .github/check_release.py v0.2.0`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def problems(tag: str, root: Path) -> list[str]:
    """
    What stands against releasing.

    Args:
        tag (`str`): For instance `"v0.2.0"`.
        root (`Path`): Folder of the project.

    Returns:
        `list[str]`: sentences; empty if nothing does.
    """
    version = re.search(r'^version = "(.*)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)[1]
    found = []
    if tag != f"v{version}":
        found.append(
            f"The tag is {tag}, but pyproject.toml has version {version}. Tag v{version}, or change the version."
        )
    changelog = (root / "CHANGELOG.md").read_text()
    section = re.search(rf"^## {re.escape(version)}\b.*?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None or not section[1].strip():
        found.append(f"CHANGELOG.md has no section '## {version}', or an empty one. Rename '## Unreleased'.")
    return found


if __name__ == "__main__":
    found = problems(sys.argv[1], Path(__file__).parent.parent)
    print("\n".join(found), file=sys.stderr)
    raise SystemExit(bool(found))
