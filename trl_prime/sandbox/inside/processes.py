"""Facts of processes from /proc: descendants, memory and open files, for those that watch a program from outside."""

import contextlib
import os
import stat
from collections.abc import Iterable

import isolation

PIPE_BYTES = 1 << 16


def read_stat(path: str) -> tuple[bytes, int, int]:
    """State, parent and resident pages of a process or thread, by its `stat` in /proc."""
    with open(path, "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return fields[0], int(fields[1]), int(fields[21])


def is_descendant(pid: int, root: int) -> bool:
    """Whether a process is a child of `root`, or a child's child and so on."""
    with contextlib.suppress(OSError, ValueError):  # it is not there
        while pid > 1:
            pid = read_stat(f"/proc/{pid}/stat")[1]
            if pid == root:
                return True
    return False


def read_parents() -> dict[int, int]:
    """The parent of each process of this PID namespace."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):  # ended meanwhile
            parents[int(name)] = read_stat(f"/proc/{name}/stat")[1]
    return parents


def descendants(root: int, parents: dict[int, int] | None = None) -> list[int]:
    """All processes below `root`, by what `read_parents` gave or gives now."""
    parents = read_parents() if parents is None else parents
    found = []
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root and pid != root:
            found.append(pid)
    return found


def count_threads(pids: list[int]) -> int:
    """Threads of some processes, each at least one."""
    count = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def count_threads_of_user() -> int:
    """Threads of all processes of this user."""
    pids = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                pids.append(int(name))
    return count_threads(pids)


def memory_in_use(pids: Iterable[int], socket_bytes: int) -> int:
    """
    Memory of processes in bytes. Limits bind each process; their sum is bound by this, and what lies in their sockets
    (`socket_bytes` each) and pipes, which no limit counts: each is taken for full.
    """
    total = 0
    buffers = set()
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            total += _resident_pages(pid) * os.sysconf("SC_PAGESIZE")
            buffers |= _buffers(pid)
    return total + sum(socket_bytes if name.startswith("socket") else PIPE_BYTES for name in buffers)


def _resident_pages(pid: int) -> int:
    state, _, pages = read_stat(f"/proc/{pid}/stat")
    if state == b"Z":  # its first thread has ended; others may live on, and the memory with them
        pages = max(read_stat(f"/proc/{pid}/task/{thread}/stat")[2] for thread in os.listdir(f"/proc/{pid}/task"))
    return pages


def _descriptors(pid: int) -> list[str]:
    """Paths in /proc of a process's descriptors. A thread may have some of its own."""
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            folder = f"/proc/{pid}/task/{thread}/fd"
            found += [f"{folder}/{fd}" for fd in os.listdir(folder)]
    return found


def _buffers(pid: int) -> set[str]:
    """Names of a process's sockets and pipes."""
    found = set()
    try:
        for path in _descriptors(pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.add(os.readlink(path))
    except PermissionError:  # it hides what it has, so it has as many as it may
        return {f"socket of {pid}: {number}" for number in range(isolation.OPEN_FILES)}
    return {name for name in found if name.startswith(("socket", "pipe"))}


def disk_in_use(folder: str, pids: Iterable[int], most: int) -> float:
    """Bytes of the files in a folder and of those that processes have open though they are in no folder. More files than
    `most` are endless bytes."""
    sizes = {}
    folders = [folder]
    while folders and len(sizes) <= most:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    sizes[status.st_ino] = status.st_blocks * 512
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(entry.path)
    for pid in pids:
        with contextlib.suppress(OSError):
            for path in _descriptors(pid):
                with contextlib.suppress(OSError):
                    status = os.stat(path)
                    if stat.S_ISREG(status.st_mode):
                        sizes[status.st_ino] = status.st_blocks * 512
    return float("inf") if len(sizes) > most else sum(sizes.values())
