"""Outcome and process rewards combined into advantages (PRIME, arXiv 2502.01456, section 3.2, Eq 5, 7 and 8).

Covered: every estimator of the paper, the published code's variant of RLOO, whitening, and the hook through which a user
replaces all of it. Not covered: process rewards themselves (`process_rewards.py`), the returns of GAE and the loss of a value
model (`values.py`), the policy loss (TRL). B = completions, T = completion tokens, K = `num_generations`; groups are contiguous.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .process_rewards import discounted_returns
from .values import value_targets

ESTIMATORS = ("rloo", "rloo_reference_code", "grpo", "reinforce", "reinforce_plus_plus", "value")
# These need values beside the rewards, by a model that is trained along
VALUE_MODEL_ESTIMATORS = ("gae",)

# Spreads below these are rounding, not signal, and are not scaled up. Outcomes and advantages are of order one; the score
# of a completion, its process rewards summed, says something from 0.01 log-odds on.
_OUTCOME_STD_FLOOR = 1e-4
_SCORE_STD_FLOOR = 1e-2
_ADVANTAGE_STD_FLOOR = 1e-3


def _peer_mean(values: torch.Tensor, valid: torch.Tensor, num_generations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B,)` mean over the other valid rows of the group, and `(B,)` whether there was any."""
    values = values.masked_fill(~valid, 0.0).view(-1, num_generations)
    valid = valid.view(-1, num_generations).to(values.dtype)
    num_peers = valid.sum(1, keepdim=True) - valid
    mean = (values.sum(1, keepdim=True) - values) / num_peers.clamp(min=1)
    return mean.flatten(), (num_peers > 0).flatten()


def _group_mean_std(
    values: torch.Tensor, valid: torch.Tensor, num_generations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B,)` mean and unbiased standard deviation over the valid rows of each group."""
    values = values.masked_fill(~valid, 0.0).view(-1, num_generations)
    valid = valid.view(-1, num_generations).to(values.dtype)
    count = valid.sum(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    variance = ((values - mean) ** 2 * valid).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return mean.expand_as(values).flatten(), variance.sqrt().expand_as(values).flatten()


def whiten_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Zero mean and unit variance over the unmasked tokens of the batch; zero where masked. A standard deviation below 1e-3 is
    not scaled up to one.

    Args:
        values (`torch.Tensor`): `(B, T)`.
        mask (`torch.Tensor`): `(B, T)` bool.

    Returns:
        `torch.Tensor`: `(B, T)`.
    """
    count = mask.sum().to(values.dtype)
    if count < 2:
        return torch.zeros_like(values)
    unused = ~mask
    centred = (values - values.masked_fill(unused, 0.0).sum() / count).masked_fill_(unused, 0.0)
    scale = (torch.linalg.vector_norm(centred) / count.sqrt()).clamp(min=_ADVANTAGE_STD_FLOOR)
    return centred.div_(scale)


def advantage_terms(
    outcome_rewards: torch.Tensor,
    process_rewards: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    *,
    estimator: str = "rloo",
    outcome_weight: float = 1.0,
    process_weight: float = 1.0,
    outcome_gamma: float = 1.0,
    process_gamma: float = 1.0,
    reward_mask: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    gae_lambda: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The two terms of the advantage, weighted, before whitening. Arguments as in [`combine_rewards`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the outcome term, the process term, both `(B, T)` and zero where
        the third, the `(B, T)` bool mask of tokens that have an advantage, is false.
    """
    known = (*ESTIMATORS, *VALUE_MODEL_ESTIMATORS)
    if estimator not in known:
        raise ValueError(f"estimator is {estimator!r}; choose one of {known}.")
    if estimator in VALUE_MODEL_ESTIMATORS and values is None:
        raise ValueError(f"estimator is {estimator!r}, which needs `values`, but none were given.")
    num_rows = outcome_rewards.shape[0]
    if num_rows % num_generations:
        raise ValueError(f"{num_rows} completions cannot be split into groups of num_generations={num_generations}.")
    if process_rewards.shape != completion_mask.shape or completion_mask.shape[0] != num_rows:
        raise ValueError(
            f"Shapes do not agree: outcome_rewards {tuple(outcome_rewards.shape)}, process_rewards "
            f"{tuple(process_rewards.shape)}, completion_mask {tuple(completion_mask.shape)}."
        )
    mask = completion_mask.bool()
    positions = mask if reward_mask is None else reward_mask.bool() & mask
    dtype = torch.promote_types(process_rewards.dtype, torch.float32)
    outcomes, process = outcome_rewards.to(dtype), process_rewards.to(dtype)

    judged = ~outcomes.isnan()
    outcomes = outcomes.masked_fill(~judged, 0.0)
    # A completion without tokens has no mean process reward: it counts in the outcome's baseline only
    has_process = judged & positions.any(dim=1)
    process = process.masked_fill(~(positions & judged[:, None]), 0.0)
    mean_process = process.sum(1) / positions.sum(1).clamp(min=1)

    if estimator in ("rloo", "rloo_reference_code", "grpo"):
        outcome_baseline, has_peers = _peer_mean(outcomes, judged, num_generations)
        process_baseline, has_process_peers = _peer_mean(mean_process, has_process, num_generations)
        # A completion whose peers could not be judged has nothing to be compared with
        contributes = judged & has_peers
        process_contributes = has_process & has_process_peers
        if estimator == "grpo":
            mean, std = _group_mean_std(outcomes, judged, num_generations)
            outcome_advantages = (outcomes - mean) / std.clamp(min=_OUTCOME_STD_FLOOR)
            mean, std = _group_mean_std(mean_process, has_process, num_generations)
            # `std` is that of a mean over positions, hence the floor of a score over their number. Below it the term falls
            # with the square, as in `normalize_process_rewards`: a sum over thousands of tokens would bring noise back.
            num_positions = (positions & has_process[:, None]).sum() / has_process.sum().clamp(min=1)
            floor = _SCORE_STD_FLOOR / num_positions.clamp(min=1).to(dtype)
            centred = (process - mean[:, None]) * (std / torch.maximum(std, floor) ** 2)[:, None]
        else:
            outcome_advantages = outcomes - outcome_baseline
            centred = process - process_baseline[:, None]
            if estimator == "rloo_reference_code":
                # Both code bases compute r_t * K/(K-1) - sum_j rbar_j/(K-1): this much more than Eq 5
                num_valid = has_process.view(-1, num_generations).sum(1).repeat_interleave(num_generations)
                excess = (process - mean_process[:, None]) / (num_valid - 1).clamp(min=1)[:, None]
                centred = centred + excess
        process_advantages = discounted_returns(centred, positions, process_gamma)
    else:
        contributes = judged
        process_contributes = has_process
        outcome_advantages = outcomes
        if estimator == "gae":
            gammas = {"outcome_gamma": outcome_gamma, "process_gamma": process_gamma}
            values = values.to(dtype)
            targets = value_targets(outcomes, process, values, mask, positions, gae_lambda=gae_lambda, **gammas)
            outcome_advantages, process_advantages = (targets - values).unbind(-1)
        elif estimator == "value":
            # v_phi(y_<t), the process reward collected before t, in the place of a value model
            process_advantages = process - process.cumsum(-1)
        else:
            process_advantages = discounted_returns(process, positions, process_gamma)

    active = mask & contributes[:, None]
    outcome_advantages = outcome_weight * outcome_advantages
    if estimator != "gae":
        outcome_advantages = outcome_advantages[:, None].expand_as(process)
        if outcome_gamma != 1.0:
            tokens_left = mask.flip(-1).cumsum(-1).flip(-1) - mask.long()
            outcome_advantages = outcome_advantages * outcome_gamma ** tokens_left.to(dtype)
    outcome_term = torch.where(active, outcome_advantages, 0.0)
    process_term = (process_weight * process_advantages).masked_fill_(~(active & process_contributes[:, None]), 0.0)
    return outcome_term, process_term, active


def combine_rewards(
    outcome_rewards: torch.Tensor,
    process_rewards: torch.Tensor,
    completion_mask: torch.Tensor,
    num_generations: int,
    *,
    estimator: str = "rloo",
    outcome_weight: float = 1.0,
    process_weight: float = 1.0,
    outcome_gamma: float = 1.0,
    process_gamma: float = 1.0,
    whiten: bool = True,
    reward_mask: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    gae_lambda: float = 1.0,
) -> torch.Tensor:
    """
    Advantage of every token from the outcome reward of each completion and its process rewards.

    Args:
        outcome_rewards (`torch.Tensor`): `(B,)`; NaN = could not be judged: in no baseline, and without advantage.
        process_rewards (`torch.Tensor`): `(B, T)`.
        completion_mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.
        num_generations (`int`): K, completions per prompt. B is a multiple of it, groups are contiguous.
        estimator (`str`):
            `"rloo"` (Eq 5): leave-one-out baselines; of the process reward, the mean per token of the peers.
            `"rloo_reference_code"`: as the published code computes it, (r_t - mean_t r_t) / (K - 1) more than Eq 5.
            `"grpo"` (Eq 7): centred by the mean and divided by the (unbiased) standard deviation of the group.
            `"reinforce"` (Eq 8): no baseline. `"reinforce_plus_plus"` (arXiv 2501.03262): the same, always whitened.
            `"value"` (section 5.4): outcome minus the process reward collected so far, which stands in for a value.
            `"gae"`: generalised advantage estimation (arXiv 1506.02438) of each source of reward, with `values`.
        outcome_weight (`float`): Factor of the outcome term.
        process_weight (`float`): Factor of the process term.
        outcome_gamma (`float`): Discount of the outcome per token before the end.
        process_gamma (`float`): Discount of process rewards per reward position; 0 = immediate credit. Without effect for
            `"value"`.
        whiten (`bool`): Zero mean and unit variance over the tokens of the batch.
        reward_mask (`torch.Tensor`, *optional*): `(B, T)`, where process rewards sit, see
            [`~trl_prime.process_rewards.reward_positions`]. Baselines are means over these positions, so that with whole
            completions the baseline is the mean of the peers' sums. Defaults to `completion_mask`.
        values (`torch.Tensor`, *optional*): `(B, T, 2)`, of the outcome and of the process rewards that are to come, before each
            token was written. Needed for `"gae"`.
        gae_lambda (`float`): How far GAE trusts rewards rather than values, from 0 to 1, see
            [`~trl_prime.values.lambda_returns`].

    Returns:
        `torch.Tensor`: `(B, T)` advantages, zero where masked, for rows that could not be judged and, with baselines of peers,
        for rows that have no judged peer.
    """
    terms = advantage_terms(
        outcome_rewards,
        process_rewards,
        completion_mask,
        num_generations,
        estimator=estimator,
        outcome_weight=outcome_weight,
        process_weight=process_weight,
        outcome_gamma=outcome_gamma,
        process_gamma=process_gamma,
        reward_mask=reward_mask,
        values=values,
        gae_lambda=gae_lambda,
    )
    return add_terms(*terms, whiten=_whitens(whiten, estimator))


def _whitens(whiten: bool, estimator: str) -> bool:
    return whiten or estimator == "reinforce_plus_plus"


def add_terms(
    outcome_term: torch.Tensor, process_term: torch.Tensor, active: torch.Tensor, *, whiten: bool = True
) -> torch.Tensor:
    """
    The advantages that two terms add up to. The memory of `process_term` is used for them.

    Args:
        outcome_term, process_term, active (`torch.Tensor`): as returned by [`advantage_terms`].
        whiten (`bool`): Zero mean and unit variance over the tokens of the batch.

    Returns:
        `torch.Tensor`: `(B, T)`.
    """
    advantages = process_term.add_(outcome_term)
    return whiten_tokens(advantages, active) if whiten else advantages


def process_variance_share(outcome_term: torch.Tensor, process_term: torch.Tensor, active: torch.Tensor) -> float:
    """
    Share of the advantages' variance that comes from process rewards: 0 = outcomes only, 1 = process rewards only.

    Args:
        outcome_term, process_term, active (`torch.Tensor`): as returned by [`advantage_terms`].

    Returns:
        `float`: between 0 and 1; NaN where there are no advantages.
    """
    if active.sum() < 2:
        return float("nan")
    outcome_variance = outcome_term[active].var().item()
    process_variance = process_term[active].var().item()
    total = outcome_variance + process_variance
    return process_variance / total if total > 0 else float("nan")


@dataclasses.dataclass(frozen=True)
class RolloutRewards:
    """
    What a reward-combination hook gets: the rewards of one generation batch, of all processes, and their rollouts.

    Attributes:
        outcome_rewards (`torch.Tensor`): `(B,)`; NaN = could not be judged, or the prompt filter dropped the group.
        process_rewards (`torch.Tensor`): `(B, T)`, after granularity and normalisation.
        completion_mask (`torch.Tensor`): `(B, T)` bool, true where the policy wrote the token, in rows that are trained on.
        reward_mask (`torch.Tensor`): `(B, T)` bool, true where a process reward sits.
        num_generations (`int`): K; groups are contiguous.
        settings (`dict`): The keyword arguments of [`combine_rewards`] as configured, with `process_weight` already
            multiplied by the trust in the PRM.
        outcome_rewards_per_func (`torch.Tensor`): `(B, n_funcs)`, before weights; NaN = None.
        reward_func_names (`list[str]`): Names of those columns.
        completion_ids (`torch.Tensor`): `(B, T)` token ids.
        prompts (`list`): B prompts, text or messages.
        completions (`list`): B completions, text or messages.
        trainer_state ([`~transformers.TrainerState`]): Step, epoch and log history.
        values (`torch.Tensor`): `(B, T, 2)` by the value model, with an estimator that needs one.
    """

    outcome_rewards: torch.Tensor
    process_rewards: torch.Tensor
    completion_mask: torch.Tensor
    reward_mask: torch.Tensor
    num_generations: int
    settings: dict[str, Any]
    outcome_rewards_per_func: torch.Tensor | None = None
    reward_func_names: Sequence[str] = ()
    completion_ids: torch.Tensor | None = None
    prompts: Sequence[Any] = ()
    completions: Sequence[Any] = ()
    trainer_state: Any = None
    values: torch.Tensor | None = None

    def combine(self, **changes: Any) -> torch.Tensor:
        """
        `(B, T)` advantages by [`combine_rewards`] as configured. `changes` replace any of its arguments, so that a hook
        can alter one thing and keep the rest.
        """
        return combine_rewards(**{**self._arguments(), **changes})

    def combine_with_share(self) -> tuple[torch.Tensor, float]:
        """`(B, T)` advantages as configured, and the share of process rewards in them, see [`process_variance_share`]."""
        arguments = self._arguments()
        whiten = _whitens(arguments.pop("whiten"), arguments["estimator"])
        terms = advantage_terms(**arguments)
        share = process_variance_share(*terms)
        return add_terms(*terms, whiten=whiten), share

    def value_targets(self, gae_lambda: float) -> torch.Tensor:
        """`(B, T, 2)` by [`~trl_prime.values.value_targets`]: what the value model is trained on, with the lambda of GAE."""
        return value_targets(
            self.outcome_rewards,
            self.process_rewards,
            self.values,
            self.completion_mask,
            self.reward_mask,
            outcome_gamma=self.settings["outcome_gamma"],
            process_gamma=self.settings["process_gamma"],
            gae_lambda=gae_lambda,
        )

    def _arguments(self) -> dict[str, Any]:
        return {
            "outcome_rewards": self.outcome_rewards,
            "process_rewards": self.process_rewards,
            "completion_mask": self.completion_mask,
            "num_generations": self.num_generations,
            "reward_mask": self.reward_mask,
            "values": self.values,
            **self.settings,
        }


RewardCombination = Callable[[RolloutRewards], torch.Tensor]
