"""`trl-prime prm`: train an implicit PRM offline, on completions with outcome labels or on preference pairs.

`trl-prime prm --config recipes/gsm8k/prm/offline-ce.yaml [--any_field value]`. A recipe holds fields of
`OfflinePRMConfig`, of TRL's `ModelConfig` and of `OfflinePRMScriptArguments`; any of them can be given as a flag, which wins. Flags of
accelerate's launcher start it on several processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .dataset_arguments import SplitArguments
from .launching import check_launch, check_report_to, launch_if_asked, parse_launched_arguments
from .models import check_model
from .train import model_init_kwargs, resume_point


@dataclass
class OfflinePRMScriptArguments(SplitArguments):
    """
    The fields of a recipe beside those of [`OfflinePRMConfig`] and [`~trl.ModelConfig`].

    Parameters:
        dataset_format (`str`, *optional*): How the rows of `dataset_name` are adapted: a key of
            [`~trl_prime.offline_prm.data.OUTCOME_FORMATS`], with options if need be, `labelled(completion='answer')`. Not given,
            the data set has `prompt`, `completion` and `label`, or `prompt`, `chosen` and `rejected`. `dataset_name` may be a
            local file or folder.
        system_prompt (`str`, *optional*): System prompt of every row; replaces the one that is there.
        prompt_suffix (`str`, *optional*): Appended to every prompt: `"math"` or `"code"`, the paper's, or a text.
    """

    dataset_format: str | None = field(
        default=None,
        metadata={
            "help": "How the rows of dataset_name (Hub, local file or folder) are adapted: labelled or gsm8k_solutions, with "
            "options if need be: labelled(completion='answer', label='is_right'). Not given, the data set has prompt, "
            "completion and label, or prompt, chosen and rejected."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System prompt of every row; replaces the one that is there."}
    )
    prompt_suffix: str | None = field(
        default=None, metadata={"help": "Appended to every prompt: 'math' or 'code', the paper's, or a text."}
    )


def _types() -> list[type]:
    from trl import ModelConfig

    from ..offline_prm.offline_prm_config import OfflinePRMConfig

    return [OfflinePRMScriptArguments, OfflinePRMConfig, ModelConfig]


def prepare(argv: list[str]) -> Callable[[], int]:
    """The job of training by a recipe."""
    exit_code = launch_if_asked(_types(), argv, "trl-prime prm")
    if exit_code is not None:
        # The launched processes have prepared and worked. This one could only refuse the launcher's flags.
        return lambda: exit_code
    script_args, args, model_args = parse_launched_arguments(_types(), argv, "trl-prime prm")
    check_launch(args.world_size, args.bf16)
    check_report_to(args.report_to)
    if not (script_args.dataset_name and model_args.model_name_or_path):
        raise ValueError("Give `model_name_or_path` and `dataset_name`.")
    if script_args.dataset_streaming:
        raise ValueError(
            "dataset_streaming is True, but groups and lengths have to be known before training. Leave it out."
        )
    resume_from = resume_point(args)
    check_model("model_name_or_path", model_args.model_name_or_path, model_init_kwargs(args, model_args)["revision"])

    from trl import get_peft_config, get_quantization_config

    from ..offline_prm.offline_prm_trainer import OfflinePRMTrainer
    from ..reports.progress import MetricsProgressCallback

    with args.main_process_first(desc="loading the data set"):
        train_dataset, eval_dataset = _load_data(script_args, args)
    args.model_init_kwargs = model_init_kwargs(args, model_args)
    if (quantization_config := get_quantization_config(model_args)) is not None:
        args.model_init_kwargs["quantization_config"] = quantization_config
    trainer = OfflinePRMTrainer(
        model_args.model_name_or_path,
        args,
        train_dataset,
        eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    if not args.disable_tqdm:
        columns = {"loss": "loss", "accuracy": "right", "pairwise_accuracy": "pairs", "grad_norm": "grad"}
        MetricsProgressCallback.replace_default(trainer, "PRM", columns)
    return functools.partial(_train, trainer, script_args, resume_from)


def _train(trainer: Any, script_args: OfflinePRMScriptArguments, resume_from: str | None) -> int:
    """Train, save, and measure on the held-out completions if there are any; returns the exit code."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.accelerator.is_main_process:
            _print_metrics(metrics)
    if trainer.accelerator.is_main_process:
        print(f"PRM: {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return 0


def _load_data(script_args: OfflinePRMScriptArguments, args: Any) -> tuple[Any, Any]:
    from ..offline_prm.data import load_outcome_dataset, with_prompt

    def load(split: str) -> Any:
        dataset = load_outcome_dataset(
            script_args.dataset_name,
            script_args.dataset_format,
            split=split,
            config=script_args.dataset_config,
            system_prompt=script_args.system_prompt,
            prompt_suffix=script_args.prompt_suffix,
        )
        return with_prompt(dataset)

    return script_args.load_splits(load, args)


def _print_metrics(metrics: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    labels = {
        "eval_loss": "loss",
        "eval_pairwise_accuracy": "ranks the better of two completions higher",
        "eval_accuracy": "tells right from wrong",
    }
    table = Table(title="Held-out completions", show_header=False)
    for name, label in labels.items():
        if name in metrics:
            table.add_row(label, f"{metrics[name]:.4f}" if name == "eval_loss" else f"{metrics[name]:.1%}")
    Console().print(table)
