"""Tools of a policy: the interpreter in the sandbox, and names in a recipe."""

import time

import pytest
from transformers.utils import get_json_schema

from trl_prime.sandbox import Limits, SandboxUnavailable
from trl_prime.sandbox.tool import load_tool, python_tool


@pytest.fixture(scope="module")
def python():
    try:
        return python_tool(seconds=1.0, max_characters=40)
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def test_the_policy_reads_what_its_program_prints(python):
    assert python("print(6 * 7)") == "42"
    assert python("x = 1") == "[nothing was printed]"
    assert "division by zero" in python("1 / 0")
    long = python("print('a' * 100 + 'b' * 100)")
    assert long == "a" * 20 + "\n[...]\n" + "b" * 20


def test_a_program_is_walled_in_and_ended(python, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("token")
    assert "token" not in python(f"print(open({str(secret)!r}).read())")
    start = time.monotonic()
    assert python("while True: pass").endswith("[stopped: time limit]")
    assert 1 <= time.monotonic() - start < Limits().wall_seconds
    assert python("print('still here')") == "still here"


def test_the_model_is_told_what_the_tool_takes(python):
    schema = get_json_schema(python)["function"]
    assert schema["name"] == "python"
    assert schema["parameters"]["required"] == ["code"]


def shout(text: str) -> str:
    return text.upper()


def make_shout(times: int):
    return lambda text: shout(text) * times


def test_names_in_a_recipe(python):
    assert load_tool("python").__name__ == "python"
    assert load_tool("python(max_characters=2)")("print('abc')") == "a\n[...]\nc"
    assert load_tool(f"{__name__}.shout") is shout
    assert load_tool(f"{__name__}.make_shout(times=2)")("a") == "AA"


@pytest.mark.parametrize(
    "spec, said",
    [
        ("pyton", "Did you mean 'python'"),
        ("python(second=1)", "python.*no option 'second'. Did you mean 'seconds'"),
        ("python(seconds=0)", "must be positive"),
        ("python(1)", "no name"),
        (f"{__name__}.whisper", "has no 'whisper'"),
        (f"{__name__}.__name__", "is a str and no function"),
        (f"{__name__}.make_shout()", r"lacks times. Write .*make_shout\(times=...\)"),
        (f"{__name__}.__name__()", "no function"),
    ],
)
def test_wrong_names(spec, said):
    with pytest.raises(ValueError, match=said):
        load_tool(spec)
