"""The verifier is picked by the row, is called once with its rows, and its results come back in place."""

import pytest

from trl_prime.rewards.router import VerifierReward, data_source_kind, row_kind


class Recorder:
    """A verifier that notes how it was called and judges by its own column."""

    def __init__(self, column, logs=()):
        self.column, self.logs, self.calls = column, logs, []

    def __call__(self, completions, log_extra=None, log_metric=None, **kwargs):
        self.calls.append({"completions": completions, **kwargs})
        for name in self.logs:
            if log_extra:
                log_extra(name, [f"{name}:{completion}" for completion in completions])
        if log_metric:
            log_metric(f"{self.column}/calls", 1.0)
        return [None if truth == "?" else float(truth) for truth in kwargs[self.column]]


@pytest.fixture
def mixed():
    """Seven rows: math, code, unknown, math, code, math that cannot be judged, unknown."""
    return {
        "completions": [[{"role": "assistant", "content": text}] for text in "abcdefg"],
        "ability": ["math", "code", "logic", "math", "code", "math", None],
        "solution": ["1", None, "1", "0", None, "?", None],
        "tests": [None, "0", None, None, "1", None, None],
    }


def test_rewards_come_back_in_place(mixed):
    math, code = Recorder("solution"), Recorder("tests")
    assert VerifierReward(math, code)(**mixed) == [1.0, 0.0, None, 0.0, 1.0, None, None]


def test_each_verifier_is_called_once_with_its_rows_in_order(mixed):
    math, code = Recorder("solution"), Recorder("tests")
    state = object()
    VerifierReward(math, code)(
        **mixed,
        completion_ids=[[i] for i in range(7)],
        level=list("0123456"),
        trainer_state=state,
        names=["of", "no", "row"],
    )
    assert len(math.calls) == len(code.calls) == 1
    call = math.calls[0]
    assert [completion[0]["content"] for completion in call["completions"]] == ["a", "d", "f"]
    assert call["solution"] == ["1", "0", "?"] and call["ability"] == ["math"] * 3
    assert call["completion_ids"] == [[0], [3], [5]] and call["level"] == ["0", "3", "5"]
    assert call["trainer_state"] is state and call["names"] == ["of", "no", "row"]
    assert code.calls[0]["tests"] == ["0", "1"] and code.calls[0]["level"] == ["1", "4"]


def test_a_verifier_without_rows_is_not_called():
    math, code = Recorder("solution"), Recorder("tests")
    assert VerifierReward(math, code)(["a"], ability=["math"], solution=["1"]) == [1.0]
    assert not code.calls
    assert VerifierReward(math, code)([], ability=[], log_metric=lambda *_: None) == []


def test_logged_columns_have_the_length_of_the_batch(mixed):
    extra, metrics = {}, {}

    def log_extra(name, values):
        assert name not in extra
        extra[name] = values

    reward = VerifierReward(Recorder("solution", ["verdict", "gold"]), Recorder("tests", ["verdict"]))
    mixed["completions"] = list("abcdefg")
    reward(**mixed, log_extra=log_extra, log_metric=metrics.__setitem__)
    assert extra == {
        "verdict": ["verdict:a", "verdict:b", None, "verdict:d", "verdict:e", "verdict:f", None],
        "gold": ["gold:a", None, None, "gold:d", None, "gold:f", None],
    }
    assert metrics == {"solution/calls": 1.0, "tests/calls": 1.0, "verifier/unknown_kind": 2 / 7}


def test_an_error_of_a_verifier_is_not_swallowed(mixed):
    def broken(**kwargs):
        raise RuntimeError("no sandbox")

    with pytest.raises(RuntimeError, match="no sandbox"):
        VerifierReward(Recorder("solution"), broken)(**mixed)


def test_a_verifier_has_to_judge_all_its_rows(mixed):
    with pytest.raises(ValueError, match="code verifier returned 1 rewards for 2"):
        VerifierReward(Recorder("solution"), lambda **kwargs: [1.0])(**mixed)


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="1 of 2 rows are code.*'tests'"):
        VerifierReward(Recorder("solution"), Recorder("tests"))(
            ["a", "b"], ability=["math", "code"], solution=["1", None]
        )


@pytest.mark.parametrize(
    ("data_source", "kind"),
    [
        ("numina_olympiads", "math"),
        ("numina_cn_k12", "math"),
        ("codecontests", "code"),
        ("apps", "code"),
        ("codeforces", "code"),
        ("taco", "code"),
        ("openai/gsm8k", "math"),
        ("HuggingFaceH4/MATH-500", "math"),
        ("DigitalLearningGmbH/MATH-lighteval", "math"),
        ("openai_humaneval", "code"),
        ("google-research-datasets/mbpp", "code"),
        ("taco_recipes", None),
        ("mathematicians", None),
        ("", None),
    ],
)
def test_kind_by_data_source(data_source, kind):
    assert data_source_kind(data_source) == kind


def test_order_of_ability_data_source_and_columns():
    assert row_kind("math", "taco", None, "{}") == "math"
    assert row_kind(" Code ", "gsm8k", "1", None) == "code"
    # A stated kind without a verifier is final
    assert row_kind("logic", "gsm8k", "1", None) is None
    assert row_kind(None, "taco", "1", None) == "code"
    assert row_kind("", "unheard_of", "1", None) == "math"
    assert row_kind(None, None, None, "{}") == "code"
    assert row_kind(None, None, "1", "{}") is None
    assert row_kind() is None


def test_routing_without_an_ability_column():
    reward = VerifierReward(Recorder("solution"), Recorder("tests"))
    columns = {"data_source": ["gsm8k", "taco", "x"], "solution": ["1", None, None], "tests": [None, "0", None]}
    assert reward(completions=list("abc"), **columns) == [1.0, 0.0, None]


def test_rows_of_another_kind_can_have_their_verifier():
    gym = Recorder("tests")
    reward = VerifierReward(Recorder("solution"), Recorder("tests"), reasoning_gym=gym)
    assert reward(list("ab"), ability=["reasoning_gym", "math"], solution=["5", "1"], tests=["0", None]) == [0.0, 1.0]
    assert gym.calls[0]["completions"] == ["a"]
