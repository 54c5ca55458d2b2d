"""The local sandbox, seen from the trainer: start programs, talk to them, end them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .boxes import BOXES
from .inside import wire
from .limits import Limits, Result, SandboxUnavailable
from .messages import checked_answer, checked_verdict, read_message
from .scratch import ScratchFolder

_sandboxes: weakref.WeakSet[LocalSandbox] = weakref.WeakSet()


def _unlock() -> None:
    # A thread that held the lock at the fork is not there to release it
    for sandbox in _sandboxes:
        sandbox._lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock)


class LocalSandbox:
    """
    Runs model-written Python on this machine behind walls.

    Args:
        box (`str`): `"bubblewrap"`, `"namespaces"`, `"landlock"`, or `"none"`: no walls, only limits, which lets
            model-written code do whatever the trainer may do.
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
        _sandboxes.add(self)
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
            data = stdin.encode(errors="surrogatepass")
            stdout, stderr = _communicate(lifeline, stdin_file, out_read, err_read, data, limits)
            if len(stdout) > limits.output_bytes:
                return Result(stdout[: limits.output_bytes], stderr, None, "output")
            report = self._report(lifeline, limits.wall_seconds)
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
            `dict`: For each call `{"value": form}`, a form of [`~trl_prime.sandbox.inside.wire.encode`], or
            `{"error": [type, text]}`.

        Raises:
            SandboxUnavailable: The sandbox could not start it.
        """
        deadline = time.monotonic() + total_seconds
        requests = iter(calls)
        remaining = len(calls)
        while remaining:
            with self._serve(source, limits, max(0.0, deadline - time.monotonic())) as (peer, lifeline):
                try:
                    hello = peer.receive(min(deadline, time.monotonic() + limits.wall_seconds))
                except (TimeoutError, EOFError) as error:
                    self._hang_up(lifeline)
                    hello = {"error": ["Error", str(error)]}
                if not isinstance(hello, dict) or "names" not in hello:
                    yield from [checked_answer(hello)] * remaining
                    return
                for arguments in requests:
                    remaining -= 1
                    call_deadline = min(deadline, time.monotonic() + limits.wall_seconds)
                    peer.send(["solve", name, [wire.encode(argument) for argument in arguments], {}], call_deadline)
                    try:
                        answer = checked_answer(peer.receive(call_deadline))
                    except (TimeoutError, EOFError) as error:
                        self._hang_up(lifeline)
                        yield {"error": ["Error", str(error)]}
                        break  # this process is of no more use; the next call gets a new one
                    yield answer
            if time.monotonic() > deadline:
                yield from [{"error": ["Error", "time limit"]}] * remaining
                return

    @contextlib.contextmanager
    def _serve(self, source: str, limits: Limits, total_seconds: float) -> Iterator[tuple[Peer, socket.socket]]:
        ours, theirs = socket.socketpair()
        with ours, theirs, open(os.devnull, "r+b") as null:
            fds = [null.fileno()] * 3 + [theirs.fileno()]
            with self._start("serve", "", replace(limits, wall_seconds=total_seconds + 1), fds) as lifeline:
                theirs.close()
                peer = Peer(ours, limits.output_bytes)
                peer.send(source, time.monotonic() + total_seconds)
                yield peer, lifeline

    def examine(
        self, source: str, tests: dict[str, Any], limits: Limits, total_seconds: float
    ) -> Iterator[dict[str, Any]]:
        """
        Run tests written as Python code against a solution, the two in processes that share nothing.

        Args:
            source (`str`): The solution.
            tests (`dict`): As [`~trl_prime.sandbox.inside.examiner.examine`] takes them.
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
        with (
            ours,
            theirs,
            open(os.devnull, "r+b") as null,
            self._start("examine", "", whole, [null.fileno()] * 3 + [theirs.fileno()]) as lifeline,
        ):
            theirs.close()
            examiner = Peer(ours, limits.output_bytes)
            examiner.send([source, tests], deadline)
            for _ in tests["asserts"]:
                try:
                    message = examiner.receive(min(deadline, time.monotonic() + limits.wall_seconds))
                except (TimeoutError, EOFError) as error:
                    self._hang_up(lifeline)
                    yield {"passed": False, "error": str(error)}
                    return
                verdict = checked_verdict(message)
                if not verdict["passed"] and _says_what_is_missing(lifeline):
                    self._hang_up(lifeline)  # raises: the walls of the solution's process could not be put up
                yield verdict

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
        self._scratch = ScratchFolder()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(10)
        with theirs:
            self._process = subprocess.Popen(
                BOXES[self.box](theirs.fileno(), self.packages, self._scratch.path),
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
        _end_connection(self._control, self._owner)
        self._control.close()
        self._control = None
        if self._owner == os.getpid():
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._scratch.remove()
        else:
            self._scratch.release()
        self._log.close()

    def _said(self) -> str:
        """The words of the box about itself, for an error."""
        try:
            said = os.pread(self._log.fileno(), 1 << 16, 0)
        except (OSError, ValueError):
            said = b""  # another thread has ended it
        return said.decode(errors="replace").strip()[-500:] or "it said nothing"

    @contextlib.contextmanager
    def _start(self, mode: str, source: str, limits: Limits, fds: list[int]) -> Iterator[socket.socket]:
        """Start a program with `fds` as its descriptors 0, 1, ...; kill it at the end of the block. Gives its lifeline."""
        with contextlib.ExitStack() as stack:
            job = {
                "mode": mode,
                "wall_seconds": limits.wall_seconds,
                "cpu_seconds": int(limits.wall_seconds) + 2,
                "memory_bytes": limits.memory_mb << 20,
                "scratch_bytes": limits.scratch_mb << 20,
                "processes": limits.processes + (mode == "examine"),  # of which one is for the tests
            }
            message, data = json.dumps(job).encode(), source.encode(errors="surrogatepass")
            for attempt in range(3):
                lifeline, theirs = socket.socketpair()
                stack.enter_context(lifeline)
                stack.callback(_end_connection, lifeline, os.getpid())
                lifeline.settimeout(10)
                try:
                    with theirs:
                        self._send(message, [theirs.fileno(), *fds])
                    lifeline.sendall(len(data).to_bytes(4, "big") + data)
                    if lifeline.recv(1) != b".":
                        raise OSError("it was ended from outside")
                    break
                except OSError as error:  # the zygote died, or could not fork
                    lifeline.close()
                    if attempt == 2:
                        raise SandboxUnavailable(
                            f"The sandbox {self.box!r} cannot start a program ({error}): {self._said()}"
                        ) from error
            yield lifeline

    def _report(self, lifeline: socket.socket, seconds: float) -> dict[str, Any]:
        """Read the supervisor's report of a program's end, which is to come within `seconds`, on a busy machine a bit later."""
        lifeline.settimeout(seconds + 30)
        data = b""
        with contextlib.suppress(OSError):
            while part := lifeline.recv(1 << 12):
                data += part
        report = json.loads(data.partition(b"\n")[0] or b"{}")
        if "exit" not in report:
            problem = report.get("setup", "it was ended from outside")
            raise SandboxUnavailable(f"The sandbox {self.box!r} could not run a program ({problem}): {self._said()}")
        return report

    def _hang_up(self, lifeline: socket.socket) -> None:
        """End a program that has failed us, and see that it, not the sandbox, is to blame."""
        with contextlib.suppress(OSError):
            lifeline.shutdown(socket.SHUT_WR)
        self._report(lifeline, 0)

    def _send(self, message: bytes, fds: list[int]) -> None:
        with self._lock:
            # The zygote says nothing on its socket, so what is to be read there is its end
            if self._control is None or self._owner != os.getpid() or _is_readable(self._control):
                self._begin()
            try:
                socket.send_fds(self._control, [message], fds)
            except OSError:
                self._end()  # it is of no more use; the next attempt starts another
                raise


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

    def send(self, message: Any, deadline: float) -> None:
        """Send a message. A peer that has ended, or does not take it in time, is noticed at the next `receive`."""
        self._connection.settimeout(max(1e-3, deadline - time.monotonic()))
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
        return read_message(line)


def _communicate(
    lifeline: socket.socket, stdin: Any, stdout: int, stderr: int, data: bytes, limits: Limits
) -> tuple[bytes, bytes]:
    """
    Feed a program and read its output until it has ended, has closed its streams or has written more than it may. Closes
    `stdin`.
    """
    outputs = {stdout: bytearray(), stderr: bytearray()}
    open_streams = set(outputs)
    poll = select.poll()
    # The end of the streams is not waited for: a process that was forked from this one may hold a copy of their other ends
    poll.register(lifeline, select.POLLIN)
    for fd in (stdin.fileno(), *outputs):
        os.set_blocking(fd, False)
    for fd in outputs:
        poll.register(fd, select.POLLIN)
    if data:
        poll.register(stdin, select.POLLOUT)
    else:
        stdin.close()

    def read(fd: int) -> int:
        try:
            part = os.read(fd, 1 << 16)
        except BlockingIOError:
            return 0
        outputs[fd] += part
        if not part:
            poll.unregister(fd)
            open_streams.discard(fd)
        elif fd == stderr:
            del outputs[fd][: -(1 << 12)]
        return len(part)

    view = memoryview(data)
    # The supervisor ends the program in time; the grace is for a busy machine
    deadline = time.monotonic() + limits.wall_seconds + 30
    ended = False
    while open_streams and not ended and len(outputs[stdout]) <= limits.output_bytes:
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            raise SandboxUnavailable("The sandbox did not end a program in time.")
        for fd, _ in ready:
            if fd == lifeline.fileno():
                ended = True
            elif fd in outputs:
                read(fd)
            else:
                try:
                    view = view[stdin.write(view) or 0 :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    view = view[:0]  # it does not read its input
                if not view:
                    poll.unregister(fd)
                    stdin.close()
    if ended:
        for fd in tuple(open_streams):  # what it left in the pipes, 64 KB each, or more where it made them larger
            for _ in range(64):
                if not read(fd):
                    break
    return bytes(outputs[stdout]), bytes(outputs[stderr])


def _says_what_is_missing(lifeline: socket.socket) -> bool:
    """Whether a process has reported that it could not be set up."""
    return _is_readable(lifeline) and lifeline.recv(16, socket.MSG_PEEK).startswith(b'{"setup"')


def _is_readable(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _end_connection(connection: socket.socket, owner: int) -> None:
    # Closing would not end it while a process that was forked from this one has a copy; and such a copy must not end it
    if owner == os.getpid():
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
