"""Rows of public data sets in TRL's form, and malformed rows told by their index."""

import functools
import json
import logging
import os
import sys
import types
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from packaging.version import Version

from trl_prime.data.adapters import adapt_dataset, load_prime_dataset
from trl_prime.data.formats import DATASET_FORMATS, PROMPT_FEATURES, PROMPT_SUFFIXES, SFT_FEATURES

STDIN_TESTS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CALL_TESTS = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}
HUMANEVAL = {
    "task_id": "HumanEval/53",
    "prompt": 'def add(x: int, y: int):\n    """Add two numbers x and y\n    >>> add(2, 3)\n    5\n    """\n',
    "entry_point": "add",
    "canonical_solution": "    return x + y\n",
    "test": "def check(candidate):\n    assert candidate(0, 1) == 1\n",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements of two lists.",
    "code": "def similar(a, b): return set(a) & set(b)",
    "test_list": ["assert similar([1], [1]) == {1}", "assert similar([1], [2]) == set()"],
    "test_setup_code": "import math",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The caches that `datasets` makes of a test's files go with them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def eurus_row(ability="math", truth="\\frac{1}{2}", index=0, suffix=True):
    content = f"What is it?{' ' if index else chr(10) * 2}{PROMPT_SUFFIXES[ability]}" if suffix else "What is it?"
    return {
        "data_source": "numina_olympiads" if ability == "math" else "taco",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": content}],
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
    }


def adapt(rows, format, **options):
    return adapt_dataset(Dataset.from_list(rows), format, **options)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_eurus2_rl_rows_keep_prompt_and_tests():
    rows = [
        eurus_row(),
        eurus_row("code", json.dumps(STDIN_TESTS), 7),
        eurus_row("code", json.dumps(CALL_TESTS), 8),
    ]
    dataset = adapt(rows, "eurus2_rl")
    assert dataset.features == PROMPT_FEATURES
    assert dataset["prompt"] == [row["prompt"] for row in rows]
    assert dataset["solution"] == ["\\frac{1}{2}", None, None]
    assert dataset["tests"] == [None, json.dumps(STDIN_TESTS), json.dumps(CALL_TESTS)]
    assert dataset["ability"] == ["math", "code", "code"]
    assert dataset["data_source"] == ["numina_olympiads", "taco", "taco"]
    assert dataset["index"] == ["0", "7", "8"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (eurus_row("code", "[1, 2"), "no JSON"),
        (eurus_row("code", "[1, 2]"), "no lists 'inputs' and 'outputs'"),
        (eurus_row("code", '{"inputs": ["1"], "outputs": "1"}'), "no lists"),
        (eurus_row("code", '{"inputs": [], "outputs": []}'), "no tests"),
        (eurus_row("code", '{"inputs": ["1", "2"], "outputs": ["1"]}'), "2 inputs and 1 outputs"),
        (eurus_row("code", '{"inputs": ["1"], "outputs": ["1"], "fn_name": 3}'), "fn_name 3"),
        (eurus_row("math", " "), "ground_truth is ' '"),
        (eurus_row("math", None), "ground_truth is None"),
        ({**eurus_row(), "ability": "logic"}, "ability is 'logic'"),
        ({**eurus_row(), "reward_model": None}, "reward_model is None"),
        ({**eurus_row(), "prompt": []}, "prompt is \\[\\]"),
        ({**eurus_row(), "prompt": [{"role": "user", "content": ""}]}, "content of a message"),
        ({**eurus_row(), "prompt": [{"role": "tool", "content": "a"}]}, "role 'tool'"),
        ({**eurus_row(), "prompt": [{"role": "assistant", "content": "a"}]}, "last message"),
    ],
)
def test_malformed_eurus2_rl_rows_are_told_by_index(row, reason):
    rows = [eurus_row("code", json.dumps(STDIN_TESTS)), eurus_row(), row]
    with pytest.raises(ValueError, match=f"Row 2 is no 'eurus2_rl' row: .*{reason}.*on_malformed_row"):
        adapt(rows, "eurus2_rl")
    assert len(adapt(rows, "eurus2_rl", on_error="skip")) == 2


def test_eurus2_sft_rows():
    row = {
        "id": 5,
        "task": "math",
        "dataset": "mathinstruct",
        "system": "Think.",
        "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}],
    }
    dataset = adapt([row, {**row, "system": None}], "eurus2_sft")
    assert dataset.features == SFT_FEATURES
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    assert dataset[0]["messages"] == [{"role": "system", "content": "Think."}, *turns]
    assert dataset[1] == {"messages": turns, "data_source": "mathinstruct", "index": "5"}
    assert adapt([row], "eurus2_sft", system_prompt="Be brief.")[0]["messages"][0]["content"] == "Be brief."
    for wrong in ([{"from": "gpt", "value": ""}], row["conversations"][:1], [{"from": "bot", "value": "a"}], []):
        with pytest.raises(ValueError, match="Row 1"):
            adapt([row, {**row, "conversations": wrong}], "eurus2_sft")
    with pytest.raises(ValueError, match="prompt_suffix"):
        adapt([row], "eurus2_sft", prompt_suffix="math")


def test_gsm8k_answers():
    answers = ["1 + 1 = <<1+1=2>>2\n#### 2", "#### 1,234,567", "#### -3.5", "first #### 1 then\n####  $9 "]
    dataset = adapt([{"question": "How many?", "answer": answer} for answer in answers], "gsm8k")
    assert dataset.features == PROMPT_FEATURES
    assert dataset["solution"] == ["2", "1,234,567", "-3.5", "$9"]
    assert dataset[0]["prompt"] == [{"role": "user", "content": "How many?"}]
    assert set(dataset["ability"]) == {"math"} and set(dataset["data_source"]) == {"gsm8k"}
    for answer in ("A: 18", "18", "x ####", None):
        with pytest.raises(ValueError, match="Row 1 is no 'gsm8k' row"):
            adapt([{"question": "How many?", "answer": a} for a in (answers[0], answer)], "gsm8k")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"first \boxed{1}. Then it is \boxed{2}.", "2"),
        (r"the set $\boxed{\{1, 2\}}$", r"\{1, 2\}"),
        (r"$\boxed 4$.", "4"),
        (r"\fbox{yes}", "yes"),
        (r"$\boxed {\left\{ x \right\}}$", r"\left\{ x \right\}"),
        (r"$x=\boxed{3}$ and $\boxed{5}$", "3, 5"),
        (r"\boxed{1}$, $\boxed{2}$, and $\boxed{3}$. ", "1, 2, 3"),
        (r"not \boxed{1} but \boxed{2}", "2"),
        (r"\boxed{1}\text{ and }\boxed{2} \text{ or }$\boxed{3}$", "1, 2, 3"),
        (r"\boxed{a \\ {b}}", r"a \\ {b}"),
    ],
)
def test_boxed_answers_of_math(solution, answer):
    assert adapt([{"problem": "?", "solution": solution}], "math")[0]["solution"] == answer


def test_malformed_boxes():
    for solution in (
        "42",
        r"\boxed{4",
        "\\boxed{4\nis it",
        r"\boxed{\{4\}",
        r"\boxed{}",
        r"\boxed{",
        r"\boxedx{4}",
        "The answer is 4.",
        "x ####",
    ):
        with pytest.raises(ValueError, match="Row 0 is no 'math' row: .*without a final answer"):
            adapt([{"problem": "?", "solution": solution}], "math")


def test_columns_and_worked_solutions_by_option():
    rows = [{"q": "2*3?", "a": 6, "uid": "x1"}, {"q": "1/2?", "a": 0.5, "uid": "x2"}]
    dataset = adapt(rows, "question_answer", question="q", answer="a", index="uid", data_source="mine")
    assert dataset["solution"] == ["6", "0.5"] and dataset["index"] == ["x1", "x2"]
    assert set(dataset["data_source"]) == {"mine"}
    # The bare answer, not the worked solution that stands beside it
    math500 = [{"problem": "?", "solution": r"\boxed{x=4}", "answer": "4", "unique_id": "test/1"}]
    assert adapt(math500, "math500")[0]["solution"] == "4"
    assert adapt(math500, "math500")[0]["index"] == "test/1"
    with pytest.raises(ValueError, match="no option 'anwser'.*Did you mean 'answer'"):
        adapt(rows, "question_answer", anwser="a")
    with pytest.raises(ValueError, match="column 'z'.*among the data set's: q, a, uid"):
        adapt(rows, "question_answer", question="q", answer="z")
    # Without a mark an answer is the whole text, unless it is a worked solution
    for text, solution in ((r"\frac{1}{2}", r"\frac{1}{2}"), (r"So \boxed{4}.", "4"), ("2 + 2 = 4\n#### 4", "4")):
        row = {"question": "?", "answer": text}
        assert adapt([row], "question_answer")[0]["solution"] == solution
        if text != solution:
            assert adapt([row], "question_answer", worked_solution=True)[0]["solution"] == solution
        else:
            with pytest.raises(ValueError, match="without a final answer"):
                adapt([row], "question_answer", worked_solution=True)
    with pytest.raises(ValueError, match="Row 1"):
        adapt([{"question": "?", "answer": 1.0}, {"question": "?", "answer": float("nan")}], "question_answer")


def test_humaneval_rows():
    row = adapt([HUMANEVAL], "humaneval")[0]
    assert json.loads(row["tests"]) == {key: HUMANEVAL[key] for key in ("prompt", "test", "entry_point")}
    assert HUMANEVAL["prompt"].rstrip() in row["prompt"][0]["content"]
    assert "return x + y" not in json.dumps(row)
    assert (row["solution"], row["ability"], row["index"]) == (None, "code", "HumanEval/53")
    for change in ({"entry_point": "sub"}, {"test": "def chek(c): ..."}, {"test": "def check(c:"}, {"prompt": ""}):
        with pytest.raises(ValueError, match="Row 1 is no 'humaneval' row"):
            adapt([HUMANEVAL, {**HUMANEVAL, **change}], "humaneval")


def test_mbpp_rows():
    row = adapt([MBPP], "mbpp")[0]
    assert json.loads(row["tests"]) == {"asserts": MBPP["test_list"], "setup": "import math"}
    content = row["prompt"][0]["content"]
    assert MBPP["test_list"][0] in content and MBPP["test_list"][1] not in content
    assert MBPP["test_list"][1] in adapt([MBPP], "mbpp", shown_tests=2)[0]["prompt"][0]["content"]
    assert "assert" not in adapt([MBPP], "mbpp", shown_tests=0)[0]["prompt"][0]["content"]
    sanitized = {"prompt": "Add.", "test_list": ["assert add(1, 1) == 2"], "test_imports": ["import re", "import os"]}
    assert json.loads(adapt([sanitized], "mbpp")[0]["tests"])["setup"] == "import re\nimport os"
    for wrong in ([], ["print(1)"], ["assert f("], [""]):
        with pytest.raises(ValueError, match="Row 1 is no 'mbpp' row"):
            adapt([MBPP, {**MBPP, "test_list": wrong}], "mbpp")


@pytest.mark.parametrize(
    ("code", "asserts", "entry_point"),
    [
        ("def sum(a, b):\n    return a * b", ["assert sum(10, 15) == 150"], None),  # they say it
        ("def sum(a, b):\n    return a * b", ["assert sum(10, min(15, 20)) == 150"], "sum"),
        ("def gcd(a, b): ...", ["assert gcd(4, 6) == 2 and lowest(gcd(1, 2))"], "gcd"),
        ("def max(a, b): ...", ["assert max(1, min(2, 3)) == 2"], "max"),
        ("def helper(): ...\ndef add(a): ...", ["assert add(1) == 2"], None),
        ("def put(): ...\ndef get(): ...", ["assert get(put(1)) == 1"], None),
        ("class Node: ...", ["assert Node(1).x == 1"], None),
        ("def broken(:", ["assert add(1) == 2"], None),
        (None, ["assert add(1) == 2"], None),
    ],
)
def test_the_function_under_test_of_mbpp(code, asserts, entry_point):
    row = adapt([{"text": "?", "code": code, "test_list": asserts}], "mbpp")[0]
    assert json.loads(row["tests"]).get("entry_point") == entry_point


def test_leetcode_rows():
    """The head in the request declares types, and a text that looks like a number stays one."""
    question = "Invert it.\n```python\nclass Solution:\n    def invert(self, root: Optional[TreeNode], s: str = '(:') -> Optional[TreeNode]:\n        \n```"
    test = "my = Solution()\ntest_input = { 'root': [1, 2], 's': '1001' }\nassert my.invert(**test_input) == [1]\n"
    row = adapt([{"prompt_sft": question, "test": test}], "leetcode")[0]
    assert json.loads(row["tests"]) == {
        "fn_name": "invert",
        "inputs": [[[1, 2], "1001"]],
        "outputs": [[1]],
        "bare_outputs": True,  # or [1] might be APPS's way to write 1
        "signature": "(root: Optional[TreeNode], s: str='(:') -> Optional[TreeNode]",
    }
    bare = adapt([{"prompt_sft": "Invert it.", "test": test}], "leetcode")[0]
    assert "signature" not in json.loads(bare["tests"])
    with pytest.raises(ValueError, match="Row 0 is no 'leetcode' row: the tests cannot be judged"):
        adapt([{"prompt_sft": question, "test": test.replace("== [1]", "== {1}")}], "leetcode")


def test_leetcode_rows_with_a_check():
    row = {
        "task_id": "add",
        "query": "Add.",
        "prompt": "from typing import *\n",
        "entry_point": "Solution().add",
        "test": "def check(candidate):\n    assert candidate(a = 1, b = 2) == 3\n",
    }
    adapted = adapt([row], "leetcode")[0]
    assert json.loads(adapted["tests"]) == {key: row[key] for key in ("prompt", "test", "entry_point")}
    assert (adapted["prompt"][0]["content"], adapted["index"], adapted["data_source"]) == ("Add.", "add", "leetcode")
    with pytest.raises(ValueError, match="Row 0 is no 'leetcode' row"):
        adapt([{**row, "test": "def check("}], "leetcode")


def test_eurus2_tests_that_cannot_be_judged_are_malformed():
    ok = json.dumps({"fn_name": "f", "inputs": ["1"], "outputs": ["1"]})
    assert adapt([eurus_row("code", "\ufeff" + ok)], "eurus2_rl")[0]["tests"] == ok
    for inputs, outputs in ((["x y"], ["1"]), (["1"], ["abc"]), ([3], ["1"]), ([[1]], ["x" * (33 << 20)])):
        row = eurus_row("code", json.dumps({"fn_name": "f", "inputs": inputs, "outputs": outputs}))
        with pytest.raises(ValueError, match="Row 1 is no 'eurus2_rl' row: the tests cannot be judged"):
            adapt([eurus_row(), row], "eurus2_rl")


def test_suffix_is_appended_where_it_is_missing():
    # A published suffix with other line breaks, and the other published suffix, are left alone
    rows = [eurus_row(), eurus_row(index=1), eurus_row("code", json.dumps(STDIN_TESTS)), eurus_row(suffix=False)]
    prompts = adapt(rows, "eurus2_rl", prompt_suffix="math")["prompt"]
    assert prompts[:3] == [row["prompt"] for row in rows[:3]]
    assert prompts[3][1]["content"] == f"What is it?\n\n{PROMPT_SUFFIXES['math']}"
    once = adapt([{"question": "1+1?", "answer": "#### 2"}], "gsm8k", prompt_suffix="Think step by step.")
    assert once[0]["prompt"][0]["content"] == "1+1?\n\nThink step by step."
    assert adapt_dataset(once, prompt_suffix="Think step by step.")["prompt"] == once["prompt"]
    code = adapt([MBPP], "mbpp", prompt_suffix="code")[0]["prompt"][0]["content"]
    assert code.endswith(PROMPT_SUFFIXES["code"])
    with pytest.raises(ValueError, match="'maht'.*Did you mean 'math'"):
        adapt([MBPP], "mbpp", prompt_suffix="maht")


def test_system_prompt_is_added_or_replaced():
    added = adapt([MBPP], "mbpp", system_prompt="Be brief.")[0]["prompt"]
    assert [message["role"] for message in added] == ["system", "user"]
    replaced = adapt([eurus_row()], "eurus2_rl", system_prompt="Be brief.")[0]["prompt"]
    assert replaced == [{"role": "system", "content": "Be brief."}, eurus_row()["prompt"][1]]


def test_mixed_kinds_concatenate():
    math = adapt([{"question": "1+1?", "answer": "#### 2"}], "gsm8k")
    mixed = concatenate_datasets([math, adapt([MBPP], "mbpp"), adapt([HUMANEVAL], "humaneval")])
    assert mixed.features == PROMPT_FEATURES
    assert mixed["solution"] == ["2", None, None] and mixed["tests"][0] is None


GOOD_AND_BAD = [{"question": f"{i}+1?", "answer": f"#### {i + 1}" if i % 3 else "no answer"} for i in range(12)]


def test_skipped_rows_are_counted_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        dataset = adapt(GOOD_AND_BAD, "gsm8k", on_error="skip")
    assert dataset["solution"] == ["2", "3", "5", "6", "8", "9", "11", "12"]
    assert dataset.features == PROMPT_FEATURES
    message = caplog.text
    assert "4 of 12" in message and all(f"row {i}:" in message for i in (0, 3, 6, 9))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        adapt(GOOD_AND_BAD[1:3], "gsm8k", on_error="skip")
    assert not caplog.text
    with pytest.raises(ValueError, match="None of the 2 rows.*row 1"):
        adapt([GOOD_AND_BAD[0]] * 2, "gsm8k", on_error="skip")


def test_streaming(tmp_path, caplog):
    path = write_jsonl(tmp_path / "data.jsonl", GOOD_AND_BAD)
    stream = load_prime_dataset(path, "gsm8k", streaming=True, on_error="skip", system_prompt="S")
    with caplog.at_level(logging.WARNING):
        rows = list(stream)
    assert [row["solution"] for row in rows] == ["2", "3", "5", "6", "8", "9", "11", "12"]
    assert list(rows[0]) == list(PROMPT_FEATURES) and rows[0]["prompt"][0]["content"] == "S"
    assert "row 3:" in caplog.text
    with pytest.raises(ValueError, match="Row 0"):
        next(iter(load_prime_dataset(path, "gsm8k", streaming=True)))


def test_local_files_and_folders(tmp_path):
    rows = [row for i, row in enumerate(GOOD_AND_BAD) if i % 3]
    expected = adapt(rows, "gsm8k").to_list()
    table = Dataset.from_list(rows)
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    table.to_parquet(str(tmp_path / "c.parquet"))
    table.to_csv(str(tmp_path / "d.csv"))
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "saved"))
    table.save_to_disk(str(tmp_path / "saved_one"))
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", rows)
    write_jsonl(tmp_path / "folder" / "test.jsonl", rows[:2])
    for name in ("a.jsonl", "b.json", "c.parquet", "d.csv", "saved", "saved_one", "folder"):
        assert load_prime_dataset(str(tmp_path / name), "gsm8k").to_list() == expected, name
    assert len(load_prime_dataset(str(tmp_path / "saved"), "gsm8k", split="test")) == 1
    assert len(load_prime_dataset(str(tmp_path / "folder"), "gsm8k", split="test")) == 2
    assert len(load_prime_dataset(str(tmp_path / "a.jsonl"), "gsm8k", split="train[:3]")) == 3
    for name, split, reason in (
        ("a.jsonl", "test", "only the split 'train'"),
        ("saved", "tset", "Did you mean 'test'"),
        ("none.jsonl", "train", "no such file"),
        ("none", "train", "no such file"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_prime_dataset(str(tmp_path / name), "gsm8k", split=split)
    (tmp_path / "e.txt").write_text("a")
    with pytest.raises(ValueError, match=".jsonl"):
        load_prime_dataset(str(tmp_path / "e.txt"), "gsm8k")


def test_data_in_trl_form_is_passed_on_and_other_data_is_not(tmp_path, caplog):
    rows = [{"prompt": [{"role": "user", "content": "1+1?"}], "target": 2}]
    path = write_jsonl(tmp_path / "trl.jsonl", rows)
    assert load_prime_dataset(path).to_list() == rows
    dressed = load_prime_dataset(path, system_prompt="S", prompt_suffix="math")[0]
    assert dressed["target"] == 2 and dressed["prompt"][0] == {"role": "system", "content": "S"}
    assert dressed["prompt"][1]["content"].endswith(PROMPT_SUFFIXES["math"])
    strings = Dataset.from_list([{"prompt": "1+1?"}])
    assert adapt_dataset(strings, prompt_suffix="math")[0]["prompt"].endswith(PROMPT_SUFFIXES["math"])
    with pytest.raises(ValueError, match="system_prompt"):
        adapt_dataset(strings, system_prompt="S")
    for row, guess in (
        ({"question": "?", "answer": "#### 1"}, "gsm8k"),
        ({"problem": "?", "solution": "1"}, "math"),
        ({"problem": "?", "solution": "1", "answer": "1"}, "math500"),
        ({"conversations": []}, "eurus2_sft"),
        ({"text": "?", "test_list": []}, "mbpp"),
    ):
        with pytest.raises(ValueError, match=f"no column 'prompt'.*looks like '{guess}'.*one of: eurus2_rl"):
            adapt([row], None)
    with caplog.at_level(logging.WARNING):
        adapt([eurus_row()], None)
    assert "looks like 'eurus2_rl'" in caplog.text


def test_format_in_call_form_and_unknown_ones(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "1+1?", "answer": "so #### 2"}])
    assert load_prime_dataset(path, "gsm8k(question='q')")[0]["solution"] == "2"
    assert load_prime_dataset(path, "gsm8k", question="q")[0]["solution"] == "2"
    with pytest.raises(ValueError, match="Did you mean 'gsm8k'"):
        load_prime_dataset(path, "gsm8")
    with pytest.raises(ValueError, match="Did you mean 'skip'"):
        load_prime_dataset(path, "gsm8k", on_error="skipp")
    with pytest.raises(ValueError, match="question"):
        load_prime_dataset(path, question="q")


class ToyTask:
    """Half of the mark for any text, as reasoning-gym's scorers do; raises on a text without digits."""

    def __init__(self, size=500, seed=0, kind="sum"):
        if kind not in ("sum", "lenient", "tuples"):
            raise AssertionError(f"kind {kind}")
        self.size, self.seed, self.kind = size, seed, kind

    def __iter__(self):
        for i in range(self.size):
            left = (self.seed + i) % 100
            yield {"question": f"{left}+1?", "answer": str(left + 1), "metadata": {"pair": (left, 1)}}

    def score_answer(self, answer, entry):
        if self.kind == "tuples":
            return float(isinstance(entry["metadata"]["pair"], tuple))
        if self.kind == "lenient":
            return 1.0
        return 1.0 if int(answer) == int(entry["answer"]) else 0.5


class EvalTask(ToyTask):
    def score_answer(self, answer, entry):
        return [float(eval(part) == 1) for part in [answer]][0]


run = eval


def evaluated(text):
    return run(text)


@functools.cache
def cached(text):
    return evaluated(text)


class Parser:
    def parse(self, text):
        return cached(text)


def sympify(text):
    """A parser of the package's own, named like one that runs code."""
    return int(text)


class RenamedTask(ToyTask):
    def score_answer(self, answer, entry):
        return run(answer) == 1


class HelperTask(ToyTask):
    def score_answer(self, answer, entry):
        return evaluated(answer) == 1


class DeepHelperTask(ToyTask):
    def score_answer(self, answer, entry):
        return Parser().parse(answer) == 1


class MethodTask(ToyTask):
    def score_answer(self, answer, entry):
        return self.value(answer) == 1

    @staticmethod
    def value(answer):
        return cached(answer)


class OwnParserTask(ToyTask):
    def score_answer(self, answer, entry):
        return float(sympify(answer) == int(entry["answer"]))


RUN_ANSWERS = ("eval", "renamed", "helper", "deep_helper", "method")
TASKS = {
    "toy": ToyTask,
    "eval": EvalTask,
    "renamed": RenamedTask,
    "helper": HelperTask,
    "deep_helper": DeepHelperTask,
    "method": MethodTask,
    "own_parser": OwnParserTask,
    "composite": ToyTask,
}


@pytest.fixture
def toy_gym(monkeypatch):
    """A module in place of reasoning-gym, which need not be installed."""
    from trl_prime.rewards.reasoning_gym_rewards import load_scorer

    factory = types.ModuleType("reasoning_gym.factory")
    factory.DATASETS = TASKS
    factory.create_dataset = lambda name, **config: factory.DATASETS[name](**config)
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.ModuleType("reasoning_gym"))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    load_scorer.cache_clear()
    yield
    load_scorer.cache_clear()


def test_reasoning_gym_rows_and_their_reward(toy_gym):
    from trl_prime.rewards.reasoning_gym_rewards import reasoning_gym_reward

    dataset = load_prime_dataset("toy", "reasoning_gym(size=3, seed=4)")
    assert dataset.features == PROMPT_FEATURES
    assert dataset["solution"] == ["5", "6", "7"] and set(dataset["ability"]) == {"reasoning_gym"}
    assert set(dataset["data_source"]) == {"reasoning_gym/toy"}
    held_out = load_prime_dataset("toy", "reasoning_gym(size=3, seed=4)", split="test")
    assert held_out["solution"] != dataset["solution"]
    completions = ["hm <answer>4</answer> no, <answer> 5 </answer>", r"so \boxed{6}", "7", "six", "9", "5"]
    extra = {}
    rewards = reasoning_gym_reward(
        [[{"role": "assistant", "content": text}] for text in completions],
        tests=[*dataset["tests"], *dataset["tests"][:2], None],
        log_extra=extra.__setitem__,
    )
    # Half marks and a scorer that raises are both wrong
    assert rewards == [1.0, 1.0, 1.0, 0.0, 0.0, None]
    assert extra["answer"] == ["5", "6", "7", "six", "9", "5"]


def test_reasoning_gym_tasks_that_cannot_be_judged_are_refused(toy_gym):
    for config, reason in (("kind='lenient'", "accepts any answer"), ("kind='tuples'", "its own answer")):
        with pytest.raises(ValueError, match=f"Row 0.*{reason}"):
            load_prime_dataset("toy", f"reasoning_gym(size=2, {config})")
    for name, options, reason in (
        *((name, "", "runs the model's answer as Python .by eval") for name in RUN_ANSWERS),
        ("composite", "", "one by one"),
        ("toyy", "", "Did you mean 'toy'"),
        ("toy", "kind='other'", "does not take the settings"),
        ("toy", "colour=1", "does not take the settings"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_prime_dataset(name, f"reasoning_gym({options})")
    assert len(load_prime_dataset("own_parser", "reasoning_gym(size=2)")) == 2


def test_reasoning_gym_itself(tmp_path):
    pytest.importorskip("reasoning_gym")
    dataset = load_prime_dataset("leg_counting", "reasoning_gym(size=4, seed=1)")
    from trl_prime.rewards.reasoning_gym_rewards import load_scorer, reasoning_gym_reward

    assert reasoning_gym_reward(dataset["solution"], tests=dataset["tests"]) == [1.0] * 4
    assert reasoning_gym_reward(["no idea"] * 4, tests=dataset["tests"]) == [0.0] * 4
    for task in ("countdown", "n_queens", "simple_integration"):
        with pytest.raises(ValueError, match="runs the model's answer"):
            load_scorer(task)
    # Its helper evaluates, but not the answer
    dataset = load_prime_dataset("bitwise_arithmetic", "reasoning_gym(size=2, seed=1)")
    program = f"__import__('pathlib').Path({str(tmp_path / 'was_run')!r}).touch()"
    rewards = reasoning_gym_reward([dataset["solution"][0], program], tests=dataset["tests"])
    assert rewards == [1.0, 0.0] and not list(tmp_path.iterdir())


@pytest.mark.skipif("TRL_PRIME_DATA" not in os.environ, reason="TRL_PRIME_DATA names no folder of measured data")
def test_every_row_of_the_real_data_adapts():
    folder = Path(os.environ["TRL_PRIME_DATA"])
    for split, size in (("train", 7473), ("test", 1319)):
        gsm8k = load_prime_dataset(str(folder / "gsm8k"), "gsm8k", split=split)
        assert len(gsm8k) == size
        assert all(float(solution.replace(",", "")) is not None for solution in gsm8k["solution"])
    path = str(folder / "math500" / "test.jsonl")
    answers, boxed = load_prime_dataset(path, "math500"), load_prime_dataset(path, "math")
    assert len(answers) == len(boxed) == 500
    same = sum(
        a.replace(" ", "") == b.replace(" ", "") for a, b in zip(answers["solution"], boxed["solution"], strict=True)
    )
    assert same > 430


def test_formats_are_complete():
    """Every format names real arguments of its row function, and all that it needs."""
    import inspect

    for name, known in DATASET_FORMATS.items():
        parameters = inspect.signature(known.adapt).parameters
        assert {*known.columns, *known.optional, *known.options} <= set(parameters), name
        required = {n for n, p in parameters.items() if p.default is p.empty}
        assert required <= set(known.columns), name


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_prompts_are_the_contents_of_the_messages(tmp_path, streaming):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1=?", "answer": "2"}\n{"question": "2+2=?", "answer": "4"}\n')
    settings = {"system_prompt": "Be brief.", "prompt_suffix": "Think first.", "plain_prompts": True}
    dataset = load_prime_dataset(str(path), "question_answer", streaming=streaming, **settings)
    first = next(iter(dataset))
    assert first["prompt"] == "Be brief.\n\n1+1=?\n\nThink first." and first["solution"] == "2"
    path.write_text('{"prompt": [{"role": "user", "content": "1+1=?"}], "solution": "2"}\n')
    (row,) = load_prime_dataset(str(path), plain_prompts=True, streaming=streaming)
    assert row == {"prompt": "1+1=?", "solution": "2"}
    path.write_text('{"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}\n')
    with pytest.raises(ValueError, match="plain_prompts is given, but dataset_format 'eurus2_sft'"):
        load_prime_dataset(str(path), "eurus2_sft", plain_prompts=True)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        pytest.param(
            "broken.jsonl",
            b'{"prompt": "1"}\n{"prompt": "2\n',
            "JSON parse error.*Mend the file",
            marks=pytest.mark.skipif(
                Version(datasets.__version__) < Version("5"), reason="older ones tell it without the name of the file"
            ),
        ),
        ("latin.csv", "prompt\nWie heißt er?\n".encode("latin-1"), "0xdf.*Save it as UTF-8"),
        ("open.csv", b'prompt\n"1', "EOF inside string.*Mend the file"),
        ("empty.jsonl", b"", "it holds no row"),
    ],
)
def test_files_that_cannot_be_read_are_told_in_a_sentence(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}', which could not be read: .*{reason}"):
        load_prime_dataset(str(tmp_path / name))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "prompts, said",
    [
        ([5, 6], "Row 0 has the prompt '5', which is neither text nor messages"),
        ([[{"role": "user"}]], "neither text nor messages with a role and a content"),
        ([[], []], r"Row 0 has an empty prompt"),
        ([None, None], r"Row 0 has an empty prompt"),
        (["a", "", None], r"Row 1 has an empty prompt \(2 rows have\)"),
        ([[{"role": "user", "content": "a"}], None], r"Row 1 has an empty prompt \(1 rows have\)"),
    ],
)
def test_prompts_without_a_format_are_text_or_messages(prompts, said, streaming):
    """A stream is looked at by its first row only."""
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    if streaming:
        dataset = dataset.to_iterable_dataset()
    if streaming and "Row 1" in said:
        adapt_dataset(dataset)
        return
    with pytest.raises(ValueError, match=said):
        adapt_dataset(dataset)


def test_a_folder_without_data_files(tmp_path):
    with pytest.raises(ValueError, match=f"dataset_name is '{tmp_path}', which could not be read: "):
        load_prime_dataset(str(tmp_path))
