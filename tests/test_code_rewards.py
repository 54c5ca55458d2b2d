"""The outcome reward of code: tests of every kind, run in the sandbox."""

import json
import os
import time

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


# Calls


@pytest.mark.parametrize(
    "tests",
    [
        CALLS,
        {"fn_name": "add", "inputs": ["1\n2", "3\n4"], "outputs": ["3", "7"]},
        {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]},
        {"fn_name": "add", "inputs": [[[1], [2]], ["a", "b"]], "outputs": [[1, 2], ["ab"]]},
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


# Rows


@pytest.mark.parametrize("tests", [None, "", "null", "[]", [], {"inputs": [], "outputs": []}, {"asserts": []}])
def test_no_tests_never_score(verdict, tests):
    assert verdict(block(ADD), tests) == (None, "no tests")


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        ("{", "not JSON"),
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
