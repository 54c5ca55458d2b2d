"""The progress bar, the learning curve and the last table that a person sees of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback


class MetricsProgressCallback(ProgressCallback):
    """
    The usual progress bar, with a table above it that grows by a line at every logging step and every evaluation.

    Args:
        description (`str`): Text before the bar.
        columns (`dict[str, str]`): Metric to the heading of its column.
    """

    # Lines of the table after which its head is printed again
    _PAGE = 30

    def __init__(self, description: str, columns: Mapping[str, str]):
        super().__init__()
        self.description = description
        self.columns = columns
        self.num_lines = 0

    @classmethod
    def replace_default(cls, trainer: Trainer, description: str, columns: Mapping[str, str]) -> None:
        """Show the bar and the table instead of what `trainer` prints by default."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls(description, columns))

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.description)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or "train_runtime" in logs:
            return
        # Lines are written above the bar, which is drawn again below them
        if any(name.startswith("eval_") for name in logs):
            self.training_bar.write(evaluation_line(logs, self.columns, state.global_step))
            return
        if self.num_lines % self._PAGE == 0:
            self.training_bar.write(table_head(self.columns))
        self.num_lines += 1
        self.training_bar.write(table_line(logs, self.columns, state.global_step))


def table_head(columns: Mapping[str, str]) -> str:
    """The headings of the live table."""
    return "  ".join(["   step", *(f"{heading:>8}" for heading in columns.values())])


def table_line(logs: Mapping[str, float], columns: Mapping[str, str], step: int) -> str:
    """
    A line of the live table.

    Args:
        logs (`dict[str, float]`): An entry of the log.
        columns (`dict[str, str]`): Metric to the heading of its column.
        step (`int`): The step.

    Returns:
        `str`: The step and the metrics with three digits; a dash stands for one that the entry lacks, or that is NaN.
    """
    return "  ".join([f"{step:>7}", *(f"{_number(logs.get(name)):>8}" for name in columns)])


def evaluation_line(logs: Mapping[str, float], columns: Mapping[str, str], step: int) -> str:
    """The metrics of an evaluation in one line, those of the live table that it has; arguments as in [`table_line`]."""
    found = [
        f"{heading} {_number(logs[f'eval_{name}'])}" for name, heading in columns.items() if f"eval_{name}" in logs
    ]
    return f"evaluation at step {step}: {', '.join(found) or 'no metric of the table'}"


def _number(value: float | str | None) -> str:
    # Trainer hands numbers on as texts in some versions
    number = float("nan") if value is None else float(value)
    return "-" if number != number else f"{number:.3g}"


# The columns of the live table of `trl-prime train`
PRIME_METRICS = {
    "reward": "reward",
    "filter/pass_rate": "pass",
    "prm/pairwise_accuracy": "prm",
    "prm/trust": "trust",
    "advantage/process_share": "share",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "step_time": "seconds",
}


def plot_learning_curve(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """
    Draw the outcome reward, the PRM's accuracy and the prompt filter over the steps of a run.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path (`str`): Picture to write, PNG by its name.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("Outcome reward of the rollouts", (("reward", "reward"),)),
        (
            "Implicit PRM",
            (
                ("prm/pairwise_accuracy", "ranks a right completion higher"),
                ("prm/trust", "weight of process rewards"),
            ),
        ),
        ("Prompt filter", (("filter/pass_rate", "groups that passed"), ("filter/trained", "completions trained on"))),
    )
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 8), sharex=True, layout="constrained")
    for axis, (title, series) in zip(axes, panels, strict=True):
        for key, label in series:
            points = [(row["step"], row[key]) for row in log_history if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
        if axis.lines and len(series) > 1:
            axis.legend(fontsize=8, loc="lower right")
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_summary(before: Mapping[str, float], after: Mapping[str, float], prm: Mapping[str, float]) -> None:
    """
    Print the table of held-out problems that ends a run.

    Args:
        before, after (`dict[str, float]`): Accuracies of the policy, between 0 and 1, by the same names.
        prm (`dict[str, float]`): Accuracies of the PRM, between 0 and 1.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out problems")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name in before:
        table.add_row(f"policy accuracy, {name}", f"{before[name]:.1%}", f"{after[name]:.1%}")
    labels = {
        "pairwise_accuracy": "PRM: ranks a right completion above a wrong one",
        "accuracy": "PRM: tells right from wrong",
        "first_error_auc": "PRM: finds the first wrong step (AUC)",
    }
    for name, value in prm.items():
        table.add_row(labels[name], "", f"{value:.1%}" if "auc" not in name else f"{value:.3f}")
    Console().print(table)


def print_saved(saved: Mapping[str, Any], commands: Sequence[str] = ()) -> None:
    """
    Print where a run has saved what, and the commands to go on with.

    Args:
        saved (`dict[str, Any]`): Path of each thing that was saved, by its name.
        commands (`list[str]`): Command lines.
    """
    from rich.console import Console

    console = Console()
    for name, path in saved.items():
        console.print(f"{name}: [bold]{path}[/bold]", soft_wrap=True, highlight=False)
    for i, command in enumerate(commands):
        console.print(f"{'go on by' if i == 0 else '':>8}  {command}", soft_wrap=True, highlight=False, markup=False)
