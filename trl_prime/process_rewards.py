"""From log-probabilities to process rewards (PRIME, arXiv 2502.01456, section 2.1 and Eq 3).

Covered: the token reward beta * (log pi_phi - log pi_ref), its sum over steps, turns or whole completions, and its
normalisation, as published and by groups and turns. Not covered: baselines and returns (`advantages.py`), and where the
log-probabilities come from (`implicit_prm`). All functions are pure and vectorised; B = completions, T = completion tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

GRANULARITIES = ("token", "step", "turn", "whole")
NORMALIZATIONS = ("none", "batch_norm", "std", "group_std", "softmax")


def implicit_process_rewards(
    prm_logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor, beta: float
) -> torch.Tensor:
    """
    Process reward of every token, Eq 3: `beta * (log pi_phi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t))`.

    Args:
        prm_logps (`torch.Tensor`): `(B, T)` log-probabilities in nats under the implicit PRM.
        ref_logps (`torch.Tensor`): `(B, T)` log-probabilities in nats under the reference.
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.
        beta (`float`): Reward scale, in reward per nat. Must be positive.

    Returns:
        `torch.Tensor`: `(B, T)` rewards (log-odds of a right outcome), zero where masked, at least float32.
        Differentiable in both log-probabilities.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}, but the reward scale must be positive. The paper uses 0.05.")
    log_ratios = prm_logps - ref_logps
    if log_ratios.dtype in (torch.float16, torch.bfloat16):
        log_ratios = prm_logps.float() - ref_logps.float()
    return (beta * log_ratios).masked_fill(~mask.bool(), 0.0)


def split_steps(token_texts: Sequence[str], delimiter: str) -> list[int]:
    """
    Number the reasoning steps of one completion: the delimiter belongs to the step that it ends.

    Repeated delimiters (a blank line) end one step, not two. The delimiter may span tokens.

    Args:
        token_texts (`Sequence[str]`): The T tokens of one completion as text.
        delimiter (`str`): What ends a step, for instance a newline.

    Returns:
        `list[int]`: T step numbers, from 0, non-decreasing.
    """
    text = "".join(token_texts)
    step_ends = [match.end() for match in re.finditer(f"(?:{re.escape(delimiter)})+", text)]
    steps, step, position = [], 0, 0
    for token_text in token_texts:
        while step < len(step_ends) and position >= step_ends[step]:
            step += 1
        steps.append(step)
        position += len(token_text)
    return steps


def turn_ids(mask: torch.Tensor) -> torch.Tensor:
    """
    Number the turns of completions. A turn is a run of tokens that the policy wrote, between those of tools or of an
    environment.

    Args:
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.

    Returns:
        `torch.Tensor`: `(B, T)` turn numbers, from 0, non-decreasing. A token that the policy did not write has the number of
        the turn before it.
    """
    mask = mask.bool()
    starts = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
    return (starts.cumsum(-1) - 1).clamp(min=0)


def _unit_ids(mask: torch.Tensor, granularity: str, step_ids: torch.Tensor | None) -> torch.Tensor:
    """`(B, T)` number of the unit (token, step, turn or completion) that a token belongs to."""
    if granularity == "token":
        return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    if granularity == "whole":
        return torch.zeros_like(mask, dtype=torch.long)
    if granularity == "turn":
        return turn_ids(mask)
    if granularity == "step":
        if step_ids is None:
            raise ValueError("granularity is 'step', which needs `step_ids`, but none were given.")
        return step_ids.to(mask.device)
    raise ValueError(f"granularity is {granularity!r}; choose one of {GRANULARITIES}.")


def reward_positions(mask: torch.Tensor, granularity: str, step_ids: torch.Tensor | None = None) -> torch.Tensor:
    """
    Where the process rewards of a granularity sit: on the last unmasked token of each token, step, turn or
    completion.

    Args:
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.
        granularity (`str`): `"token"`, `"step"`, `"turn"` or `"whole"`.
        step_ids (`torch.Tensor`, *optional*): `(B, T)` non-decreasing step numbers, needed for `"step"`.

    Returns:
        `torch.Tensor`: `(B, T)` bool.
    """
    mask = mask.bool()
    unit_ids = _unit_ids(mask, granularity, step_ids)
    next_unit = torch.nn.functional.pad(unit_ids, (0, 1), value=-1).gather(1, next_unmasked(mask))
    return mask & (next_unit != unit_ids)


def next_unmasked(mask: torch.Tensor) -> torch.Tensor:
    """
    Where the next unmasked token after each token is.

    Args:
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.

    Returns:
        `torch.Tensor`: `(B, T)` indices; T where there is none.
    """
    num_tokens = mask.shape[1]
    index = torch.arange(num_tokens, device=mask.device).expand(mask.shape).masked_fill(~mask.bool(), num_tokens)
    next_index = torch.nn.functional.pad(index[:, 1:], (0, 1), value=num_tokens)
    return next_index.flip(-1).cummin(-1).values.flip(-1) if num_tokens else next_index


def aggregate_process_rewards(
    rewards: torch.Tensor, mask: torch.Tensor, granularity: str, step_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Sum token rewards over tokens, steps, turns or whole completions; each sum sits at its `reward_positions`.

    Args:
        rewards (`torch.Tensor`): `(B, T)` token rewards.
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.
        granularity (`str`): `"token"` leaves the rewards as they are, `"step"` sums each step, `"turn"` each run of
            unmasked tokens, `"whole"` the completion.
        step_ids (`torch.Tensor`, *optional*): `(B, T)` non-decreasing step numbers, needed for `"step"`.

    Returns:
        `torch.Tensor`: `(B, T)`, zero elsewhere. The sum over a completion is the same for every granularity.
    """
    positions = reward_positions(mask, granularity, step_ids)
    rewards = rewards.masked_fill(~mask.bool(), 0.0)
    if granularity == "token":
        return rewards
    unit_ids = _unit_ids(mask, granularity, step_ids)
    num_units = int(unit_ids.max()) + 1 if unit_ids.numel() else 1
    sums = rewards.new_zeros(rewards.shape[0], num_units).scatter_add(1, unit_ids, rewards)
    return sums.gather(1, unit_ids).masked_fill(~positions, 0.0)


# Rows that `discounted_returns` processes at once
_ROWS_AT_ONCE = 256


def discounted_returns(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """
    Discounted reward-to-go, the sum over s >= t of `gamma^(s-t) * rewards_s` (Eq 5).

    Time is counted in unmasked positions, so tokens between two positions share the return of the later one: tool output
    does not discount, and with step rewards every token of a step is credited with its own step in full.

    Args:
        rewards (`torch.Tensor`): `(B, T)` rewards.
        mask (`torch.Tensor`): `(B, T)`, non-zero where a reward sits. Rewards elsewhere are ignored.
        gamma (`float`): Discount between 0 and 1 from one position to the next.

    Returns:
        `torch.Tensor`: `(B, T)`.
    """
    if len(rewards) > _ROWS_AT_ONCE:
        # In parts that fit into a processor's cache
        parts = zip(rewards.split(_ROWS_AT_ONCE), mask.split(_ROWS_AT_ONCE), strict=True)
        return torch.cat([discounted_returns(*part, gamma) for part in parts])
    mask = mask.bool()
    returns = rewards.masked_fill(~mask, 0.0)
    if gamma == 1.0 or not returns.numel():
        return returns.flip(-1).cumsum(-1).flip(-1)
    num_rows, num_tokens = returns.shape
    # Positions side by side, so that all have the same discount: number of the first position from t on
    number = mask.cumsum(-1) - mask.long()
    size = max(math.isqrt(num_tokens), 1)
    num_blocks = num_tokens // size + 1
    blocks = returns.new_zeros(num_rows, num_blocks * size).scatter_add(1, number, returns)
    blocks = blocks.view(num_rows, num_blocks, size)
    # Within a block, and from the heads of the blocks after it: two products with gamma^(s-t) in the place of T steps
    later = blocks[:, :, 0].new_zeros(num_rows, num_blocks + 1)
    blocks = blocks @ _discounts(size, gamma, returns)
    later[:, :-1] = blocks[:, :, 0] @ _discounts(num_blocks, gamma**size, returns)
    until_end = gamma ** torch.arange(size, 0, -1, device=returns.device, dtype=returns.dtype)
    return (blocks + later[:, 1:, None] * until_end).view(num_rows, -1).gather(1, number)


def _discounts(size: int, gamma: float, like: torch.Tensor) -> torch.Tensor:
    """`(size, size)`: `gamma^(s-t)` in row s and column t for s >= t, else zero."""
    distance = torch.arange(size, device=like.device)[:, None] - torch.arange(size, device=like.device)
    discounts = gamma ** distance.clamp(min=0).to(like.dtype)
    return discounts.masked_fill(distance < 0, 0.0)


def normalize_process_rewards(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    method: str,
    eps: float = 1e-2,
    gamma: float = 1.0,
    *,
    outcomes: torch.Tensor | None = None,
    num_generations: int | None = None,
) -> torch.Tensor:
    """
    Scale the process rewards of a whole batch (of all processes: a scale per rank would differ between ranks, and a group
    may be spread over several).

    Args:
        rewards (`torch.Tensor`): `(B, T)` process rewards.
        mask (`torch.Tensor`): `(B, T)`, non-zero where a reward sits and counts for the scale.
        method (`str`):
            `"none"`: as they are. `"batch_norm"`: divide by the largest absolute reward-to-go of the batch, as both
            published implementations do. `"std"`: divide by the standard deviation of the reward-to-go, taken after the
            mean reward is subtracted (as the baseline will do). `"group_std"`: the same over each group by itself, which
            with turns and `gamma` 0 is the scale of iStar (arXiv 2509.19199). `"softmax"`: the outcome of each completion,
            shared out over its rewards by their softmax, which is ITPO (arXiv 2603.23550).
        eps (`float`): Scale, in units of reward (log-odds), below which rewards count as noise: the result then falls with
            the square of the scale. At the first step the PRM equals its reference and what its rewards hold is rounding,
            which must not be blown up to unit size. Without effect for `"none"` and `"softmax"`.
        gamma (`float`): Discount of the reward-to-go.
        outcomes (`torch.Tensor`, *optional*): `(B,)` outcome rewards, needed for `"softmax"`. NaN = could not be judged:
            nothing is shared out.
        num_generations (`int`, *optional*): K, rows of a group, needed for `"group_std"`. B is a multiple of it, groups are
            contiguous.

    Returns:
        `torch.Tensor`: `(B, T)`.
    """
    if method == "none":
        return rewards
    mask = mask.bool()
    if not mask.any():
        return rewards
    if method == "softmax":
        if outcomes is None:
            raise ValueError("method is 'softmax', which needs `outcomes`, but none were given.")
        shares = rewards.masked_fill(~mask, -torch.inf).softmax(-1)
        return (shares * outcomes.to(rewards)[:, None]).masked_fill(~mask | outcomes.isnan()[:, None], 0.0)
    if method == "batch_norm":
        scale = discounted_returns(rewards, mask, gamma)[mask].abs().amax()
    elif method == "std":
        centred = rewards - rewards[mask].mean()
        scale = discounted_returns(centred, mask, gamma)[mask].std(unbiased=False)
    elif method == "group_std":
        if num_generations is None:
            raise ValueError("method is 'group_std', which needs `num_generations`, but it was not given.")
        scale = _group_std(rewards, mask, gamma, num_generations)[:, None]
    else:
        raise ValueError(f"method is {method!r}; choose one of {NORMALIZATIONS}.")
    return rewards * (scale / scale.clamp(min=eps) ** 2)


def _group_std(rewards: torch.Tensor, mask: torch.Tensor, gamma: float, num_generations: int) -> torch.Tensor:
    """`(B,)` standard deviation over the group of the centred reward-to-go; zero for a group without rewards."""

    def group_mean(values: torch.Tensor) -> torch.Tensor:
        count = mask.view(-1, num_generations * mask.shape[1]).sum(1)
        total = values.masked_fill(~mask, 0.0).reshape(len(count), -1).sum(1)
        return (total / count.clamp(min=1)).repeat_interleave(num_generations)[:, None]

    returns = discounted_returns(rewards - group_mean(rewards), mask, gamma)
    return group_mean((returns - group_mean(returns)) ** 2).sqrt().squeeze(1)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """
    Pearson correlation of two vectors.

    Args:
        first, second (`torch.Tensor`): `(n,)`.

    Returns:
        `float`: between -1 and 1; NaN if one of them is constant or has fewer than two values.
    """
    first, second = (values.double() - values.double().mean() for values in (first, second))
    norms = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    return (first @ second / norms).item() if norms > 0 else float("nan")
