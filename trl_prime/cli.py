"""`trl-prime COMMAND`: the console script. A command is a module of `trl_prime.commands` and is imported when it is called."""

from __future__ import annotations

import importlib
import sys
import warnings

from huggingface_hub.errors import HfHubHTTPError

from .prime_config import nearest

# Name of the command: its module, and what it is for
COMMANDS = {
    "train": ("train", "Train a policy and its implicit PRM by a recipe."),
    "prm": ("prm", "Train an implicit PRM offline, on labelled completions or preference pairs."),
}
EXIT_CODES = """
exit codes:
  0   all went well
  1   it failed on the way
  2   the command line, the recipe or the data are wrong: nothing was started
"""


def usage() -> str:
    lines = ["usage: trl-prime COMMAND [--config FILE.yaml] [--FIELD VALUE ...]", ""]
    lines += [f"  {name:<8}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", "`trl-prime COMMAND --help` lists the fields of a command.", EXIT_CODES.rstrip()])


def main(argv: list[str] | None = None) -> int:
    """Entry point of `trl-prime`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"trl-prime: {argv[0]!r} is no command. {nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    # What the libraries below will change in their next major version is no concern of who runs a recipe
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return importlib.import_module(f".commands.{COMMANDS[argv[0]][0]}", __package__).run(argv[1:])
    except (ValueError, NotImplementedError) as error:
        print(f"trl-prime: {error}", file=sys.stderr)
        return 2
    except HfHubHTTPError as error:
        print(f"trl-prime: the Hub refused: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
