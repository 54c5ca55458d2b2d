"""The progress bar, the learning curve and the last table that a person sees of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback


class MetricsProgressCallback(ProgressCallback):
    """
    The usual progress bar with the latest metrics in it, in the place of a dictionary printed at every logging step.

    Args:
        description (`str`): Text before the bar.
        shown (`dict[str, str]`): Metric to its label in the bar.
    """

    def __init__(self, description: str, shown: Mapping[str, str]):
        super().__init__()
        self.description = description
        self.shown = shown

    @classmethod
    def replace_default(cls, trainer: Trainer, description: str, shown: Mapping[str, str]) -> None:
        """Show the bar instead of what `trainer` prints by default."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls(description, shown))

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.description)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {label: f"{logs[key]:.3g}" for key, label in self.shown.items() if logs.get(key) is not None}
            if shown:
                self.training_bar.set_postfix(shown, refresh=False)


PRIME_METRICS = {
    "reward": "reward",
    "prm/pairwise_accuracy": "prm",
    "filter/pass_rate": "pass",
    "completions/mean_length": "length",
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


def print_summary(
    before: Mapping[str, float], after: Mapping[str, float], prm: Mapping[str, float], saved: Mapping[str, Any]
) -> None:
    """
    Print the table that ends a run.

    Args:
        before, after (`dict[str, float]`): Accuracies of the policy, between 0 and 1, by the same names.
        prm (`dict[str, float]`): Accuracies of the PRM, between 0 and 1.
        saved (`dict[str, Any]`): Path of each thing that was saved, by its name.
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
    console = Console()
    console.print(table)
    for name, path in saved.items():
        console.print(f"{name}: [bold]{path}[/bold]", soft_wrap=True)
