"""`trl-prime env`: what is installed and what this machine can do, for bug reports."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from .arguments import parse_arguments, recipe_folder


def prepare(argv: list[str]) -> Callable[[], int]:
    """The job of printing the environment."""
    parse_arguments([], argv, prog="trl-prime env")
    return print_environment


def print_environment() -> int:
    """Print the environment; returns the exit code."""
    from huggingface_hub import constants
    from trl.scripts.env import print_env

    print_env()
    for name, value in {
        "trl-prime version": _version("trl-prime"),
        "Math-Verify version": _version("math-verify"),
        "pint version": _version("pint"),
        "reasoning-gym version": _version("reasoning-gym"),
        "CPU cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "Machine": platform.machine(),
        "bubblewrap version": bubblewrap(),
        "Landlock version": landlock(),
        "Sandbox": sandbox(),
        "Recipes": str(recipe_folder()),
        "Hub": "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "online",
    }.items():
        print(f"- {name}: {value}")
    return 0


def sandbox() -> str:
    """The sandbox that the code reward would take on this machine, or why there is none. Runs a program in it."""
    from ..sandbox import SandboxUnavailable, open_sandbox

    try:
        box = open_sandbox("auto")
        result = box.run("print(6 * 7)")
    except SandboxUnavailable as error:
        return f"none. {error}"
    works = "works" if result.ended_well and result.stdout.strip() == b"42" else f"does not work: {result.stderr!r}"
    return f"{box.box}, {works}"


def bubblewrap() -> str:
    """Version and place of bubblewrap."""
    from ..sandbox.boxes import find_bubblewrap

    path = find_bubblewrap()
    if path is None:
        return "not installed"
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.split()
    return f"{said[-1] if said else 'unknown'} ({path})"


def landlock() -> str:
    """Version of the kernel's Landlock."""
    from ..sandbox.inside.isolation import landlock_version

    return str(landlock_version() or "not there")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
