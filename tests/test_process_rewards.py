"""Process rewards: log-ratios, steps, granularity, returns, normalisation."""

import math
import random
import statistics

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_reference import (
    GRANULARITIES,
    NAN,
    random_batch,
    slow_aggregate,
    slow_positions,
    slow_returns,
    slow_turns,
    spots,
    tensor,
)

from trl_prime.process_rewards import (
    NORMALIZATIONS,
    aggregate_process_rewards,
    correlation,
    discounted_returns,
    implicit_process_rewards,
    normalize_process_rewards,
    reward_positions,
    split_steps,
    turn_ids,
)

BATCHES = [(seed, k) for seed in range(8) for k in (2, 3, 4, 5)]


def assert_same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(
        actual, tensor(expected, actual.dtype), rtol=tolerance, atol=tolerance, check_dtype=False
    )


# Eq 3


def test_token_reward_is_beta_times_the_log_ratio():
    for seed, k in BATCHES:
        batch, rng = random_batch(seed, k), random.Random(seed)
        ref = [[rng.gauss(-2, 1) for _ in row] for row in batch.mask]
        beta = rng.choice([0.05, 0.3, 1.0])
        expected = [
            [beta * (p - q) if flag else 0.0 for p, q, flag in zip(*rows, strict=True)]
            for rows in zip(batch.rewards, ref, batch.mask, strict=True)
        ]
        for mask in (tensor(batch.mask), tensor(batch.mask, torch.bool), tensor(batch.mask, torch.long)):
            assert_same(implicit_process_rewards(tensor(batch.rewards), tensor(ref), mask, beta), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_log_probs_are_subtracted_in_float32(dtype):
    prm, ref = tensor([[-3.25, -7.0]], dtype), tensor([[-3.125, -0.007]], dtype)
    rewards = implicit_process_rewards(prm, ref, torch.ones(1, 2), 0.05)
    assert rewards.dtype == torch.float32
    assert torch.equal(rewards, 0.05 * (prm.float() - ref.float()))
    assert implicit_process_rewards(prm.double(), ref, torch.ones(1, 2), 0.05).dtype == torch.float64


def test_gradient_reaches_both_log_probs_and_nothing_masked():
    prm = tensor([[-1.0, -math.inf, -2.0]]).requires_grad_()
    ref = tensor([[-1.5, -math.inf, -1.0]]).requires_grad_()
    implicit_process_rewards(prm, ref, tensor([[1, 0, 1]]), 0.05).sum().backward()
    assert prm.grad.tolist() == [[0.05, 0.0, 0.05]]
    assert ref.grad.tolist() == [[-0.05, 0.0, -0.05]]


@pytest.mark.parametrize("beta", [0.0, -0.05])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match=r"beta.*positive"):
        implicit_process_rewards(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), beta)


def test_point_3_last_token_of_a_completion_has_its_process_reward():
    mask = tensor([[1, 1, 1, 0], [1, 0, 1, 1]])
    rewards = implicit_process_rewards(tensor([[-1.0] * 4] * 2), tensor([[-2.0] * 4] * 2), mask, 0.5)
    assert rewards[0, 2] == 0.5 and rewards[1, 3] == 0.5
    assert torch.equal(reward_positions(mask, "token"), mask.bool())


# Steps

TOKENS = st.lists(st.text("a\n#", max_size=4), max_size=10)
DELIMITERS = st.sampled_from(["\n", "\n\n", "#", "a\n", "##"])


def slow_character_steps(text, delimiter):
    """Step of every character, and of the end of the text."""
    steps, step, i = [], 0, 0
    while i < len(text):
        if text.startswith(delimiter, i):
            while text.startswith(delimiter, i):
                steps += [step] * len(delimiter)
                i += len(delimiter)
            step += 1
        else:
            steps.append(step)
            i += 1
    return [*steps, step]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TOKENS, DELIMITERS)
def test_split_steps_gives_a_token_the_step_of_its_first_character(tokens, delimiter):
    steps = split_steps(tokens, delimiter)
    of_character = slow_character_steps("".join(tokens), delimiter)
    starts = [len("".join(tokens[:i])) for i in range(len(tokens))]
    assert steps == [of_character[start] for start in starts]
    assert steps == sorted(steps) and steps[:1] in ([], [0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text("ab\n#", max_size=20), DELIMITERS)
def test_split_steps_concatenated_are_the_text_and_end_in_a_delimiter(text, delimiter):
    numbers = split_steps(list(text), delimiter)
    texts = ["".join(c for c, n in zip(text, numbers, strict=True) if n == step) for step in range(len(set(numbers)))]
    assert "".join(texts) == text
    assert all(step.endswith(delimiter) for step in texts[:-1])
    for step in texts:
        while step.endswith(delimiter):
            step = step[: -len(delimiter)]
        assert delimiter not in step


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TOKENS, TOKENS, DELIMITERS)
def test_split_steps_of_a_prefix_do_not_depend_on_what_follows_a_finished_step(first, second, delimiter):
    # A letter parts the texts, so that no delimiter spans both
    head = [*first, "b", delimiter]
    assert split_steps([*head, "b", *second], delimiter)[: len(head)] == split_steps(head, delimiter)
    tail = split_steps([*head, "b", *second], delimiter)[len(head) :]
    assert [n - tail[0] for n in tail] == split_steps(["b", *second], delimiter)


def test_split_steps_examples():
    assert split_steps([], "\n") == []
    assert split_steps(["a", "b"], "\n") == [0, 0]
    assert split_steps(["a", "\n", "b", "\n", "c"], "\n") == [0, 0, 1, 1, 2]
    assert split_steps(["a", "\n", "\n", "\n", "b"], "\n") == [0, 0, 0, 0, 1], "a blank line ends one step"
    assert split_steps(["a\n", "\nb", "c"], "\n\n") == [0, 0, 1], "a delimiter may span tokens"
    assert split_steps(["a.", "*", "+", "b"], ".*+") == [0, 0, 0, 1], "a delimiter is no regular expression"


# Granularity


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_positions_and_sums_against_the_slow_reference(granularity):
    for seed, k in BATCHES:
        batch = random_batch(seed, k)
        arguments = (tensor(batch.mask), granularity, tensor(batch.steps, torch.long))
        positions = reward_positions(*arguments)
        assert positions.dtype == torch.bool
        assert_same(positions, slow_positions(batch.mask, granularity, batch.steps))
        sums = aggregate_process_rewards(tensor(batch.rewards), *arguments)
        assert_same(sums, slow_aggregate(batch.rewards, batch.mask, granularity, batch.steps))
        for dtype in (torch.float32, torch.bfloat16):
            half = aggregate_process_rewards(tensor(batch.rewards, dtype), *arguments)
            assert half.dtype == dtype
            torch.testing.assert_close(half.double(), sums, rtol=0.05, atol=0.05)


def test_sum_over_a_completion_is_the_same_for_every_granularity():
    for seed, k in BATCHES:
        batch = random_batch(seed, k)
        mask, steps = tensor(batch.mask), tensor(batch.steps, torch.long)
        expected = [sum(values[t] for t in spots(row)) for values, row in zip(batch.rewards, batch.mask, strict=True)]
        for granularity in GRANULARITIES:
            sums = aggregate_process_rewards(tensor(batch.rewards), mask, granularity, steps)
            assert_same(sums.sum(1), expected)


def test_aggregation_passes_the_gradient_to_every_token_of_the_unit():
    rewards = tensor([[1.0, 2.0, NAN, 4.0, 5.0]]).requires_grad_()
    mask, steps = tensor([[1, 1, 0, 1, 1]]), tensor([[0, 0, 0, 0, 1]], torch.long)
    sums = aggregate_process_rewards(rewards, mask, "step", steps)
    assert sums.tolist() == [[0.0, 0.0, 0.0, 7.0, 5.0]]
    sums[0, 3].backward()
    assert rewards.grad.tolist() == [[1.0, 1.0, 0.0, 1.0, 0.0]]


def test_point_4_whole_puts_the_sum_on_the_last_token_the_policy_wrote():
    rewards, mask = tensor([[1.0, 2.0, 4.0, 8.0]] * 3), tensor([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    sums = aggregate_process_rewards(rewards, mask, "whole")
    assert sums.tolist() == [[0, 0, 7, 0], [0, 0, 0, 10], [0, 0, 0, 0]]
    assert reward_positions(mask, "whole").sum(1).tolist() == [1, 1, 0]


def test_a_turn_is_a_run_of_tokens_that_the_policy_wrote():
    mask = tensor([[0, 1, 1, 0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0], [0] * 9])
    assert turn_ids(mask).tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2], [0] * 9, [0] * 9]
    rewards = tensor([[99.0, 1, 2, 99, 99, 4, 99, 8, 99], [1.0, 2, 4, 8, 99, 99, 99, 99, 99], [99.0] * 9])
    sums = aggregate_process_rewards(rewards, mask, "turn")
    assert sums.tolist() == [[0, 0, 3, 0, 0, 4, 0, 8, 0], [0, 0, 0, 15, 0, 0, 0, 0, 0], [0] * 9]
    assert torch.equal(reward_positions(mask, "turn"), sums > 0)
    for seed, k in BATCHES:
        batch = random_batch(seed, k, num_tokens=12)
        numbers = turn_ids(tensor(batch.mask)).tolist()
        for row, found in zip(batch.mask, numbers, strict=True):
            assert [found[t] + 1 for t in spots(row)] == [slow_turns(row)[t] for t in spots(row)]


def test_every_token_of_a_turn_is_credited_with_its_own_turn_where_credit_is_immediate():
    mask = tensor([[1, 1, 0, 0, 1, 1, 1]])
    positions = reward_positions(mask, "turn")
    rewards = aggregate_process_rewards(tensor([[1.0, 2, 99, 99, 4, 8, 16]]), mask, "turn")
    assert discounted_returns(rewards, positions, 0.0).tolist() == [[3, 3, 28, 28, 28, 28, 28]]
    assert discounted_returns(rewards, positions, 0.5).tolist() == [[17, 17, 28, 28, 28, 28, 28]]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 1)])
def test_point_9_empty_batches_and_rows_keep_their_shape(granularity, shape):
    mask = torch.zeros(shape)
    rewards = aggregate_process_rewards(torch.full(shape, NAN), mask, granularity, mask.long())
    assert rewards.shape == shape and not rewards.any()
    outcomes = torch.ones(shape[0])
    for method in NORMALIZATIONS:
        normalized = normalize_process_rewards(rewards, mask, method, outcomes=outcomes, num_generations=3)
        assert normalized.shape == shape and not normalized.any()
    for gamma in (0.0, 0.9, 1.0):
        assert discounted_returns(rewards, mask, gamma).shape == shape


def test_point_5_impossible_choices_are_refused_by_name():
    mask = torch.ones(1, 2)
    for call in (reward_positions, lambda *arguments: aggregate_process_rewards(mask, *arguments)):
        with pytest.raises(ValueError, match=r"'sentence'.*token.*step.*whole"):
            call(mask, "sentence")
        with pytest.raises(ValueError, match="step_ids"):
            call(mask, "step")
    with pytest.raises(ValueError, match=r"'layer_norm'.*none.*batch_norm"):
        normalize_process_rewards(mask, mask, "layer_norm")
    with pytest.raises(ValueError, match=r"'group_std'.*num_generations"):
        normalize_process_rewards(mask, mask, "group_std")
    with pytest.raises(ValueError, match=r"'softmax'.*outcomes"):
        normalize_process_rewards(mask, mask, "softmax")


# Returns


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
def test_returns_against_the_slow_reference(gamma):
    for seed, k in BATCHES:
        batch = random_batch(seed, k, num_tokens=1 + seed * 2)
        for positions in (batch.mask, slow_positions(batch.mask, "step", batch.steps)):
            expected = slow_returns(batch.rewards, positions, gamma)
            assert_same(discounted_returns(tensor(batch.rewards), tensor(positions), gamma), expected)
            single = discounted_returns(tensor(batch.rewards, torch.float32), tensor(positions), gamma)
            assert single.dtype == torch.float32
            assert_same(single, expected, 1e-4)


def test_returns_example_holes_do_not_discount():
    returns = discounted_returns(tensor([[1.0, 99.0, 2.0, 4.0, 99.0]]), tensor([[1, 0, 1, 1, 0]]), 0.5)
    assert returns.tolist() == [[1 + 1 + 1, 2 + 2, 2 + 2, 4, 0]]


def test_with_step_rewards_every_token_of_a_step_is_credited_with_its_own_step():
    mask, steps = torch.ones(1, 5), tensor([[0, 0, 1, 1, 1]], torch.long)
    rewards = aggregate_process_rewards(tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]), mask, "step", steps)
    returns = discounted_returns(rewards, reward_positions(mask, "step", steps), 0.0)
    assert returns.tolist() == [[3, 3, 28, 28, 28]]


# Normalisation


@pytest.mark.parametrize("method", ["none", "batch_norm", "std"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
def test_normalisation_against_the_slow_reference(method, gamma):
    for seed, k in BATCHES:
        batch = random_batch(seed, k)
        for positions in (batch.mask, slow_positions(batch.mask, "step", batch.steps)):
            flat = [(i, t) for i, row in enumerate(positions) for t in spots(row)]
            if not flat:
                continue
            shift = statistics.fmean(batch.rewards[i][t] for i, t in flat) if method == "std" else 0.0
            returns = slow_returns([[r - shift for r in row] for row in batch.rewards], positions, gamma)
            returns = [returns[i][t] for i, t in flat]
            scale = {"none": 1.0, "batch_norm": max(map(abs, returns)), "std": statistics.pstdev(returns)}[method]
            expected = [[r / max(scale, 1e-2) for r in row] for row in batch.rewards]
            keep = tensor(positions, torch.bool)
            actual = normalize_process_rewards(tensor(batch.rewards), keep, method, gamma=gamma)
            assert_same(actual[keep], [expected[i][t] for i, t in flat])


@pytest.mark.parametrize("granularity", ["turn", "step", "token"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_group_std_against_the_slow_reference(granularity, gamma):
    for seed, k in BATCHES:
        batch = random_batch(seed, k)
        sums = slow_aggregate(batch.rewards, batch.mask, granularity, batch.steps)
        positions = slow_positions(batch.mask, granularity, batch.steps)
        expected = [[0.0] * len(row) for row in sums]
        for first in range(0, len(sums), k):
            places = [(i, t) for i in range(first, first + k) for t in spots(positions[i])]
            if not places:
                continue
            mean = statistics.fmean(sums[i][t] for i, t in places)
            returns = slow_returns(
                [[r - mean for r in row] for row in sums[first : first + k]], positions[first : first + k], gamma
            )
            spread = statistics.pstdev(returns[i - first][t] for i, t in places)
            for i, t in places:
                expected[i][t] = sums[i][t] * min(1 / spread, spread / 1e-4) if spread else 0.0
        actual = normalize_process_rewards(
            tensor(sums), tensor(positions), "group_std", gamma=gamma, num_generations=k
        )
        assert_same(actual, expected)


def test_group_std_with_immediate_credit_is_istars_scale():
    # Two groups of two completions, of two turns and one, whose turns are 100 times as far apart in the second
    rewards = tensor([[1.0, 0, 3], [0, 5, 0], [100, 0, 300], [0, 500, 0]])
    scaled = normalize_process_rewards(rewards, rewards != 0, "group_std", gamma=0.0, num_generations=2)
    spread = statistics.pstdev([1, 3, 5])
    assert_same(scaled[:2], (rewards[:2] / spread).tolist())
    assert_same(scaled[2:], scaled[:2].tolist())


def test_softmax_shares_the_outcome_out_over_the_turns():
    for seed, k in BATCHES:
        batch = random_batch(seed, k)
        sums = slow_aggregate(batch.rewards, batch.mask, "turn", batch.steps)
        positions = slow_positions(batch.mask, "turn", batch.steps)
        expected = [[0.0] * len(row) for row in sums]
        for i, outcome in enumerate(batch.outcomes):
            if math.isnan(outcome):
                continue
            total = sum(math.exp(sums[i][t]) for t in spots(positions[i]))
            for t in spots(positions[i]):
                expected[i][t] = outcome * math.exp(sums[i][t]) / total
        arguments = (tensor(positions), "softmax")
        actual = normalize_process_rewards(tensor(sums), *arguments, outcomes=tensor(batch.outcomes))
        assert_same(actual, expected)
        # What is added to all turns of a completion changes nothing, and its turns share out all of its outcome
        shifted = tensor(sums) + torch.arange(len(sums))[:, None]
        assert_same(normalize_process_rewards(shifted, *arguments, outcomes=tensor(batch.outcomes)), expected, 1e-9)
        for i, row in enumerate(positions):
            if any(row) and not math.isnan(batch.outcomes[i]):
                assert actual[i].sum().item() == pytest.approx(batch.outcomes[i])


@pytest.mark.parametrize("method", ["batch_norm", "std"])
def test_point_8_the_scale_is_that_of_the_whole_batch(method):
    torch.manual_seed(0)
    rewards, mask = torch.randn(6, 5) * torch.tensor([[1.0], [1], [1], [50], [50], [50]]), torch.ones(6, 5)
    ratio = normalize_process_rewards(rewards, mask, method) / rewards
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    part = normalize_process_rewards(rewards[:3], mask[:3], method) / rewards[:3]
    assert part[0, 0] > 5 * ratio[0, 0], "the test must see a scale per rank"


@pytest.mark.parametrize("method", ["none", "batch_norm", "std", "group_std"])
def test_point_8_rounding_noise_is_not_blown_up(method):
    torch.manual_seed(0)
    noise = implicit_process_rewards(1e-6 * torch.randn(8, 100), torch.zeros(8, 100), torch.ones(8, 100), 0.05)
    scaled = normalize_process_rewards(noise, torch.ones(8, 100), method, num_generations=4)
    assert scaled.sum(1).abs().max() < 1e-3
    zero = torch.zeros(8, 100)
    assert torch.equal(normalize_process_rewards(zero, torch.ones(8, 100), method, num_generations=4), zero)


def test_below_eps_the_result_falls_with_the_square_of_the_scale():
    rewards, mask = tensor([[0.25, 0.25]]), torch.ones(1, 2)
    assert normalize_process_rewards(rewards, mask, "batch_norm", eps=2.0).tolist() == [[0.03125, 0.03125]]
    assert normalize_process_rewards(rewards, mask, "batch_norm", eps=0.1).tolist() == [[0.5, 0.5]]


def test_correlation_is_pearsons():
    first, second = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert correlation(first, second) == pytest.approx(numpy.corrcoef(first, second)[0, 1])
    assert correlation(first, 3 - 2 * first) == pytest.approx(-1.0)
    for short in (torch.ones(3), torch.ones(1), torch.ones(0)):
        assert math.isnan(correlation(short, short))
