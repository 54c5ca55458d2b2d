"""The life of the sandbox: killed, forked, closed and opened again; and machines where there is none."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from trl_prime import sandbox as package
from trl_prime.sandbox import Limits, LocalSandbox, SandboxUnavailable, boxes, open_sandbox, scratch
from trl_prime.sandbox.inside.scratch import remove_tree

from .helpers import BOXES, FOLDER, LIMITS, descendants, eventually, processes, with_marker, within, zygote_of


def test_the_zygote_killed_between_programs(box):
    with contextlib.closing(LocalSandbox(box)) as sandbox:
        for _ in range(3):
            os.kill(zygote_of(sandbox), signal.SIGKILL)
            assert sandbox.run("print(1)", limits=LIMITS).stdout == b"1\n"


@pytest.mark.parametrize("victim", ["zygote", "supervisors"])
@pytest.mark.parametrize("kind", ["run", "call", "examine"])
def test_the_sandbox_killed_under_a_program(box, kind, victim):
    if victim == "supervisors" and box != "landlock":
        pytest.skip("the zygote is the supervisor")
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
def test_nothing_is_left_of_a_trainer_that_ends(box, number, tmp_path, monkeypatch):
    marker = f"trl-prime-{secrets.token_hex(8)}"
    command = [sys.executable, "-c", TRAINER, str(FOLDER.parent), box, marker]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    tmp_path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as trainer:
        eventually(lambda: len([pid for pid in with_marker(marker) if pid != trainer.pid]) == 2)
        family = descendants(trainer.pid)
        assert len(family) >= 4  # the box or two supervisors, the zygote, two programs
        scratch.sweep()
        (folder,) = tmp_path.iterdir()  # a living process owns it
        trainer.send_signal(number)
        trainer.wait(30)
        eventually(lambda: not family & processes().keys())
    assert folder.exists() == (number != signal.SIGINT)
    scratch.sweep()
    assert not folder.exists()


def test_a_scratch_folder_is_swept_when_its_last_owner_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    owned = scratch.ScratchFolder()
    others = tmp_path / "trl-prime-sandbox-link"
    others.symlink_to(tmp_path)
    pid = os.fork()
    if pid == 0:
        signal.pause()
    try:
        owned.release()  # this process goes, but one that was forked from it stays
        scratch.sweep()
        assert os.path.isdir(owned.path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    again = scratch.ScratchFolder()
    assert not os.path.exists(owned.path)
    assert os.path.isdir(again.path)
    again.remove()
    assert list(tmp_path.iterdir()) == [others]


def test_what_a_program_leaves_on_disk_is_removed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink(outside, folder / "link")
    os.mkfifo(folder / "fifo")
    for name in (".0", ".1"):
        (folder / name / "a" / "b").mkdir(parents=True)
    home = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(1100):
            os.mkdir("d")
            os.symlink(outside, "link to it")
            os.chdir("d")
    finally:
        os.chdir(home)
    try:
        remove_tree(str(folder))
        assert not folder.exists()
    finally:
        subprocess.run(["rm", "-rf", folder])  # too deep for pytest
    assert [path.read_text() for path in outside.iterdir()] == ["kept"]
    remove_tree(str(folder))  # it is gone, which is what was asked for


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


def test_a_closed_sandbox_leaves_nothing_and_opens_again(box, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    sandbox = LocalSandbox(box)
    assert len(list(tmp_path.iterdir())) == 1
    family = descendants(sandbox._process.pid) | {sandbox._process.pid}
    sandbox.close()
    sandbox.close()
    eventually(lambda: not family & processes().keys())
    assert list(tmp_path.iterdir()) == []
    assert sandbox.run("print(1)").stdout == b"1\n"
    sandbox.close()


@pytest.mark.parametrize("kind", ["run", "call", "examine", "the solution of examine"])
def test_a_program_whose_walls_cannot_be_put_up_gets_no_verdict(tmp_path, monkeypatch, kind):
    """Tests are the first process of their box, and their solution is the second."""
    inside = tmp_path / "inside"
    shutil.copytree(boxes._INSIDE, inside)
    who = "os.getpid() != 1" if kind == "the solution of examine" else "True"
    with open(inside / "isolation.py", "a") as file:
        file.write(
            "\n\n_make = private_filesystem\ndef private_filesystem(scratch_bytes):\n"
            f"    if {who} and os.path.exists(os.path.dirname(os.path.abspath(__file__)) + '/fail'):\n"
            "        raise OSError('no room')\n    _make(scratch_bytes)\n"
        )
    monkeypatch.setattr(boxes, "_INSIDE", inside)
    source = "def f(x): return 1"
    tests = {"setup": "", "asserts": ["assert f(1) == 1"] * 3, "entry_point": "f"}
    with contextlib.closing(LocalSandbox("namespaces")) as sandbox:
        actions = {
            "run": lambda: [sandbox.run(source, limits=LIMITS)],
            "call": lambda: list(sandbox.call(source, "f", [[1]], LIMITS, 60)),
            "examine": lambda: list(sandbox.examine(source, tests, LIMITS, 60)),
        }
        action = actions[kind.split()[-1]]
        (inside / "fail").touch()
        with pytest.raises(SandboxUnavailable, match="no room"):
            action()
        (inside / "fail").unlink()
        assert action()


# --- Where there is no sandbox ---


@pytest.fixture
def no_boxes(monkeypatch):
    monkeypatch.setattr(package, "_open", {})
    monkeypatch.setattr(package, "find_bubblewrap", lambda: None)
    refused = [sys.executable, "-c", "import sys; sys.exit('unshare: Operation not permitted')"]
    monkeypatch.setitem(boxes.BOXES, "namespaces", lambda *_: refused)
    monkeypatch.setattr(boxes.isolation, "landlock_version", lambda: 0)
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
    assert ("unshare: Operation not permitted" in sentence) == (kind in ("auto", "namespaces"))
    assert ("bubblewrap is not installed" in sentence) == (kind in ("auto", "bubblewrap"))
    assert ("the kernel has no Landlock" in sentence) == (kind in ("auto", "landlock"))


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
        tests = {"setup": "", "asserts": ["assert f(1) == 2", "assert f(1) == 3"], "entry_point": "f"}
        assert [v["passed"] for v in sandbox.examine("def f(x): return x + 1", tests, LIMITS, 60)] == [True, False]
        result = within(
            15, lambda: sandbox.run("import os, time\nos.fork()\ntime.sleep(60)", limits=Limits(wall_seconds=1))
        )
        assert result.reason == "time"
