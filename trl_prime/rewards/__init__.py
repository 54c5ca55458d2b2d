"""Outcome rewards are given by verifiers of math and code; recipes call them by name."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .code_rewards import CodeReward, code_reward
    from .majority_rewards import MajorityReward, majority_reward
    from .math_rewards import MathReward, math_reward
    from .registry import load_reward_func
    from .router import VerifierReward, verifier_reward

__all__ = [
    "CodeReward",
    "MajorityReward",
    "MathReward",
    "VerifierReward",
    "code_reward",
    "load_reward_func",
    "majority_reward",
    "math_reward",
    "verifier_reward",
]

_MODULES = {
    "CodeReward": ".code_rewards",
    "MajorityReward": ".majority_rewards",
    "MathReward": ".math_rewards",
    "VerifierReward": ".router",
    "code_reward": ".code_rewards",
    "load_reward_func": ".registry",
    "majority_reward": ".majority_rewards",
    "math_reward": ".math_rewards",
    "verifier_reward": ".router",
}


def __getattr__(name: str) -> Any:
    # Imports are lazy because the verifiers' worker processes import this package and must not load a trainer
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
