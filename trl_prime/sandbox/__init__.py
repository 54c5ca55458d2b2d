"""Where model-written code runs. It is hostile: a policy that is rewarded for passing tests will try everything that
passes them, and what it imitates from the web may do worse."""

from __future__ import annotations

import atexit
import os
import threading

from .boxes import find_bubblewrap
from .limits import Limits, Result, SandboxUnavailable
from .local import LocalSandbox
from .remote import RemoteSandbox

__all__ = ["Limits", "LocalSandbox", "RemoteSandbox", "Result", "SandboxUnavailable", "open_sandbox"]

KINDS = ("auto", "bubblewrap", "namespaces", "landlock", "none")

_open: dict[tuple, LocalSandbox | RemoteSandbox] = {}
_lock = threading.Lock()


def _forget() -> None:
    # A forked process must not speak over its parent's socket, nor wait for a lock that a thread held at the fork
    global _lock
    _open.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)


@atexit.register
def close_sandboxes() -> None:
    """End every sandbox of this process and the programs in it."""
    while _open:
        _open.popitem()[1].close()


def open_sandbox(kind: str = "auto", packages: tuple[str, ...] = ("numpy",)) -> LocalSandbox | RemoteSandbox:
    """
    The sandbox of this process of one kind; started at the first call, ended with the process.

    Args:
        kind (`str`): `"auto"` (the first of the next three that this machine has), `"bubblewrap"`, `"namespaces"`,
            `"landlock"` (for containers, where the others need rights), `"none"` (no walls; warns), or the `http(s)://`
            address of a Sandbox Fusion server.
        packages (`tuple[str, ...]`): Installed distributions that programs may import, of local sandboxes.

    Raises:
        ValueError: There is no such kind.
        SandboxUnavailable: It cannot be had on this machine; says what to do.
    """
    with _lock:
        if (kind, packages) not in _open:
            _open[kind, packages] = _make(kind, packages)
        return _open[kind, packages]


def _make(kind: str, packages: tuple[str, ...]) -> LocalSandbox | RemoteSandbox:
    if kind.startswith(("http://", "https://")):
        return RemoteSandbox(kind)
    if kind not in KINDS:
        raise ValueError(f"sandbox is {kind!r}. Choose one of {', '.join(KINDS)}, or the address of a remote sandbox.")
    problems = []
    for box in ("bubblewrap", "namespaces", "landlock") if kind == "auto" else (kind,):
        if box == "bubblewrap" and find_bubblewrap() is None:
            problems.append("bubblewrap is not installed")
            continue
        try:
            return LocalSandbox(box, packages)
        except (SandboxUnavailable, OSError) as error:
            problems.append(str(error))
    raise SandboxUnavailable(
        f"Model-written code cannot be run safely on this machine (sandbox={kind!r}): {'; '.join(problems)}. Install "
        "bubblewrap (`apt install bubblewrap` or `pip install trl-prime[code]`) and allow unprivileged user namespaces "
        "(in a container: `--privileged`, or as root `--cap-add SYS_ADMIN --security-opt apparmor=unconfined`), or use a kernel "
        "with Landlock (Linux 5.13 or later), which needs no rights, or name a remote sandbox "
        "(`sandbox='http://host:8080'`, Sandbox Fusion), or, where there is nothing to lose, `sandbox='none'`."
    )
