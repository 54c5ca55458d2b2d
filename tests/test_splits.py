"""The held-out part of a data set."""

import random

import pytest
from datasets import Dataset

from trl_prime.data.splits import split_by_prompt


def texts(dataset):
    return {" ".join(prompt.split()) for prompt in dataset["prompt"]}


@pytest.mark.parametrize("size, expected", [(2, 2), (5.0, 5), (0.25, 5), (0.26, 6), (19, 19)])
def test_a_prompt_is_on_one_side_with_all_of_its_rows(size, expected):
    # The number of rows of a prompt is 1 to 4; they differ in white space
    prompts = [f"{i} +{' ' * (1 + copy)}{i}=\n" for i in range(20) for copy in range(1 + i % 4)]
    random.Random(0).shuffle(prompts)
    data = Dataset.from_dict({"prompt": prompts, "row": range(len(prompts))})
    rest, held_out = split_by_prompt(data, size, seed=1)
    assert len(texts(held_out)) == expected and len(texts(rest)) == 20 - expected
    assert not texts(rest) & texts(held_out)
    assert sorted(rest["row"][:] + held_out["row"][:]) == list(range(len(data)))
    assert rest["row"][:] == sorted(rest["row"]) and held_out["row"][:] == sorted(held_out["row"])


def test_the_choice_is_random_and_the_seeds():
    data = Dataset.from_dict({"prompt": [f"{i}=" for i in range(100)]})
    first = split_by_prompt(data, 10, seed=1)[1]["prompt"][:]
    assert split_by_prompt(data, 10, seed=1)[1]["prompt"][:] == first
    assert split_by_prompt(data, 10, seed=2)[1]["prompt"][:] != first
    assert first != data["prompt"][:10]


def test_messages_are_told_apart_by_what_they_say():
    ask = [[{"role": "system", "content": "count"}, {"role": "user", "content": f"{i // 2}"}] for i in range(8)]
    rest, held_out = split_by_prompt(Dataset.from_dict({"prompt": ask}), 0.5)
    assert len(rest) == len(held_out) == 4
    assert not {row[1]["content"] for row in rest["prompt"]} & {row[1]["content"] for row in held_out["prompt"]}


@pytest.mark.parametrize("size", [0, 1, 1.0, 2.5, -3, -0.1, float("nan"), float("inf")])
def test_a_size_that_is_neither_a_number_nor_a_share_is_refused(size):
    with pytest.raises(
        ValueError, match=f"eval_split_size is {size:g}. Give a whole number of prompts, 2 or more, or a share"
    ):
        split_by_prompt(Dataset.from_dict({"prompt": list("abcd")}), size)


@pytest.mark.parametrize("size, num", [(5, 5), (4, 4), (0.9, 4)])
def test_some_prompts_have_to_be_left(size, num):
    # Five rows, but four prompts
    with pytest.raises(
        ValueError, match=f"eval_split_size is {size}, which holds out {num} prompts, .* has 4 different"
    ):
        split_by_prompt(Dataset.from_dict({"prompt": list("aabcd")}), size)
