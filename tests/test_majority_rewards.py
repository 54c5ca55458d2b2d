"""The majority's answer as the label of its group."""

import pytest

pytest.importorskip("math_verify")
import torch.distributed

from trl_prime.rewards.majority_rewards import MajorityReward, majority_reward
from trl_prime.rewards.math_rewards import MathReward

ENDLESS = "9^{9^{9^9}}"


@pytest.fixture
def judged(monkeypatch):
    """Stand-in for the worker processes: texts are equal as text, and nothing can be told of `ENDLESS`. The list has each call's pairs."""
    calls = []

    def judge_pairs(self, pairs):
        calls.append(list(pairs))
        return {pair: None if ENDLESS in pair else float(len(set(pair)) == 1) for pair in pairs}

    monkeypatch.setattr(MathReward, "judge_pairs", judge_pairs)
    return calls


def label(*answers):
    """Rewards of one group; None is a completion without an answer."""
    completions = ["I do not know" if answer is None else rf"So \boxed{{{answer}}}." for answer in answers]
    return MajorityReward()(completions, prompts=["?"] * len(answers))


@pytest.mark.parametrize(
    ("answers", "rewards"),
    [
        (["4", "5", "4"], [1.0, 0.0, 1.0]),
        # Forms of one answer are one answer, and only together the majority
        (["0.5", "3", r"\frac{1}{2}", "3", "1/2"], [1.0, 0.0, 1.0, 0.0, 1.0]),
        # A plurality is enough, and completions without an answer do not vote
        (["4", "4", "5", "6", "7", None, None, None], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        (["4", "4", "5", "5", "6"], [None] * 5),
        (["4", "5", "6"], [None] * 3),
        ([None, None], [None] * 2),
        (["7" * 5000, "7" * 5000, "4"], [0.0, 0.0, 1.0]),  # an answer that is too long is none
        # A single completion tells nothing
        (["4"], [None]),
    ],
)
def test_votes(answers, rewards):
    assert label(*answers) == rewards


@pytest.mark.parametrize(
    ("answers", "rewards"),
    [
        (["x"] * 3 + [ENDLESS, "y"], [1.0] * 3 + [None, 0.0]),
        # It might equal y
        (["x"] * 2 + [ENDLESS, "y"], [None] * 4),
        ([ENDLESS] * 2 + ["x", "y"], [None] * 4),
        ([ENDLESS] + ["x"] * 3, [None] + [1.0] * 3),
    ],
)
def test_an_answer_that_cannot_be_compared_is_undecided(judged, answers, rewards):
    assert label(*answers) == rewards


def test_the_vote_ends_when_it_is_decided_and_hopeless_candidates_are_not_compared(judged):
    assert label(*"xxxyz") == [1.0] * 3 + [0.0] * 2
    # Once the candidate, then y and z with it; y with z would change nothing
    assert judged == [[("0", "x")], [("y", "x"), ("z", "x")]]
    del judged[:]
    label(ENDLESS, ENDLESS, "x", "y")
    assert judged[:2] == [[("0", ENDLESS)], []]


def test_groups_are_equal_prompts_wherever_they_stand():
    a, b = ([{"role": "user", "content": text}] for text in "ab")
    completions = [rf"\boxed{{{answer}}}" for answer in (1, 2, 2, 2, 1, 3)]
    assert majority_reward(completions, prompts=[a, b, a, b, a, b]) == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert majority_reward([], prompts=[]) == []


def test_logs():
    columns, metrics = {}, {}
    completions = [rf"\boxed{{{answer}}}" for answer in (4, 4, 4, 5)] + ["none", r"\boxed{1}", r"\boxed{2}", "none"]
    MajorityReward()(completions, ["a"] * 4 + ["b"] * 4, columns.__setitem__, metrics.__setitem__, solution=["4"] * 8)
    assert columns["answer"] == ["4", "4", "4", "5", "[none]", "1", "2", "[none]"]
    assert columns["majority"] == ["4"] * 4 + ["[none]"] * 4
    assert metrics == {"majority_reward/labelled": 0.5, "majority_reward/agreement": 0.75}


def test_a_group_on_two_processes_has_one_label(monkeypatch):
    """Each process sees half of the group and would find another majority."""
    halves = [[r"\boxed{1}", r"\boxed{1}", r"\boxed{2}"], [r"\boxed{2}", r"\boxed{2}", r"\boxed{3}"]]
    alone = [majority_reward(half, prompts=["?"] * 3) for half in halves]
    assert alone == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda gathered, rows: sent.append(rows))
    for half in halves:
        with pytest.raises(TypeError):  # the stand-in has gathered nothing yet
            majority_reward(half, prompts=["?"] * 3)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda gathered, rows: gathered.__setitem__(slice(2), sent)
    )
    together = [majority_reward(half, prompts=["?"] * 3) for half in halves]
    assert together == [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]


def test_equality_is_that_of_math_reward():
    reward = MajorityReward(num_workers=1)
    answers = ["x+1", "1+x", r"500\text{ cm}", r"5\text{ m}", "x+1+0"]
    assert reward([rf"\boxed{{{answer}}}" for answer in answers], ["?"] * 5) == [1.0, 1.0, 0.0, 0.0, 1.0]
    reward.close()


def test_options():
    reward = MajorityReward(boxed_only=True)
    assert reward(["The answer is 4.", r"\boxed{4}", r"\boxed{4}"], ["?"] * 3) == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="timeout is -1"):
        MajorityReward(timeout=-1)
    assert majority_reward.__name__ == MajorityReward().__name__ == "majority_reward"
