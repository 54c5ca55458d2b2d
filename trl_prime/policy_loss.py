"""TRL's policy loss, told about advantages that differ from token to token and rows that teach nothing.

Covered: one advantage for a completion where TRL decides by completion, and a scale of the loss that does not depend on how
many rows were left out. Not covered: the loss itself (TRL) and advantages (`advantages.py`). B = completions, T = completion
tokens. All functions are pure.
"""

from __future__ import annotations

import torch

# TRL's losses that are sums or means over tokens. All others are means over the rows of a micro-batch, in which a row
# without tokens counts as zero.
TOKEN_LOSSES = ("bnpo", "cispo", "dapo", "vespo")


def sequence_advantages(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The advantage of a completion as a whole: the mean over its unmasked tokens.

    Args:
        advantages (`torch.Tensor`): `(B, T)`, or `(B, 1)` where there is one for each completion.
        mask (`torch.Tensor`): `(B, T)`, non-zero where the loss counts the token.

    Returns:
        `torch.Tensor`: `(B, 1)`; zero for a completion without tokens.
    """
    mask = mask.to(advantages.dtype)
    return (advantages * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def vary_within_rows(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Which completions have advantages that differ between their tokens by more than rounding.

    Args:
        advantages (`torch.Tensor`): `(B, T)`.
        mask (`torch.Tensor`): `(B, T)`, non-zero where the loss counts the token.

    Returns:
        `torch.Tensor`: `(B,)` bool.
    """
    mean = sequence_advantages(advantages, mask)
    return (((advantages - mean).abs() > 1e-4 * mean.abs() + 1e-6) & mask.bool()).any(1)


def loss_scales(
    mask: torch.Tensor, rows_per_trained_row: torch.Tensor, loss_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Two factors that make the loss of a batch with rows left out that of a batch which never had them.

    Each micro-batch weighs as much as its share of the rows that are trained on, so that the weights of a generation batch
    have the mean 1, and a micro-batch without such a row adds nothing: neither an entropy bonus nor a router's auxiliary loss.
    Where TRL takes the mean over all rows of a micro-batch, the second factor makes it the mean over those that are trained on.

    Args:
        mask (`torch.Tensor`): `(B, T)` of a micro-batch, non-zero where the loss counts the token.
        rows_per_trained_row (`torch.Tensor`): Scalar, rows of the generation batch for each one that is trained on, over all
            processes.
        loss_type (`str`): Policy loss, as TRL names it.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: scalars, the weight of the micro-batch's loss, and a factor of its policy and KL
        terms beside that.
    """
    num_rows, num_trained = mask.shape[0], mask.any(1).sum()
    weight = rows_per_trained_row * num_trained / num_rows
    return weight, torch.ones_like(weight) if loss_type in TOKEN_LOSSES else num_rows / num_trained.clamp(min=1)
