"""The pool: nothing hangs, no verdict is lost or mixed up, and no process is left behind."""

import copy
import importlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from trl_prime.rewards import worker_pool
from trl_prime.rewards.worker_pool import JobResult, WorkerPool

FUNCTIONS = """
import os, signal, sys, time

def act(kind, value=None):
    if kind == "echo":
        return value
    if kind == "hang":
        time.sleep(1000)
    if kind == "hang in C":
        return 3 ** (10 ** 10) % 7
    if kind == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGALRM})
        while True: pass
    if kind == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind in ("die once", "hang once") and not os.path.exists(value):
        open(value, "w").close()
        act(kind.removesuffix(" once"))
    if kind == "exit":
        os._exit(0)
    if kind == "hog":
        return len(bytearray(10 ** 12))
    if kind == "raise":
        raise ValueError(value)
    if kind == "recurse":
        return act("recurse")
    if kind == "no JSON":
        return {1, 2}
    if kind == "talk":
        print(value, flush=True); print(value, file=sys.stderr, flush=True)
        os.write(1, value.encode()); os.system("echo " + value)
        return sys.stdin.read()
    if kind == "large":
        return "x" * value
    if kind == "pid":
        return os.getpid()
    if kind == "modules":
        return sorted(sys.modules)
    if kind == "handlers":
        return [signal.getsignal(signal.SIGINT) == signal.SIG_IGN, os.getsid(0) == os.getpid()]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "pool_functions.py").write_text(FUNCTIONS)
    return str(folder)


@pytest.fixture(scope="module")
def act(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("pool_functions").act


@pytest.fixture
def pool(act):
    with WorkerPool(act, num_workers=2, timeout=1.0) as pool:
        yield pool
        pids = pool.worker_pids
    assert_gone(pids)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            # Where nobody reaps orphans, a dead one stays a zombie
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def assert_gone(pids, seconds=20.0):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if is_alive(pid)]} still run"
        time.sleep(0.02)


def echoes(*values):
    return [JobResult(value) for value in values]


def test_results_are_in_the_order_of_the_jobs(pool):
    values = [None, True, 1.5, "é\ud800", [1, {"a": None}], *range(200)]
    assert pool.map([("echo", value) for value in values]) == echoes(*values)
    assert pool.map([]) == []


def test_jobs_with_one_key_share_a_worker(pool):
    keys = [number % 10 for number in range(100)]
    pids = [result.value for result in pool.map([("pid",)] * 100, keys)]
    assert all(len({pid for pid, other in zip(pids, keys, strict=True) if other == key}) == 1 for key in range(10))
    # Also when one of them takes the worker down
    jobs = [("echo", 1), ("die",), ("echo", 2), ("echo", 3)]
    assert pool.map(jobs, ["a", "a", "a", "b"]) == [JobResult(1), JobResult(failure="crash"), *echoes(2, 3)]
    with pytest.raises(ValueError, match="zip"):
        pool.map(jobs, ["a"])


def test_workers_start_with_the_first_call_and_stay(pool):
    assert pool.worker_pids == []
    pool.map([("pid",)])
    assert len(pool.worker_pids) == 1  # no more than there are jobs
    pids = {result.value for _ in range(3) for result in pool.map([("pid",)] * 20)}
    assert pids <= set(pool.worker_pids) and len(pids) <= 2
    assert os.getpid() not in pids


@pytest.mark.parametrize("kind", ["hang", "hang in C", "deaf"])
def test_a_call_that_hangs_is_killed_and_the_others_are_not_disturbed(pool, kind):
    pool.map([("echo", 0)] * 2)
    start = time.monotonic()
    results = pool.map([("echo", 1), (kind,), ("echo", 2), ("echo", 3)])
    assert results == [JobResult(1), JobResult(failure="timeout"), JobResult(2), JobResult(3)]
    assert 1.0 <= time.monotonic() - start < 10.0
    assert pool.map([("echo", 4), ("echo", 5)]) == echoes(4, 5)


@pytest.mark.parametrize("kind", ["die", "exit"])
def test_a_crash_costs_its_own_job_only(pool, kind):
    results = pool.map([("echo", 1), (kind,), ("echo", 2), (kind,), ("echo", 3)])
    assert [result.value for result in results] == [1, None, 2, None, 3]
    assert [result.failure for result in results] == [None, "crash", None, "crash", None]


@pytest.mark.parametrize("kind", ["die once", "hang once"])
def test_a_job_is_given_to_a_second_worker(pool, tmp_path, kind):
    jobs = [("echo", 1), (kind, str(tmp_path / "mark")), ("echo", 2)]
    assert pool.map(jobs) == echoes(1, None, 2)
    assert (tmp_path / "mark").exists()


def kill(pid):
    """Kill a process and wait for its end, without reaping it."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_worker_that_is_killed_while_idle_costs_no_result(pool):
    pids = [result.value for _ in range(3) for result in pool.map([("pid",)] * 2)]
    for _ in range(3):
        for pid in pool.worker_pids:
            kill(pid)
        # Not even the first of the two tries of a job that will lose one itself
        results = pool.map([("echo", 1), ("echo", 2), ("die",)])
        assert results == [*echoes(1, 2), JobResult(failure="crash")]
    assert not set(pool.worker_pids) & set(pids)


def test_a_worker_that_is_killed_while_idle_is_not_a_try_of_the_next_job(act, tmp_path):
    with WorkerPool(act, num_workers=1) as pool:
        pool.map([("pid",)])
        kill(pool.worker_pids[0])
        assert pool.map([("die once", str(tmp_path / "mark"))]) == echoes(None)


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_workers_that_are_killed_while_they_start(act, monkeypatch, deaths):
    started = []
    original = worker_pool._Worker.wait_until_ready

    def killed(worker):
        started.append(worker.process.pid)
        if len(started) <= deaths:
            kill(worker.process.pid)
        original(worker)

    monkeypatch.setattr(worker_pool._Worker, "wait_until_ready", killed)
    with WorkerPool(act, num_workers=1) as pool:
        if deaths < 3:
            assert pool.map([("echo", 1), ("echo", 2)]) == echoes(1, 2)
            assert pool.worker_pids == started[-1:]
        else:
            with pytest.raises(RuntimeError, match="3 times in a row.*lack of memory"):
                pool.map([("echo", 1)])
            assert pool.map([("echo", 2)]) == echoes(2)  # the pool is still of use
    assert_gone(started)


def test_exceptions_come_back_as_text_and_leave_the_worker_alive(pool):
    pid = pool.map([("pid",)])[0].value
    jobs = [("hog",), ("raise", "no"), ("recurse",), ("no JSON",)]
    failures = [pool.map([job])[0].failure for job in jobs]
    assert failures[0] == "MemoryError: "
    assert failures[1] == "ValueError: no"
    assert [failure.split(":")[0] for failure in failures[2:]] == ["RecursionError", "TypeError"]
    assert pool.map([("pid",)])[0].value == pid


def test_what_a_job_prints_reaches_neither_the_parent_nor_the_next_job(pool, capfd):
    assert pool.map([("talk", "noise")] * 4) == echoes("", "", "", "")
    assert capfd.readouterr() == ("", "")


def test_frames_of_megabytes(pool):
    results = pool.map([("large", 5_000_000), ("echo", "y" * 5_000_000)])
    assert results == echoes("x" * 5_000_000, "y" * 5_000_000)


def test_workers_are_new_interpreters_in_sessions_of_their_own(pool):
    loaded = set(pool.map([("modules",)])[0].value)
    assert not loaded & {"torch", "numpy", "transformers", "trl", "trl_prime", "pytest"}
    assert pool.map([("handlers",)])[0].value == [True, True]


def test_a_worker_is_replaced_after_its_share_of_jobs(act):
    with WorkerPool(act, num_workers=1, max_jobs_per_worker=3) as pool:
        pids = [result.value for result in pool.map([("pid",)] * 7)]
        assert [pids.index(pid) for pid in pids] == [0, 0, 0, 3, 3, 3, 6]
        assert_gone(set(pids) - {pids[-1]})


def test_calls_of_several_threads_get_their_own_results(pool):
    outcomes = {}

    def call(name):
        jobs = [("hang",) if i == 3 and name < 2 else ("echo", [name, i]) for i in range(25)]
        outcomes[name] = pool.map(jobs)

    threads = [threading.Thread(target=call, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in range(6):
        expected = echoes(*([name, i] for i in range(25)))
        if name < 2:
            expected[3] = JobResult(failure="timeout")
        assert outcomes[name] == expected
    assert len(pool.worker_pids) <= 2


def test_a_forked_child_has_a_pool_of_its_own(pool):
    before = {result.value for result in pool.map([("pid",)] * 8)}
    pid = os.fork()
    if pid == 0:
        try:
            own = {result.value for result in pool.map([("pid",)] * 8)}
            good = own and not own & before and pool.map([("echo", 7)]) == echoes(7)
            pool.close()
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert {result.value for result in pool.map([("pid",)] * 8)} <= before


def test_close_ends_the_workers_and_a_call_in_another_thread(act):
    pool = WorkerPool(act, num_workers=1, timeout=60)
    errors = []

    def call():
        with pytest.raises(RuntimeError, match="closed") as error:
            pool.map([("hang",), ("echo", 1)])
        errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    deadline = time.monotonic() + 30
    while not pool.worker_pids and time.monotonic() < deadline:
        time.sleep(0.01)
    pids = pool.worker_pids
    pool.close()
    pool.close()
    thread.join(20)
    assert len(errors) == 1 and len(pids) == 1
    assert_gone(pids)
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        pool.map([("echo", 1)])


def test_copies_have_processes_of_their_own(pool):
    pids = {pool.map([("pid",)])[0].value}
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        with other:
            assert other.timeout == 1.0 and other.num_workers == 2
            pids.add(other.map([("pid",)])[0].value)
    assert len(pids) == 3


def test_a_module_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "import sys\nif 'pytest' not in sys.modules: import no_such_module\ndef f(): return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("broken").f
    with WorkerPool(function, num_workers=1) as pool, pytest.raises(RuntimeError, match="no_such_module"):
        pool.map([()])


@pytest.mark.parametrize("place", ["PYTHONPATH", "the current folder", "sys.path"])
def test_a_worker_finds_what_its_parent_finds(tmp_path, place):
    """A package that is not installed, whose modules import each other."""
    package = tmp_path / "uninstalled"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("from .two import double\ndef f(x): return double(x)\n")
    (package / "two.py").write_text("def double(x): return 2 * x\n")
    code = f"""
import pathlib, sys
sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.dirname(worker_pool.__file__)))!r})
sys.path.insert(0, pathlib.Path("no string"))
if {place == "sys.path"}: sys.path.append({str(tmp_path)!r})
from trl_prime.rewards.worker_pool import WorkerPool
from uninstalled.one import f
with WorkerPool(f, num_workers=1) as pool: print(pool.map([(21,)]))
"""
    there, elsewhere = str(tmp_path), str(package)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": there if place == "PYTHONPATH" else ""},
        cwd=there if place == "the current folder" else elsewhere,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "[JobResult(value=42, failure=None)]", result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_workers", 0), ("timeout", 0), ("timeout", float("nan")), ("memory_limit", 1), ("max_jobs_per_worker", 0)],
)
def test_options_out_of_range_are_named(act, option, value):
    with pytest.raises(ValueError, match=option):
        WorkerPool(act, **{option: value})


def test_a_function_that_cannot_be_imported_is_refused(monkeypatch):
    def inner():
        return 1

    for function in (lambda: 1, inner):
        with pytest.raises(ValueError, match="top level"):
            WorkerPool(function)
    monkeypatch.setattr(is_alive, "__module__", "__main__")
    with pytest.raises(ValueError, match="top level"):
        WorkerPool(is_alive)


PARENT = """
    import sys, threading
    sys.path.insert(0, {folder!r})
    from pool_functions import act
    from trl_prime.rewards.worker_pool import WorkerPool
    pool = WorkerPool(act, num_workers=2, timeout={timeout})
    pool.map([("echo", 1)] * 8)
    job = ({kind!r},)
    if job[0] == "idle":
        print(*pool.worker_pids, flush=True)
        sys.stdin.read()
    elif job[0] != "exit now":
        threading.Timer(0.3, lambda: print(*pool.worker_pids, flush=True)).start()
        pool.map([job] * 2)
        print("came back", flush=True)
    else:
        print(*pool.worker_pids, flush=True)
"""


@pytest.mark.parametrize(
    ("kind", "ending", "timeout"),
    [
        ("idle", signal.SIGKILL, 60),
        ("idle", signal.SIGINT, 60),
        ("idle", signal.SIGTERM, 60),
        ("hang", signal.SIGINT, 60),
        # The parent is gone: only the kernel's alarm, 1.5 timeouts and a second after the job began, ends these
        ("hang in C", signal.SIGKILL, 2),
        ("deaf", signal.SIGKILL, 2),
        ("exit now", None, 60),
    ],
)
def test_nothing_outlives_the_parent(folder, kind, ending, timeout):
    code = textwrap.dedent(PARENT).format(folder=folder, kind=kind, timeout=timeout)
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        if ending is not None:
            assert all(map(is_alive, pids))
            # To the group, as a terminal does
            os.killpg(parent.pid, ending)
        start = time.monotonic()
        output, errors = parent.communicate(timeout=20)
        assert time.monotonic() - start < 10
    finally:
        parent.kill()
    assert output == ""
    if ending == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1 and errors.count("Traceback") == 1, errors
    else:
        assert errors == ""
    assert_gone(pids, seconds=15)
