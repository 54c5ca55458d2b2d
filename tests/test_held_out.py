"""Accuracy on held-out problems."""

import pytest
import torch
from datasets import Dataset

from trl_prime.evaluation import held_out
from trl_prime.evaluation.held_out import generate, measure_policy, outcomes
from trl_prime.tasks.running_sums import CHARACTERS, make_dataset, running_sum_reward
from trl_prime.tasks.tiny_model import build_model, build_tokenizer


def test_outcomes_pass_columns_and_turn_none_into_nan():
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "solution": ["1", "2"]})

    def reward(prompts, completions, solution, **kwargs):
        return [None if c == "?" else float(c == s) for c, s in zip(completions, solution, strict=True)]

    assert outcomes(reward, dataset, ["1", "3"]).tolist() == [1.0, 0.0]
    assert outcomes(reward, dataset, ["?", "2"]).isnan().tolist() == [True, False]


def test_an_async_reward_function_is_waited_for():
    async def reward(completions, **kwargs):
        return [float(completion == "b") for completion in completions]

    assert outcomes(reward, Dataset.from_dict({"prompt": ["1", "2"]}), ["a", "b"]).tolist() == [0.0, 1.0]


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


class StandIn:
    """The accelerator of one of three processes."""

    def __init__(self, process_index):
        self.process_index, self.num_processes = process_index, 3


def test_processes_share_the_problems_and_each_gets_the_result_of_all(base, monkeypatch):
    model, tokenizer = base
    dataset = make_dataset(4, num_digits=3)
    judged, parts, seeds, sample = [], [], [], held_out.generate

    def reward(prompts, completions, solution, **kwargs):
        judged.append(prompts)
        return running_sum_reward(completions, solution)

    def measure(rank):
        return measure_policy(
            model, tokenizer, dataset, reward, max_new_tokens=6, num_samples=2, accelerator=StandIn(rank)
        )

    def noting_generate(*args, seed, **kwargs):
        seeds.append(seed)
        return sample(*args, seed=seed, **kwargs)

    monkeypatch.setattr(held_out, "generate", noting_generate)
    # First to see what each process has to give, then with what all of them gave
    monkeypatch.setattr(
        held_out, "gather_object", lambda part: parts.append(part) or [(i, part[0][1]) for i in range(4)]
    )
    for rank in range(3):
        measure(rank)
    # Equally many for each, so that none waits for another in vain: four problems are two for each of three processes
    assert [len(prompts) for prompts in judged] == [2, 4] * 3
    assert seeds == [0, 0, 1, 1, 2, 2], "processes must not draw the same random numbers"
    assert {prompt for prompts in judged[::2] for prompt in prompts} == set(dataset["prompt"])
    monkeypatch.setattr(held_out, "gather_object", lambda part: [row for part in parts for row in part])
    results = [measure(rank) for rank in range(3)]
    accuracies, repeated, samples, rewards = results[0]
    assert repeated["prompt"][:] == [p for p in dataset["prompt"] for _ in range(2)]
    assert rewards.tolist() == running_sum_reward(samples, repeated["solution"][:])
    assert accuracies["sampled"] == pytest.approx(rewards.mean().item())
    greedy = generate(model, tokenizer, dataset["prompt"][:], max_new_tokens=6)
    assert accuracies["greedy"] == pytest.approx(sum(running_sum_reward(greedy, dataset["solution"][:])) / 4)
    assert all(result[0] == accuracies and result[2] == samples for result in results)
