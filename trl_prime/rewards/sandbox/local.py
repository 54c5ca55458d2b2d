"""The local sandbox, seen from the trainer: start programs, talk to them, end them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .boxes import BOXES
from .inside import wire
from .limits import Limits, Result, SandboxUnavailable


class LocalSandbox:
    """
    Runs model-written Python on this machine behind walls.

    Args:
        box (`str`): `"bubblewrap"`, `"namespaces"`, or `"none"`: no walls, only limits, which lets model-written code do
            whatever the trainer may do.
        packages (`tuple[str, ...]`): Installed distributions that programs may import.

    Raises:
        SandboxUnavailable: The box cannot be made on this machine.
    """

    def __init__(self, box: str, packages: tuple[str, ...] = ("numpy",)):
        self.box = box
        self.packages = packages
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen | None = None
        self._owner = os.getpid()
        if box == "none":
            warnings.warn(
                "sandbox='none': model-written code runs with all rights of this process. It can read your files and "
                "tokens, use the network and delete what you can delete. Use it on a machine that has nothing to lose."
            )
        self._check()

    def run(self, source: str, stdin: str = "", limits: Limits | None = None) -> Result:
        """
        Run a program to its end.

        Args:
            source (`str`): Python source.
            stdin (`str`): Its standard input.
            limits ([`Limits`], *optional*): What it may use.

        Returns:
            [`Result`]

        Raises:
            SandboxUnavailable: The sandbox could not start it; it says nothing of the program.
        """
        limits = limits or Limits()
        with contextlib.ExitStack() as ours:
            theirs = ours.enter_context(contextlib.ExitStack())
            (in_read, in_write), (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe(), os.pipe()
            for fd in (in_read, out_write, err_write):
                theirs.callback(os.close, fd)
            for fd in (out_read, err_read):
                ours.callback(os.close, fd)
            stdin_file = ours.enter_context(open(in_write, "wb", buffering=0))
            lifeline = ours.enter_context(self._start("script", source, limits, [in_read, out_write, err_write]))
            theirs.close()
            stdout, stderr, flooded = _communicate(lifeline, stdin_file, out_read, err_read, stdin.encode(), limits)
            if flooded:
                return Result(stdout, stderr, None, "output")
            report = _report(lifeline, limits)
        return Result(stdout, stderr, report["exit"], report["reason"])

    def call(
        self, source: str, name: str, calls: list[list[Any]], limits: Limits, total_seconds: float
    ) -> Iterator[dict[str, Any]]:
        """
        Call a function of a solution, or a method of its class `Solution`, many times.

        Args:
            source (`str`): The solution.
            name (`str`): The function.
            calls (`list[list]`): Arguments of each call, plain data.
            limits ([`Limits`]): `wall_seconds` is for one call.
            total_seconds (`float`): Time for all.

        Yields:
            `dict`: For each call `{"value": form}`, a form of [`~trl_prime.rewards.sandbox.inside.wire.encode`], or
            `{"error": [type, text]}`.

        Raises:
            SandboxUnavailable: The sandbox could not start it.
        """
        deadline = time.monotonic() + total_seconds
        requests = iter(calls)
        remaining = len(calls)
        while remaining:
            with self._serve(source, limits, max(0.0, deadline - time.monotonic())) as peer:
                try:
                    hello = peer.receive(min(deadline, time.monotonic() + limits.wall_seconds))
                except (TimeoutError, EOFError) as error:
                    hello = {"error": ["Error", str(error)]}
                if not isinstance(hello, dict) or "names" not in hello:
                    yield from [hello] * remaining
                    return
                for arguments in requests:
                    remaining -= 1
                    peer.send(["solve", name, [wire.encode(argument) for argument in arguments], {}])
                    try:
                        yield peer.receive(min(deadline, time.monotonic() + limits.wall_seconds))
                    except (TimeoutError, EOFError) as error:
                        yield {"error": ["Error", str(error)]}
                        break  # this process is of no more use; the next call gets a new one
            if time.monotonic() > deadline:
                yield from [{"error": ["Error", "time limit"]}] * remaining
                return

    @contextlib.contextmanager
    def _serve(self, source: str, limits: Limits, total_seconds: float) -> Iterator[Peer]:
        ours, theirs = socket.socketpair()
        with ours, theirs, open(os.devnull, "r+b") as null:
            fds = [null.fileno()] * 3 + [theirs.fileno()]
            with self._start("serve", "", replace(limits, wall_seconds=total_seconds + 1), fds):
                theirs.close()
                peer = Peer(ours, limits.output_bytes)
                peer.send(source)
                yield peer

    def examine(
        self, source: str, tests: dict[str, Any], limits: Limits, total_seconds: float
    ) -> Iterator[dict[str, Any]]:
        """
        Run tests written as Python code against a solution, the two in processes that share nothing.

        Args:
            source (`str`): The solution.
            tests (`dict`): As [`~trl_prime.rewards.sandbox.inside.examiner.examine`] takes them.
            limits ([`Limits`]): Of each process; `wall_seconds` is for one assert.
            total_seconds (`float`): Time for all.

        Yields:
            `dict`: `{"passed": bool, "error": str}` for each assert, until the solution or its time ends.

        Raises:
            SandboxUnavailable: The sandbox could not start one of them.
        """
        deadline = time.monotonic() + total_seconds
        whole = replace(limits, wall_seconds=total_seconds + 1)
        ours, theirs = socket.socketpair()
        to_solution, to_tests = socket.socketpair()
        with ours, theirs, to_solution, to_tests, open(os.devnull, "r+b") as null:
            streams = [null.fileno()] * 3
            with (
                self._start("serve", "", whole, [*streams, to_tests.fileno()]),
                self._start("examine", "", whole, [*streams, theirs.fileno(), to_solution.fileno()]),
            ):
                for end in (theirs, to_solution, to_tests):
                    end.close()
                examiner = Peer(ours, limits.output_bytes)
                examiner.send([source, tests])
                for _ in tests["asserts"]:
                    try:
                        yield examiner.receive(min(deadline, time.monotonic() + limits.wall_seconds))
                    except (TimeoutError, EOFError) as error:
                        yield {"passed": False, "error": str(error)}
                        return

    def close(self) -> None:
        """End the sandbox and every program in it."""
        with self._lock:
            self._end()

    # The zygote

    def _check(self) -> None:
        """Start the zygote and run a program that answers a question, to see that the walls can be put up."""
        try:
            result = self.run("print(6 * 7)", limits=Limits(wall_seconds=20))
        except SandboxUnavailable:
            self.close()
            raise
        if result.stdout != b"42\n":
            self.close()
            raise SandboxUnavailable(f"a test program did not run in the sandbox {self.box!r}: {result}")

    def _begin(self) -> None:
        self._end()
        self._owner = os.getpid()
        self._scratch = tempfile.mkdtemp(prefix="trl-prime-sandbox-")
        self._log = tempfile.TemporaryFile()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                BOXES[self.box](theirs.fileno(), self.packages, self._scratch),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env={},
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the trainer, which closes the socket
            )
        self._control = ours

    def _end(self) -> None:
        if self._control is None:
            return
        self._control.close()
        self._control = None
        if self._owner == os.getpid():
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._log.close()

    def _said(self) -> str:
        """What the box said of itself, for an error."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()[-500:] or "it said nothing"

    @contextlib.contextmanager
    def _start(self, mode: str, source: str, limits: Limits, fds: list[int]) -> Iterator[socket.socket]:
        """Start a program with `fds` as its descriptors 0, 1, ...; kill it at the end of the block. Gives its lifeline."""
        with contextlib.ExitStack() as stack:
            scratch = ""
            if self.box == "none":
                scratch = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="trl-prime-", ignore_cleanup_errors=True)
                )
            job = {
                "mode": mode,
                "source": source,
                "scratch": scratch,
                "wall_seconds": limits.wall_seconds,
                "cpu_seconds": int(limits.wall_seconds) + 2,
                "memory_bytes": limits.memory_mb << 20,
                "scratch_bytes": limits.scratch_mb << 20,
                "processes": limits.processes,
            }
            data = json.dumps(job).encode()
            for attempt in range(3):
                lifeline, theirs = socket.socketpair()
                stack.enter_context(lifeline)
                lifeline.settimeout(10)
                try:
                    with theirs:
                        self._send([theirs.fileno(), *fds])
                    lifeline.sendall(len(data).to_bytes(4, "big") + data)
                    break
                except OSError as error:  # the zygote died, or could not fork
                    lifeline.close()
                    if attempt == 2:
                        raise SandboxUnavailable(
                            f"The sandbox {self.box!r} cannot start a program ({error}): {self._said()}"
                        ) from error
            yield lifeline

    def _send(self, fds: list[int]) -> None:
        with self._lock:
            if self._control is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._begin()
            socket.send_fds(self._control, [b"start"], fds)


class Peer:
    """
    The other end of a channel into the sandbox: JSON lines, with time limits, never trusting what comes.

    Args:
        connection (`socket.socket`): Our end.
        max_bytes (`int`): Longest message that is read.
    """

    def __init__(self, connection: socket.socket, max_bytes: int):
        self._connection = connection
        self._max_bytes = max_bytes
        self._received = bytearray()

    def send(self, message: Any, timeout: float = 10.0) -> None:
        """Send a message. A peer that has ended is noticed at the next `receive`."""
        self._connection.settimeout(timeout)
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float) -> Any:
        """
        The next message.

        Raises:
            TimeoutError: There was none until `deadline`, a value of `time.monotonic()`.
            EOFError: The peer has ended, or sent what is no message.
        """
        scanned = 0
        while (end := self._received.find(b"\n", scanned)) < 0:
            scanned = len(self._received)
            if scanned > self._max_bytes:
                raise EOFError("output limit")
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("time limit")
            self._connection.settimeout(remaining)
            try:
                part = self._connection.recv(1 << 16)
            except TimeoutError:
                raise TimeoutError("time limit") from None
            except OSError:
                part = b""
            if not part:
                raise EOFError("the program ended")
            self._received += part
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EOFError("the program sent no message") from error


def _communicate(
    lifeline: socket.socket, stdin: Any, stdout: int, stderr: int, data: bytes, limits: Limits
) -> tuple[bytes, bytes, bool]:
    """Feed a program and read its output until both streams end; whether it wrote too much. Closes `stdin`."""
    os.set_blocking(stdin.fileno(), False)
    poll = select.poll()
    outputs = {stdout: bytearray(), stderr: bytearray()}
    for fd in outputs:
        poll.register(fd, select.POLLIN)
    if data:
        poll.register(stdin, select.POLLOUT)
    else:
        stdin.close()
    view = memoryview(data)
    open_streams = set(outputs)
    # The supervisor ends the program in time, and with it the streams; the grace is for a busy machine
    deadline = time.monotonic() + limits.wall_seconds + 30
    while open_streams:
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            raise SandboxUnavailable("The sandbox did not end a program in time.")
        for fd, _ in ready:
            if fd in outputs:
                part = os.read(fd, 1 << 16)
                outputs[fd] += part
                if not part:
                    poll.unregister(fd)
                    open_streams.discard(fd)
                elif fd == stderr:
                    del outputs[fd][: -(1 << 12)]
                elif len(outputs[fd]) > limits.output_bytes:
                    return bytes(outputs[stdout]), bytes(outputs[stderr]), True
                continue
            try:
                view = view[stdin.write(view) or 0 :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                view = view[:0]  # it does not read its input
            if not view:
                poll.unregister(fd)
                stdin.close()
    return bytes(outputs[stdout]), bytes(outputs[stderr]), False


def _report(lifeline: socket.socket, limits: Limits) -> dict[str, Any]:
    """What the supervisor says of the program's end."""
    lifeline.settimeout(limits.wall_seconds + 30)
    data = b""
    with contextlib.suppress(OSError):
        while part := lifeline.recv(1 << 12):
            data += part
    report = json.loads(data.partition(b"\n")[0] or b"{}")
    if "exit" not in report:
        raise SandboxUnavailable(
            f"The sandbox could not run a program: {report.get('setup', 'it was ended from outside')}"
        )
    return report
