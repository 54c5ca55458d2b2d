"""The tests of the local sandbox share this: limits, the prologue of programs that attempt something, and processes."""

import contextlib
import os
import platform
import subprocess
import textwrap
import time
from pathlib import Path

from trl_prime import sandbox as package
from trl_prime.sandbox import Limits

FOLDER = Path(package.__file__).parent
BOXES = ("bubblewrap", "namespaces", "landlock")
LIMITS = Limits(wall_seconds=20)  # this machine may be busy; what must be fast says so
SCRATCH = 'os.environ["HOME"]'  # how a program names its own folder, where it starts
# The walls of a box do not hold these, by the names of the table in docs/verifiers.md. The tests assert that it is just this.
NOT_HELD = {
    "bubblewrap": set(),
    "namespaces": set(),
    "landlock": {
        "whether a file is there, its size and times, where a link leads",
        "names of installed packages",
        "numbers of other processes",
        "files that no folder lists and no process has open count against the limit",
    },
}
PROLOGUE = """
import ctypes, errno, os, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def system_call(*arguments):
    result = libc.syscall(*(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def attempt(name, action):
    try:
        result = action()
    except (OSError, PermissionError) as error:
        print(name, "denied", errno.errorcode.get(error.errno))
    else:
        print(name, "OPEN", result)
"""
NUMBERS = {
    "x86_64": {"socket": 41, "clone": 56, "ptrace": 101, "mount": 165, "umount2": 166, "unshare": 272, "setns": 308}
    | {"process_vm_readv": 310, "shmget": 29, "msgget": 68, "memfd_create": 319, "bpf": 321, "userfaultfd": 323}
    | {"vmsplice": 278, "keyctl": 250, "syslog": 103, "perf_event_open": 298, "io_setup": 206, "prlimit64": 302}
    | {"shmat": 30, "shmctl": 31, "semop": 65, "semctl": 66, "msgsnd": 69, "msgrcv": 70, "msgctl": 71}
    | {"get_robust_list": 274},
    "aarch64": {"socket": 198, "clone": 220, "ptrace": 117, "mount": 40, "umount2": 39, "unshare": 97, "setns": 268}
    | {"process_vm_readv": 270, "shmget": 194, "msgget": 186, "memfd_create": 279, "bpf": 280, "userfaultfd": 282}
    | {"vmsplice": 75, "keyctl": 219, "syslog": 116, "perf_event_open": 241, "io_setup": 0, "prlimit64": 261}
    | {"shmat": 196, "shmctl": 195, "semop": 193, "semctl": 191, "msgsnd": 189, "msgrcv": 188, "msgctl": 187}
    | {"get_robust_list": 100},
}[platform.machine()]  # fmt: skip


def run(sandbox, source, stdin="", limits=LIMITS, **values):
    """Run a program in which $NAME stands for the value NAME."""
    source = textwrap.dedent(source)
    source = source.replace("$SCRATCH", SCRATCH)
    for name, value in values.items():
        source = source.replace(f"${name}", repr(value))
    return sandbox.run(PROLOGUE + source, stdin, limits)


def assert_all_denied(result, count):
    lines = result.stdout.decode().splitlines()
    assert result.exit_code == 0, result
    assert len(lines) == count, result
    assert [line for line in lines if " denied " not in line] == []


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def processes():
    """{pid: (parent, command line)} of the machine, zombies with an empty one."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_bytes()
    return found


def descendants(pid):
    table, found = processes(), {pid}
    while more := {child for child, (parent, _) in table.items() if parent in found} - found:
        found |= more
    return found - {pid}


def with_marker(marker):
    return [pid for pid, (_, command) in processes().items() if marker.encode() in command]


def zygote_of(sandbox):
    table = processes()
    family = descendants(sandbox._process.pid) | {sandbox._process.pid}
    # The processes that make the box have it among their arguments, but not as a program
    zygotes = [pid for pid in family if b"/zygote.py\0" in table.get(pid, (0, b""))[1] and b"--" not in table[pid][1]]
    (zygote,) = [pid for pid in zygotes if table[pid][0] not in zygotes]
    return zygote


def within(seconds, action):
    started = time.monotonic()
    result = action()
    assert time.monotonic() - started < seconds
    return result


def interpreter_for_everybody():
    """A Python that users without rights can read, or None."""
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(path):
            asked = subprocess.run([path, "-c", "import sys; print(sys.version_info >= (3, 10))"], capture_output=True)
            if asked.stdout == b"True\n":
                return path
    return None
