"""`trl-prime data` and `trl-prime env`."""

import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from trl_prime.cli import main
from trl_prime.commands import env
from trl_prime.commands.arguments import recipe_folder
from trl_prime.commands.data import unjudged_rows
from trl_prime.data.adapters import load_prime_dataset
from trl_prime.sandbox import SandboxUnavailable
from trl_prime.version import __version__


@pytest.fixture
def gsm8k(tmp_path):
    path = tmp_path / "rows.jsonl"
    answers = ["so\n#### 2", "no number", "#### 3", "#### \\frac{1}{"]
    path.write_text(
        "".join(json.dumps({"question": f"{i} [plus] 1", "answer": a}) + "\n" for i, a in enumerate(answers))
    )
    return path


def data(action, path, *flags):
    return main(["data", action, str(path), "--dataset_format", "gsm8k", *flags])


def test_rows_are_shown_as_the_chat_template_writes_them(gsm8k, model_path, capsys):
    assert data("show", gsm8k, "--max_rows", "1") == 0
    printed = capsys.readouterr().out
    assert "[user] 0 [plus] 1" in printed and "solution: 2" in printed and "malformed" not in printed
    assert data("show", gsm8k, "--tokenizer", model_path) == 0
    printed = capsys.readouterr().out
    assert "user:0 [plus] 1" in printed and "assistant:" in printed
    # Three rows, of which the second is malformed
    assert "row 2 ─" in printed and "2 [plus] 1" in printed and "3 [plus] 1" not in printed
    assert "1 malformed:\n  row 1: the answer ends in 'no number'" in printed


def test_check_names_the_rows_and_what_is_wrong(gsm8k, model_path, capsys):
    assert data("check", gsm8k, "--tokenizer", model_path, "--max_prompt_length", "20") == 2
    printed = capsys.readouterr().out
    assert "4 rows, 1 malformed\n  row 1: the answer ends in 'no number'" in printed
    # The tokenizer knows neither white space nor brackets, which it leaves out or writes as unknown, by its version
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    messages = [{"role": "user", "content": "0 [plus] 1"}]
    num = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    assert num >= 21 and f"prompts of {num} to {num} tokens, median {num}" in printed
    assert f"3 prompts with more than 20 tokens\n  row 0: {num} tokens\n  row 2" in printed
    assert "1 rows whose gold answer or tests cannot be judged\n  row 3: the gold answer '\\\\frac{1}{'" in printed
    assert data("check", gsm8k, "--max_rows", "1") == 0
    assert "1 rows, 0 malformed" in capsys.readouterr().out


def test_gold_answers_and_tests_that_cannot_be_judged():
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    rows = [
        ("math", "1/2", None, None),
        ("math", "x^2 + 1", None, None),
        ("math", None, None, "not understood"),
        ("math", r"\sqrt{", None, "not understood"),
        ("math", "x +* / )", None, "not understood"),  # equal to itself as a text
        ("code", None, tests, None),
        ("code", None, "{}", "no tests"),
        ("code", None, "[1", "not JSON"),
        (None, "5", None, None),
        (None, None, None, "no tests"),
        ("reasoning_gym", None, "{}", None),
    ]
    dataset = Dataset.from_list([{"ability": a, "solution": s, "tests": t} for a, s, t, _ in rows])
    found = dict(unjudged_rows(dataset))
    assert set(found) == {i for i, row in enumerate(rows) if row[3]}
    assert all(rows[i][3] in reason for i, reason in found.items())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_converted_rows_are_read_back_without_a_format(gsm8k, tmp_path, suffix):
    output = tmp_path / f"adapted{suffix}"
    assert data("convert", gsm8k, "--output", str(output), "--prompt_suffix", "math") == 0
    adapted = load_prime_dataset(str(gsm8k), "gsm8k", prompt_suffix="math", on_error="skip")
    assert list(load_prime_dataset(str(output))) == list(adapted)
    assert len(adapted) == 3


@pytest.mark.parametrize(
    "action, flags, said",
    [
        ("convert", ["--output", "adapted.csv"], "end in .jsonl or .parquet"),
        ("convert", ["--output", "rows.jsonl"], "there already"),
        ("convert", [], "convert needs --output"),
        ("convert", ["--output", "new.jsonl", "--tokenizer", "m"], "leave --tokenizer out"),
        ("check", ["--output", "new.jsonl"], "check writes no file: use convert"),
        ("show", ["--max_rows", "0"], "max_rows is 0"),
        ("check", ["--max_prompt_length", "5"], "`check` and --tokenizer"),
        ("show", ["--max_prompt_length", "5", "--tokenizer", "m"], "`check` and --tokenizer"),
        ("show", ["--dataset_split", "test"], "has only the split 'train'"),
        ("shwo", [], "invalid choice: 'shwo' (choose from"),
    ],
)
def test_wrong_options(gsm8k, monkeypatch, capsys, action, flags, said):
    monkeypatch.chdir(gsm8k.parent)
    assert data(action, "rows.jsonl", *flags) == 2
    assert said in capsys.readouterr().err


def test_words_that_are_missing_or_too_many(gsm8k, capsys):
    for words, said in (
        ([], "arguments are required: --action, --dataset_name"),
        (["show"], "arguments are required: --dataset_name"),
        (["show", str(gsm8k), "rows"], "can make nothing of 'rows'"),
    ):
        assert main(["data", *words]) == 2
        assert said in capsys.readouterr().err


def test_env_tells_versions_and_the_sandbox(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for line in (f"trl-prime version: {__version__}", "PyTorch version", "TRL version", "PEFT version", "Math-Verify"):
        assert line in printed
    assert "Hub: offline" in printed and f"Recipes: {recipe_folder()}" in printed
    assert (recipe_folder() / "quickstart.yaml").is_file()


def test_env_tells_why_there_is_no_sandbox(monkeypatch):
    def none(kind):
        raise SandboxUnavailable("user namespaces are forbidden")

    monkeypatch.setattr("trl_prime.sandbox.open_sandbox", none)
    assert env.sandbox() == "none. user namespaces are forbidden"


def test_check_of_rows_that_no_verifier_can_judge(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1=", "gold": "2"}\n')
    assert main(["data", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "1 rows without 'solution' and 'tests'" in said and "question_answer(answer='...')" in said
    assert "cannot be judged" not in said
