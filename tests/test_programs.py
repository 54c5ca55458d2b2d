"""The program in a completion, and the comparison of its answers."""

import time
from collections import deque

import pytest

from trl_prime.rewards.programs import (
    code_blocks,
    defined_functions,
    flush_left,
    pick_solution,
    same_output,
    same_value,
)
from trl_prime.sandbox.inside import wire

SOLUTION = "def add(a, b):\n    return a + b\n"
USAGE = "print(add(1, 2))\n"


def fenced(*blocks, language="python"):
    return "\nSome words.\n".join(f"```{language}\n{block}```" for block in blocks)


def test_blocks_in_order_and_only_python():
    text = fenced("a = 1\n") + "\n" + fenced("int a;\n", language="cpp") + "\n" + fenced("b = 2\n", language="")
    assert code_blocks(text) == ["a = 1\n", "b = 2\n"]


@pytest.mark.parametrize("language", ["python", "Python", "py", "python3", ""])
def test_names_of_the_language(language):
    assert code_blocks(fenced(SOLUTION, language=language)) == [SOLUTION]


def test_a_block_that_is_never_closed_goes_to_the_end():
    assert code_blocks("Here:\n```python\n" + SOLUTION) == [SOLUTION]


def test_longer_fences_hold_shorter_ones():
    inner = 'text = """\n```\nnot a fence\n```\n"""\n'
    assert code_blocks(f"````python\n{inner}````\n") == [inner]


def test_code_within_a_line_opens_no_block():
    assert code_blocks("```x = 1``` is code\n" + fenced(SOLUTION)) == [SOLUTION]


def test_drafts_while_thinking_do_not_count():
    assert code_blocks("<think>" + fenced("draft = 1\n") + "</think>\n" + fenced(SOLUTION)) == [SOLUTION]


@pytest.mark.parametrize(
    "margin",
    ["   ", "\t", "> ", "> > ", ">   ", ">"],
)
def test_blocks_within_lists_and_quotations_lose_their_margin(margin):
    lines = ["```python", *SOLUTION.splitlines(), "", "```"]
    text = "1. First this:\n\n" + "".join(f"{margin}{line}\n" for line in lines)
    (block,) = code_blocks(text)
    assert block.strip() == SOLUTION.strip()


@pytest.mark.parametrize("mark", ["- ", "* ", "+ ", "1. ", "12) ", "  - ", "> 1. "])
def test_a_block_may_begin_beside_the_mark_of_its_item(mark):
    margin = mark if mark.startswith(">") else " " * len(mark)
    margin = "> " + " " * 3 if mark == "> 1. " else margin
    text = f"{mark}```python\n" + "".join(f"{margin}{line}\n" for line in [*SOLUTION.splitlines(), "```"])
    assert code_blocks(text) == [SOLUTION]


def test_the_margin_of_a_block_is_not_that_of_its_code():
    """Lines that lie further left keep what they have, tabs of the code stay tabs, and a continuation stays indented."""
    text = '   ```python\n   def f():\n   \tx = """\n  y\n"""\n   \treturn x\n   ```\n'
    assert code_blocks(text) == ['def f():\n\tx = """\ny\n"""\n\treturn x\n']
    assert code_blocks("```python\n    return 1\n```") == ["    return 1\n"]
    assert flush_left("\n    def f():\n        return 1\nf()") == "\ndef f():\n    return 1\nf()"
    assert flush_left(SOLUTION) == SOLUTION


def test_a_fence_far_to_the_right_is_part_of_the_code():
    example = 'def add(a, b):\n    """\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b\n'
    assert code_blocks(fenced(example)) == [example]


@pytest.mark.parametrize("text", ["\ufeff" + fenced(SOLUTION), "```python\n\ufeff" + SOLUTION + "```"])
def test_a_byte_order_mark_is_no_code(text):
    assert code_blocks(text) == [SOLUTION]
    assert pick_solution("\ufeff" + SOLUTION, ("add",)) == SOLUTION


def test_functions_of_a_completion():
    text = fenced(
        "def helper(): 0\ndef sq(x):\n    def inner(): 0\n    return x\nclass A:\n    def m(self): 0\ndef late(): 0\n"
    )
    assert defined_functions(text) == ["helper", "sq", "late"]
    assert defined_functions(text, "Complete this:\ndef sq(x):\n") == ["helper", "late", "sq"]
    assert defined_functions("no code") == []


def test_a_usage_example_does_not_replace_the_solution():
    assert pick_solution(fenced(SOLUTION, USAGE), ("add",)) == SOLUTION


def test_the_last_definition_counts():
    better = "def add(a, b):\n    return b + a\n"
    assert pick_solution(fenced(SOLUTION, better, USAGE), ("add",)) == better


@pytest.mark.parametrize(
    "source",
    [
        "class Solution:\n    def add(self, a, b):\n        return a + b\n",
        "add = lambda a, b: a + b\n",
        "async def add(): 0\n",
    ],
)
def test_methods_and_assignments_define_too(source):
    assert pick_solution(fenced(source, USAGE), ("add",)) == source


def test_a_name_that_only_begins_alike_defines_nothing():
    other = "def add_all(xs):\n    return sum(xs)\n"
    assert pick_solution(fenced(SOLUTION, other), ("add",)) == SOLUTION


def test_the_program_that_reads_input_counts():
    program = "n = int(input())\nprint(n * 2)\n"
    assert pick_solution(fenced(program, "print(4)\n")) == program
    assert pick_solution(fenced("import sys\nfor l in sys.stdin: print(l)\n", "x = 1\n")).startswith("import sys")


def test_a_program_without_input_counts_where_none_reads():
    assert pick_solution(fenced("print('hello')\n", "x = 1\n")) == "print('hello')\n"


def test_completions_without_fences():
    assert pick_solution(SOLUTION, ("add",)) == SOLUTION
    assert pick_solution("print(input())") == "print(input())"
    assert pick_solution("The answer is 42.") is None
    assert pick_solution("The answer is 42.", ("add",)) is None


@pytest.mark.parametrize(
    "text",
    [
        "```" + " " * 10**6 + "a" * 10**6 + "`",
        "`" * 2 * 10**6,
        "```\n" * 500_000,
        "open" + " " * 10**6,
        "> " * 10**6 + "```\n" + "> " * 10**6,
        " " * 10**6 + "def ",
    ],
    ids=["fence line", "backticks", "fences", "open", "quotes", "spaces"],
)
def test_hostile_text_is_read_in_linear_time(text):
    started = time.process_time()
    pick_solution(text, ("add",))
    pick_solution(text)
    assert time.process_time() - started < 5  # quadratic would take hours


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1 2 \n3\n\n", "1 2\n3\n", True),
        ("1  2\r\n3", "1 2\n3", True),
        ("1 2 3", "1 2\n3", False),
        ("1 2\n", "1 2\n3", False),
        ("", "0", False),
        ("", "", True),
        ("0.3333333333", "0.333333333", True),
        ("0.3333", "0.333333333", False),
        ("3.14", "314", False),
        ("3.0", "3", False),  # an integer is expected as it stands
        ("3", "3.0", True),
        ("1e-9", "0.0", True),
        ("1000000007", "1000000008", False),
        ("12345678901", "12345678900.0", True),  # 1e-10 apart, relative
        ("nan", "1.0", False),
        ("inf", "1.0", False),
        ("1_0.0", "10.0", False),
        ("YES", "Yes", False),
        ("1.5.2", "1.5.2", True),
        ("\ufeff1 2", "1 2", True),
        ("1 2", "\ufeff1 2\n", True),
        ("1 \ufeff2", "1 2", False),
        ("٣.٠", "3.0", True),  # float() reads the digits of every script; so do judges in Python
    ],
)
def test_outputs(output, expected, same):
    assert same_output(output, expected) is same


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (3, 3, True),
        (3, 4, False),
        (3, 3.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        ((1, 2), [1, 2], True),
        ([(1, 2), (3, 4)], [[1, 2], [3, 4]], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ("3", 3, False),
        (True, True, True),
        (True, 1, True),
        (None, None, True),
        (None, 0, False),
        ({1: "a", "b": 2}, {"1": "a", "b": 2}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        # Integers are exact, and so is what is expected as one
        (1000000500.0, 1000000000, False),
        (1000000000.0, 1000000000, True),
        (1000000001, 1000000000, False),
        (2.0000001, 2, False),
        (10**18, 1e18, True),
        (10**18 + 10**15, 1e18, False),
        (2**53 + 1, float(2**53), True),
        # JSON has no other sequences than lists, and no sets
        (deque([1, 2]), [1, 2], True),
        (deque([2, 1]), [1, 2], False),
        (range(1, 7, 2), [1, 3, 5], True),
        (range(5, 0, -2), [5, 3, 1], True),
        (range(3), [0, 1], False),
        (range(0), [], True),
        (range(10**9), [0], False),
        ({2, 1}, [1, 2], True),
        ({(1, 2), (3, 4)}, [[3, 4], [1, 2]], True),
        (frozenset("ab"), ["b", "a"], True),
        ({1, 2}, [1, 2, 2], False),
        ({1, 2}, [1, 3], False),
        ({1, 2}, [1, 2, 3], False),
        (set(), [], True),
        (set(), {}, False),
        ({1}, {"a": 1}, False),
        # Text that looks like another type is text
        ("1001", "1001", True),
        (1001, "1001", False),
        ("null", None, False),
        ("true", True, False),
        ("[]", [], False),
        (1.5, "1.50", False),
        (2**200, 2**200, True),
        (2**200, 2**200 + 1, False),
        (2**2000, 1.5, False),
        (float("nan"), 1.0, False),
        (float("inf"), 1e308, False),
        (float("inf"), float("inf"), True),
        (float("-inf"), float("inf"), False),
        (float("nan"), float("nan"), True),
        ([], [], True),
        ("", None, False),
        (b"a", "a", False),
    ],
)
def test_values(value, expected, same):
    assert same_value(wire.encode(value), expected) is same


@pytest.mark.parametrize(
    ("form", "expected", "same"),
    [
        ({"TreeNode": [4, 2, None, 1]}, [4, 2, None, 1], True),
        ({"TreeNode": [4, 2]}, [4, 2, None, None], True),
        ({"TreeNode": [4, None, 2]}, [4, 2], False),
        ({"TreeNode": []}, [], True),
        ({"TreeNode": []}, None, True),
        ({"TreeNode": [3, 1]}, 3, True),  # a node is told by its value
        ({"TreeNode": [3, 1]}, 1, False),
        ({"TreeNode": []}, 3, False),
        ({"ListNode": [1, 2, 3]}, [1, 2, 3], True),
        ({"ListNode": [1, 2]}, [1, 2, 3], False),
        ([{"ListNode": [1]}, {"ListNode": []}], [[1], []], True),
        ({"ListNode": [1]}, None, False),
    ],
)
def test_values_of_trees_and_linked_lists(form, expected, same):
    assert same_value(form, expected) is same


@pytest.mark.parametrize(
    "form",
    [
        {"tuple": 3},
        {"deque": 3},
        {"range": 3},
        {"range": [0, 1]},
        {"range": [0, 3, 0]},
        {"range": [0, 10**30, 1]},
        {"range": ["0", 3, 1]},
        {"set": 3},
        {"set": [{"dict": []}]},
        {"set": [{"tuple": {}}]},
        {"frozenset": [[]]},
        {"int": "zz"},
        {"int": "9" * 10_000_000},
        {"float": 3},
        {"TreeNode": 3},
        {"ListNode": {"a": 1}},
        {"dict": 3},
        {"dict": [[1]]},
        {"dict": [[[], 1]]},
        {"int": []},
        {},
        {"x": 1, "y": 2},
        {"handle": 0},
        10**400,
    ],
)
@pytest.mark.parametrize("expected", [3, [3], {"a": 1}, 1.5, "x", None, 10**400 + 1])
def test_forms_that_no_honest_program_sends_equal_nothing(form, expected):
    assert same_value(form, expected) is False
