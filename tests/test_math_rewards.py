"""The reward function: TRL's contract, hostile answers, and speed."""

import copy
import os
import pickle
import signal
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("math_verify")
from trl_prime.rewards import math_rewards
from trl_prime.rewards.answers import MAX_ANSWER_LENGTH
from trl_prime.rewards.math_rewards import MathReward, math_reward

FUZZ_CASES = int(os.environ.get("TRL_PRIME_FUZZ_CASES", 320))
FUZZ_BATCH = 8

# Run for ever
ENDLESS = ["9^{9^{9^9}}", r"\sum_{k=1}^{10^9} \sin(k^2)", r"\int_0^1 \frac{\sin(x^{x^x})}{\ln(1+x^7+e^x)} dx"]
OVERSIZED = ["{" * 10**5 + "1" + "}" * 10**5, "7" * 3_000_000, "1+" * 10**6 + "1", r"\frac{1}{" * 10**5]
# Decided or not, depending on how fast the machine is
AWKWARD = [
    "3^{100000000}",
    "200000000!",
    r"\binom{10^9}{5*10^8}",
    "1e999999999",
    "(" * 1000 + "1" + ")" * 1000,
    r"\sqrt{" * 300 + "2" + "}" * 300,
    "7" * 4000,
    "7" * 4000 + "x",
    "\ud800",
    "\0",
]


@pytest.fixture(scope="module")
def reward():
    reward = MathReward(timeout=2.0, num_workers=2)
    yield reward
    reward.close()


def boxed(answer):
    return rf"Thus \boxed{{{answer}}}."


def test_rewards_of_texts_and_messages(reward):
    texts = [boxed(r"\frac{1}{2}"), boxed("0.5"), boxed("2"), "The answer is 50%.", "no idea"]
    golds = ["0.5", r"$\frac{1}{2}$", "0.5", "We halve it.\n#### 0.5", "0.5"]
    expected = [1.0, 1.0, 0.0, 1.0, 0.0]
    assert reward(texts, golds) == expected
    assert reward([[{"role": "assistant", "content": text}] for text in texts], golds) == expected
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    assert reward(parts, golds) == expected
    dialog = [[{"role": "assistant", "content": boxed(9)}, {"role": "tool", "content": text}] for text in texts]
    assert reward(dialog, golds) == expected
    assert all(type(value) is float for value in reward(texts, golds))


def test_completions_without_content_are_wrong(reward):
    empty = ["", [], [{"role": "assistant", "content": None}], [{"role": "assistant"}], [{"content": []}]]
    images = [[{"content": [{"type": "image"}]}]]
    assert reward(empty + images, ["1"] * 6) == [0.0] * 6


def test_a_gold_answer_that_is_missing_or_not_understood_is_undecided(reward):
    golds = [None, "", r"\frac{\sum", "1" * (MAX_ANSWER_LENGTH + 1), "9^{9^{9^9}}", "1"]
    assert reward([boxed("x+1")] * 6, golds) == [None] * 5 + [0.0]
    assert reward([], []) == []


def test_columns_named_like_options_are_only_columns(reward):
    columns = {"timeout": [0.0], "undecided": [1.0], "num_workers": [0], "boxed_only": [True], "prompts": ["?"]}
    assert reward(completions=["The answer is 3."], solution=["3"], trainer_state=None, **columns) == [1.0]


def test_options():
    with MathReward(boxed_only=True).pool:
        assert MathReward(boxed_only=True)(["The answer is 3.", boxed(3)], ["3", "3"]) == [0.0, 1.0]
    with pytest.raises(ValueError, match="timeout is -1"):
        MathReward(timeout=-1)
    with pytest.raises(ValueError, match="num_workers is 0"):
        MathReward(num_workers=0)
    with pytest.raises(ValueError, match="undecided is 'wrong'"):
        MathReward(undecided="wrong")


@pytest.mark.parametrize(("module", "name"), [("math_verify", "Math-Verify"), ("pint", "pint")])
def test_a_missing_library_is_named_at_construction(monkeypatch, module, name):
    monkeypatch.setattr(math_rewards.importlib.util, "find_spec", lambda other: None if other == module else 1)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install trl-prime\[math\]"):
        MathReward()


def test_logs(reward):
    columns, metrics = {}, {}
    texts = [boxed(1), "none here", boxed("2+x"), boxed("3+x")]
    reward(texts, ["1", "1", "x+2", None], log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    assert columns == {"answer": ["1", "[none]", "2+x", "3+x"]}
    assert metrics == {"math_reward/undecided": 0.25, "math_reward/no_answer": 0.25}


def test_trl_finds_a_name_and_can_copy():
    assert math_reward.__name__ == MathReward().__name__ == "math_reward"
    reward = MathReward(timeout=1.5, undecided=0.0)
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert (other.undecided, other.pool.timeout) == (0.0, 1.5)
        assert other([boxed("1+x")], ["x+1"]) == [1.0]
        other.close()


def test_default_instance_judges():
    assert math_reward([boxed(r"50\%"), boxed("50"), boxed("x=3")], ["0.5", "0.5", "y=3"]) == [1.0, 0.0, 0.0]


def test_hostile_answers_end_in_time_and_cost_the_others_nothing(reward):
    good = [boxed(rf"\frac{{{2 * k}}}{{{k}}} + x") for k in range(1, 13)]
    completions = [boxed(answer) for answer in ENDLESS + OVERSIZED + AWKWARD] + good
    golds = ["3"] * (len(completions) - len(good)) + ["x+2"] * (len(good) - 1) + ["x+3"]
    rewards = []
    start = time.monotonic()
    # In a thread, where limits by signals would not work
    thread = threading.Thread(target=lambda: rewards.extend(reward(completions, golds)), daemon=True)
    thread.start()
    thread.join(90)
    # Two workers share what takes two seconds each, twice; the rest is for replacing them on a busy machine
    assert time.monotonic() - start < 60
    endless, oversized, awkward = (len(answers) for answers in (ENDLESS, OVERSIZED, AWKWARD))
    assert rewards[:endless] == [None] * endless
    assert rewards[endless : endless + oversized] == [0.0] * oversized
    assert set(rewards[endless + oversized : -len(good)]) <= {0.0, None}
    assert rewards[-len(good) :] == [1.0] * 11 + [0.0]


def test_undecided_scores_answers_but_not_gold_answers():
    reward = MathReward(timeout=1.0, num_workers=2, undecided=0.0)
    completions = [boxed("9^{9^{9^9}}"), boxed("x+1"), boxed("1+x")]
    assert reward(completions, ["x+1", "9^{9^{9^9}}+x", "x+1"]) == [0.0, None, 1.0]
    reward.close()


def test_a_lost_worker_costs_no_verdict():
    """With `undecided=0.0` a right answer must not score 0 because something outside killed a worker."""
    reward, metrics = MathReward(num_workers=1, undecided=0.0), {}
    assert reward([boxed("x+1")], ["1+x"]) == [1.0]
    for pid in reward.pool.worker_pids:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert reward([boxed("x+2")], ["2+x"], log_metric=metrics.__setitem__) == [1.0]
    assert metrics["math_reward/undecided"] == 0.0
    reward.close()


def test_digits_beyond_pythons_limit_and_deep_nesting_in_the_gold_answer(reward):
    digits = "7" * 4096
    nested = "(" * 2000 + "x" + ")" * 2000
    assert reward([boxed(digits), boxed("1"), boxed(nested)], [digits, digits, nested])[::2] == [1.0, 1.0]


def test_each_distinct_pair_is_judged_once(monkeypatch):
    reward = MathReward()
    jobs = []
    monkeypatch.setattr(reward.pool, "map", lambda batch, keys: jobs.extend(batch) or original(batch, keys))
    original = type(reward.pool).map.__get__(reward.pool)
    completions = [boxed("x+1")] * 6 + [boxed("x+2")] * 2 + [boxed("7")] * 4
    assert reward(completions, ["1+x"] * 8 + ["7", "8", "x", "x"]) == [1.0] * 6 + [0.0] * 2 + [1.0, 0.0, 0.0, 0.0]
    assert jobs == [("x+1", "1+x"), ("x+2", "1+x"), ("7", "x")]
    reward.close()


def batch_of_a_step(first):
    """64 problems with eight completions each, four distinct answers a problem. As in MATH, most answers are numbers."""
    forms = [
        ("{k}", "{k}.0", "{k}1", "-{k}"),
        (r"\frac{{{k}}}{{7}}", "{k}/7", r"\frac{{7}}{{{k}}}", r"\frac{{{k}}}{{8}}"),
        (r"2{k}", r"2{k}", r"3{k}", r"{k}\pi"),
        (r"x+{k}\sqrt{{2}}", r"{k}\sqrt{{2}}+x", r"{k}\sqrt{{3}}+x", r"{k}\sqrt{{2}}-x"),
    ]
    golds, completions = [], []
    for k in range(first, first + 64):
        answers = [form.format(k=k) for form in forms[k % 4]]
        golds += [f"${answers[0]}$"] * 8
        completions += [[{"role": "assistant", "content": f"So it is ${boxed(answer)}$"}] for answer in answers * 2]
    return completions, golds


def test_verdicts_of_a_batch_are_those_of_trl():
    accuracy_reward = pytest.importorskip("trl.rewards").accuracy_reward
    reward = MathReward(num_workers=1)
    batch = batch_of_a_step(11)
    assert reward(*batch) == accuracy_reward(*batch) == [1.0, 1.0, 0.0, 0.0] * 128
    reward.close()


TOKENS = r"""
\frac \sqrt \boxed \fbox \text \mathrm \left \right \begin{pmatrix} \end{pmatrix} \\ \{ \} { } ( ) [ ] ^ _ & | , ; . : + - * / = < >
\le \ge \ne \in \cup \cap \infty \pi \pm \cdot \times \binom \sum \prod \int \lim \sin \log \ln \emptyset \mathbb{R} \% % \$ $ $$
\[ \] \( \) #### ^\circ \overline \approx \text{cm} km/h mph \mu \Omega 元 厘米 or and x y z i e A B dx 0 1 2 3 7 10 0.5 1,000 1e9 2! million yes answer is
</think> ∞ ≤ ½
"""
TOKENS = st.sampled_from([*TOKENS.split(), "\ud800", "\0"])
JUNK = st.one_of(
    st.lists(TOKENS, min_size=1, max_size=12).map("".join),
    st.lists(TOKENS, min_size=1, max_size=12).map(" ".join),
    st.text(max_size=40),
)


@pytest.fixture(scope="module")
def fuzzed():
    reward = MathReward(timeout=0.5, num_workers=2)
    yield reward
    assert reward([boxed("1+x"), boxed("x")], ["x+1", "x+1"]) == [1.0, 0.0]
    assert len(reward.pool.worker_pids) <= 2
    reward.close()


@settings(
    max_examples=max(FUZZ_CASES // FUZZ_BATCH, 1),
    deadline=None,
    derandomize="TRL_PRIME_FUZZ_CASES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(st.tuples(JUNK, JUNK), min_size=FUZZ_BATCH, max_size=FUZZ_BATCH))
def test_junk_is_judged_without_an_exception_or_a_hang(fuzzed, pairs):
    completions = [boxed(answer) for answer, _ in pairs[::2]] + [answer for answer, _ in pairs[1::2]]
    golds = [gold for _, gold in pairs[::2]] + [gold for _, gold in pairs[1::2]]
    start = time.monotonic()
    rewards = fuzzed(completions, golds)
    assert len(rewards) == len(pairs) and set(rewards) <= {0.0, 1.0, None}
    assert time.monotonic() - start < 0.5 * FUZZ_BATCH + 30


def test_the_reward_does_not_change_the_interpreter():
    before = (sys.getrecursionlimit(), sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0)
    MathReward()([boxed("1+x")], ["x+1"])
    after = (sys.getrecursionlimit(), sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0)
    assert before == after
