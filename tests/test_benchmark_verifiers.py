"""The benchmark of verifiers: mutants, batches of completions, programs, and counts of verdicts."""

import importlib.util
import random
import sys

import pytest


@pytest.fixture(scope="module")
def verifiers(benchmarks):
    # A name of its own, since there is a library of the name of the file
    spec = importlib.util.spec_from_file_location("benchmark_verifiers", benchmarks / "verifiers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


PROBLEM = {
    "task_id": "Test/0",
    "prompt": 'def helper(x):\n    return x + 1\n\n\ndef clip(x):\n    """At most 10."""\n',
    "canonical_solution": "    if x > 10:\n        x = 10\n    return x\n",
    "test": "def check(candidate):\n    assert candidate(11) == 10\n    assert candidate(3) == 3\n",
    "entry_point": "clip",
}


def test_mutants_change_the_solution_once_and_not_the_prompt(verifiers):
    changes = verifiers.mutants(PROBLEM)
    assert changes == verifiers.mutants(PROBLEM)
    kinds = sorted(kind for kind, _ in changes)
    # Statements that can go are the condition and what it guards; 10 stands twice
    assert kinds == ["comparison", "condition", "constant", "constant", "return value", "statement", "statement"]
    assert all("return x + 1" in source for _, source in changes)
    assert all(verifiers.change_of(source, PROBLEM).strip() for _, source in changes)


def test_mutants_are_judged_by_the_tests_of_their_problem(verifiers, tmp_path):
    right = PROBLEM["prompt"] + PROBLEM["canonical_solution"]
    assert verifiers.run_tests(right, PROBLEM, str(tmp_path)) == "passed"
    assert verifiers.run_tests(right.replace("x > 10", "x < 10"), PROBLEM, str(tmp_path)) == "failed"
    # x >= 10 is the same function
    assert verifiers.run_tests(right.replace("x > 10", "x >= 10"), PROBLEM, str(tmp_path)) == "passed"
    rows = verifiers.judged_mutants(PROBLEM, str(tmp_path))
    assert sum(row["outcome"] == "failed" for row in rows) == 3


def test_batches_agree_as_asked(verifiers):
    problems = [(rf"\frac{{{n}}}{{7}}", "") for n in range(1, 9)]
    for agree, least, most in ((True, 2, 4), (False, 8, 8)):
        completions, golds, distinct = verifiers.math_batch(problems, random.Random(0), agree)
        assert len(completions) == len(golds) == 64
        answers = [completion.rpartition("\n")[2] for completion in completions]
        counts = [len(set(answers[start : start + 8])) for start in range(0, 64, 8)]
        assert sum(counts) == distinct
        assert all(least <= count <= most for count in counts)


def test_programs_that_read_and_write_are_right(verifiers):
    problems = verifiers.stdin_problems(12)
    assert len({source for source, _ in problems}) == 12
    assert all(verifiers.run_bare(source, tests) for source, tests in problems)


def test_verdicts_are_counted_by_what_went_wrong(verifiers):
    rows = [{"kind": "a"}, {"kind": "a"}, {"kind": "b"}, {"kind": "b"}]
    found = verifiers.judged([1.0, 1.0, 0.0, None], [True, False, True, False], rows)
    assert (found["right"], found["false_positives"], found["false_negatives"], found["undecided"]) == (1, 1, 1, 1)
    assert found["right_by_kind"] == {"a": [1, 2], "b": [0, 2]}
