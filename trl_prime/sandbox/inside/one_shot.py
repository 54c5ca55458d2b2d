"""Calls and tests in one program with standard input and output, for sandboxes that offer no more than that.

    nursery -> solution, one process or several in turn
    this process: reads the tests, talks to the solution, prints the answers

Solutions are forked by the nursery, which was forked before the tests were read; they come by standard input, which
neither of them has, and this process forbids tracing. A sandbox that runs programs as root does not keep that promise.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import candidate
import examiner
import isolation
import wire


class OutOfTime(BaseException):
    """The time limit: not an `Exception`, which tests may catch."""


def main() -> None:
    """Read `{"nonce": str, "solution": str, "kind": "call" | "examine", ...}`; print the nonce and a list of answers."""
    nursery = _start_nursery()
    isolation.set_dumpable(False)
    request = json.load(sys.stdin)
    signal.signal(signal.SIGALRM, _out_of_time)
    output = os.dup(1)
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)  # tests may print
    candidate.open_streams()
    answers = list({"call": _call, "examine": _examine}[request["kind"]](request, nursery))
    os.write(output, b"\n")
    data = memoryview(json.dumps([request["nonce"], answers]).encode() + b"\n")
    while data:
        data = data[os.write(output, data) :]
    os._exit(0)


def _out_of_time(*_: Any) -> None:
    raise OutOfTime("time limit")


def _set_alarm(request: dict[str, Any], deadline: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, max(0.01, min(request["test_seconds"], deadline - time.monotonic())))


def _start_nursery() -> socket.socket:
    """A process that forks a solution's process for every socket it is sent, and answers with its number."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        ours.close()
        while True:
            message, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            if not message:
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                os.dup2(fds[0], 3)
                os.closerange(4, 4096)
                candidate.open_streams()
                candidate.serve(3)
                os._exit(0)
            os.close(fds[0])
            theirs.sendall(pid.to_bytes(4, "big"))
    theirs.close()
    return ours


def _start_candidate(nursery: socket.socket) -> tuple[int, wire.Channel]:
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(nursery, [b"s"], [theirs.fileno()])
    return int.from_bytes(nursery.recv(4), "big"), wire.Channel(ours.detach())


def _examine(request: dict[str, Any], nursery: socket.socket) -> Iterator[dict[str, Any]]:
    deadline = time.monotonic() + request["total_seconds"]
    _, channel = _start_candidate(nursery)
    verdicts = examiner.examine(channel, request["solution"], request["tests"])
    for _ in request["tests"]["asserts"]:
        _set_alarm(request, deadline)
        try:
            verdict = next(verdicts)
        except (OutOfTime, StopIteration) as error:
            verdict = {"passed": False, "error": str(error)}
        finally:
            # An alarm that a test has swallowed is over as well, and what came after it is not worth knowing
            in_time = signal.setitimer(signal.ITIMER_REAL, 0)[0] > 0
        yield verdict if in_time else {"passed": False, "error": "time limit"}
        if not in_time:
            return


def _call(request: dict[str, Any], nursery: socket.socket) -> Iterator[dict[str, Any]]:
    deadline = time.monotonic() + request["total_seconds"]
    pid, channel = 0, None
    for arguments in request["calls"]:
        try:
            _set_alarm(request, deadline)
            if channel is None:
                pid, channel = _start_candidate(nursery)
                channel.send(request["solution"])
                hello = channel.receive()
                if not isinstance(hello, dict) or "names" not in hello:
                    yield from [hello] * len(request["calls"])
                    return
            channel.send(["solve", request["name"], arguments, {}])
            answer = channel.receive()
        except (OutOfTime, OSError, EOFError, ValueError) as error:
            answer = {"error": ["Error", str(error)]}
            if pid:
                os.kill(pid, signal.SIGKILL)
            pid, channel = 0, None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        yield answer
        if time.monotonic() > deadline:
            return
