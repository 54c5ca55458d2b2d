"""The outcome reward of code: tests of every kind, run in the sandbox."""

import json
import os
import re
import time

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_prime.rewards import code_rewards
from trl_prime.rewards.code_rewards import CodeReward, code_reward
from trl_prime.rewards.code_tests import read_tests
from trl_prime.sandbox import SandboxUnavailable, open_sandbox
from trl_prime.texts import completion_text

STDIN = {"inputs": ["3\n", "4\n", "5\n"], "outputs": ["9\n", "16\n", "25\n"]}
CALLS = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}
ASSERTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add([1], []) == [1]"]
CHECK = {
    "prompt": 'from typing import List\n\ndef double(x):\n    return 2 * x\n\ndef quadruple(xs: List[int]):\n    """Four times each."""\n',
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [double(double(x)) for x in [1, 2]]\n    assert candidate([]) == []\n",
    "entry_point": "quadruple",
}
ADD = "def add(a, b):\n    return a + b"


def block(source):
    return f"Some words first.\n```python\n{source}\n```"


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        open_sandbox()
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def verdict(sandbox):
    """Score and verdict of one completion."""

    def judge(completion, tests, **options):
        extra = {}
        reward = CodeReward(**options)
        scores = reward([completion], [tests], log_extra=lambda name, values: extra.update({name: values}))
        return scores[0], extra["code_verdict"][0]

    return judge


# Standard input and output


def test_programs_that_read_and_write(verdict):
    assert verdict(block("n = int(input())\nprint(n * n)"), json.dumps(STDIN)) == (1.0, "passed")
    assert verdict(block("n = int(input())\nprint(n + n)"), STDIN) == (0.0, "test 1: wrong answer")


def test_all_or_fraction(verdict):
    source = block("n = int(input())\nprint(n * n if n != 4 else 0)")
    assert verdict(source, STDIN) == (0.0, "test 2: wrong answer")
    assert verdict(source, STDIN, scoring="fraction") == (pytest.approx(2 / 3), "test 2: wrong answer")


def test_the_right_output_of_a_program_that_fails_does_not_count(verdict):
    score, problem = verdict(block("print(int(input()) ** 2, flush=True)\nraise KeyError('lost')"), STDIN)
    assert score == 0.0
    assert "KeyError" in problem


def test_a_program_that_takes_too_long_fails_and_the_next_one_is_judged(verdict):
    tests = {"inputs": ["0", "1"], "outputs": ["0", "1"]}
    source = block("n = int(input())\nwhile n == 0: pass\nprint(n)")
    assert verdict(source, tests, test_seconds=0.5, scoring="fraction") == (0.5, "test 1: time limit")


def test_time_of_all_tests_is_bound(verdict):
    tests = {"inputs": ["0"] * 100, "outputs": ["0"] * 100}
    source = block("input()\nwhile True: pass")
    assert verdict(source, tests, test_seconds=0.3, total_seconds=0.6, scoring="fraction")[0] == 0.0


def test_too_much_memory_fails(verdict):
    source = block("x = bytearray(400 << 20)\nprint(int(input()) ** 2)")
    assert verdict(source, STDIN)[0] == 1.0
    assert verdict(source, STDIN, memory_mb=200)[0] == 0.0


def test_solutions_may_take_the_usual_names_for_granted(verdict):
    source = "print(sum(map(lambda n: int(n) ** 2, sys.stdin)) + len(deque()) + gcd(1, 1) - 1)"
    assert verdict(block(source), STDIN)[0] == 1.0


def test_inputs_as_lists_of_lines(verdict):
    tests = {"inputs": [["1", "2"]], "outputs": [["3", "4"]]}
    assert verdict(block("print(int(input()) + 2)\nprint(int(input()) + 2)"), tests)[0] == 1.0


@pytest.mark.parametrize("end", ["exit()", "quit()", "exit(0)", "sys.exit()", "raise SystemExit"])
def test_programs_may_end_as_contest_code_does(verdict, end):
    assert verdict(block(f"print(int(input()) ** 2)\n{end}\nprint('more')"), STDIN) == (1.0, "passed")


def test_a_program_that_ends_with_an_error_fails(verdict):
    assert verdict(block("print(int(input()) ** 2)\nexit(1)"), STDIN) == (0.0, "test 1: exit code 1")


def test_byte_order_marks(verdict):
    tests = "\ufeff" + json.dumps({"inputs": ["\ufeff3"], "outputs": ["\ufeff9"]})
    assert verdict(block("\ufeffprint(int(input()) ** 2)"), tests) == (1.0, "passed")
    tests = {"fn_name": "f", "inputs": ["\ufeff3"], "outputs": ["\ufeff9"]}
    assert verdict(block("def f(n): return n * n"), tests) == (1.0, "passed")
    assert (
        verdict(block("def f(n): return n * n"), {"asserts": ["\ufeffassert f(3) == 9"], "setup": "\ufeff"})[0] == 1.0
    )


def test_expected_outputs_of_more_than_four_megabytes(verdict):
    size = 5_000_000
    tests = {"inputs": [str(size)], "outputs": ["x" * size]}
    assert verdict(block("print('x' * int(input()))"), tests) == (1.0, "passed")
    assert verdict(block("print('x' * (int(input()) - 1))"), tests) == (0.0, "test 1: wrong answer")
    assert verdict(block("print('x' * (3 * int(input())))"), tests) == (0.0, "test 1: output limit")
    tests = {"fn_name": "f", "inputs": [[size]], "outputs": ["x" * size]}
    assert verdict(block("def f(n): return 'x' * n"), tests) == (1.0, "passed")
    assert verdict(block("def f(n): return 'x' * (n + 1)"), tests) == (0.0, "test 1: wrong answer")


@pytest.mark.parametrize("margin", ["   ", "\t", "> "])
def test_code_within_a_list_or_a_quotation(verdict, margin):
    lines = ["```python", *ADD.splitlines(), "```"]
    text = "1. Add:\n\n" + "".join(f"{margin}{line}\n" for line in lines)
    assert verdict(text, ASSERTS) == (1.0, "passed")
    assert verdict("```python\n    " + ADD.replace("\n", "\n    ") + "\n```", ASSERTS) == (1.0, "passed")


# Calls


LOOKS = ["1001", "null", "true", "[]", "{}", "1.50", '"a"', "007", "1e5", "NaN", "[3]", ""]


def test_a_value_is_read_by_the_form_of_its_row_never_by_its_looks(verdict):
    """A text that looks like a number is a text; and where a row holds JSON text, the number is a number."""
    source = block(f"texts = {LOOKS}\ndef f(i):\n    return texts[i]")
    arguments = [[i] for i in range(len(LOOKS))]
    forms = {
        "values": {"inputs": arguments, "outputs": LOOKS},
        "lists of one": {"inputs": arguments, "outputs": [[text] for text in LOOKS]},
        "JSON text": {"inputs": [str(i) for i in range(len(LOOKS))], "outputs": list(map(json.dumps, LOOKS))},
    }
    for form, tests in forms.items():
        assert (form, *verdict(source, {"fn_name": "f", **tests})) == (form, 1.0, "passed")
    numbers = {"fn_name": "f", "inputs": ["0", "1"], "outputs": ["1001", "null"]}
    assert verdict(block("def f(i):\n    return [1001, None][i]"), numbers) == (1.0, "passed")
    assert verdict(source, numbers, scoring="fraction")[0] == 0.0
    wrong = block(
        "import json\ndef f(i):\n    return [1001, None, True, [], {}, 1.5, 'a', 7, 1e5, float('nan'), [3], 0][i]"
    )
    assert verdict(wrong, {"fn_name": "f", **forms["values"]}, scoring="fraction")[0] == 0.0


def test_lists_of_one_are_values_where_the_row_says_so(verdict):
    tests = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[1], [2]]}
    bare, listed = block("def f(n): return n"), block("def f(n): return [n]")
    assert verdict(bare, tests)[0] == verdict(listed, tests)[0] == 1.0  # APPS writes every value so
    assert verdict(bare, {**tests, "bare_outputs": True})[0] == 0.0
    assert verdict(listed, {**tests, "bare_outputs": True})[0] == 1.0
    # A row of which one value is no list of one is not written so
    tests = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[1], [2, 2]]}
    assert verdict(block("def f(n): return n if n == 1 else [n, n]"), tests)[0] == 0.0


INVERT = """class Solution:
    def invert(self, root: Optional[TreeNode]) -> Optional[TreeNode]:
        if root:
            root.left, root.right = self.invert(root.right), self.invert(root.left)
        return root
"""
TREES = {
    "fn_name": "invert",
    "inputs": [[[4, 2, 7, 1, None, 6]], [[1, None, 2]], [[]], [[5]]],
    "outputs": [[4, 7, 2, None, 6, None, 1], [1, 2], [], [5]],
    "bare_outputs": True,
}
TREE_SOLUTIONS = {
    "LeetCode's classes": INVERT,
    "its own class": "class TreeNode:\n    def __init__(self, x):\n        self.val, self.left, self.right = x, None, None\n"
    + INVERT,
    "its own class with a method": "class TreeNode:\n    def __init__(self, x):\n"
    "        self.val, self.left, self.right = x, None, None\n"
    "    def swap(self):\n        self.left, self.right = self.right, self.left\n"
    + INVERT.replace(
        "root.left, root.right = self.invert(root.right), self.invert(root.left)",
        "root.swap()\n            self.invert(root.left)\n            self.invert(root.right)",
    ),
    "annotations as text": "from __future__ import annotations\n" + INVERT,
    "TreeNode | None": INVERT.replace("Optional[TreeNode]", "TreeNode | None"),
    "types in the docstring": INVERT.replace(": Optional[TreeNode]", "").replace(
        " -> Optional[TreeNode]:",
        ":\n        '''\n        :type root: Optional[TreeNode]\n        :rtype: Optional[TreeNode]\n        '''",
    ),
    "a function": INVERT.replace("class Solution:\n    def invert(self, ", "if True:\n    def invert(").replace(
        "self.", ""
    ),
}


@pytest.mark.parametrize("source", TREE_SOLUTIONS.values(), ids=TREE_SOLUTIONS)
def test_trees_are_lists_in_level_order(verdict, source):
    assert verdict(block(source), TREES) == (1.0, "passed")
    wrong = source.replace("invert(root.right)", "invert(root.left)").replace("root.swap()", "root.left = None")
    assert verdict(block(wrong), TREES)[0] == 0.0


def test_types_that_the_row_declares_count(verdict):
    source = INVERT.replace(": Optional[TreeNode]", "").replace(" -> Optional[TreeNode]", "")
    declared = {**TREES, "signature": "(root: Optional[TreeNode]) -> Optional[TreeNode]"}
    assert verdict(block(source), TREES)[0] == 0.0
    assert verdict(block(source), declared) == (1.0, "passed")


LEETCODE = {
    "merged lists": (
        "lists: List[Optional[ListNode]]) -> Optional[ListNode]",
        "values = []\nfor node in lists:\n    while node:\n        values.append(node.val)\n        node = node.next\n"
        "head = None\nfor value in sorted(values, reverse=True):\n    head = ListNode(value, head)\nreturn head",
        [[[[1, 4], [2], []]], [[]]],
        [[1, 2, 4], []],
    ),
    "a list of lists": (
        "head: Optional[ListNode], k: int) -> List[Optional[ListNode]]",
        "return [head] + [None] * (k - 1)",
        [[[1, 2], 3]],
        [[[1, 2], [], []]],
    ),
    "a node of a tree": (
        "root: 'TreeNode', p: 'TreeNode', q: 'TreeNode') -> 'TreeNode'",
        "if root in (None, p, q):\n    return root\n"
        "left, right = self.solve(root.left, p, q), self.solve(root.right, p, q)\n"
        "return root if left and right else left or right",
        [[[3, 5, 1, 6, 2, 0, 8], 5, 1], [[3, 5, 1, 6, 2, 0, 8], 6, 2]],
        [3, 5],
    ),
    "in place": ("nums: List[int], k: int) -> None", "nums[:] = nums[-k:] + nums[:-k]", [[[1, 2, 3], 1]], [[3, 1, 2]]),
    "a tree in place": (
        "root: Optional[TreeNode]) -> None",
        "root.left, root.right = None, root.left",
        [[[1, 2]]],
        [[1, None, 2]],
    ),
    "a deep list": (
        "head: ListNode) -> int",
        "n = 0\nwhile head:\n    n, head = n + 1, head.next\nreturn n",
        [[list(range(100_000))]],
        [100_000],
    ),
    "names of modules": (
        "s: str) -> list",
        "return [c in ascii_lowercase for c in s] + [y - x for x, y in pairwise(map(ord, s))] + [inf > 1, gcd(4, 6)]",
        [["aC"]],
        [[True, False, -30, True, 2]],
    ),
    "a deque": ("n: int)", "return deque(range(n), maxlen=2)", [[3]], [[1, 2]]),
    "a set": ("n: int)", "return {n, 1, 0}", [[3]], [[0, 1, 3]]),
    "a generator": ("n: int)", "yield from range(n)", [[3]], [[0, 1, 2]]),
    "an iterator": ("n: int)", "return map(str, range(n))", [[2]], [["0", "1"]]),
    "a tuple of iterators": ("n: int)", "return iter([n]), zip([n], [n])", [[2]], [[[2], [[2, 2]]]]),
    "views": ("n: int)", "return [{n: 1}.keys(), {n: 1}.values(), {n: 1}.items()]", [[2]], [[[2], [1], [[2, 1]]]]),
    "nothing": ("n: int) -> None", "print(n)", [[5]], [5]),
    "None": ("n: int)", "return None", [[5]], [None]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEETCODE)
def test_what_solutions_of_leetcode_take_and_return(verdict, name):
    head, body, inputs, outputs = LEETCODE[name]
    source = f"class Solution:\n    def solve(self, {head}:\n        " + body.replace("\n", "\n        ")
    tests = {"fn_name": "solve", "inputs": inputs, "outputs": outputs, "bare_outputs": True}
    assert verdict(block(source), tests) == (1.0, "passed")
    assert verdict(block(source), {**tests, "outputs": [["other"]] * len(outputs)})[0] == 0.0


def test_a_function_that_does_not_say_that_it_returns_nothing_has_to_return_the_value(verdict):
    tests = {"fn_name": "f", "inputs": [[[2, 1]]], "outputs": [[1, 2]], "bare_outputs": True}
    assert verdict(block("def f(xs):\n    xs.sort()"), tests)[0] == 0.0
    assert verdict(block("def f(xs) -> list:\n    xs.sort()"), tests)[0] == 0.0
    assert verdict(block("def f(xs):\n    xs.sort()"), {**tests, "signature": "(xs: List[int]) -> None"})[0] == 1.0


@pytest.mark.parametrize(
    "body",
    [
        "node = ListNode(1)\n    node.next = node\n    return node",
        "node = TreeNode(1)\n    node.left = node\n    return node",
        "while True: yield 1",
        "return range(10**12)",
        "return itertools.count()",
    ],
)
def test_endless_values_cost_their_own_verdict(verdict, body):
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [[1]], "bare_outputs": True}
    assert verdict(block(f"def f(n):\n    {body}"), tests, test_seconds=5, memory_mb=256)[0] == 0.0


@pytest.mark.parametrize("name", ["SortedList", "SortedDict", "SortedSet", "np"])
def test_packages(verdict, name):
    pytest.importorskip("numpy" if name == "np" else "sortedcontainers")
    made = "np.array([3, 1])" if name == "np" else f"{name}({{3: 0, 1: 0}})"
    source = f"{'import numpy as np' if name == 'np' else ''}\ndef f(n):\n    return [*map(int, {made})]"
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [[3, 1] if name == "np" else [1, 3]], "bare_outputs": True}
    assert verdict(block(source), tests) == (1.0, "passed")
    tests["outputs"] = [[1, 3]]
    if name in ("SortedList", "SortedSet"):
        assert verdict(block(f"def f(n): return {made}"), tests) == (1.0, "passed")
    if name == "np":
        assert verdict(block("import numpy as np\ndef f(n): return np.array([1, 3])"), tests) == (1.0, "passed")


def test_packages_that_are_not_there_are_named_once(sandbox, caplog, monkeypatch):
    monkeypatch.setattr(code_rewards, "_warned", set())
    for _ in range(2):
        CodeReward(packages=["numpy", "no-such-package"])
    (message,) = (record.getMessage() for record in caplog.records)
    assert "cannot import no-such-package" in message and "pip install no-such-package" in message


@pytest.mark.parametrize(
    "tests",
    [
        CALLS,
        {"fn_name": "add", "inputs": ["1\n2", "3\n4"], "outputs": ["3", "7"]},
        {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]},
        {"fn_name": "add", "inputs": [[[1], [2]], ["a", "b"]], "outputs": [[[1, 2]], ["ab"]]},
    ],
    ids=["lists", "text", "bare", "lists and texts"],
)
@pytest.mark.parametrize("source", [ADD, "class Solution:\n    def add(self, a, b):\n        return a + b"])
def test_calls(verdict, tests, source):
    assert verdict(block(source), json.dumps(tests)) == (1.0, "passed")
    assert verdict(block(source.replace("a + b", "[a]")), tests)[0] == 0.0


def test_each_method_call_gets_a_fresh_object(verdict):
    source = "class Solution:\n    def __init__(self):\n        self.n = 0\n    def add(self, a, b):\n        self.n += 1\n        return a + b if self.n == 1 else None"
    assert verdict(block(source), CALLS)[0] == 1.0


def test_what_a_solution_prints_is_not_its_answer(verdict):
    assert verdict(block("def add(a, b):\n    print(a + b)"), CALLS)[0] == 0.0
    assert verdict(block("def add(a, b):\n    print('noise')\n    return a + b"), CALLS)[0] == 1.0


def test_after_a_call_that_hangs_the_others_still_count(verdict):
    tests = {"fn_name": "f", "inputs": [[0], [1], [2]], "outputs": [0, 1, 2]}
    source = block("def f(n):\n    while n == 1: pass\n    return n")
    score, problem = verdict(source, tests, test_seconds=0.5, scoring="fraction")
    assert score == pytest.approx(2 / 3)
    assert problem.startswith("test 2") and problem.endswith("time limit")


def test_after_a_call_that_ends_the_process_the_others_still_count(verdict):
    tests = {"fn_name": "f", "inputs": [[0], [1], [2]], "outputs": [0, 1, 2]}
    source = block("import os\ndef f(n):\n    if n == 1: os._exit(0)\n    return n")
    assert verdict(source, tests, scoring="fraction")[0] == pytest.approx(2 / 3)


def test_a_solution_that_does_not_load(verdict):
    assert verdict(block("def add(a, b) return"), CALLS)[1].startswith("test 1: SyntaxError")
    assert verdict(block("raise SystemExit(0)\n" + ADD), CALLS)[0] == 0.0


def test_a_main_guard_does_not_run(verdict):
    assert verdict(block(ADD + "\nif __name__ == '__main__':\n    add(*map(int, input().split()))"), CALLS)[0] == 1.0


# Asserts


def test_asserts(verdict):
    assert verdict(block(ADD), ASSERTS) == (1.0, "passed")
    assert verdict(block(ADD), {"asserts": ASSERTS, "entry_point": "add"}) == (1.0, "passed")
    assert verdict(block("def add(a, b):\n    return a - b"), ASSERTS)[0] == 0.0
    assert verdict(block("def add(a, b):\n    return int(a) + int(b)"), ASSERTS, scoring="fraction")[
        0
    ] == pytest.approx(1 / 3)


def test_a_function_that_is_named_like_a_builtin(verdict):
    source = block("def sum(a, b):\n    return a + b")
    assert verdict(source, {"asserts": ["assert sum(1, 2) == 3"], "entry_point": "sum"})[0] == 1.0
    assert verdict(source, ["assert sum([1, 2]) == 3 and add"])[0] == 0.0


@pytest.mark.parametrize(
    ("asserts", "honest"),
    [
        (["assert sum(10, 15) == 150"], "def sum(a, b): return a * b"),
        (
            ["assert Counter(permutations([1, 2])) == Counter([(1, 2), (2, 1)])"],
            "def permutations(xs): return list(itertools.permutations(xs))",
        ),
        (["assert isclose(area(2), 4.0)", "assert isclose(area(3), 9.0)"], "def area(x): return float(x * x)"),
        (["assert approximate(2) == 4", "assert fsum([approximate(1)]) == 1"], "def approximate(x): return x * x"),
        (["assert sorted(map(lcm, [4], [6])) == [12]"], "def lcm(a, b): return math.lcm(a, b)"),
        (["assert list(merge([1], [2])) == [1, 2]"], "def merge(a, b): return a + b"),
    ],
)
def test_tests_see_of_a_solution_what_they_test_and_nothing_else(verdict, asserts, honest):
    """Whatever else it defines, of the prelude, of Python's own names and of the standard library's."""
    (name,) = re.findall(r"def (\w+)", honest)
    others = {
        "Counter", "permutations", "sorted", "isclose", "fsum", "map", "list", "sum", "lcm", "merge", "isinstance", "len",
        "AssertionError", "math", "__builtins__", "np",
    } - {name}  # fmt: skip
    forged = (
        "class Yes(float):\n    def __init__(self, *a): pass\n    __eq__ = lambda s, o: True\n"
        "    __hash__ = lambda s: 1\n"
        f"def {name}(*a): return Yes()\n" + "".join(f"{other} = lambda *a, **k: Yes()\n" for other in sorted(others))
    )
    assert verdict(block(honest), asserts) == (1.0, "passed")
    assert verdict(block(forged), asserts)[0] == 0.0
    assert verdict(block(forged), {"asserts": asserts, "entry_point": name})[0] == 0.0


@pytest.mark.parametrize(
    "tests",
    [
        ["assert gcd(4, 6) == 2"],
        {"asserts": ["assert gcd(4, 6) == 2"], "entry_point": "gcd"},
        {"asserts": ["assert lcm(4, 6) == 12"], "entry_point": "lcm"},
        {"fn_name": "gcd", "inputs": [[4, 6]], "outputs": [2]},
        {"fn_name": "lcm", "inputs": [[4, 6]], "outputs": [12]},
    ],
    ids=str,
)
def test_what_the_solution_lacks_is_not_taken_from_the_prelude(verdict, tests):
    assert verdict(block("def subtract(a, b): return a - b"), tests)[0] == 0.0


@pytest.mark.parametrize("source", ["from operator import add", "import operator\nadd = operator.add"])
def test_a_solution_may_import_what_is_tested(verdict, source):
    assert verdict(block(source), ["assert add(1, 2) == 3"]) == (1.0, "passed")


def test_the_setup_of_tests_may_use_what_the_solution_defines(verdict):
    source = (
        "class Node:\n    def __init__(self, data):\n        self.data, self.left, self.right = data, None, None\n"
        "def height(node):\n    return 0 if node is None else 1 + max(height(node.left), height(node.right))"
    )
    tests = {"setup": "root = Node(1)\nroot.left = Node(2)", "asserts": ["assert height(root) == 2"]}
    assert verdict(block(source), tests) == (1.0, "passed")
    assert verdict(block(source), {**tests, "asserts": ["assert height(root) == 3"]})[0] == 0.0


TREE_CHECK = {
    "prompt": """from typing import *
class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right
def pair(value, left, right):
    return TreeNode(value, TreeNode(left), TreeNode(right))
def same(a, b):
    if a is None or b is None:
        return a is b
    return a.val == b.val and same(a.left, b.left) and same(a.right, b.right)
""",
    "entry_point": "Solution().invert",
    "test": """def check(candidate):
    assert same(candidate(root=pair(1, 2, 3)), pair(1, 3, 2))
    assert candidate(None) is None
    for root in (pair(1, 2, 3), pair(1, 2, 3)):
        candidate(root=root)
        assert same(root, pair(1, 3, 2))
    root = pair(1, 2, 3)
    candidate(root)
    assert same(root, pair(1, 3, 2))
""",
}


def test_trees_of_tests_that_are_code(verdict):
    assert verdict(block(INVERT), TREE_CHECK) == (1.0, "passed")
    assert verdict(block(INVERT.replace("invert(root.right)", "invert(root.left)")), TREE_CHECK)[0] == 0.0
    forged = INVERT.replace("return root", "return Yes()") + (
        "class Yes:\n    val = property(lambda self: Yes())\n    left = right = val\n"
        "    __eq__ = __ne__ = __bool__ = lambda *a: True\n    __hash__ = lambda self: 1\n"
    )
    assert verdict(block(forged), TREE_CHECK)[0] == 0.0


def test_a_solution_cannot_replace_what_compares(verdict):
    tests = ["assert abs(f(2.0) - 4.0) < 1e-6", "assert all([f(1.0) == 1.0])"]
    honest = "def f(x):\n    return x * x"
    forged = "def f(x):\n    return 0.0\ndef abs(x):\n    return 0.0\ndef all(x):\n    return True"
    assert verdict(block(honest), tests)[0] == 1.0
    assert verdict(block(forged), tests)[0] == 0.0


def test_humaneval_problems(verdict):
    right = "def quadruple(xs):\n    return [4 * x for x in xs]"
    assert verdict(block(right), CHECK) == (1.0, "passed")
    assert verdict(block(right.replace("4", "3")), CHECK)[0] == 0.0


def test_tests_that_call_the_function_by_its_own_name(verdict):
    """The prompt has defined it too, without a body."""
    tests = {
        **CHECK,
        "test": "def check(candidate):\n    assert tuple(candidate([1])) == tuple(quadruple([1])) == (4,)\n",
    }
    assert verdict(block("def quadruple(xs):\n    return [4 * x for x in xs]"), tests) == (1.0, "passed")


def test_a_completion_may_go_on_where_the_prompt_ends(verdict):
    assert verdict("    return [double(double(x)) for x in xs]\n", CHECK)[0] == 1.0
    assert verdict("    return [double(x) for x in xs]\n", CHECK)[0] == 0.0


def test_a_solution_may_use_what_the_prompt_defines(verdict):
    assert verdict(block("def quadruple(xs: List[int]):\n    return [double(double(x)) for x in xs]"), CHECK)[0] == 1.0


def test_changing_the_helpers_of_the_prompt_does_not_change_the_tests(verdict):
    forged = "def double(x):\n    return 0\ndef quadruple(xs):\n    return [0 for x in xs]"
    assert verdict(block(forged), CHECK)[0] == 0.0


def test_arguments_changed_in_place_objects_errors_and_functions(verdict):
    source = (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def __len__(self): return len(self.items)\n"
        "def fill(xs):\n    xs.append(7)\ndef fail():\n    raise ValueError('no')\n"
        "def apply(f, x):\n    return f(x)\ndef numbers():\n    yield from range(3)\n"
    )
    tests = [
        "xs = [1]; fill(xs); assert xs == [1, 7]",
        "s = Stack(); s.push(1); s.push(2); assert len(s) == 2 and s.items == [1, 2]",
        "try:\n    fail()\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'no'",
        "assert apply(lambda x: x + 1, 3) == 4",
        "assert list(numbers()) == [0, 1, 2]",
    ]
    assert verdict(block(source), tests) == (1.0, "passed")


@pytest.mark.parametrize(
    "value",
    [
        "type('E', (), {'__eq__': lambda self, other: True, '__hash__': lambda self: 0})()",
        "type('E', (int,), {'__eq__': lambda self, other: True, '__hash__': lambda self: 0})()",
        "type('E', (list,), {'__eq__': lambda self, other: True})()",
        "type('E', (str,), {'__eq__': lambda self, other: True, '__ne__': lambda self, other: False})()",
    ],
)
def test_a_value_that_equals_everything_equals_nothing(verdict, value):
    source = block(f"def add(a, b):\n    return {value}")
    assert verdict(source, ASSERTS)[0] == 0.0
    assert verdict(source, CALLS)[0] == 0.0


# Tests in plain Python

HUMANEVAL_TEST = (
    "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
)
SQUARE = "def square(x):\n    return helper(x)\ndef helper(x):\n    return x * x"


@pytest.mark.parametrize(
    "tests",
    [
        "\n".join(ASSERTS),
        json.dumps("\n".join(ASSERTS)),
        "import math\n" + "\n".join(ASSERTS),
        "xs = [1]\nassert add(xs, xs) == [1, 1]; assert xs == [1]",
        "def test_numbers():\n    assert add(1, 2) == 3\ndef test_texts():\n    assert add('a', 'b') == 'ab'",
        "for n in range(3):\n    assert add(n, n) == 2 * n",
        "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)",
    ],
)
def test_tests_may_be_python(verdict, tests):
    assert verdict(block(ADD), tests) == (1.0, "passed")
    assert verdict(block("def add(a, b):\n    return [a, b, 3]"), tests)[0] == 0.0


def test_the_share_of_tests_in_python(verdict):
    tests = (
        "import math\none = 1\nassert add(one, one) == 2\nthree = 3\nassert add(1, 2) == three\nassert add(0, 0) == 1"
    )
    assert len(read_tests(tests).inputs) == 3
    assert verdict(block(ADD), tests, scoring="fraction")[0] == pytest.approx(2 / 3)


def test_humaneval_tests_alone(sandbox):
    reward, text = CodeReward(), block(SQUARE)
    prompt = [{"role": "user", "content": "Complete this:\n```python\ndef square(x):\n```"}]
    assert reward([text], tests=[HUMANEVAL_TEST], entry_point=["square"]) == [1.0]
    assert reward([text], tests=[HUMANEVAL_TEST], prompts=[prompt]) == [1.0]
    assert reward([text], tests=[HUMANEVAL_TEST], prompts=[prompt[0]["content"]]) == [1.0]
    assert reward([text], tests=[HUMANEVAL_TEST]) == [1.0]  # the last one, which happens to be right
    assert reward([block(SQUARE.replace("* x", "+ x"))], tests=[HUMANEVAL_TEST], prompts=[prompt]) == [0.0]
    assert code_reward([text], tests=[HUMANEVAL_TEST], entry_point=["square"]) == [1.0]


@pytest.mark.parametrize("name", ["check", "candidate", "isinstance", "Counter", "isclose", "METADATA", "np", "all"])
def test_a_solution_may_not_name_itself_what_judges_it(sandbox, name):
    """Nor get away without a verdict by it."""
    tests = HUMANEVAL_TEST + "    assert isinstance(candidate(2), int) and all([isclose(candidate(2), 4)])\n"
    tests += "    assert Counter([candidate(2)]) == {4: 1} and np.sqrt(candidate(2)) == 2\n"
    forged = f"def {name}(*args):\n    return True"
    assert CodeReward()([block(forged)], tests=[tests]) == [0.0]
    assert CodeReward()([block(SQUARE + "\n" + forged)], tests=[tests]) == [1.0]


@pytest.mark.parametrize("name", ["add", "digits", "square"])
def test_a_solution_may_name_itself_as_it_likes_else(sandbox, name):
    tests = HUMANEVAL_TEST + "    assert candidate(helper(2)) == square(4)\n" * (name == "square")
    source = f"def helper(x):\n    return 2 * x\ndef {name}(x):\n    return x * x"
    assert CodeReward()([block(source)], tests=[tests]) == [1.0]


def test_faults_of_one_kind_are_told_once_with_their_number(sandbox, caplog, monkeypatch):
    monkeypatch.setattr(code_rewards, "_warned", set())
    rows = [f"Problem number {i} is this." for i in range(164)] + [{"inputs": ["1"], "outputs": []}] * 2
    metrics = {}
    for _ in range(2):
        rewards = code_reward(
            [block(ADD)] * 166, tests=rows, log_metric=lambda name, value: metrics.update({name: value})
        )
        assert rewards == [None] * 166
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "164 rows" in messages[0] and "not JSON and not Python" in messages[0]
    assert "1 rows" in messages[1] and "one length" in messages[1]
    assert metrics["code_reward/no_tests"] == 1.0


# Rows


@pytest.mark.parametrize("tests", [None, "", "null", "[]", [], {"inputs": [], "outputs": []}, {"asserts": []}])
def test_no_tests_never_score(verdict, tests):
    assert verdict(block(ADD), tests) == (None, "no tests")


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        ("{", "not JSON and not Python"),
        ("Add two numbers.", "not JSON and not Python"),
        ("import math\nx = 1", "asserts nothing"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["abc"]}, "not JSON, though the arguments are"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["1" * 5000]}, "not JSON"),
        ({"fn_name": "f", "inputs": [{"x": 1}], "outputs": [1]}, "neither a list of arguments nor text"),
        ({"fn_name": ["f"], "inputs": [[1]], "outputs": [1]}, "`fn_name`"),
        ({"fn_name": "Solution().f", "inputs": [[1]], "outputs": [1]}, "`fn_name`"),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [1], "signature": "x: int"}, "`signature`"),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [1], "signature": "(x: int"}, "`signature`"),
        ({"inputs": ["1"], "outputs": ["x" * (33 << 20)]}, "longer than 32 MB"),
        ({"fn_name": "f", "inputs": [["x" * (33 << 20)]], "outputs": [1]}, "longer than 32 MB"),
        ({"test": 3, "entry_point": "f"}, "not all texts"),
        ({"asserts": ["assert f(1) == 1"], "entry_point": 3}, "no text"),
        ({"asserts": ["assert f("]}, "not Python"),
        ({"asserts": ["assert 1 + 1 == 2"]}, "which function is under test"),
        ({"asserts": ["assert max(1, 2) == min(2, 3)"]}, "which function is under test"),
        ("3", "is a int"),
        ({"inputs": ["1"], "outputs": []}, "one length"),
        ({"fn_name": "f", "inputs": ["x y"], "outputs": ["1"]}, "one JSON value a line"),
        ({"questions": []}, "questions"),
        ({"asserts": [1]}, "not a list of texts"),
    ],
)
def test_tests_that_cannot_be_read_are_no_verdict(verdict, tests, problem):
    with pytest.raises(ValueError, match=problem):
        read_tests(tests)
    assert verdict(block(ADD), tests)[0] is None


def test_a_batch_keeps_its_order_and_counts(sandbox):
    metrics = {}
    scores = code_reward(
        [
            block(ADD),
            "no code",
            block("def add(a, b): return 0"),
            [{"role": "assistant", "content": block(ADD)}],
            block(ADD),
        ],
        [CALLS, CALLS, CALLS, json.dumps(ASSERTS), None],
        log_metric=lambda name, value: metrics.update({name: value}),
        solution=[None] * 5,
    )
    assert scores == [1.0, 0.0, 0.0, 1.0, None]
    assert metrics == {"code_reward/no_program": pytest.approx(0.2), "code_reward/no_tests": pytest.approx(0.2)}


def test_equal_completions_are_run_once(sandbox, monkeypatch):
    reward, seen = CodeReward(), []
    judge = reward.judge
    monkeypatch.setattr(reward, "judge", lambda source, tests: seen.append(source) or judge(source, tests))
    assert reward([block(ADD)] * 8 + [block("def add(a, b): return 1")], [CALLS] * 9) == [1.0] * 8 + [0.0]
    assert len(seen) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"scoring": "most"},
        {"test_seconds": 0},
        {"total_seconds": -1},
        {"memory_mb": 0},
        {"num_workers": 0},
        {"sandbox": "jail"},
    ],
)
def test_impossible_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CodeReward(**options)


def test_texts_of_completions():
    assert completion_text("a") == "a"
    assert completion_text([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]) == "a"
    assert (
        completion_text([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    )
    assert completion_text([{"role": "assistant", "content": None}]) == completion_text([]) == ""


# Junk

FUZZ_CASES = int(os.environ.get("TRL_PRIME_FUZZ_CASES", 256))
FUZZ_BATCH = 32
PYTHON = r"""
def class return if else for while in lambda import from as try except finally raise yield await async with pass break
del global nonlocal match case print input open exec eval exit quit int str list range len add sys os builtins __import__
__builtins__ __class__ __dict__ None True False self a b x n 0 1 -1 1e309 10**9 '' 'a' f'{x}' b'a' ... ( ) [ ] { } : , . =
== += -> := * ** @ # \ ; ``` ```python ~~~ sys.exit(0) os._exit(0) os.kill(0,9) [0]*10**9 while\tTrue: raise\tSystemExit
sys.stdout.close() print(9) print(int(input())**2) a+b
"""
PYTHON = st.sampled_from(
    [*(word.replace("\\t", " ") for word in PYTHON.split()), "\n", "\n    ", "\n        ", "\0", "\ud800", "é"]
)
LINES = st.lists(st.lists(PYTHON, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=6).map("\n".join)
SOURCES = st.one_of(
    LINES,
    LINES.map(lambda body: "def add(a, b):\n    " + body.replace("\n", "\n    ")),
    LINES.map(lambda body: body + "\nprint(int(input()) ** 2)"),
    st.text(max_size=60),
)
TESTS = st.one_of(
    st.sampled_from([STDIN, CALLS, ASSERTS, CHECK, {}, None, "", "{", [], [1], {"inputs": [1], "outputs": []}]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["inputs", "outputs", "fn_name", "asserts", "test"]), inner, max_size=4)
        ),
        max_leaves=6,
    ),
)


def _processes():
    """Living processes that this one has started, and they."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def _settled(most=None):
    """How many there are when programs that have just ended are gone: the warm sandboxes."""
    deadline, counts = time.monotonic() + 20, []
    while time.monotonic() < deadline:
        counts.append(len(_processes()))
        if counts[-1] == most or (most is None and counts[-10:] == [counts[-1]] * 10):
            break
        time.sleep(0.05)
    return counts[-1]


@pytest.fixture(scope="module")
def fuzzed(sandbox):
    control = [block(ADD)] * 2, [CALLS, ASSERTS]
    assert code_reward(*control) == [1.0, 1.0]
    idle = _settled()
    yield CodeReward(test_seconds=0.5, total_seconds=1.0, memory_mb=256)
    assert code_reward(*control) == [1.0, 1.0]
    assert _settled(idle) == idle


@settings(
    max_examples=max(FUZZ_CASES // FUZZ_BATCH, 1),
    deadline=None,
    derandomize="TRL_PRIME_FUZZ_CASES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(st.tuples(SOURCES, TESTS, st.booleans()), min_size=FUZZ_BATCH, max_size=FUZZ_BATCH))
def test_junk_is_judged_without_an_exception_or_a_hang(fuzzed, cases):
    completions = [block(source) if fenced else source for source, _, fenced in cases]
    start = time.monotonic()
    rewards = fuzzed(completions, [tests for _, tests, _ in cases])
    assert len(rewards) == FUZZ_BATCH and set(rewards) <= {0.0, 1.0, None}
    assert time.monotonic() - start < 3 * FUZZ_BATCH + 30
