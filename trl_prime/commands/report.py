"""`trl-prime report`: one page about a run, or about several to compare.

`trl-prime report RUN_DIR [RUN_DIR ...] [--output report.html] [--score N]`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import parse_arguments


@dataclass
class ReportArguments:
    """
    Arguments of `trl-prime report`.

    Parameters:
        runs (`list[str]`): Folders of the runs, their `output_dir`; may be given without the flag, before all others.
        output (`str`, *optional*): Page to write; `report.html` in the first run's folder if not given.
        score (`int`): Completions in each list of the best and the worst, with heat maps by the PRM of the run if it has
            one in `prm/`. 0 for none: no model is loaded then.
    """

    runs: list[str] = field(
        metadata={"help": "Folders of the runs (output_dir). Can be given without the flag: trl-prime report RUN RUN."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Page to write. Defaults to report.html in the folder of the first run."}
    )
    score: int = field(
        default=3,
        metadata={
            "help": "Completions in each list of the best and the worst, with heat maps by the run's PRM if prm/ is there. "
            "0 for none: no model is loaded then."
        },
    )

    def __post_init__(self):
        if self.score < 0:
            raise ValueError(f"--score is {self.score}; give the number of completions of a list, 0 for none.")
        for folder in self.runs:
            if not Path(folder).is_dir():
                raise ValueError(f"'{folder}' is no folder. Give the output_dir of a run.")


def prepare(argv: list[str]) -> Callable[[], int]:
    """The job of writing the page."""
    (args,) = parse_arguments([ReportArguments], argv, prog="trl-prime report", positional=["runs"])

    from rich.console import Console
    from rich.markup import escape

    from ..reports.page import write_page
    from ..reports.run_files import REPORT_NAME
    from ..reports.run_report import read_run, run_names, run_report

    names = run_names(args.runs)
    runs = [read_run(folder, name) for folder, name in zip(args.runs, names, strict=True)]

    def job() -> int:
        output = write_page(run_report(runs, args.score), args.output or Path(args.runs[0]) / REPORT_NAME)
        console = Console()
        for run in runs:
            for sentence in run.missing:
                console.print(f"{run.name}: {sentence}", markup=False, soft_wrap=True)
        console.print(f"page: [bold]{escape(str(output))}[/bold]", soft_wrap=True)
        return 0

    return job
