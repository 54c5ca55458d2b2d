"""A pool of worker processes makes calls that may hang, crash or take all memory; it kills and replaces them.

Covered: a time limit that holds in any calling thread and inside C code, a memory limit, crashes, calls from several
threads, `os.fork` of the parent, and a parent that exits, is interrupted or is killed: no worker outlives it for longer
than a job may take. Not covered: security. A worker may do what the parent may do; do not run a model's code in it.

Parent and worker talk in frames, a length of four bytes and JSON, over a socket pair that is the worker's stdin.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import itertools
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

_HEADER = struct.Struct("!I")
_START_UP_SECONDS = 120.0
# How often a worker is started for one job before something is taken to be wrong with all of them
_START_UP_ATTEMPTS = 3


class JobResult(NamedTuple):
    """
    The outcome of a job.

    Args:
        value (`Any`): What the function returned; None if it did not return.
        failure (`str` or `None`): None if the function returned, else `"timeout"`, `"crash"` (the process died twice, for
            instance of a lack of memory) or the exception that it raised, as text.
    """

    value: Any = None
    failure: str | None = None


class WorkerPool:
    """
    Runs a function in persistent processes, which are killed and replaced when a call takes too long.

    A worker that something else kills, while it starts, idles or works, costs time and no result: its job is given to a
    new worker. A job fails only if it has cost two workers, by taking too long or by their death.

    Processes start with the first call and are new interpreters: nothing of the parent is inherited, not torch, not its
    locks. A worker has the parent's `sys.path` and imports the function's module by its name, and the packages that hold it.

    Args:
        function (`Callable`):
            Function at the top level of a module that can be imported. Arguments and result are passed as JSON.
        num_workers (`int`, *optional*):
            Largest number of processes. Defaults to the number of available cores, at most 8.
        timeout (`float`, *optional*, defaults to `5.0`):
            Seconds that a call may take once a worker has it.
        memory_limit (`int`, *optional*, defaults to 2048):
            Address space of a worker in MiB.
        max_jobs_per_worker (`int`, *optional*, defaults to `5000`):
            A worker is replaced after as many calls, which bounds what its caches take.
        warm_up (`Sequence`, *optional*):
            Arguments of a call that each worker makes before its first job and outside the time limit, so that imports
            and caches are there.

    Raises:
        ValueError: An option is out of range, or the function cannot be imported.

    Example:
    ```python
    >>> from trl_prime.rewards import answers
    >>> with WorkerPool(answers.judge, timeout=1.0) as pool:
    ...     pool.map([("1/2", "0.5"), ("9^{9^{9^9}}", "3")])
    [JobResult(value=True, failure=None), JobResult(value=None, failure='timeout')]
    ```
    """

    def __init__(
        self,
        function: Callable,
        num_workers: int | None = None,
        timeout: float = 5.0,
        memory_limit: int = 2048,
        max_jobs_per_worker: int = 5000,
        warm_up: Sequence | None = None,
    ):
        if num_workers is None:
            num_workers = min(
                8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            )
        for name, value, least in (
            ("num_workers", num_workers, 1),
            ("timeout", timeout, 0.001),
            ("memory_limit", memory_limit, 64),
            ("max_jobs_per_worker", max_jobs_per_worker, 1),
        ):
            if not isinstance(value, (int, float)) or not least <= value < float("inf"):
                raise ValueError(f"{name} is {value!r}, but must be a finite number of at least {least}.")
        if function.__module__ in (None, "__main__") or not function.__qualname__.isidentifier():
            raise ValueError(
                f"{function!r} cannot be loaded in a worker; define it at the top level of a module that can be imported."
            )
        self.function = function
        self.num_workers = num_workers
        self.timeout = timeout
        self.memory_limit = memory_limit
        self.max_jobs_per_worker = max_jobs_per_worker
        self.warm_up = warm_up
        self._target = (function.__module__, function.__name__)
        self._reset()
        _POOLS.add(self)

    def map(self, jobs: Sequence[Sequence], keys: Sequence[Hashable] | None = None) -> list[JobResult]:
        """
        Call the function once per job. Calls of several threads are served in the order they come.

        Args:
            jobs (`Sequence[Sequence]`): The positional arguments of each call, of types that JSON has.
            keys (`Sequence`, *optional*): One for each job. Jobs with the same key go to the same worker one after the
                other, for a function that caches what they have in common.

        Returns:
            `list[JobResult]`: in the order of the jobs.

        Raises:
            RuntimeError: Workers could not be started, three times in a row, or the pool was closed.
        """
        futures: list[Future] = []
        bundles: dict[Hashable, list[tuple[Future, bytes, bool]]] = {}
        for key, job in zip(range(len(jobs)) if keys is None else keys, jobs, strict=True):
            futures.append(Future())
            bundles.setdefault(key, []).append((futures[-1], json.dumps(list(job)).encode(), False))
        try:
            with self._lock:
                if self._closed:
                    raise RuntimeError("The pool was closed; make a new one.")
                for bundle in bundles.values():
                    self._queue.put(bundle)
                while len(self._threads) < min(self.num_workers, len(bundles)):
                    # The thread is a daemon, so that an interrupted parent does not wait for a job that hangs
                    thread = threading.Thread(target=self._serve_queue, args=(self._queue,), daemon=True)
                    self._threads.append(thread)
                    thread.start()
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are running now."""
        return [worker.process.pid for worker in list(self._workers)]

    def close(self) -> None:
        """Kill the workers. A call that is running raises."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)
            workers = list(self._workers)
        for worker in workers:
            worker.kill()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        # A copy has processes of its own
        options = (self.num_workers, self.timeout, self.memory_limit, self.max_jobs_per_worker, self.warm_up)
        return WorkerPool, (self.function, *options)

    def _reset(self) -> None:
        """Begin with nothing running. A forked child does so too: it has none of the threads and must not use the workers."""
        for worker in getattr(self, "_workers", ()):
            worker.forget()
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._workers: set[_Worker] = set()
        self._closed = False

    def _serve_queue(self, jobs: queue.SimpleQueue) -> None:
        """Serve one worker from a thread: start it, hand it one job at a time, and kill it when a job is overdue."""
        worker = None
        for future, frame, is_retry in itertools.chain.from_iterable(iter(jobs.get, None)):
            if not is_retry and not future.set_running_or_notify_cancel():
                continue
            try:
                if not worker or not worker.is_alive():
                    worker = self._replace_worker(worker)
                result = worker.run(frame, self.timeout)
                if self._closed:
                    raise RuntimeError
                is_lost = result.failure in ("timeout", "crash")
                if is_lost or worker.jobs >= self.max_jobs_per_worker:
                    worker = self._stop_worker(worker)
                if is_lost and not is_retry:
                    self._retry(future, frame)
                else:
                    future.set_result(result)
            except BaseException as error:
                worker = self._stop_worker(worker)
                future.set_exception(RuntimeError("The pool was closed during the call.") if self._closed else error)
        self._stop_worker(worker)

    def _retry(self, future: Future, frame: bytes) -> None:
        """Put a job behind the others, for any worker: those with its key may take as long as it did."""
        with self._lock:
            if self._closed:  # nobody would come for it
                raise RuntimeError
            self._queue.put([(future, frame, True)])

    def _replace_worker(self, worker: _Worker | None) -> _Worker:
        """Start a worker in the place of one that died; one that dies while it starts is replaced too."""
        self._stop_worker(worker)
        deaths = 0
        while not self._closed:
            try:
                return self._start_worker()
            except TimeoutError as error:
                raise RuntimeError(
                    f"A worker process was not ready within {_START_UP_SECONDS:.0f} seconds; the machine is overloaded."
                ) from error
            except (OSError, EOFError) as error:
                deaths += 1
                if deaths == _START_UP_ATTEMPTS:
                    raise RuntimeError(
                        f"A worker process could not be started, {deaths} times in a row: {error!r}. Something ends these "
                        "processes or keeps them from starting; look for a lack of memory."
                    ) from error
        raise RuntimeError("The pool was closed.")

    def _start_worker(self) -> _Worker:
        worker = _Worker(
            {
                "path": [entry for entry in sys.path if isinstance(entry, str)],  # imports ignore other types
                "target": self._target,
                "warm_up": self.warm_up,
                "memory_limit": self.memory_limit,
                # The alarm ends a worker whose parent is gone; while there is a parent, the parent's limit counts
                "alarm": 1.5 * self.timeout + 1.0,
            }
        )
        with self._lock:
            self._workers.add(worker)
            closed = self._closed
        try:
            if not closed:
                worker.wait_until_ready()
        except BaseException:
            self._stop_worker(worker)
            raise
        return worker

    def _stop_worker(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.kill()
            worker.socket.close()
            with self._lock:
                self._workers.discard(worker)


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, options: dict):
        self.jobs = 0
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), json.dumps(options)],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the parent
            )

    def wait_until_ready(self) -> None:
        error = self._receive(time.monotonic() + _START_UP_SECONDS)
        if error:
            raise RuntimeError(f"A worker process could not be started: {error}.")

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def run(self, frame: bytes, timeout: float) -> JobResult:
        """Run one job. After a timeout or a crash the worker is of no more use."""
        self.jobs += 1
        try:
            self.socket.settimeout(timeout)
            deadline = time.monotonic() + timeout
            self.socket.sendall(_HEADER.pack(len(frame)) + frame)
            return JobResult(*self._receive(deadline))
        except TimeoutError:
            return JobResult(failure="timeout")
        except (OSError, EOFError):
            return JobResult(failure="crash")

    def _receive(self, deadline: float) -> Any:
        (length,) = _HEADER.unpack(self._receive_bytes(_HEADER.size, deadline))
        return json.loads(self._receive_bytes(length, deadline))

    def _receive_bytes(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            chunk = self.socket.recv(min(length - len(data), 2**16))
            if not chunk:
                raise EOFError("it exited")
            data += chunk
        return bytes(data)

    def kill(self) -> None:
        """Kill the process, from any thread; the worker's own thread, which may wait at the socket, finds its end."""
        self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Close a forked child's copy of the socket, or the worker would not see the end of its parent."""
        self.socket.close()
        self.process.returncode = 0  # it is not this process's child


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _for_all_pools(method: str) -> None:
    for pool in list(_POOLS):
        getattr(pool, method)()


atexit.register(_for_all_pools, "close")
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _for_all_pools("_reset"))


# ---------------------------------------------------------------------------------------------------------------------
# This part runs in the worker


def _serve(options: dict) -> None:
    """Answer jobs until the parent closes its end."""
    import resource

    stream = os.dup(0)
    # The function's input and output must not meet the frames
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside C code
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = options["memory_limit"] * 2**20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))

    try:
        sys.path[:] = options["path"]
        module_name, name = options["target"]
        function = getattr(importlib.import_module(module_name), name)
        if options["warm_up"] is not None:
            function(*options["warm_up"])
    except BaseException as error:
        _send(stream, f"{type(error).__name__}: {error}")
        return
    _send(stream, None)

    while (frame := _read_frame(stream)) is not None:
        signal.setitimer(signal.ITIMER_REAL, options["alarm"])
        try:
            result = JobResult(function(*json.loads(frame)))
            reply = json.dumps(result)
        except BaseException as error:
            reply = json.dumps(JobResult(failure=_describe(error)))
        _write(stream, reply.encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:1000]
    except BaseException:  # its text may be what was too large
        return type(error).__name__


def _send(stream: int, value: Any) -> None:
    _write(stream, json.dumps(value).encode())


def _write(stream: int, frame: bytes) -> None:
    data = memoryview(_HEADER.pack(len(frame)) + frame)
    while data:
        data = data[os.write(stream, data) :]


def _read_frame(stream: int) -> bytes | None:
    header = _read(stream, _HEADER.size)
    return None if header is None else _read(stream, _HEADER.unpack(header)[0])


def _read(stream: int, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        chunk = os.read(stream, min(length - len(data), 2**16))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):
        _serve(json.loads(sys.argv[1]))
