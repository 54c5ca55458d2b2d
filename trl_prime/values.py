"""Values of states: what they are to be, the loss that brings a value model there, and how much they explain.

PRIME has two sources of reward, and so a state has two values: the outcome, and the process rewards, that are still to come. The
last dimension of values and returns holds them in this order, see [`SOURCES`].

Covered: lambda-returns of generalised advantage estimation (GAE, arXiv 1506.02438), PPO's clipped value loss, explained variance.
Not covered: the advantages themselves (`advantages.py`), and the model that gives the values (`value_model/`). All functions are
pure and vectorised; B = completions, T = completion tokens.
"""

from __future__ import annotations

import torch

from .process_rewards import discounted_returns, next_unmasked, reward_positions

# What a value model gives a value of, in the order of its outputs
SOURCES = ("outcome", "process")


def lambda_returns(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> torch.Tensor:
    """
    Lambda-returns: advantage by GAE plus value. With the value V of the next token that the policy wrote (0 at the end),

        R_t = r_t + gamma * ((1 - lambda) * V_next + lambda * R_next)

    at a reward position, and the return of the next position elsewhere. Time is counted in reward positions, as in
    [`~trl_prime.process_rewards.discounted_returns`]. Where every token is one, R_t - V_t is the sum over k of
    `(gamma * lambda)^k * delta_(t+k)`, with the TD errors `delta_t = r_t + gamma * V_next - V_t` (Eq 16 of arXiv 1506.02438).

    Args:
        rewards (`torch.Tensor`): `(B, T)` rewards.
        values (`torch.Tensor`): `(B, T)`, of the state before each token was written.
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.
        positions (`torch.Tensor`): `(B, T)`, non-zero where a reward sits; a part of `mask`.
        gamma (`float`): Discount from one position to the next, between 0 and 1.
        gae_lambda (`float`): Between 0 (one reward and the next value) and 1 (all rewards and no value).

    Returns:
        `torch.Tensor`: `(B, T)`; without meaning where masked.
    """
    if gae_lambda < 1.0 and gamma > 0.0:
        values = values.masked_fill(~mask.bool(), 0.0)
        # One column more, which is what follows the last token
        next_values = torch.nn.functional.pad(values, (0, 1)).gather(1, next_unmasked(mask))
        rewards = rewards + gamma * (1.0 - gae_lambda) * next_values
    return discounted_returns(rewards, positions, gamma * gae_lambda)


def value_targets(
    outcome_rewards: torch.Tensor,
    process_rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    reward_mask: torch.Tensor,
    *,
    outcome_gamma: float,
    process_gamma: float,
    gae_lambda: float,
) -> torch.Tensor:
    """
    What both values are to be: the lambda-returns of either source of reward, without its weight. The outcome sits on the last
    token that the policy wrote, and is discounted by token.

    Args:
        outcome_rewards (`torch.Tensor`): `(B,)`; NaN = could not be judged, and counts as 0.
        process_rewards (`torch.Tensor`): `(B, T)`.
        values (`torch.Tensor`): `(B, T, 2)`, of the state before each token was written.
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.
        reward_mask (`torch.Tensor`): `(B, T)`, where process rewards sit; a part of `mask`.
        outcome_gamma, process_gamma (`float`): Discounts.
        gae_lambda (`float`): That of GAE.

    Returns:
        `torch.Tensor`: `(B, T, 2)`; without meaning where masked.
    """
    mask = mask.bool()
    outcomes = outcome_rewards.nan_to_num(0.0).to(values.dtype)[:, None] * reward_positions(mask, "whole")
    outcome_values, process_values = values.unbind(-1)
    return torch.stack(
        [
            lambda_returns(outcomes, outcome_values, mask, mask, outcome_gamma, gae_lambda),
            lambda_returns(process_rewards, process_values, mask, reward_mask, process_gamma, gae_lambda),
        ],
        dim=-1,
    )


def value_row_losses(
    values: torch.Tensor, old_values: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """
    PPO's value loss: half the squared error of a value, or of the value held within `clip_range` of what it was before the update,
    whichever is larger, summed over the tokens of a row and over the sources of reward.

    Args:
        values (`torch.Tensor`): `(B, T, S)` of the present model, with gradient.
        old_values (`torch.Tensor`): `(B, T, S)`, before the update.
        targets (`torch.Tensor`): `(B, T, S)`.
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.
        clip_range (`float`): 0 to not clip.

    Returns:
        `torch.Tensor`: `(B,)`; zero for a row without tokens.
    """
    errors = (values - targets) ** 2
    if clip_range:
        held = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (held - targets) ** 2)
    return 0.5 * errors.masked_fill(~mask.bool()[..., None], 0.0).sum((1, 2))


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """
    Share of the returns' variance that the values explain, `1 - var(returns - values) / var(returns)`: 1 = all, 0 = as much as a
    constant, below 0 = less than that.

    Args:
        values, returns (`torch.Tensor`): `(B, T)`.
        mask (`torch.Tensor`): `(B, T)`, non-zero where they count.

    Returns:
        `float`: NaN where the returns do not vary.
    """
    values, returns = values[mask.bool()].double(), returns[mask.bool()].double()
    if len(returns) < 2:
        return float("nan")
    variance = returns.var(unbiased=False)
    return (1 - (returns - values).var(unbiased=False) / variance).item() if variance > 1e-12 else float("nan")
