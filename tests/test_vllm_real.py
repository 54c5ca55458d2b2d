"""A real vLLM on the CPU under PRIME: `make test-vllm` sets up the environment that it needs, and runs this file.

What it shows: which weights the engine has after each sync, that it samples from them, resuming, two processes, the commands. What
it cannot show: CUDA, sleep mode, NCCL. Each case is a process of its own, because vLLM leaves process groups and settings of threads
behind.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from helpers import HERE

from trl_prime.reports.run_files import RESULTS_NAME

pytest.importorskip(
    "vllm_cpu_reload", reason="vLLM for CPU and its plugin of tests/vllm_cpu are not installed: make test-vllm"
)

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in the process of the trainer
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM would tie the threads of the process to cores
    "VLLM_CPU_CI_ENV": "1",  # without inductor, whose compilation takes longer than a case
    "VLLM_NO_USAGE_STATS": "1",
}
ROUNDING = 1e-5
RATIOS = "sampling/importance_sampling_ratio"


@dataclass
class Server:
    """A server of vLLM: its address, its process, and the file that it writes to."""

    url: str
    process: subprocess.Popen
    log: Path


def run(*command, exit_code=0, server=None, **environment):
    """Run Python and return what it wrote to stderr; it is ended where it takes long, or where its server has ended."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, **SETTINGS, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(400):
            with contextlib.suppress(subprocess.TimeoutExpired):
                stdout, stderr = process.communicate(timeout=1)
                break
            assert server is None or server.process.poll() is None, server.log.read_text()[-6000:]
        else:
            pytest.fail("it took more than 400 seconds")
    finally:
        process.kill()
    assert process.returncode == exit_code, (stdout + stderr)[-6000:]
    return stderr


@pytest.fixture(scope="module")
def vllm_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    run("-c", f"from vllm_run import save_model; save_model({str(folder)!r})")
    return str(folder)


@pytest.fixture
def train(tmp_path, vllm_model):
    """Train by `vllm_run.py`; returns what each process saw, and the weights that it ended with."""

    def train(num_processes=1, name="run", server=None, **settings):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        path = folder / "settings.json"
        path.write_text(
            json.dumps({"model": vllm_model, "output_dir": str(folder), "vllm_mode": "colocate", **settings})
        )
        launcher = []
        if num_processes > 1:
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", num_processes, "--master_port", free_port()]
        run(*launcher, HERE / "vllm_run.py", path, server=server)
        ranks = range(num_processes)
        reports = [json.loads((folder / f"report_{rank}.json").read_text()) for rank in ranks]
        return reports, [torch.load(folder / f"result_{rank}.pt") for rank in ranks]

    return train


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def equal(first, second):
    return all(torch.equal(first[part][name], second[part][name]) for part in first for name in first[part])


def assert_samples_from_the_policy(report, num_steps=3, num_completions=8):
    """The engine had the policy's weights at each generation, never the PRM's, and its ratios are 1."""
    assert report["syncs"] == list(range(num_steps))
    assert [seen["step"] for seen in report["generations"]] == list(range(num_steps))
    for seen in report["generations"]:
        assert seen["completions"] == num_completions and seen["logps"] < ROUNDING
        if "policy" in seen:
            assert seen["dtypes"] == ["torch.float32"] and seen["policy"] == 0
            # Policy and PRM are the same model until the first update
            assert (seen["prm"] > 1e-4) == (seen["step"] > 0)
    steps = [entry for entry in report["log"] if "loss" in entry]
    assert len(steps) == num_steps
    for entry in steps:
        for which in ("min", "mean", "max"):
            assert entry[f"{RATIOS}/{which}"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("lora", ["", "policy+prm"], ids=["full", "lora"])
def test_the_engine_samples_from_the_policy_as_it_is(train, lora):
    (report,), (result,) = train(lora=lora)
    assert_samples_from_the_policy(report)
    # All weights, or those with an adapter, have moved away from the reference, which is the start
    moved = {
        part: [name for name in result[part] if not torch.equal(result[part][name], result["reference"][name])]
        for part in ("policy", "prm")
    }
    adapted = [name for name in result["policy"] if not lora or name.endswith("qkv_proj.weight")]
    assert moved["policy"] == moved["prm"] == adapted


def test_a_resumed_run_equals_an_unbroken_one(train, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    (whole,), (expected,) = train(**settings)
    (resumed,), (result,) = train(name="resumed", resume=str(tmp_path / "run" / "checkpoint-2"), **settings)
    assert resumed["syncs"] == [2, 3] and equal(result, expected)
    losses = [[entry["prm/loss"] for entry in run["log"] if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_two_processes_have_an_engine_each(train):
    reports, results = train(num_processes=2, per_device_train_batch_size=4, num_generations=4)
    for report in reports:
        report["log"] = reports[0]["log"]
        assert_samples_from_the_policy(report, num_completions=4)
    assert equal(*results)


# --- A server ---


@pytest.fixture
def server(vllm_model, tmp_path):
    """The server of docs/scaling.md, by its own line, but for the model, its type and length, and a file in the place of NCCL."""
    port, log = free_port(), tmp_path / "server.log"
    page = (HERE.parent / "docs" / "scaling.md").read_text()
    line = re.search(r"^VLLM_SERVER_DEV_MODE=1 vllm serve (?:.*\\\n)*.*", page, re.MULTILINE)[0]
    setting, _, *words = shlex.split(line.replace("\\\n", " "))
    words[1], words[words.index('{"backend": "nccl"}')] = vllm_model, '{"backend": "file"}'
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "64"]
    settings = {**dict([setting.split("=")]), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_command", *words],
            env={**os.environ, **SETTINGS, **settings},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_samples_from_the_policy_as_it_is(train, server):
    (report,), _ = train(server=server, vllm_mode="server", vllm_server_base_url=server.url, vllm_server_timeout=300)
    assert_samples_from_the_policy(report)


# --- Commands ---


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"question": f"{i} plus {i}", "answer": f"so #### {2 * i}"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path, vllm_model, problems):
    def write(**settings):
        path = tmp_path / "recipe.yaml"
        given = {
            "model_name_or_path": vllm_model,
            "dtype": "float32",
            "dataset_name": problems,
            "dataset_format": "gsm8k",
            "reward_funcs": ["vllm_run.reads_text"],
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": 64,
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "max_completion_length": 16,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            **settings,
        }
        path.write_text(yaml.safe_dump(given))
        return path

    return write


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_recipe_trains_and_ends_without_a_word_of_failure(recipe, tmp_path, num_processes):
    launcher = {} if num_processes == 1 else {"num_processes": num_processes, "accelerate_config": "cpu"}
    settings = {"eval_split_size": 4, "per_device_train_batch_size": 8 // num_processes, **launcher}
    stderr = run("-m", "trl_prime.cli", "train", "--config", recipe(**settings))
    for word in ("Traceback", "Error", "Exception ignored", "terminate called"):
        assert word not in stderr, stderr[-6000:]
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    # By itself vLLM computes in bfloat16
    assert [entry[f"{RATIOS}/mean"] for entry in log if "loss" in entry] == pytest.approx([1, 1], abs=0.1)
    assert {"before", "after"} <= json.loads((tmp_path / "run" / RESULTS_NAME).read_text()).keys()


def test_a_run_that_fails_tells_why_and_ends(recipe):
    stderr = run("-m", "trl_prime.cli", "train", "--config", recipe(reward_funcs=["vllm_run.fails"]), exit_code=1)
    assert stderr.count("Traceback") == 1 and "a reward that fails" in stderr


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
def test_greedy_completions_are_those_of_transformers(tmp_path, vllm_model, problems, adapted):
    policy = vllm_model
    if adapted:
        policy = str(tmp_path / "adapter")
        run("-c", f"from vllm_run import save_adapter; save_adapter({vllm_model!r}, {policy!r})")
    rows = {}
    for backend in ("transformers", "vllm"):
        settings = {
            "model_name_or_path": policy,
            "benchmark": "gsm8k",
            "dataset_name": problems,
            "reward_func": "vllm_run.reads_text",
            "num_samples": 0,
            "max_new_tokens": 16,
            "dtype": "float32",
            "output_dir": tmp_path / backend,
        }
        settings |= {"use_vllm": "true", "vllm_max_model_length": 256} if backend == "vllm" else {}
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        assert "Traceback" not in run("-m", "trl_prime.cli", "eval", *flags)
        lines = (tmp_path / backend / "samples.jsonl").read_text().splitlines()
        rows[backend] = [json.loads(line) for line in lines]
    assert len(rows["vllm"]) == 8 and len({row["completion"] for row in rows["vllm"]}) > 1
    assert rows["vllm"] == rows["transformers"]
