"""Programs, calls and tests in the sandbox: how their ends are reported, and what solutions may do."""

import signal
import textwrap
import time

import pytest

from trl_prime.sandbox import Limits

from .helpers import LIMITS, SCRATCH


def test_a_program_reads_and_prints(sandbox):
    result = sandbox.run("name = input()\nprint('Hello,', name)\nprint(len(input()))", "Ada ü\n" + "x" * 300_000)
    assert (result.stdout.decode(), result.exit_code, result.reason) == ("Hello, Ada ü\n300000\n", 0, None)
    assert result.ended_well


@pytest.mark.parametrize(
    ("source", "code", "error"),
    [
        ("raise ValueError('bad')", 1, b"ValueError: bad"),
        ("import sys; sys.exit(3)", 3, b""),
        ("import os; os._exit(7)", 7, b""),
        ("syntax error", 1, b"SyntaxError"),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, b""),
        ("print('\\0')\n\0", 1, b"null bytes"),
    ],
)
def test_the_end_of_a_program_is_reported(sandbox, source, code, error):
    result = sandbox.run(source)
    assert (result.exit_code, result.reason) == (code, None)
    assert error in result.stderr


LEGITIMATE = {
    "numpy": "import numpy; print(numpy.arange(5).sum())",
    "scratch": f"import os; open({SCRATCH} + '/a', 'w').write('10'); print(open('a').read())",
    "temporary files": "import tempfile; f = tempfile.TemporaryFile(); f.write(b'10'); f.seek(0); print(f.read().decode())",
    "standard input by name": "open('/dev/stdin').read(); print(10)",
    "environment": "import os; os.environ['A'] = '10'; print(os.environ['A'])",
    "main": "def main():\n    print(10)\nif __name__ == '__main__':\n    main()",
    "deep recursion": """
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(1 << 28)
        def down(n):
            return 0 if n == 0 else 1 + down(n - 1)
        thread = threading.Thread(target=lambda: print(down(30_000) // 3000))
        thread.start()
        thread.join()""",
    "threads": """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            print(sum(pool.map(int, '1234')))""",
    "processes": """
        import multiprocessing
        with multiprocessing.get_context('fork').Pool(3) as pool:
            print(sum(pool.map(abs, [-1, -2, -3, -4])))""",
    "a queue and shared values": """
        import multiprocessing
        context = multiprocessing.get_context('fork')
        queue, value, pipe = context.Queue(), context.Value('i', 3), context.Pipe()
        def work():
            queue.put(4)
            with value.get_lock():
                value.value += 1
            pipe[1].send(2)
        process = context.Process(target=work)
        process.start()
        total = queue.get() + pipe[0].recv()
        process.join()
        print(total + value.value)""",
    "an event loop": """
        import asyncio
        async def main():
            await asyncio.gather(asyncio.sleep(0), asyncio.to_thread(print, 10))
        asyncio.run(main())""",
    "another program": "import subprocess; print(subprocess.run(['echo', '10'], capture_output=True, text=True).stdout)",
    "limits of its own": "import resource; resource.setrlimit(resource.RLIMIT_STACK, resource.getrlimit(3)); print(10)",
    "time zones": "import datetime, time; time.localtime(); print(datetime.datetime(2020, 1, 10).day)",
}


# Locks of several processes lie in /dev/shm, which by Landlock alone would be everybody's
NOT_DONE = {"landlock": {"processes", "a queue and shared values"}}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_solutions_do(sandbox, name):
    if name == "numpy":
        pytest.importorskip("numpy")
    result = sandbox.run(textwrap.dedent(LEGITIMATE[name]), "input", LIMITS)
    if name in NOT_DONE.get(sandbox.box, ()):
        assert b"PermissionError" in result.stderr
        return
    assert (result.stdout.split(), result.exit_code) == ([b"10"], 0), result


def test_each_program_starts_with_an_empty_scratch_folder(sandbox):
    source = "import os\nprint(os.getcwd() == os.environ['HOME'], os.listdir('.'))\nopen('a', 'w')"
    if sandbox.box == "landlock":
        expected = b"True []\n"
    else:
        source += "\nprint(os.getcwd(), os.listdir('/dev/shm')); open('/dev/shm/b', 'w')"
        expected = b"True []\n/tmp []\n"
    for _ in range(2):
        result = sandbox.run(source)
        assert (result.stdout, result.exit_code) == (expected, 0)


def test_calls_of_a_function_and_of_a_method(sandbox):
    source = """
def double(x):
    return x * 2
class Solution:
    def half(self, x):
        return x / 0 if x == 0 else x // 2
"""
    assert [a["value"] for a in sandbox.call(source, "double", [[1], ["ab"], [[1]]], LIMITS, 60)] == [
        2,
        "abab",
        [1, 1],
    ]
    first, second = sandbox.call(source, "half", [[8], [0]], LIMITS, 60)
    assert first == {"value": 4}
    assert second["error"][0] == "ZeroDivisionError"
    assert list(sandbox.call("x = 1 / 0", "f", [[1], [2]], LIMITS, 60)) == [{"error": ["ZeroDivisionError", "division by zero"]}] * 2  # fmt: skip


def test_a_call_that_hangs_or_kills_its_process_costs_only_itself(sandbox):
    source = """
import os, time
def f(x):
    if x == 1:
        time.sleep(1000)
    if x == 2:
        os._exit(0)
    return x
"""
    limits = Limits(wall_seconds=1)
    answers = list(sandbox.call(source, "f", [[0], [1], [2], [3]], limits, 60))
    assert answers == [{"value": 0}, {"error": ["Error", "time limit"]}, {"error": ["Error", "the program ended"]}, {"value": 3}]  # fmt: skip
    started = time.monotonic()
    assert len(list(sandbox.call(source, "f", [[1]] * 20, limits, total_seconds=2))) == 20
    assert time.monotonic() - started < 12


def test_tests_as_code(sandbox):
    source = """
import math
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
    def __lt__(self, other): return len(self) < len(other)
    def __add__(self, other): s = Stack(); s.items = self.items + other.items; return s
    def __iter__(self): return iter(self.items)
    def __mul__(self, n): s = Stack(); s.items = self.items * n; return s
def f(x): return x * 2
def g(values): values.append(1)
def h(key, values): return sorted(values, key=key)
def numbers(n): yield from range(n)
def bad(): raise KeyError("k")
def gcd(a, b): return math.gcd(a, b)
def root(x): return x ** 0.5
"""
    asserts = [
        "assert f(2) == 4",
        "assert f('a') == 'aa' and f([1]) == [1, 1]",
        "values = []; g(values); assert values == [1]",
        "assert h(lambda x: -x, [1, 3, 2]) == [3, 2, 1]",
        "assert list(numbers(3)) == [0, 1, 2]",
        "s = Stack().push(1).push(2); assert len(s) == 2 and s.items == [1, 2] and list(s) == [1, 2] and 2 in s",
        "assert Stack().push(1) == Stack().push(1) and Stack() < Stack().push(1)",
        "assert (Stack().push(1) + Stack().push(2)).items == [1, 2] and (Stack().push(1) * 2).items == [1, 1]",
        "s = Stack(); s.items = [5]; assert list(s) == [5]",
        "try:\n    bad()\nexcept KeyError:\n    pass\nelse:\n    assert False",
        "assert gcd(4, 6) == 2",
        "assert abs(root(2) - math.sqrt(2)) < 1e-9 and Counter(f([1])) == {1: 2}",
        "assert helper(1) == 2",
    ]
    tests = {"setup": "def helper(x):\n    return x + 1", "asserts": asserts, "entry_point": None}
    verdicts = list(sandbox.examine(source + "def helper(x): return 0", tests, LIMITS, 60))
    assert [(a, v["error"]) for a, v in zip(asserts, verdicts, strict=True) if not v["passed"]] == []
    wrong = {"setup": "", "asserts": ["assert f(2) == 5", "assert f(2) == 4"], "entry_point": "f"}
    assert [v["passed"] for v in sandbox.examine(source, wrong, LIMITS, 60)] == [False, True]
    # The name of a tool of the tests is the solution's only where it is the function under test, told or alone called
    for entry_point in ("gcd", None):
        tests = {"setup": "", "asserts": ["assert gcd(4, 6) == 2"], "entry_point": entry_point}
        assert [v["passed"] for v in sandbox.examine("def gcd(a, b): return 7", tests, LIMITS, 60)] == [False]
