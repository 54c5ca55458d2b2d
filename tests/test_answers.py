"""Extraction of final answers and the verdict on one pair of answer and gold answer."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("math_verify")
from trl_prime.rewards.answers import (
    MAX_ANSWER_LENGTH,
    clean,
    equality,
    extract_answer,
    extract_gold,
    judge,
    quick_verdict,
)
from trl_prime.rewards.answers.cleaning import without_spaces
from trl_prime.rewards.answers.units import split_unit

PAIRS = Path(__file__).parent.parent / "benchmarks" / "data" / "math_pairs.jsonl"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # 1. boxes
        (r"First \boxed{1}, then more, \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, \frac{2}{3}\right\}} is right", r"\left\{1, \frac{2}{3}\right\}"),
        (r"\fbox{7} and no more", "7"),
        (r"\boxed{x = \boxed{3}}", "3"),
        (r"so \boxed{\frac{1}{2", r"\frac{1}{2"),
        ("so $\\boxed{42$\nas above {", "42"),
        (r"\boxed 5 apples", "5"),
        (r"\boxed{3}, the form is \boxed{}", "3"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"\[\boxed{3}\] or \[\boxed{4}\]", "3, 4"),
        (r"$\boxed{3}\text{ or }\boxed{4}$", "3, 4"),
        (r"$\boxed{3}\text{ not }\boxed{4}$", "4"),
        (r"\boxed{3} is what I thought, but \boxed{4}", "4"),
        ("$\\boxed{3}$\n\n$\\boxed{4}$", "4"),
        (r"\boxed{1} <think> \boxed{2} </think> It is \boxed{3}", "3"),
        (r"<think> \boxed{2} </think> I do not know", None),
        (r"The answer is 3. #### 4 \boxed{5} $6$ 7", "5"),
        # 2. hashes
        ("The answer is 3.\n#### 1,234", "1,234"),
        ("#### $18 a day", "$18 a day"),
        ("#### Step 2\nThe answer is 3.", "3"),
        # 3. markers
        ("The answer is 3. That was 4 steps.", "3"),
        ("The final answer is $\\frac{1}{2}$, as $x=3$.", "$\\frac{1}{2}$"),
        ("**Answer:** 12 apples\nthe end, 3", "12 apples"),
        ("Answer:\n\n\\[ x^2 \\]", "\\[ x^2 \\]"),
        ("The answer to the question is: (B)", "(B)"),
        ("The answer is 3 or 4.", "3 or 4"),
        ("The answer is $3$ or $4$.", "$3$ or $4$"),
        ("The answer is 12 because $3 \\cdot 4 = 12$.", "12"),
        ("The answer is 3.14.", "3.14"),
        ("The answer is 2. No, the answer is 5.", "5"),
        # 4. formulas
        ("We get $x=2$ and $y=3$ in the end, see 7.", "$y=3$"),
        ("We get \\(x=2\\) and $$y=3$$", "$$y=3$$"),
        # 5. numbers
        ("She makes $18 every day. That's $126 a week.", "126"),
        ("One costs $4.00 and she buys four, so 4*4=$16.00.\nA: 16", "16"),
        ("It is 1,234 or so", "1,234"),
        ("which is 3/4 of it", "3/4"),
        ("half, so 50%", "50%"),
        ("item x2 costs -3.5 now", "-3.5"),
        # none
        ("I do not know.", None),
        ("", None),
        (r"\boxed{}", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_boxed_only_takes_no_fallback():
    text = "#### 42\nThe answer is $42$."
    assert extract_answer(text) == "42"
    assert extract_answer(text, boxed_only=True) is None
    assert extract_answer(text + r"\boxed{7}", boxed_only=True) == "7"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"Hence $x = \boxed{4}$.", "4"),
        ("#### 42", "42"),
        ("16 - 7 = <<16-7=9>>9 eggs\n9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("#### 2,125", "2,125"),
        ("The answer is 5.", "5"),
        (42, "42"),
        (0, "0"),
        (None, None),
        ("", None),
        ("  ", None),
    ],
)
def test_extract_gold(gold, answer):
    assert extract_gold(gold) == answer


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"Hence $x = \boxed{4}$.", "4"),
        ("9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("9 * 2 = $<<9*2=18>>18.\nA: 18", None),
        ("The answer in weeks is 28 / 7.\nA: 4", None),
        ("x ####", None),
        ("42", None),
        # Cut off within the box
        (r"First \boxed{4}, then $x = \boxed{\frac{1}{2}", None),
        (r"Hence \boxed 4.", "4"),
    ],
)
def test_gold_of_a_worked_solution_has_to_be_marked(gold, answer):
    assert extract_gold(gold, marked_only=True) == answer


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "}",
        r"\boxed{",
        r"\boxed{}",
        r"\boxed{a},",
        r"\boxed{1} and ",
        r"\boxed{1}\text{ and }",
        r"\fbox \boxed",
        "9",
        "1,111,",
        "9.",
        "1/",
        "$",
        "$ ",
        "$x",
        "$x$ and ",
        "$$",
        r"\(",
        r"\[",
        r"\]\[",
        "answer ",
        "answer to ",
        "answer is ",
        "answer to the question ",
        "The answer is: $",
        "####",
        "#### 1",
        "\\",
        " ",
        "\n",
        "**",
        "</think>",
        "-",
        "é",
    ],
)
def test_extraction_is_fast_on_two_megabytes_of_anything(piece):
    for text in (piece * (2_000_000 // len(piece)), piece * (2_000_000 // len(piece)) + " x"):
        start = time.perf_counter()
        answer = extract_answer(text)
        extract_gold(text)
        assert time.perf_counter() - start < 2.0  # quadratic time would be minutes; twice 0.1 s is usual
        # An answer that is too long stays recognizable as such
        if piece == "9":
            assert extract_answer(rf"\boxed{{{text}}}") is not None
            assert len(extract_answer(rf"\boxed{{{text}}}")) > MAX_ANSWER_LENGTH
        assert answer is None or len(answer) <= 32_768
        start = time.perf_counter()
        quick_verdict(text[:MAX_ANSWER_LENGTH], "x")
        assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (r"$\dfrac{1}{2}$.", r"\frac{1}{2}"),
        (r"\[ \left( 1,\, 2 \right) \]", "(1, 2)"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
        (r"11,\! 111,\! 111", "11111111"),
        ("(1,234)", "(1,234)"),
        (r"\$18.50", "18.50"),
        ("1.1e1", r"1.1\times 10^{1}"),
        ("2 − 3π", r"2 - 3\pi"),
        (r"50 percent", r"50\%"),
        (r"\begin{pmatrix}1\\ 2\\[2pt](3)\\(4)\end{pmatrix}", r"\begin{pmatrix}1\\ 2\\[2pt](3)\\(4)\end{pmatrix}"),
    ],
)
def test_clean(text, cleaned):
    assert without_spaces(clean(text)) == without_spaces(cleaned)


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("42", "42", True),
        ("-0", "0", True),
        ("042.0", "42", True),
        ("43", "42", False),
        ("1" * 64, "1" * 63 + "2", False),
        ("0.3333333", "0.3333334", True),
        ("0.0000001", "0.0000002", False),
        ("42.001", "42", False),
        (r"\frac{1}{2}", r"$\dfrac{1}{2}$", True),
        ("1 2", "12", None),
        ("", "", None),
        ("1" * 5000, "2" * 5000, None),  # Python would refuse to read these
        ("1/2", "0.5", True),
        (r"-\frac{2}{4}", "1/2", False),
        ("1/0", "1/2", None),
        ("x+1", "1+x", None),
    ],
)
def test_quick_verdict(answer, gold, verdict):
    assert quick_verdict(answer, gold) is verdict


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        # The kinds that other graders get wrong: each wrong, beside its right neighbour
        ("314", "3.14", False),
        ("42", "0.42", False),
        ("42", "4200", False),
        ("50", "0.5", False),
        (r"50\%", "0.5", True),
        (r"50\%", r"\frac{1}{2}", True),
        ("1/2^{99}", "1/2^{98}", False),
        ("1/2^{99}", "2^{-99}", True),
        ("x=3", "y=3", False),
        ("x=3", "3", True),
        ("3", "3 or 4", False),
        ("4 or 3", "3 or 4", True),
        ("[1,2)", r"1 \le x < 2", True),
        (r"1 \le x < 2", "[1,2)", True),
        (r"1 \le x \le 2", "[1,2)", False),
        ("42.", "42", True),
        ("1.1e1", "11", True),
        # and where Math-Verify alone is too generous
        ("4210_7", "4210_5", False),
        (r"\{1,2\}", "(1,2)", False),
        (r"\text{seat}", r"\text{east}", False),
        ("0.0000671", r"\frac{672}{10^7}", False),
        (r"(\frac{1}{2^{99}}, 1)", r"(\frac{1}{2^{98}}, 1)", False),
        (r"5\text{ s}", r"5\text{ m}", False),
        (r"500\text{ cm}", r"5\text{ m}", True),
        ("x+3t", "x+3", False),
    ],
)
def test_judge(answer, gold, right):
    assert judge(answer, gold) is right


def test_gold_that_is_not_understood_is_undecided_unless_it_is_the_same_text():
    assert judge("5", r"\frac{\sum") is None
    assert judge(r"\frac{\sum", r"\frac{\sum") is True
    assert judge("hello world", r"\frac{\sum") is None
    assert judge("5", " ") is None
    # while an answer that is not understood is wrong
    assert judge(r"\frac{\sum", "5") is False


def test_labelled_pairs():
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    right = sum(pair["right"] for pair in pairs)
    assert len(pairs) >= 600
    assert 0.4 < right / len(pairs) < 0.6
    missed = [pair for pair in pairs if judge(pair["answer"], extract_gold(pair["gold"])) is not pair["right"]]
    assert len(missed) <= 0.01 * len(pairs), missed
    # A false positive is what a policy would learn to write
    assert not [pair for pair in missed if not pair["right"]]


def rows(*parts):
    folder = os.environ.get("TRL_PRIME_DATA")
    path = Path(folder or ".").joinpath(*parts)
    if not folder or not path.exists():
        pytest.skip(f"TRL_PRIME_DATA is not set to a folder with {'/'.join(parts)}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_math_500_answers_against_themselves_and_their_solutions():
    problems = rows("math500", "test.jsonl")
    golds = [problem["expected_answer"] for problem in problems]
    assert len(golds) == 500
    assert [gold for gold in golds if judge(gold, extract_gold(gold)) is not True] == []
    assert [gold for gold in golds if equality._parse(split_unit(clean(gold))[0]) is None] == []
    solved = [judge(extract_answer(problem["solution"]), problem["expected_answer"]) for problem in problems]
    assert solved.count(True) == 500
    others = [judge(gold, other) for gold, other in zip(golds, golds[1:], strict=False) if gold != other]
    assert others.count(False) == len(others)


def test_gsm8k_golds_against_themselves():
    golds = [row["answer"] for row in rows("gsm8k", "test.jsonl")]
    assert [gold for gold in golds if judge(extract_answer(gold), extract_gold(gold)) is not True] == []


def test_package_loads_no_framework_and_math_verify_only_when_judging():
    code = """
import sys
from trl_prime.rewards import answers
assert not {"math_verify", "sympy"} & set(sys.modules)
assert answers.judge("1/2", "0.5")
assert answers.judge("x+1", "1+x")
assert "math_verify" in sys.modules
assert not {"torch", "transformers", "trl", "datasets"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_math_verify_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    equality._parse.cache_clear()
    with pytest.raises(ImportError, match=r"pip install trl-prime\[math\]"):
        judge("x+1", "1+x+0")
