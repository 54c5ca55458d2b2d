"""Bombs and floods: limits of processes, memory, disk, output and time hold.

The bombs are small by themselves, so that a limit that is not there takes nothing down: they try for a few times their
limit and stop.
"""

import platform
import secrets
import signal
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from trl_prime.sandbox import Limits

from .helpers import LIMITS, NOT_HELD, PROLOGUE, eventually, run, with_marker, within


def test_fork_and_thread_bombs(sandbox):
    result = run(
        sandbox,
        """
        import threading
        children = 0
        try:
            for _ in range(100):
                if os.fork() == 0:
                    signal.pause()
                children += 1
        except BlockingIOError:
            print("denied", children)
        """,
        limits=Limits(wall_seconds=20, processes=8),
    )
    assert result.stdout == b"denied 7\n", result
    result = run(
        sandbox,
        """
        import threading
        event = threading.Event()
        threads = 0
        try:
            for _ in range(100):
                threading.Thread(target=event.wait, daemon=True).start()
                threads += 1
        except RuntimeError:
            print("denied", threads, flush=True)
        os._exit(0)
        """,
        limits=Limits(wall_seconds=20, processes=8),
    )
    assert result.stdout == b"denied 7\n", result
    # Children that fork as fast as they can, for a second
    bomb = "import os\nend = __import__('time').monotonic() + 1\nwhile __import__('time').monotonic() < end:\n    try: os.fork()\n    except OSError: pass"
    within(25, lambda: sandbox.run(bomb, limits=Limits(wall_seconds=15, processes=8)))
    assert sandbox.run("print(1)").stdout == b"1\n"


MEMORY_BOMBS = {
    "one process": "data = bytearray(600 << 20); print('OPEN')",
    "a shared mapping": "import mmap; print('OPEN', mmap.mmap(-1, 1 << 20))",
    "an unnamed file": "print('OPEN', os.memfd_create('x'))",
    "a file": "f = open('a', 'wb')\nfor _ in range(300): f.write(bytes(1 << 20)); f.flush()\nprint('OPEN')",
    "many files": "for i in range(300): open(f'{i}', 'wb').write(bytes(1 << 20))\nprint('OPEN')",
    "many empty files": "for i in range(20_000): open(f'{i}', 'w').close()\nprint('OPEN')",
    "shared memory": "for i in range(40): open(f'/dev/shm/{i}', 'wb').write(bytes(1 << 20))\nprint('OPEN')",
    "a sparse file": "f = open('a', 'wb'); f.truncate(1 << 32); print('OPEN')",
}


@pytest.mark.parametrize("source_name", MEMORY_BOMBS)
def test_memory_and_disk_bombs(sandbox, source_name):
    limits = Limits(wall_seconds=20, memory_mb=256, scratch_mb=16)
    result = run(sandbox, MEMORY_BOMBS[source_name], limits=limits)
    if sandbox.box == "landlock" and "many" in source_name:
        assert (
            result.reason == "disk"
        )  # its files have no file system of their own that could be full, but are watched
        return
    assert b"OPEN" not in result.stdout
    assert (result.reason, result.exit_code != 0) == (None, True)
    assert b"Error" in result.stderr


def test_files_that_are_unlinked_but_open_count(sandbox):
    source = """
        kept = []
        while True:
            kept.append(open("a", "wb"))
            kept[-1].write(bytes(1 << 20))
            kept[-1].flush()
            os.unlink("a")
            time.sleep(0.01)
        """
    result = run(sandbox, source, limits=Limits(wall_seconds=20, scratch_mb=8))
    assert result.reason == "disk" if sandbox.box == "landlock" else b"No space left" in result.stderr


def test_files_that_nothing_lists_count(sandbox):
    source = """
        libc.mmap.restype = ctypes.c_void_p
        for _ in range(12):
            with open("a", "w+b") as file:
                file.write(bytes(1 << 20))
                file.flush()
                assert libc.mmap(None, 4096, 1, 2, file.fileno(), 0) != 2**64 - 1
            os.unlink("a")
        time.sleep(0.2)
        """
    result = run(sandbox, source, limits=Limits(wall_seconds=20, scratch_mb=8))
    held = "files that no folder lists and no process has open count against the limit" not in NOT_HELD[sandbox.box]
    assert (result.exit_code != 0) == held


HOARDS = {
    "many processes": """
        for _ in range(6):
            if os.fork() == 0:
                data = bytearray(b"x") * (100 << 20)
                time.sleep(60)
        """,
    # Where the first thread of a process has ended, the kernel says of the process that it has no memory
    "a process without its first thread": """
        import threading
        def hoard():
            data = bytearray(b"x") * (100 << 20)
            time.sleep(60)
        for _ in range(6):
            if os.fork() == 0:
                threading.Thread(target=hoard).start()
                libc.syscall($EXIT, 0)
        """,
    # Memory of the kernel, which belongs to no process
    "buffers of sockets": """
        def fill(make):
            try:
                while True:
                    ends = make()
                    kept.append(ends)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            os.write(ends[1], bytes(1 << 16))
            except OSError:
                pass
        def pair():
            ends = [end.detach() for end in socket.socketpair()]
            os.set_blocking(ends[1], False)
            return ends
        import contextlib
        kept = []
        [os.fork() for _ in range(4)]
        fill(pair)
        """,
}


@pytest.mark.parametrize("source", HOARDS.values(), ids=HOARDS)
def test_memory_of_many_processes(sandbox, source):
    source += "\n        time.sleep(60)"
    limits = Limits(wall_seconds=30, memory_mb=128 if "socketpair" in source else 256)
    result = run(sandbox, source, limits=limits, EXIT={"x86_64": 60, "aarch64": 93}[platform.machine()])
    assert (result.reason, result.exit_code) == ("memory", -signal.SIGKILL)


def test_an_honest_use_of_sockets_and_pipes_is_no_hoard(sandbox):
    source = "import asyncio, os\nfor _ in range(9): os.pipe()\nasync def main(): await asyncio.sleep(0.3); print(1)\nasyncio.run(main())"
    assert run(sandbox, source, limits=Limits(wall_seconds=20, memory_mb=64)).stdout == b"1\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_floods(sandbox, stream):
    limits = Limits(wall_seconds=1 if stream == "stderr" else 20, output_bytes=1 << 20)
    source = f"import os, sys\nwhile True: os.write(sys.{stream}.fileno(), b'y' * 65536)"
    result = within(20, lambda: sandbox.run(source, limits=limits))
    assert result.reason == ("output" if stream == "stdout" else "time")
    assert (len(result.stdout), len(result.stderr)) == ((1 << 20, 0) if stream == "stdout" else (0, 1 << 12))


def test_the_time_limit_holds_whatever_a_program_ignores(sandbox):
    ignore = "import os, signal, sys, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    limits = Limits(wall_seconds=1)
    sources = [
        "time.sleep(1000)",
        "while True: pass",
        "for fd in (0, 1, 2): os.close(fd)\ntime.sleep(1000)",
        "os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: signal.pause()",
        "pid = os.fork()\nwhile True: time.sleep(1)",
        "x = 10 ** 10 ** 9",
    ]
    with ThreadPoolExecutor(len(sources)) as pool:
        results = within(
            20, lambda: list(pool.map(lambda source: sandbox.run(ignore + source, limits=limits), sources))
        )
    assert [(result.exit_code, result.reason) for result in results] == [(-signal.SIGKILL, "time")] * len(sources)


def test_no_process_outlives_its_program(sandbox):
    marker = f"trl-prime-{secrets.token_hex(8)}"
    source = """
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    for fd in (0, 1, 2): os.close(fd)
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    os.execv(sys.executable, [$MARKER, "-c", "import time; time.sleep(60) # " + $MARKER])
                os._exit(0)
            os.wait()
        """
    # While the program lives they are there, so the marker can be seen
    imports, body = PROLOGUE, textwrap.indent(textwrap.dedent(source).replace("$MARKER", repr(marker)), "    ")
    answers = sandbox.call(f"{imports}\ndef f():\n{body}\n", "f", [[], []], LIMITS, 60)
    assert next(answers) == {"value": None}
    eventually(lambda: len(with_marker(marker)) == 3)
    answers.close()
    eventually(lambda: with_marker(marker) == [])
    result = run(sandbox, source + "\n        time.sleep(0.3)\n        print(1)", MARKER=marker)
    assert result.stdout == b"1\n"
    assert with_marker(marker) == []
