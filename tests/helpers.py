"""Functions that several test files share; fixtures, and what builds tiny models, are in `conftest.py`."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from conftest import slow_log_probs
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
LENGTHS = ((3, 5), (1, 2), (7, 8), (4, 1), (2, 8), (6, 3), (5, 0))


# --- Models and batches ---


def scaled(config, scale=4.0):
    """A model of another architecture whose distributions are far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def lora(**kwargs):
    """The settings of a small adapter."""
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **kwargs}
    )


def make_trained(adapter, scale=0.5):
    """Make an adapter differ from the identity."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapter.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return adapter


def storages(*models):
    """The addresses of the memory that the parameters of the models lie in."""
    return {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}


def ragged_batch(lengths=LENGTHS, seed=0):
    """Prompts padded on the left, completions on the right; padding holds ids that matter if they are looked at."""
    generator = torch.Generator().manual_seed(seed)
    num_prompt, num_tokens = max(p for p, _ in lengths) + 1, max(c for _, c in lengths) + 2
    prompt_ids = torch.randint(3, 44, (len(lengths), num_prompt), generator=generator)
    completion_ids = torch.randint(3, 44, (len(lengths), num_tokens), generator=generator)
    prompt_mask, completion_mask = torch.zeros_like(prompt_ids), torch.zeros_like(completion_ids)
    for row, (num_p, num_c) in enumerate(lengths):
        prompt_mask[row, num_prompt - num_p :] = 1
        completion_mask[row, :num_c] = 1
    return prompt_ids, prompt_mask, completion_ids, completion_mask


# --- Runs in this process ---


def copied(model):
    """A copy that computes by itself: TRL's forward on the instance is still that of the original."""
    clone = copy.deepcopy(model)
    (clone.get_base_model() if isinstance(clone, PeftModel) else clone).__dict__.pop("forward", None)
    return clone


def fixed_rollouts(change=(), env_mask=None, seed=0, lengths=(5, 8, 3, 6, 8, 2, 4, 7)):
    """A rollout_func that always gives the same completions; those of the rows in `change` are others."""

    def rollout(prompts, trainer):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 44, (64, 8), generator=generator).tolist()
        completion_ids = [ids[i][: lengths[i % 8] - 1] + [1 if lengths[i % 8] < 8 else 5] for i in range(len(prompts))]
        for row in change:
            completion_ids[row] = [
                *((token + 7) % 40 + 3 for token in completion_ids[row][:-1]),
                completion_ids[row][-1],
            ]
        prompt_ids = [[4 + i // 4, 10, 14] for i in range(len(prompts))]
        output = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}
        if env_mask:
            output["env_mask"] = [[int(t not in env_mask) for t in range(len(row))] for row in completion_ids]
        return output

    return rollout


def rollouts_of(completion_ids, **columns):
    """A rollout_func that gives these completions."""

    def rollout(prompts, trainer):
        prompt_ids = [trainer.processing_class(prompt).input_ids for prompt in prompts]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None, **columns}

    return rollout


def metrics(trainer):
    """The entries of the log that belong to training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --- Runs of other processes ---


def launch(num_processes, runs, folder, exit_code=0):
    """Train each of the runs; fail with what the processes said if they end by another exit code."""
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    command = [sys.executable]
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--nproc_per_node", str(num_processes), "--master_port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *options]
    settings = {
        "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",  # torch shards over the GPUs it sees
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run(
        [*command, str(HERE / "distributed_run.py"), str(path)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == exit_code, (process.stdout + process.stderr)[-6000:]


def results(folder, num_processes):
    """Read what each process of `distributed_run.py` wrote: {part: {name: weights}}."""
    return [torch.load(folder / f"result_{rank}.pt") for rank in range(num_processes)]


def assert_close(first, second, atol):
    """Two results of `distributed_run.py` have the same parts and names, and close weights."""
    assert first.keys() == second.keys()
    for part, tensors in first.items():
        assert tensors.keys() == second[part].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                tensor, second[part][name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


# --- Command line ---


def digits_reward(prompts, completions, solution, **kwargs):
    """A stand-in that reads what the adapter makes."""
    for (system, user), answer in zip(prompts, solution, strict=True):
        assert system == {"role": "system", "content": "count"}
        assert user["content"] == f"{int(answer) - 1} plus 1\n\ngive the number"
    return [float(sum(map(ord, completion[0]["content"])) % 2) for completion in completions]


def train_flags(tmp_path, model_path, data, **settings):
    """The arguments of a short `trl-prime train` on a file of GSM8K rows."""
    settings = {
        "model_name_or_path": model_path,
        "dataset_name": data,
        "dataset_format": "gsm8k",
        "reward_funcs": f"{__name__}.digits_reward",
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "use_cpu": "true",
        "bf16": "false",
        "dtype": "float32",
        "report_to": "none",
        "disable_tqdm": "true",
        "logging_steps": 1,
        "gradient_checkpointing": "false",
        "save_strategy": "no",
        **settings,
    }
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


# --- What a run has shown ---

MIXED = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
PASSES = (1.0, 0.0, 0.0, 1.0)
FAILS = (0.0, 0.0, 0.0, 0.0)
BAND = {"accuracy_low": 0.2, "accuracy_high": 0.8}


@torch.no_grad()
def slow_process_rewards(prm_model, reference, output, beta=0.5):
    batch = [output[key] for key in INPUTS]
    return beta * (slow_log_probs(prm_model, *batch) - slow_log_probs(reference, *batch))


def loss_mask(output):
    return output["completion_mask"] * output.get("tool_mask", 1)
