"""Number chains: the data, its judge, the truth of each line, and the preparation on a tiny random model."""

import re

import pytest
from transformers import AutoModelForCausalLM

from trl_prime.tasks import number_chains, smollm2
from trl_prime.tasks.number_chains import answer_reward, make_splits, prepare, solve, step_labels

PROMPT = "Start with 29, add 29, subtract 11, double it.\n"
RIGHT = "29 + 29 = 58\n58 - 11 = 47\n47 + 47 = 94\nAnswer: 94"


def test_a_chain_is_solved_line_by_line():
    assert "\n".join(solve(PROMPT)) == RIGHT
    with pytest.raises(ValueError, match="not a prompt of number chains"):
        solve("3 5 2 7=")


def test_problems_are_distinct_seeded_and_of_two_digit_numbers():
    train, test = make_splits(300, 50, num_steps=4, seed=1)
    prompts = train["prompt"][:] + test["prompt"][:]
    assert len(set(prompts)) == 350
    assert make_splits(20, 50, num_steps=4, seed=1)[1]["prompt"][:] == test["prompt"][:]
    assert make_splits(300, 50, num_steps=4, seed=2)[0]["prompt"][:] != train["prompt"][:]
    kinds = set()
    for row in train:
        *lines, answer = row["steps"].split("\n")
        assert len(lines) == 4
        assert answer == f"Answer: {row['solution']}"
        numbers = re.findall(r"\d+", row["prompt"] + row["steps"])
        assert all(10 <= int(number) <= 99 for number in numbers)
        kinds |= set(re.findall("add|subtract|double", row["prompt"]))
        for line in lines:
            left, sign, right, _, result = line.split()
            assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
    assert kinds == {"add", "subtract", "double"}


@pytest.mark.parametrize("numbers", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(ValueError, match="must be at least 1"):
        make_splits(*numbers[:2], num_steps=numbers[2])


def test_only_the_last_line_is_judged():
    texts = [RIGHT, RIGHT + "\n", "Answer: 94", RIGHT.replace("94", "95"), RIGHT + "5", RIGHT + "\nI am sure.", ""]
    assert answer_reward(texts, ["94"] * len(texts)) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert answer_reward([[{"role": "assistant", "content": RIGHT}]], ["94"]) == [1.0]


def test_the_truth_of_a_line_comes_from_the_prompt():
    wrong = "29 + 29 = 58\n58 - 11 = 46\n46 + 46 = 92\nAnswer: 92\nAnswer: 94"
    assert step_labels(PROMPT, wrong) == [True, False, False, False, False]
    # By luck, from other numbers
    assert step_labels(PROMPT, RIGHT.replace("29 + 29", "28 + 30"))[:2] == [False, True]
    assert step_labels(PROMPT, RIGHT + "\n") == [True] * 4
    assert step_labels(PROMPT, "") == []


def test_prepare_warms_up_once_on_chains_that_prime_does_not_see(tmp_path, monkeypatch, model_path):
    seen = []
    warm_up = smollm2.warm_up
    monkeypatch.setattr(number_chains, "BATCH_SIZE", 2)
    monkeypatch.setattr(smollm2, "warm_up", lambda *args, **kwargs: (seen.append(args[2]), warm_up(*args, **kwargs)))
    numbers = {"base_model": model_path, "num_steps": 2, "num_train": 6, "num_test": 4, "warm_up_steps": 2}
    task = prepare(tmp_path / "task", **numbers)
    weights, before = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (task.model, model_path))
    assert weights.keys() == before.keys()
    assert any(not weights[name].equal(before[name]) for name in weights)
    prompts = [set(rows["prompt"][:]) for rows in (seen[0], task.train_dataset, task.eval_dataset)]
    assert [len(part) for part in prompts] == [4, 6, 4]
    assert len(set.union(*prompts)) == 14
    prepare(tmp_path / "task", **numbers)
    assert len(seen) == 1
    prepare(tmp_path / "task", **{**numbers, "warm_up_steps": 1})
    assert len(seen) == 2
