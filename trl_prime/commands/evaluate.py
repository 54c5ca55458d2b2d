"""`trl-prime eval`: measure a policy, and a PRM on its samples, on a benchmark; or a PRM on ProcessBench.

`trl-prime eval --model_name_or_path MODEL --benchmark math500 [--prm_name_or_path PRM]`. The output folder holds
`samples.jsonl`, written as it goes, and `summary.json`. A run that was stopped goes on where it was. `--compare A B` compares
what two runs have left.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl.import_utils import is_vllm_available

from ..specs import check_installed, nearest
from .arguments import parse_arguments
from .models import check_model, check_prm


@dataclass
class EvalArguments:
    """
    The models to evaluate, the problems, and how it is done.

    Parameters:
        model_name_or_path (`str`, *optional*): The policy, or a LoRA adapter of it. Not needed for ProcessBench.
        model_revision (`str`, *optional*): Its branch, tag or commit on the Hub.
        dtype (`str`): Data type of the weights of policy and PRM.
        attn_implementation (`str`, *optional*): Attention of policy and PRM.
        device_map (`str`, *optional*): `"auto"` spreads a policy that does not fit on one GPU over several.
        benchmark (`str`, *optional*): A key of [`~trl_prime.evaluation.benchmarks.BENCHMARKS`], or `"processbench"`.
        dataset_name (`str`, *optional*): Data set on the Hub, local file or folder, in the place of the benchmark's.
        dataset_config, dataset_split, dataset_format (`str`, *optional*): Its configuration, split and format, see
            [`~trl_prime.data.adapters.load_prime_dataset`]. Default to the benchmark's.
        system_prompt (`str`, *optional*): System prompt of every problem.
        prompt_suffix (`str`, *optional*): Appended to every prompt: `"math"`, `"code"`, a text, `"benchmark"` for the
            benchmark's, or nothing.
        on_malformed_row (`str`): `"raise"` or `"skip"`.
        plain_prompts (`bool`): Prompts are text, without a chat template.
        limit (`int`, *optional*): Only the first rows.
        reward_func (`str`): Verifier, as in a recipe's `reward_funcs`.
        num_samples (`int`): Samples of each problem.
        greedy (`bool`): A greedy completion of each problem too.
        k (`list[int]`, *optional*): For pass@k. Defaults to 1, 2, 4, ... up to `num_samples`.
        temperature, top_p, top_k, max_new_tokens: Settings of the sampling.
        seed (`int`): Seed of the samples, the bootstrap and random subsets.
        batch_size (`int`, *optional*): Completions at a time; 32, with vLLM 1024.
        use_vllm (`bool`): Sample with vLLM.
        vllm_tensor_parallel_size, vllm_gpu_memory_utilization, vllm_max_model_length: Settings of the vLLM engine.
        prm_name_or_path (`str`, *optional*): A trained PRM.
        prm_revision, prm_reference (`str`, *optional*): Its revision; its reference model, where it does not name its own.
        step_separator (`str`): ProcessBench: what joins the steps.
        threshold (`float`, *optional*): ProcessBench: a step with a lower reward is called wrong.
        calibration_fraction (`float`): ProcessBench: share of the rows that the threshold is chosen on, where none is given.
        output_dir (`str`, *optional*): Defaults to `eval/MODEL/BENCHMARK`.
        overwrite (`bool`): Start anew instead of going on.
        compare (`list[str]`, *optional*): Output folders of two finished evaluations of policies on the same problems: nothing
            is evaluated, but the paired difference is printed, and written to `comparison.json` in `output_dir` if given. Only
            `k`, `seed` and `output_dir` go with it.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The policy, or a LoRA adapter of it. Not needed for processbench."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the policy on the Hub."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Data type of the weights of policy and PRM.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of policy and PRM."})
    device_map: str | None = field(
        default=None, metadata={"help": "'auto' spreads a policy that does not fit on one GPU over several."}
    )
    benchmark: str | None = field(
        default=None,
        metadata={
            "help": "gsm8k, math500, aime2024, aime2025, amc2023, minerva_math, olympiadbench, humaneval, leetcode, or "
            "processbench, which judges a PRM."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub, local file or folder, in the place of the benchmark's own."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set on the Hub."})
    dataset_split: str | None = field(
        default=None,
        metadata={"help": "Split. Defaults to the benchmark's, without a benchmark and for a single file to 'train'."},
    )
    dataset_format: str | None = field(
        default=None,
        metadata={"help": "How the rows are adapted, as in a recipe. Defaults to the benchmark's."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System prompt of every problem."})
    prompt_suffix: str | None = field(
        default="benchmark",
        metadata={
            "help": "Appended to every prompt: 'math' or 'code', the paper's, a text, 'benchmark' for the benchmark's, or none."
        },
    )
    on_malformed_row: str = field(
        default="raise",
        metadata={
            "help": "'raise', or 'skip' to leave out rows that cannot be adapted.",
            "choices": ["raise", "skip"],
        },
    )
    plain_prompts: bool = field(
        default=False,
        metadata={"help": "Give prompts as text, without a chat template: for base models that have none."},
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first rows, for a quick look."})
    reward_func: str = field(
        default="verifier",
        metadata={"help": "Verifier, as in a recipe's reward_funcs. The default takes math or code by the row."},
    )
    num_samples: int = field(default=4, metadata={"help": "Samples of each problem; 0 for greedy only."})
    greedy: bool = field(default=True, metadata={"help": "A greedy completion of each problem too."})
    k: list[int] | None = field(
        default=None, metadata={"help": "For pass@k. Defaults to 1, 2, 4, ... up to num_samples."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability that samples are drawn from."})
    top_k: int = field(default=0, metadata={"help": "Number of tokens that samples are drawn from; 0 for all."})
    max_new_tokens: int = field(default=3072, metadata={"help": "Longest completion in tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of samples, bootstrap and random subsets."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Completions at a time. Defaults to 32, with vLLM to 1024."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that vLLM spreads the policy over."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of a GPU's memory for vLLM."})
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and completion for vLLM. Defaults to the model's."}
    )
    prm_name_or_path: str | None = field(
        default=None, metadata={"help": "A trained PRM, or the run that it is in: reports best-of-N, or ProcessBench."}
    )
    prm_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the PRM on the Hub."})
    prm_reference: str | None = field(
        default=None, metadata={"help": "Reference model of the PRM, where it does not name its own."}
    )
    step_separator: str = field(
        default="\n\n",
        metadata={
            "help": "processbench: what joins the steps. Defaults to a blank line, as in the benchmark's solutions."
        },
    )
    threshold: float | None = field(
        default=None, metadata={"help": "processbench: a step with a lower reward is called wrong."}
    )
    calibration_fraction: float = field(
        default=0.2,
        metadata={"help": "processbench: share of the rows that the threshold is chosen on, where none is given."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Defaults to eval/MODEL/BENCHMARK."})
    overwrite: bool = field(default=False, metadata={"help": "Start anew instead of going on."})
    compare: list[str] | None = field(
        default=None,
        metadata={
            "help": "Output folders of two evaluations: the paired difference. Goes with k, seed and output_dir."
        },
    )

    @property
    def judges_prm(self) -> bool:
        """Whether this is ProcessBench, which needs no policy."""
        return self.benchmark == "processbench"

    def __post_init__(self):
        from ..evaluation.benchmarks import BENCHMARKS

        if self.compare is not None:
            self._check_compare()
            return
        if self.benchmark is not None and self.benchmark not in BENCHMARKS and not self.judges_prm:
            known = [*BENCHMARKS, "processbench"]
            raise ValueError(f"benchmark is {self.benchmark!r}, which is unknown. {nearest(self.benchmark, known)}")
        if self.benchmark is None and self.dataset_name is None:
            raise ValueError("Give a benchmark, or a dataset_name with its dataset_format.")
        if self.judges_prm and self.prm_name_or_path is None:
            raise ValueError("benchmark is 'processbench', which judges a PRM. Give prm_name_or_path.")
        if not self.judges_prm and self.model_name_or_path is None:
            raise ValueError("Give model_name_or_path, the policy to evaluate.")
        least = {"num_samples": 0, "max_new_tokens": 1, "top_k": 0, "limit": 1, "batch_size": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} is {value}, but must be at least {bound}.")
        if not self.num_samples and not self.greedy:
            raise ValueError("num_samples is 0 and greedy is false, so nothing would be sampled. Change one of them.")
        if not self.num_samples and self.prm_name_or_path and not self.judges_prm:
            raise ValueError("num_samples is 0, but a PRM chooses among samples. Give num_samples, 16 for instance.")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature is {self.temperature}, but must be positive. For greedy completions alone give num_samples: 0."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but must be above 0 and at most 1.")
        for size in self.k or []:
            if not 1 <= size <= self.num_samples:
                raise ValueError(
                    f"k has {size}, but must lie between 1 and num_samples, {self.num_samples}. Raise num_samples."
                )
        if not 0 < self.calibration_fraction < 1:
            raise ValueError(f"calibration_fraction is {self.calibration_fraction}, but must lie between 0 and 1.")
        check_installed("use_vllm", self.use_vllm, is_vllm_available(), "vllm")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "eval runs in one process. Start it without a launcher; for several GPUs give use_vllm: true with "
                "vllm_tensor_parallel_size, or device_map: auto."
            )

    def _check_compare(self) -> None:
        if len(self.compare) != 2:
            raise ValueError(
                f"compare has {len(self.compare)} folders, but takes two, A and B, which is compared with A."
            )
        for field_ in fields(self):
            if (
                field_.name not in ("compare", "k", "seed", "output_dir")
                and getattr(self, field_.name) != field_.default
            ):
                raise ValueError(
                    f"{field_.name} is {getattr(self, field_.name)!r}, but compare reads two evaluations and makes none. Leave one "
                    "of them out."
                )


def prepare(argv: list[str]) -> Callable[[], int]:
    """The job of evaluating, or of comparing two evaluations."""
    (args,) = parse_arguments([EvalArguments], argv, prog="trl-prime eval")
    if args.compare is not None:
        return _prepare_comparison(args)
    check_model("model_name_or_path", None if args.judges_prm else args.model_name_or_path, args.model_revision)
    if args.prm_name_or_path:
        references = {"reference_option": "prm_reference", "reference": args.prm_reference}
        check_prm("prm_name_or_path", args.prm_name_or_path, args.prm_revision, **references)
    evaluate = _prepare_prm(args) if args.judges_prm else _prepare_policy(args)

    def job() -> int:
        path = _output_dir(args) / "summary.json"
        # JSON has no NaN: a number that cannot be told, such as the accuracy on wrong solutions where there are none, is null
        summary = json.loads(json.dumps({"settings": vars(args), **evaluate()}), parse_constant=lambda _: None)
        path.write_text(json.dumps(summary, indent=2) + "\n")
        print(f"Summary: {path}")
        return 0

    return job


def _prepare_comparison(args: EvalArguments) -> Callable[[], int]:
    """Read and compare two evaluations; the returned function prints the difference."""
    from ..evaluation.comparison import compare, differing_settings
    from ..evaluation.tables import print_comparison

    evaluations, metrics = compare(args.compare, _equal_answers(), args.k, args.seed)
    paths = [evaluation.path for evaluation in evaluations]

    def job() -> int:
        print_comparison(metrics, paths, differing_settings(*evaluations))
        if args.output_dir:
            path = Path(args.output_dir) / "comparison.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"compare": paths, "metrics": metrics}, indent=2) + "\n")
            print(f"Comparison: {path}")
        return 0

    return job


def _prepare_policy(args: EvalArguments) -> Callable[[], dict[str, Any]]:
    """Load the problems and check what can be checked; the returned function samples, judges and sums up."""
    dataset = _load_dataset(args)
    reward_func = _load_verifier(args.reward_func, dataset, args.num_samples)

    from ..evaluation.end_to_end import (
        SampleTable,
        sample_problems,
        score_samples,
        summarize_best_of_n,
        summarize_samples,
    )
    from ..evaluation.resumable import ResumableRows, check_has_settings, digest, model_version
    from ..evaluation.sampling import load_tokenizer
    from ..evaluation.statistics import sizes_up_to
    from ..evaluation.tables import print_best_of_n, print_samples
    from ..implicit_prm.files import saved_text_format

    tokenizer = load_tokenizer(args.model_name_or_path, args.model_revision)
    text_format = saved_text_format(args.model_name_or_path, revision=args.model_revision)
    if tokenizer.chat_template is None and not isinstance(dataset[0]["prompt"], str):
        raise ValueError(
            f"'{args.model_name_or_path}' has no chat template. Give plain_prompts: true to prompt it with plain text."
        )
    names = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "benchmark", "dataset_name")
    names += ("dataset_config", "dataset_split", "dataset_format", "system_prompt", "prompt_suffix", "plain_prompts")
    names += ("limit", "reward_func", "num_samples", "greedy", "temperature", "top_p", "top_k", "max_new_tokens")
    names += ("seed", "use_vllm")
    settings = {name: getattr(args, name) for name in names}
    settings["model_version"] = model_version(args.model_name_or_path, args.model_revision)
    settings["problems"] = digest(dataset[:])
    if text_format is not None and text_format.chat_template_kwargs:
        settings["chat_template_kwargs"] = text_format.chat_template_kwargs
    output_dir = _output_dir(args)
    written = ResumableRows(output_dir / "samples.jsonl", settings, args.overwrite)
    if args.prm_name_or_path and not args.overwrite:
        # What they are named by is known after the sampling, and whether one can be gone on with is not to be found out then
        for path in output_dir.glob("prm_scores-*.jsonl"):
            check_has_settings(path)

    def evaluate() -> dict[str, Any]:
        rows = sample_problems(
            dataset,
            lambda: _load_sampler(args, tokenizer, text_format),
            reward_func,
            written,
            num_samples=args.num_samples,
            greedy=args.greedy,
            seed=args.seed,
            batch_size=args.batch_size or (1024 if args.use_vllm else 32),
        )
        samples = SampleTable(rows, _equal_answers())
        summary = summarize_samples(samples, args.k or sizes_up_to(args.num_samples), args.seed)
        title = f"{args.benchmark or args.dataset_name}: {args.model_name_or_path}"
        print_samples(summary, title)
        if args.prm_name_or_path:
            settings = {"samples": digest(rows), **_prm_settings(args)}
            # Scores of several PRMs on the same samples stand side by side
            scores = ResumableRows(output_dir / f"prm_scores-{digest(settings)}.jsonl", settings, args.overwrite)
            scored = score_samples(samples, lambda: _load_prm(args), scores, args.batch_size or 32)
            summary["prm"] = args.prm_name_or_path
            summary["best_of_n"] = summarize_best_of_n(samples, scored, args.seed)
            print_best_of_n(summary["best_of_n"])
        return summary

    return evaluate


def _prepare_prm(args: EvalArguments) -> Callable[[], dict[str, Any]]:
    """Load the solutions and check what can be checked; the returned function scores their steps and sums up."""
    dataset = _load_dataset(args)

    from ..evaluation.end_to_end import calibration_split, score_process_bench, summarize_process_bench
    from ..evaluation.process_bench import check_has_both_kinds
    from ..evaluation.resumable import ResumableRows, digest
    from ..evaluation.tables import print_process_bench

    settings = {
        **_prm_settings(args),
        "step_separator": args.step_separator,
        "problems": digest(dataset[:]),
    }
    rows = ResumableRows(_output_dir(args) / "step_rewards.jsonl", settings, args.overwrite)
    labels = dataset["label"][:]
    if args.threshold is None:
        calibration, _ = calibration_split(labels, args.calibration_fraction, args.seed)
        check_has_both_kinds([labels[i] for i in calibration])

    def evaluate() -> dict[str, Any]:
        step_rewards = score_process_bench(
            dataset,
            lambda: _load_prm(args),
            rows,
            separator=args.step_separator,
            batch_size=args.batch_size or 32,
        )
        summary = summarize_process_bench(
            step_rewards,
            labels,
            threshold=args.threshold,
            calibration_fraction=args.calibration_fraction,
            seed=args.seed,
        )
        print_process_bench(summary, f"ProcessBench: {args.prm_name_or_path}")
        return summary

    return evaluate


def _output_dir(args: EvalArguments) -> Path:
    if args.output_dir:
        return Path(args.output_dir)
    model = args.prm_name_or_path if args.judges_prm else args.model_name_or_path
    return Path("eval", Path(model).name, args.benchmark or Path(args.dataset_name).stem)


def _load_dataset(args: EvalArguments) -> Any:
    """The problems, in the form that the verifiers read."""
    from ..data.adapters import check_text_only, load_prime_dataset
    from ..evaluation.benchmarks import BENCHMARKS, PROCESS_BENCH

    known = PROCESS_BENCH if args.judges_prm else BENCHMARKS.get(args.benchmark)
    name = args.dataset_name or known.dataset
    split = args.dataset_split or ("train" if known is None or Path(name).expanduser().is_file() else known.split)
    suffix = args.prompt_suffix
    if suffix == "benchmark":
        suffix = known.prompt_suffix if known else None
    dataset = load_prime_dataset(
        name,
        args.dataset_format or (known.format if known else None),
        split=split,
        config=args.dataset_config or (known.config if known and not args.dataset_name else None),
        system_prompt=args.system_prompt,
        prompt_suffix=suffix,
        plain_prompts=args.plain_prompts,
        on_error=args.on_malformed_row,
    )
    if not len(dataset):
        raise ValueError(f"'{name}' has no rows.")
    check_text_only(
        dataset, "trl-prime eval", "Measure the policy in training, by eval_strategy, or remove the column."
    )
    return dataset if args.limit is None else dataset.select(range(min(args.limit, len(dataset))))


def _load_verifier(spec: str, dataset: Any, num_samples: int) -> Callable:
    """The reward function. Where a verifier or the vote cannot work on this machine, this says so before a model is loaded."""
    from ..rewards.math_rewards import check_installed as check_math_verify
    from ..rewards.registry import load_reward_func
    from ..rewards.router import VerifierReward, row_kind
    from ..sandbox import SandboxUnavailable
    from ..specs import parse_call

    name, kinds = parse_call(spec)[0], set()
    if name == "verifier":
        columns = [name for name in ("ability", "data_source", "solution", "tests") if name in dataset.column_names]
        kinds = {row_kind(**row) for row in dataset.select_columns(columns)}
    try:
        if spec != "verifier":
            reward_func = load_reward_func(spec)
        elif not kinds - {None}:
            raise ValueError(
                "No row says which verifier is to judge it. Give dataset_format, or reward_func: math, code or another one."
            )
        else:
            reward_func = VerifierReward(**{kind: {} for kind in ("math", "code") if kind in kinds})
    except (ImportError, SandboxUnavailable) as error:
        raise ValueError(str(error)) from error
    # Programs are not voted on; a function that cannot log has no answers to compare
    logs_answers = kinds - {None, "code"} if name == "verifier" else name != "code" and _takes_log_extra(reward_func)
    if num_samples and logs_answers:
        try:
            check_math_verify()
        except ImportError as error:
            raise ValueError(
                f"num_samples is {num_samples}, and votes compare answers by the math verifier. {error}. Or give num_samples: 0."
            ) from error
    return reward_func


def _takes_log_extra(reward_func: Callable) -> bool:
    return "log_extra" in inspect.signature(reward_func).parameters


def _load_sampler(args: EvalArguments, tokenizer: Any, text_format: Any) -> Any:
    from ..evaluation.sampling import SamplingSettings, TransformersSampler, VLLMSampler, load_policy

    settings = SamplingSettings(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    if args.use_vllm:
        with _loading("model_name_or_path", args.model_name_or_path):
            return VLLMSampler(
                args.model_name_or_path,
                tokenizer,
                settings,
                text_format,
                revision=args.model_revision,
                dtype=args.dtype,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_len=args.vllm_max_model_length,
            )
    with _loading("model_name_or_path", args.model_name_or_path):
        model = load_policy(
            args.model_name_or_path,
            args.model_revision,
            args.device_map,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
        )
    return TransformersSampler(model, tokenizer, settings, text_format)


def _load_prm(args: EvalArguments) -> Any:
    from ..implicit_prm.build import load_prm

    with _loading("prm_name_or_path", args.prm_name_or_path):
        return load_prm(
            args.prm_name_or_path,
            revision=args.prm_revision,
            reference=args.prm_reference,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
        )


@contextlib.contextmanager
def _loading(option: str, name: str) -> Iterator[None]:
    """Around loading of a model in the middle of the work: what the libraries refuse is foreseen and told in a sentence."""
    try:
        yield
    except (ImportError, ValueError) as error:
        raise OSError(f"{option} is {name!r}, which could not be loaded: {error}") from error


def _prm_settings(args: EvalArguments) -> dict[str, Any]:
    from ..evaluation.resumable import model_version

    names = ("prm_name_or_path", "prm_revision", "prm_reference", "dtype")
    return {
        **{name: getattr(args, name) for name in names},
        "prm_version": model_version(args.prm_name_or_path, args.prm_revision),
    }


def _equal_answers() -> Callable[[list[tuple[str, str]]], list[bool]]:
    """A function that asks the math verifier which pairs of answers are the same; those that it cannot tell are not."""

    def equal(pairs: list[tuple[str, str]]) -> list[bool]:
        nonlocal reward
        if reward is None:
            from ..rewards.math_rewards import MathReward

            reward = MathReward()
        verdicts = reward.judge_pairs(pairs)
        return [verdicts[pair] == 1.0 for pair in pairs]

    reward = None
    return equal
