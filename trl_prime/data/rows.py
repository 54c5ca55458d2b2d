"""Each function here adapts a row of one kind of data set.

Positional arguments of these functions are columns, keyword-only ones are options. What an adapted row has is said in
[`~trl_prime.data.adapters`]. Not checked: whether an answer is right, and whether a reference solution passes its tests.
"""

from __future__ import annotations

import ast
import json
import math
import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, Value

from ..rewards.answers import extract_gold
from ..rewards.code_tests import read_tests
from ..rewards.programs import code_blocks
from ..sandbox.inside.prelude import Ambiguous, tested_names

if TYPE_CHECKING:
    Messages = list[dict[str, str]]

HUMANEVAL_REQUEST = "Complete this Python function. Give the whole function.\n\n```python\n{prompt}\n```"


class MalformedRow(ValueError):
    """A row that cannot be adapted; the message says why."""


def question_answer(
    question: str,
    answer: Any,
    index: Any = None,
    source: Any = None,
    *,
    worked_solution: bool = False,
    data_source: str | None = None,
    ability: str = "math",
) -> dict[str, Any]:
    r"""
    Adapt a question with its right answer.

    Args:
        question (`str`): The problem.
        answer (`str`): Holds the answer, see [`~trl_prime.rewards.answers.extract_gold`]; a list of answers
            (OlympiadBench) is one answer, joined by commas.
        index, source (*optional*): The row's id, and the name of its source.
        worked_solution (`bool`): Whether `answer` is a worked solution, in which the final answer has to be marked by
            `\boxed{}` (MATH) or `####` (GSM8K).
        data_source (`str`, *optional*): Name of the source, of all rows.
        ability (`str`): Which verifier is to judge.

    Returns:
        `dict`: the adapted row.

    Raises:
        MalformedRow: There is no question or no answer, or the worked solution does not mark it.
    """
    if isinstance(answer, list):
        answer = ", ".join(_scalar_text(part, "answer") for part in answer)
    answer = _scalar_text(answer, "answer")
    solution = extract_gold(answer, marked_only=worked_solution)
    if solution is None:
        raise MalformedRow(
            f"the answer ends in {answer[-40:]!r} without a final answer in \\boxed{{}} or after '####'"
        )
    return _row(
        prompt=_user(_text(question, "question")),
        solution=solution,
        ability=ability,
        data_source=data_source or source,
        index=index,
    )


def eurus2_rl(
    prompt: Any, reward_model: Any, ability: Any, data_source: Any, extra_info: Any = None
) -> dict[str, Any]:
    """
    Adapt a row of Eurus-2-RL-Data. The prompt is kept; `reward_model["ground_truth"]` is a bare LaTeX answer (math) or tests,
    as a JSON object {"inputs", "outputs", "fn_name"?} (code).

    Args:
        prompt (`list`): Messages.
        reward_model (`dict`): Has `ground_truth`.
        ability (`str`): `"math"` or `"code"`.
        data_source (`str`): For instance `"numina_olympiads"`, `"taco"`.
        extra_info (`dict`, *optional*): May have `index`.

    Returns:
        `dict`: the adapted row.

    Raises:
        MalformedRow: A column has not the expected form, or the tests are empty or unpaired.
    """
    if ability not in ("math", "code"):
        raise MalformedRow(f"ability is {ability!r} instead of 'math' or 'code'")
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model:
        raise MalformedRow(f"reward_model is {_short(reward_model)} instead of an object with 'ground_truth'")
    truth = reward_model["ground_truth"]
    return _row(
        prompt=_messages(prompt, "prompt", last="user"),
        solution=_text(truth, "ground_truth") if ability == "math" else None,
        tests=_input_output_tests(truth) if ability == "code" else None,
        ability=ability,
        data_source=_text(data_source, "data_source"),
        index=(extra_info or {}).get("index"),
    )


def eurus2_sft(conversations: Any, system: Any = None, index: Any = None, source: Any = None) -> dict[str, Any]:
    """
    Bring a row of Eurus-2-SFT-Data into TRL's conversational format for supervised fine-tuning.

    Args:
        conversations (`list`): Turns, `[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]`.
        system (`str`, *optional*): System prompt.
        index, source (*optional*): The row's id, and the name of its source.

    Returns:
        `dict`: `messages`, `data_source`, `index`.

    Raises:
        MalformedRow: A turn is empty or of unknown speaker, or the last is not the assistant's.
    """
    roles = {"human": "user", "gpt": "assistant"}
    if not isinstance(conversations, list) or not all(isinstance(turn, Mapping) for turn in conversations):
        raise MalformedRow(f"conversations is {_short(conversations)} instead of a list of turns")
    turns = [
        {"role": roles.get(turn.get("from"), turn.get("from")), "content": turn.get("value")} for turn in conversations
    ]
    if isinstance(system, str) and system.strip():
        turns = with_system_prompt(turns, system)
    messages = _messages(turns, "conversations", last="assistant")
    return {"messages": messages, "data_source": _optional(source), "index": _optional(index)}


def humaneval(prompt: str, test: str, entry_point: str, index: Any = None) -> dict[str, Any]:
    """
    Adapt a row of HumanEval, which has a function's head and docstring to be completed, and a `check` function.

    Args:
        prompt (`str`): Imports, head and docstring of the function.
        test (`str`): Code that defines `check(candidate)`.
        entry_point (`str`): Name of the function.
        index (*optional*): The row's id.

    Returns:
        `dict`: the adapted row.

    Raises:
        MalformedRow: A column is empty, or does not define what it has to.
    """
    prompt, test, entry_point = _text(prompt, "prompt"), _text(test, "test"), _text(entry_point, "entry_point")
    if not re.search(rf"\bdef\s+{re.escape(entry_point)}\s*\(", prompt):
        raise MalformedRow(f"prompt does not define entry_point {entry_point!r}")
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in _parse(test, "test").body):
        raise MalformedRow("test does not define check(candidate)")
    return _row(
        prompt=_user(HUMANEVAL_REQUEST.format(prompt=prompt.rstrip())),
        tests=json.dumps({"prompt": prompt, "test": test, "entry_point": entry_point}),
        ability="code",
        data_source="humaneval",
        index=index,
    )


def leetcode(
    question: str, test: str, index: Any = None, prompt: Any = None, entry_point: Any = None
) -> dict[str, Any]:
    """
    Adapt a row of LeetCode problems, which has a request for a method of `class Solution`, with its head, and tests.

    Tests of DeepSeek-Coder's contest problems are asserts that call it. They are read, not run, and become calls with their
    expected values and with the types that the head declares. Tests of LeetCodeDataset are a function `check(candidate)`,
    with imports and helpers as `prompt`.

    Args:
        question (`str`): The request.
        test (`str`): `test_input = {...}` and `assert my_solution.method(**test_input) == value`, by turns; or code that
            defines `check(candidate)`.
        index (*optional*): The row's id.
        prompt (`str`, *optional*): Imports and helpers, of tests by `check`.
        entry_point (`str`, *optional*): What is checked: `Solution().method`.

    Returns:
        `dict`: the adapted row.

    Raises:
        MalformedRow: A column is empty, or a test is of another form.
    """
    question = _text(question, "question")
    if entry_point is None:
        tests = _contest_calls(_parse(_text(test, "test"), "test"))
        if all(isinstance(output, list) and len(output) == 1 for output in tests["outputs"]):
            tests["bare_outputs"] = True
        tests |= _declared_types(question, tests["fn_name"])
    else:
        tests = {"prompt": prompt or "", "test": _text(test, "test"), "entry_point": _text(entry_point, "entry_point")}
    return _row(
        prompt=_user(question), tests=_checked_tests(tests), ability="code", data_source="leetcode", index=index
    )


def _contest_calls(module: ast.Module) -> dict[str, Any]:
    inputs: list[list[Any]] = []
    outputs: list[Any] = []
    methods: set[str] = set()
    arguments: dict[str, Any] = {}
    try:
        for statement in module.body:
            if isinstance(statement, ast.Assert):
                call, (expected,), (equals,) = statement.test.left, statement.test.comparators, statement.test.ops
                if not isinstance(equals, ast.Eq):
                    raise ValueError("it does not compare by ==")
                methods.add(call.func.attr)
                inputs.append(list(arguments.values()))
                outputs.append(ast.literal_eval(expected))
            elif isinstance(statement.value, ast.Dict):
                arguments = ast.literal_eval(statement.value)
    except (AttributeError, TypeError, ValueError) as error:
        raise MalformedRow(f"a test is of another form than a call with its value ({error})") from error
    if len(methods) != 1:
        raise MalformedRow(f"the tests call {len(methods)} methods instead of one")
    return {"inputs": inputs, "outputs": outputs, "fn_name": methods.pop()}


def _declared_types(question: str, method: str) -> dict[str, str]:
    """Find the types of a method in the code that a request shows, if they say how to read its tests."""
    for block in code_blocks(question):
        for head in re.findall(rf"^ *def +{re.escape(method)} *(\(.*\)[^:]*):", block, re.MULTILINE):
            try:
                (function,) = ast.parse(f"def method{head}: pass").body
            except SyntaxError:
                continue
            if function.args.args and function.args.args[0].arg == "self":
                del function.args.args[0]
            returned = f" -> {ast.unparse(function.returns)}" if function.returns else ""
            signature = f"({ast.unparse(function.args)}){returned}"
            return {"signature": signature} if re.search("TreeNode|ListNode|-> None$", signature) else {}
    return {}


def mbpp(
    question: str,
    asserts: Any,
    setup: Any = None,
    imports: Any = None,
    code: Any = None,
    index: Any = None,
    *,
    shown_tests: int = 1,
) -> dict[str, Any]:
    """
    Adapt a row of MBPP, or of any data with a request and a list of assert statements.

    Args:
        question (`str`): The request.
        asserts (`list[str]`): Assert statements.
        setup (`str`, *optional*): Code to run before them.
        imports (`list[str]`, *optional*): Import statements to run before that.
        code (`str`, *optional*): A solution, which says which of the functions that the asserts call is under test, and is
            not kept: some are named like Python's own (`sum`).
        index (*optional*): The row's id.
        shown_tests (`int`): How many of the asserts the prompt shows. One tells the function's name and arguments; what is
            shown can be answered by rote.

    Returns:
        `dict`: the adapted row.

    Raises:
        MalformedRow: A column is empty, or an assert is not Python or asserts nothing.
    """
    question = _text(question, "question")
    if not isinstance(asserts, list) or not asserts:
        raise MalformedRow(f"the asserts are {_short(asserts)} instead of a list of statements")
    for statement in asserts:
        if not any(isinstance(node, ast.Assert) for node in ast.walk(_parse(_text(statement, "assert"), "assert"))):
            raise MalformedRow(f"{_short(statement)} asserts nothing")
    before = "\n".join(part for part in [*(imports or []), setup] if part and part.strip())
    shown = "\n".join(asserts[:shown_tests])
    tests: dict[str, Any] = {"asserts": asserts}
    if before:
        tests["setup"] = before
    if (entry_point := _entry_point(code, asserts, before)) is not None:
        tests["entry_point"] = entry_point
    return _row(
        prompt=_user(f"{question}\n\nYour code has to pass tests like these:\n\n{shown}" if shown else question),
        tests=_checked_tests(tests),
        ability="code",
        data_source="mbpp",
        index=index,
    )


def _entry_point(code: Any, asserts: list[str], setup: str) -> str | None:
    """Name the one function of a solution that asserts call, if they do not say it themselves."""
    try:
        defined = {node.name for node in ast.parse(code or "").body if isinstance(node, ast.FunctionDef)}
        called = {node.id for text in asserts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return None
    if len(defined & called) != 1:
        return None
    (name,) = defined & called
    try:
        return None if tested_names(setup, asserts) == {name} else name
    except (Ambiguous, SyntaxError):
        return name


def process_bench(problem: str, steps: Any, label: Any, index: Any = None) -> dict[str, Any]:
    """
    Adapt a row of ProcessBench: a solution in steps, and which of them is wrong. It serves to judge a PRM, not to train one.

    Args:
        problem (`str`): The problem.
        steps (`list[str]`): The steps of one solution.
        label (`int`): Index of the first wrong step, or -1.
        index (*optional*): The row's id.

    Returns:
        `dict`: `prompt`, `steps`, `label`, `index`.

    Raises:
        MalformedRow: There are no steps, or the label is not the index of one of them.
    """
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise MalformedRow(f"steps is {_short(steps)} instead of a list of texts")
    if not isinstance(label, int) or not -1 <= label < len(steps):
        raise MalformedRow(f"label is {_short(label)} instead of the index of one of {len(steps)} steps, or -1")
    return {"prompt": _user(_text(problem, "problem")), "steps": steps, "label": label, "index": _optional(index)}


def reasoning_gym(question: str, answer: Any, tests: str, index: Any = None) -> dict[str, Any]:
    """
    Adapt a problem of a reasoning-gym task that `reasoning_gym_rows` made.

    Args:
        question (`str`): The problem.
        answer (`str`, *optional*): A right answer, where the task gives one.
        tests (`str`): JSON object of what the scorer needs.
        index (*optional*): The row's number.

    Returns:
        `dict`: the adapted row.

    Raises:
        MalformedRow: The scorer does not accept the answer, or accepts any answer.
    """
    from ..rewards.reasoning_gym_rewards import is_right

    task = json.loads(tests)["task"]
    # Entries went through JSON, so a scorer that needs its tuples back no longer knows its own answer
    if answer is not None and not is_right(answer, tests):
        raise MalformedRow(f"the scorer of {task!r} does not accept its own answer {_short(answer)}")
    if any(is_right(junk, tests) for junk in ("", "I do not know.") if junk != answer):
        raise MalformedRow(f"the scorer of {task!r} accepts any answer")
    return _row(
        prompt=_user(_text(question, "question")),
        solution=answer,
        tests=tests,
        ability="reasoning_gym",
        data_source=f"reasoning_gym/{task}",
        index=index,
    )


def reasoning_gym_rows(task: str, split: str = "train", *, size: int = 500, seed: int = 0, **config: Any) -> Dataset:
    """
    Make problems of a reasoning-gym task, as rows for [`reasoning_gym`].

    Args:
        task (`str`): Its name, for instance `"leg_counting"`.
        split (`str`): Every split has a seed of its own, so that held-out problems are drawn apart. A task with few
            distinct problems can still draw the same one twice.
        size (`int`): How many problems.
        seed (`int`): reasoning-gym's own seed for the split `"train"`. Row i depends on `seed + i` alone, so seeds that lie
            closer together than `size` have problems in common.
        config: Further settings of the task.

    Returns:
        `Dataset`: with the columns `question`, `answer`, `tests`, `index`.

    Raises:
        ValueError: The task is unknown, its settings are wrong, or its scorer is not safe to run.
    """
    from ..rewards.reasoning_gym_rewards import load_scorer, make_task

    split_seed = seed if split == "train" else random.Random(f"{split}/{seed}").getrandbits(31)
    load_scorer(task, json.dumps(config, sort_keys=True))
    rows = [
        {
            "question": entry["question"],
            "answer": entry["answer"],
            "tests": json.dumps({"task": task, "config": config, "entry": entry}),
            "index": str(i),
        }
        for i, entry in enumerate(make_task(task, {**config, "size": size, "seed": split_seed}))
    ]
    return Dataset.from_list(rows, Features({name: Value("string") for name in rows[0]}))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of rows


def _row(
    prompt: Messages,
    solution: str | None = None,
    tests: str | None = None,
    ability: str | None = None,
    data_source: Any = None,
    index: Any = None,
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "solution": solution,
        "tests": tests,
        "ability": ability,
        "data_source": _optional(data_source),
        "index": _optional(index),
    }


def with_system_prompt(messages: Messages, system_prompt: str) -> Messages:
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system_prompt}, *rest]


def _user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def _optional(value: Any) -> str | None:
    return None if value is None else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise MalformedRow(f"the {name} is {_short(value)} instead of a text")
    return value


def _scalar_text(value: Any, name: str) -> str:
    """Return a text, or a number as text: CSV and JSON give columns of plain numbers as numbers."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    return _text(value, name).strip()


def _messages(value: Any, name: str, last: str) -> Messages:
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise MalformedRow(f"{name} is {_short(value)} instead of a list of messages")
    for message in value:
        if message.get("role") not in ("system", "user", "assistant"):
            raise MalformedRow(f"{name} has a message of role {_short(message.get('role'))}")
        # A system prompt may be empty; Eurus-2 has one in every row
        if message["role"] != "system":
            _text(message.get("content"), f"content of a message of {name}")
    if value[-1]["role"] != last:
        raise MalformedRow(f"the last message of {name} is of role {value[-1]['role']!r} instead of {last!r}")
    return [{"role": message["role"], "content": message.get("content") or ""} for message in value]


def _parse(code: str, name: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise MalformedRow(f"the {name} {_short(code)} is no Python ({error})") from error


def _input_output_tests(truth: Any) -> str:
    """Check tests in the format of Eurus-2 and APPS, and return them as JSON text."""
    text = truth.removeprefix("\ufeff") if isinstance(truth, str) else json.dumps(truth)
    try:
        tests = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedRow(f"ground_truth {_short(text)} is no JSON ({error})") from error
    inputs, outputs = (tests.get("inputs"), tests.get("outputs")) if isinstance(tests, dict) else (None, None)
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise MalformedRow(f"ground_truth {_short(text)} has no lists 'inputs' and 'outputs'")
    if not inputs:
        raise MalformedRow("ground_truth has no tests")
    if len(inputs) != len(outputs):
        raise MalformedRow(f"ground_truth has {len(inputs)} inputs and {len(outputs)} outputs")
    name = tests.get("fn_name")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise MalformedRow(f"ground_truth has the fn_name {_short(name)}")
    _checked_tests(tests)
    return text


def _checked_tests(tests: dict[str, Any]) -> str:
    """Return tests as JSON text, if `CodeReward` can read them."""
    try:
        text = json.dumps(tests)
        read_tests(tests)
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedRow(f"the tests cannot be judged ({error})") from error
    return text
