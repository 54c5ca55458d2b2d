"""Arguments of all commands: dataclass fields, from a YAML file (`--config`) and from flags, which win.

The file is a path, or the name of a recipe of this package. A value of the file is read as the flag's would be, and `none` is
no value where a field may have none. What is no field, and what is no value for one, is refused in a sentence before anything
starts. `--help` fits a screen: all fields with their help where they do, else their names and defaults by
group. `--help WORD` explains those with the word in their name or in the title of their group, `--help all` all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..specs import did_you_mean

WIDTH, SCREEN = 100, 45
# The word that stands for no value, in flags and files
NONE = "none"


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    prog: str,
    positional: Sequence[str] = (),
    ignore: Sequence[str] = (),
    epilog: str = "",
) -> tuple[Any, ...]:
    """
    The YAML file and the flags as dataclasses; prints the help and leaves if it is asked for.

    Args:
        dataclass_types (`list[type]`): Dataclasses with the fields that may be given. None may be called `config`.
        argv (`list[str]`): The words after the command's name.
        prog (`str`): Name of the command, for its messages.
        positional (`list[str]`): Fields that the words before the first flag are the values of, one after the other; the last
            of them takes the rest.
        ignore (`list[str]`): Further fields that the file may have, which are for someone else.
        epilog (`str`): Last lines of the help.

    Returns:
        `tuple`: an instance of each of the types.

    Raises:
        ValueError: The file cannot be read, a field does not exist (the message names the nearest), or a value does not
            suit its field.
        SystemExit: The help was printed.
    """
    show_help(dataclass_types, argv, prog, epilog, positional)
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv)) if positional else []
    named = [
        [f"--{name}", *(words[i:] if name == positional[-1] else words[i : i + 1])]
        for i, name in enumerate(positional[: len(words)])
    ]
    argv = [*itertools.chain(*named), *argv[len(words) :]]
    parser = ArgumentReader(dataclass_types, prog=prog, allow_abbrev=False, add_help=False)
    flags, others = parser.read_file(argv)
    _, words = parser.parse_known_args(flags)
    for name in [*(name for name in others if name not in ignore), *words]:
        raise ValueError(parser.unknown(name))
    return tuple(parser.parse_args_into_dataclasses(flags, look_for_args_file=False))


class ArgumentReader(TrlParser):
    """`TrlParser` that takes nothing silently and answers in sentences."""

    path: Path | None = None

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any):
        super().__init__(dataclass_types, **kwargs)
        self.hints = {name: hint for cls in self.dataclass_types for name, hint in get_type_hints(cls).items()}
        for action in self._actions:
            if _kinds(self.hints.get(action.dest)) == {dict, type(None)}:  # TRL 1.9's `chat_template_kwargs`
                action.type = json.loads
        # Where `none` is the default as a word (report_to), it has a meaning of its own
        self.optional = {
            action.dest
            for action in self._actions
            if action.default != NONE and type(None) in _kinds(self.hints.get(action.dest))
        }

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.dest in self.optional and [word.lower() for word in arg_strings] == [NONE]:
            return None
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}.")

    @property
    def fields(self) -> dict[str, argparse.Action]:
        """Name of each field and its action; of the pair `--x`, `--no_x` the first."""
        return {action.dest: action for action in reversed(self._actions)}

    def read_file(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """
        Take the values of the YAML file for defaults, and set the environment variables of its `env`.

        Returns:
            `tuple[list[str], dict]`: the words without `--config FILE`, and what the file sets that is no field.
        """
        flags, self.path = _without_config(argv)
        settings = _read_yaml(self.path) if self.path else {}
        for name, value in _mapping(settings.pop("env", None) or {}, f"`env` of {self.path}").items():
            os.environ[name] = str(value)
        fields = self.fields
        known = {
            name: self._checked(fields[name], self.hints[name], value)
            for name, value in settings.items()
            if name in fields
        }
        self.set_defaults_with_config(**known)
        return flags, {name: value for name, value in settings.items() if name not in fields}

    def unknown(self, word: str, more: Sequence[str] = ()) -> str:
        """The error about a field of the file, or a word of the command line, that means nothing; `more` are other names."""
        if word.startswith("--"):
            name = word.split("=")[0].removeprefix("--").replace("-", "_")
            said = f"{self.prog} has no flag --{name}."
        elif self.path is not None and word in _read_yaml(self.path):
            name, said = word, f"{self.path} sets {word!r}, which is no field."
        else:
            return f"{self.prog} can make nothing of {word!r}: fields are given as --name value."
        return f"{said} {did_you_mean(name, [*self.fields, *more])}`{self.prog} --help` lists them."

    def _checked(self, action: argparse.Action, hint: Any, value: Any) -> Any:
        kinds = _kinds(hint)
        if action.dest in self.optional and isinstance(value, str) and value.lower() == NONE:
            return None
        if value is None and type(None) not in kinds:
            raise ValueError(f"{self.path} leaves {action.dest} empty: give it a value, or leave it out.")
        if value is None or type(value) in kinds or Any in kinds:
            if isinstance(value, list) and action.nargs == "+":
                return [self._converted(action, item) for item in value]
            if not isinstance(value, str):
                return value
        if isinstance(value, (list, dict)):
            raise ValueError(f"{self.path} sets {action.dest} to {value!r}, but it takes a single value.")
        if list in kinds and str not in kinds:
            return [self._converted(action, value)]
        return self._converted(action, value)

    def _converted(self, action: argparse.Action, value: Any) -> Any:
        # Values are read as the words of a flag are: YAML 1.1 takes 1e-6 for a text and 3 for a number, whatever the field needs
        text = str(value).lower() if isinstance(value, bool) else str(value)
        try:
            value = self._get_value(action, text)
            self._check_value(action, value)
        except argparse.ArgumentError as error:
            raise ValueError(f"{self.path}: {error}.") from error
        return value


def _without_config(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    words, path = list(argv), None
    if sum(word.split("=")[0] == "--config" for word in words) > 1:
        raise ValueError("--config is given twice: a run has one file, and flags.")
    for i, word in enumerate(words):
        if word == "--config":
            if i + 1 == len(words) or words[i + 1].startswith("--"):
                raise ValueError("--config has no value: give it the path of a YAML file, or the name of a recipe.")
            return words[:i] + words[i + 2 :], recipe_path(words[i + 1])
        if word.startswith("--config="):
            return words[:i] + words[i + 1 :], recipe_path(word.removeprefix("--config="))
    return words, path


def recipe_folder() -> Path:
    """The folder of the recipes: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_path(name: str) -> Path:
    """
    The file that `--config` names.

    Args:
        name (`str`): Path of a file, which wins; or the name of a recipe by its place in the folder of the recipes, for instance
            `"quickstart"` or `"qwen2.5-1.5b/prime/full"`, also with `recipes/` before it or `.yaml` after it.

    Returns:
        `Path`

    Raises:
        ValueError: There is no such file and no such recipe; names the nearest recipe.
    """
    folder = recipe_folder()
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.yaml"))]
    wanted = name.removeprefix("recipes/").removesuffix(".yaml")
    if wanted in names and not os.path.isfile(name):
        return folder / f"{wanted}.yaml"
    if not os.path.exists(name):
        raise ValueError(
            f"The file {name} of --config cannot be read: No such file or directory, and no recipe has this name. "
            f"{did_you_mean(wanted, names)}".strip()
        )
    return Path(name)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"The file {path} of --config cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The file {path} of --config is no YAML: {' '.join(str(error).split())}.") from error
    return _mapping(settings or {}, f"The file {path} of --config")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{what} has to hold lines of `name: value`.")
    return value


def _kinds(hint: Any) -> set[Any]:
    """The types that a hint allows, without what they hold."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


# ---------------------------------------------------------------------------------------------------------------------
# Help


def show_help(
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    prog: str,
    epilog: str = "",
    positional: Sequence[str] = (),
) -> None:
    """
    Print the help and leave, if the words ask for it.

    Raises:
        ValueError: `--help WORD`, but no field has such a word.
        SystemExit: It was printed.
    """
    asked = [i for i, word in enumerate(argv) if word in ("-h", "--help")]
    if asked:
        print(help_text(dataclass_types, prog, next(iter(argv[asked[0] + 1 :]), None), epilog, positional))
        raise SystemExit(0)


def help_text(
    dataclass_types: Sequence[type],
    prog: str,
    topic: str | None = None,
    epilog: str = "",
    positional: Sequence[str] = (),
) -> str:
    """
    The help of a command.

    Args:
        dataclass_types (`list[type]`): Dataclasses with the fields that it takes.
        prog (`str`): Its name.
        topic (`str`, *optional*): `"all"`, or a word: only fields with it in their name or in the title of their group. Not
            given, what fits a screen of 45 lines.
        epilog (`str`): Last lines.
        positional (`list[str]`): Fields whose values may stand before all flags, without their names.

    Raises:
        ValueError: No field has such a word.
    """
    fields = ArgumentReader(dataclass_types, prog=prog, add_help=False).fields
    groups = [group for cls in dataclass_types for group in _groups(cls)]
    usage = " ".join(["usage:", prog, *map(str.upper, positional), "[--config FILE.yaml|RECIPE] [--FIELD VALUE ...]"])
    if topic is None:
        explained = "\n".join([usage, *_explained(groups, fields), *(["", epilog] if epilog else [])])
        return (
            explained
            if explained.count("\n") < SCREEN
            else _overview(dataclass_types, groups, fields, prog, usage, epilog)
        )
    word = topic.lstrip("-").replace("-", "_").lower()
    if word != "all":
        groups = [
            (title, names if word in title.lower() else [name for name in names if word in name])
            for title, names in groups
        ]
    if not any(names for _, names in groups):
        raise ValueError(f"No field of {prog} has {topic!r} in its name. {did_you_mean(word, fields)}".strip())
    return "\n".join([usage, *_explained(groups, fields)])


def _groups(cls: type) -> list[tuple[str, list[str]]]:
    """Titles and fields: those that each class adds or changes, by the `> Parameters that control ...` of its docstring."""
    left = {field.name for field in dataclasses.fields(cls) if field.init}
    groups = []
    for base in cls.__mro__:
        own = [name for name in inspect.get_annotations(base) if name in left]
        left -= {*own}
        documented = {base.__name__: []}
        for title, documented_names in _documented(base):
            documented[title] = [name for name in documented_names if name in own]
        grouped = {name for names in documented.values() for name in names}
        documented[base.__name__] += [name for name in own if name not in grouped]
        groups += [(title, names) for title, names in documented.items() if names]
    return groups


def _documented(cls: type) -> Iterator[tuple[str, list[str]]]:
    for part in re.split(r"^\s*> Parameters that control ", cls.__doc__ or "", flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        yield title[:1].upper() + title[1:], re.findall(r"^ *(\w+) \(`", text, flags=re.MULTILINE)


def _explained(groups: list[tuple[str, list[str]]], fields: dict[str, argparse.Action]) -> Iterator[str]:
    for title, names in groups:
        if names:
            yield from ("", f"{title}:")
        for name in names:
            action = fields[name]
            default = "required" if action.required else f"default: {_value(action.default)}"
            text = " ".join(f"{action.help or ''} ({default})".replace("%%", "%").split())
            flag, indent = f"  --{name} {_kind(action)}", " " * 34
            if len(flag) >= len(indent):
                yield flag
                flag = ""
            yield from textwrap.wrap(text, WIDTH, initial_indent=flag.ljust(34), subsequent_indent=indent)


def _overview(
    dataclass_types: Sequence[type],
    groups: list[tuple[str, list[str]]],
    fields: dict[str, argparse.Action],
    prog: str,
    usage: str,
    epilog: str,
) -> str:
    """Names and defaults: all fields of a small class; the fields that a large one adds to those that it extends."""
    own = set()
    for cls in dataclass_types:
        names = [field.name for field in dataclasses.fields(cls)]
        own |= set(names if len(names) <= SCREEN else inspect.get_annotations(cls))
    lines = [usage, "", "Fields of the file and flags, with their defaults:"]
    for title, names in groups:
        items = [
            name if fields[name].default in (None, []) else f"{name}={_value(fields[name].default)}"
            for name in names
            if name in own
        ]
        if items:
            text = textwrap.wrap(f"{title}: {'  '.join(items)}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
            lines += text
    inherited = [title for title, names in groups if names and not own & {*names}]
    count = sum(len(names) for _, names in groups) - len(own & {*fields})
    rest = f"`{prog} --help WORD` explains the fields with the word in their name or group, `--help all` every field"
    if inherited:
        rest += f", also the {count} more that are inherited (output_dir, max_steps, per_device_train_batch_size, ...)"
    return "\n".join([*lines, "", *textwrap.wrap(f"{rest}.", WIDTH), *(["", epilog] if epilog else [])])


def _value(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and (not value or value != value.strip()) else str(value)


def _kind(action: argparse.Action) -> str:
    if action.choices:
        return "|".join(str(choice) for choice in action.choices)
    name = getattr(action.type, "__name__", "value")
    name = {"string_to_bool": "bool", "str": "text"}.get(name, name)
    return f"{name} ..." if action.nargs == "+" else name
