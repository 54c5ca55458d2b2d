"""Read the tests of a problem of code, in each of the forms that data sets have."""

from __future__ import annotations

import builtins
import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProblemTests:
    """
    The tests of one problem, all of one of three kinds.

    Attributes:
        kind: "stdin" (programs that read and write), "call" (calls to a function) or "assert" (Python code).
        inputs: Standard inputs; argument lists of the calls; or the asserts.
        outputs: Expected outputs or values; empty for asserts.
        name: The function under test.
        setup: Python code that the asserts need. Solutions may rely on it too where there is a `prompt`.
        prompt: The beginning of a function that the completion continues or repeats.
    """

    kind: str
    inputs: list[Any]
    outputs: list[Any]
    name: str | None = None
    setup: str = ""
    prompt: str = ""

    def names(self) -> tuple[str, ...]:
        """List the names of which a solution has to define one; empty for whole programs."""
        if self.name:
            return (re.split(r"\W", self.name)[0],)  # "Solution().solve" asks for the class
        if self.kind == "assert":
            called = {name for code in self.inputs for name in re.findall(r"\b([A-Za-z_]\w*)\s*\(", code)}
            return tuple(sorted(called - set(dir(builtins))))
        return ()


def read_tests(tests: str | dict[str, Any] | list[str] | None) -> ProblemTests | None:
    """
    Read the tests of a row.

    Args:
        tests: JSON text or the object itself, of one of the forms

            - `{"inputs": [...], "outputs": [...]}`: standard input and output (Eurus-2, APPS, CodeContests);
            - the same with `"fn_name"`: calls. An input is a list of arguments, or text with one JSON value a line; an
              output is the expected value, bare, in a list of one, or as JSON text;
            - `{"prompt": ..., "test": ..., "entry_point": ...}`: HumanEval; `test` defines `check(candidate)`;
            - `{"asserts": [...], "setup"?: ..., "entry_point"?: ...}`, or just a list of asserts (MBPP).

    Returns:
        [`ProblemTests`], or None where there are none.

    Raises:
        ValueError: It is none of these forms.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests) if tests.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"`tests` is not JSON: {error}") from error
    if not tests:
        return None
    if isinstance(tests, list):
        tests = {"asserts": tests}
    if not isinstance(tests, dict):
        raise ValueError(f"`tests` is a {type(tests).__name__}; expected an object or a list of asserts.")
    if "asserts" in tests:
        asserts, setup, name = tests["asserts"], tests.get("setup") or "", tests.get("entry_point")
        if not (isinstance(asserts, list) and all(isinstance(code, str) for code in asserts)):
            raise ValueError("`asserts` is not a list of texts.")
        return ProblemTests("assert", asserts, [], name, setup) if asserts else None
    if "test" in tests and "entry_point" in tests:
        name, prompt = tests["entry_point"], complete_prompt(tests.get("prompt") or "")
        return ProblemTests(
            "assert", [f"check({name})"], [], name, f"{prompt}\n{tests['test']}", tests.get("prompt") or ""
        )
    if "inputs" not in tests or "outputs" not in tests:
        raise ValueError(f"`tests` has the keys {sorted(tests)}; expected inputs and outputs, asserts, or test.")
    inputs, outputs, name = tests["inputs"], tests["outputs"], tests.get("fn_name")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        raise ValueError("`inputs` and `outputs` are not two lists of one length.")
    if not inputs:
        return None
    if name:
        return ProblemTests("call", list(map(_arguments, inputs)), list(map(expected_value, outputs)), name)
    return ProblemTests("stdin", list(map(_text, inputs)), list(map(_text, outputs)))


def complete_prompt(prompt: str) -> str:
    """Make code of a HumanEval problem's prompt: a bare signature gets a body. Empty if the prompt is no Python."""
    for body in ("", "\n    pass\n"):
        with contextlib.suppress(SyntaxError, ValueError):
            compile(prompt + body, "<prompt>", "exec")
            return prompt + body
    return ""


def _arguments(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        try:
            return [json.loads(line) for line in value.split("\n") if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"the input {value[:80]!r} is not one JSON value a line: {error}") from error
    raise ValueError(f"the input {str(value)[:80]!r} is neither a list of arguments nor text.")


def expected_value(value: Any) -> Any:
    """Read the value that a call has to return, from JSON text if it is that."""
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def _text(value: Any) -> str:
    """Make text of an input or output; some rows hold lists of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
