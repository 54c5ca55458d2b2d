"""Reward functions by name, by dotted path and in the call form."""

import sys
import types

import pytest

from trl_prime.rewards.registry import load_reward_func, trl_rewards
from trl_prime.tasks.running_sums import running_sum_reward


class StandIn:
    def __init__(self, scoring="all", timeout=6.0):
        self.__name__ = "stand_in"
        self.scoring, self.timeout = scoring, timeout

    def __call__(self, completions, **kwargs):
        return [self.timeout] * len(completions)


def plain(completions, **kwargs):
    return [1.0] * len(completions)


def make_nameless():
    class Nameless:
        def __call__(self, completions, **kwargs):
            return []

    return Nameless()


NUMBER = 3


@pytest.fixture
def verifiers(monkeypatch):
    """Stand-ins for the modules of the math and code verifiers."""
    for module, function, cls in (
        ("math_rewards", "math_reward", "MathReward"),
        ("code_rewards", "code_reward", "CodeReward"),
        ("majority_rewards", "majority_reward", "MajorityReward"),
    ):
        stand_in = types.ModuleType(module)
        setattr(stand_in, function, plain)
        setattr(stand_in, cls, StandIn)
        stand_in.check_installed = lambda: None
        monkeypatch.setitem(sys.modules, f"trl_prime.rewards.{module}", stand_in)


def test_verifiers_by_name_and_with_options(verifiers):
    assert load_reward_func("math") is load_reward_func("majority") is plain
    assert load_reward_func("majority(timeout=2)").timeout == 2
    # An instance already, because making one finds out whether programs can be run at all
    assert isinstance(load_reward_func("code"), StandIn)
    reward = load_reward_func("code(scoring='fraction', timeout=10)")
    assert isinstance(reward, StandIn) and (reward.scoring, reward.timeout) == ("fraction", 10)
    assert isinstance(load_reward_func("math()"), StandIn)
    with pytest.raises(ValueError, match="'timeout_s'.*Did you mean 'timeout'"):
        load_reward_func("code(timeout_s=10)")


def test_options_of_the_router_reach_the_verifiers(verifiers):
    from trl_prime.rewards.router import VerifierReward, verifier_reward

    assert load_reward_func("verifier") is verifier_reward
    reward = load_reward_func("verifier(code={'timeout': 2.0}, math={'timeout': 3.0})")
    assert isinstance(reward, VerifierReward)
    columns = {"ability": ["code", "math"], "solution": [None, "1"], "tests": ["{}", None]}
    assert reward(completions=["a", "b"], **columns) == [2.0, 3.0]
    with pytest.raises(ValueError, match="'time'.*Did you mean 'timeout'"):
        load_reward_func("verifier(code={'time': 2.0})")


def test_all_public_rewards_of_trl_are_there():
    import trl.rewards

    public = (
        {name for names in trl.rewards._import_structure.values() for name in names}
        if hasattr(trl.rewards, "_import_structure")
        else {"accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment"}
    )
    assert public <= set(trl_rewards())
    assert load_reward_func("think_format_reward") is trl.rewards.think_format_reward


def test_factories_of_trl_take_their_options():
    reward = load_reward_func("soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)")
    assert reward(completion_ids=[[1] * 80, [1] * 90, [1] * 101]) == [0.0, -0.5, -1.0]
    same = load_reward_func("get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)")
    assert same(completion_ids=[[1] * 90]) == [-0.5]
    with pytest.raises(ValueError, match="lacks soft_punish_cache.*max_completion_len=..., soft_punish_cache=..."):
        load_reward_func("soft_overlong_punishment(max_completion_len=100)")
    with pytest.raises(ValueError, match="lacks max_completion_len"):
        load_reward_func("soft_overlong_punishment")
    if "repetition_penalty_reward" in trl_rewards():
        # Every option of it has a default
        assert load_reward_func("repetition_penalty_reward")(completion_ids=[[1, 2, 3]]) == [0.0]


def test_plain_functions_of_trl_take_optional_arguments_and_keep_their_name():
    reward = load_reward_func("reasoning_accuracy_reward(reasoning_delimiters=['</r>'])")
    assert reward.__name__ == "reasoning_accuracy_reward"
    assert reward.keywords == {"reasoning_delimiters": ["</r>"]}
    for spec in ("think_format_reward(a=1)", "reasoning_accuracy_reward(solution=['1'])"):
        with pytest.raises(ValueError, match="option"):
            load_reward_func(spec)


def test_dotted_paths():
    here = __name__
    assert load_reward_func(f"{here}.plain") is plain
    assert load_reward_func("trl_prime.tasks.running_sums.running_sum_reward") is running_sum_reward
    assert load_reward_func(f"{here}.StandIn(timeout=1.5)").timeout == 1.5
    with pytest.raises(ValueError, match="class"):
        load_reward_func(f"{here}.StandIn")
    with pytest.raises(ValueError, match="__name__"):
        load_reward_func(f"{here}.make_nameless()")
    with pytest.raises(ValueError, match="no reward function"):
        load_reward_func(f"{here}.NUMBER")
    with pytest.raises(ValueError, match="no function"):
        load_reward_func(f"{here}.NUMBER(a=1)")
    with pytest.raises(ValueError, match="'scorin'.*Did you mean 'scoring'"):
        load_reward_func(f"{here}.StandIn(scorin=1)")


def test_unknown_names_name_the_nearest():
    for spec, nearest in (("verifer", "verifier"), ("acuracy_reward", "accuracy_reward"), ("maths", "math")):
        with pytest.raises(ValueError, match=f"Did you mean '{nearest}'"):
            load_reward_func(spec)
