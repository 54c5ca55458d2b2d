"""The live table, the learning curve and the summary of a run."""

from datasets import Dataset

from trl_prime.commands.train import resume_command
from trl_prime.reports.progress import (
    PRIME_METRICS,
    MetricsProgressCallback,
    evaluation_line,
    plot_learning_curve,
    print_saved,
    print_summary,
    table_head,
    table_line,
)


def test_learning_curve_is_a_picture(tmp_path):
    history = [{"step": s, "reward": s / 10, "prm/pairwise_accuracy": 0.5} for s in range(5)] + [{"train_loss": 1.0}]
    plot_learning_curve(history, tmp_path / "curve.png")
    content = (tmp_path / "curve.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 10_000


def test_summary_shows_the_numbers_and_the_paths(capsys):
    print_summary({"greedy": 0.25}, {"greedy": 0.8125}, {"first_error_auc": 0.875})
    print_saved({"policy": "some/where"}, ["trl-prime report [x]"])
    printed = capsys.readouterr().out
    assert "25.0%" in printed and "81.2%" in printed and "0.875" in printed
    assert "policy: some/where" in printed and "go on by  trl-prime report [x]" in printed


def test_a_line_of_the_table_stands_under_its_headings():
    columns = {"reward": "reward", "prm/trust": "trust", "entropy": "entropy"}
    line = table_line({"reward": 0.123456, "prm/trust": float("nan"), "loss": 1.0}, columns, 12)
    assert line.split() == ["12", "0.123", "-", "-"] and len(line) == len(table_head(columns))
    assert table_head(columns).split() == ["step", "reward", "trust", "entropy"]


def test_an_evaluation_is_a_line_of_the_metrics_that_it_has():
    logs = {"eval_reward": 0.5, "eval_prm/pairwise_accuracy": 0.75, "eval_loss": 2.0}
    assert evaluation_line(logs, PRIME_METRICS, 4) == "evaluation at step 4: reward 0.5, prm 0.75"


def test_a_run_prints_a_line_for_each_entry_of_its_log(make_trainer, capsys):
    rows = Dataset.from_list([{"prompt": f"{i}="} for i in range(4)])
    trainer = make_trainer(
        disable_tqdm=False, eval_dataset=rows, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4
    )
    MetricsProgressCallback.replace_default(trainer, "PRIME", PRIME_METRICS)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == table_head(PRIME_METRICS)
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert lines[1:3] == [table_line(row, PRIME_METRICS, row["step"]) for row in logs] and len(logs) == 2
    assert lines[3].startswith("evaluation at step 2: reward ") and len(lines) == 4


def test_an_interrupted_run_is_told_how_to_go_on(tmp_path):
    argv = ["--config", "my run.yaml", "--resume_from_checkpoint", "true", "--seed=1"]
    assert "nothing to resume from" in resume_command(argv, 3, tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    said = resume_command(argv, 12, tmp_path)
    assert "Stopped at step 12. Go on from checkpoint-10 by:" in said
    assert said.endswith("trl-prime train --config 'my run.yaml' --seed=1 --resume_from_checkpoint true")
