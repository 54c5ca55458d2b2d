"""Outcome rewards by name, for recipes."""

from .registry import load_object, load_reward_func

__all__ = ["load_object", "load_reward_func"]
