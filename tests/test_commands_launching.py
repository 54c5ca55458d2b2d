"""One command line for one process and for several: what goes to accelerate's launcher, and what to the command."""

import json
import subprocess
import sys
import types

import pytest
import torch
import transformers
from accelerate.commands import launch
from packaging.version import Version
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trl_prime.cli import main
from trl_prime.commands import launching
from trl_prime.commands.launching import (
    CONFIGS,
    check_launch,
    check_report_to,
    launch_if_asked,
    parse_launched_arguments,
)
from trl_prime.commands.train import _types


@pytest.fixture
def launched(monkeypatch):
    """The launches that would have been made."""
    calls = []
    monkeypatch.setattr(launching, "_launch", lambda args: calls.append(args) or 0)
    return calls


def ask(*words):
    return launch_if_asked(_types(), list(words), "trl-prime train")


def test_without_a_flag_of_the_launcher_nothing_is_launched(launched, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prm_beta: 0.5\n")
    assert ask("--config", str(recipe), "--seed", "4") is None
    assert launched == []


def test_flags_are_told_apart(launched):
    words = ["--seed", "4", "--num_processes", "4", "--accelerate-config=zero2", "--reward_funcs", "math", "--use_cpu"]
    assert ask(*words) == 0
    (args,) = launched
    assert args.num_processes == 4 and args.config_file == str(CONFIGS / "zero2.yaml")
    assert args.module and args.training_script == "trl_prime.cli"
    assert args.training_script_args == ["train", "--seed", "4", "--reward_funcs", "math", "--use_cpu"]


def test_the_recipe_may_say_it_and_flags_win(launched, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prm_beta: 0.5\nnum_processes: 8\naccelerate_config: fsdp2\nuse_deepspeed: false\nsame_network: true\n"
    )
    assert ask("--config", str(recipe), "--num_processes", "3") == 0
    (args,) = launched
    assert args.num_processes == 3 and args.config_file == str(CONFIGS / "fsdp2.yaml")
    assert args.same_network and not args.use_deepspeed
    assert args.training_script_args == ["train", "--config", str(recipe)]
    # The process that was launched reads the same file
    _, config, _ = parse_launched_arguments(_types(), args.training_script_args[1:] + ["--use_cpu", "true"], "train")
    assert config.prm_beta == 0.5


def test_a_file_of_ones_own_and_the_default(launched, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text((CONFIGS / "ddp.yaml").read_text())
    ask("--accelerate_config", str(own))
    ask("--num_processes", "2")
    assert [args.config_file for args in launched] == [str(own), str(CONFIGS / "ddp.yaml")]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--accelerate_config", "zero4"], r"accelerate_config is 'zero4', which is no file. Did you mean 'zero"),
        (["--num_proceses", "2"], r"has no flag --num_proceses. Did you mean 'num_processes'\?"),
        (["--num_processes", "2", "--prm_bata", "1"], r"has no flag --prm_bata. Did you mean 'prm_beta'\?"),
        (["--num_processes", "two"], r"accelerate's launcher: argument --num_processes.*'two'"),
        (["stray"], r"can make nothing of 'stray'"),
        (["--accelerate_config", "ddp", "stray"], r"can make nothing of 'stray'"),
        (["--accelerate_config"], r"accelerate's launcher: .*expected one argument"),
    ],
)
def test_wrong_flags_are_refused(launched, words, said):
    with pytest.raises(ValueError, match=said):
        ask(*words)
    assert launched == []


def test_wrong_fields_of_the_recipe_are_refused_before_anything_is_launched(launched, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_processes: 2\nprm_bata: 1\n")
    with pytest.raises(ValueError, match=r"sets 'prm_bata', which is no field. Did you mean 'prm_beta'\?"):
        ask("--config", str(recipe))
    recipe.write_text("num_processes: 2\nprm_beta: high\n")
    with pytest.raises(ValueError, match="invalid float value: 'high'"):
        ask("--config", str(recipe))
    assert launched == []


@pytest.mark.parametrize("name", ["LOCAL_RANK", "TRL_PRIME_LAUNCHED"])
def test_a_launched_process_launches_no_others(launched, monkeypatch, tmp_path, name):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_processes: 2\n")
    monkeypatch.setenv(name, "0")
    assert ask("--config", str(recipe)) is None
    assert launched == []


@pytest.mark.parametrize("code, expected", [(2, 2), (1, 1), (-9, 137)])
def test_the_exit_code_is_that_of_the_process_that_failed(monkeypatch, code, expected):
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="none")

    def failing(args):
        raise ChildFailedError("train", {1: failure})

    monkeypatch.setattr(launch, "launch_command", failing)
    assert ask("--num_processes", "2") == expected

    def failing_alone(args):
        raise subprocess.CalledProcessError(code, "train")

    monkeypatch.setattr(launch, "launch_command", failing_alone)
    assert ask("--num_processes", "1") == expected


def test_a_launch_that_does_not_do_what_the_recipe_says_is_refused(monkeypatch):
    check_launch(world_size=1, bf16=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(world_size=2, bf16=True)
    with pytest.raises(ValueError, match="use_cpu: true"):
        check_launch(world_size=1, bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch(world_size=2, bf16=True)
    with pytest.raises(ValueError, match="bf16 is false.*--mixed_precision no"):
        check_launch(world_size=2, bf16=False)


@pytest.fixture
def recipe(tmp_path, model_path, monkeypatch):
    """A recipe with groups of 8 completions at 4 a process: one process alone would be refused."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data, recipe = tmp_path / "data.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1=", "solution": str(i % 10)}) + "\n" for i in range(8)))
    recipe.write_text(
        f"model_name_or_path: {model_path}\ndataset_name: {data}\noutput_dir: {tmp_path / 'run'}\n"
        "reward_funcs: trl_prime.tasks.running_sums.running_sum_reward\n"
        "accelerate_config: cpu\nmain_process_port: 0\nuse_cpu: true\nbf16: false\ngradient_checkpointing: false\n"
        "per_device_train_batch_size: 4\nnum_generations: 8\nmax_completion_length: 8\nmax_steps: 2\nlogging_steps: 1\n"
        "eval_split_size: 3\neval_samples: 2\nper_device_eval_batch_size: 4\n"
        'disable_tqdm: true\nreport_to: none\nsave_strategy: "no"\n'
    )
    return str(recipe)


def test_two_processes_train_together(recipe, tmp_path):
    assert main(["train", "--config", recipe, "--num_processes", "2"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (tmp_path / "run" / "prm" / "model.safetensors").is_file()
    # Three problems, shared by two processes
    accuracies = json.loads((tmp_path / "run" / "results.json").read_text())["after"]
    for name, num in (("greedy", 3), ("sampled", 6)):
        assert accuracies[name] * num == pytest.approx(round(accuracies[name] * num))


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            ["--accelerate_config", "cpu", "--fsdp"],
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.13"), reason="--fsdp takes a list of words there"
            ),
        ),
        ["--accelerate_config", "fsdp2", "--mixed_precision", "no"],
    ],
)
def test_fsdp_that_accelerate_leaves_out_is_refused(recipe, tmp_path, capfd, flags):
    flags += ["--num_processes", "2", "--eval_split_size", "none"]
    assert main(["train", "--config", recipe, *flags]) == 2
    assert "accelerate does not shard on cpu: each process would train whole models" in capfd.readouterr().err
    assert not (tmp_path / "run" / "prime_config.json").exists()


def test_a_command_leaves_the_process_group(tmp_path, capsys):
    """Left to the end of the interpreter, the group aborts some processes although they have done their work."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    assert main(["env"]) == 0
    assert not torch.distributed.is_initialized()


def test_a_command_leaves_the_process_group_to_an_engine_in_its_process(tmp_path, monkeypatch, capsys):
    """An engine of vLLM destroys the group when the interpreter ends, and prints a traceback where that was done before."""
    engine = types.ModuleType("vllm.distributed.parallel_state")
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    # vLLM is loaded for its server as well, whose groups are elsewhere
    for is_initialized in (True, False):
        engine.model_parallel_is_initialized = lambda is_initialized=is_initialized: is_initialized
        assert main(["env"]) == 0
        assert torch.distributed.is_initialized() is is_initialized


def test_trackers_that_are_not_there_are_told_before_a_model_is_loaded(monkeypatch, capsys, tmp_path):
    installed = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(installed, lambda: ["tensorboard"])
    check_report_to(["tensorboard"])
    for name, message in (("wandb", "'wandb', which is not installed"), ("wnadb", "Did you mean 'wandb'")):
        flags = ["--model_name_or_path", "no/model", "--dataset_name", "no/data", "--output_dir", str(tmp_path)]
        assert main(["train", *flags, "--use_cpu", "--bf16", "false", "--report_to", name]) == 2
        assert message in capsys.readouterr().err
