"""Two processes train like one with the doubled batch, by DDP, FSDP2 and DeepSpeed, and agree with each other.

Every run tells how it was distributed, and nothing is compared before that is what its kind says.
"""

import importlib.util
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import build_model
from helpers import assert_close, launch, results
from packaging.version import Version

import trl_prime
from trl_prime import ImplicitPRM
from trl_prime.implicit_prm.logps import can_fuse_lm_head
from trl_prime.process_exit import let_threads_finish, let_threads_finish_at_exit

ZERO = {
    f"zero{stage}": {
        "deepspeed": {
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }
    }
    for stage in (2, 3)
}
FSDP2 = yaml.safe_load((Path(trl_prime.__file__).parent / "accelerate_configs" / "fsdp2.yaml").read_text())[
    "fsdp_config"
]
KINDS = {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": FSDP2}, **ZERO}
without_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: `make test-deepspeed`"
)
MARKS = {
    # With torch 2.7 they were sums, with 2.13 they are means; nothing between was tried
    "fsdp2": pytest.mark.skipif(
        Version(torch.__version__) < Version("2.13"), reason="older torch takes no mean of gradients by FSDP2 on a CPU"
    ),
    **dict.fromkeys(ZERO, without_deepspeed),
}
# What the runs of a kind tell of themselves: `trained` is what Trainer holds, policy or PRM
DISTRIBUTION = {
    kind: dict(zip(("type", "backend", "trained", "prm", "reference", "value"), told, strict=True))
    for kind, told in {
        "one": ("NO", "DataParallel", "whole", "whole", "whole", "whole"),
        "ddp": ("MULTI_CPU", "DataParallel", "DDP", "DDP", "whole", "DDP"),
        "fsdp2": ("FSDP", "FullyShard", "DTensor", "DTensor", "DTensor", "DTensor"),
        "zero2": ("DEEPSPEED", "ZeRO", "ZeRO-2", "ZeRO-2", "whole", "refused"),
        "zero3": ("DEEPSPEED", "ZeRO", "ZeRO-3", "ZeRO-3", "ZeRO-3", "refused"),
    }.items()
}
# Completions of one optimizer step on all processes, and settings
CASES = {
    "plain": (8, {}),
    "accumulation": (4, {"gradient_accumulation_steps": 4}),
    "rows left out": (
        4,
        {"gradient_accumulation_steps": 4, "loss_type": "grpo", "accuracy_low": 0.3, "accuracy_high": 0.7},
    ),
    "a row a micro-batch": (8, {"prm_micro_batch_size": 1, "prm_num_epochs": 2}),
    "split groups": (
        8,
        {"num_generations": 8, "prm_update": "before", "prm_loss_type": "dpo", "prm_replay_batches": 1},
    ),
    "turns": (
        8,
        {
            "num_generations": 8,
            "process_reward_granularity": "turn",
            "process_reward_norm": "group_std",
            "process_gamma": 0.0,
            "prm_trust_weighting": False,
        },
    ),
    "shares of turns": (
        8,
        {
            "num_generations": 8,
            "process_reward_granularity": "turn",
            "process_reward_norm": "softmax",
            "prm_trust_weighting": False,
        },
    ),
    # By this seed two rounds of generation fill the first batch, and not the second
    "filter": (
        8,
        {"accuracy_low": 0.3, "accuracy_high": 0.7, "oversample_factor": 2, "filter_max_rounds": 2, "seed": 5},
    ),
    "policy as reference": (8, {"prm_reference": "policy"}),
    "adapters": (8, {"lora": "policy prm"}),
    # The layer below is the trunk that PRM and reference share, unless they are sharded
    "adapter of the last layer": (
        8,
        {
            "lora": "prm last layer",
            "prm_loss_type": "calibrated_ce",
            "prm_guess_rate": 0.1,
            "prm_replay_batches": 2,
            "prm_replay_steps": 1,
        },
    ),
    "from a folder": (8, {"model": "a folder"}),
    "calibrated": (
        8,
        {
            "prm_loss_type": "calibrated_ce",
            "prm_reference_weight": "fitted",
            "prm_update": "before",
            "prm_replay_batches": 1,
            "lora": "policy prm",
        },
    ),
    "values": (
        4,
        {
            "advantage_estimator": "gae",
            "gae_lambda": 0.8,
            "value_learning_rate": 1e-2,
            "value_num_epochs": 2,
            "prm_micro_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "accuracy_low": 0.3,
            "accuracy_high": 0.7,
        },
    ),
    "values by an adapter": (8, {"advantage_estimator": "gae", "value_learning_rate": 1e-2, "lora": "policy prm"}),
}
if Version(transformers.__version__) >= Version("5.13"):  # see `test_images.py`
    # Some of the rows that pass the filter change their process, with their images
    CASES["images"] = (
        8,
        {
            "model": "images",
            "lora": "policy prm",
            "accuracy_low": 0.3,
            "accuracy_high": 0.7,
            "oversample_factor": 2,
            "filter_max_rounds": 2,
            "prm_replay_batches": 1,
            "prm_micro_batch_size": 3,
        },
    )
if can_fuse_lm_head(build_model()):  # with TRL from 1.15
    CASES["fused head"] = (8, {"prm_fused_lm_head": True, "lora": "prm", "gradient_accumulation_steps": 2})
OFFLINE = {
    "offline ce": {"eval": True},
    "offline dpo": {"loss_type": "dpo"},
    "offline lora": {"lora": True},
}


def log(folder):
    """The entries of the log, without what depends on time."""
    entries = [entry for entry in json.loads((folder / "result.json").read_text()) if "prm/loss" in entry]
    return [{key: value for key, value in entry.items() if not key.endswith("time")} for entry in entries]


def cases(root, num_processes, model_path, **settings):
    runs = []
    for name, (num_rows, case) in CASES.items():
        if name == "images" and settings == KINDS["zero3"]:
            continue  # transformers cannot make such a model out of a configuration there
        if (name == "policy as reference" and settings == KINDS["zero3"]) or (
            "advantage_estimator" in case and "deepspeed" in settings
        ):
            continue  # which is refused
        size = {"per_device_train_batch_size": num_rows // num_processes}
        runs.append({"output_dir": str(root / name), **size, **case, **settings})
        if case.get("model") == "a folder":
            runs[-1]["model"] = model_path
    size = {"offline": True, "per_device_train_batch_size": 8 // num_processes}
    return runs + [{"output_dir": str(root / name), **size, **case, **settings} for name, case in OFFLINE.items()]


def assert_distributed(root, runs, kind, num_processes):
    """Each of the runs was distributed as its kind says, on every process."""
    for run in runs:
        for rank in range(num_processes):
            told = json.loads((Path(run["output_dir"]) / f"distribution_{rank}.json").read_text())
            expected = {part: DISTRIBUTION[kind][part] for part in told}
            assert told == expected, f"{run['output_dir']} is not a run by {kind}"
            assert {*DISTRIBUTION[kind]} - {*told} <= {"reference", "value"}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, model_path):
    root = tmp_path_factory.mktemp("one")
    runs = cases(root, 1, model_path)
    launch(1, runs, root)
    assert_distributed(root, runs, "one", 1)
    return root


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=MARKS.get(kind, ())) for kind in KINDS])
def two_processes(request, tmp_path_factory, model_path):
    root = tmp_path_factory.mktemp(request.param)
    kind = KINDS[request.param]
    small = {"per_device_train_batch_size": 4, **kind}
    stopped = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "sample": True, "prm_replay_batches": 1}
    stopped["bf16"] = True
    if "deepspeed" not in kind:
        stopped |= {"advantage_estimator": "gae", "gae_lambda": 0.8, "value_learning_rate": 1e-2}
    runs = [
        *cases(root, 2, model_path, **kind),
        {"output_dir": str(root / "none on one"), "none_on_rank": 1, **small},
        {"output_dir": str(root / "whole"), **stopped, **small},
        {"output_dir": str(root / "resumed"), "resume": str(root / "whole" / "checkpoint-2"), **stopped, **small},
    ]
    launch(2, runs, root)
    assert_distributed(root, runs, request.param, 2)
    return root


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one_with_the_doubled_batch(one_process, two_processes, case):
    if not (two_processes / case).exists():
        pytest.skip("not run by this kind, see `cases`")
    (alone,), (first, second) = results(one_process / case, 1), results(two_processes / case, 2)
    assert_close(first, second, atol=0)
    assert_close(first, alone, atol=5e-5)
    start = dict(build_model(7, scale=4.0).named_parameters())
    moved = [(tensor - start.get(name, 0)).abs().max() for name, tensor in alone["prm"].items() if name in start]
    moved += [tensor.abs().max() for name, tensor in alone["prm"].items() if "lora_B" in name]
    assert max(moved) > 1e-3  # far above the tolerance between the processes: something was trained
    for metric in ("prm/loss", "prm/pairwise_accuracy", "prm/process_reward", "prm/grad_norm", "filter/pass_rate"):
        ours, theirs = ([entry[metric] for entry in log(root / case)] for root in (two_processes, one_process))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5, nan_ok=True)
    if "value" in alone:
        for metric in ("value/loss", "value/grad_norm", "value/explained_variance"):
            ours, theirs = ([entry[metric] for entry in log(root / case)] for root in (two_processes, one_process))
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5) and min(map(abs, ours[1:])) > 0
        heads = [tensor for name, tensor in alone["value"].items() if "lm_head" in name]
        assert max(head.abs().max() for head in heads) > 1e-3
    if case == "calibrated":
        ours, theirs = (
            [entry["prm/reference_weight"] for entry in log(root / case)] for root in (two_processes, one_process)
        )
        assert ours == pytest.approx(theirs, rel=1e-4) and max(ours) > 0
    if case == "filter":
        ours, theirs = (
            [entry["filter/rounds"] for entry in log(root / case)] for root in (two_processes, one_process)
        )
        assert ours == theirs == [2, 2]
        assert [entry["filter/trained"] for entry in log(two_processes / case)] == [1, 0.5]


def test_a_trunk_is_shared_unless_it_is_sharded(one_process, two_processes):
    case = "adapter of the last layer"
    kind = json.loads((two_processes / case / "distribution_0.json").read_text())["type"]
    for root, num_processes, shares in ((one_process, 1, True), (two_processes, 2, kind == "MULTI_CPU")):
        for rank in range(num_processes):
            assert (root / case / f"has_trunk_{rank}").exists() is shares


@pytest.mark.parametrize("case", OFFLINE)
def test_two_processes_train_offline_like_one_with_the_doubled_batch(one_process, two_processes, case):
    (alone,), (first, second) = results(one_process / case, 1), results(two_processes / case, 2)
    assert_close(first, second, atol=0)
    assert_close(first, alone, atol=5e-5)
    ours, theirs = (json.loads((root / case / "result.json").read_text()) for root in (two_processes, one_process))
    # Not the held-out loss: Trainer takes the mean of its means, in which a last batch filled up counts like the others
    for key in ("loss", "accuracy", "pairwise_accuracy", "eval_accuracy", "eval_pairwise_accuracy"):
        values = [[entry[key] for entry in log if key in entry] for log in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
    saved = dict(ImplicitPRM.from_pretrained(two_processes / case).model.named_parameters())
    assert_close({"prm": saved}, {"prm": first["prm"]}, atol=1e-6)


def test_a_process_without_judged_rows_does_not_hold_up_the_other(two_processes):
    first, second = results(two_processes / "none on one", 2)
    assert_close(first, second, atol=0)
    assert all(torch.isfinite(tensor).all() for tensors in first.values() for tensor in tensors.values())
    assert all(entry["filter/judged"] == 0.5 for entry in log(two_processes / "none on one"))


def test_a_resumed_run_ends_as_one_that_was_not_stopped(two_processes):
    for whole, resumed in zip(results(two_processes / "whole", 2), results(two_processes / "resumed", 2), strict=True):
        assert_close(whole, resumed, atol=0)
    assert log(two_processes / "whole")[2:] == log(two_processes / "resumed")[2:]


def test_in_bfloat16_the_prm_starts_equal_to_its_reference(two_processes):
    """What rounds one of the two models rounds the other, whoever holds the weights."""
    assert log(two_processes / "whole")[0]["prm/process_reward"] == 0


def test_the_prm_optimizer_is_saved_once_where_all_processes_hold_the_same(two_processes):
    checkpoint = two_processes / "whole" / "checkpoint-2"
    states = [torch.load(checkpoint / f"prm_state_{rank}.pt", weights_only=True) for rank in range(2)]
    assert [state["num_processes"] for state in states] == [2, 2]
    first, second = (state["updater"]["replay"][0]["completion_ids"] for state in states)
    assert first.tolist() != second.tolist()
    is_ddp = not list(checkpoint.glob("prm_deepspeed")) and not list(checkpoint.glob("*fsdp*"))
    assert [("optimizer" in state["updater"]) for state in states] == [not is_ddp] * 2
    assert (checkpoint / "prm_optimizer.pt").exists() is is_ddp


@pytest.mark.parametrize("case", ["plain", "adapters"])
def test_what_several_processes_save_is_whole(two_processes, case):
    trained = results(two_processes / case, 2)[0]["prm"]
    prm = ImplicitPRM.from_pretrained(two_processes / case / "final")
    assert_close({"prm": dict(prm.model.named_parameters())}, {"prm": trained}, atol=1e-6)


@pytest.mark.parametrize("has_group", [False, True])
def test_at_exit_a_thread_that_waits_for_the_interpreter_gets_it(monkeypatch, has_group):
    """As a worker of gloo, which has to release the tensors of the last collective before the interpreter ends."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: has_group)
    begin, done = threading.Lock(), []
    begin.acquire()
    thread = threading.Thread(target=lambda: (begin.acquire(), done.append(True)))
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # the lock changes hands only where it is given up
    try:
        begin.release()
        let_threads_finish()
        assert bool(done) is has_group
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_the_trainer_has_threads_finish_at_exit_once(make_trainer, monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr("atexit.unregister", lambda function: function in registered and registered.remove(function))
    make_trainer()
    assert registered.count(let_threads_finish) == 1
    let_threads_finish_at_exit()
    assert registered.count(let_threads_finish) == 1
