"""Outcomes from rewards, against a loop over groups that follows the rule in words."""

import logging
import math
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy
import pandas
import pytest
import torch
from conftest import build_model, distance, logged, row_rewards, same, weights
from datasets import Dataset
from helpers import BAND, FAILS, MIXED, PASSES, fixed_rollouts, loss_mask, metrics, slow_process_rewards

from trl_prime.implicit_prm.accuracies import pairwise_accuracy
from trl_prime.rollouts import combine_outcomes, draw_rows, log_gold_answers

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
        for factors in ([1.0, 0.5, 0.25], [0.0, 1.0, 0.0], [-1.0, 0.0, 2.0]):
            rewards = torch.rand(24, 3, generator=generator)
            rewards[torch.rand(24, 3, generator=generator) < share] = NAN
            outcomes, _ = combine_outcomes(rewards, torch.tensor(factors), num_generations, label)
            expected = torch.tensor(slow_outcomes(rewards.tolist(), factors, num_generations, label))
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


# --- Rewards and labels ---


@pytest.mark.parametrize("unjudged", [(1,), (4, 5, 6, 7), tuple(range(8))], ids=str)
def test_rows_without_reward_train_nothing(record, updates, random_prm, unjudged):
    """Fault 17."""
    values = [None if i in unjudged else value for i, value in enumerate(MIXED)]
    prm = random_prm()
    recorder = record(row_rewards(values), prm_model=prm, beta=0.0, max_steps=1)
    output, rewards = recorder.trainer.outputs[0], recorder.rewards[0]
    rows = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(unjudged), True)
    assert torch.equal(rewards.outcome_rewards.isnan(), rows) and torch.equal(updates[0].labels.isnan(), rows)
    assert not output["advantages"][rows].any() and not loss_mask(output)[rows].any()
    assert not updates[0].policy_mask[rows].any()
    assert loss_mask(output).sum() == output["completion_mask"][~rows].sum()
    assert output["num_items_in_batch"] == max(loss_mask(output).sum(), 1)
    if not rows.all():
        assert output["advantages"][~rows].any(dim=1).sum() >= 3
    moved = [not same(weights(recorder.trainer.model), weights(build_model()))]
    moved += [not same(weights(prm.model), weights(random_prm().model))]
    assert moved == [not rows.all()] * 2
    assert logged(recorder.trainer, "filter/judged")[0] == pytest.approx(1 - len(unjudged) / 8)
    # The others' baseline leaves them out
    for row in (~rows).nonzero().flatten().tolist():
        peers = [values[i] for i in range(row // 4 * 4, row // 4 * 4 + 4) if i != row and values[i] is not None]
        expected = values[row] - sum(peers) / len(peers)
        only_outcome = rewards.combine(process_weight=0.0, whiten=False)[row]
        torch.testing.assert_close(only_outcome[rewards.completion_mask[row]].unique(), torch.tensor([expected]))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
@pytest.mark.parametrize("cause", ["none", "filter", "truncated"])
def test_content_of_dropped_rows_reaches_neither_policy_nor_prm(train, model_path, cause, loss_type):
    """Not even through the KL term or the entropy bonus: two runs that differ only there end alike."""
    values = {"none": (1.0, 0.0, 0.0, 1.0, None, None, None, None), "filter": (1, 0, 0, 1, 0, 0, 0, 0)}
    settings = {
        "model": model_path,
        "prm_loss_type": "dpo" if loss_type == "dapo" else "ce",
        "loss_type": loss_type,
        "beta": 0.1,
        "entropy_coef": 0.1,
        "optim": "sgd",
        "learning_rate": 0.05,
        "prm_optim": "sgd",
        "prm_learning_rate": 0.05,
        "accuracy_low": 0.2,
        "accuracy_high": 0.8,
        "filter_truncated": cause == "truncated",
    }
    lengths = (5, 7, 3, 6, 7, 2, 4, 8 if cause == "truncated" else 7)
    results = {}
    for change in ((), (4, 5, 6, 7), (1,)):
        trainer = train(
            reward_funcs=row_rewards(values.get(cause, MIXED)),
            rollout_func=fixed_rollouts(change=change, lengths=lengths),
            **settings,
        )
        results[change] = {
            **{f"policy.{k}": v for k, v in weights(trainer.model).items()},
            **{f"prm.{k}": v for k, v in weights(trainer.implicit_prm.model).items()},
        }
        assert logged(trainer, "filter/pass_rate") == [0.5, 0.5]
    assert distance(results[()], results[(4, 5, 6, 7)]) < 1e-6
    for part in ("policy.", "prm."):  # while the content of the others does
        first, second = ({k: v for k, v in results[c].items() if k.startswith(part)} for c in ((), (1,)))
        assert distance(first, second) > 1e-4


async def async_reward(completions, **kwargs):
    return [0.25 * (i % 2) for i in range(len(completions))]


def test_several_reward_functions(train, updates):
    """Weighted sum by default, one of them by name; a row counts when all functions judged it."""
    seen = []
    correct = row_rewards((1.0, 0.0, None, 1.0, None, 0.0, 1.0, 0.0), "correct")
    style = row_rewards((None, 0.5, 1.0, 0.5, None, None, None, None), "style")
    # The reward "style" judged nothing of the second prompt: it is for the first
    outcomes = [NAN, 0.125 + 0.25, NAN, 0.5 + 0.125 + 0.25, NAN, 0.25, 0.5, 0.25]
    expected = {"reward": outcomes, "correct": [NAN, 0.0, NAN, 1.0, NAN, 0.0, 1.0, 0.0]}
    for label in ("reward", "correct"):
        updates.clear()
        seen.clear()
        train(
            reward_funcs=[correct, style, async_reward],
            reward_weights=[0.5, 0.25, 1.0],
            prm_label=label,
            reward_combination=lambda rewards: seen.append(rewards) or rewards.combine(),
            max_steps=1,
        )
        assert [*seen[0].reward_func_names] == ["correct", "style", "async_reward"]
        assert seen[0].outcome_rewards_per_func.shape == (8, 3)
        numpy.testing.assert_allclose(seen[0].outcome_rewards.numpy(), expected["reward"])
        numpy.testing.assert_allclose(updates[0].labels.numpy(), expected[label])


def test_labels_outside_zero_to_one_are_refused_with_the_fix(train):
    with pytest.raises(ValueError, match=r"label 2 is outside \[0, 1\].*prm_label.*row_reward.*reward_weights"):
        train(reward_funcs=row_rewards((0.0, 2.0)))
    with pytest.raises(ValueError, match=r"-0\.5 is outside"):
        train(reward_funcs=row_rewards((0.0, -0.5)))
    with pytest.raises(ValueError, match=r"'row_reward' returned infinity"):
        train(reward_funcs=row_rewards((0.0, math.inf)))
    # The fix works
    funcs = [row_rewards(MIXED, "correct"), row_rewards((0.0, 2.0), "bonus")]
    trainer = train(reward_funcs=funcs, prm_label="correct")
    assert not same(weights(trainer.implicit_prm.model), weights(build_model()))
    train(reward_funcs=funcs, reward_weights=[0.5, 0.25])


# --- Prompt filter and oversampling ---


def test_a_group_of_equal_partial_credit_fails_the_filter(train):
    """Fault 12."""
    trainer = train(reward_funcs=row_rewards((0.5,) * 4 + PASSES), **BAND)
    assert not loss_mask(trainer.outputs[0])[:4].any() and loss_mask(trainer.outputs[0])[4:].any()


def test_rows_that_are_left_out_are_told_to_the_policy_loss(train):
    trainer = train(reward_funcs=row_rewards(FAILS + PASSES), **BAND)
    output = trainer.outputs[0]
    assert output["rows_per_trained_row"] == 2 and output["num_items_in_batch"] == loss_mask(output).sum()
    trainer = train(reward_funcs=row_rewards(PASSES * 2), **BAND)
    assert trainer.outputs[0]["rows_per_trained_row"] == 1


@pytest.mark.parametrize(
    ("groups", "kept"),
    [((FAILS, PASSES, FAILS, PASSES), (1, 3)), ((PASSES,) * 4, (0, 1)), ((FAILS, FAILS, PASSES, FAILS), (0, 2))],
)
@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_oversampling_keeps_whole_groups_that_pass_first(record, groups, kept, steps_per_generation):
    """Fault 11."""
    values = [value for group in groups for value in group]
    prompts = []
    recorder = record(
        lambda prompts_=prompts, **kwargs: prompts_.append(kwargs["prompts"]) or values,
        oversample_factor=2,
        per_device_train_batch_size=8 // steps_per_generation,
        steps_per_generation=steps_per_generation,
        log_completions=True,
        max_steps=2,
        **BAND,
    )
    trainer, rewards = recorder.trainer, recorder.rewards[0]
    output = trainer.outputs[0]
    assert len(prompts[0]) == 16 and len(prompts) == 2 // steps_per_generation
    rows = [group * 4 + i for group in kept for i in range(4)]
    assert [*rewards.prompts] == [prompts[0][row] for row in rows]
    assert len({*rewards.prompts}) == 2
    num_rows, num_tokens = output["completion_ids"].shape
    assert num_rows == 8 and output["advantages"].shape == output["completion_mask"].shape == (8, num_tokens)
    trained = [values[row] if sum(groups[row // 4]) else NAN for row in rows]
    numpy.testing.assert_equal(rewards.outcome_rewards.tolist(), trained)
    passing = ~torch.tensor(trained).isnan()
    assert torch.equal(loss_mask(output).any(1), passing) and not output["advantages"][~passing].any()
    decoded = trainer.processing_class.batch_decode(output["prompt_ids"], skip_special_tokens=True)
    assert decoded == [prompts[0][row] for row in rows]
    assert output["num_items_in_batch"] == loss_mask(output).sum()
    assert logged(trainer, "filter/pass_rate")[0] == sum(map(sum, groups)) / 2 / 4
    assert logged(trainer, "filter/trained")[0] == passing.float().mean()

    table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    assert len(table) == 16 and [*table["prompt"]] == prompts[0] and [*table["prime/outcome"]] == values
    expected = numpy.zeros(16, dtype=bool)
    expected[rows] = passing.numpy()
    assert [*table["prime/trained"]] == [*expected]
    mean = (output["advantages"] * loss_mask(output)).sum(1) / loss_mask(output).sum(1).clamp(min=1)
    numpy.testing.assert_allclose(table["advantage"][rows], mean, atol=1e-6)
    assert not table["advantage"][~expected].any() and not table["prime/process_reward"][~expected].any()


def test_oversampling_by_half_and_longer_prompts_of_dropped_groups(record):
    recorder = record(
        row_rewards(PASSES + FAILS + PASSES), oversample_factor=1.5, steps_per_generation=1, max_steps=3, **BAND
    )
    for output in recorder.trainer.outputs:
        assert output["completion_ids"].shape[0] == 8
        assert output["prompt_mask"].any(0).all()  # no column that only dropped rows needed
        assert loss_mask(output).any(1).all()
    assert logged(recorder.trainer, "filter/pass_rate") == pytest.approx([2 / 3] * 3)


def test_a_batch_without_any_group_leaves_everything_where_it_is(train):
    trainer = train(reward_funcs=row_rewards(FAILS), max_steps=1, logging_steps=1, **BAND)
    assert same(weights(trainer.model), weights(build_model()))
    assert same(weights(trainer.implicit_prm.model), weights(build_model()))
    assert metrics(trainer)[0]["loss"] == 0 and metrics(trainer)[0]["filter/pass_rate"] == 0


# --- Further rounds of generation ---


class Rounds:
    """A reward function that judges each call by the next pattern, and remembers what it has judged."""

    def __init__(self, patterns):
        self.patterns, self.calls = [[value for group in groups for value in group] for groups in patterns], []

    def __call__(self, prompts, completions, completion_ids, log_extra, **columns):
        values = self.patterns[len(self.calls)]
        self.calls.append([*zip(prompts, completions, completion_ids, values, columns["target"], strict=True)])
        if len(self.calls) % 2 == 0:
            log_extra("note", [f"note {i}" for i in range(len(prompts))])
        return values


def slow_kept(patterns, max_rounds, num_groups, num_generations=4):
    """Rounds that are generated, and (row, whether it is trained on) of the rows that are kept."""
    passed, failed, rounds = [], [], 0
    while rounds < max_rounds and len(passed) < num_groups:
        for i, group in enumerate(patterns[rounds]):
            (passed if 0.2 <= sum(group) / num_generations <= 0.8 else failed).append(rounds * len(patterns[0]) + i)
        rounds += 1
    kept = sorted((passed + failed)[:num_groups])
    return rounds, [(group * num_generations + i, group in passed) for group in kept for i in range(num_generations)]


# Two groups make a batch; with oversampling a round has four
@pytest.mark.parametrize(
    ("factor", "max_rounds", "patterns"),
    [
        (1, 3, [[PASSES, PASSES]]),
        (1, 3, [[FAILS, PASSES], [PASSES, PASSES]]),
        (1, 3, [[FAILS, FAILS], [FAILS, PASSES], [FAILS, PASSES]]),
        (1, 3, [[FAILS, FAILS], [FAILS, FAILS], [FAILS, PASSES]]),
        (1, 2, [[FAILS, FAILS], [FAILS, FAILS]]),
        (1, 1, [[FAILS, PASSES]]),
        (2, 2, [[FAILS, FAILS, PASSES, FAILS], [FAILS, PASSES, PASSES, FAILS]]),
    ],
)
def test_groups_of_all_rounds_fill_the_batch(record, factor, max_rounds, patterns):
    judge = Rounds(patterns)
    recorder = record(
        judge, oversample_factor=factor, filter_max_rounds=max_rounds, log_completions=True, max_steps=1, **BAND
    )
    trainer, rewards = recorder.trainer, recorder.rewards[0]
    output, entry = trainer.outputs[0], metrics(trainer)[0]
    num_rounds, kept = slow_kept(patterns, max_rounds, num_groups=2)
    assert [len(call) for call in judge.calls] == [8 * factor] * num_rounds
    generated = [row for call in judge.calls for row in call]
    rows, trains = [row for row, _ in kept], [passed for _, passed in kept]

    # What the hook and the policy loss get
    assert [(*texts,) for texts in zip(rewards.prompts, rewards.completions, strict=True)] == [
        generated[row][:2] for row in rows
    ]
    expected = [generated[row][3] if passed else NAN for row, passed in kept]
    numpy.testing.assert_equal(rewards.outcome_rewards.tolist(), expected)
    assert rewards.outcome_rewards_per_func.flatten().tolist() == [generated[row][3] for row in rows]
    decoded = trainer.processing_class.batch_decode(output["prompt_ids"], skip_special_tokens=True)
    assert decoded == [generated[row][0] for row in rows]
    for i, row in enumerate(rows):
        mask = output["completion_mask"][i].bool()
        assert output["completion_ids"][i][mask].tolist() == generated[row][2]
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        prompt_mask = output["prompt_mask"][i].tolist()
        assert prompt_mask == sorted(prompt_mask) and sum(prompt_mask) == len(generated[row][0])
    assert output["prompt_mask"].any(0).all() and output["completion_mask"].any(0).all()
    assert loss_mask(output).any(1).tolist() == trains
    assert output["num_items_in_batch"] == max(loss_mask(output).sum(), 1)

    # Metrics are over all that was generated
    passes = sum(group == PASSES for groups in patterns[:num_rounds] for group in groups)
    assert entry["filter/pass_rate"] == pytest.approx(passes / len(generated) * 4)
    assert entry["reward"] == pytest.approx(sum(row[3] for row in generated) / len(generated))
    assert entry["filter/trained"] == sum(trains) / 8
    assert entry.get("filter/rounds") == (num_rounds if max_rounds > 1 else None)
    lengths = [len(row[2]) for row in generated]
    assert entry["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert entry["num_tokens"] == sum(lengths) + sum(len(row[0]) for row in generated)

    table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    assert [(*row,) for row in zip(table["prompt"], table["completion"], strict=True)] == [
        row[:2] for row in generated
    ]
    assert [*table["prime/outcome"]] == [row[3] for row in generated]
    assert table.index[table["prime/trained"]].tolist() == [row for row, passed in kept if passed]
    sums = numpy.zeros(len(generated))
    sums[rows] = rewards.process_rewards.sum(1)
    numpy.testing.assert_allclose(table["prime/process_reward"], sums, atol=1e-6)
    # A column of the user's that was written in the second round only
    if num_rounds > 1:
        notes = [None] * 8 * factor + [f"note {i}" for i in range(8 * factor)]
        expected = notes + [None] * (len(generated) - len(notes))
        assert table["note"].fillna("").tolist() == [note or "" for note in expected]


def test_the_table_has_the_rows_of_the_last_batch_however_many_rounds_it_took(train):
    few, many = [[PASSES, PASSES]], [[FAILS, PASSES], [FAILS, FAILS], [FAILS, PASSES]]
    judge = Rounds([*few, *many, *few])
    trainer = train(reward_funcs=judge, filter_max_rounds=3, log_completions=True, max_steps=3, **BAND)
    assert logged(trainer, "filter/rounds") == [1, 3, 1]
    calls = [judge.calls[:1], judge.calls[1:4], judge.calls[4:]]
    for step, rounds in enumerate(calls, start=1):
        table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_0000{step}.parquet")
        assert [*table["completion"]] == [row[1] for call in rounds for row in call]
        assert [*table["prime/outcome"]] == [row[3] for call in rounds for row in call]
        assert table["prime/trained"].all() == (len(rounds) == 1) and table["prime/trained"].sum() == 8


def test_further_rounds_draw_other_prompts_each_time(train):
    judge = Rounds([[FAILS, FAILS]] * 8)
    rows = Dataset.from_list([{"prompt": f"{i}=", "target": i} for i in range(5000)])
    trainer = train(
        reward_funcs=judge,
        train_dataset=rows,
        filter_max_rounds=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=8,
        steps_per_generation=1,
        max_steps=1,
        **BAND,
    )
    # Two generation batches in one step of the policy, of four rounds each
    assert logged(trainer, "filter/rounds") == [4] and len(judge.calls) == 8
    prompts = [[row[0] for row in call] for call in judge.calls]
    assert all(call == [call[0]] * 4 + [call[4]] * 4 for call in prompts)
    assert len({prompt for call in prompts for prompt in call}) == 16
    assert all(row[0] == f"{row[4]}=" for call in judge.calls for row in call)


def test_further_rounds_have_the_columns_of_the_first(train):
    seen = []

    def reward(completions, **columns):
        seen.append(sorted(columns))
        return [0.0] * len(completions)

    train(reward_funcs=reward, remove_unused_columns=True, filter_max_rounds=2, max_steps=1, **BAND)
    assert len(seen) == 2 and seen[0] == seen[1] and "target" not in seen[0]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_draw_the_parts_of_one_list_of_whole_groups(num_processes):
    rows = Dataset.from_list([{"prompt": i} for i in range(12)])

    def drawn(seed):
        parts = [
            draw_rows(
                rows, 24 // num_processes, 6, seed, SimpleNamespace(num_processes=num_processes, process_index=i)
            )
            for i in range(num_processes)
        ]
        assert [len(part) for part in parts] == [24 // num_processes] * num_processes
        return [row["prompt"] for part in parts for row in part]

    prompts = drawn("0 100")
    assert prompts == [prompt for prompt in prompts[::6] for _ in range(6)] and len({*prompts}) == 4
    assert drawn("0 100") == prompts != drawn("0 101")
    # No prompt comes more often than others
    counts = [0] * 12
    for seed in range(600):
        for prompt in {*drawn(str(seed))}:
            counts[prompt] += 1
    assert max(abs(count - 200) for count in counts) < 60


# --- Masks ---


def test_tokens_that_the_policy_did_not_write_get_nothing(record, updates, random_prm):
    recorder = record(
        row_rewards(MIXED), prm_model=random_prm(), rollout_func=fixed_rollouts(env_mask=(1, 3)), max_steps=1
    )
    output, rewards = recorder.trainer.outputs[0], recorder.rewards[0]
    written = output["completion_mask"].bool().clone()
    written[:, [1, 3]] = False
    assert torch.equal(rewards.completion_mask, written) and torch.equal(updates[0].policy_mask, written)
    assert torch.equal(loss_mask(output).bool(), written)
    assert not rewards.process_rewards[~written].any() and not output["advantages"][~written].any()
    assert rewards.process_rewards[written].all()
    assert output["num_items_in_batch"] == written.sum()
    reference = random_prm().reference
    expected = slow_process_rewards(random_prm().model, reference, output) * written
    torch.testing.assert_close(rewards.process_rewards, expected, atol=2e-5, rtol=1e-4)


def test_masked_truncated_completions_teach_nothing(record, updates, random_prm):
    labels = (1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    recorder = record(
        row_rewards(labels),
        prm_model=random_prm(),
        rollout_func=fixed_rollouts(),
        mask_truncated_completions=True,
        max_steps=1,
    )
    output, rewards = recorder.trainer.outputs[0], recorder.rewards[0]
    truncated = torch.tensor([1, 4])  # those of 8 tokens
    assert not loss_mask(output)[truncated].any() and not output["advantages"][truncated].any()
    assert not updates[0].policy_mask[truncated].any() and output["advantages"].isfinite().all()
    # A completion that has no tokens has no score, and is in no pair
    scores, judged = rewards.process_rewards.sum(1), torch.tensor(labels).index_fill(0, truncated, NAN)
    expected = pairwise_accuracy(scores, judged, 4)
    assert expected != pairwise_accuracy(scores, torch.tensor(labels), 4)
    assert logged(recorder.trainer, "prm/pairwise_accuracy") == [pytest.approx(expected)]


def test_filter_truncated_drops_the_group(train):
    trainer = train(
        reward_funcs=row_rewards(PASSES * 2),
        rollout_func=fixed_rollouts(lengths=(5, 8, 3, 6, 2, 2, 4, 7)),
        filter_truncated=True,
    )
    assert loss_mask(trainer.outputs[0]).any(1).tolist() == [False] * 4 + [True] * 4
    trainer = train(reward_funcs=row_rewards(PASSES * 2), rollout_func=fixed_rollouts())
    assert loss_mask(trainer.outputs[0]).any(1).all()


# --- Gold answers in the completions table ---


@pytest.mark.parametrize("oversample_factor", [1, 2])
def test_the_completions_table_has_the_gold_answer_of_each_row(train, oversample_factor):
    rows = Dataset.from_list([{"prompt": f"{i}+1=", "solution": f"#### {i + 1}"} for i in range(8)])
    settings = {"train_dataset": rows, "log_completions": True, "max_steps": 2, "oversample_factor": oversample_factor}
    values = (*FAILS, *PASSES) * 2
    trainer = train(reward_funcs=row_rewards(values), **settings, **BAND)
    for step in (1, 2):
        table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_0000{step}.parquet")
        assert len(table) == 8 * oversample_factor == len({*table["prompt"]}) * 4
        assert [*table["prime/gold"]] == [f"#### {int(prompt[0]) + 1}" for prompt in table["prompt"]]
        # What the filter leaves out has one too
        assert table["prime/trained"].sum() == 4 * oversample_factor


def test_the_completions_table_of_code_has_no_gold_answers(train):
    rows = Dataset.from_list([{"prompt": f"{i}+1=", "solution": None} for i in range(8)])
    trainer = train(train_dataset=rows, log_completions=True, max_steps=1)
    table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    assert "prime/gold" not in table.columns and "prime/outcome" in table.columns


def test_gold_answers_stay_beside_their_prompts_when_batches_without_any_come_between():
    def logged_after(*batches):
        logs = {"prompt": deque(maxlen=6), "extra": defaultdict(lambda: deque(maxlen=6))}
        for batch in batches:
            logs["prompt"].extend(f"prompt of {answer}" for answer in batch)
            log_gold_answers(logs, "gold", [{"solution": answer} for answer in batch])
        assert "gold" not in logs["extra"] or len(logs["extra"]["gold"]) == len(logs["prompt"])
        return [*logs["extra"].get("gold", [])]

    assert logged_after([None, None], [1, None], ["3", "4"]) == [None, None, "1", None, "3", "4"]
    assert logged_after(["1", "2"], [None, None]) == ["1", "2", None, None]
    assert logged_after(["1", "2"], [None] * 6) == []
    assert logged_after(["1", "2"], [None] * 6, ["3"] * 2) == [None] * 4 + ["3"] * 2
