"""Number chains: the data, its judge, the truth of each line, and the preparation on a tiny random model."""

import random
import re

import pytest
from transformers import AutoModelForCausalLM

from trl_prime.tasks import number_chains, smollm2
from trl_prime.tasks.number_chains import answer_reward, make_splits, prepare, solve, step_labels

PROMPT = "Start with 5, add 9, subtract 4, double it.\n"
RIGHT = "5+9=14\n14-4=10\n10+10=20\nAnswer: 20"


def test_a_chain_is_solved_line_by_line():
    assert "\n".join(solve(PROMPT)) == RIGHT
    with pytest.raises(ValueError, match="not a prompt of number chains"):
        solve("3 5 2 7=")


def test_problems_are_distinct_seeded_and_of_small_numbers():
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
        assert all(1 <= int(number) <= 20 for number in numbers)
        kinds |= set(re.findall("add|subtract|double", row["prompt"]))
        for line in lines:
            left, sign, right, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line).groups()
            assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
    assert kinds == {"add", "subtract", "double"}


def test_demonstrations_slip_by_one_at_the_rate_asked_for_and_go_on_from_there():
    prompts = make_splits(300, 1, seed=1)[0]["prompt"][:]
    rows = number_chains.make_demonstrations(prompts, 0.25, seed=3)
    assert rows["prompt"][:] == prompts
    slips = []
    for row in rows:
        *lines, answer = row["completion"].split("\n")
        total, *operations = row["prompt"].removesuffix(".\n").split(", ")
        total = int(total.split()[-1])
        for operation, line in zip(operations, lines, strict=True):
            kind, number = operation.split()
            number = total if kind == "double" else int(number)
            sign = "-" if kind == "subtract" else "+"
            assert line.startswith(f"{total}{sign}{number}=")
            result = int(line.split("=")[1])
            slips.append(result - (total - number if sign == "-" else total + number))
            total = result
        assert answer == f"Answer: {total}"
    # 1,800 lines, so that the error of a share is 0.01
    assert set(slips) == {-1, 0, 1}
    assert sum(map(abs, slips)) / len(slips) == pytest.approx(0.25, abs=0.04)
    assert sum(slips) / len(slips) == pytest.approx(0, abs=0.05)
    assert number_chains.make_demonstrations(prompts, 0.25, seed=3).to_dict() == rows.to_dict()
    assert number_chains.make_demonstrations(prompts, 0.25, seed=4).to_dict() != rows.to_dict()
    clean = number_chains.make_demonstrations(prompts, 0.0)["completion"][:]
    assert clean == ["\n".join(solve(prompt)) for prompt in prompts]
    with pytest.raises(ValueError, match="slip_rate must be from 0 to 1, got 2"):
        number_chains.make_demonstrations(prompts, 2)


@pytest.mark.parametrize("numbers", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(ValueError, match="must be at least 1"):
        make_splits(*numbers[:2], num_steps=numbers[2])


def test_more_problems_than_there_are_are_refused():
    # Of one step: 19 other numbers from each of 20, and 10 that can be doubled
    train, test = make_splits(380, 10, num_steps=1)
    assert len({*train["prompt"], *test["prompt"]}) == 390
    with pytest.raises(ValueError, match="391 problems .* only 390 chains of num_steps=1"):
        make_splits(381, 10, num_steps=1)
    pairs = {number_chains._draw_prompt(2, random.Random(seed)) for seed in range(60_000)}
    assert 0.95 < len(pairs) / number_chains._count_prompts(2) <= 1


def test_only_the_last_line_is_judged():
    texts = [RIGHT, RIGHT + "\n", "Answer: 20", RIGHT.replace("20", "21"), RIGHT + "5", RIGHT + "\nI am sure.", ""]
    assert answer_reward(texts, ["20"] * len(texts)) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert answer_reward([[{"role": "assistant", "content": RIGHT}]], ["20"]) == [1.0]


def test_the_truth_of_a_line_comes_from_the_prompt():
    wrong = "5+9=14\n14-4=9\n9+9=18\nAnswer: 18\nAnswer: 20"
    assert step_labels(PROMPT, wrong) == [True, False, False, False, False]
    # By luck, from other numbers
    assert step_labels(PROMPT, RIGHT.replace("5+9", "6+8"))[:2] == [False, True]
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
    prepare(tmp_path / "task", **{**numbers, "slip_rate": 0.5})
    assert len(seen) == 2
    prepare(tmp_path / "task", **{**numbers, "warm_up_steps": 1})
    assert len(seen) == 3
