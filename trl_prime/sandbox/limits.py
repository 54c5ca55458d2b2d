"""Limits and results, which all sandboxes share, and the error when there is none."""

from __future__ import annotations

from dataclasses import dataclass


class SandboxUnavailable(RuntimeError):
    """No sandbox can be had on this machine, or it could not run a program."""


@dataclass(frozen=True)
class Limits:
    """
    What one program may use.

    Attributes:
        wall_seconds: Time until it is killed.
        memory_mb: Memory of each of its processes, and of all together.
        processes: Processes and threads at one time.
        output_bytes: Output, after which it is killed.
        scratch_mb: Files in its scratch folder, gone when it ends. They are in memory, by Landlock alone on disk.
    """

    wall_seconds: float = 5.0
    memory_mb: int = 1024
    processes: int = 16
    output_bytes: int = 1 << 22
    scratch_mb: int = 64


@dataclass(frozen=True)
class Result:
    """
    How a program ended.

    Attributes:
        stdout: What it wrote, as far as the limit.
        stderr: The end of what it wrote there.
        exit_code: Its exit code, or minus the signal that killed it; None if it was given up.
        reason: Why it was killed: "time", "memory", "disk", "output", or None.
    """

    stdout: bytes
    stderr: bytes
    exit_code: int | None
    reason: str | None

    @property
    def ended_well(self) -> bool:
        """Whether it came to its end without an error."""
        return self.exit_code == 0 and self.reason is None
