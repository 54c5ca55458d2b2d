"""Calls and tests in one program with standard input and output, for sandboxes that offer no more than that.

The solution runs in a child process that is forked before the tests are read; they come by standard input, which the
child never has, and this process forbids tracing. A sandbox that runs programs as root does not keep that promise.
"""

import json
import os
import signal
import socket
import sys
import time
from typing import Any

import candidate
import examiner
import isolation
import wire


def main() -> None:
    """Read `{"nonce": str, "solution": str, "kind": "call" | "examine", ...}`; print the nonce and a list of answers."""
    pid, connection = _start_candidate()
    isolation.set_dumpable(False)
    request = json.load(sys.stdin)
    answers: list[Any] = []
    signal.signal(signal.SIGALRM, _out_of_time)
    output = os.dup(1)
    try:
        if request["kind"] == "call":
            _call(request, answers, pid, connection)
        else:
            for verdict in _examine(request, connection):
                answers.append(verdict)
    except TimeoutError:
        pass
    os.write(output, b"\n" + json.dumps([request["nonce"], answers]).encode() + b"\n")
    os._exit(0)


def _out_of_time(*_: Any) -> None:
    raise TimeoutError("time limit")


def _start_candidate() -> tuple[int, socket.socket]:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.dup2(theirs.fileno(), 3)
        os.closerange(4, 4096)
        candidate.serve(3)
        os._exit(0)
    theirs.close()
    return pid, ours


def _examine(request: dict[str, Any], connection: socket.socket) -> Any:
    deadline = time.monotonic() + request["total_seconds"]
    verdicts = examiner.examine(wire.Channel(connection.fileno()), request["solution"], request["tests"])
    while True:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, min(request["test_seconds"], deadline - time.monotonic())))
        verdict = next(verdicts, None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if verdict is None:
            return
        yield verdict


def _call(request: dict[str, Any], answers: list[Any], pid: int, connection: socket.socket) -> None:
    deadline = time.monotonic() + request["total_seconds"]
    channel = None
    for arguments in request["calls"]:
        if channel is None:
            channel = wire.Channel(connection.fileno())
            channel.send(request["solution"])
            channel.receive()
        signal.setitimer(signal.ITIMER_REAL, max(0.01, min(request["test_seconds"], deadline - time.monotonic())))
        try:
            channel.send(["solve", request["name"], arguments, {}])
            answers.append(channel.receive())
        except (TimeoutError, OSError, EOFError, ValueError) as error:
            answers.append({"error": ["Error", str(error)]})
            os.kill(pid, signal.SIGKILL)
            pid, connection = _start_candidate()
            channel = None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() > deadline:
            return
