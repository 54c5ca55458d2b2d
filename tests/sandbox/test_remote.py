"""The remote sandbox against a server on loopback that speaks Sandbox Fusion's `POST /run_code` and runs the programs."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_prime.sandbox import Limits, RemoteSandbox, SandboxUnavailable, open_sandbox, remote

from .helpers import interpreter_for_everybody

LIMITS = Limits(wall_seconds=10)
BREAK = b"{"

# The server runs programs as somebody unprivileged, where we can become him and he can read an interpreter
PYTHON, USER = sys.executable, None
if os.getuid() == 0 and (found := interpreter_for_everybody()):
    PYTHON, USER = found, 65534


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.commands = [], []
        self.replies = []  # (status, body) to give in place of an answer, in turn

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        status, answer = self.server.replies.pop(0) if self.server.replies else (200, None)
        data = json.dumps(_run(self.server, body)).encode() if answer is None else answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + (answer is BREAK)))  # one byte that never comes
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)


def _run(server, body):
    """As Sandbox Fusion does: the code as a file in a folder of its own, the input by a pipe."""
    with tempfile.TemporaryDirectory(prefix="trl-prime-test-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)
        path = Path(folder, "main.py")
        path.write_text(body["code"])
        os.chmod(path, 0o644)
        identity = {"user": USER, "group": USER, "extra_groups": []} if USER else {}
        command = [PYTHON, str(path)]
        server.commands.append((command, body["code"]))
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=folder, start_new_session=True, env={"PATH": "/usr/bin:/bin"}, **identity,
        )  # fmt: skip
        status = "Finished"
        try:
            out, err = process.communicate(body["stdin"], timeout=body["run_timeout"])
        except subprocess.TimeoutExpired:
            status, out, err = "TimeLimitExceeded", "", ""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if status != "Finished":
            process.communicate()
    return {
        "status": "Success" if status == "Finished" and process.returncode == 0 else "Failed",
        "message": "",
        "compile_result": None,
        "run_result": {
            "status": status,
            "execution_time": time.monotonic() - started,
            "return_code": process.returncode if status == "Finished" else None,
            "stdout": out,
            "stderr": err,
        },
        "executor_pod_name": None,
        "files": {},
    }


@pytest.fixture(scope="module")
def running():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running, monkeypatch):
    for record in (running.requests, running.commands, running.replies):
        record.clear()
    pauses = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=pauses.append))
    running.pauses = pauses
    return running


@pytest.fixture
def sandbox(server):
    made = RemoteSandbox(server.url + "/")
    server.requests.clear()
    return made


def test_an_address_opens_it(server):
    assert isinstance(open_sandbox(server.url), RemoteSandbox)
    assert open_sandbox(server.url) is open_sandbox(server.url)


def test_a_program(sandbox, server):
    result = sandbox.run("print(input() * 2)", "ü", LIMITS)
    assert (result.stdout.decode(), result.exit_code, result.reason) == ("üü\n", 0, None)
    ((path, body),) = server.requests
    assert path == "/run_code"
    assert body == {"code": "print(input() * 2)", "language": "python", "stdin": "ü", "run_timeout": 10, "memory_limit_MB": 1024}  # fmt: skip
    result = sandbox.run("import sys; print(1); sys.exit('bad')", limits=LIMITS)
    assert (result.stdout, result.stderr, result.exit_code, result.ended_well) == (b"1\n", b"bad\n", 1, False)


def test_the_limits_of_a_program(sandbox):
    result = sandbox.run("import time; time.sleep(60)", limits=Limits(wall_seconds=0.5))
    assert (result.reason, result.exit_code) == ("time", None)
    limits = Limits(wall_seconds=10, output_bytes=1000)
    result = sandbox.run("print('x' * 5000)", limits=limits)
    assert (result.stdout, result.reason) == (b"x" * 1000, "output")
    result = sandbox.run("print('x' * 5_000_000)", limits=limits)  # more than is read at all
    assert (result.stdout, result.reason) == (b"", "output")


def test_calls(sandbox, server):
    source = """
import os, time
state = []
class Solution:
    def f(self, x):
        if x == 1: time.sleep(60)
        if x == 2: os._exit(0)
        if x == 3: raise ValueError("three")
        print("passed")
        return {x: (1, [2**70])}
"""
    limits = Limits(wall_seconds=0.5)
    answers = list(sandbox.call(source, "f", [[0], [1], [2], [3], [4]], limits, 20))
    big = {"int": format(2**70, "x")}
    assert answers[0] == {"value": {"dict": [[0, {"tuple": [1, [big]]}]]}}
    assert answers[1] == {"error": ["Error", "time limit"]}
    assert answers[2]["error"][0] == "Error"
    assert answers[3] == {"error": ["ValueError", "three"]}
    assert answers[4] == {"value": {"dict": [[4, {"tuple": [1, [big]]}]]}}
    assert len(server.requests) == 1
    assert list(sandbox.call("1 / 0", "f", [[1], [2]], LIMITS, 20)) == [{"error": ["ZeroDivisionError", "division by zero"]}] * 2  # fmt: skip
    answers = list(sandbox.call("import time\ndef f(): time.sleep(9)", "f", [[]] * 5, limits, 1))
    assert answers == [{"error": ["Error", "time limit"]}] * 5


def test_tests_as_code(sandbox):
    source = "class P:\n    def __init__(self): self.x = 1\ndef f(x): return x * 2\ndef g(v): v.append(1)"
    asserts = [
        "assert f(2) == 4",
        "assert f(2) == 5",
        "v = []; g(v); assert v == [1]",
        "p = P(); p.x = 2; assert p.x == k",
    ]
    tests = {"setup": "k = 2", "asserts": asserts, "entry_point": "f"}
    verdicts = list(sandbox.examine(source, tests, LIMITS, 20))
    assert [verdict["passed"] for verdict in verdicts] == [True, False, True, True], verdicts


def test_an_assert_that_hangs_ends_the_tests_whatever_they_catch(sandbox):
    source = "import time\ndef f(x):\n    time.sleep(60 if x else 0)\n    return x"
    for swallow in (
        "try:\n    f(1)\nexcept Exception:\n    pass",
        "try:\n    f(1)\nexcept BaseException:\n    pass",
        "f(1)",
    ):
        tests = {"setup": "", "asserts": ["assert f(0) == 0", swallow, "assert f(0) == 0"], "entry_point": "f"}
        verdicts = list(sandbox.examine(source, tests, Limits(wall_seconds=0.5), 20))
        assert [verdict["passed"] for verdict in verdicts] == [True, False]


SEARCH = """
import glob, os, re
def search():
    found = set()
    for path in [*glob.glob("/proc/*/cmdline"), *glob.glob("/proc/*/environ"), *glob.glob("/proc/*/fd/*"), *glob.glob("*"),
                 *glob.glob("/proc/*/cwd/*")]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            found.update(re.findall(b"XQ[0-9a-f]{32}", os.read(fd, 1 << 20)))
            os.close(fd)
        except OSError:
            pass
    for maps in glob.glob("/proc/*/maps"):
        try:
            with open(maps) as lines, open(maps[:-4] + "mem", "rb") as memory:
                for line in lines:
                    start, end = (int(x, 16) for x in line.split()[0].split("-"))
                    if end - start < 1 << 26:
                        try:
                            memory.seek(start)
                            found.update(re.findall(b"XQ[0-9a-f]{32}", memory.read(end - start)))
                        except (OSError, OverflowError, ValueError):
                            pass
        except OSError:
            pass
    return sorted(text.decode() for text in found)
"""


def test_secrets_are_only_in_the_input(sandbox, server):
    secret = f"XQ{secrets.token_hex(16)}"
    tests = {
        "setup": f"expected = {secret!r}",
        "asserts": ["assert f(1) == expected", "assert f(1) == 0"],
        "entry_point": "f",
    }
    source = SEARCH + "def f(x):\n    found = search()\n    return found[0] if found else 0"
    verdicts = list(sandbox.examine(source, tests, Limits(wall_seconds=30), 60))
    for command, code in server.commands:
        assert secret not in code + "".join(command)
    if USER is None:
        pytest.skip("the server runs programs as the user of the tests, whose processes they can read")
    assert [verdict["passed"] for verdict in verdicts] == [False, True]


def test_verdicts_are_not_forged(sandbox):
    for forgery in (
        'import os, json\nfor fd in range(64):\n    try: os.write(fd, b\'["", [{"passed": true}]]\\n\')\n    except OSError: pass',
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal\nos.kill(0, signal.SIGKILL)",
        "import os\nos._exit(0)",
        "def f(x):\n    class E:\n        __eq__ = lambda s, o: True\n    return E()",
        "import os\ndef f(x):\n    os.write(3, b'[' * 100_000 + b'\\n')",
    ):
        tests = {"setup": "", "asserts": ["assert f(1) == 77"], "entry_point": "f"}
        verdicts = list(sandbox.examine("def f(x): return 1\n" + forgery, tests, Limits(wall_seconds=1), 5))
        assert not any(verdict["passed"] for verdict in verdicts)
        answers = list(sandbox.call("def f(x): return 1\n" + forgery, "f", [[1], [2]], Limits(wall_seconds=1), 5))
        assert [list(answer) in (["value"], ["error"]) for answer in answers] == [True, True]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_with_growing_pauses(sandbox, server, status):
    server.replies += [(status, b"busy")] * 3
    assert sandbox.run("print(1)", limits=LIMITS).stdout == b"1\n"
    assert server.pauses == [0.5, 1, 2]


def test_a_server_that_stays_busy(sandbox, server):
    server.replies += [(503, b"busy")] * 5
    with pytest.raises(SandboxUnavailable, match=f"{server.url} does not answer .*503"):
        sandbox.run("print(1)")
    assert len(server.requests) == 5


def test_a_refusal_is_final(sandbox, server):
    server.replies.append((404, b"{}"))
    with pytest.raises(SandboxUnavailable, match="404"):
        sandbox.run("print(1)")
    assert server.pauses == []


def test_no_server(server):
    with Server() as gone:
        url = gone.url
    with pytest.raises(SandboxUnavailable, match=f"{url} does not answer.*Start Sandbox Fusion"):
        open_sandbox(url)
    assert server.pauses == [0.5, 1, 2, 4]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage",
        b"<html>",
        b"[]",
        b"3",
        b"null",
        b"[" * 100_000,
        b"{}",
        b'{"status": "SandboxError", "message": "no room"}',
        b'{"status": "Success", "run_result": 3}',
        b'{"status": "Success", "run_result": null}',
    ],
    ids=lambda answer: answer[:60].decode(),
)
def test_garbage_is_no_verdict(sandbox, server, answer):
    server.replies += [(200, answer)] * 5
    with pytest.raises(SandboxUnavailable, match=server.url):
        sandbox.run("print(1)", limits=LIMITS)


@pytest.mark.parametrize(
    "result",
    [
        "{}",
        '{"stdout": 3, "stderr": [], "return_code": "0"}',
        '{"stdout": null, "return_code": null, "status": "Error"}',
    ],
)
def test_a_result_of_another_shape_is_no_success(sandbox, server, result):
    server.replies.append((200, b'{"status": "Success", "run_result": ' + result.encode() + b"}"))
    ended = sandbox.run("print(1)", limits=LIMITS)
    assert (ended.stdout, ended.exit_code, ended.ended_well) == (b"", None, False)


def test_a_connection_that_breaks_is_tried_again(sandbox, server):
    server.replies += [(200, BREAK), (200, b"x")]
    assert sandbox.run("print(1)", limits=LIMITS).stdout == b"1\n"
    assert server.pauses == [0.5, 1]
