"""Lambda-returns, the value loss and explained variance against loops over tokens; GAE among the advantages."""

import math
import statistics

import pytest
import torch
from slow_reference import random_batch, spots

from trl_prime.advantages import RolloutRewards, advantage_terms, combine_rewards, whiten_tokens
from trl_prime.process_rewards import next_unmasked, reward_positions
from trl_prime.values import explained_variance, lambda_returns, value_row_losses, value_targets

GAMMAS = (0.0, 0.7, 1.0)


def slow_gae(rewards, values, mask, positions, gamma, lam):
    """Advantages by TD errors, from the last token of each row backwards; a place without a reward does not discount."""
    advantages = [[0.0] * len(row) for row in mask]
    for i, row in enumerate(mask):
        later = next_value = 0.0
        for t in reversed(spots(row)):
            if positions[i][t]:
                delta = rewards[i][t] + gamma * next_value - values[i][t]
                later = delta + gamma * lam * later
            else:
                later = next_value - values[i][t] + later
            advantages[i][t], next_value = later, values[i][t]
    return advantages


@pytest.fixture
def batch():
    """Seven rows with gaps, one of them without a token."""
    torch.manual_seed(0)
    mask = torch.rand(7, 12) < 0.6
    mask[3] = False
    mask[4] = True
    return {
        "outcomes": torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 1.0, 0.5], dtype=torch.float64),
        "rewards": torch.randn(7, 12, dtype=torch.float64),
        "values": torch.randn(7, 12, 2, dtype=torch.float64),
        "mask": mask,
        "steps": torch.randint(0, 2, (7, 12)).cumsum(1),
    }


def test_next_unmasked():
    mask = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert next_unmasked(mask).tolist() == [[1, 4, 4, 4, 5], [1, 5, 5, 5, 5], [5] * 5]


@pytest.mark.parametrize("granularity", ["token", "step", "turn", "whole"])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_lambda_returns_are_gae_and_value(batch, gamma, gae_lambda, granularity):
    values, mask = batch["values"][..., 0], batch["mask"]
    positions = reward_positions(mask, granularity, batch["steps"])
    given = (batch["rewards"], values, mask, positions)
    returns = lambda_returns(*given, gamma, gae_lambda)
    expected = torch.tensor(slow_gae(*(x.tolist() for x in given), gamma, gae_lambda), dtype=torch.float64)
    torch.testing.assert_close((returns - values)[mask], expected[mask])


def test_lambda_one_is_the_sum_of_rewards_and_lambda_zero_one_td_error(batch):
    rewards, values, mask = batch["rewards"], batch["values"][..., 0], batch["mask"]
    longest = lambda_returns(rewards, values, mask, mask, 1.0, 1.0)
    shortest = lambda_returns(rewards, values, mask, mask, 0.5, 0.0)
    for i, row in enumerate(mask.tolist()):
        own = spots(row)
        for t, after in zip(own, [*own, None][1:], strict=False):
            assert longest[i, t].item() == pytest.approx(sum(rewards[i, s].item() for s in own if s >= t))
            next_value = 0.0 if after is None else values[i, after].item()
            assert shortest[i, t].item() == pytest.approx(rewards[i, t].item() + 0.5 * next_value)


@pytest.mark.parametrize("gae_lambda", [0.4, 1.0])
def test_targets_are_the_outcome_at_the_last_token_and_the_process_rewards_at_theirs(batch, gae_lambda):
    mask, values = batch["mask"], batch["values"]
    positions = reward_positions(mask, "step", batch["steps"])
    outcomes = batch["outcomes"].clone()
    outcomes[5] = torch.nan
    gammas = {"outcome_gamma": 0.9, "process_gamma": 0.3}
    targets = value_targets(outcomes, batch["rewards"], values, mask, positions, gae_lambda=gae_lambda, **gammas)
    sparse = torch.zeros_like(batch["rewards"])
    for i, row in enumerate(mask.tolist()):
        if spots(row) and i != 5:
            sparse[i, spots(row)[-1]] = outcomes[i]
    for source, args in enumerate([(sparse, mask, 0.9), (batch["rewards"], positions, 0.3)]):
        rewards, at, gamma = args
        given = (rewards, values[..., source], mask, at)
        slow = torch.tensor(slow_gae(*(x.tolist() for x in given), gamma, gae_lambda), dtype=torch.float64)
        torch.testing.assert_close((targets - values)[..., source][mask], slow[mask])


# --- Among the advantages ---


def test_gae_terms_are_weighted_apart_and_whitened_together(batch):
    mask, positions = batch["mask"], reward_positions(batch["mask"], "step", batch["steps"])
    outcomes = batch["outcomes"].clone()
    outcomes[0] = torch.nan
    settings = {
        "estimator": "gae",
        "outcome_weight": 2.0,
        "process_weight": 0.5,
        "outcome_gamma": 0.9,
        "process_gamma": 0.3,
        "reward_mask": positions,
        "values": batch["values"],
        "gae_lambda": 0.4,
    }
    outcome_term, process_term, active = advantage_terms(outcomes, batch["rewards"], mask, 7, **settings)
    judged = torch.tensor([False, True, True, True, True, True, True])
    assert torch.equal(active, mask & judged[:, None])
    gammas = {"outcome_gamma": 0.9, "process_gamma": 0.3, "gae_lambda": 0.4}
    targets = value_targets(outcomes, batch["rewards"], batch["values"], mask, positions, **gammas)
    outcome_advantages, process_advantages = (targets - batch["values"]).unbind(-1)
    torch.testing.assert_close(outcome_term, (2.0 * outcome_advantages).masked_fill(~active, 0.0))
    torch.testing.assert_close(process_term, (0.5 * process_advantages).masked_fill(~active, 0.0))
    total = outcome_term + process_term
    for whiten, expected in ((False, total), (True, whiten_tokens(total, active))):
        combined = combine_rewards(outcomes, batch["rewards"], mask, 7, whiten=whiten, **settings)
        torch.testing.assert_close(combined, expected)


def test_with_values_of_zero_and_lambda_one_gae_is_reinforce(batch):
    settings = {"outcome_gamma": 0.9, "process_gamma": 0.8, "whiten": False}
    given = (batch["outcomes"], batch["rewards"], batch["mask"], 7)
    gae = combine_rewards(*given, estimator="gae", values=torch.zeros_like(batch["values"]), **settings)
    torch.testing.assert_close(gae, combine_rewards(*given, estimator="reinforce", **settings))


def test_gae_without_values_is_refused(batch):
    with pytest.raises(ValueError, match="needs `values`"):
        combine_rewards(batch["outcomes"], batch["rewards"], batch["mask"], 7, estimator="gae")


def test_the_rewards_of_a_batch_know_the_targets_of_its_values(batch):
    random = random_batch(0, 4)
    mask = torch.tensor(random.mask, dtype=torch.bool)
    rewards = RolloutRewards(
        torch.tensor(random.outcomes),
        torch.tensor(random.rewards),
        mask,
        mask,
        4,
        {"estimator": "gae", "outcome_gamma": 1.0, "process_gamma": 0.5, "gae_lambda": 0.4, "whiten": False},
        values=torch.randn(*mask.shape, 2),
    )
    targets = rewards.value_targets(gae_lambda=0.4)
    judged = mask & ~rewards.outcome_rewards.isnan()[:, None]
    torch.testing.assert_close(rewards.combine()[judged], (targets - rewards.values).sum(-1)[judged])


# --- Loss and explained variance ---


@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_value_loss_and_its_gradient(batch, clip_range):
    mask, old, targets = batch["mask"], batch["values"], torch.randn(7, 12, 2, dtype=torch.float64)
    values = (old + 0.3 * torch.randn(7, 12, 2, dtype=torch.float64)).requires_grad_()
    losses = value_row_losses(values, old, targets, mask, clip_range)
    losses.sum().backward()
    clipped = 0
    for i, row in enumerate(mask.tolist()):
        total = 0.0
        for t in range(12):
            for s in range(2):
                value, before, target = (x[i, t, s].item() for x in (values, old, targets))
                slope = 0.0
                if row[t]:
                    held = min(max(value, before - clip_range), before + clip_range) if clip_range else value
                    error, held_error = (value - target) ** 2, (held - target) ** 2
                    total += 0.5 * max(error, held_error)
                    # What is held does not move
                    slope = value - target if held_error <= error else 0.0
                    clipped += held_error > error
                assert values.grad[i, t, s].item() == pytest.approx(slope)
        assert losses[i].item() == pytest.approx(total)
    assert (clipped > 0) == bool(clip_range)


def test_explained_variance(batch):
    values, returns, mask = batch["values"][..., 0], batch["rewards"], batch["mask"]
    own = [
        (v, r)
        for v, r, m in zip(values.flatten().tolist(), returns.flatten().tolist(), mask.flatten(), strict=True)
        if m
    ]
    rest = statistics.pvariance([r - v for v, r in own]) / statistics.pvariance([r for _, r in own])
    assert explained_variance(values, returns, mask) == pytest.approx(1 - rest)
    assert explained_variance(returns + 3.0, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.full_like(returns, 5.0), returns, mask) == pytest.approx(0.0)
    assert math.isnan(explained_variance(values, torch.ones_like(returns), mask))
    assert math.isnan(explained_variance(values, returns, torch.zeros_like(mask)))
