"""Tools that a policy can call between its turns, and how a recipe names them.

A recipe's `tools` holds `python`, this module's interpreter, or dotted paths of functions with type hints and a Google-style
docstring, as `GRPOTrainer(tools=...)` takes them. With options in brackets, `python(seconds=10)`, the path is that of a
function that makes the tool.
"""

from __future__ import annotations

from collections.abc import Callable

from ..specs import call_with_options, load_object, nearest, parse_call
from . import Limits, open_sandbox

TOOLS = {"python": "trl_prime.sandbox.tool.python_tool"}


def python_tool(
    seconds: float = 5.0, memory_mb: int = 512, max_characters: int = 2000, sandbox: str = "auto"
) -> Callable[[str], str]:
    """
    Make a Python interpreter for the policy. Its programs run behind the same walls as those of the code reward.

    Args:
        seconds (`float`): Time of one program.
        memory_mb (`int`): Its memory.
        max_characters (`int`): How much of its output the policy reads; of a longer one the beginning and the end.
        sandbox (`str`): See [`~trl_prime.sandbox.open_sandbox`].

    Returns:
        `Callable`: the tool `python`.

    Raises:
        SandboxUnavailable: Programs cannot be run safely on this machine.
        ValueError: An option is out of range.
    """
    if seconds <= 0 or memory_mb <= 0 or max_characters < 2:
        raise ValueError(
            f"The tool python has seconds={seconds}, memory_mb={memory_mb}, max_characters={max_characters}, which must be "
            "positive, the last at least 2."
        )
    box = open_sandbox(sandbox)
    limits = Limits(wall_seconds=seconds, memory_mb=memory_mb)

    def python(code: str) -> str:
        """
        Run a Python program and read what it prints.

        Args:
            code: The whole program. Print what you want to know.

        Returns:
            What the program printed, or its error.
        """
        result = box.run(code, limits=limits)
        said = result.stdout.decode(errors="replace")
        if result.reason is not None:
            said += f"\n[stopped: {result.reason} limit]"
        elif result.exit_code != 0:
            said += f"\n{result.stderr.decode(errors='replace')}"
        return _shortened(said.strip(), max_characters) or "[nothing was printed]"

    return python


def load_tool(spec: str) -> Callable:
    """
    Load a tool by name.

    Args:
        spec (`str`): A key of `TOOLS`, a dotted path, or either with options, `python(seconds=10)`.

    Returns:
        `Callable`: the tool.

    Raises:
        ValueError: There is no such tool or option, or an option is missing.
    """
    name, options = parse_call(spec)
    if name not in TOOLS and "." not in name:
        raise ValueError(f"tools has {spec!r}, which is unknown. {nearest(name, TOOLS)} Or give a dotted path.")
    found = load_object(TOOLS.get(name, name))
    if name in TOOLS or options is not None:
        found = call_with_options("tools", spec, found, options or {})
    if not callable(found):
        raise ValueError(f"tools has {spec!r}, which is a {type(found).__name__} and no function.")
    return found


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}\n[...]\n{text[len(text) - length // 2 :]}"
