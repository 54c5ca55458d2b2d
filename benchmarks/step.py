r"""How long does a step of PRIME take, and how much memory, beside a step of TRL's GRPO?

One model, one batch, the same completions. For each setting, GRPOTrainer (without and with its own KL reference) and
PRIMETrainer (`prm_update` "after" and "before") run in a process each and take their steps in turn, so that a busy
machine is busy for all of them. Settings:

    train       completions are given and of full length: the worst case for PRIME
    generate    the policy generates for a fixed number of tokens, as long as the longest completion; most are shorter, as
                they are in real rollouts, where a batch goes on until its longest row is done; a narrow deep model,
                whose generation takes most of a step, as it does on GPUs
    even        generated, and all completions are as long as the longest (with --settings only)

each with `full` (policy, PRM and reference are three models), `lora` (two adapters on one base, which is the reference),
`lora-top` (the same, the PRM's on the last sixth of the layers) and `full-top` (a full policy, and a PRM like that on a frozen copy of its
start, which is the reference). What a step needs is timed apart from the trainers: a forward pass of the reference, forward and backward pass
and optimizer step of the PRM, and with "before" one forward pass more, each written down in the plainest way.
`needed_ratio` is PRIME's step over GRPO's step plus those. `expected_ratio` is what `cost_model.py` predicts for
PRIMETrainer as it is, from GRPO's seconds and the FLOPs a second of one plain training pass; `flops_ratio` from GRPO's
seconds alone, as if its policy ran at the same rate (without Triton, TRL's head does not).

    python benchmarks/step.py --rounds 3
    python benchmarks/step.py --table        # the tables of docs/performance.md from the last results

Memory is the largest resident size of a process of its own (VmHWM), from after the imports, over set-up and two steps.
Its allocator returns every freed tensor to the system (blocks above 64 KiB are mapped one by one), so that the figure is
what is in use and not what malloc keeps. That makes it slower, which is why no time is taken there.

Not measured: GPUs, several processes, vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from common import RESULTS, machine, markdown_table, parser, write
from cost_model import Shape, step_flops
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from trl_prime import ImplicitPRM, PRIMEConfig, PRIMETrainer
from trl_prime.advantages import ESTIMATORS, combine_rewards

KINDS = ("full", "full-top", "lora", "lora-top")
SETTINGS = tuple(f"{kind}-{given}" for given in ("train", "generate", "even") for kind in KINDS)
CONTENDERS = ("grpo", "grpo-kl", "after", "before")
SHAPE = Shape(layers=6, hidden=384, intermediate=1536, heads=6, kv_heads=2, head_dim=64, vocab=8192)
# The shape of "generate": latency bounds a step of decoding here, as bandwidth does on a GPU, and FLOPs do not
NARROW = Shape(layers=12, hidden=128, intermediate=512, heads=4, kv_heads=2, head_dim=32, vocab=2048)
# The adapter is 1 % of the weights; one of rank 16 is 0.5 % of a 7B model
RANK, K, MICRO_BATCH, PROMPT = 4, 4, 4, 16
NEEDED_GOAL = 1.05
# Time of steps with given completions and of generated ones, and memory, by kind; where nothing is said there is no goal
TIME_GOALS = {"full-generate": 1.20, "lora-generate": 1.20, "full-top-train": 1.45, "lora-top-train": 1.65} | {
    f"{kind}-top-generate": 1.08 for kind in ("full", "lora")
}
MEMORY_GOALS = {"lora": 1.05, "lora-top": 1.03, "full-top": 1.30}
# Lengths in "generate" as shares of the longest, one group of K = 4: completions seldom run to the limit
RAGGED = (0.22, 0.35, 1.0, 0.16)


# ---------------------------------------------------------------------------------------------------------------------
# All contenders get the same model and the same batch


def shape_of(setting: str) -> Shape:
    return NARROW if setting.endswith("generate") else SHAPE


def prm_layers(setting: str) -> int | None:
    """Last layers that the PRM's adapter is on."""
    return shape_of(setting).layers // 6 if "-top-" in setting else None


def has_adapters(setting: str) -> tuple[bool, bool]:
    """Whether the policy and the PRM are adapters."""
    lora = setting.startswith("lora")
    return lora, lora or prm_layers(setting) is not None


def make_base(folder: str, shape: Shape) -> None:
    """A model and a tokenizer, made on the spot: what it says does not matter for time and memory."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, shape.vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)


def completion_lengths(setting: str, options: argparse.Namespace) -> list[int]:
    if setting.endswith("train"):
        return [options.tokens] * options.rows
    longest = options.new_tokens
    return [longest if setting.endswith("even") else round(longest * share) for share in RAGGED]


def prm_micro_batch(setting: str) -> int:
    """Rows of the PRM's micro-batches: half the policy's, for the room of its logits."""
    return MICRO_BATCH // 2


def rollouts(setting: str, options: argparse.Namespace) -> dict[str, list]:
    """Prompts and completions of a step as token ids, the same for every trainer and step."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, shape_of(setting).vocab, (length,), generator=generator).tolist()

    lengths = completion_lengths(setting, options)
    prompts = [ids(PROMPT) for _ in range(len(lengths) // K)]
    return {
        "prompt_ids": [prompts[row // K] for row in range(len(lengths))],
        "completion_ids": [ids(length) for length in lengths],
        "logprobs": None,
    }


def rollout_func(setting: str, options: argparse.Namespace) -> Callable:
    recorded = rollouts(setting, options)

    def given(prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        if not setting.endswith("train"):
            generate(trainer.accelerator.unwrap_model(trainer.model), recorded)
        return dict(recorded)

    return given


@torch.no_grad()
def generate(model: torch.nn.Module, recorded: dict[str, list]) -> None:
    """Sample as many tokens as the longest completion has, whatever they are."""
    longest = max(map(len, recorded["completion_ids"]))
    was_training = model.training
    model.eval()
    prompts = torch.tensor(recorded["prompt_ids"])
    model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=longest,
        min_new_tokens=longest,
        do_sample=True,
        top_k=0,
        disable_compile=True,
    )
    model.train(was_training)


def every_other(completions: list, **kwargs: Any) -> list[float]:
    """Half of each group is right, so that no group is filtered."""
    return [float(row % 2) for row in range(len(completions))]


def lora_config(layers: range | None = None) -> LoraConfig:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=RANK, target_modules=modules, layers_to_transform=layers and [*layers], task_type="CAUSAL_LM")


def prm_lora_config(setting: str) -> LoraConfig | None:
    if not has_adapters(setting)[1]:
        return None
    layers, top = shape_of(setting).layers, prm_layers(setting)
    return lora_config(top and range(layers - top, layers))


def build_trainer(spec: dict[str, Any], options: argparse.Namespace) -> GRPOTrainer:
    setting, contender = spec["setting"], spec["contender"]
    prime = not contender.startswith("grpo")
    num_rows = len(completion_lengths(setting, options))
    settings = {
        "output_dir": spec["output"],
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": num_rows // MICRO_BATCH,
        "num_generations": K,
        "max_completion_length": max(completion_lengths(setting, options)),
        "loss_type": "dapo",
        "learning_rate": 1e-6,
        "beta": 0.04 if contender == "grpo-kl" else 0.0,
        "gradient_checkpointing": options.checkpointing,
        "max_steps": 1000,  # the parent says when to stop
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if prime:
        settings |= {"prm_update": contender, "prm_num_epochs": spec.get("epochs", 1)}
        settings["prm_micro_batch_size"] = prm_micro_batch(setting)
    arguments = {"peft_config": lora_config() if has_adapters(setting)[0] else None}
    if prime:
        arguments["prm_peft_config"] = prm_lora_config(setting)
    return (PRIMETrainer if prime else GRPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(spec["base"]),
        reward_funcs=every_other,
        args=(PRIMEConfig if prime else GRPOConfig)(**settings),
        train_dataset=Dataset.from_list([{"prompt": f"w{i}"} for i in range(3, 67)]),
        processing_class=AutoTokenizer.from_pretrained(spec["base"]),
        rollout_func=rollout_func(setting, options),
        **arguments,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Every contender is a process. It takes a step when it is told to, and says what that took.


class Stopwatch:
    """Wall and CPU seconds of named parts; a part that is run inside another is taken out of that one."""

    def __init__(self):
        self.parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.calls: dict[str, int] = defaultdict(int)
        self.inner = [[0.0, 0.0]]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.inner.append([0.0, 0.0])
        start = clocks()
        yield
        spent = [after - before for before, after in zip(start, clocks(), strict=True)]
        inside = self.inner.pop()
        for clock in (0, 1):
            self.parts[name][clock] += spent[clock] - inside[clock]
            self.inner[-1][clock] += spent[clock]
        self.calls[name] += 1

    def wrap(self, owner: Any, method: str, name: str) -> None:
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, method, timed)

    def read(self) -> dict[str, Any]:
        result = {"parts": {name: list(values) for name, values in self.parts.items()}, "calls": dict(self.calls)}
        self.parts.clear()
        self.calls.clear()
        return result


def clocks() -> tuple[float, float]:
    # CPU seconds leave out the time that other processes take on a busy machine
    return time.perf_counter(), time.process_time()


class StepByStep(TrainerCallback):
    """Lets the parent decide when a step begins, and times it from its first micro-batch to after the optimizer."""

    def __init__(self, connection: Any, watch: Stopwatch, baseline: int, counts: dict[str, int]):
        self.connection, self.watch, self.baseline, self.counts = connection, watch, baseline, counts

    def on_step_begin(self, args, state, control, **kwargs):
        if self.connection.recv() == "stop":
            self.connection.close()
            os._exit(0)
        self.counts.update(dict.fromkeys(self.counts, 0))
        self.watch.read()
        self.start = clocks()

    def on_step_end(self, args, state, control, **kwargs):
        seconds, cpu = (after - before for before, after in zip(self.start, clocks(), strict=True))
        report = {"seconds": seconds, "cpu": cpu, "peak": resident("VmHWM") - self.baseline, **self.watch.read()}
        self.connection.send({**report, "forwards": dict(self.counts)})


def resident(name: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (at most so far)."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def return_memory_at_once() -> None:
    """Make malloc map every block above 64 KiB by itself: what is freed is gone, and the peak is what was in use."""
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((-3, 64 * 1024), (-1, 64 * 1024), (-8, 1)):  # mmap threshold, trim threshold, arenas
        libc.mallopt(option, value)


def trainer_process(connection: Any, spec: dict[str, Any], options: argparse.Namespace) -> None:
    trainer = build_trainer(spec, options)
    watch, counts = Stopwatch(), {}
    # The rollout is generation and rewards; the rest of a step is the policy's
    watch.wrap(trainer, "_generate_and_score_completions", "rollout")
    watch.wrap(trainer, "_generate", "generation")
    if isinstance(trainer, PRIMETrainer):
        prm = trainer.implicit_prm
        watch.wrap(prm, "reference_log_probs", "reference")
        # This method scores before an update, and checks it afterwards
        watch.wrap(prm, "log_probs", "prm forward")
        watch.wrap(trainer.prm_learner, "score_and_learn", "prm update")
        for name, model in (("prm", prm.model), ("reference", prm.reference)):
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            count_forwards(base, name, counts)
    trainer.add_callback(StepByStep(connection, watch, spec["baseline"], counts))
    trainer.train()


def count_forwards(model: torch.nn.Module, name: str, counts: dict[str, int]) -> None:
    counts[name] = 0

    def count(*args: Any) -> None:
        counts[name] += 1

    model.register_forward_pre_hook(count)


def passes_process(connection: Any, spec: dict[str, Any], options: argparse.Namespace) -> None:
    """Each pass that PRIME adds, by itself and in the plainest way."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(spec["base"])
    config, top = prm_lora_config(spec["setting"]), prm_layers(spec["setting"])
    if has_adapters(spec["setting"])[0]:
        policy = get_peft_model(policy, lora_config())
    prm = ImplicitPRM.from_policy(policy, AutoTokenizer.from_pretrained(spec["base"]), peft_config=config)
    model, reference = prm.model, prm.reference
    if options.checkpointing:
        model.gradient_checkpointing_enable()
        if config is not None:
            model.get_base_model().disable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    recorded = rollouts(spec["setting"], options)
    rows = sorted(zip(recorded["prompt_ids"], recorded["completion_ids"], strict=True), key=lambda r: -len(r[1]))
    size = prm_micro_batch(spec["setting"])
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]

    kept = {}

    def logps(model: torch.nn.Module, chunk: list) -> torch.Tensor:
        longest = max(len(completion) for _, completion in chunk)
        ids = torch.zeros(len(chunk), PROMPT + longest, dtype=torch.long)
        for row, (prompt, completion) in zip(ids, chunk, strict=True):
            row[: len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        mask = torch.ones_like(ids).masked_fill(ids == 0, 0)
        inputs = {"attention_mask": mask, "use_cache": False, "logits_to_keep": longest + 1}
        if top is None:
            logits = model(ids, **inputs).logits
        elif model is reference:
            output = model(ids, **inputs, output_hidden_states=True)
            logits, kept[len(chunk), longest] = output.logits, output.hidden_states[-top - 1]
        else:
            logits = top_logits(model, kept[len(chunk), longest], longest + 1, top)
        logits = logits[:, :-1]
        targets = ids[:, PROMPT:].masked_fill(ids[:, PROMPT:] == 0, -100)
        return -torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")

    def train() -> None:
        model.train()
        for chunk in chunks:
            logps(model, chunk).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward(model: torch.nn.Module, chunks: list) -> None:
        model.eval()
        for chunk in chunks:
            logps(model, chunk)

    passes = {
        "reference forward": lambda: forward(reference, chunks),
        "prm forward": lambda: forward(model, chunks),
        "prm training": train,
    }
    while connection.recv() != "stop":
        report = {}
        for name, run in passes.items():
            start = clocks()
            run()
            report[name] = [after - before for before, after in zip(start, clocks(), strict=True)]
        connection.send(report)


def top_logits(model: torch.nn.Module, hidden: torch.Tensor, num_logits: int, top: int) -> torch.Tensor:
    """Logits from the hidden states below the last layers. Padding is at the end, where no other token sees it."""
    body = model.get_base_model().model
    positions = torch.arange(hidden.shape[1])[None]
    rotary = body.rotary_emb(hidden, positions)
    for layer in body.layers[-top:]:
        hidden = layer(hidden, position_embeddings=rotary, position_ids=positions)
    return model.get_base_model().lm_head(body.norm(hidden)[:, -num_logits:])


def advantages_process(connection: Any, spec: dict[str, Any], options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    size = options.advantage_size
    generator = torch.Generator().manual_seed(0)
    process = torch.randn(size, size, generator=generator)
    lengths = torch.randint(size // 2, size + 1, (size,), generator=generator)
    mask = torch.arange(size)[None] < lengths[:, None]
    outcomes = torch.randint(0, 2, (size,), generator=generator).float()
    while connection.recv() != "stop":
        report = []
        for estimator in ESTIMATORS:
            for gamma in (1.0, 0.99):
                start = clocks()
                combine_rewards(outcomes, process, mask, K, estimator=estimator, process_gamma=gamma)
                seconds, cpu = (after - before for before, after in zip(start, clocks(), strict=True))
                report.append({"estimator": estimator, "process_gamma": gamma, "seconds": seconds, "cpu": cpu})
        connection.send(report)


def base_process(connection: Any, spec: dict[str, Any], options: argparse.Namespace) -> None:
    make_base(spec["base"], shape_of(spec["setting"]))
    connection.send("done")


class Child:
    """A process of this program, forked after the imports: they are paid once, and in no one's memory."""

    def __init__(self, target: Callable, spec: dict[str, Any], options: argparse.Namespace, lean: bool = False):
        self.name = f"{spec.get('setting', '')} {spec.get('contender', target.__name__)}"
        context = multiprocessing.get_context("fork")
        self.connection, connection = context.Pipe()
        self.process = context.Process(target=self._run, args=(target, connection, spec, options, lean), daemon=True)
        self.process.start()
        connection.close()

    @staticmethod
    def _run(target: Callable, connection: Any, spec: dict[str, Any], options: argparse.Namespace, lean: bool) -> None:
        if lean:
            return_memory_at_once()
        torch.set_num_threads(options.threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        try:
            target(connection, {**spec, "baseline": resident("VmRSS")}, options)
        except BaseException:
            traceback.print_exc()
            raise

    def ask(self) -> Any:
        self.tell()
        return self.answer()

    def tell(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.connection.send("step")

    def answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"The process of '{self.name}' ended early; see its error above.") from None

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.connection.send("stop")
        self.process.join()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(setting: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of all contenders in turn, then their memory."""
    spec = {"setting": setting, "base": f"{folder}/base", "output": f"{folder}/run"}
    children = {name: Child(trainer_process, {**spec, "contender": name}, options) for name in CONTENDERS}
    children["passes"] = Child(passes_process, spec, options)
    # The first step allocates and is not counted
    ask_all(children)
    steps: dict[str, list] = {name: [] for name in children}
    for number in range(options.rounds):
        first = number % len(children)
        for name in [*children][first:] + [*children][:first]:
            steps[name].append(children[name].ask())
    for child in children.values():
        child.stop()
    children = {name: Child(trainer_process, {**spec, "contender": name}, options, lean=True) for name in CONTENDERS}
    ask_all(children)
    # Adam's moments are there from the second step on
    peaks = {name: report["peak"] for name, report in ask_all(children).items()}
    for child in children.values():
        child.stop()
    if setting.endswith("train"):
        # The reference's log-probabilities belong to the rollout: more epochs of the PRM need no more of them
        child = Child(trainer_process, {**spec, "contender": "after", "epochs": 3}, options)
        steps["after, 3 epochs"] = [child.ask()]
        child.stop()
    return {"steps": steps, "peaks": peaks}


def ask_all(children: dict[str, Child]) -> dict[str, Any]:
    """A step of all at the same time, where nothing is timed."""
    for child in children.values():
        child.tell()
    return {name: child.answer() for name, child in children.items()}


def rows_of(setting: str, measured: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the result, one for each kind of update."""
    steps, peaks = measured["steps"], measured["peaks"]
    lengths = completion_lengths(setting, options)
    clock = "cpu" if options.cpu_time else "seconds"
    index = 1 if options.cpu_time else 0

    def median(values: Any) -> float:
        return statistics.median(values)

    def part(name: str, passes: str) -> float:
        return median(step["parts"].get(passes, [0.0, 0.0])[index] for step in steps[name])

    # These are the seconds of each pass by itself
    alone = {name: median(step[name][index] for step in steps["passes"]) for name in steps["passes"][0]}
    grpo = median(step[clock] for step in steps["grpo"])
    generation = part("grpo", "generation")
    rows = []
    for update in ("after", "before"):
        ratios = [p[clock] / g[clock] for p, g in zip(steps[update], steps["grpo"], strict=True)]
        kl_ratios = [p[clock] / g[clock] for p, g in zip(steps[update], steps["grpo-kl"], strict=True)]
        needed = alone["reference forward"] + alone["prm training"]
        if update == "before":
            needed += alone["prm forward"]
        prime = median(step[clock] for step in steps[update])
        flops = model_flops(setting, update, options)
        policy_flops = flops.pop("policy")
        added = sum(flops.values())
        row = {
            "setting": setting,
            "update": update,
            "kind": setting.rpartition("-")[0],
            "time_ratio": median(ratios),
            "time_ratio_min": min(ratios),
            "time_ratio_max": max(ratios),
            "memory_ratio": peaks[update] / peaks["grpo"],
            "prime_seconds": prime,
            "grpo_seconds": grpo,
            "expected_ratio": 1 + added / flops["prm"] * alone["prm training"] / grpo,
            "flops_ratio": 1 + added / policy_flops * (1 - generation / grpo),
            "needed_seconds": grpo + needed,
            "needed_ratio": prime / (grpo + needed),
            "needed_over_grpo": (grpo + needed) / grpo,
            "generation_share": generation / grpo,
            "time_ratio_to_grpo_with_kl": median(kl_ratios),
            "memory_ratio_to_grpo_with_kl": peaks[update] / peaks["grpo-kl"],
            "prime_bytes": peaks[update],
            "grpo_bytes": peaks["grpo"],
            "completion_lengths": lengths,
            "parts": {name: part(update, name) for name in steps[update][0]["parts"]},
            "passes_alone": alone,
            "forwards": steps[update][0]["forwards"],
        }
        if update == "after" and "after, 3 epochs" in steps:
            row["forwards_with_3_epochs"] = steps["after, 3 epochs"][0]["forwards"]
        rows.append(row)
    return rows


def model_flops(setting: str, update: str, options: argparse.Namespace) -> dict[str, float]:
    """FLOPs of the passes of a step by the cost model; generation is not among them."""
    return step_flops(
        shape_of(setting),
        PROMPT,
        completion_lengths(setting, options),
        update=update,
        rank=RANK * has_adapters(setting)[0],
        prm_rank=RANK * has_adapters(setting)[1],
        prm_layers=prm_layers(setting),
        micro_batch=prm_micro_batch(setting),
        checkpointing=options.checkpointing,
        prm_fused_head=False,  # one tile holds the logits of a micro-batch, and nothing is computed again
        causal=False,  # torch's CPU attention with a mask computes all pairs
    )


def measure_advantages(options: argparse.Namespace) -> list[dict[str, Any]]:
    child = Child(advantages_process, {}, options)
    child.ask()
    rounds = [child.ask() for _ in range(options.rounds)]
    child.stop()
    rows = []
    for found in zip(*rounds, strict=True):
        row = {name: found[0][name] for name in ("estimator", "process_gamma")}
        row |= {"tokens": [options.advantage_size] * 2, "threads": 1}
        rows.append(row | {name: statistics.median(one[name] for one in found) for name in ("seconds", "cpu")})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def steps_table(result: dict[str, Any]) -> str:
    """The markdown table of steps from the contents of `results/step.json`."""
    header = ["setting", "update", "generation", "GRPO", "PRIME", "time ratio (range)"]
    cells = [
        [
            row["setting"],
            row["update"],
            f"{row['generation_share']:.0%}",
            f"{row['grpo_seconds']:.2f} s",
            f"{row['prime_seconds']:.2f} s",
            f"{row['time_ratio']:.2f} ({row['time_ratio_min']:.2f} to {row['time_ratio_max']:.2f})",
            *(f"{row[name]:.2f}" for name in ("expected_ratio", "needed_over_grpo", "memory_ratio")),
        ]
        for row in result["rows"]
    ]
    return markdown_table([*header, "expected", "needed passes", "memory ratio"], cells)


def advantages_table(result: dict[str, Any]) -> str:
    """The markdown table of advantages from the contents of `results/step.json`."""
    cells = [[row["estimator"], f"{row['process_gamma']:g}", f"{row['seconds']:.2f}"] for row in result["advantages"]]
    return markdown_table(["estimator", "process_gamma", "seconds"], cells)


def shortfalls(result: dict[str, Any]) -> list[str]:
    """Sentences about rows that miss a goal."""
    found = []
    for row in result["rows"]:
        limits = {"memory_ratio": MEMORY_GOALS.get(row["kind"])}
        if row["update"] == "after":
            limits |= {"needed_ratio": NEEDED_GOAL, "time_ratio": TIME_GOALS.get(row["setting"])}
        for name, limit in limits.items():
            if limit is not None and row[name] > limit:
                found.append(f"{row['setting']}, {row['update']}: {name} {row[name]:.3f} is above {limit}")
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS[:8])
    arguments.add_argument("--threads", type=int, default=1, help="Threads of torch in each process.")
    arguments.add_argument(
        "--rows", type=int, default=8, help="Completions of a step in the settings that only train."
    )
    arguments.add_argument("--tokens", type=int, default=112, help="Tokens of each of them.")
    arguments.add_argument("--new-tokens", type=int, default=192, help="Tokens that are generated where they are.")
    arguments.add_argument("--advantage-size", type=int, default=4096, help="Completions, and tokens of each.")
    arguments.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Checkpoint activations, as is TRL's default.",
    )
    arguments.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds for wall-clock seconds: busy machines."
    )
    arguments.add_argument("--table", action="store_true", help="Print the tables of --out and measure nothing.")
    arguments.add_argument("--out", type=Path, default=RESULTS / "step.json")
    options = arguments.parse_args()
    if options.table:
        result = json.loads(options.out.read_text())
        print(steps_table(result), advantages_table(result), sep="\n\n")
        return
    # A process that has run torch on several threads must not be forked
    torch.set_num_threads(1)
    kept = {name: value for name, value in vars(options).items() if name not in ("out", "table")}
    result: dict[str, Any] = {
        "machine": machine("torch", "trl", "transformers", "peft"),
        "options": kept,
        "rows": [],
        "advantages": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for setting in options.settings:
            child = Child(base_process, {"setting": setting, "base": f"{folder}/base"}, options)
            child.answer()
            child.stop()
            found = rows_of(setting, measure(setting, folder, options), options)
            result["rows"] += found
            print(steps_table({"rows": found}), flush=True)
            write(result, options.out)
    result["advantages"] = measure_advantages(options)
    print(advantages_table(result), flush=True)
    for sentence in shortfalls(result):
        print(sentence, file=sys.stderr)
    write(result, options.out)


if __name__ == "__main__":
    main()
