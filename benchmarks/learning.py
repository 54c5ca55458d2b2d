"""Does PRIME learn from fewer rollouts than outcome rewards alone, and how much could a perfect PRM give?

On the built-in task at several lengths, judged by its last line (`sums-20`) or by every line (`chain-20`), and on a task of
reasoning-gym (`spell_backward`), from the same base model and with the same number of rollouts, trained by

- `rloo`: `PRIMETrainer` with outcome rewards only;
- `grpo`: TRL's own `GRPOTrainer`;
- `prime`: `PRIMETrainer`, its PRM learning from outcomes as it goes;
- `oracle`: `rloo` with a process reward of -1 at the first wrong step, which only these tasks can tell: the ceiling.

`tune` tries the same number of settings for each on seeds that are not reported, and keeps the one with the highest mean
accuracy over the run. `report` trains the reported seeds by those. `ablate` changes one thing of `prime` at a time, on the
first of these seeds. Every run is kept in `--folder`, and one that is there is not made again. The step ratio is the steps
that `rloo` needs to reach its final accuracy over those of another method.

    python benchmarks/learning.py tune --tasks chain-20
    python benchmarks/learning.py report --tasks chain-20
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import RESULTS, machine, markdown_table, parser, write

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101)
# Groups of four as in the paper: with groups of eight the PRM saw fewer prompts and learned less from them
BATCH_SIZE, NUM_GENERATIONS = 64, 4
STEPS_BETWEEN_MEASURES = 10
# Rise of the accuracy below which a run counts as one that did not learn; 256 problems leave an error of 0.03
LEARNT = 0.1
# Steps to these accuracies are counted too: the final accuracy of `rloo` lies on a plateau, where luck decides
TARGETS = (0.5, 0.8)
# Digits in a problem, how many of the 100 sums the base was taught wrong, and whether every line is judged or the last
TASKS = {
    "sums-20": (20, 17, "last"),
    "chain-10": (10, 30, "every"),
    "chain-20": (20, 17, "every"),
}
# The task of reasoning-gym is made by `reasoning_gym_task.py`
GYM_TASK = "spell_backward"
# Changes that `ablate` makes to the tuned `prime`. `start` and `hook` are no settings: the first names what the PRM is, or the model that
# it starts from, the second how rewards become advantages
ABLATIONS = {
    "as tuned": {},
    "no KL penalty": {"beta": 0.0},
    "no intercept": {"prm_loss_type": "ce", "prm_guess_rate": 0.0},
    "trust weighting": {"prm_trust_weighting": True},
    "no replay": {"prm_replay_batches": 0, "prm_replay_steps": None},
    "update after": {"prm_update": "after"},
    "reference: the policy": {"prm_reference": "policy"},
    "PRM: adapter of all layers": {"start": "all layers"},
    "PRM: all weights": {"start": "full", "prm_learning_rate": 1e-4},
    "PRM from random weights": {"start": "random"},
    "PRM from an offline one": {"start": "offline"},
    "PRM offline, not updated": {"start": "offline", "prm_update": "none"},
    "filter 0.2 to 0.8": {"accuracy_low": 0.2, "accuracy_high": 0.8},
    "no guess rate": {"prm_guess_rate": 0.0},
    "calibrated reference, plain": {"prm_reference_weight": "fitted", "prm_reference_centred": False},
    "calibrated reference": {"prm_reference_weight": "fitted"},
    "min form": {"hook": "min form"},
    "masked step": {"hook": "masked step"},
    "loss dpo": {"prm_loss_type": "dpo", "prm_guess_rate": 0.0},
    "estimator grpo": {"advantage_estimator": "grpo"},
    "estimator reinforce": {"advantage_estimator": "reinforce"},
    # The value model is a copy of the whole policy, and so learns at the policy's rate
    "estimator gae": {"advantage_estimator": "gae", "value_learning_rate": 4e-4, "value_num_epochs": 4},
    "reward-to-go": {"process_gamma": 1.0},
    "scaled to the spread": {"process_reward_norm": "std"},
}
NUM_ABLATION_SEEDS = 3
# The offline PRM learns from as many completions of the base as this number of rollout batches has
OFFLINE_BATCHES = 20
# Values of each step that a run keeps
LOGGED = ("entropy", "prm/reference_weight")
# The final PRM chooses among this number of samples of a problem
BEST_OF = 16
# Every method has as many settings; `beta` is the weight of TRL's KL penalty
RATES = (1e-4, 2e-4, 4e-4)
KL_GRID = [{"learning_rate": rate, "beta": beta} for rate, beta in itertools.product(RATES, (0.0, 0.1))]
GRIDS = {
    "rloo": KL_GRID,
    "grpo": KL_GRID,
    "oracle": KL_GRID,
    "prime": [
        {"learning_rate": rate, "beta": beta, "process_weight": beta}
        for rate, beta in itertools.product(RATES, (0.3, 1.0))
    ],
}
# Fewer than one completion in five is right at the start: the paper's band would drop most groups
COMMON = {"accuracy_low": 0.0, "accuracy_high": 1.0}
# Process rewards are taken as they are, in log-odds, from the first step on: a PRM that knows nothing gives small ones
PRM = {
    "process_gamma": 0.0,
    "process_reward_norm": "none",
    "prm_trust_weighting": False,
    "prm_update": "before",
    "prm_beta": 0.5,
    "prm_learning_rate": 1e-3,
    "prm_loss_type": "calibrated_ce",
    "prm_replay_batches": 64,
    "prm_replay_steps": 6,
}
# These settings differ by task: where the last line is judged, one wrong chain in ten ends on the right digit
PRM_BY_TASK = {"sums-20": {"prm_guess_rate": 0.1, "prm_learning_rate": 3e-3}}
# The adapter is on the last of the three layers. A whole model learns the few prompts of a batch by heart
PRM_ADAPTER = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "layers_to_transform": [2],
}
# In log-odds: rewards that are lower by so much than others have e times the weight
MIN_FORM_TEMPERATURE = 0.1
# Its rewards are right from the start and say at which token, so it needs neither trust nor reward-to-go
ORACLE = {"process_gamma": 0.0, "process_weight": 3.0, "prm_trust_weighting": False}


def first_wrong_token(task, prompt: str, completion: str) -> int | None:
    """Index of the first token of the first wrong step; in all tasks one character is one token."""
    from trl_prime.tasks.task import STEP_DELIMITER

    step = next((i for i, right in enumerate(task.step_labels(prompt, completion)) if not right), None)
    if step is None or task.name == GYM_TASK:
        return step
    return sum(len(line) + 1 for line in completion.split(STEP_DELIMITER)[:step])


def oracle_combination(rewards, task):
    """Advantages with -1 at the first wrong token as process reward."""
    import torch

    from trl_prime.process_rewards import normalize_process_rewards

    process_rewards = torch.zeros_like(rewards.process_rewards)
    for row, (prompt, completion) in enumerate(zip(rewards.prompts, rewards.completions, strict=True)):
        token = first_wrong_token(task, prompt, completion)
        if token is not None:
            process_rewards[row, token] = -1.0
    process_rewards = process_rewards * rewards.completion_mask
    gamma = rewards.settings["process_gamma"]
    process_rewards = normalize_process_rewards(process_rewards, rewards.completion_mask, "std", gamma=gamma)
    return rewards.combine(process_rewards=process_rewards, reward_mask=rewards.completion_mask)


def min_form_combination(rewards):
    """Advantages whose process rewards are weighted by `softmax(-r / T)` over a completion (PURE, arXiv 2504.15275)."""
    mask = rewards.completion_mask
    shares = (-rewards.process_rewards / MIN_FORM_TEMPERATURE).masked_fill(~mask, -math.inf).softmax(-1)
    # A row without tokens has no softmax
    return rewards.combine(process_rewards=(shares * rewards.process_rewards).masked_fill(~mask, 0.0))


def masked_step_combination(rewards):
    """
    Advantages whose process term is the process reward collected up to a token, less the mean of that over the completions of the
    group that have a token there (SPRO, arXiv 2507.01551).
    """
    import torch

    from trl_prime.advantages import add_terms, advantage_terms

    settings = {name: value for name, value in rewards.settings.items() if name != "whiten"}
    outcomes, active = rewards.outcome_rewards, rewards.completion_mask
    outcome_term, _, active = advantage_terms(
        outcomes, torch.zeros_like(rewards.process_rewards), active, rewards.num_generations, **settings
    )
    collected = (rewards.process_rewards * active).cumsum(-1) * active
    grouped = (rewards.num_generations, active.shape[1])
    count = active.view(-1, *grouped).sum(1).clamp(min=1)
    baseline = (collected.view(-1, *grouped).sum(1) / count).repeat_interleave(rewards.num_generations, dim=0)
    process_term = settings["process_weight"] * (collected - baseline) * active
    return add_terms(outcome_term, process_term, active, whiten=rewards.settings["whiten"])


# What the setting `hook` of an ablation names
HOOKS = {"min form": min_form_combination, "masked step": masked_step_combination}


def make_task(name: str, seed: int, folder: Path):
    """Base model, problems and reward, and the longest completion in tokens."""
    from trl_prime.tasks.running_sums import every_sum_reward, prepare

    if name == GYM_TASK:
        from reasoning_gym_task import prepare_reasoning_gym

        return prepare_reasoning_gym(folder / f"base-{name}-{seed}", seed)
    num_digits, num_wrong_sums, judged = TASKS[name]
    task = prepare(
        folder / f"base-{num_digits}-{num_wrong_sums}-{seed}",
        seed=seed,
        num_digits=num_digits,
        num_wrong_sums=num_wrong_sums,
        # A longer chain is learned later: some seeds have not begun to learn 20 digits after 200 steps
        warm_up_steps=20 * num_digits,
    )
    if judged == "every":
        task = dataclasses.replace(task, reward_funcs=[every_sum_reward])
    return task, 2 * num_digits + 2


def base_samples(task, num_samples: int, problems, max_completion_length: int):
    """The problems, each `num_samples` times; a completion of the base for each; and their outcomes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_prime.evaluation.held_out import generate, outcomes

    model, tokenizer = AutoModelForCausalLM.from_pretrained(task.model), AutoTokenizer.from_pretrained(task.model)
    rows = problems.select([row for row in range(len(problems)) for _ in range(num_samples)])
    completions = generate(
        model, tokenizer, rows["prompt"][:], max_new_tokens=max_completion_length, temperature=1.0, batch_size=256
    )
    return rows, completions, outcomes(task.reward_funcs[0], rows, completions)


def offline_prm(task, seed: int, max_completion_length: int, output_dir: str):
    """A PRM trained on outcomes of the base alone: as many completions as `OFFLINE_BATCHES` rollout batches have."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback

    from trl_prime import OfflinePRMConfig, OfflinePRMTrainer

    num_prompts = OFFLINE_BATCHES * BATCH_SIZE // NUM_GENERATIONS
    problems = task.train_dataset.select(range(len(task.train_dataset) - num_prompts, len(task.train_dataset)))
    rows, completions, rewards = base_samples(task, NUM_GENERATIONS, problems, max_completion_length)
    data = Dataset.from_dict(
        {"prompt": rows["prompt"][:], "completion": completions, "label": (rewards > 0.5).tolist()}
    )
    args = OfflinePRMConfig(
        output_dir,
        seed=seed,
        beta=PRM["prm_beta"],
        learning_rate=PRM["prm_learning_rate"],
        # Online training takes as many optimizer steps on as many batches
        max_steps=OFFLINE_BATCHES * (1 + PRM["prm_replay_steps"]),
        per_device_train_batch_size=BATCH_SIZE,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = OfflinePRMTrainer(task.model, args, data, peft_config=LoraConfig(**PRM_ADAPTER))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.implicit_prm


def choose(prm, task, max_completion_length: int) -> dict[str, float]:
    """Accuracy on held-out problems of one sample of the base, of the vote of many, and of the one that the PRM prefers."""
    import numpy as np

    from trl_prime.evaluation.statistics import best_of_n, draws, group_answers, vote

    rows, completions, rewards = base_samples(task, BEST_OF, task.eval_dataset, max_completion_length)
    correct = rewards.nan_to_num().view(-1, BEST_OF).numpy()
    scores = np.array([scored.reward for scored in prm.score(rows["prompt"][:], completions)]).reshape(-1, BEST_OF)
    texts = np.array(completions, dtype=object).reshape(-1, BEST_OF).tolist()
    groups = group_answers(texts, lambda pairs: [False] * len(pairs))
    return {
        "mean": float(correct.mean()),
        "majority": float(vote(groups, correct, draws(BEST_OF, BEST_OF)).mean()),
        "best": float(best_of_n(scores, correct, BEST_OF).mean()),
    }


def scoring_prm(trainer):
    """The PRM of a trainer, measured against the policy as it is now where it has no reference of its own."""
    from trl_prime import ImplicitPRM

    prm = trainer.implicit_prm
    if prm.reference is not None:
        return prm
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return ImplicitPRM(prm.model, policy, prm.tokenizer, beta=prm.beta, step_delimiter=prm.step_delimiter)


def step_auc(prm, task, problems, completions: list[str]) -> float:
    """AUC of the PRM's rewards for the first wrong step."""
    from trl_prime.evaluation.statistics import first_error_auc

    prompts = problems["prompt"][:]
    truth = [task.step_labels(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    scored = prm.score(prompts, completions)
    steps = [each.token_rewards if task.name == GYM_TASK else each.step_rewards for each in scored]
    return first_error_auc(steps, truth)


def train(method: str, task_name: str, seed: int, settings: dict, steps: int, folder: Path) -> dict:
    """Train once, measuring on held-out problems as it goes; the curve and the settings."""
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from trl_prime import PRIMEConfig, PRIMETrainer
    from trl_prime.evaluation.held_out import measure_policy
    from trl_prime.tasks.tiny_model import build_model

    torch.set_num_threads(1)
    task, max_completion_length = make_task(task_name, seed, folder)
    config = dict(settings)
    prm_start = config.pop("start", "policy")
    hook = HOOKS.get(config.pop("hook", None))
    shared = {
        "seed": seed,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": max_completion_length,
        "lr_scheduler_type": "constant",
        "loss_type": "dapo",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **config,
    }
    output_dir = str(folder / "trainer")
    data = {"model": task.model, "reward_funcs": task.reward_funcs, "train_dataset": task.train_dataset}
    if method == "grpo":
        trainer = GRPOTrainer(args=GRPOConfig(output_dir, **shared), **data)
    elif method == "prime":
        args = PRIMEConfig(output_dir, **{**COMMON, **PRM, **PRM_BY_TASK.get(task_name, {}), **shared})
        if prm_start == "policy":
            prm = {"prm_peft_config": LoraConfig(**PRM_ADAPTER)}
        elif prm_start == "all layers":
            prm = {"prm_peft_config": LoraConfig(**{**PRM_ADAPTER, "layers_to_transform": None})}
        elif prm_start == "full":
            prm = {}
        elif prm_start == "random":
            # Random weights need no adapter, which would keep them
            prm = {"prm_model": build_model(AutoTokenizer.from_pretrained(task.model), seed=seed + 1)}
        else:
            prm = {"prm_model": offline_prm(task, seed, max_completion_length, output_dir)}
        trainer = PRIMETrainer(args=args, reward_combination=hook, **prm, **data)
    else:
        fixed = {"process_weight": 0.0} if method == "rloo" else ORACLE
        args = PRIMEConfig(output_dir, **{**COMMON, "prm_update": "none", **fixed, **shared})
        hook = functools.partial(oracle_combination, task=task) if method == "oracle" else None
        trainer = PRIMETrainer(args=args, reward_combination=hook, **data)
    trainer.remove_callback(PrinterCallback)
    curve: list[dict] = []
    measuring = 0.0

    class Measure(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.measure(0)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % STEPS_BETWEEN_MEASURES == 0:
                self.measure(state.global_step)

        def measure(self, step: int) -> None:
            nonlocal measuring
            begin = time.perf_counter()
            accuracies, problems, samples, _ = measure_policy(
                trainer.accelerator.unwrap_model(trainer.model),
                trainer.processing_class,
                task.eval_dataset,
                task.reward_funcs[0],
                max_new_tokens=max_completion_length,
                num_samples=1,
                batch_size=256,
                seed=step,
            )
            if method == "prime":
                accuracies["first_error_auc"] = step_auc(scoring_prm(trainer), task, problems, samples)
            measuring += time.perf_counter() - begin
            seconds = time.perf_counter() - start - measuring
            curve.append({"step": step, "completions": step * BATCH_SIZE, "seconds": round(seconds, 1), **accuracies})

    trainer.add_callback(Measure())
    start = time.perf_counter()
    trainer.train()
    run = {
        "task": task_name,
        "method": method,
        "seed": seed,
        "settings": settings,
        "steps": steps,
        "curve": curve,
        "logged": {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in LOGGED},
    }
    if method == "prime":
        run["best_of_n"] = choose(scoring_prm(trainer), task, max_completion_length)
    return run


def final_accuracy(run: dict) -> float:
    """Mean sampled accuracy of the last three measures."""
    return statistics.fmean(point["sampled"] for point in run["curve"][-3:])


def mean_accuracy(run: dict) -> float:
    return statistics.fmean(point["sampled"] for point in run["curve"])


def steps_to_reach(run: dict, accuracy: float) -> float | None:
    """First step, by linear interpolation, at which the sampled accuracy is reached; None if it is not."""
    if run["curve"][0]["sampled"] >= accuracy:
        return 0.0
    for before, after in itertools.pairwise(run["curve"]):
        if after["sampled"] >= accuracy:
            share = (accuracy - before["sampled"]) / (after["sampled"] - before["sampled"])
            return before["step"] + share * (after["step"] - before["step"])
    return None


def median_steps(runs: list[dict], accuracy: float) -> float | None:
    """Median steps to an accuracy; None where more than half of the runs do not reach it."""
    steps = [steps_to_reach(run, accuracy) for run in runs]
    median = statistics.median(math.inf if number is None else number for number in steps)
    return median if median < math.inf else None


def step_ratio(rloo: dict, other: dict) -> float | None:
    """Steps of outcome rewards alone over steps of the other, to the final accuracy of the former.

    A method that does not get there counts with all its steps, so that the ratio is then too high. None where outcome
    rewards alone did not learn: any method is at such a target from the start.
    """
    target = final_accuracy(rloo)
    if target - rloo["curve"][0]["sampled"] < LEARNT:
        return None
    steps = steps_to_reach(other, target)
    return (steps_to_reach(rloo, target) or rloo["steps"]) / max(other["steps"] if steps is None else steps, 1.0)


def interval(values: list[float], num_draws: int = 10_000) -> list[float]:
    """95 % bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(num_draws))
    return [medians[int(0.025 * num_draws)], medians[int(0.975 * num_draws)]]


def run_all(jobs: list[tuple[str, str, int, dict]], options: argparse.Namespace) -> list[dict]:
    """Make the runs that are not there yet, each in a process of its own; all of them, in order."""

    def path_of(job) -> Path:
        method, task, seed, settings = job
        text = "-".join(f"{name}={value}" for name, value in sorted(settings.items()))
        return options.folder / f"{task}-{method}-{seed}-{options.steps}-{text}.json"

    def one(job) -> None:
        path = path_of(job)
        if path.exists():
            return
        method, task, seed, settings = job
        command = [sys.executable, __file__, "one", "--job", json.dumps(job), "--output", str(path)]
        command += ["--steps", str(options.steps), "--folder", str(options.folder)]
        result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{method} {task} {seed} {settings} failed:\n{result.stderr[-3000:]}")
        run = json.loads(path.read_text())
        print(
            f"{method:<6} {task}  seed {seed}  {settings}  mean {mean_accuracy(run):.3f}  "
            f"final {final_accuracy(run):.3f}  {run['curve'][-1]['seconds']:.0f} s",
            flush=True,
        )

    options.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.workers) as pool:
        # The first run that needs a base model makes it; no two make the same at once
        first = {(job[1], job[2]): job for job in reversed(jobs)}.values()
        list(pool.map(one, first))
        list(pool.map(one, jobs))
    return [json.loads(path_of(job).read_text()) for job in jobs]


def tune(options: argparse.Namespace) -> dict[str, dict[str, dict]]:
    """Settings with the highest mean accuracy on the tuning seeds, by task and method."""
    jobs = [
        (method, task, seed, settings)
        for task in options.tasks
        for method in options.methods
        for settings in GRIDS[method]
        for seed in TUNING_SEEDS[: options.tuning_seeds]
    ]
    found: dict[tuple, list[dict]] = {}
    for (method, task, _, settings), run in zip(jobs, run_all(jobs, options), strict=True):
        found.setdefault((task, method, json.dumps(settings)), []).append(run)
    tuning: dict[str, dict[str, dict]] = {}
    for (task, method, settings), runs in found.items():
        entry = tuning.setdefault(task, {}).setdefault(method, {"tried": []})
        entry["tried"].append(
            {
                "settings": json.loads(settings),
                "mean_accuracy": statistics.fmean(mean_accuracy(run) for run in runs),
                "curves": [run["curve"] for run in runs],
            }
        )
    for methods in tuning.values():
        for entry in methods.values():
            entry["best"] = max(entry["tried"], key=lambda tried: tried["mean_accuracy"])["settings"]
    return tuning


def report(tuning: dict, options: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """A row for each task, and all runs."""
    jobs = [
        (method, task, seed, tuning[task][method]["best"])
        for task in options.tasks
        for seed in options.seeds
        for method in options.methods
    ]
    runs = run_all(jobs, options)
    rows = []
    for task in options.tasks:
        of = {
            method: [run for job, run in zip(jobs, runs, strict=True) if job[:2] == (method, task)]
            for method in options.methods
        }
        row = {"task": task, "seeds": len(options.seeds)}
        for method, group in of.items():
            finals = [final_accuracy(run) for run in group]
            row[f"final_{method}"] = statistics.median(finals)
            row[f"final_{method}_interval"] = interval(finals)
            row[f"mean_{method}"] = statistics.median(map(mean_accuracy, group))
            row[f"steps_{method}"] = [median_steps(group, target) for target in TARGETS]
            row[f"seconds_{method}"] = statistics.median(run["curve"][-1]["seconds"] for run in group)
            if method == "prime":
                row["first_error_auc"] = [
                    statistics.median(run["curve"][i]["first_error_auc"] for run in group)
                    for i in range(len(group[0]["curve"]))
                ]
                row["best_of_n"] = {
                    name: statistics.fmean(run["best_of_n"][name] for run in group)
                    for name in ("mean", "majority", "best")
                }
            if method != "rloo":
                pairs = [
                    (rloo, run)
                    for rloo, run in zip(of["rloo"], group, strict=True)
                    if step_ratio(rloo, run) is not None
                ]
                ratios = [step_ratio(rloo, run) for rloo, run in pairs]
                row["seeds_compared"] = len(pairs)
                name = "step_ratio" if method == "prime" else f"step_ratio_{method}"
                row[name] = statistics.median(ratios) if ratios else None
                row["interval" if method == "prime" else f"{name}_interval"] = interval(ratios) if ratios else None
                row[f"reached_{method}"] = sum(
                    steps_to_reach(run, final_accuracy(rloo)) is not None for rloo, run in pairs
                )
        rows.append(row)
    return rows, runs


def ablate(tuning: dict, options: argparse.Namespace) -> dict[str, list[dict]]:
    """A row for each ablation, by task: means over the seeds, and the range of the final accuracy."""
    seeds = options.seeds[:NUM_ABLATION_SEEDS]
    jobs = [
        ("prime", task, seed, {**tuning[task]["prime"]["best"], **ABLATIONS[name]})
        for task in options.tasks
        for name in options.ablations
        for seed in seeds
    ]
    runs = iter(run_all(jobs, options))
    rows: dict[str, list[dict]] = {}
    for task in options.tasks:
        for name in options.ablations:
            group = list(itertools.islice(runs, len(seeds)))
            finals = [final_accuracy(run) for run in group]
            rows.setdefault(task, []).append(
                {
                    "changed": name,
                    "settings": ABLATIONS[name],
                    "seeds": len(seeds),
                    "mean": statistics.fmean(map(mean_accuracy, group)),
                    "final": statistics.fmean(finals),
                    "final_range": [min(finals), max(finals)],
                    "first_error_auc": [
                        statistics.fmean(run["curve"][i]["first_error_auc"] for run in group)
                        for i in (1, len(group[0]["curve"]) // 2, -1)
                    ],
                    "curves": [run["curve"] for run in group],
                }
            )
    return rows


def ablation_table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        low, high = row["final_range"]
        auc = ", ".join(f"{value:.2f}" for value in row["first_error_auc"])
        cells.append([row["changed"], f"{row['mean']:.1%}", f"{row['final']:.1%} ({low:.1%} to {high:.1%})", auc])
    return markdown_table(["changed", "mean over the run", "final accuracy", "AUC of the PRM"], cells)


def draw(runs: list[dict], path: Path) -> None:
    """Median held-out accuracy over the steps, and the range of all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(run["task"] for run in runs))
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(5 * len(tasks), 7), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for (row, kind), (column, task) in itertools.product(enumerate(("sampled", "greedy")), enumerate(tasks)):
        axis = axes[row][column]
        for number, method in enumerate(GRIDS):
            curves = [run["curve"] for run in runs if run["task"] == task and run["method"] == method]
            if curves:
                steps = [point["step"] for point in curves[0]]
                values = [[curve[i][kind] for curve in curves] for i in range(len(steps))]
                color = f"C{number}"  # the same for a method in all panels
                axis.plot(steps, [statistics.median(at) for at in values], color, label=method)
                low, high = ([end(at) for at in values] for end in (min, max))
                axis.fill_between(steps, low, high, color=color, alpha=0.15)
        axis.set(title=f"{task}, {kind}", xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
        axis.legend()
    figure.savefig(path, dpi=110)


def table(rows: list[dict]) -> str:
    targets = [f"steps to {target:.0%}" for target in TARGETS]
    header = [
        "task",
        "method",
        "mean accuracy",
        "final accuracy",
        *targets,
        "steps, RLOO / method",
        "reached",
        "seconds",
    ]
    cells = []
    for row in rows:
        for method in GRIDS:
            if f"final_{method}" not in row:
                continue
            low, high = row[f"final_{method}_interval"]
            ratio, reached = "1", ""
            if method != "rloo":
                name = "step_ratio" if method == "prime" else f"step_ratio_{method}"
                ends = row["interval" if method == "prime" else f"{name}_interval"]
                ratio = f"{row[name]:.2f} ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "RLOO did not learn"
                reached = f"{row[f'reached_{method}']} of {row['seeds_compared']}"
            steps = ["never" if number is None else f"{number:.0f}" for number in row[f"steps_{method}"]]
            final = f"{row[f'final_{method}']:.1%} ({low:.1%} to {high:.1%})"
            seconds = f"{row[f'seconds_{method}']:.0f}"
            cells.append([row["task"], method, f"{row[f'mean_{method}']:.1%}", final, *steps, ratio, reached, seconds])
    return markdown_table(header, cells)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "stage", choices=("tune", "report", "ablate", "one"), help="'one' is what the others start."
    )
    arguments.add_argument("--tasks", nargs="+", choices=[*TASKS, GYM_TASK], default=["chain-20"])
    arguments.add_argument("--methods", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    arguments.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments.add_argument(
        "--tuning-seeds", type=int, choices=(1, 2), default=2, help="How many seeds each setting is tried on."
    )
    arguments.add_argument("--ablations", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--workers", type=int, default=2, help="Runs at a time, of one thread each.")
    arguments.add_argument("--folder", type=Path, default=Path("runs/learning"), help="Where bases and runs are kept.")
    arguments.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments.add_argument("--output", type=Path, default=RESULTS / "learning.json")
    options = arguments.parse_args()
    if options.stage == "one":
        method, task, seed, settings = options.job
        run = train(method, task, seed, settings, options.steps, options.folder)
        # The file appears whole or not at all, since a run that is there is not made again
        draft = options.output.with_suffix(".part")
        draft.write_text(json.dumps(run))
        draft.replace(options.output)
        return
    result = json.loads(options.output.read_text()) if options.output.exists() else {"tuning": {}, "rows": []}
    if options.stage == "tune":
        for task, methods in tune(options).items():
            result["tuning"].setdefault(task, {}).update(methods)
            for method, entry in methods.items():
                print(f"{task}  {method:<6} {entry['best']}")
    else:
        if tuned_on := set(options.seeds) & set(TUNING_SEEDS):
            arguments.error(f"--seeds holds {sorted(tuned_on)}, by which the settings were chosen: report other seeds")
        if options.stage == "ablate":
            options.methods = ["prime"]
        elif "rloo" not in options.methods:
            arguments.error("--methods must hold rloo, which the others are compared with")
        for task, method in itertools.product(options.tasks, options.methods):
            if method not in result["tuning"].get(task, {}):
                arguments.error(f"{options.output} holds no settings for {method} and {task}: run 'tune' first")
        if options.stage == "ablate":
            kept = result.setdefault("ablations", {})
            for task, rows in ablate(result["tuning"], options).items():
                # Rows of other ablations stay
                kept[task] = rows + [row for row in kept.get(task, []) if row["changed"] not in options.ablations]
                print(f"{task}\n{ablation_table(rows)}")
        else:
            rows, runs = report(result["tuning"], options)
            # Rows and runs of other tasks stay
            for name, new in (("rows", rows), ("runs", runs)):
                result[name] = [old for old in result.get(name, []) if old["task"] not in options.tasks] + new
            draw(result["runs"], options.output.with_suffix(".png"))
            print(table(result["rows"]))
    # The machine of the first call stays beside its results
    write({"machine": machine("torch", "trl", "transformers", "peft"), **result}, options.output, indent=None)


if __name__ == "__main__":
    main()
