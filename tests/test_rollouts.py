"""Outcomes from rewards, against a loop over groups that follows the rule in words."""

import logging
import math

import pytest
import torch
from conftest import logged, row_rewards

from trl_prime.rollouts import combine_outcomes

NAN = math.nan


def slow_outcomes(rewards, weights, num_generations, label):
    outcomes = []
    for row, values in enumerate(rewards):
        group = rewards[row // num_generations * num_generations :][:num_generations]
        total, judges, unjudged = 0.0, 0, label is not None and math.isnan(values[label])
        for column, (value, weight) in enumerate(zip(values, weights, strict=True)):
            none_of_the_group = all(math.isnan(peer[column]) for peer in group)
            if weight == 0 or (none_of_the_group and num_generations > 1):
                continue
            judges += 1
            if math.isnan(value):
                unjudged = True
            else:
                total += weight * value
        outcomes.append(NAN if unjudged or not judges else total)
    return outcomes


@pytest.mark.parametrize("num_generations", [1, 2, 4])
@pytest.mark.parametrize("label", [None, 0])
def test_outcomes_are_those_of_the_rule(num_generations, label):
    generator = torch.Generator().manual_seed(0)
    unjudged = 0
    for share in (0.0, 0.3, 0.8):
        for weights in ([1.0, 0.5, 0.25], [0.0, 1.0, 0.0], [-1.0, 0.0, 2.0]):
            rewards = torch.rand(24, 3, generator=generator)
            rewards[torch.rand(24, 3, generator=generator) < share] = NAN
            outcomes, _ = combine_outcomes(rewards, torch.tensor(weights), num_generations, label)
            expected = torch.tensor(slow_outcomes(rewards.tolist(), weights, num_generations, label))
            torch.testing.assert_close(outcomes, expected, equal_nan=True)
            unjudged += int(outcomes.isnan().sum())
    assert 0 < unjudged < 9 * 24


def test_a_verifier_that_could_not_judge_beside_a_format_reward():
    """[math, format] of two prompts: of the first, math judged some completions, of the second none."""
    rewards = torch.tensor([[NAN, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0], *[[NAN, 1.0]] * 2, *[[NAN, 0.0]] * 2])
    weights = torch.tensor([0.9, 0.1])
    first = [NAN, 1.0, 0.1, 0.0]
    for label, second in ((None, [0.1, 0.1, 0.0, 0.0]), (0, [NAN] * 4)):
        outcomes, applies = combine_outcomes(rewards, weights, 4, label)
        torch.testing.assert_close(outcomes, torch.tensor(first + second), equal_nan=True)
        assert applies.tolist() == [[True, True]] * 4 + [[False, True]] * 4
    # Where there is one completion, one cannot tell whether the function is for that prompt
    assert combine_outcomes(rewards, weights, 1)[0].isnan().tolist() == rewards[:, 0].isnan().tolist()


def test_a_completion_without_verdict_is_not_trained_as_a_wrong_one(train, caplog):
    verifier = row_rewards((None, 1.0, 0.0, 0.0), "verifier")
    form = row_rewards((1.0,), "form")
    settings = {"reward_weights": [0.9, 0.1], "process_weight": 0.0, "whiten_advantages": False, "max_steps": 1}
    for label in ("reward", "verifier"):
        trainer = train(reward_funcs=[verifier, form], prm_label=label, **settings)
        # Right against two wrong ones, and these against one that is right and one that is wrong
        advantages = trainer.outputs[0]["advantages"][:4, 0].tolist()
        assert advantages == pytest.approx([0.0, 0.9, -0.45, -0.45])
        assert logged(trainer, "filter/judged") == logged(trainer, "filter/trained") == [0.75]
        # Means over what was judged: 1, 0.1 and 0.1; of one function, over what that one judged
        assert logged(trainer, "reward") == [pytest.approx(0.4)]
        assert logged(trainer, "reward_std") == [pytest.approx(torch.tensor([1.0, 0.1, 0.1] * 2).std().item())]
        assert logged(trainer, "rewards/verifier/mean") == [pytest.approx(1 / 3)]
        assert logged(trainer, "rewards/form/mean") == [1.0]


def test_functions_that_are_left_out_of_an_outcome_are_named_once(train, caplog):
    logging.getLogger("trl_prime").propagate = True
    logging.Logger.warning_once.cache_clear()  # other runs in this process may have said the same
    verifier = row_rewards((None,) * 4 + (1.0, 0.0, 0.0, 1.0), "verifier")
    form = row_rewards((1.0, 0.0), "form")

    def warnings():
        return [r.getMessage() for r in caplog.records if "sum of the other reward functions" in r.getMessage()]

    trainer = train(reward_funcs=[verifier, form], reward_weights=[0.5, 0.5], prm_label="verifier")
    assert logged(trainer, "filter/judged") == [0.5, 0.5] and not warnings()
    trainer = train(reward_funcs=[verifier, form], reward_weights=[0.5, 0.5])
    assert logged(trainer, "filter/judged") == [1.0, 1.0]
    assert len(warnings()) == 1 and "['verifier'] returned None" in warnings()[0]
