"""The warm interpreter of the local sandbox: forks one isolated process for each program.

Starting Python costs more than most programs run, so one interpreter starts, and every program is a fork of it:

    zygote -> supervisor (one a program, outside the program's walls) -> program (init of its own PID namespace)

The zygote knows nothing: it receives file descriptors and forks. The program's source and limits arrive over the
*lifeline*, a socket that only the supervisor reads; what a later program inherits from the zygote tells it nothing about
earlier ones. Closing the other end of the lifeline kills the program with all its children, and so does the end of the
zygote, which ends when its control socket closes.

Not covered: covert channels through timing and load, and bugs of the kernel beyond the system-call filter.
"""

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # -I leaves it out

import candidate
import examiner
import isolation
from scratch import remove_tree

NOBODY = 65534
PIPE_BYTES = 1 << 16


def main(control_fd: int, boxed: bool, scratch: str) -> Callable[[], None]:
    """Fork a program for every message on the control socket, until it closes; returns in the programs only."""
    if boxed and os.getuid() == 0:
        # RLIMIT_NPROC does not bind root, and root may read what nobody may not
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    isolation.set_dumpable(False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors need no reaping
    control = socket.socket(fileno=control_fd)
    gc.collect()
    gc.freeze()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 16, 8)
        if not message:
            os._exit(0)
        try:
            forked = os.fork()
        except OSError:  # no room: the caller sees its lifeline close and may try again
            forked = 1
        if forked == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            return supervise(fds, boxed, scratch)
        for fd in fds:
            os.close(fd)


def supervise(fds: list[int], boxed: bool, scratch: str) -> Callable[[], None]:
    """Start the program and watch it; returns only in the program's process, with what it shall run."""
    lifeline = socket.socket(fileno=fds[0])
    try:
        job = _read_job(lifeline)
        lifeline.sendall(b".")  # from here on it is known to be this program that fails
        isolation.set_dumpable(True)  # or the files of /proc/self belong to root
        isolation.die_first()
        if boxed:
            uid, gid = os.getuid(), os.getgid()
            isolation.unshare(isolation.CLONE_NEWUSER | isolation.CLONE_NEWPID)
            isolation.map_user(uid, gid)
        else:
            job["scratch"] = tempfile.mkdtemp(dir=scratch)
        isolation.set_dumpable(False)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            isolation.die_with_parent()
            # Out of the way of the descriptors that the program gets
            lifeline = socket.socket(fileno=fcntl.fcntl(lifeline.detach(), fcntl.F_DUPFD_CLOEXEC, 60))
            _enter(job, fds[1:], lifeline.fileno(), boxed)
            lifeline.close()
            return _program(job)
        process = isolation.pidfd_open(pid)
    except BaseException as error:
        _send(lifeline, {"setup": f"{type(error).__name__}: {error}"})
        os._exit(1)
    for fd in fds[1:]:
        os.close(fd)
    reason = _watch(pid, process, lifeline, job, started)
    if not boxed:
        _kill_group(pid)
        remove_tree(job["scratch"])
    _, status, usage = os.wait4(pid, 0)
    _send(
        lifeline,
        {
            "exit": os.waitstatus_to_exitcode(status),
            "reason": reason,
            "seconds": time.monotonic() - started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        },
    )
    os._exit(0)


def _read_job(lifeline: socket.socket) -> dict:
    """The job: four bytes of length and JSON."""
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        part = lifeline.recv(1 << 20)
        if not part:
            os._exit(0)
        data += part
    return json.loads(data[4:])


def _send(lifeline: socket.socket, report: dict) -> None:
    with contextlib.suppress(OSError):  # nobody may wait for it any more
        lifeline.sendall(json.dumps(report).encode() + b"\n")


def _watch(pid: int, process: int, lifeline: socket.socket, job: dict, started: float) -> str | None:
    """Wait for the program's end, the caller's hanging up, the time limit or the memory limit; the reason of a kill."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(lifeline, select.POLLIN)
    socket_bytes = lifeline.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    reason = None
    while True:
        ready = {fd for fd, _ in poll.poll(50)}
        if process in ready:
            break
        if lifeline.fileno() in ready:
            reason = "killed"
        elif time.monotonic() - started > job["wall_seconds"]:
            reason = "time"
        elif _memory_in_use(pid, socket_bytes) > job["memory_bytes"]:
            reason = "memory"
        if reason:
            os.kill(pid, signal.SIGKILL)  # the init of a PID namespace takes all its processes along
            break
    return reason


def _memory_in_use(root: int, socket_bytes: int) -> int:
    """
    Memory of a process and all its descendants. Limits bind each process; their sum is bound here, and what lies in their
    sockets and pipes, which no limit counts: each is taken for full.
    """
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):  # ended meanwhile
            parents[int(name)] = _stat(f"/proc/{name}/stat")[1]
    total, buffers = 0, set()
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root:
            with contextlib.suppress(OSError, ValueError):
                total += _resident_pages(pid) * os.sysconf("SC_PAGESIZE")
                buffers |= _buffers(pid)
    return total + sum(socket_bytes if name.startswith("socket") else PIPE_BYTES for name in buffers)


def _resident_pages(pid: int) -> int:
    state, _, pages = _stat(f"/proc/{pid}/stat")
    if state == b"Z":  # its first thread has ended; others may live on, and the memory with them
        pages = max(_stat(f"/proc/{pid}/task/{thread}/stat")[2] for thread in os.listdir(f"/proc/{pid}/task"))
    return pages


def _buffers(pid: int) -> set[str]:
    """Names of a process's sockets and pipes. A thread may have descriptors of its own."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            for fd in os.listdir(f"/proc/{pid}/task/{thread}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    found.add(os.readlink(f"/proc/{pid}/task/{thread}/fd/{fd}"))
        except FileNotFoundError:
            continue
        except PermissionError:  # it hides what it has, so it has as many as it may
            found |= {f"socket of {pid}: {number}" for number in range(isolation.OPEN_FILES)}
    return {name for name in found if name.startswith(("socket", "pipe"))}


def _stat(path: str) -> tuple[bytes, int, int]:
    """State, parent and resident pages of a process or thread."""
    with open(path, "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return fields[0], int(fields[1]), int(fields[21])


def _threads_of_user() -> int:
    """Threads of all processes of this user."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # ended meanwhile
    return count


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _enter(job: dict, fds: list[int], lifeline: int, boxed: bool) -> None:
    """Put up the walls around this process and make `fds` its descriptors 0, 1, 2, ..., beside the lifeline its only ones."""
    os.setsid()
    for target, fd in enumerate(fds):
        # They are numbered from 4 up and in order, so a copy never overwrites one still needed
        os.dup2(fd, target)
    os.closerange(len(fds), lifeline)
    os.closerange(lifeline + 1, os.sysconf("SC_OPEN_MAX"))
    if boxed:
        isolation.private_filesystem(job["scratch_bytes"])
        os.chdir("/tmp")
    else:
        os.chdir(job["scratch"])
    # The limit of processes counts those of the user namespace: the supervisor too, and without a box all of the user's
    others = 1 if boxed else _threads_of_user()
    isolation.set_limits(job["memory_bytes"], job["cpu_seconds"], job["scratch_bytes"], job["processes"] + others)
    if boxed:
        isolation.set_dumpable(True)
        isolation.drop_privileges()
        isolation.filter_system_calls()
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", HOME=os.getcwd(), TMPDIR=os.getcwd(), LANG="C.UTF-8")
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    os.umask(0o077)


def _program(job: dict) -> Callable[[], None]:
    if job["mode"] == "script":
        return lambda: candidate.run_script(job["source"])
    if job["mode"] == "serve":
        return lambda: candidate.serve(3)
    return lambda: examiner.serve(3, 4)


if __name__ == "__main__":
    run = main(int(sys.argv[1]), boxed=sys.argv[2] == "boxed", scratch=sys.argv[4])
    sys.path[0] = os.getcwd()
    sys.path.append(sys.argv[3])
    sys.argv = ["solution.py"]
    run()
