"""Each fault ends in an error that says what broke, or in a fallback that is counted; never in a checkpoint that is broken."""

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
from conftest import build_model, distance, logged, row_rewards, same, weights
from helpers import fixed_rollouts, metrics, rollouts_of
from transformers import AutoModelForCausalLM, TrainerState

from trl_prime import ImplicitPRM
from trl_prime.checks import _IDLE_BATCHES

HERE = Path(__file__).parent
NAN = float("nan")
MIXED = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1}


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def assert_finite(model):
    assert all(tensor.isfinite().all() for tensor in weights(model).values())


# --- Reward functions ---


HANGING_RUN = """
    import sys, threading
    import psutil
    from conftest import build_model, build_tokenizer
    from datasets import Dataset
    from trl_prime import PRIMEConfig, PRIMETrainer
    from trl_prime.rewards import math_reward

    def hang(completions, **kwargs):
        assert math_reward(["It is \\\\boxed{2x+2}."], solution=["2(x+1)"]) == [1.0]
        children = [child.pid for child in psutil.Process().children(recursive=True)]
        print("hanging", *children, flush=True)
        threading.Event().wait()

    if __name__ == "__main__":
        trainer = PRIMETrainer(
            model=build_model(),
            reward_funcs=hang,
            args=PRIMEConfig(
                sys.argv[1], use_cpu=True, bf16=False, per_device_train_batch_size=8, max_completion_length=4, report_to=[],
                dataloader_num_workers=1, max_steps=1,
            ),
            train_dataset=Dataset.from_list([{"prompt": "1="}] * 800),
            processing_class=build_tokenizer(),
        )
        trainer.train()
"""


def test_ctrl_c_ends_a_run_whose_reward_function_hangs_and_leaves_no_process(tmp_path):
    """How long a reward may take only its function knows, so that there is no limit by default; its verifiers have one."""
    script = tmp_path / "hanging_run.py"
    script.write_text(textwrap.dedent(HANGING_RUN))
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = next((line for line in process.stdout if line.startswith("hanging")), None)
        assert line, process.stderr.read()[-3000:]
        children = [int(pid) for pid in line.split()[1:]]
        assert len(children) >= 2  # a verifier and a loader of data
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0 and "KeyboardInterrupt" in errors and "in hang" in errors
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], timeout=20)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


# --- Numbers that are not finite ---


def break_logits(trainer, model, step, value=NAN):
    """Let a model give NaN from a step on."""
    # Not of the head, which TRL's policy forward goes past
    model.model.norm.register_forward_hook(
        lambda module, args, states: states * value if trainer.state.global_step >= step else None
    )


def train_until_it_breaks(trainer, error, match):
    """Train; the weights are those of the last checkpoint, which is the one before the fault, and finite."""
    with pytest.raises(error, match=match):
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert checkpoints(folder) == ["checkpoint-1"] and trainer.state.global_step == 1
    assert_finite(trainer.implicit_prm.model)
    saved = weights(AutoModelForCausalLM.from_pretrained(folder / "checkpoint-1"))
    assert same(weights(trainer.model), saved) and not same(saved, weights(build_model()))
    return folder / "checkpoint-1"


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 2, "per_device_train_batch_size": 4}], ids=str)
def test_nan_logits_of_the_policy_never_reach_its_weights(make_trainer, settings):
    trainer = make_trainer(
        rollout_func=fixed_rollouts(), reward_funcs=row_rewards(MIXED), max_steps=3, **CHECKPOINTS, **settings
    )
    break_logits(trainer, trainer.model, 1)
    train_until_it_breaks(trainer, FloatingPointError, r"The policy's loss is not finite at step 1.*last checkpoint")


def test_nan_logits_of_a_policy_that_generates_end_the_run(make_trainer):
    trainer = make_trainer(reward_funcs=row_rewards(MIXED), max_steps=3, **CHECKPOINTS)
    break_logits(trainer, trainer.model, 1)
    train_until_it_breaks(trainer, RuntimeError, "nan")


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("part", ["model", "reference"])
def test_logits_of_the_prm_that_are_not_finite_never_reach_any_weights(make_trainer, part, value):
    trainer = make_trainer(reward_funcs=row_rewards(MIXED), max_steps=3, **CHECKPOINTS)
    break_logits(trainer, getattr(trainer.implicit_prm, part), 1, value)
    checkpoint = train_until_it_breaks(trainer, FloatingPointError, r"The implicit PRM gave (nan|-?inf).*at step 1")
    prm = ImplicitPRM.from_pretrained(checkpoint)
    assert same(weights(trainer.implicit_prm.model), weights(prm.model))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_gradient_of_the_policy_that_is_not_finite_never_reaches_its_weights(make_trainer, value, max_grad_norm):
    trainer = make_trainer(reward_funcs=row_rewards(MIXED), max_steps=3, max_grad_norm=max_grad_norm, **CHECKPOINTS)
    last = [*trainer.model.parameters()][-1]
    last.register_hook(lambda grad: grad * value if trainer.state.global_step >= 1 else None)
    train_until_it_breaks(trainer, FloatingPointError, r"The gradient of the policy is (nan|inf) at step 1")


def test_a_gradient_of_the_prm_that_is_not_finite_is_left_out_and_counted(make_trainer):
    trainer = make_trainer(reward_funcs=row_rewards(MIXED), max_steps=3, **CHECKPOINTS)
    last = [*trainer.implicit_prm.model.parameters()][-1]
    last.register_hook(lambda grad: grad * float("inf") if trainer.state.global_step == 1 else None)
    trainer.train()
    assert logged(trainer, "prm/skipped_steps") == [0, 1, 1]
    folder = Path(trainer.args.output_dir)
    first, second, third = (weights(ImplicitPRM.from_pretrained(folder / f"checkpoint-{i}").model) for i in (1, 2, 3))
    assert same(first, second) and distance(second, third) > 1e-4
    assert_finite(trainer.model)


# --- Nothing to learn from ---


def test_completions_that_end_at_once_or_have_no_token_of_the_policy_train_to_finite_weights(train):
    completion_ids = [[1], [5, 6, 1], [7, 8], [9, 9, 1], [1], [5, 1], [6, 1], [7, 1]]
    env_mask = [[1], [1, 1, 1], [0, 0], [1, 0, 1], [1], [1, 1], [0, 0], [1, 1]]
    trainer = train(
        rollout_func=rollouts_of(completion_ids, env_mask=env_mask), reward_funcs=row_rewards(MIXED), max_steps=3
    )
    output = trainer.outputs[0]
    assert not output["advantages"][[2, 6]].any() and output["advantages"][0, 0] != 0
    assert output["advantages"].isfinite().all()
    for model in (trainer.model, trainer.implicit_prm.model):
        assert_finite(model)
        assert distance(weights(model), weights(build_model())) > 1e-4


@pytest.mark.parametrize("settings", [{}, {"oversample_factor": 2, "accuracy_high": 0.9}, {"filter_truncated": True}])
def test_when_all_completions_are_cut_off_nothing_moves(train, settings):
    trainer = train(
        rollout_func=fixed_rollouts(lengths=(8,) * 8),
        mask_truncated_completions=True,
        reward_funcs=row_rewards(MIXED),
        max_steps=3,
        weight_decay=0.1,
        **settings,
    )
    assert same(weights(trainer.model), weights(build_model()))
    assert same(weights(trainer.implicit_prm.model), weights(build_model()))
    assert (
        logged(trainer, "filter/skipped_steps") == [1.0] * 3
        and logged(trainer, "completions/clipped_ratio") == [1.0] * 3
    )
    assert all(entry["loss"] == 0 == entry["grad_norm"] for entry in metrics(trainer))


def until_step(step, first, then):
    """A reward function that judges otherwise from a step on."""

    def reward(completions, trainer_state, **kwargs):
        values = first if trainer_state.global_step < step else then
        return [values[i % len(values)] for i in range(len(completions))]

    return reward


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"oversample_factor": 2},
        {"filter_max_rounds": 2},
        {"optim": "sgd", "weight_decay": 0.1},
        {"beta": 0.1, "entropy_coef": 0.1, "max_grad_norm": 0},
    ],
    ids=str,
)
def test_while_no_group_passes_neither_model_follows_its_momentum(train, model_path, tmp_path, caplog, settings):
    logging.getLogger("trl_prime").propagate = True
    _IDLE_BATCHES.clear()  # other runs in this process may have said the same
    settings = {**settings, "model": model_path, "accuracy_low": 0.2, "accuracy_high": 0.8}
    trainer = train(
        reward_funcs=until_step(2, MIXED, (0.0,)), max_steps=7, learning_rate=1e-2, **CHECKPOINTS, **settings
    )
    folder = tmp_path / "run"
    policies = [weights(AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{i}")) for i in (1, 2, 7)]
    prms = [weights(ImplicitPRM.from_pretrained(folder / f"checkpoint-{i}").model) for i in (1, 2, 7)]
    for first, second, last in (policies, prms):
        assert not same(first, second) and same(second, last)
    assert logged(trainer, "filter/skipped_steps") == [0, 0, 1, 1, 1, 1, 1]
    assert [rate == 0 for rate in logged(trainer, "filter/pass_rate")] == [False] * 2 + [True] * 5
    (said,) = [r.getMessage() for r in caplog.records if "groups passed the prompt filter" in r.getMessage()]
    cut_off = trainer.state.log_history[2]["completions/clipped_ratio"]
    # All wrong, all right or cut off: the reader sees which
    assert (
        f"Their mean reward is 0, and {cut_off:.0%} of the completions were cut off at max_completion_length=" in said
    )
    # And goes on when there is something again
    resumed = train(str(folder / "checkpoint-7"), reward_funcs=row_rewards(MIXED), max_steps=8, **settings)
    assert not same(weights(resumed.model), policies[2]) and not same(weights(resumed.implicit_prm.model), prms[2])


def test_a_part_of_a_generation_without_anything_to_learn_is_skipped_alone(train):
    """The rows of a generation batch are shuffled over its steps; only a step without any row that trains is left out."""
    trainer = train(
        reward_funcs=row_rewards((1.0, None, None, None, None, None, None, 0.0, *(None,) * 4, 0.0, 1.0, None, None)),
        steps_per_generation=8,
        per_device_train_batch_size=2,
        max_steps=16,
        **CHECKPOINTS,
    )
    skipped = logged(trainer, "filter/skipped_steps")
    gradients = [entry["grad_norm"] for entry in metrics(trainer)]
    assert [norm == 0 for norm in gradients] == [bool(value) for value in skipped] and 0 < sum(skipped) < 16
    folder = Path(trainer.args.output_dir)
    states = [weights(AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{i}")) for i in range(1, 17)]
    assert [same(*pair) for pair in zip(states, states[1:], strict=False)] == [bool(value) for value in skipped[1:]]


# --- A full disk ---


class FullDisk:
    """From some step on, writing a file whose path matches ends half way with the error of a full disk."""

    def __init__(self, monkeypatch, part, step):
        self.part, self.step, self.trainer, self.hits = part, step, None, 0
        import safetensors.torch
        import transformers.modeling_utils

        for owner, name in (
            (torch, "save"),
            (safetensors.torch, "save_file"),
            (transformers.modeling_utils, "safe_save_file"),
            (TrainerState, "save_to_json"),
        ):
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))

    def guarded(self, write):
        def writer(*args, **kwargs):
            path = next((str(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, (str, os.PathLike))), "")
            result = write(*args, **kwargs)
            if self.trainer.state.global_step >= self.step and path.endswith(self.part):
                self.hits += 1
                os.truncate(path, os.path.getsize(path) // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return result

        return writer


@pytest.mark.parametrize(
    "part",
    [
        "checkpoint-4/prm/model.safetensors",
        "checkpoint-4/model.safetensors",
        "checkpoint-4/optimizer.pt",
        "checkpoint-4/scheduler.pt",
        "checkpoint-4/prm_state_0.pt",
        "checkpoint-4/prm_optimizer.pt",
        "checkpoint-4/rng_state.pth",
        "checkpoint-4/trainer_state.json",
    ],
)
def test_a_full_disk_is_reported_and_the_last_whole_checkpoint_is_resumed_from(
    make_trainer, train, tmp_path, monkeypatch, part
):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, part, 4)
        trainer = disk.trainer = make_trainer(**settings)
        with pytest.raises(OSError, match="No space left on device"):
            trainer.train()
        assert disk.hits == 1
    assert "checkpoint-2" in checkpoints(tmp_path / "run")
    resumed = train(True, **settings)
    assert len(resumed.outputs) == 2 and checkpoints(tmp_path / "run") == ["checkpoint-4"]
    assert same(weights(resumed.model), weights(trainer.model))
    assert same(weights(resumed.implicit_prm.model), weights(trainer.implicit_prm.model))
    assert same(
        weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")), weights(trainer.model)
    )


def test_a_full_disk_at_the_final_save_is_reported(train, monkeypatch, tmp_path):
    trainer = train(max_steps=1)
    FullDisk(monkeypatch, "run/prm/model.safetensors", 0).trainer = trainer
    with pytest.raises(OSError, match="No space left on device"):
        trainer.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists()  # no policy that looks whole next to a broken PRM


# --- Several processes ---


@pytest.fixture(scope="module")
def faulty_runs(tmp_path_factory):
    """Runs on two processes that go wrong on one of them; in the last the second process dies."""
    folder = tmp_path_factory.mktemp("faulty")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    settings = {
        "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run(
        [*command, str(HERE / "faulty_run.py"), str(folder)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return folder, process


def results(faulty_runs, name):
    folder, process = faulty_runs
    assert (folder / f"{name}_1.pt").exists(), (process.stdout + process.stderr)[-5000:]
    first, second = (torch.load(folder / f"{name}_{rank}.pt") for rank in (0, 1))
    for part in ("policy", "prm"):
        assert same(first[part], second[part])
        assert all(tensor.isfinite().all() for tensor in first[part].values())
    return first, second, checkpoints(folder / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [("policy", "The policy's loss is not finite at step 1"), ("prm", "The implicit PRM gave nan")],
)
def test_nan_on_one_process_is_raised_on_all(faulty_runs, name, message):
    *both, saved = results(faulty_runs, name)
    assert all(result["raised"].startswith(message) for result in both)
    assert saved == ["checkpoint-1"]


def test_several_processes_skip_steps_without_anything_to_learn(faulty_runs):
    first, _, saved = results(faulty_runs, "unlearnable")
    assert not first["raised"] and len(saved) == 3
    state = AutoModelForCausalLM.from_pretrained(faulty_runs[0] / "unlearnable" / "checkpoint-1")
    assert same(weights(state), first["policy"]) and not same(first["policy"], weights(build_model(7, scale=4.0)))
    log = json.loads((faulty_runs[0] / "unlearnable" / "checkpoint-3" / "trainer_state.json").read_text())[
        "log_history"
    ]
    assert [entry["filter/skipped_steps"] for entry in log if "loss" in entry] == [0, 1, 1]


def test_a_process_that_dies_ends_the_others(faulty_runs):
    folder, process = faulty_runs
    assert process.returncode != 0
    assert "exitcode  : 3" in process.stderr and "faulty_run.py FAILED" in process.stderr
    assert not list(folder.glob("dying_*.pt")) and checkpoints(folder / "dying") == ["checkpoint-1"]
