"""From the rewards of each reward function to the outcome of a completion.

Covered: weighted sums, and what a missing reward (None) means. Not covered: reward functions (`rewards/`), baselines and
advantages (`advantages.py`). B = completions, F = reward functions, K = completions of a prompt; groups are contiguous.
"""

from __future__ import annotations

import torch


def combine_outcomes(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, num_generations: int, label: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The outcome of every completion: the weighted sum of the reward functions that apply to its prompt.

    A function that gave none of a prompt's completions a reward does not apply to the prompt: TRL's convention for several
    tasks. Where it gave some of them one, or where there is only one completion to tell by, a missing reward means that this
    completion could not be judged, and a sum without it would be an outcome of another kind than those of its peers.

    Args:
        rewards_per_func (`torch.Tensor`): `(B, F)`; NaN = the function returned None.
        weights (`torch.Tensor`): `(F,)`. A function of weight 0 is measured only: it never makes a completion unjudged.
        num_generations (`int`): K. B is a multiple of it.
        label (`int`, *optional*): Column of the function that says right or wrong. What it did not judge has no outcome.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `(B,)` outcomes, NaN = could not be judged; `(B, F)` bool, whether a function
        counts and applies.
    """
    weights = weights.to(rewards_per_func)
    judged = ~rewards_per_func.isnan()
    applies = (weights != 0).expand_as(judged)
    if num_generations > 1:
        in_group = judged.view(-1, num_generations, judged.shape[1]).any(1)
        applies = applies & in_group.repeat_interleave(num_generations, dim=0)
    unjudged = ~applies.any(1) | (applies & ~judged).any(1)
    if label is not None:
        unjudged |= ~judged[:, label]
    outcomes = (rewards_per_func * weights).nansum(1).masked_fill(unjudged, torch.nan)
    return outcomes, applies
