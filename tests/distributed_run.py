"""Training runs one after the other, for `torchrun` or a single process: `distributed_run.py RUNS.json`.

The file holds a list of settings: fields of `PRIMEConfig` and those that `train` takes out; with `offline`, those of
`offline_prm_run.py`. Unless `sample` is set, the completions do not depend on random numbers, only on the place in the
whole batch, so that runs on one and on several processes see the same. Each process writes the weights that it has,
whole, and how they were distributed; the main process writes its log.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import build_model, build_tokenizer
from datasets import Dataset
from offline_prm_run import train_offline
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from trl_prime import PRIMEConfig, PRIMETrainer


def rollout(prompts, trainer):
    """Ragged completions that depend on the step and the place in the whole batch."""
    first = trainer.accelerator.process_index * len(prompts)
    completion_ids, prompt_ids = [], []
    for i, prompt in enumerate(prompts, start=first):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        generator = torch.Generator().manual_seed(1000 * sum(map(ord, text)) + i)
        length = int(torch.randint(1, 9, (), generator=generator))
        completion_ids.append([*torch.randint(3, 44, (length,), generator=generator).tolist(), 1])
        prompt_ids.append(trainer.processing_class(text=text)["input_ids"])
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def rollout_of_images(prompts, trainer):
    """The same, after messages with images."""
    texts = [next(block["text"] for block in prompt[-1]["content"] if block["type"] == "text") for prompt in prompts]
    encoded = trainer.processing_class.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return {**rollout(texts, trainer), "prompt_ids": encoded["input_ids"]}


def rollout_of_turns(prompts, trainer):
    """The same, of which an environment wrote every third token."""
    output = rollout(prompts, trainer)
    return {**output, "env_mask": [[int(t % 3 != 2) for t in range(len(ids))] for ids in output["completion_ids"]]}


def make_reward(none_on_rank=None):
    def reward(completion_ids, **kwargs):
        rank = int(os.environ.get("RANK", 0))
        judged = none_on_rank is None or rank != none_on_rank
        return [float(sum(ids) % 2) if judged else None for ids in completion_ids]

    return reward


def use_fsdp_on_cpu():
    """
    Make accelerate take an FSDP plugin on the CPU too, where it drops it without a word and would train by DDP.

    It reads the plugin for the types of accelerators only, so one of them stands in for MULTI_CPU while it decides. Device and
    process group are made before and stay those of the CPU.
    """
    initialize = AcceleratorState.__init__

    def initialize_with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        if fsdp_plugin is not None and PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    AcceleratorState.__init__ = initialize_with_plugin


def know_cpus_by_number():
    """Make torch load tensors to the device `cpu:1` as to `cpu`: transformers before 5.19 asks for it when such a run is resumed."""
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, device: storage if device.startswith("cpu:") else None
    )


def placement(model):
    """Tell from a model itself how it is distributed."""
    if hasattr(model, "zero_optimization_stage"):
        return f"ZeRO-{model.zero_optimization_stage()}"
    parameters = list(model.parameters())
    if any(hasattr(p, "ds_id") for p in parameters):
        return "ZeRO-3"
    if any(isinstance(p, DTensor) for p in parameters):
        return "DTensor" if all(isinstance(p, DTensor) for p in parameters) else "DTensor in part"
    return "DDP" if isinstance(model, torch.nn.parallel.DistributedDataParallel) else "whole"


def save_distribution(folder, trainer, backend, prm):
    """Write how a trained trainer distributed its models; `prm` is the model that the loss was computed by."""
    models = {"trained": trainer.model_wrapped, "prm": prm, "reference": backend.second.reference}
    if getattr(trainer, "value_learner", None) is not None:
        models["value"] = trainer.value_learner.backend.model
    told = {part: placement(model) for part, model in models.items() if model is not None}
    told |= {"type": trainer.accelerator.distributed_type.value, "backend": type(backend).__name__}
    (folder / f"distribution_{trainer.accelerator.process_index}.json").write_text(json.dumps(told))


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def gathered(model):
    """All weights, whole, whatever they are sharded by."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return {name: full(p) for name, p in model.named_parameters()}


def kill_at(trainer, method, step):
    """Let the process be killed where it would call a method of the trainer at some step."""
    original = getattr(trainer, method)

    def killing(*args, **kwargs):
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(trainer, method, killing)


def train(settings):
    folder = Path(settings["output_dir"])
    lora, model = settings.pop("lora", ""), settings.pop("model", None)
    reward = make_reward(settings.pop("none_on_rank", None))
    resume, killed_at = settings.pop("resume", None), settings.pop("killed_at", None)
    rollout_func = None if settings.pop("sample", False) else rollout
    rollout_func = rollout_of_turns if settings.get("process_reward_granularity") == "turn" else rollout_func
    rows = [{"prompt": f"{i}+{'1' * (i % 3)}{i % 7}="} for i in range(40)]
    processing_class = build_tokenizer()
    if model == "images":
        from vision import build_vision_model, picture  # with older versions of transformers it cannot be imported

        # One or two images of several sizes for each prompt
        model, processing_class = build_vision_model("qwen3-vl")
        rollout_func = rollout_of_images
        for i, row in enumerate(rows):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row["images"] = [picture(10 * i + j, 8 * (1 + i % 3), 16) for j in range(1 + i % 2)]
    args = PRIMEConfig(
        **{
            "use_cpu": True,
            "bf16": False,
            "max_completion_length": 10,
            "max_steps": 2,
            "logging_steps": 1,
            "report_to": [],
            "learning_rate": 1e-3,
            "prm_learning_rate": 1e-2,
            "prm_beta": 0.5,
            "accuracy_low": 0.0,
            "accuracy_high": 1.0,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "num_generations": 4,
            **settings,
        }
    )
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)  # TRL 1.9 makes the policy's adapter from the random numbers it finds
    trainer = PRIMETrainer(
        model=model or build_model(7, scale=4.0),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=processing_class,
        peft_config=LoraConfig(**config) if "policy" in lora else None,
        prm_peft_config=LoraConfig(**config, layers_to_transform=[1] if "last" in lora else None)
        if "prm" in lora
        else None,
        rollout_func=rollout_func,
    )
    if killed_at:
        kill_at(trainer, *killed_at)
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.accelerator.process_index
    prm = trainer.implicit_prm
    parts = {"policy": trainer.model, "prm": prm.model, "reference": prm.reference}
    if trainer.value_learner is not None:
        parts["value"] = trainer.value_learner.value_model.model
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {part: gathered(model) for part, model in parts.items() if model is not None}, folder / f"result_{rank}.pt"
    )
    save_distribution(folder, trainer, trainer.prm_learner.backend, trainer.prm_learner.backend.model)
    if trainer.prm_learner.trunk is not None:
        (folder / f"has_trunk_{rank}").touch()
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(trainer.state.log_history))
    trainer.save_model(str(folder / "final"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    use_fsdp_on_cpu()
    know_cpus_by_number()
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        if settings.pop("offline", False):
            train_offline(settings, gathered, save_distribution)
        else:
            train(settings)
    # As a user's script it does not leave the process group: `launch` sees whether it ends well all the same
