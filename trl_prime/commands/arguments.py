"""Arguments of all commands: dataclass fields, from a YAML file (`--config`) and from flags, which win."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from ..prime_config import nearest


def parse_arguments(
    dataclass_types: Sequence[type], argv: list[str], prog: str, positional: str | None = None
) -> tuple[Any, ...]:
    """
    The YAML file and the flags as dataclasses.

    Args:
        dataclass_types (`list[type]`): Whose fields may be given.
        argv (`list[str]`): The words after the command's name.
        prog (`str`): Name of the command, for its messages.
        positional (`str`, *optional*): The field, a list, that the words before the first flag are the values of.

    Returns:
        `tuple`: an instance of each of the types.

    Raises:
        ValueError: The file has a field that does not exist; the message names the nearest.
    """
    parser = TrlParser(dataclass_types, prog=prog)
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if positional and words:
        argv = [f"--{positional}", *words, *argv[len(words) :]]
    if "--config" in argv:
        path = argv[argv.index("--config") + 1]
        known = {action.dest for action in parser._actions}
        for name in yaml.safe_load(Path(path).read_text()) or {}:
            if name not in known and name != "env":
                raise ValueError(f"{path} sets {name!r}, which is no field. {_nearest_field(name, known, prog)}")
    return parser.parse_args_and_config(argv)


def _nearest_field(name: str, known: set[str], prog: str) -> str:
    # Of two hundred fields only the hint is of use
    hint = nearest(name, sorted(known)).split(" Choose one of")[0]
    return hint if hint.startswith("Did you mean") else f"See `{prog} --help`."
