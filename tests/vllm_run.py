"""One training run with a real vLLM on the CPU: `vllm_run.py SETTINGS.json`.

The file holds fields of `PRIMEConfig` and those that `train` takes out. At each generation the run compares the engine with
policy and PRM; each process writes what it found to `report_RANK.json`, and the weights at the end to `result_RANK.pt`, into the output folder.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from conftest import build_tokenizer, parity_reward, slow_log_probs
from datasets import Dataset
from helpers import copied, lora, make_trained
from peft import PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.generation import vllm_client, vllm_generation

from trl_prime import PRIMEConfig, PRIMETrainer

STACKED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}


def save_model(folder):
    """Write a model and its tokenizer; its heads have 32 dimensions, because vLLM takes no smaller ones on a CPU."""
    config = Qwen2Config(
        vocab_size=44,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def save_adapter(model, folder):
    """Write an adapter that changes what the model says."""
    torch.manual_seed(0)
    make_trained(get_peft_model(Qwen2ForCausalLM.from_pretrained(model), lora())).save_pretrained(folder)


def reads_text(completions, **kwargs):
    """A reward function of what is written, for commands: they measure without ids of tokens."""
    return [float(sum(map(ord, completion[0]["content"])) % 2) for completion in completions]


def fails(**kwargs):
    """A reward function for a run that ends on the way."""
    raise RuntimeError("a reward that fails")


def as_in_vllm(model):
    """The weights of a model, adapters merged, by vLLM's names: it stacks some layers of the same input."""
    model = copied(model)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    stacked = {}
    for name in weights:
        module = name.split(".")[-2]
        into, parts = STACKED.get(module, (module, (module,)))
        if any(module in parts[1:] for _, parts in STACKED.values()):
            continue
        stacked[name.replace(module, into)] = torch.cat([weights[name.replace(module, part)] for part in parts])
    return stacked


def engine_weights(generation):
    model = generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def distance(engine, model):
    """The largest difference between weights of the engine and of a model; vLLM pads the vocabulary."""
    expected = as_in_vllm(model)
    assert engine.keys() == expected.keys(), engine.keys() ^ expected.keys()
    return max((engine[name][: len(weight)] - weight).abs().max().item() for name, weight in expected.items())


@torch.no_grad()
def logp_distance(model, prompt_ids, completion_ids, logprobs):
    """The largest difference between the engine's log-probabilities of its samples and a model's."""
    model, worst = copied(model).eval(), 0.0
    for prompt, completion, logps in zip(prompt_ids, completion_ids, logprobs, strict=True):
        rows = [torch.tensor([list(ids)]) for ids in (prompt, completion)]
        batch = [tensor for ids in rows for tensor in (ids, torch.ones_like(ids))]
        of_model = slow_log_probs(model, *batch)[0]
        worst = max(worst, (of_model - torch.tensor([logp[0] for logp in logps])).abs().max().item())
    return worst


def watch(trainer, seen):
    """Compare engine and models whenever the trainer generates."""
    generation = trainer.vllm_generation
    generate, sync_weights = generation.generate, generation.sync_weights

    def counted():
        sync_weights()
        seen["syncs"].append(trainer.state.global_step)

    def compared(*args, **kwargs):
        sampled = generate(*args, **kwargs)
        found = {"step": trainer.state.global_step, "completions": len(sampled[1])}
        found["logps"] = logp_distance(trainer.model, *sampled[:3])
        if generation.mode == "colocate":
            engine = engine_weights(generation)
            found["dtypes"] = sorted({str(weight.dtype) for weight in engine.values()})
            found["policy"] = distance(engine, trainer.model)
            found["prm"] = distance(engine, trainer.implicit_prm.model)
        seen["generations"].append(found)
        return sampled

    generation.generate, generation.sync_weights = compared, counted


def train(settings):
    folder, model = Path(settings["output_dir"]), settings.pop("model")
    adapters, resume = settings.pop("lora", ""), settings.pop("resume", None)
    if settings["vllm_mode"] == "server":
        from vllm_file_transfer import send_by_file

        send_by_file(vllm_client.VLLMClient, folder)
    # TRL lets vLLM choose the type, and that is not float32
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32")
    args = PRIMEConfig(
        **{
            "use_vllm": True,
            "use_cpu": True,
            "bf16": False,
            "model_init_kwargs": {"dtype": "float32"},
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 16,
            "vllm_max_model_length": 64,
            "max_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "prm_learning_rate": 1e-3,
            "accuracy_low": 0.0,
            "accuracy_high": 1.0,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **settings,
        }
    )
    trainer = PRIMETrainer(
        model=model,
        reward_funcs=parity_reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i % 7}="} for i in range(40)]),
        peft_config=lora() if "policy" in adapters else None,
        prm_peft_config=lora() if "prm" in adapters else None,
    )
    seen = {"syncs": [], "generations": []}
    watch(trainer, seen)
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.accelerator.process_index
    seen["log"] = trainer.state.log_history
    (folder / f"report_{rank}.json").write_text(json.dumps(seen))
    parts = {"policy": trainer.model, "prm": trainer.implicit_prm.model, "reference": trainer.implicit_prm.reference}
    torch.save({part: as_in_vllm(model) for part, model in parts.items()}, folder / f"result_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(json.loads(Path(sys.argv[1]).read_text()))
