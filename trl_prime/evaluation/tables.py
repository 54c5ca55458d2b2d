"""The tables that end an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

BEST_OF_N = {
    "random": "random (pass@1)",
    "majority": "majority",
    "prm_sum": "PRM, sum of steps",
    "prm_min": "PRM, least step",
    "prm_mean": "PRM, mean of steps",
    "prm_last": "PRM, last step",
    "weighted_majority": "PRM-weighted majority",
    "ceiling": "ceiling (pass@N)",
}


def print_samples(summary: Mapping[str, Any], title: str) -> None:
    """Print the summary of [`~trl_prime.evaluation.end_to_end.summarize_samples`]."""
    table = Table(caption="95 % bootstrap intervals")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("interval", justify="right")
    for name, value in summary["metrics"].items():
        table.add_row(name, *_cells(value))
    console = Console()
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)
    console.print(
        f"{summary['num_problems']} problems, {summary['num_completions']} completions of {summary['mean_tokens']:.0f} tokens on "
        f"average; {summary['num_truncated']} truncated, {summary['num_without_answer']} without an answer, "
        f"{summary['num_undecided']} could not be judged and count as wrong.",
        soft_wrap=True,
    )


def print_comparison(metrics: Mapping[str, Mapping[str, float]], paths: Sequence[str], differing: str) -> None:
    """
    Print the result of [`~trl_prime.evaluation.comparison.compare`].

    Args:
        metrics (`dict`): The differences.
        paths (`list[str]`): The folders of both evaluations.
        differing (`str`): Settings in which they differ.
    """
    table = Table(caption="95 % paired bootstrap intervals")
    table.add_column("")
    for heading in ("A", "B", "B - A, points", "interval"):
        table.add_column(heading, justify="right")
    for name, row in metrics.items():
        difference, low, high = (f"{100 * row[bound]:+.1f}" for bound in ("value", "low", "high"))
        table.add_row(name, f"{row['first']:.1%}", f"{row['second']:.1%}", difference, f"{low} to {high}")
    console = Console()
    for letter, path in zip("AB", paths, strict=True):
        console.print(f"{letter}: {path}", style="bold", soft_wrap=True, markup=False)
    console.print(table)
    console.print("An interval with 0 in it leaves open which is better.", soft_wrap=True)
    if differing:
        console.print(f"Settings of A and B that differ: {differing}.", soft_wrap=True, markup=False)


def print_best_of_n(rows: list[Mapping[str, Any]]) -> None:
    """Print the rows of [`~trl_prime.evaluation.end_to_end.summarize_best_of_n`]."""
    table = Table(title="Best of N", caption="intervals are in summary.json")
    table.add_column("accuracy, N =")
    for row in rows:
        table.add_column(str(row["n"]), justify="right")
    for name, label in BEST_OF_N.items():
        if name in rows[0]:
            table.add_row(label, *(f"{row[name]['value']:.1%}" for row in rows))
    Console().print(table)


def print_process_bench(summary: Mapping[str, Any], title: str) -> None:
    """Print the summary of [`~trl_prime.evaluation.end_to_end.summarize_process_bench`]."""
    table = Table(caption="95 % bootstrap intervals")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("interval", justify="right")
    labels = {"erroneous": "first wrong step found", "correct": "right solutions let pass", "f1": "F1"}
    for name, value in summary["metrics"].items():
        table.add_row(labels[name], *_cells(value))
    table.add_row("AUC of step rewards", f"{summary['auc']:.3f}", "")
    chosen = f", chosen on {summary['num_calibration']} others" if summary["num_calibration"] else ""
    console = Console()
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)
    console.print(
        f"{summary['num_solutions']} solutions; threshold {summary['threshold']:.4g}{chosen}.", soft_wrap=True
    )


def _cells(value: Mapping[str, float]) -> tuple[str, str]:
    return f"{value['value']:.1%}", f"{value['low']:.1%} - {value['high']:.1%}"
