"""Accuracy on held-out problems."""

import pytest
import torch
from datasets import Dataset

from trl_prime.evaluation.held_out import generate, measure_policy, outcomes
from trl_prime.tasks.running_sums import CHARACTERS, make_dataset, running_sum_reward
from trl_prime.tasks.tiny_model import build_model, build_tokenizer


def test_outcomes_pass_columns_and_turn_none_into_nan():
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "solution": ["1", "2"]})

    def reward(prompts, completions, solution, **kwargs):
        return [None if c == "?" else float(c == s) for c, s in zip(completions, solution, strict=True)]

    assert outcomes(reward, dataset, ["1", "3"]).tolist() == [1.0, 0.0]
    assert outcomes(reward, dataset, ["?", "2"]).isnan().tolist() == [True, False]


@pytest.fixture(scope="module")
def base():
    tokenizer = build_tokenizer(CHARACTERS)
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
