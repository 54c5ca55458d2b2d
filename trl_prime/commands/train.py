"""`trl-prime train`: train by a recipe.

`trl-prime train --config recipes/quickstart.yaml [--any_field value]`. A recipe holds fields of `PRIMEConfig`, of TRL's
`ModelConfig` and of `PRIMEScriptArguments`, and flags of accelerate's launcher (see `launching.py`); any of them can be given
as a flag, which wins.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..specs import nearest
from .dataset_arguments import DatasetArguments, load_split
from .launching import check_launch, check_report_to, launch_if_asked, parse_launched_arguments
from .models import check_model

if TYPE_CHECKING:
    from ..tasks.task import Task

TASKS = {
    "running_sums": "trl_prime.tasks.running_sums.prepare",
    "number_chains": "trl_prime.tasks.number_chains.prepare",
    "letter_search": "trl_prime.tasks.letter_search.prepare",
}
SPLITS_BY_HAND = (
    "eval_strategy: steps with dataset_train_split: 'train[:90%]' and dataset_test_split: 'train[90%:]' evaluates "
    "while the run trains."
)
# These variables tell a process that it is one of several
_GROUP = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class PRIMEScriptArguments(DatasetArguments):
    """
    The fields of a recipe beside those of [`PRIMEConfig`] and [`~trl.ModelConfig`].

    Parameters:
        task (`str`, *optional*): A task that makes its own model, data and reward: `"running_sums"`, `"number_chains"`,
            `"letter_search"` (of several turns), or the dotted path of a function that returns a [`~trl_prime.tasks.task.Task`].
            Replaces the model and data set.
        task_kwargs (`dict`, *optional*): Arguments of the task.
        reward_funcs (`list[str]`, *optional*): Outcome rewards: `"math"`, `"code"`, `"verifier"` (math or code, by the
            row), TRL's names or dotted paths, with options if need be, `code(timeout=10)`.
        tools (`list[str]`, *optional*): Tools that the policy may call in its turns: `"python"`, an interpreter in the sandbox,
            or dotted paths of functions as for [`~trl.GRPOTrainer`]; with options if need be, `python(seconds=10)`.
        environment_factory (`str`, *optional*): Dotted path of a class, or function, that makes an environment as for
            [`~trl.GRPOTrainer`]: its methods are the tools of the policy.
        reward_combination (`str`, *optional*): Dotted path of a hook that computes the advantages.
        prm_model_name_or_path (`str`, *optional*): Start of the implicit PRM; the policy's own start if not given.
        prm_use_peft (`bool`): Train the PRM as a LoRA adapter.
        prm_lora_r, prm_lora_alpha (`int`): Rank and scale of that adapter.
        prm_lora_target_modules (`list[str]`, *optional*): Its modules; those of the policy's adapter, or all linear
            ones.
        prm_lora_layers (`int`, *optional*): How many of the last layers it is on, which a step is cheaper for; all if not given.
        eval_samples (`int`): Sampled completions per held-out problem of a task or of `eval_split_size`, before and after.
    """

    task: str | None = field(
        default=None,
        metadata={"help": f"A task with its own model, data and reward: {', '.join(TASKS)}, or a dotted path."},
    )
    task_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Arguments of the task (JSON)."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Outcome rewards: math, code, verifier (math or code, by the row), names of TRL's reward functions, or "
            "dotted paths; with options if need be: code(timeout=10)."
        },
    )
    tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tools that the policy may call in its turns: python, an interpreter in the sandbox, or dotted paths; with "
            "options if need be: python(seconds=10)."
        },
    )
    environment_factory: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of a class that is TRL's `environment_factory`: its methods are the policy's tools."
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
        metadata={"help": "Modules of the PRM's adapter. Defaults to those of the policy's, or all linear ones."},
    )
    prm_lora_layers: int | None = field(
        default=None,
        metadata={
            "help": "How many of the last layers the PRM's adapter is on; all layers if not given. Fewer are faster."
        },
    )
    eval_samples: int = field(
        default=4,
        metadata={
            "help": "Sampled completions per held-out problem of a task or of eval_split_size, before and after training."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples is {self.eval_samples}, but must be at least 1.")
        if self.prm_lora_layers is not None and not self.prm_use_peft:
            raise ValueError(
                f"prm_lora_layers is {self.prm_lora_layers}, but the PRM is trained as a whole. Set prm_use_peft: true, or leave it out."
            )
        if self.eval_split_size is not None and self.task:
            raise ValueError(
                f"eval_split_size is {self.eval_split_size:g}, but the task {self.task!r} has held-out problems of its own. "
                "Leave it out."
            )
        if self.eval_split_size is not None and (self.tools or self.environment_factory):
            raise ValueError(
                f"eval_split_size is {self.eval_split_size:g}, but a policy with tools is not measured before and after "
                f"training, because that takes one completion a problem. Leave it out: {SPLITS_BY_HAND}"
            )
        if self.environment_factory and self.task:
            raise ValueError(
                f"environment_factory is {self.environment_factory!r}, but the task {self.task!r} says itself whether it has an "
                "environment. Leave one of them out."
            )
        if isinstance(self.task_kwargs, str):
            try:
                self.task_kwargs = json.loads(self.task_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"task_kwargs is {self.task_kwargs!r}, which is no JSON: {error}.") from error


def prepare(argv: list[str]) -> Callable[[], int]:
    """The job of training by a recipe."""
    exit_code = launch_if_asked(_types(), argv, "trl-prime train")
    if exit_code is not None:
        # The launched processes have prepared and worked. This one could only refuse the launcher's flags.
        return lambda: exit_code
    script_args, args, model_args = parse_launched_arguments(_types(), argv, "trl-prime train")
    check_launch(args.world_size, args.bf16)
    check_report_to(args.report_to)
    resume_from = resume_point(args)
    check_model("model_name_or_path", model_args.model_name_or_path, model_init_kwargs(args, model_args)["revision"])
    prm_revision = (args.prm_model_init_kwargs or {}).get("revision")
    check_model("prm_model_name_or_path", script_args.prm_model_name_or_path, prm_revision)
    trainer, held_out = _build(script_args, args, model_args, resume_from)
    return functools.partial(_train, trainer, held_out, script_args, model_args, resume_from, argv)


def resume_point(args: Any) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` stands for, before anything is loaded.

    Args:
        args ([`~transformers.TrainingArguments`]): Its field is a folder, or the word true for the last whole checkpoint of
            `output_dir`.

    Returns:
        `str`, *optional*: the folder, or None to start from the beginning.

    Raises:
        ValueError: It is not there, or was not saved to its end.
    """
    from ..implicit_prm.files import whole_checkpoint

    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    return whole_checkpoint(True if str(wanted).lower() == "true" else wanted, args.output_dir)


def model_init_kwargs(args: Any, model_args: Any) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: fields of `ModelConfig`, and `model_init_kwargs`, which win."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }


def _types() -> list[type]:
    from trl import ModelConfig

    from ..prime_config import PRIMEConfig

    return [PRIMEScriptArguments, PRIMEConfig, ModelConfig]


@dataclass(frozen=True)
class HeldOut:
    """
    These are problems that a run is measured on before and after training.

    Attributes:
        problems (`Dataset`): Their rows.
        step_labels (`Callable`, *optional*): See [`~trl_prime.tasks.task.Task`].
    """

    problems: Any
    step_labels: Callable[[str, str], list[bool]] | None = None

    def version(self) -> str:
        """Short hash of the rows."""
        from ..evaluation.resumable import digest

        return digest(self.problems[:])


def _build(
    script_args: PRIMEScriptArguments, args: Any, model_args: Any, resume_from: str | None
) -> tuple[Any, HeldOut | None]:
    """The trainer, and what it is measured on before and after training."""
    from trl import get_peft_config, get_quantization_config

    from ..data.adapters import check_text_only
    from ..prime_trainer import PRIMETrainer
    from ..reports.progress import PRIME_METRICS, MetricsProgressCallback
    from ..rewards import load_reward_func
    from ..sandbox.tool import load_tool
    from ..specs import load_object

    task = held_out = None
    if script_args.task or script_args.eval_split_size is not None:
        check_policy_is_whole(args)
    if script_args.task:
        if script_args.task not in TASKS and "." not in script_args.task:
            raise ValueError(f"task is {script_args.task!r}, which is unknown. {nearest(script_args.task, TASKS)}")
        task = _load_task(script_args, args)
        model, train_dataset, eval_dataset = task.model, task.train_dataset, task.eval_dataset
        # The measure before and after takes one turn; `eval_strategy` has the trainer's own turns
        held_out = HeldOut(task.eval_dataset, task.step_labels) if task.environment is None else None
    elif script_args.dataset_name and model_args.model_name_or_path:
        model = model_args.model_name_or_path
        with args.main_process_first(desc="loading the data set"):
            train_dataset, eval_dataset = script_args.load_splits(
                lambda split: load_split(script_args, split, model, chat_template_kwargs=args.chat_template_kwargs),
                args,
            )
        if script_args.eval_split_size is not None:
            remedy = "Leave it out, and measure by dataset_test_split and eval_strategy."
            check_text_only(train_dataset, "the measure before and after training (eval_split_size)", remedy)
            held_out = HeldOut(eval_dataset)
            if args.process_index == 0:
                print(f"Held out {len(eval_dataset)} rows, {len(train_dataset)} are left to train on.", flush=True)
    else:
        raise ValueError("Give either `task`, or `model_name_or_path` and `dataset_name`.")
    if resume_from is not None:
        check_same_split(Path(resume_from).parent, held_out)
    reward_funcs = [load_reward_func(name) for name in script_args.reward_funcs or []]
    if not reward_funcs and task:
        reward_funcs = list(task.reward_funcs)
    if held_out is not None and reward_funcs and getattr(reward_funcs[0], "__name__", None) == "majority_reward":
        raise ValueError(
            "reward_funcs begins with 'majority', which tells how far completions agree, but held-out accuracy is measured by the "
            "first reward function. Leave eval_split_size out, and evaluate by trl-prime eval on problems with answers."
        )
    args.model_init_kwargs = model_init_kwargs(args, model_args)
    prm_peft_config = _prm_adapter(script_args, args, model_args, model) if script_args.prm_use_peft else None
    environment = task.environment if task else None
    if script_args.environment_factory:
        environment = load_object(script_args.environment_factory)

    trainer = PRIMETrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        tools=[load_tool(spec) for spec in script_args.tools or []] or None,
        environment_factory=environment,
        prm_model=script_args.prm_model_name_or_path,
        prm_peft_config=prm_peft_config,
        reward_combination=load_object(script_args.reward_combination) if script_args.reward_combination else None,
    )
    if not args.disable_tqdm:
        MetricsProgressCallback.replace_default(trainer, "PRIME", PRIME_METRICS)
    return trainer, held_out


def _prm_adapter(script_args: PRIMEScriptArguments, args: Any, model_args: Any, policy: Any) -> Any:
    """The adapter of the PRM; `policy` is a model or the name of one."""
    from peft import LoraConfig
    from transformers import AutoConfig

    from ..implicit_prm.adapters import below_last_layers

    targets = script_args.prm_lora_target_modules or model_args.lora_target_modules or "all-linear"
    excluded = None
    if script_args.prm_lora_layers is not None:
        name, init_kwargs = script_args.prm_model_name_or_path, args.prm_model_init_kwargs or {}
        if name is None:
            name, init_kwargs = policy, args.model_init_kwargs
        if isinstance(name, str):
            config = AutoConfig.from_pretrained(
                name, revision=init_kwargs.get("revision"), trust_remote_code=args.trust_remote_code
            )
        else:
            config = name.config
        excluded = below_last_layers(config, script_args.prm_lora_layers)
        experts = ("num_experts", "num_local_experts", "n_routed_experts")
        if "all-linear" in targets and any(
            getattr(config.get_text_config(), attribute, None) for attribute in experts
        ):
            raise ValueError(
                f"prm_lora_layers is {script_args.prm_lora_layers}, but in a mixture of experts PEFT's 'all-linear' takes the "
                "experts of all layers. Name modules, such as prm_lora_target_modules: [q_proj, k_proj, v_proj, o_proj]."
            )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=script_args.prm_lora_r,
        lora_alpha=script_args.prm_lora_alpha,
        target_modules=targets,
        exclude_modules=excluded,
    )


def check_policy_is_whole(args: Any) -> None:
    """
    Refuse to measure a policy of which each process has only a part.

    Args:
        args ([`~transformers.TrainingArguments`]): Of the run.

    Raises:
        ValueError: The launcher asks for FSDP or ZeRO-3.
    """
    is_zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if is_zero3 or args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise ValueError(
            "A task or eval_split_size measures the policy before and after training, for which every process needs all of "
            f"it, but {'ZeRO-3' if is_zero3 else 'FSDP'} shards it. Use ddp or zero2. Or leave eval_split_size out: "
            f"{SPLITS_BY_HAND}"
        )


def check_same_split(run: Path, held_out: HeldOut | None) -> None:
    """
    Refuse to go on with other held-out problems than a run began with: it has trained on some of them.

    Args:
        run (`Path`): Folder of the run that is resumed.
        held_out ([`HeldOut`], *optional*): What it would be measured on.

    Raises:
        ValueError: Its settings tell of other problems, or of none.
    """
    from ..reports.run_files import SETTINGS_NAME

    path = run / SETTINGS_NAME
    if held_out is None or not path.is_file():
        return
    if json.loads(path.read_text()).get("held_out_problems") != held_out.version():
        raise ValueError(
            f"The held-out problems are not those that the run in '{run}' began with, and it has trained on some of them. Give "
            "the eval_split_size, seed and data that it began with, or start anew in another output_dir."
        )


def _load_task(script_args: PRIMEScriptArguments, args: Any) -> Task:
    from ..specs import load_object

    path = TASKS.get(script_args.task, script_args.task)
    arguments = (args.output_dir, args.seed, script_args.task_kwargs or {})
    prepare = load_object(path)
    try:
        inspect.signature(prepare).bind(Path(args.output_dir), seed=args.seed, **arguments[2])
    except TypeError as error:
        raise ValueError(
            f"task is {script_args.task!r}, which does not take task_kwargs {arguments[2]}: {error}."
        ) from error
    if args.process_index == 0:
        print(f"Preparing the task '{script_args.task}' ...", flush=True)
    with args.main_process_first(desc="preparing the task"):
        if args.world_size > 1 and args.local_process_index == 0:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                alone.submit(_prepare_alone, path, *arguments).result()
        output_dir, seed, kwargs = arguments
        return prepare(Path(output_dir), seed=seed, **kwargs)


def _prepare_alone(path: str, output_dir: str, seed: int, kwargs: dict[str, Any]) -> None:
    """Let a task make what it keeps in its folder: its warm-up would wait for processes that do not warm up."""
    from ..specs import load_object

    for name in [name for name in os.environ if name in _GROUP or name.startswith("ACCELERATE_")]:
        del os.environ[name]
    load_object(path)(Path(output_dir), seed=seed, **kwargs)


def _train(
    trainer: Any,
    held_out: HeldOut | None,
    script_args: PRIMEScriptArguments,
    model_args: Any,
    resume_from: str | None,
    argv: list[str],
) -> int:
    """Train and save; with held-out problems, measure before and after. Returns the exit code."""
    from transformers.trainer import TRAINER_STATE_NAME

    from ..reports.progress import plot_learning_curve, print_saved, print_summary
    from ..reports.run_files import CURVE_NAME, PRM_FOLDER, RESULTS_NAME, save_settings

    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    if trainer.accelerator.is_main_process:
        version = {} if held_out is None else {"held_out_problems": held_out.version()}
        save_settings(output_dir, script_args, model_args, args, version)
    if held_out is not None:
        before = _measure(trainer, held_out, script_args.eval_samples, with_prm=False)[0]
        if trainer.accelerator.is_main_process:
            print(
                f"Held-out accuracy before: {before['greedy']:.1%} greedy, {before['sampled']:.1%} sampled", flush=True
            )
    with _resume_hint(trainer, argv):
        trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    saved = {"policy": output_dir, "PRM": output_dir / PRM_FOLDER, "log": output_dir / TRAINER_STATE_NAME}
    if trainer.accelerator.is_main_process:
        plot_learning_curve(trainer.state.log_history, output_dir / CURVE_NAME)
        saved["learning curve"] = output_dir / CURVE_NAME
    if held_out is not None:
        after, prm = _measure(trainer, held_out, script_args.eval_samples)
        if trainer.accelerator.is_main_process:
            results = {"before": before, "after": after, "prm": prm}
            (output_dir / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n")
            saved["results"] = output_dir / RESULTS_NAME
            print_summary(before, after, prm)
    if trainer.accelerator.is_main_process:
        print_saved(saved, _next_commands(output_dir, output_dir / PRM_FOLDER))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return 0


def _next_commands(run: Path, prm: Path) -> list[str]:
    """The commands that evaluate a run, score with its PRM and write a page about it."""
    run, prm = shlex.quote(str(run)), shlex.quote(str(prm))
    return [
        f"trl-prime report {run}",
        f"trl-prime eval --model_name_or_path {run} --prm_name_or_path {prm} --benchmark gsm8k",
        f"trl-prime score --prm_name_or_path {prm} --prompt '...' --completion '...'",
    ]


@contextlib.contextmanager
def _resume_hint(trainer: Any, argv: list[str]) -> Iterator[None]:
    """Around training: who interrupts it is told how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if trainer.accelerator.is_main_process:
            print(
                f"\n{resume_command(argv, trainer.state.global_step, Path(trainer.args.output_dir))}", file=sys.stderr
            )
        raise


def resume_command(argv: list[str], step: int, output_dir: Path) -> str:
    """
    Say how an interrupted run goes on.

    Args:
        argv (`list[str]`): Its words after `trl-prime train`.
        step (`int`): The step that it had reached.
        output_dir (`Path`): Its folder.

    Returns:
        `str`: The last checkpoint and the command that resumes from it, or that there is none.
    """
    from ..reports.run_files import checkpoints

    found = checkpoints(output_dir) if output_dir.is_dir() else []
    if not found:
        return f"Stopped at step {step}, before the first checkpoint (save_steps): there is nothing to resume from."
    words = [
        word for i, word in enumerate(argv) if "--resume_from_checkpoint" not in (word.split("=")[0], *argv[i - 1 : i])
    ]
    command = shlex.join(["trl-prime", "train", *words, "--resume_from_checkpoint", "true"])
    return f"Stopped at step {step}. Go on from {found[0].name} by:\n  {command}"


def _measure(
    trainer: Any, held_out: HeldOut, num_samples: int, with_prm: bool = True
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracies of the policy and, on the first process, of the PRM. All processes share the policy's problems."""
    from ..evaluation.held_out import measure_policy, measure_prm

    accuracies, dataset, completions, rewards = measure_policy(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        held_out.problems,
        trainer.reward_funcs[0],
        max_new_tokens=trainer.args.max_completion_length,
        num_samples=num_samples,
        batch_size=trainer.args.per_device_eval_batch_size,
        seed=trainer.args.seed,
        text_format=trainer.implicit_prm.text_format,
        accelerator=trainer.accelerator,
    )
    prm: dict[str, float] = {}
    if with_prm and trainer.accelerator.is_main_process and trainer.implicit_prm.reference is not None:
        prm = measure_prm(trainer.implicit_prm, dataset, completions, rewards, num_samples, held_out.step_labels)
    return accuracies, prm
