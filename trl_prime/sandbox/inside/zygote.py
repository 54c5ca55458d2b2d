"""The warm interpreter of the local sandbox: forks one isolated process for each program.

Starting Python costs more than most programs run, so one interpreter starts, and every program is a fork of it:

    zygote -> program                     in a box of namespaces
    zygote -> supervisor -> program       by Landlock, or without walls

Tests written as Python code are such a program, which forks one more process for the solution before it reads them.

The zygote knows nothing: it receives limits and file descriptors, and forks. The program's source arrives over the
*lifeline*, a socket that only the program reads, before its walls are up; what a later program inherits from the zygote
tells it nothing about earlier ones. Closing the other end of the lifeline kills the program with all its children, and so
does the end of the zygote, which ends when its control socket closes.

Where the zygote is in a box of namespaces, every program is the init of a PID namespace of its own, which takes all its
processes along when it ends, and the zygote watches it. Where there is Landlock only, a supervisor does what the
namespaces would: it adopts the program's orphans and ends them, and it is asked about each new process and each signal.

Not covered: covert channels through timing and load, and bugs of the kernel beyond the system-call filter.
"""

import atexit
import contextlib
import errno
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # -I leaves it out

import candidate
import examiner
import isolation
import processes
import wire
from scratch import remove_tree

NOBODY = 65534
SCRATCH_FILES = 16384
LOOK_SECONDS = 0.05
RUNNING = "running"


class Zygote:
    """
    Args:
        control (`socket.socket`): Brings the descriptors of programs to start.
        settings (`dict`): `"mode"`: `"boxed"` in a box of namespaces, `"landlock"`, or `"open"` for no walls;
            `"packages"`: the folder of importable packages; `"scratch"`: where programs get a folder, unless boxed; and
            for Landlock `"version"`, `"read"` (paths that may be read), `"hidden"` (folders in these that may not) and
            `"devices"`.
    """

    def __init__(self, control: socket.socket, settings: dict):
        self.control = control
        self.settings = settings
        self.mode = settings["mode"]
        self.number = os.getpid()
        self.shown: list[tuple[int, int]] = []
        self.filter = b""
        os.environ.clear()
        os.environ.update(PATH="/usr/bin:/bin", HOME="/tmp", TMPDIR="/tmp", LANG="C.UTF-8")
        os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")

    def run(self) -> Callable[[], None]:
        """Fork a program for every message on the control socket, until it closes; returns in the programs only."""
        isolation.die_first()
        if self.mode == "boxed":
            if os.getuid() == 0:
                # RLIMIT_NPROC does not bind root, and root may read what nobody may not
                _become_nobody()
            isolation.drop_privileges()
        elif self.mode == "landlock":
            self._confine()
        isolation.set_dumpable(False)
        if self.mode == "landlock":
            isolation.adopt_orphans()
        if self.mode != "open":
            common, self.filter = isolation.filter_programs(shared=self.mode == "landlock")
            isolation.filter_system_calls(common)
        self.uid, self.gid = os.getuid(), os.getgid()
        _open_streams()
        _warm_up()
        gc.collect()
        gc.freeze()
        return self._serve_boxed() if self.mode == "boxed" else self._serve()

    def _serve_boxed(self) -> Callable[[], None]:
        """Fork programs and watch them."""
        watches: dict[int, _Watch] = {}
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        while True:
            soonest = min((watch.next_look for watch in watches.values()), default=None)
            ready = {
                fd for fd, _ in poll.poll(None if soonest is None else max(0.0, soonest - time.monotonic()) * 1000)
            }
            due = [watch for watch in watches.values() if watch.is_due(ready)]
            # One look at all processes serves all programs, which are looked at together
            parents = processes.read_parents() if any(time.monotonic() >= watch.next_look for watch in due) else {}
            for watch in due:
                reason = watch.check(ready, parents)
                if reason == RUNNING:
                    continue
                for fd in (watch.process, watch.lifeline.fileno()):
                    poll.unregister(fd)
                del watches[watch.pid]
                watch.report(reason, os.wait4(watch.pid, 0))
                watch.close()
            if self.control.fileno() not in ready:
                continue
            job, fds = self._next_job()
            lifeline = socket.socket(fileno=fds[0])
            started = time.monotonic()
            try:
                pid = isolation.fork(isolation.CLONE_NEWUSER | isolation.CLONE_NEWPID)
                if pid == 0:
                    # The walls close all descriptors; objects that went later would close those of the program
                    for connection in (self.control, *(watch.lifeline for watch in watches.values())):
                        connection.detach()
                    return self._begin(job, fds[1:], lifeline)
                watch = _Watch(pid, isolation.pidfd_open(pid), lifeline, job, started)
            except OSError:  # no room: the caller sees its lifeline close and may try again
                lifeline.close()
            else:
                watches[pid] = watch
                poll.register(watch.process, select.POLLIN)
                poll.register(lifeline, select.POLLRDHUP)  # what is to be read on it is for the program
            for fd in fds[1:]:
                os.close(fd)

    def _next_job(self) -> tuple[dict, list[int]]:
        message, fds, _, _ = socket.recv_fds(self.control, 1 << 12, 8)
        if not message:
            os._exit(0)
        return json.loads(message), fds

    def _begin(self, job: dict, fds: list[int], lifeline: socket.socket) -> Callable[[], None]:
        """In the program's own process: become what runs behind the walls."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            source = _read_source(lifeline)
            isolation.set_dumpable(True)  # or the files of /proc/self belong to root
            isolation.map_user(self.uid, self.gid)
            return self._enter(job, fds, None, lifeline, None, source)
        except BaseException as error:
            _send(lifeline, {"setup": f"{type(error).__name__}: {error}"})
            os._exit(1)

    def _serve(self) -> Callable[[], None]:
        """Fork supervisors."""
        supervisors: dict[int, int] = {}
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            for fd in ready & supervisors.keys():
                poll.unregister(fd)
                self._bury(supervisors, fd)
            if self.control.fileno() not in ready:
                continue
            job, fds = self._next_job()
            try:
                pid = os.fork()
            except OSError:  # no room, as above
                pid = -1
            if pid == 0:
                self.control.close()
                for fd in supervisors:
                    os.close(fd)
                return self.supervise(job, fds)
            for fd in fds:
                os.close(fd)
            if pid > 0:
                fd = isolation.pidfd_open(pid)
                supervisors[fd] = pid
                poll.register(fd, select.POLLIN)

    def _bury(self, supervisors: dict[int, int], fd: int) -> None:
        """Reap a supervisor. What one that was killed has left is ours now, and is ended."""
        _, status = os.waitpid(supervisors.pop(fd), 0)
        os.close(fd)
        while status:
            orphans = [pid for pid in processes.descendants(self.number) if pid not in supervisors.values()]
            ours = [
                pid
                for pid in orphans
                if not any(processes.is_descendant(pid, supervisor) for supervisor in supervisors.values())
            ]
            if not ours:
                return
            for pid in ours:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            for pid in ours:
                with contextlib.suppress(OSError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)

    def _confine(self) -> None:
        """Give up root where possible, all capabilities, and all files but those that programs may see."""
        shown = [*self.settings["read"], *self.settings["devices"]]
        scratch = self.settings["scratch"]
        if os.getuid() == 0:
            with contextlib.suppress(PermissionError):  # root without the rights of root
                os.chown(scratch, NOBODY, NOBODY)
                os.setegid(NOBODY)
                os.seteuid(NOBODY)
                sees_all = all(os.access(path, os.R_OK, effective_ids=True) for path in [*shown, scratch])
                os.seteuid(0)
                os.setegid(0)
                if sees_all:
                    _become_nobody()
                else:  # Python lies in root's own folder
                    os.chown(scratch, 0, 0)
        isolation.drop_privileges()
        version = self.settings["version"]
        own = isolation.Landlock(version, scoped=False)
        hidden = self.settings["hidden"]
        for path, rights in [
            *_without(self.settings["read"], hidden),
            *((path, isolation.READ_WRITE) for path in self.settings["devices"]),
            (scratch, isolation.ALL),
            ("/proc", isolation.READ_WRITE),
        ]:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                own.allow(fd, rights)
                os.close(fd)
        own.restrict()
        # The rules of programs are fewer: what is hidden from the zygote is hidden from them anyhow
        for path in self.settings["read"]:
            self.shown.append((os.open(path, os.O_PATH | os.O_CLOEXEC), isolation.READ))
        for path in self.settings["devices"]:
            self.shown.append((os.open(path, os.O_PATH | os.O_CLOEXEC), isolation.READ_WRITE))

    def supervise(self, job: dict, fds: list[int]) -> Callable[[], None]:
        """Start the program and watch it; returns only in the program's process, with what it shall run."""
        lifeline = socket.socket(fileno=fds[0])
        scratch = None
        try:
            scratch = f"{self.settings['scratch']}/{os.getpid()}-{time.monotonic_ns()}"
            os.mkdir(scratch, 0o700)
            zygote = None
            if self.mode == "landlock":
                isolation.adopt_orphans()
                zygote = isolation.pidfd_open(self.number)
            ours, theirs = socket.socketpair()
            started = time.monotonic()
            pid = os.fork()
            if pid == 0:
                isolation.die_with_parent()
                ours.detach()  # as above: the walls close it
                source = _read_source(lifeline)
                return self._enter(job, fds[1:], scratch, lifeline, theirs, source)
            theirs.close()
            process = isolation.pidfd_open(pid)
            listeners = []
            if self.mode == "landlock":
                for _ in range(1 + (job["mode"] == "examine")):
                    listeners += socket.recv_fds(ours, 1, 1)[1]
            ours.close()
        except BaseException as error:
            _send(lifeline, {"setup": f"{type(error).__name__}: {error}"})
            os._exit(1)
        for fd in fds[1:]:
            os.close(fd)
        watch = _Watch(pid, process, lifeline, job, started, scratch, listeners, zygote)
        reason = watch.wait()
        if self.mode == "open":
            _kill_group(pid)
        ended = os.wait4(pid, 0)
        if self.mode == "landlock":
            _end_descendants()
            reason = reason or watch.look_at_disk([])
        remove_tree(scratch)
        if reason != "zygote":  # which is not the program's doing, so there is nothing to report
            watch.report(reason, ended)
        os._exit(0)

    def _enter(
        self,
        job: dict,
        fds: list[int],
        scratch: str | None,
        lifeline: socket.socket,
        to_supervisor: socket.socket | None,
        source: str,
    ) -> Callable[[], None]:
        """
        Put up the walls around this process and make `fds` its descriptors 0, 1, 2, ..., its only ones in the end; returns
        what runs behind them. Tests come with a process for the solution, behind walls of its own.
        """
        os.setsid()
        mode = job["mode"]
        if mode == "examine":
            mode, fds, scratch = _split(fds, scratch)
        rules = None
        if self.mode == "landlock":
            rules = isolation.Landlock(self.settings["version"], scoped=True)
            for fd, rights in self.shown:
                rules.allow(fd, rights)
            folder = os.open(scratch, os.O_PATH)
            rules.allow(folder, isolation.ALL)
        # Out of the way of the descriptors that the program gets
        kept = [fcntl.fcntl(lifeline.detach(), fcntl.F_DUPFD_CLOEXEC, 60)]
        supervisor_fd = to_supervisor.detach() if to_supervisor else -1
        if rules:
            kept.append(fcntl.fcntl(supervisor_fd, fcntl.F_DUPFD_CLOEXEC, kept[-1] + 1))
            kept.append(rules.move_to(kept[-1] + 1))
        for target, fd in enumerate(fds):
            # They are numbered from 4 up and in order, so a copy never overwrites one still needed
            os.dup2(fd, target)
        os.closerange(len(fds), kept[0])
        os.closerange(kept[-1] + 1, os.sysconf("SC_OPEN_MAX"))
        # The callers' object is gone, and what fails from here on must be told too: it is no fault of the program's
        with socket.socket(fileno=kept[0]) as lifeline:
            try:
                self._put_up_walls(job, "/tmp" if self.mode == "boxed" else scratch, rules, kept[1:])
            except BaseException as error:
                _send(lifeline, {"setup": f"{type(error).__name__}: {error}"})
                os._exit(1)
        if mode == "examine":
            isolation.set_dumpable(False)
        return _program(mode, source)

    def _put_up_walls(
        self, job: dict, scratch: str, rules: isolation.Landlock | None, to_supervisor: list[int]
    ) -> None:
        if self.mode == "boxed":
            isolation.private_filesystem(job["scratch_bytes"])
        os.chdir(scratch)
        # The limit of processes counts those of the user namespace, and without a box all of the user's
        others = {"boxed": lambda: 0, "landlock": lambda: None, "open": processes.count_threads_of_user}[self.mode]()
        most = None if others is None else job["processes"] + others
        isolation.set_limits(job["memory_bytes"], job["cpu_seconds"], job["scratch_bytes"], most)
        if self.mode != "open":
            isolation.set_dumpable(True)
            isolation.drop_privileges()
        if rules:
            rules.restrict()
            listener = isolation.filter_system_calls(self.filter, shared=True)
            with socket.socket(fileno=to_supervisor[0]) as supervisor:
                socket.send_fds(supervisor, [b"l"], [listener])
            os.close(listener)
        elif self.mode == "boxed":
            isolation.filter_system_calls(self.filter)
        if self.mode != "boxed":
            os.environ.update(HOME=scratch, TMPDIR=scratch)
        os.umask(0o077)


class _Watch:
    """Watches a program for its end, and ends it for the caller's hanging up, its time, its memory or its files."""

    def __init__(
        self,
        pid: int,
        process: int,
        lifeline: socket.socket,
        job: dict,
        started: float,
        scratch: str | None = None,
        listeners: Collection[int] = (),
        zygote: int | None = None,
    ):
        self.pid = pid
        self.process = process
        self.lifeline = lifeline
        self.job = job
        self.started = started
        self.scratch = scratch
        self.listeners = listeners
        self.zygote = zygote
        self.tasks = 1 + (job["mode"] == "examine")
        self.socket_bytes = lifeline.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.next_look = _next_look()

    def wait(self) -> str | None:
        """Watch until the end; the reason of a kill, None if there was none."""
        poll = select.poll()
        poll.register(self.lifeline, select.POLLRDHUP)  # what is to be read on it is for the program
        for fd in (self.process, *self.listeners, *([] if self.zygote is None else [self.zygote])):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(max(0.0, self.next_look - time.monotonic()) * 1000)}
            for listener in ready.intersection(self.listeners):
                if self.process not in ready and not self._answer(listener):
                    poll.unregister(listener)
            reason = self.check(ready)
            if reason != RUNNING:
                return reason

    def is_due(self, ready: set[int]) -> bool:
        """Whether there is something to check."""
        return self.process in ready or self.lifeline.fileno() in ready or time.monotonic() >= self.next_look

    def check(self, ready: set[int], parents: dict[int, int] | None = None) -> str | None:
        """
        Kill the program if it must be.

        Args:
            ready (`set[int]`): Descriptors at which something has happened.
            parents (`dict[int, int]`, *optional*): What `processes.read_parents` gave just now.

        Returns:
            `str` or `None`: the reason of a kill, None if the program has ended by itself, else `RUNNING`.
        """
        if self.process in ready:
            return None
        if self.zygote in ready:
            reason = "zygote"
            # The caller must see this end before it sees the program's
            with contextlib.suppress(OSError):
                self.lifeline.shutdown(socket.SHUT_RDWR)
        elif self.lifeline.fileno() in ready:
            reason = "killed"
        else:
            reason = self._look(parents)
        if not reason:
            return RUNNING
        os.kill(self.pid, signal.SIGKILL)  # the init of a PID namespace takes all its processes along
        return reason

    def report(self, reason: str | None, ended: tuple) -> None:
        """Tell the caller how the program ended, by what `os.wait4` gave."""
        _, status, usage = ended
        report = {
            "exit": os.waitstatus_to_exitcode(status),
            "reason": reason,
            "seconds": time.monotonic() - self.started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }
        _send(self.lifeline, report)

    def close(self) -> None:
        """Close what was watched."""
        os.close(self.process)
        self.lifeline.close()

    def _look(self, parents: dict[int, int] | None) -> str | None:
        """The limit that the program has gone beyond."""
        now = time.monotonic()
        if now > self.started + self.job["wall_seconds"]:
            return "time"
        if now < self.next_look:
            return None
        # By Landlock alone the program's orphans are the supervisor's children
        pids = {self.pid, *processes.descendants(os.getpid() if self.listeners else self.pid, parents)}
        self.next_look = _next_look()
        # Tests and their solution may use as much as one program each
        shares = [pids - {self.pid}, {self.pid}] if self.job["mode"] == "examine" else [pids]
        if any(processes.memory_in_use(share, self.socket_bytes) > self.job["memory_bytes"] for share in shares):
            return "memory"
        if self.scratch:
            return self.look_at_disk(pids)
        return None

    def look_at_disk(self, pids: list[int]) -> str | None:
        """The same for files alone."""
        size = processes.disk_in_use(self.scratch, pids, SCRATCH_FILES)
        return "disk" if size > self.job["scratch_bytes"] else None

    def _answer(self, listener: int) -> bool:
        """Answer a question of the program's; False when there will be no more."""
        try:
            question = isolation.Question(listener)
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.EINTR)  # who asked has ended
        if question.is_fork:
            if self.tasks >= self.job["processes"]:  # of which some may have ended
                self.tasks = processes.count_threads(processes.descendants(os.getpid()))
            allowed = self.tasks < self.job["processes"]
            self.tasks += allowed
            question.answer(0 if allowed else errno.EAGAIN)
        else:
            # The sender's own group, one of the program's processes, or the group that it leads
            target = question.target
            own = target == 0 or (target != -1 and processes.is_descendant(abs(target), os.getpid()))
            question.answer(0 if own else errno.ESRCH)
        return True


def _open_streams() -> None:
    """Make the streams that all programs use, over pipes, as theirs may be: each has other descriptors behind them."""
    kept = [os.dup(fd) for fd in range(3)]
    reading, writing = os.pipe()
    for fd in range(3):
        os.dup2(writing if fd else reading, fd)
    candidate.open_streams()
    for fd, own in enumerate(kept):
        os.dup2(own, fd)
    for fd in (reading, writing, *kept):
        os.close(fd)


def _warm_up() -> None:
    """
    Judge a solution of no meaning as programs will be. What Python does at first only (tables, caches, faster forms of the
    instructions that it runs) is done here once, and needs no pages of their own in each process.
    """
    solution = "from math import sqrt\ndef f(x: int) -> List[int]:\n    return [x, str(x), (x / 2, None)]\n"
    check = "def check(g):\n    assert g(2) == [2, '2', (1.0, None)]\n    assert abs(g(3)[0] - 3) < 1e-6\n"
    tests = {"setup": check, "asserts": ["check(f)"] * 3, "entry_point": "f"}
    for number in range(20):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        here, there = (ours, theirs) if pid else (theirs, ours)
        there.close()
        if (number % 2 == 0) == (pid == 0):
            candidate.serve(here.fileno())
        else:
            list(examiner.examine(wire.Channel(here.fileno()), solution, tests))
        if pid == 0:
            os._exit(0)
        here.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    sys.modules.pop("solution", None)


def _next_look() -> float:
    """The next of the times at which programs are looked at: the same for all."""
    return (time.monotonic() // LOOK_SECONDS + 1) * LOOK_SECONDS


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _without(paths: list[str], hidden: list[str]) -> list[tuple[str, int]]:
    """
    Rules that allow reading some folders but not what is hidden in them. A rule holds for all below a folder, so the
    neighbours of the hidden are allowed one by one; their folder can be listed, or nothing could be imported from it.
    """
    rules = []
    for path in paths:
        if path in hidden:
            continue
        if not any(folder.startswith(path + "/") for folder in hidden):
            rules.append((path, isolation.READ))
            continue
        rules.append((path, isolation.LIST))
        with os.scandir(path) as entries:
            rules += _without([entry.path for entry in entries if not entry.is_symlink()], hidden)
    return rules


def _split(fds: list[int], scratch: str | None) -> tuple[str, list[int], str | None]:
    """
    Fork the process of a solution off that of its tests, which have not come yet. The channel between them is the last of their
    descriptors, and each has its own folder. The solution can neither trace the tests, which are not dumpable, nor signal
    them to any effect: they are the init of the PID namespace, and where there is none, tests that end have failed.

    Returns:
        `tuple`: what this process is, `"serve"` or `"examine"`, its descriptors and its folder.
    """
    to_solution, to_tests = socket.socketpair()
    tests, solution = (scratch and f"{scratch}/{name}" for name in ("tests", "solution"))
    for folder in filter(None, (tests, solution)):
        os.mkdir(folder)
    if os.fork() == 0:
        isolation.die_with_parent()
        to_solution.close()
        return "serve", [*fds[:3], to_tests.detach()], solution
    to_tests.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return "examine", [*fds, to_solution.detach()], tests


def _read_source(lifeline: socket.socket) -> str:
    """The program's source: four bytes of length and text. Says that it has come: from here on the program is to blame."""
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        part = lifeline.recv(1 << 16)
        if not part:
            os._exit(0)
        data += part
    lifeline.sendall(b".")
    return data[4:].decode(errors="surrogatepass")


def _send(lifeline: socket.socket, report: dict) -> None:
    with contextlib.suppress(OSError):  # nobody may wait for it any more
        lifeline.sendall(json.dumps(report).encode() + b"\n")


def _end_descendants() -> None:
    """
    Kill and reap all processes below this one. They cannot grow faster than they are killed: the supervisor is asked
    about each new one, and answers no more.
    """
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            for pid in processes.descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
            continue
        return


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def run_to_the_end(run: Callable[[], None]) -> None:
    """
    Run a program and end as the interpreter does: exit code, traceback, other threads, functions of `atexit`, streams.

    All but the taking down of the interpreter, which writes to most of its memory: in a forked process each page written
    to is copied first, and that took longer than anything else.
    """
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = 1
        with contextlib.suppress(BaseException):
            sys.excepthook(*sys.exc_info())
    if code is None:
        code = 0
    elif not isinstance(code, int):
        with contextlib.suppress(BaseException):
            print(code, file=sys.stderr)
        code = 1
    with contextlib.suppress(BaseException):
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            code = code or 120
    os._exit(code & 0xFF)


def _program(mode: str, source: str) -> Callable[[], None]:
    if mode == "script":
        return lambda: candidate.run_script(source)
    if mode == "serve":
        return lambda: candidate.serve(3)
    return lambda: examiner.serve(3, 4)


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    run = Zygote(socket.socket(fileno=int(sys.argv[1])), settings).run()
    sys.path[0] = os.getcwd()
    sys.path.append(settings["packages"])
    sys.argv = ["solution.py"]
    run_to_the_end(run)
