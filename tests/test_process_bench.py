"""The first wrong step: predictions, F1, the threshold, and the rewards of given steps."""

import random

import pytest
import torch
from conftest import build_tokenizer
from tokenizers import Regex, pre_tokenizers

from trl_prime.evaluation.end_to_end import summarize_process_bench
from trl_prime.evaluation.process_bench import (
    choose_threshold,
    predict_first_error,
    process_bench_scores,
    score_steps,
    step_auc,
)


def slow_f1(step_rewards, labels, threshold):
    hits = {True: [], False: []}
    for rewards, label in zip(step_rewards, labels, strict=True):
        prediction = next((i for i, reward in enumerate(rewards) if reward < threshold), -1)
        hits[label == -1].append(prediction == label)
    correct, erroneous = (sum(hits[kind]) / len(hits[kind]) for kind in (True, False))
    return erroneous, correct, 2 * erroneous * correct / (erroneous + correct) if erroneous + correct else 0.0


def random_rows(rng, num_rows, values=6):
    step_rewards = [[float(rng.randint(-values, values)) for _ in range(rng.randint(1, 5))] for _ in range(num_rows)]
    return step_rewards, [rng.randint(-1, len(rewards) - 1) for rewards in step_rewards]


def test_scores_agree_with_counting():
    rng = random.Random(0)
    for _ in range(20):
        step_rewards, labels = random_rows(rng, 12)
        if all(label == -1 for label in labels) or -1 not in labels:
            continue
        for threshold in (-3.5, 0.0, 2.0):
            scores = process_bench_scores(predict_first_error(step_rewards, threshold), labels)
            values = tuple(scores[name]["value"] for name in ("erroneous", "correct", "f1"))
            assert values == pytest.approx(slow_f1(step_rewards, labels, threshold))
            assert scores["f1"]["low"] <= scores["f1"]["value"] <= scores["f1"]["high"]


def test_the_chosen_threshold_is_the_best_of_all():
    rng = random.Random(1)
    for _ in range(40):
        step_rewards, labels = random_rows(rng, 8)
        if all(label == -1 for label in labels) or -1 not in labels:
            continue
        best = max(slow_f1(step_rewards, labels, half / 2)[2] for half in range(-15, 17))
        threshold = choose_threshold(step_rewards, labels)
        assert slow_f1(step_rewards, labels, threshold)[2] == pytest.approx(best)


def test_a_threshold_for_more_solutions_than_memory_holds_the_square_of():
    # Wrong steps at 0, 1, 2, ... and right ones from half way on: each right solution that is kept costs a wrong one
    count = 400_000
    step_rewards = [[float(i)] for i in range(count)] * 2
    labels = [0] * count + [-1] * count
    threshold = choose_threshold(step_rewards, labels)
    assert slow_f1(step_rewards, labels, threshold)[2] == pytest.approx(0.5, abs=1e-5)


def test_the_threshold_lies_between_right_and_wrong_steps():
    step_rewards = [[3.0, 2.0], [4.0, -1.0, 9.0], [-2.0], [2.5]]
    assert choose_threshold(step_rewards, [-1, 1, 0, -1]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="needs right and wrong ones"):
        choose_threshold(step_rewards, [-1, -1, -1, -1])


def test_a_threshold_is_chosen_on_rows_that_are_not_reported():
    # The first step of wrong solutions is wrong; a fifth of the rows tells a threshold that fits all
    step_rewards = [[1.0, 1.0], [-1.0, 1.0]] * 20
    labels = [-1, 0] * 20
    summary = summarize_process_bench(step_rewards, labels)
    assert summary["num_calibration"] == 8 and summary["num_solutions"] == 32
    assert summary["metrics"]["f1"]["value"] == 1.0 and summary["auc"] == 1.0 and -1 < summary["threshold"] < 1
    given = summarize_process_bench(step_rewards, labels, threshold=2.0)
    assert given["num_solutions"] == 40 and given["metrics"]["correct"]["value"] == 0.0
    assert given["metrics"]["f1"]["value"] == 0.0


def test_auc_leaves_out_what_follows_the_first_wrong_step():
    assert step_auc([[2.0, 0.0, -9.0], [1.0]], [1, -1]) == 1.0
    assert step_auc([[0.0, 2.0], [1.0]], [1, -1]) == 0.0


def test_rewards_of_given_steps_are_sums_over_their_tokens(random_prm):
    prm = random_prm()
    prompts = [[{"role": "user", "content": "add 1 and 2"}], [{"role": "user", "content": "what"}]]
    steps = [["one\nis 1", "so 3", "done"], ["only"]]
    rewards = score_steps(prm, prompts, steps)
    scored = prm.score(prompts, ["one\nis 1\n\nso 3\n\ndone", "only"])
    # The tokenizer has a token for each character; the end of the sequence belongs to the last step
    expected = [
        [r.sum().item() for r in s.token_rewards.split(n)] for s, n in zip(scored, ([10, 6, 5], [5]), strict=True)
    ]
    assert rewards[0] == pytest.approx(expected[0], abs=1e-5) and rewards[1] == pytest.approx(expected[1], abs=1e-5)
    lines = prm.score(prompts[:1], ["one\nis 1\nso 3\ndone"])[0].token_rewards.split([9, 5, 5])
    assert score_steps(prm, prompts[:1], steps[:1], "\n")[0] == pytest.approx(
        [r.sum().item() for r in lines], abs=1e-5
    )
    assert sum(rewards[0]) == pytest.approx(scored[0].reward, abs=1e-5)


def test_a_token_belongs_to_the_step_it_begins_in(random_prm):
    prm = random_prm()
    # A tokenizer whose tokens reach over the end of a step, and whose text is not one byte a character
    tokenizer = build_tokenizer()
    pattern = Regex("é\n\nb|.|\n")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    prm.tokenizer = tokenizer
    scored = prm.score(["1"], ["aé\n\nbc"])[0]
    assert len(scored.token_rewards) == 4, "a, the long token, c and the end"
    rewards = score_steps(prm, ["1"], [["aé", "bc"]])[0]
    assert rewards == pytest.approx([scored.token_rewards[:2].sum().item(), scored.token_rewards[2:].sum().item()])
    assert torch.isfinite(scored.token_rewards).all()
