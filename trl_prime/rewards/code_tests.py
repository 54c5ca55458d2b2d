"""Read the tests of a problem of code, in each of the forms that data sets have."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from ..sandbox.inside.prelude import Ambiguous, tested_names
from .programs import BYTE_ORDER_MARK

# Expected outputs have to pass through the sandbox's channels, which end at 64 MiB
MAX_TEST_BYTES = 1 << 25


class UnreadableTests(ValueError):
    """
    The tests of a row are of no known form.

    Args:
        kind (`str`): What is wrong, in words that rows of the same fault share.
        detail (`str`): The case at hand.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


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
        signature: Parameters and types of the function, as in its definition: "(root: Optional[TreeNode]) -> int".
        wrapped: Whether each expected value may stand in a list of one, as in APPS.
        tested: Names that the asserts leave to the solution.
        unnamed: Whether nothing says what `check(candidate)` is to check, see [`named`].
    """

    kind: str
    inputs: list[Any]
    outputs: list[Any]
    name: str | None = None
    setup: str = ""
    prompt: str = ""
    signature: str = ""
    wrapped: bool = False
    tested: tuple[str, ...] = ()
    unnamed: bool = False

    def named(self, functions: list[str]) -> ProblemTests | None:
        """
        Check the last of the functions that a solution defines; None if there is none to check.

        A name that the tests use themselves is none: the solution would replace what judges it.
        """
        taken = _mentioned_names(self.setup) - set(self.tested)
        name = next((name for name in reversed(functions) if name not in taken), None)
        if name is None:
            return None
        return replace(self, inputs=[f"check({name})"], name=name, tested=tuple({*self.tested, name}), unnamed=False)

    def names(self) -> tuple[str, ...]:
        """List the names of which a solution has to define one; empty for whole programs."""
        if self.name:
            return (re.split(r"\W", self.name)[0],)  # "Solution().solve" asks for the class
        return self.tested


def read_tests(tests: str | dict[str, Any] | list[str] | None, entry_point: str | None = None) -> ProblemTests | None:
    """
    Read the tests of a row.

    Args:
        tests: JSON text or the object itself, of one of the forms

            - `{"inputs": [...], "outputs": [...]}`: standard input and output (Eurus-2, APPS, CodeContests);
            - the same with `"fn_name"`: calls. An input that is text holds one JSON value a line, and its output, where that
              is text, is JSON too. An input that is a list holds the arguments, and its output is the value as it stands.
              Where every output is a list of one, values are expected with or without it, as in APPS, unless the row says
              `"bare_outputs": true`. `"signature"` declares types, see [`ProblemTests`];
            - `{"prompt": ..., "test": ..., "entry_point": ...}`: HumanEval; `test` defines `check(candidate)`;
            - `{"asserts": [...], "setup"?: ..., "entry_point"?: ...}`, or just a list of asserts (MBPP);

            or plain Python text: asserts, functions `test_...` that hold asserts, or HumanEval's `check(candidate)`.
        entry_point (`str`, *optional*): The function under test, where the row has it in a column of its own.
            `check(candidate)` does without: then the solution says which of its functions is the one.

    Returns:
        [`ProblemTests`], or None where there are none.

    Raises:
        UnreadableTests: It is none of these forms; a `ValueError`.
    """
    if isinstance(tests, str):
        tests = _parsed(tests.removeprefix(BYTE_ORDER_MARK), entry_point)
    if not tests:
        return None
    if isinstance(tests, list):
        tests = {"asserts": tests}
    if not isinstance(tests, dict):
        raise UnreadableTests(
            "`tests` is neither an object nor a list of asserts nor Python", f"it is a {type(tests).__name__}"
        )
    if "asserts" in tests:
        return _asserts(tests, entry_point)
    if "test" in tests and "entry_point" in tests:
        name, prompt = tests["entry_point"], tests.get("prompt") or ""
        name = name or entry_point
        if not all(isinstance(text, str) for text in (name or "", prompt, tests["test"])):
            raise UnreadableTests("`prompt`, `test` and `entry_point` are not all texts")
        prompt = _without_mark(prompt)
        setup = f"{complete_prompt(prompt)}\n{_without_mark(tests['test'])}"
        if not name:
            unnamed = _checked("assert", ["check(candidate)"], "candidate", setup, prompt)
            tested = tuple(name for name in unnamed.tested if name != "candidate")
            return replace(unnamed, name=None, tested=tested, unnamed=True)
        return _checked("assert", [f"check({name})"], name, setup, prompt)
    if "inputs" not in tests or "outputs" not in tests:
        raise UnreadableTests(
            "`tests` has neither inputs and outputs, nor asserts, nor test and entry_point", f"it has {sorted(tests)}"
        )
    return _inputs_and_outputs(tests)


def _parsed(text: str, entry_point: str | None) -> Any:
    """Read JSON, or else Python."""
    if not text.strip():
        return None
    try:
        value = json.loads(text)
        if not isinstance(value, str):
            return value
        text = value
    except (ValueError, RecursionError) as error:
        json_error = str(error)
    else:
        json_error = "it is a text"
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise UnreadableTests("`tests` is not JSON and not Python", f"{json_error}; {error}") from error
    return _of_python(text, module, entry_point)


def _of_python(text: str, module: ast.Module, entry_point: str | None) -> dict[str, Any]:
    """Sort the statements of tests in plain Python."""
    functions = [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
    if "check" in functions:
        for node in module.body:
            call = node.value if isinstance(node, ast.Expr) else None
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "check" and len(call.args) == 1:
                entry_point = entry_point or ast.unparse(call.args[0])
        kept = [node for node in module.body if not _calls_check(node)]
        return {"test": _source(kept), "entry_point": entry_point}
    setup: list[ast.stmt] = []
    asserts: list[str] = []
    waiting: list[ast.stmt] = []
    for node in module.body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            setup.append(node)
        elif any(isinstance(inner, ast.Assert) for inner in ast.walk(node)):
            asserts.append(_source([*waiting, node]))
            waiting = []
        else:
            waiting.append(node)
    if not asserts:
        setup += waiting
        asserts = [f"{name}()" for name in functions if name.startswith("test")]
    if not asserts:
        raise UnreadableTests("`tests` is Python that asserts nothing", text[:80])
    return {"asserts": asserts, "setup": _source(setup)}


def _calls_check(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "check"


def _source(nodes: list[ast.stmt]) -> str:
    return "\n".join(map(ast.unparse, nodes))


def _mentioned_names(code: str) -> set[str]:
    """List the names that code uses or defines."""
    names = {"check"}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name.partition(".")[0])
    return names


def _asserts(tests: dict[str, Any], entry_point: str | None) -> ProblemTests | None:
    asserts, setup = tests["asserts"], tests.get("setup") or ""
    if not (isinstance(asserts, list) and all(isinstance(code, str) for code in asserts) and isinstance(setup, str)):
        raise UnreadableTests("`asserts` is not a list of texts, or `setup` is no text")
    if not asserts:
        return None
    name = tests.get("entry_point") or entry_point
    if name is not None and not isinstance(name, str):
        raise UnreadableTests("`entry_point` is no text", str(name)[:80])
    return _checked("assert", list(map(_without_mark, asserts)), name, _without_mark(setup), "")


def _checked(kind: str, asserts: list[str], name: str | None, setup: str, prompt: str) -> ProblemTests:
    if sum(map(len, asserts)) + len(setup) > MAX_TEST_BYTES:
        raise UnreadableTests(f"the tests are longer than {MAX_TEST_BYTES >> 20} MB")
    try:
        tested = tested_names(setup, asserts, name)
    except Ambiguous as error:
        raise UnreadableTests(str(error), "; ".join(asserts)[:80]) from error
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise UnreadableTests("the asserts or their setup are not Python", str(error)) from error
    return ProblemTests(kind, asserts, [], name, setup, prompt, tested=tuple(sorted(tested)))


def _inputs_and_outputs(tests: dict[str, Any]) -> ProblemTests | None:
    inputs, outputs, name = tests["inputs"], tests["outputs"], tests.get("fn_name")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        raise UnreadableTests("`inputs` and `outputs` are not two lists of one length")
    if not inputs:
        return None
    if name:
        signature = tests.get("signature") or ""
        if not (isinstance(name, str) and name.isidentifier()):
            raise UnreadableTests("`fn_name` is no name of a function", repr(name)[:80])
        if signature and not _is_signature(signature):
            raise UnreadableTests(
                "`signature` is not what follows the name in a function's definition", repr(signature)[:80]
            )
        expected = [_expected(output, isinstance(value, str)) for value, output in zip(inputs, outputs, strict=True)]
        wrapped = not tests.get("bare_outputs") and all(isinstance(v, list) and len(v) == 1 for v in expected)
        problem = ProblemTests(
            "call", list(map(_arguments, inputs)), expected, name, signature=signature, wrapped=wrapped
        )
    else:
        problem = ProblemTests("stdin", list(map(_text, inputs)), list(map(_text, outputs)))
    for value in (*problem.inputs, *problem.outputs):
        if size_of(value) > MAX_TEST_BYTES:
            raise UnreadableTests(
                f"an input or an expected output is longer than {MAX_TEST_BYTES >> 20} MB", f"{size_of(value)} bytes"
            )
    return problem


def _is_signature(text: Any) -> bool:
    try:
        return isinstance(text, str) and text.startswith("(") and len(ast.parse(f"def f{text}: pass").body) == 1
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def size_of(value: Any) -> int:
    """Count the bytes that an input or an expected output takes on its way through the sandbox."""
    return len((value if isinstance(value, str) else json.dumps(value, default=str)).encode(errors="surrogatepass"))


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
            return [json.loads(line) for line in _without_mark(value).split("\n") if line.strip()]
        except (ValueError, RecursionError) as error:
            raise UnreadableTests("an input is not one JSON value a line", f"{value[:80]!r}: {error}") from error
    raise UnreadableTests("an input of a call is neither a list of arguments nor text", str(value)[:80])


def _expected(value: Any, encoded: bool) -> Any:
    """Read the value that a call has to return: JSON text where the arguments are JSON text too."""
    if not (encoded and isinstance(value, str)):
        return value
    try:
        return json.loads(_without_mark(value))
    except (ValueError, RecursionError) as error:
        raise UnreadableTests(
            "an output is not JSON, though the arguments are JSON text", f"{value[:80]!r}: {error}"
        ) from error


def _text(value: Any) -> str:
    """Make text of an input or output; some rows hold lists of lines."""
    return _without_mark("\n".join(map(str, value)) if isinstance(value, list) else str(value))


def _without_mark(text: str) -> str:
    return text.removeprefix(BYTE_ORDER_MARK)
