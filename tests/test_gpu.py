"""What only a GPU can show: bfloat16 on CUDA, kernels, memory and time. One GPU of 40 GB or more is enough.

    make test-gpu                          # or: pytest -m gpu
    PRIME_GPU_SUITE=cpu pytest -m gpu      # a rehearsal with a tiny model; time and memory are not judged

Nothing is downloaded: the model has the shape of Qwen2.5-0.5B and random weights. What is measured goes to
`benchmarks/results/gpu.json`, and `python benchmarks/gpu_table.py` prints it as tables.
"""

import gc
import importlib.util
import math
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_prime import ImplicitPRM, PRIMEConfig, PRIMETrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from common import RESULTS, machine, write
from cost_model import Shape, step_flops

REHEARSED = os.environ.get("PRIME_GPU_SUITE") == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not REHEARSED, reason="there is no CUDA device"),
]
DEVICE = "cpu" if REHEARSED else "cuda"
SHAPE = Shape(24, 896, 4864, 14, 2, 64, 151936, tied=True)
K, ROWS, PROMPT, TOKENS = 4, 8, 64, 512
if REHEARSED:
    SHAPE, TOKENS = Shape(2, 64, 128, 2, 1, 32, 512, tied=True), 16
LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="session")
def results():
    """What the tests have measured, by their names; written to a file at their end."""
    found = {}
    yield found
    if found and not REHEARSED:
        about = machine("torch", "transformers", "trl", "peft", "accelerate", "flash-attn", "vllm", "bitsandbytes")
        about["gpu"] = torch.cuda.get_device_name()
        write({"machine": about, "date": time.strftime("%Y-%m-%d"), **found}, RESULTS / "gpu.json")


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """Folder of the model and of a tokenizer of characters, which are the first of its tokens."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=SHAPE.vocab,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device(DEVICE):
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def every_other(completions, **kwargs):
    """Half of each group is right, so that no group is filtered."""
    return [float(row % 2) for row in range(len(completions))]


def given_completions(prompts, trainer):
    """The same completions at every step, half of them of full length."""
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(3, SHAPE.vocab, (length,), generator=generator).tolist()

    own = [ids(PROMPT) for _ in range(len(prompts) // K)]
    completions = [ids(TOKENS if row % 2 else TOKENS // 2) for row in range(len(prompts))]
    return {
        "prompt_ids": [own[row // K] for row in range(len(prompts))],
        "completion_ids": completions,
        "logprobs": None,
    }


@pytest.fixture
def make_trainer(base, tokenizer, tmp_path):
    def make(trainer_type=PRIMETrainer, lora=False, **kwargs):
        prime = trainer_type is PRIMETrainer
        arguments = {name: kwargs.pop(name) for name in ("rollout_func", "callbacks") if name in kwargs}
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": REHEARSED,
            "per_device_train_batch_size": ROWS,
            "num_generations": K,
            "max_completion_length": TOKENS,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        if prime:
            settings |= {"prm_learning_rate": 1e-3, "prm_beta": 0.05, "prm_trust_weighting": False}
        settings = {"bf16": not REHEARSED, **settings, **kwargs}
        if lora:
            arguments["peft_config"] = LoraConfig(**LORA)
            if prime:
                arguments["prm_peft_config"] = LoraConfig(**LORA)
        return trainer_type(
            model=base,
            reward_funcs=every_other,
            args=(PRIMEConfig if prime else GRPOConfig)(**settings),
            train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(64)]),
            processing_class=tokenizer,
            **arguments,
        )

    yield make
    gc.collect()
    if not REHEARSED:
        torch.cuda.empty_cache()


def numbers(trainer):
    """The logged rows of the steps."""
    return [row for row in trainer.state.log_history if "reward" in row]


def trained_weights(model):
    return {
        name: weight.detach().float().cpu().clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def rollout(device=DEVICE):
    """Prompt ids and mask, completion ids and mask of some ragged rows, as the PRM reads them."""
    rows = given_completions([None] * ROWS, None)
    longest = max(map(len, rows["completion_ids"]))
    completion_ids = torch.zeros(ROWS, longest, dtype=torch.long)
    mask = torch.zeros(ROWS, longest, dtype=torch.long)
    for row, ids in enumerate(rows["completion_ids"]):
        completion_ids[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    prompt_ids = torch.tensor(rows["prompt_ids"])
    return [tensor.to(device) for tensor in (prompt_ids, torch.ones_like(prompt_ids), completion_ids, mask)]


def peak_gigabytes(action):
    """Most memory that an action held beyond what was held before it; 0 in the rehearsal."""
    if REHEARSED:
        action()
        return 0.0
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


# --- It trains ---


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_two_steps(make_trainer, results, bf16, lora):
    """Policy and PRM learn, the reference stays, and process rewards begin at exactly 0: PRM and reference are equal."""
    trainer = make_trainer(lora=lora, bf16=bf16 and not REHEARSED, temperature=1.0)
    prm = trainer.implicit_prm
    assert prm.model.device.type == prm.reference.device.type == DEVICE
    before = trained_weights(trainer.model), trained_weights(prm.model)
    reference = [weight.detach().float().sum().item() for weight in prm.reference.parameters()]
    trainer.train()
    first, second = numbers(trainer)
    assert all(
        math.isfinite(row[name])
        for row in (first, second)
        for name in ("loss", "grad_norm", "prm/loss", "prm/grad_norm")
    )
    assert first["prm/process_reward"] == 0.0
    assert first["prm/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["prm/process_reward"] != 0.0
    for old, model in zip(before, (trainer.model, prm.model), strict=True):
        assert any(not torch.equal(old[name], new) for name, new in trained_weights(model).items())
    if not lora:
        assert reference == [weight.detach().float().sum().item() for weight in prm.reference.parameters()]
    results.setdefault("two steps", {})[f"{'bf16' if bf16 else 'fp32'}-{'lora' if lora else 'full'}"] = {
        name: second.get(name) for name in ("prm/loss", "prm/precision", "prm/grad_norm", "grad_norm", "step_time")
    }


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_process_rewards_in_bfloat16_are_those_of_float32(make_trainer, results, lora):
    """After some updates at a rate that moves the PRM, autocast does not decide what the rewards are."""
    trainer = make_trainer(lora=lora, max_steps=4, rollout_func=given_completions)
    trainer.train()
    precisions = [row["prm/precision"] for row in numbers(trainer) if row.get("prm/precision") is not None]
    results.setdefault("prm/precision", {})["lora" if lora else "full"] = precisions
    if not REHEARSED:  # it is measured under bf16
        assert precisions and precisions[-1] > 0.9


# --- Kernels: the same numbers by other ways ---


def log_probs(trainer):
    with trainer.accelerator.autocast():
        return trainer.implicit_prm.log_probs(*rollout())


def test_fused_head(make_trainer, results):
    """TRL's fused head gives the log-probabilities of plain logits and holds none."""
    found, peaks = {}, {}
    for fused in (False, True):
        trainer = make_trainer(prm_fused_lm_head=fused and not REHEARSED)
        peaks[fused] = peak_gigabytes(lambda trainer=trainer, fused=fused: found.update({fused: log_probs(trainer)}))
        del trainer
    mask = rollout()[3].bool()
    difference = (found[True] - found[False])[mask].abs()
    assert difference.mean() < 0.01 and found[False][mask].std() > 0
    results["fused head"] = {
        "plain GB": peaks[False],
        "fused GB": peaks[True],
        "mean difference": difference.mean().item(),
    }
    if not REHEARSED:
        assert peaks[True] < 0.6 * peaks[False]


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2"])
def test_attention(make_trainer, results, kernel):
    """Log-probabilities do not depend on the kernel of attention beyond rounding."""
    if kernel == "flash_attention_2" and (REHEARSED or importlib.util.find_spec("flash_attn") is None):
        pytest.skip("flash-attn is not installed")
    kwargs = {"dtype": "float32" if REHEARSED else "bfloat16"}
    plain, other = (
        log_probs(make_trainer(model_init_kwargs={**kwargs, "attn_implementation": name}, bf16=not REHEARSED))
        for name in ("eager", kernel)
    )
    difference = (plain - other)[rollout()[3].bool()].abs().mean().item()
    results.setdefault("attention", {})[kernel] = difference
    assert difference < 0.05


def test_gradient_checkpointing(make_trainer, results):
    """It takes memory off and leaves the PRM's update as it is."""
    found, peaks = {}, {}
    for on in (False, True):
        trainer = make_trainer(gradient_checkpointing=on, rollout_func=given_completions, max_steps=1, bf16=False)
        peaks[on] = peak_gigabytes(trainer.train)
        found[on] = numbers(trainer)[0]["prm/grad_norm"]
        del trainer
    assert found[True] == pytest.approx(found[False], rel=1e-3)
    results["gradient checkpointing"] = {"off GB": peaks[False], "on GB": peaks[True]}
    if not REHEARSED:
        assert peaks[True] < peaks[False]


def test_four_bits(make_trainer, results):
    """QLoRA: policy, PRM and reference share one base in 4 bits."""
    if REHEARSED or importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    trainer = make_trainer(lora=True, model_init_kwargs={"quantization_config": quantization, "dtype": "bfloat16"})
    policy, prm = trainer.accelerator.unwrap_model(trainer.model), trainer.implicit_prm
    shared = policy.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert shared is prm.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    trainer.train()
    first, second = numbers(trainer)
    assert first["prm/process_reward"] == 0.0 and math.isfinite(second["loss"]) and math.isfinite(second["prm/loss"])
    results["4 bits"] = {"prm/loss": second["prm/loss"]}


# --- vLLM ---


def test_colocated_vllm(make_trainer, results):
    """vLLM on the same GPU, asleep while it trains, gets the policy's new weights: its ratios stay at 1."""
    pytest.importorskip("vllm")
    trainer = make_trainer(
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3, vllm_enable_sleep_mode=True, max_steps=3
    )
    trainer.train()
    rows = numbers(trainer)
    ratios = [row["sampling/importance_sampling_ratio/mean"] for row in rows]
    results["vllm"] = {"ratios": ratios, "step_time": [row.get("step_time") for row in rows]}
    assert all(ratio == pytest.approx(1.0, abs=0.05) for ratio in ratios)


# --- Time and memory, beside GRPO in one run ---


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.start)

    @staticmethod
    def now():
        if not REHEARSED:
            torch.cuda.synchronize()
        return time.perf_counter()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_step_beside_grpo(make_trainer, results, lora):
    """Given completions: PRIME's step over GRPO's, in time and memory, and what the cost model says of it."""
    steps, rounds = (6, 2) if not REHEARSED else (2, 1)
    seconds, peaks = {GRPOTrainer: [], PRIMETrainer: []}, {}
    for _ in range(rounds):
        for kind in seconds:
            clock = Clock()
            trainer = make_trainer(
                kind, lora, rollout_func=given_completions, callbacks=[clock], max_steps=steps, logging_steps=steps
            )
            peaks[kind] = peak_gigabytes(trainer.train)
            seconds[kind] += clock.seconds[steps // 3 :]  # kernels are compiled and chosen in the first ones
            del trainer
            gc.collect()
    grpo, prime = (statistics.median(seconds[kind]) for kind in (GRPOTrainer, PRIMETrainer))
    flops = {
        update: sum(
            step_flops(
                SHAPE,
                PROMPT,
                [TOKENS if row % 2 else TOKENS // 2 for row in range(ROWS)],
                update=update,
                rank=LORA["r"] * lora,
                prm_rank=LORA["r"] * lora,
                micro_batch=ROWS,
                checkpointing=True,
            ).values()
        )
        for update in ("grpo", "after")
    }
    results.setdefault("step", {})["lora" if lora else "full"] = {
        "grpo seconds": grpo,
        "time ratio": prime / grpo,
        "time ratio of the cost model": flops["after"] / flops["grpo"],
        "memory ratio": peaks[PRIMETrainer] / peaks[GRPOTrainer] if peaks[GRPOTrainer] else None,
    }
    assert len(seconds[PRIMETrainer]) == rounds * (steps - steps // 3)


def test_scores_of_a_saved_prm(make_trainer, tmp_path):
    """A PRM that was trained on the GPU is loaded there and gives finite scores of text."""
    trainer = make_trainer(lora=True, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    prm = ImplicitPRM.from_pretrained(str(tmp_path / "saved"), device_map=None if REHEARSED else DEVICE)
    (scored,) = prm.score(["1+1="], ["2 and more"])
    assert len(scored.token_rewards) >= 3 and torch.isfinite(scored.token_rewards).all()
