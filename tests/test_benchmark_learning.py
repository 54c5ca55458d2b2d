"""The benchmark of learning: its statistics, its choice of settings, and its tables."""

import argparse
import json
import math
import statistics
import sys

import pytest
import torch

from trl_prime.advantages import RolloutRewards, combine_rewards
from trl_prime.tasks.running_sums import step_labels
from trl_prime.tasks.task import Task


@pytest.fixture(scope="module")
def learning(benchmarks):
    import learning

    return learning


def run_of(*accuracies, every=10):
    curve = [
        {"step": i * every, "sampled": value, "seconds": float(i), "first_error_auc": value / 2}
        for i, value in enumerate(accuracies)
    ]
    best_of_n = {"mean": 0.1, "majority": 0.2, "best": accuracies[-1]}
    return {"steps": (len(accuracies) - 1) * every, "curve": curve, "best_of_n": best_of_n}


def test_every_method_is_tuned_by_as_many_settings(learning):
    assert len({len(grid) for grid in learning.GRIDS.values()}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0", "100"], "--seeds holds [100]"),
        (["--methods", "prime"], "must hold rloo"),
        (["--methods", "rloo", "prime"], "no settings for prime and chain-20"),
    ],
)
def test_report_refuses_what_was_not_tuned_or_was_tuned_on(
    learning, monkeypatch, capsys, tmp_path, arguments, message
):
    output = tmp_path / "learning.json"
    output.write_text('{"tuning": {"chain-20": {"rloo": {"best": {}}}}, "rows": []}')
    monkeypatch.setattr(
        sys, "argv", ["learning.py", "report", "--tasks", "chain-20", "--output", str(output), *arguments]
    )
    monkeypatch.setattr(learning, "run_all", lambda jobs, options: pytest.fail("a model would be trained"))
    with pytest.raises(SystemExit):
        learning.main()
    assert message in capsys.readouterr().err


def test_the_seeds_that_are_reported_are_not_those_of_the_tuning(learning):
    assert not set(learning.SEEDS) & set(learning.TUNING_SEEDS)


@pytest.mark.parametrize(
    ("accuracies", "target", "steps"),
    [
        ((0.2, 0.4, 0.6), 0.5, 15.0),
        ((0.2, 0.4, 0.6), 0.4, 10.0),
        ((0.2, 0.6, 0.3, 0.9), 0.5, 7.5),  # the first time
        ((0.2, 0.4, 0.6), 0.7, None),
        ((0.5, 0.4, 0.6), 0.3, 0.0),
    ],
)
def test_steps_to_reach(learning, accuracies, target, steps):
    assert learning.steps_to_reach(run_of(*accuracies), target) == pytest.approx(steps)


def test_step_ratio(learning):
    rloo = run_of(0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5)
    twice_as_fast = run_of(0.1, 0.3, 0.5, 0.7, 0.8, 0.8, 0.8)
    assert learning.step_ratio(rloo, twice_as_fast) == pytest.approx(2.0)
    assert learning.step_ratio(rloo, rloo) == pytest.approx(1.0)
    # Never there: all 60 steps for the 40 that RLOO needs
    assert learning.step_ratio(rloo, run_of(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2)) == pytest.approx(40 / 60)
    assert learning.step_ratio(run_of(0.1, 0.1, 0.1, 0.12), twice_as_fast) is None


def test_median_steps(learning):
    runs = [run_of(0.1, 0.5, 0.9), run_of(0.1, 0.3, 0.5), run_of(0.1, 0.1, 0.1)]
    assert learning.median_steps(runs, 0.5) == 20.0
    assert learning.median_steps(runs, 0.9) is None  # one of three


def test_interval_holds_the_median_and_stays_within_the_values(learning):
    values = [1.0, 2.0, 3.0, 4.0, 50.0]
    low, high = learning.interval(values)
    assert 1.0 <= low < statistics.median(values) < high <= 50.0
    assert learning.interval([2.0, 2.0, 2.0]) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("task", "prompt", "completions", "blamed"),
    [
        # True sums 3, 8, 0: right; wrong from the second line on; wrong in the last line
        ("running_sums", "3 5 2=", ["3\n8\n0", "3\n1\n3", "3\n8\n4"], [None, 2, 4]),
        # Right; wrong from the second letter on; ended too soon
        ("spell_backward", "tones=", ["senot", "sanot", "sen"], [None, 1, 3]),
    ],
)
def test_oracle_blames_the_first_wrong_step_and_nothing_before_or_after_it(
    learning, task, prompt, completions, blamed
):
    from reasoning_gym_task import letter_labels

    labels = step_labels if task == "running_sums" else letter_labels
    mask = torch.ones(3, 6, dtype=torch.bool)  # five characters and the end of the sequence
    settings = {"estimator": "reinforce", "whiten": False, "process_gamma": 0.0, "process_weight": 3.0}
    outcomes = torch.tensor([1.0, 0.0, 0.0])
    rewards = RolloutRewards(
        outcomes,
        torch.randn(3, 6),
        mask,
        mask,
        num_generations=3,
        settings=settings,
        prompts=[prompt] * 3,
        completions=completions,
    )
    process = learning.oracle_combination(rewards, Task(task, "", None, None, [], labels)) - combine_rewards(
        outcomes, torch.zeros(3, 6), mask, 3, estimator="reinforce", whiten=False
    )
    is_blamed = torch.tensor([[i == token for i in range(6)] for token in blamed])
    assert (process[is_blamed] < -3.0).all()
    assert (process[~is_blamed] == 0).all()


def test_tune_keeps_the_settings_with_the_highest_mean_over_seeds(learning, monkeypatch):
    best = {"rloo": 2, "prime": 1}

    def run_all(jobs, options):
        # One seed alone would choose the last settings
        runs = []
        for method, _, seed, settings in jobs:
            i = learning.GRIDS[method].index(settings)
            last_on_one_seed = i == len(learning.GRIDS[method]) - 1 and seed == learning.TUNING_SEEDS[0]
            runs.append(run_of(0.1, 0.6 if i == best[method] else 0.65 if last_on_one_seed else 0.3))
        return runs

    monkeypatch.setattr(learning, "run_all", run_all)
    options = argparse.Namespace(tasks=["chain-10"], methods=["rloo", "prime"], tuning_seeds=2)
    tuning = learning.tune(options)["chain-10"]
    for method, index in best.items():
        assert tuning[method]["best"] == learning.GRIDS[method][index]
        assert len(tuning[method]["tried"]) == len(learning.GRIDS[method])


def test_report_pairs_the_methods_by_seed(learning, monkeypatch):
    curves = {
        ("rloo", 0): run_of(0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5),
        ("rloo", 1): run_of(0.1, 0.4, 0.6, 0.75, 0.75, 0.75, 0.75),
        ("prime", 0): run_of(0.1, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9),  # four times as fast
        ("prime", 1): run_of(0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 0.75),  # 30 steps against 50
        ("rloo", 2): run_of(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1),  # did not learn: no ratio
        ("prime", 2): run_of(0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9),
    }
    monkeypatch.setattr(learning, "run_all", lambda jobs, options: [curves[job[0], job[2]] for job in jobs])
    options = argparse.Namespace(tasks=["chain-10"], methods=["rloo", "prime"], seeds=[0, 1, 2])
    tuning = {"chain-10": {"rloo": {"best": {}}, "prime": {"best": {}}}}
    (row,), runs = learning.report(tuning, options)
    assert row["step_ratio"] == pytest.approx((4.0 + 30 / 50) / 2)
    assert (row["seeds"], row["seeds_compared"], row["reached_prime"]) == (3, 2, 2)
    assert row["final_rloo"] == pytest.approx(0.5)
    assert row["final_prime"] == pytest.approx(0.9)
    assert row["best_of_n"] == pytest.approx({"mean": 0.1, "majority": 0.2, "best": (0.9 + 0.75 + 0.9) / 3})
    assert row["first_error_auc"] == pytest.approx([0.05, 0.25, 0.45, 0.45, 0.45, 0.45, 0.45])
    assert row["steps_prime"] == pytest.approx([10.0, 17.5])
    assert row["steps_rloo"] == [pytest.approx(40.0), None]
    assert len(runs) == 6
    assert "2 of 2" in learning.table([row])


def test_ablate_changes_one_thing_of_the_tuned_settings_and_averages_over_seeds(learning, monkeypatch):
    jobs = []
    monkeypatch.setattr(
        learning,
        "run_all",
        lambda wanted, options: (
            jobs.extend(wanted) or [run_of(0.1, 0.1 + 0.1 * job[2], 0.5, 0.5, 0.5) for job in wanted]
        ),
    )
    wanted = ["as tuned", "reward-to-go"]
    options = argparse.Namespace(tasks=["chain-10"], seeds=[0, 1, 2, 3], ablations=wanted)
    rows = learning.ablate({"chain-10": {"prime": {"best": {"process_gamma": 0.0}}}}, options)["chain-10"]
    assert [row["changed"] for row in rows] == wanted
    assert [(job[2], job[3]["process_gamma"]) for job in jobs] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert rows[0]["mean"] == pytest.approx((0.1 + 0.2 + 0.5 * 3) / 5)
    assert rows[0]["first_error_auc"] == pytest.approx([0.1, 0.25, 0.25])
    assert "| as tuned |" in learning.ablation_table(rows)


def test_some_ablations_replace_their_own_rows_and_keep_the_others(learning, monkeypatch, tmp_path):
    output = tmp_path / "learning.json"
    kept = [{"changed": "no replay"}, {"changed": "as tuned", "mean": 0.9}]
    tuning = {"chain-10": {"prime": {"best": {}}}}
    output.write_text(json.dumps({"tuning": tuning, "rows": [], "ablations": {"chain-10": kept}}))
    monkeypatch.setattr(learning, "run_all", lambda jobs, options: [run_of(0.1, 0.3, 0.5) for _ in jobs])
    command = ["ablate", "--tasks", "chain-10", "--ablations", "as tuned", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["learning.py", *command])
    learning.main()
    rows = json.loads(output.read_text())["ablations"]["chain-10"]
    assert {row["changed"]: row.get("mean") for row in rows} == {"no replay": None, "as tuned": pytest.approx(0.3)}


def test_the_final_prm_chooses_among_samples_of_the_base(learning, monkeypatch):
    import types

    size = learning.BEST_OF
    # Two problems: on the first most agree on a wrong answer, on the second on the right one
    completions = ["7"] * (size - 2) + ["3", "3"] + ["5"] * size
    right = torch.tensor([0.0] * (size - 2) + [1.0, 1.0] + [1.0] * size)
    rows = {"prompt": ["1 2="] * (2 * size)}
    monkeypatch.setattr(learning, "base_samples", lambda *args: (rows, completions, right))
    prm = types.SimpleNamespace(
        score=lambda prompts, texts: [types.SimpleNamespace(reward=-float(text)) for text in texts]
    )
    chosen = learning.choose(prm, types.SimpleNamespace(eval_dataset=None), 4)
    assert chosen == pytest.approx({"mean": (2 + size) / (2 * size), "majority": 0.5, "best": 1.0})


def hook_rewards(**settings):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor(
        [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0] * 5, [1] * 5], dtype=torch.bool
    )
    process_rewards = torch.randn(6, 5, generator=generator) * mask
    outcomes = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    settings = {"estimator": "rloo", "whiten": False, "process_gamma": 0.0, "process_weight": 0.3, **settings}
    return RolloutRewards(outcomes, process_rewards, mask, mask, 3, settings)


def test_min_form_weights_the_rewards_of_a_completion_by_their_softmin(learning):
    rewards = hook_rewards(estimator="reinforce")
    expected = torch.zeros(6, 5)
    for row in range(6):
        tokens = [t for t in range(5) if rewards.completion_mask[row, t]]
        values = {t: rewards.process_rewards[row, t].item() for t in tokens}
        total = sum(math.exp(-value / 0.1) for value in values.values())
        for t, value in values.items():
            share = math.exp(-value / 0.1) / total
            expected[row, t] = rewards.outcome_rewards[row] + 0.3 * share * value
    torch.testing.assert_close(learning.min_form_combination(rewards), expected)


def test_masked_step_compares_what_was_collected_with_the_peers_that_are_still_alive(learning):
    rewards = hook_rewards()
    found = learning.masked_step_combination(rewards)
    mask, process_rewards = rewards.completion_mask, rewards.process_rewards
    for row in range(6):
        group = range(row // 3 * 3, row // 3 * 3 + 3)
        peers = [rewards.outcome_rewards[j].item() for j in group if j != row]
        for t in range(5):
            expected = 0.0
            if mask[row, t]:
                alive = [process_rewards[j, : t + 1].sum().item() for j in group if mask[j, t]]
                collected = process_rewards[row, : t + 1].sum().item() - sum(alive) / len(alive)
                expected = rewards.outcome_rewards[row].item() - sum(peers) / 2 + 0.3 * collected
            assert found[row, t].item() == pytest.approx(expected, abs=1e-5)
