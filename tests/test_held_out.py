"""Accuracy on held-out problems, and the quality of the PRM's steps."""

import random

import pytest
import torch
from datasets import Dataset

from trl_prime.evaluation.held_out import first_error_auc, generate, measure_policy, outcomes
from trl_prime.tasks.running_sums import build_model, build_tokenizer, make_dataset, running_sum_reward


def slow_auc(step_rewards, step_labels):
    wins = pairs = 0.0
    right, wrong = [], []
    for rewards, labels in zip(step_rewards, step_labels, strict=True):
        for i in range(min(len(labels), len(rewards))):
            if all(labels[: i + 1]):
                right.append(rewards[i].item())
            elif all(labels[:i]):
                wrong.append(rewards[i].item())
    for r in right:
        for w in wrong:
            pairs += 1
            wins += 1.0 if r > w else 0.5 if r == w else 0.0
    return wins / pairs


def test_first_error_auc_agrees_with_counting_pairs():
    rng = random.Random(0)
    for _ in range(20):
        labels = [[rng.random() < 0.8 for _ in range(rng.randint(1, 6))] for _ in range(8)]
        rewards = [torch.tensor([float(rng.randint(-2, 2)) for _ in row]) for row in labels]
        if not any(False in row for row in labels):
            continue
        assert first_error_auc(rewards, labels) == pytest.approx(slow_auc(rewards, labels))


def test_first_error_auc_of_more_steps_than_could_be_paired_in_memory():
    # 100,000 right steps with rewards 0, 1, 2, ... and 100,000 wrong ones half a point below: 80 GB of pairs
    count = 100_000
    rewards = [torch.tensor([float(i), i - 0.5]) for i in range(count)]
    # The right step i beats the wrong steps 0 to i
    expected = sum(i + 1 for i in range(count)) / count**2
    assert first_error_auc(rewards, [[True, False]] * count) == pytest.approx(expected)


def test_first_error_auc_of_a_perfect_and_of_a_reversed_prm():
    labels = [[True, True, False, True], [True, True]]
    perfect = [torch.tensor([1.0, 1.0, -1.0, -9.0]), torch.tensor([1.0, 1.0])]
    assert first_error_auc(perfect, labels) == 1.0
    assert first_error_auc([-rewards for rewards in perfect], labels) == 0.0
    assert first_error_auc([torch.ones(2)], [[True, True]]) != first_error_auc([torch.ones(2)], [[True, True]])  # NaN


def test_outcomes_pass_columns_and_turn_none_into_nan():
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "solution": ["1", "2"]})

    def reward(prompts, completions, solution, **kwargs):
        return [None if c == "?" else float(c == s) for c, s in zip(completions, solution, strict=True)]

    assert outcomes(reward, dataset, ["1", "3"]).tolist() == [1.0, 0.0]
    assert outcomes(reward, dataset, ["?", "2"]).isnan().tolist() == [True, False]


@pytest.fixture(scope="module")
def base():
    tokenizer = build_tokenizer()
    return build_model(tokenizer, seed=0), tokenizer


def test_generate_does_not_depend_on_the_batch_and_leaves_the_random_state(base):
    model, tokenizer = base
    prompts = ["1 2=", "3 4 5 6=", "7="]
    state = torch.random.get_rng_state()
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=2) == alone
    sampled = generate(model, tokenizer, prompts * 8, max_new_tokens=6, temperature=1.0, seed=3)
    assert sampled == generate(model, tokenizer, prompts * 8, max_new_tokens=6, temperature=1.0, seed=3)
    assert len(set(sampled)) > len(set(alone)), "sampling must differ from greedy decoding"
    assert torch.equal(torch.random.get_rng_state(), state)


def test_measure_policy_counts_what_the_reward_says(base):
    model, tokenizer = base
    dataset = make_dataset(6, num_digits=3)
    accuracies, repeated, samples, rewards = measure_policy(
        model, tokenizer, dataset, running_sum_reward, max_new_tokens=6, num_samples=2
    )
    assert repeated["prompt"][:4] == [p for p in dataset["prompt"][:2] for _ in range(2)]
    expected = running_sum_reward(samples, repeated["solution"][:])
    assert rewards.tolist() == expected
    assert accuracies["sampled"] == pytest.approx(sum(expected) / 12)
