"""Measuring a policy and its PRM, and showing how a run went."""
