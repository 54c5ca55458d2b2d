"""Names in recipes: objects by dotted path, call forms and their options, and the nearest choice to a misspelt name."""

import dataclasses
import sys

import pytest

from trl_prime.prime_config import PRIMEConfig
from trl_prime.specs import call_with_options, check_options, did_you_mean, load_object, nearest, parse_call
from trl_prime.tasks.running_sums import running_sum_reward


def test_a_misspelt_name_is_told_the_nearest_choice_and_all_of_them():
    assert nearest("rlo", ["grpo", "rloo"]) == "Did you mean 'rloo'? Choose one of: grpo, rloo."
    assert nearest("xyz", ["grpo", "rloo"]) == "Choose one of: grpo, rloo."


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("prm_lr", "prm_learning_rate"),
        ("per_device_train_bs", "per_device_train_batch_size"),
        ("max_completion_len", "max_completion_length"),
        ("prm_wd", "prm_weight_decay"),
        ("prm_btea", "prm_beta"),
    ],
)
def test_abbreviations_are_understood(written, meant):
    fields = [field.name for field in dataclasses.fields(PRIMEConfig)]
    assert did_you_mean(written, fields) == f"Did you mean {meant!r}? "


def test_objects_by_dotted_path():
    assert load_object("trl_prime.tasks.running_sums.running_sum_reward") is running_sum_reward
    with pytest.raises(ValueError, match="'running_sum_reward'"):
        load_object("trl_prime.tasks.running_sums.running_sum_rewards")
    with pytest.raises(ValueError, match="no_such_module"):
        load_object("no_such_module.reward")
    with pytest.raises(ValueError, match="'reward' is not a dotted path"):
        load_object("reward")


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "module_of_a_recipe.py").write_text("REWARD = 3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert load_object("module_of_a_recipe.REWARD") == 3
    (tmp_path / "module_of_no_python.py").write_text("def reward(:\n")
    with pytest.raises(ValueError, match="'module_of_no_python.reward' could not be loaded: invalid syntax"):
        load_object("module_of_no_python.reward")


def test_call_form_is_parsed_and_not_evaluated():
    assert parse_call("math") == ("math", None)
    assert parse_call("code(scoring='fraction', timeout=10)") == ("code", {"scoring": "fraction", "timeout": 10})
    assert parse_call(" my.module.make( a=-1, b=[1, 'x'], c={'d': None}) ") == (
        "my.module.make",
        {"a": -1, "b": [1, "x"], "c": {"d": None}},
    )
    assert parse_call("code()") == ("code", {})


@pytest.mark.parametrize(
    "spec",
    [
        "code(10)",
        "code(*a)",
        "code(**{'a': 1})",
        "code(timeout=time)",
        "code(timeout=__import__('os').getpid())",
        "code(timeout=1 + x)",
        "code(timeout=10",
        "code(timeout=10)(a=1)",
        "code(a=1) or math(a=1)",
        "code(a=1, a=2)",
        "(lambda: 1)()",
        "code(a=f'{1}')",
        "code(a=" + "(" * 500 + ")" * 500 + ")",
    ],
)
def test_anything_but_literal_keyword_arguments_is_refused(spec):
    with pytest.raises(ValueError, match="literal"):
        parse_call(spec)


def test_unknown_options_name_the_nearest():
    check_options("x", [], [])
    check_options("x", ["a"], iter(["b", "a"]))
    with pytest.raises(
        ValueError, match="^dataset_format 'x' has no option 'colum'. Did you mean 'column'.*: column, row"
    ):
        check_options("dataset_format 'x'", {"row": 1, "colum": 2}, ["column", "row"])
    with pytest.raises(ValueError, match="^x has no option 'a'. It takes none.$"):
        check_options("x", ["a"], [])


def test_options_are_checked_before_the_call():
    def make(size, *, depth=1):
        return size, depth

    def make_any(**options):
        return options

    def broken():
        raise TypeError("a bug")

    assert call_with_options("tools", "make(size=2)", make, {"size": 2}) == (2, 1)
    assert call_with_options("tools", "make(depth=3, size=2)", make, {"depth": 3, "size": 2}) == (2, 3)
    assert call_with_options("tools", "any(a=1)", make_any, {"a": 1}) == {"a": 1}
    with pytest.raises(
        ValueError, match=r"^tools has 'make\(sise=2\)', which has no option 'sise'. Did you mean 'size'"
    ):
        call_with_options("tools", "make(sise=2)", make, {"sise": 2})
    with pytest.raises(ValueError, match=r"'make\(depth=1\)', which lacks size. Write make\(depth=..., size=...\).$"):
        call_with_options("tools", "make(depth=1)", make, {"depth": 1})
    with pytest.raises(ValueError, match="no function: give it without parentheses"):
        call_with_options("tools", "three()", 3, {})
    with pytest.raises(TypeError, match="a bug"):
        call_with_options("tools", "broken()", broken, {})
