"""The benchmarks share this: the machine that is measured on, the file of results, and tables and curves for the docs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine(*packages: str) -> dict[str, Any]:
    """Platform, processor, cores, load, and the versions of Python and of those packages that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = match[1] if match else cpu
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
        "versions": versions,
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the benchmark, line for line."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def write(result: dict[str, Any], path: Path, indent: int | None = 1) -> None:
    """Write a result as JSON, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=indent) + "\n")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of markdown; the first cell of the header may be empty."""
    lines = ["| " + " | ".join(header).lstrip() + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def draw_curves(curves: Mapping[str, Sequence[Sequence[float]]], window: int, label: str, path: Path) -> None:
    """The mean over the seeds for each method, and a thin line for each seed. A value is a mean over `window` steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, (method, seeds) in enumerate(curves.items()):
        steps = [window * i + window / 2 for i in range(len(seeds[0]))]
        for curve in seeds:
            axis.plot(steps, curve, f"C{number}", linewidth=0.6, alpha=0.5)
        axis.plot(steps, [statistics.fmean(at) for at in zip(*seeds, strict=True)], f"C{number}", label=method)
    axis.set(xlabel="step", ylabel=label)
    axis.legend()
    figure.savefig(path, dpi=110)
