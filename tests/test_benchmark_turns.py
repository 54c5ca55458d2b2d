"""The benchmark of turns: what it reads of a run, and the table that it prints."""

import json
import sys

import pytest


@pytest.fixture
def turns(benchmarks, monkeypatch, tmp_path):
    import turns

    monkeypatch.setattr(turns, "IMAGE", tmp_path / "turns.png")
    monkeypatch.setattr(turns, "RESULTS", tmp_path)
    return turns


def write_run(folder, rewards):
    folder.mkdir(parents=True)
    rows = [{"step": i, "reward": value, "step_time": i, "entropy": 1.0} for i, value in enumerate(rewards)]
    # Trainer's summary at the end has no reward
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*rows, {"train_runtime": 9.0}]}))


def test_a_run_is_read_in_windows(turns, tmp_path):
    write_run(tmp_path / "run", [0.0] * 10 + [0.5] * 5 + [1.0] * 5)
    found = turns.read(tmp_path / "run")
    assert found["reward"] == [0.0, 0.75]
    assert found["entropy"] == [1.0, 1.0]
    assert found["prm/pairwise_accuracy"] == []
    assert found["step_time"] == [9.5]


def test_each_method_has_a_row_with_its_mean_and_the_end_of_each_seed(turns, tmp_path, monkeypatch, capsys):
    trained = []

    def train(folder, seed, flags):
        trained.append((folder.name, flags))
        write_run(folder, [0.25] * 10 + [0.5 + seed / 4] * 10)

    monkeypatch.setattr(turns, "train", train)
    monkeypatch.setattr(sys, "argv", ["turns.py", "--runs", str(tmp_path / "runs"), "--seeds", "2"])
    turns.main()
    assert [name for name, _ in trained] == [f"{method}-{seed}" for seed in (0, 1) for method in turns.METHODS]
    assert dict(trained)["softmax-0"] == ["--process_reward_norm", "softmax"]
    printed = capsys.readouterr().out
    assert "| method | steps 1 to 10 | steps 11 to 20 | last, by seed |" in printed
    assert "| `token` | 25.0 % | 62.5 % | 50.0 %, 75.0 % |" in printed
    assert set(json.loads((tmp_path / "turns.json").read_text())["runs"]) == set(turns.METHODS)
    assert turns.IMAGE.stat().st_size > 1000
