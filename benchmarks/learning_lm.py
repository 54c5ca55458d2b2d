"""Does a real language model learn from fewer rollouts by PRIME than by outcome rewards alone?

SmolLM2-135M-Instruct on the built-in chains of arithmetic (`trl_prime/tasks/number_chains.py`), LoRA in bfloat16, 64 completions a
step, trained by TRL_METHODS and PRIME_METHODS. All start from one warmed-up base and see each problem once, so that the mean reward of
a step is an accuracy on problems that were not seen before.

    python benchmarks/learning_lm.py base                                         # the base, and its accuracy; about 12 minutes
    python benchmarks/learning_lm.py run --methods rloo --seeds 100 --rates 3e-4 1e-3    # tune on a seed of its own
    python benchmarks/learning_lm.py run --methods rloo "prime, calibrated" --seeds 0 1 2
    python benchmarks/learning_lm.py run --methods oracle --seeds 0                      # what a perfect PRM gains
    python benchmarks/learning_lm.py report

Runs are made one after the other, are kept in `--folder`, and go on from their last checkpoint where they were stopped; one that is
finished is not made again. `report` reads all that are there. Needs `pip install gguf`; OMP_NUM_THREADS sets the threads of a run.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS, draw_curves, machine, markdown_table, parser, write
from learning import COMMON, ORACLE
from learning import PRM as PRM_OF_SUMS

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BATCH_SIZE, NUM_GENERATIONS = 64, 4
MAX_COMPLETION_LENGTH = 64
TASK = {"num_steps": 6, "slip_rate": 0.2, "warm_up_steps": 60}
# Adapters of the policy and of the PRM are on so many of the last of 30 layers, which makes steps cheaper
POLICY_LAYERS, PRM_LAYERS = 10, 3
# The curve has means of so many steps: 320 completions of 80 problems, which leave an error of 3 points or more
WINDOW = 5
SHARED = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": BATCH_SIZE // 16,
    "num_generations": NUM_GENERATIONS,
    "max_completion_length": MAX_COMPLETION_LENGTH,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "loss_type": "dapo",
    "model_init_kwargs": {"dtype": "bfloat16"},
    "use_cpu": True,
    "bf16": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 5,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
# The settings that were chosen on the running sums, but for fewer replayed batches, because a pass of this PRM costs more, and a lower rate: at
# 1e-3 this PRM learned noise, and its AUC fell below that of the calibrated reference with which it begins
PRM = {**PRM_OF_SUMS, "prm_replay_steps": 2, "prm_micro_batch_size": 16, "prm_learning_rate": 1e-4}
# TRL's own GRPOTrainer. Unscaled, its advantages are those of RLOO but for the factor 3/4, which AdamW does not see
TRL_METHODS = {"rloo": {"scale_rewards": "none"}, "grpo": {}}
# Changes to `PRM`
PRIME_METHODS = {
    "oracle": {"prm_update": "none", **ORACLE},
    "prime": {},
    "prime, policy as reference": {"prm_reference": "policy"},
    "prime, calibrated": {"prm_reference_weight": "fitted", "prm_reference_centred": False},
    "prime, calibrated and centred": {"prm_reference_weight": "fitted"},
    "calibrated reference alone": {
        "prm_update": "none",
        "prm_reference_weight": "fitted",
        "prm_reference_centred": False,
    },
}
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "learning_lm.png"
# What is kept of the log of a step
KEPT = ("step", "reward", "entropy", "step_time", "completions/mean_length", "first_error_auc")


def first_wrong_token(prompt: str, token_texts: list[str]) -> int | None:
    """Index of the token at which a completion leaves the right one; None where it is right."""
    from trl_prime.tasks.number_chains import solve
    from trl_prime.tasks.task import STEP_DELIMITER

    truth, text = STEP_DELIMITER.join(solve(prompt)), "".join(token_texts)
    if text.removesuffix(STEP_DELIMITER) == truth:
        return None
    num_right, position = len(os.path.commonprefix([text, truth])), 0
    for i, token_text in enumerate(token_texts):
        position += len(token_text)
        if position > num_right:
            return i
    return len(token_texts) - 1  # it ended too early


def token_texts(rewards, tokenizer) -> list[list[str]]:
    """The tokens of each completion as text; those that end it are empty."""
    return [
        [tokenizer.decode(token, skip_special_tokens=True) for token in ids[mask].tolist()]
        for ids, mask in zip(rewards.completion_ids, rewards.completion_mask, strict=True)
    ]


def oracle_combination(rewards, tokenizer):
    """Advantages with -1 at the first wrong token as process reward."""
    import torch

    from trl_prime.process_rewards import normalize_process_rewards

    process_rewards = torch.zeros_like(rewards.process_rewards)
    for row, texts in enumerate(token_texts(rewards, tokenizer)):
        token = first_wrong_token(rewards.prompts[row], texts) if texts else None
        if token is not None:
            process_rewards[row, token] = -1.0
    gamma = rewards.settings["process_gamma"]
    process_rewards = normalize_process_rewards(process_rewards, rewards.completion_mask, "std", gamma=gamma)
    return rewards.combine(process_rewards=process_rewards, reward_mask=rewards.completion_mask)


def measured_combination(rewards, tokenizer, found: dict[str, float]):
    """Advantages as configured. The AUC of the process rewards for the first wrong step goes to `found`."""
    from trl_prime.evaluation.statistics import first_error_auc
    from trl_prime.process_rewards import split_steps
    from trl_prime.tasks.number_chains import step_labels
    from trl_prime.tasks.task import STEP_DELIMITER

    steps, truth = [], []
    for row, texts in enumerate(token_texts(rewards, tokenizer)):
        if texts:
            ids = split_steps(texts, STEP_DELIMITER)
            sums = [0.0] * (ids[-1] + 1)
            for step, reward in zip(ids, rewards.process_rewards[row, : len(ids)].tolist(), strict=True):
                sums[step] += reward
            steps.append(sums)
            truth.append(step_labels(rewards.prompts[row], "".join(texts)))
    found["first_error_auc"] = first_error_auc(steps, truth)
    return rewards.combine()


def make_task(folder: Path):
    from trl_prime.tasks.number_chains import prepare

    return prepare(folder / "base", **TASK)


def measure(model, tokenizer, task) -> dict[str, float]:
    """Accuracies on 256 held-out problems, greedy and of one sample."""
    from trl_prime.evaluation.held_out import measure_policy

    accuracies, *_ = measure_policy(
        model,
        tokenizer,
        task.eval_dataset,
        task.reward_funcs[0],
        max_new_tokens=MAX_COMPLETION_LENGTH,
        num_samples=1,
        batch_size=128,
    )
    return accuracies


def measure_base(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = make_task(folder)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16)
    write(measure(model, AutoTokenizer.from_pretrained(task.model), task), folder / "base.json")
    print((folder / "base.json").read_text())


def adapter(num_layers: int, num_adapted: int):
    """LoRA on all projections of the last layers."""
    from peft import LoraConfig

    from trl_prime.tasks.smollm2 import LORA

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = list(range(num_layers - num_adapted, num_layers))
    return LoraConfig(**{**LORA, "target_modules": modules, "layers_to_transform": layers})


def make_trainer(method: str, seed: int, rate: float, beta: float, steps: int, task, output_dir: Path):
    """The trainer of a method, and where its hook puts what it measures."""
    from transformers import AutoConfig, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from trl_prime import PRIMEConfig, PRIMETrainer

    shared = {**SHARED, "seed": seed, "max_steps": steps, "learning_rate": rate, "beta": beta}
    data = {"model": task.model, "reward_funcs": task.reward_funcs, "train_dataset": task.train_dataset}
    num_layers = AutoConfig.from_pretrained(task.model).num_hidden_layers
    data["peft_config"] = adapter(num_layers, POLICY_LAYERS)
    found: dict[str, float] = {}
    if method in TRL_METHODS:
        args = GRPOConfig(str(output_dir), **shared, **TRL_METHODS[method])
        trainer = GRPOTrainer(args=args, **data)
    else:
        args = PRIMEConfig(str(output_dir), **{**COMMON, **PRM, **shared, **PRIME_METHODS[method]})
        tokenizer = AutoTokenizer.from_pretrained(task.model)
        hook = functools.partial(measured_combination, tokenizer=tokenizer, found=found)
        if method == "oracle":
            hook = functools.partial(oracle_combination, tokenizer=tokenizer)
        prm = {"prm_peft_config": adapter(num_layers, PRM_LAYERS), "reward_combination": hook}
        trainer = PRIMETrainer(args=args, **prm, **data)
    # A frozen head that gets a slice of hidden states is copied by torch for each row, on a CPU: a quarter of a step
    head = trainer.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    return trainer, found


def train(method: str, seed: int, rate: float, beta: float, steps: int, folder: Path, output: Path) -> None:
    """Train once, from the last checkpoint if there is one; the log of all steps and the accuracies at the end."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint

    task, output_dir = make_task(folder), output.with_suffix("")
    trainer, found = make_trainer(method, seed, rate, beta, steps, task, output_dir)
    trainer.remove_callback(PrinterCallback)

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            state.log_history[-1].update(found)
            found.clear()
            words = {name: f"{value:.3f}" for name, value in state.log_history[-1].items() if name in KEPT}
            print(f"{method} {seed} {words}", file=sys.stderr, flush=True)

    trainer.add_callback(Keep())
    output_dir.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output_dir)) or False)
    seconds = time.perf_counter() - begin
    history = [
        {name: row[name] for name in row if name in KEPT or name.startswith("prm/")}
        for row in trainer.state.log_history
        if "reward" in row
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    run = {"method": method, "seed": seed, "rate": rate, "beta": beta, "steps": steps, "seconds": seconds}
    write({**run, "history": history, "end": measure(model, trainer.processing_class, task)}, output)
    shutil.rmtree(output_dir)


def windows(run: dict, name: str) -> list[float]:
    """Means of a logged value over `WINDOW` steps each; a step without the value is left out."""
    found = []
    for start in range(0, len(run["history"]), WINDOW):
        values = [row[name] for row in run["history"][start : start + WINDOW] if row.get(name) is not None]
        found.append(statistics.fmean(values) if values else float("nan"))
    return found


def steps_to(run: dict, accuracy: float) -> int | None:
    """The first step at which the mean reward of the last `WINDOW` steps reaches an accuracy; None if there is none."""
    rewards = [row["reward"] for row in run["history"]]
    ends = range(WINDOW, len(rewards) + 1)
    return next((end for end in ends if statistics.fmean(rewards[end - WINDOW : end]) >= accuracy), None)


def report_table(runs: list[dict]) -> str:
    """A row for each method with its rate and `beta`: medians over the seeds, the range of the last window, and steps to the best `rloo`'s."""
    groups: dict[tuple[str, float, float, int], list[dict]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["rate"], run["beta"], run["steps"]), []).append(run)
    finals = {key: statistics.median(windows(run, "reward")[-1] for run in group) for key, group in groups.items()}
    target = max((final for (method, *_), final in finals.items() if method == "rloo"), default=math.inf)
    rows = []
    for (method, rate, beta, steps), group in groups.items():
        needed = statistics.median(steps_to(run, target) or math.inf for run in group)
        first, last = ([windows(run, "reward")[end] for run in group] for end in (0, -1))
        means = [statistics.fmean(windows(run, "reward")) for run in group]
        ends = ", ".join(
            f"{statistics.median(run['end'][kind] for run in group):.1%}" for kind in ("greedy", "sampled")
        )
        auc = [windows(run, "first_error_auc") for run in group]
        auc_text = (
            ", ".join(f"{statistics.median(at):.2f}" for at in zip(*auc, strict=True)) if "prime" in method else ""
        )
        rows.append(
            [
                method,
                f"{rate:g}",
                f"{beta:g}",
                str(steps),
                ", ".join(str(run["seed"]) for run in group),
                f"{statistics.median(means):.1%}",
                f"{statistics.median(first):.1%}",
                f"{statistics.median(last):.1%} ({min(last):.1%} to {max(last):.1%})",
                "never" if needed == math.inf else f"{needed:g}",
                ends,
                auc_text,
                f"{statistics.median(run['seconds'] for run in group):.0f}",
            ]
        )
    header = ["method", "rate", "`beta`", "steps", "seeds", "mean reward", f"first {WINDOW}", f"last {WINDOW}"]
    header += ["steps to the last of rloo", "greedy, sampled at the end", f"AUC, by {WINDOW} steps", "seconds"]
    return markdown_table(header, rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("stage", choices=("base", "run", "report", "one"), help="'one' is what 'run' starts.")
    arguments.add_argument(
        "--methods", nargs="+", choices=[*TRL_METHODS, *PRIME_METHODS], default=["rloo", "prime, calibrated", "oracle"]
    )
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="Learning rates of the policy.")
    arguments.add_argument("--betas", type=float, nargs="+", default=[0.0], help="Weights of the policy's KL penalty.")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument(
        "--folder", type=Path, default=Path("runs/learning_lm"), help="Where base and runs are kept."
    )
    arguments.add_argument("--output", type=Path, default=RESULTS / "learning_lm.json")
    arguments.add_argument("--image", type=Path, default=IMAGE, help="Where the report draws its curves.")
    options = arguments.parse_args()
    if options.stage == "base":
        measure_base(options.folder)
    elif options.stage == "one":
        job = (options.methods[0], options.seeds[0], options.rates[0], options.betas[0])
        train(*job, options.steps, options.folder, options.output)
    elif options.stage == "run":
        jobs = itertools.product(options.seeds, options.rates, options.betas, options.methods)
        for seed, rate, beta, method in jobs:
            output = options.folder / "runs" / f"{method}-{seed}-{rate:g}-{beta:g}-{options.steps}.json"
            if not output.exists():
                words = ["--methods", method, f"--seeds={seed}", f"--rates={rate}", f"--betas={beta}"]
                words += [f"--steps={options.steps}", f"--folder={options.folder}", f"--output={output}"]
                # In a process of its own, which gives its memory back
                subprocess.run([sys.executable, __file__, "one", *words], check=True)
    else:
        runs = [json.loads(path.read_text()) for path in sorted((options.folder / "runs").glob("*.json"))]
        base = json.loads((options.folder / "base.json").read_text())
        varied = [name for name in ("rate", "beta", "steps") if len({run[name] for run in runs}) > 1]
        curves: dict[str, list[list[float]]] = {}
        for run in runs:
            label = ", ".join([run["method"], *(f"{name} {run[name]:g}" for name in varied)])
            curves.setdefault(label, []).append(windows(run, "reward"))
        draw_curves(curves, WINDOW, f"mean reward of {WINDOW} steps", options.image)
        print(f"base: greedy {base['greedy']:.1%}, sampled {base['sampled']:.1%}\n\n{report_table(runs)}")
        write({"machine": machine("torch", "trl", "transformers", "peft"), "base": base, "runs": runs}, options.output)


if __name__ == "__main__":
    main()
