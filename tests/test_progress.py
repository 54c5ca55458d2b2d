"""The learning curve and the summary of a run."""

from trl_prime.reports.progress import plot_learning_curve, print_summary


def test_learning_curve_is_a_picture(tmp_path):
    history = [{"step": s, "reward": s / 10, "prm/pairwise_accuracy": 0.5} for s in range(5)] + [{"train_loss": 1.0}]
    plot_learning_curve(history, tmp_path / "curve.png")
    content = (tmp_path / "curve.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 10_000


def test_summary_shows_the_numbers_and_the_paths(capsys):
    print_summary({"greedy": 0.25}, {"greedy": 0.8125}, {"first_error_auc": 0.875}, {"policy": "some/where"})
    printed = capsys.readouterr().out
    assert "25.0%" in printed and "81.2%" in printed and "0.875" in printed and "some/where" in printed
