from __future__ import annotations

import json

import pytest
import torch

from trl_prime.tasks import running_sums
from trl_prime.tasks.running_sums import (
    every_sum_reward,
    make_dataset,
    make_demonstrations,
    make_splits,
    prepare,
    running_sum_reward,
    step_labels,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_sums(prompt: str) -> list[int]:
    """The running sums, each one added up from the start."""
    digits = [int(character) for character in prompt if character.isdigit()]
    return [sum(digits[: i + 1]) % 10 for i in range(len(digits))]


def test_dataset_is_right_and_distinct():
    data = make_dataset(300, num_digits=7, seed=3)
    assert data.column_names == ["prompt", "solution", "steps"]
    assert len(data) == len(set(data["prompt"])) == 300
    for row in data:
        sums = slow_sums(row["prompt"])
        assert len(sums) == 7
        assert row["steps"] == "\n".join(map(str, sums))
        assert row["solution"] == str(sums[-1])
    assert make_dataset(1)[0]["prompt"].count(" ") == 9


def test_dataset_depends_on_the_seed_only():
    assert make_dataset(50, seed=1).to_dict() == make_dataset(50, seed=1).to_dict()
    assert make_dataset(50, seed=1)["prompt"][:] != make_dataset(50, seed=2)["prompt"][:]


def test_splits_do_not_overlap():
    # 100 problems of two digits exist, so independent draws would overlap.
    train, test = make_splits(60, 40, num_digits=2, seed=0)
    assert (len(train), len(test)) == (60, 40)
    assert len(set(train["prompt"]) | set(test["prompt"])) == 100
    assert make_splits(30, 40, num_digits=2, seed=0)[1].to_dict() == test.to_dict()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: make_dataset(11, num_digits=1),
        lambda: make_splits(6, 5, num_digits=1),
        lambda: make_dataset(-1),
        lambda: make_dataset(1, num_digits=0),
    ],
)
def test_impossible_draws_are_refused(draw):
    with pytest.raises(ValueError):
        draw()


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("3\n8\n0\n7", 1.0),
        ("3\n8\n0\n7\n", 1.0),
        ("1\n7", 1.0),
        ("7", 1.0),
        ("3\n8\n0\n6", 0.0),
        ("3\n8\n7\n0", 0.0),
        ("3\n8\n0\n17", 0.0),
        ("3807", 0.0),
        ("7\n\n", 0.0),
        ("", 0.0),
        ("\n", 0.0),
        (" =7=", 0.0),
        ("<unk>", 0.0),
    ],
)
def test_reward_by_hand(completion, reward):
    assert running_sum_reward([completion], ["7"]) == [reward]
    messages = [{"role": "assistant", "content": completion}]
    assert running_sum_reward(completions=[messages], solution=["7"], prompts=["3 5 2 7="]) == [reward]


def test_reward_of_a_batch():
    assert running_sum_reward(["1\n7", [], "4"], ["7", "7", "5"], trainer_state=None) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        running_sum_reward(["1", "2"], ["1"])


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("3\n8\n0", 1.0), ("3\n8\n0\n", 1.0), ("4\n8\n0", 0.0), ("3\n8", 0.0), ("3\n8\n0\n0", 0.0), ("", 0.0)],
)
def test_every_sum_counts(completion, reward):
    assert every_sum_reward([completion], ["3\n8\n0"], solution=["0"]) == [reward]
    assert every_sum_reward([[{"role": "assistant", "content": completion}], []], ["3\n8\n0"] * 2) == [reward, 0.0]


@pytest.mark.parametrize(
    ("completion", "labels"),
    [
        ("3\n8\n0\n7", [True] * 4),
        ("3\n8\n0\n7\n", [True] * 4),
        ("3\n8", [True] * 2),
        # The last two add correctly to the wrong 9, and are wrong all the same.
        ("3\n9\n1\n8", [True, False, False, False]),
        ("3\n9\n0\n7", [True, False, True, True]),
        ("3\n8\n0\n7\n7", [True] * 4 + [False]),
        ("3\n\n0", [True, False, True]),
        ("03\n8", [False, True]),
        ("\n", [False]),
        ("", []),
    ],
)
def test_labels_by_hand(completion, labels):
    assert step_labels("3 5 2 7=", completion) == labels


def test_labels_against_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    for prompt in make_dataset(100, num_digits=6, seed=5)["prompt"]:
        truth = slow_sums(prompt)
        slips = (torch.rand(8, generator=generator) < 0.3).tolist()
        lines = [(value + slip) % 10 for value, slip in zip([*truth, 0, 0], slips, strict=True)]
        expected = []
        for i, line in enumerate(lines):
            expected.append(i < 6 and line == truth[i])
        assert step_labels(prompt, "\n".join(map(str, lines))) == expected


@pytest.mark.parametrize("prompt", ["", "3 5 2 7", "3 5 x=", "35=", "3 5=\n"])
def test_labels_refuse_what_is_not_a_prompt(prompt):
    with pytest.raises(ValueError, match="not a running-sum prompt"):
        step_labels(prompt, "3")


def test_demonstrations_are_wrong_where_they_should_be():
    import random

    rng = random.Random(0)
    wrong_sums = running_sums._draw_wrong_sums(14, rng)
    assert len(wrong_sums) == 14
    assert all(value in range(10) and value != sum(pair) % 10 for pair, value in wrong_sums.items())
    taught: dict[bool, list[bool]] = {True: [], False: []}
    for row in make_dataset(500):
        assert running_sums._demonstration(row["prompt"], wrong_sums, 0.0, rng) == row["steps"]
        digits = [int(character) for character in row["prompt"] if character.isdigit()]
        lines = [int(line) for line in running_sums._demonstration(row["prompt"], wrong_sums, 0.75, rng).split("\n")]
        assert lines[0] == digits[0]
        for pair_and_line in zip(lines, digits[1:], lines[1:], strict=False):
            *pair, line = pair_and_line
            right = line == sum(pair) % 10
            assert right or line == wrong_sums[tuple(pair)]
            taught[tuple(pair) in wrong_sums].append(right)
    assert all(taught[False])
    assert 0.2 < sum(taught[True]) / len(taught[True]) < 0.3


def test_demonstrations_leave_out_excluded_prompts_and_are_no_more_than_there_are():
    excluded = make_dataset(90, num_digits=2)["prompt"][:]
    seen = make_demonstrations(24, num_digits=2, exclude_prompts=excluded)["prompt"][:]
    assert len(seen) == len(set(seen)) == 10
    assert not set(seen) & set(excluded)
    assert len(make_demonstrations(4, num_digits=2, exclude_prompts=excluded)) == 4
    with pytest.raises(ValueError, match="leaves no problem"):
        make_demonstrations(1, num_digits=1, exclude_prompts=[f"{digit}=" for digit in range(10)])


@pytest.mark.parametrize("setting", [{"num_wrong_sums": 101}, {"wrong_rate": 1.5}])
def test_demonstrations_refuse_bad_numbers(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        make_demonstrations(8, **setting)


def test_prepare_saves_reuses_and_replaces(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    calls = []
    original = running_sums.warm_up

    def counting(model, tokenizer, demonstrations, output_dir, **kwargs):
        calls.append((kwargs["seed"], kwargs["steps"], set(demonstrations["prompt"])))
        return original(model, tokenizer, demonstrations, output_dir, **{**kwargs, "batch_size": 4})

    monkeypatch.setattr(running_sums, "warm_up", counting)
    sizes = {"num_train": 20, "num_test": 5, "num_digits": 3}
    task = prepare(tmp_path, warm_up_steps=2, **sizes)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(task.model), AutoTokenizer.from_pretrained(task.model)
    assert task.model == str(tmp_path / "sft")
    assert (len(task.train_dataset), len(task.eval_dataset)) == (20, 5)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    row = task.eval_dataset[0]
    assert tokenizer.decode(tokenizer(row["steps"])["input_ids"]) == row["steps"]
    assert all(task.step_labels(row["prompt"], row["steps"]))
    assert task.reward_funcs[0]([row["steps"]], solution=[row["solution"]]) == [1.0]
    ((seed, steps, demonstrated),) = calls
    assert (seed, steps, len(demonstrated)) == (0, 2, 128)
    assert not demonstrated & set(task.eval_dataset["prompt"])
    first = model.state_dict()

    again = prepare(tmp_path, warm_up_steps=2, **sizes)
    assert len(calls) == 1
    assert again.train_dataset.to_dict() == task.train_dataset.to_dict()

    prepare(tmp_path, warm_up_steps=3, **sizes)
    prepare(tmp_path, warm_up_steps=3, seed=1, **sizes)
    assert [call[:2] for call in calls] == [(0, 2), (0, 3), (1, 3)]
    replaced = AutoModelForCausalLM.from_pretrained(task.model).state_dict()
    assert any(not torch.equal(value, replaced[name]) for name, value in first.items())
    assert json.loads((tmp_path / "sft.json").read_text())["seed"] == 1


def test_prepare_does_not_trust_an_unfinished_base(tmp_path, monkeypatch):
    sizes = {"num_train": 5, "num_test": 5, "num_digits": 3, "warm_up_steps": 1}
    monkeypatch.setattr(running_sums, "warm_up", lambda *args, **kwargs: 0.0)
    prepare(tmp_path, **sizes)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(running_sums, "warm_up", interrupted)
    prepare(tmp_path, **sizes)
    # Neither settings match after it: the folder may hold half of the second base.
    for seed in (1, 1, 0):
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, seed=seed, **sizes)
