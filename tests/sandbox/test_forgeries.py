"""Solutions that forge verdicts, and answers that attack the process that reads them."""

import contextlib
import re
import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest

from trl_prime.sandbox import Limits, LocalSandbox

from .helpers import LIMITS, within

HEAD = """
import builtins, collections, json, math, operator, os, sys
def f(x):
    return 0
class Evil:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __lt__
    def __hash__(self): return 1
    def __bool__(self): return True
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __mul__ = __mod__ = __truediv__ = __floordiv__ = __abs__ = __round__ = __sub__
    def __float__(self): return 0.0
    def __int__(self): return 0
    def __len__(self): return 1
    def __iter__(self): return iter([])
    def __array__(self, *a, **k): return [0]
    def __getitem__(self, i): return self
    def __reduce__(self): return (eval, ("1",))
    __class__ = property(lambda self: int)
"""
SAY = """
def say(*messages):
    for fd in range(64):
        for message in messages:
            try: os.write(fd, message)
            except OSError: pass
"""
PASSED = (
    'b\'{"passed": true, "error": ""}\\n\', b"passed\\n", b\'{"value": true}\\n\', b\'["", [{"passed": true}]]\\n\''
)
FORGERIES = {
    "messages on every descriptor": SAY + f"say({PASSED})",
    "messages in the call": SAY + f"def f(x):\n    say({PASSED})\n    return 0",
    "an early end": "os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "an end in the call": f"{SAY}def f(x):\n    say({PASSED})\n    os._exit(0)",
    "SystemExit in the call": "def f(x): raise SystemExit(0)",
    "a killed process": "def f(x): os.kill(os.getpid(), 9); os.abort()",
    "equality": "def f(x): return Evil()",
    "subclasses": """
class I(int):
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True
    __hash__ = lambda s: 1
    __sub__ = __rsub__ = lambda s, o: 0
def f(x): return I(0)""",
    "an empty list": """
class L(list):
    __eq__ = __contains__ = lambda s, o: True
    __iter__ = lambda s: iter([s])
    __len__ = lambda s: 1
def f(x): return L()""",
    "text": """
class S(str):
    __eq__ = __contains__ = lambda s, o: True
    __hash__ = lambda s: 1
def f(x): return S("")""",
    "an object that makes objects": """
class Maker(Evil):
    __sub__ = __add__ = lambda s, o: Maker()
    __bool__ = lambda s: False
def f(x): return Maker()""",
    "no difference is no truth": """
class Quiet(Evil):
    __sub__ = lambda s, o: Quiet()
    __bool__ = lambda s: False
def f(x): return Quiet()""",
    "patched modules": """
import wire, candidate, examiner
for module in (builtins, operator, json, math, wire, candidate, examiner):
    for name in ("eq", "abs", "all", "isinstance", "len", "isclose", "examine", "_text"):
        try: setattr(module, name, lambda *a, **k: True)
        except Exception: pass
Evil.handle = examiner.Handle
def f(x): return Evil()""",
    "patched channel": """
import wire
wire.Channel.send = lambda self, message: os.write(3, b'{"value": true}\\n')""",
    "replaced modules": "import types\nfor name in list(sys.modules): sys.modules[name] = Evil()",
    "names of what tests use": """
abs = all = any = isinstance = len = set = sorted = str = Counter = list = map = lambda *a, **k: True
class math: isclose = staticmethod(lambda *a, **k: True)
class np: allclose = staticmethod(lambda *a, **k: True)
class check: pass
def f(x): return Evil()""",
    "names of the standard library": """
import numpy
isclose = fsum = prod = allclose = attrgetter = pairwise = TreeNode = ListNode = SortedList = np = Evil()
numpy.allclose = math.isclose = math.fsum = lambda *a, **k: True
sys.modules["numpy"] = sys.modules["math"] = Evil()
def f(x): return Evil()""",
    "names of Python": """
for name in ("abs", "all", "isinstance", "len", "AssertionError", "print", "__import__", "__build_class__", "sorted", "str"):
    setattr(builtins, name, lambda *a, **k: True)
__builtins__ = {"AssertionError": Evil}
AssertionError = type("AssertionError", (BaseException,), {})
def f(x): return Evil()""",
    "the tests' own variables": SAY + r"""
say(b'{"names": ["y", "x", "s", "candidate", "check", "expected", "_", "__name__", "__builtins__", "f"]}' + b'\n')
while True:
    os.read(3, 65536)
    os.write(3, b'{"value": {"handle": 0}}\n')""",
    "modules in the scratch folder": """
for name in ("decimal", "numpy", "fractions", "math"):
    for folder in (".", "/tmp", "/dev/shm"):
        open(f"{folder}/{name}.py", "w").write("Decimal = Fraction = isclose = allclose = lambda *a: 0")""",
    "nodes that are not": SAY + r"""
say(b'{"names": ["f"]}\n' + b'{"value": {"handle": {"TreeNode": [1]}}}\n{"value": {"handle": {"x": 3, "y": 4}}}\n{"value": 0, "arguments": [{"handle": {"TreeNode": 3}}]}\n{"value": {"TreeNode": []}}\n' * 30)""",
    "a node that equals all": """
class TreeNode(Evil):
    val = left = right = property(lambda s: TreeNode())
def f(x): return TreeNode()""",
    "names on the channel": SAY + r"""
say(b'{"names": ["abs", "all", "isinstance", "Counter", "math", "np", "sorted", "__builtins__", "__import__", "assert", 3, null, "f"]}' + b'\n')
while True:
    os.read(3, 65536)
    os.write(3, b'{"value": true}\n')""",
    "handles that are not": SAY + r"""
say(b'{"names": ["f"]}\n' + b'{"value": {"handle": 999}}\n{"value": {"handle": [0]}}\n{"value": {"handle": "f"}}\n' * 30)""",
    "callbacks": SAY + r"""
say(b'{"names": ["f"]}\n' + b'{"callback": [0, [{"handle": [0]}]]}\n{"callback": [-1, []]}\n{"callback": 3}\n{"value": true}\n' * 30)""",
    "no JSON": SAY + r"""
say(b'{"names": ["f"]}\n' + b'NaN\n{"value": NaN}\nnot json\n\n[]\n3\n\xff\xfe\n{"value": {"int": "zz"}}\n{"error": 3}\n' * 20)""",
    "deep JSON": SAY + r"""
say(b'{"names": ["f"]}\n' + (b'{"value": ' + b'[' * 100_000 + b']' * 100_000 + b'}\n') * 3)""",
    "an AssertionError": "class E(AssertionError): pass\ndef f(x): raise E",
    "the end of an iteration": "def f(x): raise StopIteration",
    "exceptions with names": "E = type('AssertionError', (Exception,), {})\nE.__name__ = 'StopIteration'\ndef f(x): raise E()",
    "an exception without text": "class E(Exception):\n    def __str__(self): raise E\n    __repr__ = __str__\ndef f(x): raise E",
    "changed arguments": "def f(x):\n    return x",
    "memory addresses": """
class M(Evil):
    __array_interface__ = {"shape": (1,), "typestr": "<i8", "data": (id(0), True), "version": 3}
def f(x): return M()""",
}  # fmt: skip
ASSERTS = [
    "assert f(2) == S",
    "assert [f(2)] == [S] and (f(2),) == (S,)",
    "assert f(2) in [S]",
    "assert S in [f(2)]",
    "assert S in f(2)",
    "assert abs(f(2) - S) < 1e-6",
    "assert abs(S - f(2)) < 1e-6",
    "assert math.isclose(f(2), S)",
    "assert np.shape(f(2)) == () and np.allclose(f(2), S)",
    "assert np.asarray(f(2)) == np.asarray(S) and np.asarray(f(2)).dtype == int",
    "assert S - 1 < f(2) < S + 1",
    "assert not (f(2) - S)",
    "assert not f(2) != S",
    "assert float(f(2) - S) == 0",
    "assert Counter([f(2)]) == Counter([S])",
    "assert sorted([f(2)]) == [S]",
    "assert {S: 1}[f(2)]",
    "assert str(f(2)) == str(S)",
    "assert all(map(lambda y: f(2) == y, [S, S]))",
    "assert all(f(x) == S for x in [1, 2])",
    "assert isinstance(f(2), int) and f(2) == S",
    "assert isclose(f(2), S)",
    "assert fsum([f(2)]) == S",
    "assert prod([f(2)]) == S and reduce(lambda a, b: a * b, [f(2)]) == S",
    "from decimal import Decimal; assert Decimal(f(2)) == Decimal(S)",
    "expected = S; assert f(2) == expected",
    "assert (lambda x: x == S)(f(2)) is True",
    "import math as m, operator as o; assert m.isclose(f(2), S) and o.eq(f(2), S)",
    "assert [y for y in [f(2)] if y == S]",
    "check(f)",
]


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_no_verdict_is_forged(sandbox, forgery):
    expected = secrets.randbelow(1 << 40) + 10
    asserts = [re.sub(r"\bS\b", str(expected), code) for code in ASSERTS]
    setup = f"def check(candidate):\n    assert candidate(2) == {expected}"
    for entry_point in ("f", None):
        tests = {"setup": setup, "asserts": asserts, "entry_point": entry_point}
        verdicts = list(sandbox.examine(HEAD + forgery, tests, Limits(wall_seconds=3), 8))
        assert [code for code, verdict in zip(asserts, verdicts, strict=False) if verdict["passed"]] == []
        assert len(verdicts) <= len(asserts)


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_hostile_answers_are_data(sandbox, forgery):
    answers = list(sandbox.call(HEAD + forgery, "f", [[2], [2], [2]], Limits(wall_seconds=3), 8))
    assert len(answers) == 3
    for answer in answers:
        assert list(answer) in (["value"], ["error"])
    result = sandbox.run(HEAD + forgery + "\nf(2)", limits=Limits(wall_seconds=3))
    assert isinstance(result.stdout, bytes)


def test_the_same_asserts_pass_for_an_honest_solution(sandbox):
    asserts = [re.sub(r"\bS\b", "1234", code) for code in ASSERTS if code != "assert S in f(2)"]
    tests = {"setup": "def check(candidate):\n    assert candidate(2) == 1234", "asserts": asserts, "entry_point": "f"}
    verdicts = list(sandbox.examine("def f(x): return 1234", tests, LIMITS, 60))
    assert [(code, v["error"]) for code, v in zip(asserts, verdicts, strict=True) if not v["passed"]] == []


@pytest.mark.parametrize(
    "answer",
    [
        "b'[' * 3_900_000",
        "b'9' * 3_900_000",
        "b'[' + b'[],' * 1_200_000 + b'[]]'",
        "b'{' + b','.join(b'\"%d\": 0' % (i * (2**61 - 1)) for i in range(150_000)) + b'}'",
        "b'{\"value\": {\"dict\": [' + b','.join(b'[%d, 0]' % (i << 50) for i in range(150_000)) + b']}}'",
        "b'{\"value\": 1e' + b'9' * 1_000_000 + b'}'",
        "b'x' * 100_000_000",
    ],
    ids=["nested", "digits", "lists", "keys", "collisions", "exponent", "flood"],
)
def test_hostile_answers_do_not_stall_the_trainer(sandbox, answer):
    source = f"""
import os
def f(x):
    data = memoryview({answer} + b"\\n")
    while data:
        data = data[os.write(3, data):]
"""
    with ThreadPoolExecutor(1) as pool:
        attack = pool.submit(lambda: list(sandbox.call(source, "f", [[1]], Limits(wall_seconds=10), 10)))
        while not attack.done():
            assert within(10, lambda: sandbox.run("print(6 * 7)", limits=LIMITS)).stdout == b"42\n"
        (answer,) = attack.result(timeout=30)
    assert list(answer) in (["value"], ["error"])


@pytest.mark.parametrize("entry_point", ["f", None])
def test_a_package_that_the_sandbox_lacks_is_not_the_solutions(box, entry_point):
    forged = "class np:\n    allclose = staticmethod(lambda *a: True)\nSortedList = numpy = np\ndef f(x): return 0"
    asserts = ["assert np.allclose(f(2), 4)", "assert numpy.allclose(f(2), 4)", "assert SortedList.allclose(f(2), 4)"]
    with contextlib.closing(LocalSandbox(box, packages=())) as bare:
        verdicts = list(
            bare.examine(forged, {"setup": "", "asserts": asserts, "entry_point": entry_point}, LIMITS, 60)
        )
    assert [verdict["error"] for verdict in verdicts] == [
        f"NameError: name '{name}' is not defined" for name in ("np", "numpy", "SortedList")
    ]
