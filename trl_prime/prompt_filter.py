"""The online prompt filter, which chooses the groups that are worth learning from (PRIME, arXiv 2502.01456, section 3.3).

Covered: the accuracy band, the spread within a group, truncated completions, and which groups make up a training batch. Not
covered: that rows of groups that failed carry no gradient (`prime_trainer.py`).
"""

from __future__ import annotations

import torch


def select_groups(
    outcome_rewards: torch.Tensor,
    num_generations: int,
    *,
    low: float = 0.2,
    high: float = 0.8,
    truncated: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Keep the prompts of middling difficulty: mean outcome within `[low, high]` and not the same for all completions.

    A mean inside the band does not make a group informative when outcomes are partial (every completion passes half of the
    tests), so completions that all got the same outcome are dropped as well. The full band `[0, 1]` turns the filter off.

    Args:
        outcome_rewards (`torch.Tensor`): `(B,)` outcomes between 0 and 1, groups contiguous; NaN = could not be judged,
            left out of the mean.
        num_generations (`int`): K, the completions of a group.
        low (`float`): Lowest mean outcome to keep, inclusive.
        high (`float`): Highest mean outcome to keep, inclusive.
        truncated (`torch.Tensor`, *optional*): `(B,)` bool. Groups with a truncated completion are dropped.

    Returns:
        `torch.Tensor`: `(G,)` bool, G = B / K.
    """
    if low >= high:
        raise ValueError(f"The accuracy band is [{low}, {high}], but its low end must be below its high end.")
    groups = outcome_rewards.view(-1, num_generations)
    judged = ~groups.isnan()
    keep = judged.any(dim=1)
    if low > 0 or high < 1:
        mean = groups.nan_to_num().sum(1) / judged.sum(1).clamp(min=1)
        spread = groups.masked_fill(~judged, -torch.inf).amax(1) - groups.masked_fill(~judged, torch.inf).amin(1)
        # Means of float32 outcomes are off by rounding: 0.2 must pass a band that starts at 0.2
        tolerance = 1e-6
        keep &= (mean >= low - tolerance) & (mean <= high + tolerance) & (spread > tolerance)
    if truncated is not None:
        keep &= ~truncated.view(-1, num_generations).any(dim=1)
    return keep


def rows_to_train_on(passed: torch.Tensor, num_groups: int, num_generations: int) -> torch.Tensor:
    """
    Rows of the generated batch that make up the training batch: whole groups in their order, those that passed first.

    Args:
        passed (`torch.Tensor`): `(G,)` bool, as [`select_groups`] returns it.
        num_groups (`int`): Groups of the training batch, at most G. Where fewer passed, others fill it up.
        num_generations (`int`): K.

    Returns:
        `torch.Tensor`: `(num_groups * K,)` places, rising.
    """
    order = torch.cat([passed.nonzero().flatten(), (~passed).nonzero().flatten()])[:num_groups].sort().values
    offsets = torch.arange(num_generations, device=order.device)
    return (order[:, None] * num_generations + offsets).flatten()
