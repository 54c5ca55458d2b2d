"""`trl-prime train`: train by a recipe.

`trl-prime train --config recipes/quickstart.yaml [--any_field value]`. A recipe holds fields of `PRIMEConfig`, of TRL's
`ModelConfig` and of `PRIMEScriptArguments`; any of them can be given as a flag, which wins.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl import ScriptArguments

from ..prime_config import SETTINGS_NAME, nearest
from .arguments import parse_arguments

TASKS = {
    "running_sums": "trl_prime.data.running_sums.prepare",
    "word_problems": "trl_prime.data.word_problems.prepare",
}


@dataclass
class PRIMEScriptArguments(ScriptArguments):
    """
    What a recipe says beside [`PRIMEConfig`] and [`~trl.ModelConfig`].

    Parameters:
        task (`str`, *optional*): A task that makes its own model, data and reward: `"running_sums"`, `"word_problems"`, or
            the dotted path of a function that returns a [`~trl_prime.data.task.Task`]. Replaces the model and data set.
        task_kwargs (`dict`, *optional*): Arguments of the task.
        dataset_format (`str`, *optional*): How the rows of `dataset_name` are adapted: a key of
            [`~trl_prime.data.formats.DATASET_FORMATS`], with options if need be, `gsm8k(question='problem')`. Not given,
            the data set has a `prompt` and what the rewards read. `dataset_name` may be a local file or folder.
        system_prompt (`str`, *optional*): System prompt of every row; replaces the one that is there.
        prompt_suffix (`str`, *optional*): Appended to every prompt: `"math"` or `"code"`, the paper's, or a text.
        on_malformed_row (`str`): `"raise"`, or `"skip"` to leave out rows that cannot be adapted.
        reward_funcs (`list[str]`, *optional*): Outcome rewards: `"math"`, `"code"`, `"verifier"` (math or code, by the
            row), TRL's names or dotted paths, with options if need be, `code(timeout=10)`.
        reward_combination (`str`, *optional*): Dotted path of a hook that computes the advantages.
        prm_model_name_or_path (`str`, *optional*): Start of the implicit PRM; the policy's own start if not given.
        prm_use_peft (`bool`): Train the PRM as a LoRA adapter.
        prm_lora_r, prm_lora_alpha (`int`): Rank and scale of that adapter.
        prm_lora_target_modules (`list[str]`, *optional*): Its layers; those of the policy's adapter, or all linear ones.
        eval_samples (`int`): Sampled completions per held-out problem, before and after, of a task.
    """

    task: str | None = field(
        default=None,
        metadata={"help": f"A task with its own model, data and reward: {', '.join(TASKS)}, or a dotted path."},
    )
    task_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Arguments of the task (JSON)."})
    dataset_format: str | None = field(
        default=None,
        metadata={
            "help": "How the rows of dataset_name (Hub, local file or folder) are adapted: eurus2_rl, gsm8k, math, math500, "
            "question_answer, humaneval, mbpp or reasoning_gym, with options if need be: gsm8k(question='problem'). "
            "Not given, the data set has a prompt and what the rewards read."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System prompt of every row; replaces the one that is there."}
    )
    prompt_suffix: str | None = field(
        default=None, metadata={"help": "Appended to every prompt: 'math' or 'code', the paper's, or a text."}
    )
    on_malformed_row: str = field(
        default="raise",
        metadata={
            "help": "'raise', or 'skip' to leave out rows that cannot be adapted.",
            "choices": ["raise", "skip"],
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Outcome rewards: math, code, verifier (math or code, by the row), names of TRL's reward functions, or "
            "dotted paths; with options if need be: code(timeout=10)."
        },
    )
    reward_combination: str | None = field(
        default=None, metadata={"help": "Dotted path of a hook that computes the advantages."}
    )
    prm_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Start of the implicit PRM. Defaults to the policy's own start."}
    )
    prm_use_peft: bool = field(default=False, metadata={"help": "Train the PRM as a LoRA adapter."})
    prm_lora_r: int = field(default=16, metadata={"help": "Rank of the PRM's adapter."})
    prm_lora_alpha: int = field(default=32, metadata={"help": "Scale of the PRM's adapter."})
    prm_lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers of the PRM's adapter. Defaults to those of the policy's, or all linear layers."},
    )
    eval_samples: int = field(
        default=4, metadata={"help": "Sampled completions per held-out problem of a task, before and after training."}
    )

    def __post_init__(self):
        if isinstance(self.task_kwargs, str):
            self.task_kwargs = json.loads(self.task_kwargs)


def parse_train_arguments(argv: list[str]) -> tuple[PRIMEScriptArguments, Any, Any]:
    """
    The recipe and the flags as dataclasses: script arguments, [`PRIMEConfig`] and [`~trl.ModelConfig`].

    Raises:
        ValueError: The recipe has a field that does not exist; the message names the nearest.
    """
    from trl import ModelConfig

    from ..prime_config import PRIMEConfig

    return parse_arguments([PRIMEScriptArguments, PRIMEConfig, ModelConfig], argv, prog="trl-prime train")


def run(argv: list[str]) -> int:
    """Train by a recipe; the exit code."""
    script_args, args, model_args = parse_train_arguments(argv)

    from peft import LoraConfig
    from trl import get_peft_config, get_quantization_config

    from ..evaluation.progress import PRIME_METRICS, MetricsProgressCallback, plot_learning_curve, print_summary
    from ..prime_trainer import PRIMETrainer
    from ..rewards import load_object, load_reward_func

    output_dir = Path(args.output_dir)
    task = None
    if script_args.task:
        if script_args.task not in TASKS and "." not in script_args.task:
            raise ValueError(f"task is {script_args.task!r}, which is unknown. {nearest(script_args.task, TASKS)}")
        prepare = load_object(TASKS.get(script_args.task, script_args.task))
        print(f"Preparing the task '{script_args.task}' ...", flush=True)
        with args.main_process_first(desc="preparing the task"):
            task = prepare(output_dir, seed=args.seed, **(script_args.task_kwargs or {}))
        model, train_dataset, eval_dataset = task.model, task.train_dataset, task.eval_dataset
    elif script_args.dataset_name and model_args.model_name_or_path:
        model = model_args.model_name_or_path
        with args.main_process_first(desc="loading the data set"):
            train_dataset = _load_split(script_args, script_args.dataset_train_split)
            eval_dataset = None
            if args.eval_strategy != "no":
                eval_dataset = _load_split(script_args, script_args.dataset_test_split)
    else:
        raise ValueError("Give either `task`, or `model_name_or_path` and `dataset_name`.")
    reward_funcs = [load_reward_func(name) for name in script_args.reward_funcs or []]
    if not reward_funcs and task:
        reward_funcs = list(task.reward_funcs)
    prm_peft_config = None
    if script_args.prm_use_peft:
        prm_peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=script_args.prm_lora_r,
            lora_alpha=script_args.prm_lora_alpha,
            target_modules=script_args.prm_lora_target_modules or model_args.lora_target_modules or "all-linear",
        )
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }

    trainer = PRIMETrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        prm_model=script_args.prm_model_name_or_path,
        prm_peft_config=prm_peft_config,
        reward_combination=load_object(script_args.reward_combination) if script_args.reward_combination else None,
    )
    if not args.disable_tqdm:
        MetricsProgressCallback.replace_default(trainer, "PRIME", PRIME_METRICS)

    if trainer.accelerator.is_main_process:
        save_settings(output_dir, script_args, model_args, args)

    measures = task is not None and trainer.accelerator.is_main_process
    if measures:
        before = _measure(trainer, task, script_args.eval_samples, with_prm=False)[0]
        print(f"Held-out accuracy before: {before['greedy']:.1%} greedy, {before['sampled']:.1%} sampled", flush=True)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    saved = {"policy": output_dir, "PRM": output_dir / "prm"}
    if trainer.accelerator.is_main_process:
        plot_learning_curve(trainer.state.log_history, output_dir / "learning_curve.png")
        saved["learning curve"] = output_dir / "learning_curve.png"
    if measures:
        after, prm = _measure(trainer, task, script_args.eval_samples)
        results = {"before": before, "after": after, "prm": prm}
        (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        saved["results"] = output_dir / "results.json"
        print_summary(before, after, prm, saved)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return 0


def save_settings(output_dir: Path, *arguments: Any) -> None:
    """
    Write all settings of a run as one JSON object, which `trl-prime report` shows. It may be pushed along with the run:
    what is secret by its name is masked.

    Args:
        output_dir (`Path`): Folder of the run, made if needed.
        *arguments: Dataclasses with settings; of a name that two of them have, the later one counts.
    """
    settings: dict[str, Any] = {}
    for part in arguments:
        settings |= part.to_dict() if hasattr(part, "to_dict") else asdict(part)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / SETTINGS_NAME).write_text(
        json.dumps(_masked(settings), indent=2, sort_keys=True, default=str) + "\n"
    )


def _masked(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _masked(item, str(key)) for key, item in value.items()}
    secret = isinstance(value, str) and re.search(r"(token|key|password|secret)$", name, re.IGNORECASE)
    return f"<{name.upper()}>" if secret else value


def _load_split(script_args: PRIMEScriptArguments, split: str) -> Any:
    """A split of the recipe's data set, in the form that the trainer reads."""
    from ..data.adapters import load_prime_dataset
    from ..data.formats import DATASET_FORMATS
    from ..rewards.registry import parse_call

    name = parse_call(script_args.dataset_format or "")[0]
    if name in DATASET_FORMATS and "prompt" not in DATASET_FORMATS[name].features:
        raise ValueError(
            f"dataset_format is {name!r}, which makes finished conversations for supervised fine-tuning. Train on a format "
            "with a prompt."
        )
    return load_prime_dataset(
        script_args.dataset_name,
        script_args.dataset_format,
        split=split,
        config=script_args.dataset_config,
        streaming=script_args.dataset_streaming,
        system_prompt=script_args.system_prompt,
        prompt_suffix=script_args.prompt_suffix,
        on_error=script_args.on_malformed_row,
    )


def _measure(
    trainer: Any, task: Any, num_samples: int, with_prm: bool = True
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracies of the policy and of the PRM on the held-out problems of a task."""
    from ..evaluation.held_out import measure_policy, measure_prm

    accuracies, dataset, completions, rewards = measure_policy(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        task.eval_dataset,
        trainer.reward_funcs[0],
        max_new_tokens=trainer.args.max_completion_length,
        num_samples=num_samples,
        seed=trainer.args.seed,
    )
    prm: dict[str, float] = {}
    if with_prm and trainer.implicit_prm.reference is not None:
        prm = measure_prm(trainer.implicit_prm, dataset, completions, rewards, num_samples, task.step_labels)
    return accuracies, prm
