"""Advantages: every estimator against the paper's equations, invariances, the hook."""

import itertools
import math
import random

import pytest
import torch
from slow_reference import (
    ESTIMATORS,
    GRANULARITIES,
    NAN,
    random_batch,
    slow_aggregate,
    slow_positions,
    slow_terms,
    slow_whiten,
    tensor,
)

from trl_prime.advantages import (
    advantage_terms,
    combine_rewards,
    process_variance_share,
    whiten_tokens,
)
from trl_prime.process_rewards import (
    NORMALIZATIONS,
    aggregate_process_rewards,
    implicit_process_rewards,
    normalize_process_rewards,
    reward_positions,
)

WITH_BASELINE = ("rloo", "rloo_reference_code", "grpo")


def assert_same(actual, expected, tolerance=1e-9, **kwargs):
    expected = expected if isinstance(expected, torch.Tensor) else tensor(expected, actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, **kwargs)


def plain(outcomes, rewards, mask=None, k=None, **kwargs):
    """Advantages without whitening."""
    outcomes, rewards = tensor(outcomes), tensor(rewards)
    mask = torch.ones_like(rewards) if mask is None else tensor(mask)
    return combine_rewards(outcomes, rewards, mask, k or len(outcomes), **{"whiten": False, **kwargs})


def slow_combine(batch, rewards, positions, whiten, estimator, **kwargs):
    outcome_term, process_term, active = slow_terms(
        batch.outcomes, rewards, batch.mask, batch.num_generations, estimator, positions=positions, **kwargs
    )
    total = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(outcome_term, process_term, strict=True)]
    return slow_whiten(total, active) if whiten or estimator == "reinforce_plus_plus" else total


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_against_the_slow_reference(estimator, granularity):
    cases = itertools.product((0.0, 0.5, 0.9, 1.0), (2, 3, 4, 5), (False, True), range(2))
    for case, (process_gamma, k, whiten, _) in enumerate(cases):
        # Rewards far above any floor of the standard deviation that grpo divides by
        batch = random_batch(case, k, scale=100.0 if estimator == "grpo" else 1.0)
        rng = random.Random(case)
        # 0.9 as a discount of the outcome has a test of its own
        gammas = (rng.choice([0.0, 0.5, 1.0]), process_gamma)
        weights = (rng.choice([1.0, 0.0, 2.5]), rng.choice([1.0, 0.3, 5.0]))
        rewards = batch.rewards
        positions = None
        if granularity != "token":
            rewards = slow_aggregate(batch.rewards, batch.mask, granularity, batch.steps)
            positions = slow_positions(batch.mask, granularity, batch.steps)
        expected = slow_combine(batch, rewards, positions, whiten, estimator, weights=weights, gammas=gammas)
        mask, steps = tensor(batch.mask, torch.long), tensor(batch.steps, torch.long)
        settings = {
            "estimator": estimator,
            "outcome_weight": weights[0],
            "process_weight": weights[1],
            "outcome_gamma": gammas[0],
            "process_gamma": gammas[1],
            "whiten": whiten,
            "reward_mask": None if granularity == "token" else reward_positions(mask, granularity, steps),
        }
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 3e-3)):
            given = aggregate_process_rewards(tensor(batch.rewards, dtype), mask, granularity, steps)
            actual = combine_rewards(tensor(batch.outcomes, dtype), given, mask, k, **settings)
            assert actual.dtype == dtype and actual.isfinite().all()
            assert_same(actual, expected, tolerance)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reward_positions_outside_the_completion_mask_are_ignored(estimator):
    batch = random_batch(3, 4)
    given = tensor(batch.outcomes), tensor(batch.rewards), tensor(batch.mask), 4
    everywhere = combine_rewards(*given, estimator=estimator, reward_mask=torch.ones_like(given[2]))
    assert_same(everywhere, combine_rewards(*given, estimator=estimator))


def test_groups_of_one_have_advantages_only_without_a_baseline():
    for estimator in ESTIMATORS:
        advantages = plain([1.0, 0.0], [[0.5, 0.25]] * 2, k=1, estimator=estimator)
        assert advantages.any() == (estimator not in WITH_BASELINE)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_terms_are_apart_and_active_tokens_are_those_with_an_advantage(estimator):
    for seed, k in itertools.product(range(6), (2, 3, 5)):
        batch = random_batch(seed, k)
        actual = advantage_terms(
            tensor(batch.outcomes),
            tensor(batch.rewards),
            tensor(batch.mask),
            k,
            estimator=estimator,
            outcome_weight=2.0,
            process_weight=0.5,
            process_gamma=0.9,
        )
        expected = slow_terms(batch.outcomes, batch.rewards, batch.mask, k, estimator, (2.0, 0.5), (1.0, 0.9))
        assert actual[2].dtype == torch.bool
        for got, wanted in zip(actual, expected, strict=True):
            assert_same(got, tensor(wanted, got.dtype))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_outcome_discount_counts_the_tokens_left_in_double_precision(estimator):
    for seed in range(5):
        batch = random_batch(seed, 4)
        expected = slow_combine(batch, batch.rewards, None, False, estimator, gammas=(0.9, 1.0))
        actual = plain(batch.outcomes, batch.rewards, batch.mask, 4, estimator=estimator, outcome_gamma=0.9)
        assert_same(actual, expected)


def test_reinforce_plus_plus_is_reinforce_whitened_whatever_whiten_says():
    batch = random_batch(3, 4)
    given = (tensor(batch.outcomes), tensor(batch.rewards), tensor(batch.mask), 4)
    expected = combine_rewards(*given, estimator="reinforce", whiten=True)
    for whiten in (False, True):
        assert_same(combine_rewards(*given, estimator="reinforce_plus_plus", whiten=whiten), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_precision_is_computed_in_float32(estimator, dtype):
    batch = random_batch(2, 4)
    rewards = tensor(batch.rewards, torch.float32).clamp(-100, 100).to(dtype)
    outcomes, mask = tensor(batch.outcomes, dtype), tensor(batch.mask, dtype)
    actual = combine_rewards(outcomes, rewards, mask, 4, estimator=estimator)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, combine_rewards(outcomes.float(), rewards.float(), mask, 4, estimator=estimator))


# The points of the published implementations


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whiten", [False, True])
def test_point_1_the_ratio_of_the_weights_changes_the_advantage(estimator, whiten):
    torch.manual_seed(0)
    given = (tensor([1.0, 0.0, 0.0, 1.0]), torch.randn(4, 6, dtype=torch.float64), torch.ones(4, 6), 4)

    def weighted(outcome, process):
        return combine_rewards(
            *given, estimator=estimator, whiten=whiten, outcome_weight=outcome, process_weight=process
        )

    one = weighted(1.0, 1.0)
    for other in (weighted(5.0, 1.0), weighted(1.0, 5.0), weighted(0.0, 1.0), weighted(1.0, 0.0)):
        assert (one - other).abs().max() > 0.1
    if whiten or estimator == "reinforce_plus_plus":
        assert_same(weighted(3.0, 3.0), one)
    else:
        assert_same(weighted(2.0, 3.0), 2 * weighted(1.0, 0.0) + 3 * weighted(0.0, 1.0))


def test_point_2_rloo_is_eq_5_and_the_published_variant_has_a_name():
    rewards = [[1.0, 2.0], [3.0, 5.0], [0.0, 6.0]]
    # means per token 1.5, 4, 3; baselines of the first row: outcome (0 + 1) / 2, process (4 + 3) / 2
    advantages = plain([1.0, 0.0, 1.0], rewards)
    assert_same(advantages[0], [0.5 + (1 - 3.5) + (2 - 3.5), 0.5 + (2 - 3.5)])
    variant = plain([1.0, 0.0, 1.0], rewards, estimator="rloo_reference_code")
    total = 1.5 + 4 + 3
    assert_same(variant[0], [0.5 + (1 + 2) * 3 / 2 - 2 * total / 2, 0.5 + 2 * 3 / 2 - total / 2])
    gap = [[(r - sum(row) / 2) / 2 for r in row] for row in rewards]
    immediate = {"process_gamma": 0.0}
    difference = plain([1.0, 0.0, 1.0], rewards, estimator="rloo_reference_code", **immediate) - plain(
        [1.0, 0.0, 1.0], rewards, **immediate
    )
    assert_same(difference, gap)


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "value"])
def test_point_3_the_last_token_gets_its_process_reward(estimator):
    mask = [[1, 1, 1, 0], [1, 1, 1, 1]]
    rewards = [[0.1, 0.2, 0.3, 0.0], [0.3, 0.1, 0.0, 0.8]]
    raised = [[0.1, 0.2, 0.9, 0.0], rewards[1]]
    settings = {"k": 2, "estimator": estimator, "whiten": False, "process_gamma": 0.0, "outcome_weight": 0.0}
    before, after = (plain([1.0, 0.0], r, mask, **settings) for r in (rewards, raised))
    assert before[0, 2] != 0 and after[0, 2] > before[0, 2] + 0.05


@pytest.mark.parametrize("process_gamma", [0.0, 0.5, 1.0])
def test_point_4_whole_has_the_mean_of_the_peers_sums_as_baseline(process_gamma):
    rewards, mask = (
        tensor([[1.0, 1, 1, 0], [2, 2, 0, 0], [5, 0, 0, 0]]),
        tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1] + [0] * 3]),
    )
    advantages = combine_rewards(
        tensor([0.0, 0, 0]),
        aggregate_process_rewards(rewards, mask, "whole"),
        mask,
        3,
        process_gamma=process_gamma,
        whiten=False,
        reward_mask=reward_positions(mask, "whole"),
    )
    centred = tensor([[3 - 4.5], [4 - 4.0], [5 - 3.5]])
    assert_same(advantages, centred * mask)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_point_5_every_accepted_combination_runs(estimator):
    batch = random_batch(1, 4)
    mask, steps = tensor(batch.mask), tensor(batch.steps, torch.long)
    for granularity, method, gammas in itertools.product(
        GRANULARITIES, NORMALIZATIONS, ((1.0, 1.0), (0.0, 0.0), (0.9, 0.5))
    ):
        positions = reward_positions(mask, granularity, steps)
        rewards = aggregate_process_rewards(tensor(batch.rewards), mask, granularity, steps)
        advantages = combine_rewards(
            tensor(batch.outcomes),
            normalize_process_rewards(
                rewards, positions, method, gamma=gammas[1], outcomes=tensor(batch.outcomes), num_generations=4
            ),
            mask,
            4,
            estimator=estimator,
            outcome_gamma=gammas[0],
            process_gamma=gammas[1],
            reward_mask=positions,
        )
        assert advantages.isfinite().all() and advantages.any()


def test_point_5_impossible_arguments_are_refused_with_a_reason():
    outcomes, rewards = torch.zeros(4), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"'dpo'.*rloo.*grpo"):
        combine_rewards(outcomes, rewards, rewards, 2, estimator="dpo")
    with pytest.raises(ValueError, match="num_generations=3"):
        combine_rewards(outcomes, rewards, rewards, 3)
    for shapes in ((rewards, rewards[:, :2]), (rewards[:2], rewards[:2])):
        with pytest.raises(ValueError, match="Shapes do not agree"):
            combine_rewards(outcomes, *shapes, 2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("method", ["none", "batch_norm", "std"])
@pytest.mark.parametrize("length", [200, 3000])
def test_point_8_rounding_noise_of_an_untrained_prm_is_not_amplified(estimator, method, length):
    """PRM = reference: what is left are rounding errors of 1e-6 nats. The outcomes must decide the advantages."""
    torch.manual_seed(0)
    mask, outcomes = torch.ones(32, length), (torch.rand(32) < 0.5).float()
    noise = implicit_process_rewards(1e-6 * torch.randn(32, length), torch.zeros(32, length), mask, 0.05)
    noise = normalize_process_rewards(noise, mask, method)
    outcome_term, process_term, _ = advantage_terms(outcomes, noise, mask, 4, estimator=estimator)
    share = (process_term.square().mean() / outcome_term.square().mean()).sqrt().item()
    assert share < 0.05


def test_point_8_whitening_does_not_amplify_noise():
    torch.manual_seed(0)
    noise = 1e-7 * torch.randn(8, 20)
    assert combine_rewards(torch.ones(8), noise, torch.ones(8, 20), 4).abs().max() < 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whiten", [False, True])
def test_point_9_a_completion_without_tokens_leaves_the_rest_finite(estimator, whiten):
    rewards, mask = [[0.1, 0.3], [0.0, 0.0], [0.2, -0.1]], [[1, 1], [0, 0], [1, 1]]
    advantages = plain([1.0, 0.0, 0.0], rewards, mask, whiten=whiten, estimator=estimator)
    assert advantages.isfinite().all() and not advantages[1].any() and advantages[0].any()
    if estimator == "rloo" and not whiten:
        # It counts in the outcome's baseline and not in that of the process reward
        assert_same(advantages[0], [1 - 0 + 0.1 + 0.3 - 2 * 0.05, 1 - 0 + 0.3 - 0.05])
        assert_same(advantages[2], [0 - 0.5 + 0.2 - 0.1 - 2 * 0.2, 0 - 0.5 - 0.1 - 0.2])
    nothing = plain([1.0, 0.0, 0.0], rewards, [[0, 0]] * 3, whiten=whiten, estimator=estimator)
    assert not nothing.any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_point_11_a_dropped_group_carries_no_advantage_and_moves_no_other(estimator):
    batch = random_batch(1, 4, num_groups=2)
    batch.outcomes[:] = [NAN] * 4 + [1.0, 0.0, 0.0, 1.0]
    advantages = combine_rewards(
        tensor(batch.outcomes), tensor(batch.rewards), tensor(batch.mask), 4, estimator=estimator
    )
    alone = combine_rewards(
        tensor(batch.outcomes[4:]), tensor(batch.rewards[4:]), tensor(batch.mask[4:]), 4, estimator=estimator
    )
    assert not advantages[:4].any()
    assert_same(advantages[4:], alone)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whiten", [False, True])
def test_point_17_an_unjudged_completion_is_as_if_it_had_not_been_sampled(estimator, whiten):
    torch.manual_seed(0)
    outcomes, rewards = [1.0, 0.0, NAN, 1.0], torch.randn(4, 5).tolist()
    settings = {"estimator": estimator, "whiten": whiten, "process_gamma": 0.9}
    advantages = plain(outcomes, rewards, **settings)
    kept = [0, 1, 3]
    without = plain([outcomes[i] for i in kept], [rewards[i] for i in kept], **settings)
    assert not advantages[2].any()
    assert_same(advantages[kept], without)
    rewards[2] = [NAN] * 5
    assert_same(plain(outcomes, rewards, **settings), advantages)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_point_17_without_a_judged_peer_there_is_nothing_to_compare_with(estimator):
    advantages = plain([1.0, NAN, NAN], [[0.5, 0.25]] * 3, estimator=estimator)
    assert not advantages[1:].any()
    assert advantages[0].any() == (estimator not in WITH_BASELINE)


# Invariances


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_width_and_order_in_a_group_do_not_matter(estimator):
    for seed in range(8):
        batch = random_batch(seed, 4)
        given = tensor(batch.outcomes), tensor(batch.rewards), tensor(batch.mask)
        settings = {"estimator": estimator, "process_gamma": 0.9, "outcome_gamma": 0.5}
        advantages = combine_rewards(*given, 4, **settings)
        wider = [torch.nn.functional.pad(x, (0, 3), value=v) for x, v in zip(given[1:], (NAN, 0), strict=True)]
        padded = combine_rewards(given[0], *wider, 4, **settings)
        assert not padded[:, -3:].any()
        assert_same(padded[:, :-3], advantages)
        left = [torch.nn.functional.pad(x, (2, 0), value=v) for x, v in zip(given[1:], (1e9, 0), strict=True)]
        assert_same(combine_rewards(given[0], *left, 4, **settings)[:, 2:], advantages)
        order = torch.cat([4 * group + torch.randperm(4) for group in range(len(batch.outcomes) // 4)])
        assert_same(combine_rewards(*(x[order] for x in given), 4, **settings), advantages[order])


def test_a_constant_on_all_outcomes_of_a_group_leaves_rloo_and_grpo_unchanged():
    for seed, estimator in itertools.product(range(6), WITH_BASELINE):
        batch = random_batch(seed, 3)
        shift = torch.randn(len(batch.outcomes) // 3, dtype=torch.float64).repeat_interleave(3)
        given = tensor(batch.rewards), tensor(batch.mask), 3
        base = advantage_terms(tensor(batch.outcomes), *given, estimator=estimator)
        moved = advantage_terms(tensor(batch.outcomes) + shift, *given, estimator=estimator)
        for one, other in zip(base, moved, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("estimator", WITH_BASELINE)
def test_outcome_term_sums_to_zero_over_a_fully_judged_group(estimator):
    outcomes = tensor([1.0, 0.0, 0.0, 0.3, 1.0, 1.0, 1.0, 1.0])
    term, _, _ = advantage_terms(outcomes, tensor([[0.0] * 3] * 8), torch.ones(8, 3), 4, estimator=estimator)
    assert_same(term.view(2, 4, 3).sum(1), [[0.0] * 3] * 2)
    assert (term[:4].abs() > 0.01).any() and term[4:].abs().max() < 1e-6


def test_with_one_gamma_the_first_token_gets_the_whole_process_reward_and_value_starts_at_the_outcome():
    rewards = [[0.5, 0.25, 0.125], [0.0, 0.0, 0.0]]
    assert_same(plain([1.0, 0.0], rewards, estimator="reinforce")[0], [1.875, 1.375, 1.125])
    assert_same(plain([1.0, 0.0], rewards, estimator="value")[0], [1.0, 0.5, 0.25])


def test_inputs_are_left_alone():
    batch = random_batch(4, 4)
    given = tensor(batch.outcomes), tensor(batch.rewards), tensor(batch.mask)
    copies = [x.clone() for x in given]
    for estimator in ESTIMATORS:
        combine_rewards(*given, 4, estimator=estimator)
    for x, copy in zip(given, copies, strict=True):
        assert torch.equal(x.nan_to_num(7.0), copy.nan_to_num(7.0))


# Whitening and the share of the variance


def test_whitening_is_over_the_unmasked_tokens_only():
    for seed in range(20):
        batch = random_batch(seed, 3)
        active = tensor(batch.mask, torch.bool)
        values = tensor(batch.rewards)
        white = whiten_tokens(values, active)
        assert_same(white, slow_whiten(batch.rewards, batch.mask))
        assert_same(whiten_tokens(5 * values - 3, active), white)
        assert abs(white[active].mean()) < 1e-9 and abs(white[active].square().mean() - 1) < 1e-9


def test_whitening_of_one_token_or_none_is_zero():
    for row in ([0, 0, 0], [0, 1, 0]):
        assert not whiten_tokens(tensor([[3.0, 5.0, NAN]]), tensor([row], torch.bool)).any()
    assert not whiten_tokens(tensor([[3.0, 3.0]]), tensor([[1, 1]], torch.bool)).any()


def test_process_variance_share():
    active = tensor([[1, 1, 1, 1, 0]], torch.bool)
    outcome, process = tensor([[1.0, -1, 1, -1, 50]]), tensor([[3.0, 3, -3, -3, 50]])
    assert process_variance_share(outcome, process, active) == pytest.approx(9 / 10)
    assert process_variance_share(outcome + 7, 2 * process, active) == pytest.approx(36 / 37)
    assert process_variance_share(outcome, 0 * process, active) == 0.0
    assert process_variance_share(0 * outcome, process, active) == 1.0
    assert math.isnan(process_variance_share(outcome, process, torch.zeros_like(active)))
    assert math.isnan(process_variance_share(0 * outcome, 0 * process, active))


# The hook


def test_combine_uses_the_settings_and_lets_a_hook_change_one_thing(rollout_rewards):
    arguments = {
        "outcome_rewards": rollout_rewards.outcome_rewards,
        "process_rewards": rollout_rewards.process_rewards,
        "completion_mask": rollout_rewards.completion_mask,
        "num_generations": 2,
        "reward_mask": rollout_rewards.reward_mask,
        **rollout_rewards.settings,
    }
    assert torch.equal(rollout_rewards.combine(), combine_rewards(**arguments))
    for change in (
        {"estimator": "rloo"},
        {"whiten": True},
        {"process_weight": 2.0},
        {"reward_mask": None},
        {"num_generations": 4, "estimator": "rloo"},
        {"outcome_rewards": torch.tensor([0.0, 0.5, 1.0, 1.0])},
        {"process_rewards": rollout_rewards.process_rewards * 2},
        {"completion_mask": torch.ones(4, 4)},
    ):
        changed = rollout_rewards.combine(**change)
        assert torch.equal(changed, combine_rewards(**{**arguments, **change}))
        assert not torch.equal(changed, rollout_rewards.combine())
    with pytest.raises(TypeError, match="no_such_argument"):
        rollout_rewards.combine(no_such_argument=1)
