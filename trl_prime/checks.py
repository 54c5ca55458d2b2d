"""Checks: what cannot work is refused before a model is loaded, and what a user's functions return is refused when they do.

Covered: arguments of the trainer, columns of the data set, tokenizers; numbers of a step that are not finite; results of
reward functions, plain and async, of rollout functions and of the reward-combination hook. Not covered: single settings
(`prime_config.py`), and a function that never returns. It can do so for good reasons, so a limit of time is its own affair:
the verifiers in `rewards/` have one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl import GRPOTrainer

from .implicit_prm import ImplicitPRM
from .implicit_prm.adapters import QUANTIZED, no_virtual_tokens
from .implicit_prm.files import is_adapter, is_saved_prm
from .implicit_prm.logps import FUSED_LM_HEAD, add_fused_lm_head, unwrapped
from .policy_loss import vary_within_rows
from .prime_config import PRIMEConfig
from .specs import nearest

if TYPE_CHECKING:
    from transformers import TrainerState

    from .advantages import RewardCombination, RolloutRewards

logger = logging.get_logger(__name__)

# Keyword arguments that TRL gives to every reward function beside the columns of the data set
_REWARD_KWARGS = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
    "self",
}
# What has been said of batches that teach nothing, once in a process
_IDLE_BATCHES: set[str] = set()


# --- Before a model is loaded ---


def check_before_loading(
    grpo: dict[str, Any], prm_model: Any, prm_peft_config: PeftConfig | None, reward_combination: Any
) -> None:
    """
    Refuse what cannot work before any model is loaded.

    Args:
        grpo (`dict`): Arguments of [`~trl.GRPOTrainer`] by name, `args` and `model` among them.
        prm_model, prm_peft_config, reward_combination: Arguments of [`PRIMETrainer`].

    Raises:
        TypeError, ValueError, NotImplementedError: The message names the argument, its value and the remedy.
    """
    args = grpo["args"]
    if not isinstance(args, PRIMEConfig):
        raise TypeError(
            f"args is a {type(args).__name__}, but PRIMETrainer needs a PRIMEConfig: it has the PRM's settings."
        )
    if args.prm_reference == "policy" and args.deepspeed_plugin and args.deepspeed_plugin.zero_stage == 3:
        raise NotImplementedError(
            "prm_reference='policy' does not go with DeepSpeed ZeRO-3, which cannot mix the policy's own forward pass with the "
            "fused one that TRL trains by. Use prm_reference='frozen', ZeRO-2 or FSDP2."
        )
    if args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
        raise NotImplementedError(
            "use_liger_kernel=True makes this version of TRL compute the policy's loss by Liger, which takes one advantage for "
            "each completion, not for each token. Leave it out, or use a TRL whose GRPOTrainer has no loss by Liger (1.16)."
        )
    if reward_combination is not None and not callable(reward_combination):
        raise TypeError(
            f"reward_combination is {reward_combination!r}; pass a callable that takes RolloutRewards. In YAML, give its dotted "
            "path."
        )
    _check_models(grpo, prm_model, prm_peft_config)
    _check_value_model(grpo, reward_combination)
    _check_prm_is_trainable(grpo, prm_model, prm_peft_config)
    _check_tokenizers(grpo, prm_model)
    _check_train_dataset(grpo)
    _check_chat_template(grpo)


def _check_models(grpo: dict[str, Any], prm_model: Any, prm_peft_config: PeftConfig | None) -> None:
    """Refuse models that do not go together, and folders that hold something else than a model."""
    init_kwargs = grpo["args"].prm_model_init_kwargs
    if init_kwargs and not isinstance(prm_model, str):
        raise ValueError(
            f"prm_model_init_kwargs is {init_kwargs}, but prm_model is no name or folder that a model would be loaded from. Name "
            "one, or use model_init_kwargs: without prm_model the PRM starts as a copy of the policy."
        )
    if (is_saved_prm(prm_model) or isinstance(prm_model, ImplicitPRM)) and prm_peft_config is not None:
        raise ValueError(
            "prm_model is an ImplicitPRM or the folder of one, which is full or LoRA already: leave prm_peft_config out."
        )
    if isinstance(prm_model, PeftModel) and prm_peft_config is not None:
        raise ValueError("prm_model is a PeftModel already: leave prm_peft_config out, or pass the bare base.")
    if isinstance(prm_model, ImplicitPRM) and prm_model.reference is None and grpo["args"].prm_reference == "frozen":
        raise ValueError(
            "prm_model is an ImplicitPRM without a reference, but prm_reference is 'frozen'. Pass one with a reference, or set "
            "prm_reference='policy' to measure it against the policy."
        )
    if prm_model is not None and not isinstance(prm_model, str) and prm_model is grpo["model"]:
        raise ValueError(
            "prm_model is the policy itself, but they are trained apart. Leave prm_model out: the PRM then starts as a copy."
        )
    for option, name in (("model", grpo["model"]), ("prm_model", prm_model)):
        if isinstance(name, str) and is_adapter(name):
            raise ValueError(
                f"{option} is '{name}', which holds an adapter only. Load it with its base: pass "
                "peft.AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True)."
            )


def _check_value_model(grpo: dict[str, Any], reward_combination: Any) -> None:
    """Refuse what an estimator with a value model does not go with."""
    args = grpo["args"]
    if not args.needs_value_model:
        return
    estimator = f"advantage_estimator={args.advantage_estimator!r}"
    if reward_combination is not None:
        raise ValueError(
            f"{estimator} does not go with reward_combination: the value model learns the returns of the rewards as configured, and "
            "not of what a hook makes of them. Leave the hook out, or use another estimator, such as 'rloo'."
        )
    if args.deepspeed_plugin:
        raise NotImplementedError(
            f"{estimator} does not run with DeepSpeed: a value model beside policy and PRM would be a third engine, which was "
            "never tried. Use DDP or FSDP2, or another estimator, such as 'rloo'."
        )
    policy_config = _policy_adapter(grpo)
    if policy_config is not None and policy_config.is_prompt_learning:
        raise ValueError(
            f"{estimator} does not go with a {type(policy_config).__name__}: the value model is an adapter of the policy's kind, and "
            "with virtual tokens it would not start from the policy's base. Use an adapter of the weights, such as LoraConfig."
        )


def _policy_adapter(grpo: dict[str, Any]) -> PeftConfig | None:
    """The settings of the policy's adapter, if it has one."""
    policy = grpo["model"]
    if grpo.get("peft_config") is None and isinstance(policy, PeftModel):
        return policy.active_peft_config
    return grpo.get("peft_config")


def _check_tokenizers(grpo: dict[str, Any], prm_model: Any) -> None:
    """Refuse a PRM with another tokenizer than the policy's, where both can be known."""
    trust_remote_code, tokenizer = grpo["args"].trust_remote_code, grpo.get("processing_class")
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    prm_tokenizer = _tokenizer_of(prm_model, trust_remote_code)
    if prm_tokenizer is not None:
        tokenizer = tokenizer or _tokenizer_of(grpo["model"], trust_remote_code)
        if tokenizer is not None:
            _check_same_tokenizer(tokenizer, prm_tokenizer)


def _check_train_dataset(grpo: dict[str, Any]) -> None:
    """Refuse a training data set with too few prompts, or without the columns that the reward functions ask for."""
    train_dataset, reward_funcs = grpo.get("train_dataset"), grpo.get("reward_funcs")
    if isinstance(train_dataset, dict):
        raise ValueError(
            f"train_dataset is a {type(train_dataset).__name__} with the splits {', '.join(map(str, train_dataset))}: pass one of "
            f"them, train_dataset=dataset[{next(iter(train_dataset), 'train')!r}]."
        )
    if isinstance(train_dataset, Dataset):
        _check_enough_prompts(len(train_dataset), grpo["args"])
    elif isinstance(train_dataset, IterableDataset) and grpo["args"].filter_max_rounds > 1:
        raise ValueError(
            f"filter_max_rounds is {grpo['args'].filter_max_rounds}, but the training data set is streamed, and prompts of further "
            "rounds are drawn from all of it. Load it as a whole (streaming=False), or leave filter_max_rounds at 1 and raise "
            "oversample_factor."
        )
    if train_dataset is None or grpo.get("environment_factory") is not None:
        return
    columns = _columns(train_dataset)
    if columns is None:
        return
    if "prompt" not in columns:
        # Not at the top: data formats bring the verifiers along
        from .data.adapters import guess_format

        guess = guess_format(columns)
        remedy = "Load it by `trl_prime.load_prime_dataset(name, format)`, rename a column (`dataset.rename_column`), or map the rows"
        if guess is not None:
            remedy = f"They look like {guess!r}: load it by `trl_prime.load_prime_dataset(name, {guess!r})`, or map the rows"
        raise ValueError(
            f"The training data set has no column 'prompt'; its columns are {sorted(columns)}. {remedy} to TRL's prompt format."
        )
    if grpo.get("rollout_func") is not None:
        return  # it may add columns of its own
    for func in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if callable(func) and not isinstance(func, torch.nn.Module):
            _check_reward_columns(func, columns)


def _check_chat_template(grpo: dict[str, Any]) -> None:
    """Refuse prompts that are messages where the policy's tokenizer cannot render them, as those of base models."""
    dataset, args = grpo.get("train_dataset"), grpo["args"]
    if grpo.get("rollout_func") is not None or not isinstance(dataset, (Dataset, IterableDataset)):
        return
    prompt = next(iter(dataset), {}).get("prompt", "")
    tokenizer = grpo.get("processing_class") or _tokenizer_of(grpo["model"], args.trust_remote_code)
    if isinstance(prompt, str) or tokenizer is None or "chat_template" in (args.chat_template_kwargs or {}):
        return
    if tokenizer.chat_template is None:
        raise ValueError(
            "The policy's tokenizer has no chat template, but the prompts are messages. Make them plain text, plain_prompts: "
            "true in a recipe and load_prime_dataset(..., plain_prompts=True) in Python, or give the tokenizer a chat template."
        )


def _check_reward_columns(func: Callable, columns: set[str]) -> None:
    parameters = inspect.signature(func).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown = sorted({"prompts", "completions", "completion_ids", "trainer_state"} - {*parameters})
        if unknown:
            raise ValueError(
                f"The reward function '{getattr(func, '__name__', type(func).__name__)}' takes no {unknown[0]!r}, but TRL passes "
                "that and every column of the data set. Add **kwargs to its arguments."
            )
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.KEYWORD_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        )
        if required and name not in _REWARD_KWARGS and name not in columns:
            raise ValueError(
                f"The reward function '{getattr(func, '__name__', type(func).__name__)}' needs a column {name!r}, but the "
                f"training data set has {sorted(columns)}. {nearest(name, sorted(columns))}"
            )


def warn_of_uneven_saving(args: PRIMEConfig) -> None:
    """Warn where checkpoints lie between two generations: a run resumed from one differs from the run that was stopped."""
    per_generation = args.steps_per_generation * args.num_iterations
    if args.save_strategy == "steps" and args.save_steps * args.gradient_accumulation_steps % per_generation:
        logger.warning(
            f"save_steps={args.save_steps} ends between two generations (one lasts {per_generation} "
            f"micro-batches, a step has {args.gradient_accumulation_steps}): a run resumed from such a checkpoint generates "
            "anew and will not repeat the one that was stopped to the bit."
        )


def check_sharded_heads(policy: torch.nn.Module, prm: torch.nn.Module, distributed_type: DistributedType) -> None:
    """
    Refuse a trained head whose gradient would be that of one process: FSDP2 shards the head of a vision-language model by itself, and
    TRL's fused head reads its weights past FSDP2.

    Args:
        policy, prm (`nn.Module`): What is trained, before it is sharded.
        distributed_type ([`~accelerate.utils.DistributedType`]): How it will be.

    Raises:
        NotImplementedError: Policy or PRM trains such a head.
    """
    if distributed_type != DistributedType.FSDP:
        return
    for name, model, is_fused in (
        ("policy", unwrapped(policy), add_fused_lm_head is not None),
        ("implicit PRM", unwrapped(prm), FUSED_LM_HEAD in vars(unwrapped(prm))),
    ):
        sees_images = model.config.get_text_config() is not model.config
        if sees_images and is_fused and any(p.requires_grad for p in model.get_output_embeddings().parameters()):
            raise NotImplementedError(
                f"The {name}, a {type(model).__name__}, is a vision-language model whose head is trained under FSDP2, where each process "
                "would follow its own rows' gradient of the head. Use ddp, or adapters that leave the head alone "
                "(peft_config, prm_peft_config; use_peft and prm_use_peft in a recipe)."
            )


def check_prm_label(prm_label: str, reward_func_names: list[str]) -> None:
    """Raise a ValueError unless `prm_label` is "reward" or the name of a reward function."""
    if prm_label != "reward" and prm_label not in reward_func_names:
        raise ValueError(
            f"prm_label is {prm_label!r}, but no reward function has that name. "
            f"{nearest(prm_label, ['reward', *reward_func_names])}"
        )


def check_trained(state: TrainerState, args: PRIMEConfig) -> None:
    """Raise a RuntimeError where a run has ended without a step: the length of a streamed data set is not known before."""
    if state.max_steps and not state.global_step:
        raise RuntimeError(
            f"The training data set ended before a generation batch of {args.prompts_per_generation} prompts was full, so "
            "that nothing was trained. Lower per_device_train_batch_size, steps_per_generation or oversample_factor, or give "
            "more prompts."
        )


def _check_enough_prompts(num_prompts: int, args: PRIMEConfig) -> None:
    """TRL drops an incomplete generation batch: a run without a whole one would end without a step."""
    needed = args.prompts_per_generation
    if num_prompts < needed:
        raise ValueError(
            f"The training data set has {num_prompts} prompts, but one generation batch takes {needed}: "
            f"generation_batch_size={args.generation_batch_size} completions, num_generations={args.num_generations} of each "
            f"prompt, oversample_factor={args.oversample_factor:g}. Not a single step could be made. Lower "
            "per_device_train_batch_size, steps_per_generation or oversample_factor, or give more prompts."
        )


def _check_prm_is_trainable(grpo: dict[str, Any], prm_model: Any, prm_peft_config: PeftConfig | None) -> None:
    """Refuse a PRM that would be trained as a whole on a quantized start, and adapters that no PRM can have."""
    args, policy = grpo["args"], grpo["model"]
    if prm_peft_config is not None:
        if prm_peft_config.is_prompt_learning:
            raise ValueError(no_virtual_tokens(prm_peft_config))
    elif prm_model is None or isinstance(prm_model, str):
        kwargs = (args.prm_model_init_kwargs if prm_model is not None else None) or args.model_init_kwargs or {}
        quantized = kwargs.get("quantization_config") is not None
        if prm_model is None:
            quantized |= isinstance(policy, str) and grpo.get("quantization_config") is not None
        if quantized and not is_saved_prm(prm_model):
            raise ValueError(QUANTIZED)
    policy_config = _policy_adapter(grpo)
    if policy_config is not None and policy_config.is_prompt_learning and args.prm_reference == "policy":
        raise ValueError(
            f"prm_reference='policy' does not go with a {type(policy_config).__name__}: the PRM starts without the policy's virtual "
            "tokens and would differ from it from the beginning. Use prm_reference='frozen'."
        )


def _tokenizer_of(model: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer that belongs to a model given in any form; None where an instance does not say where it came from."""
    if isinstance(model, ImplicitPRM):
        return model.tokenizer
    if isinstance(model, str):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = getattr(base, "name_or_path", None)
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None  # an instance need not have come with a tokenizer; its size is checked later


def _columns(dataset: Dataset | IterableDataset) -> set[str] | None:
    """Column names, of a streamed data set by its first row; None where they cannot be known."""
    names = getattr(dataset, "column_names", None)
    if names is None and isinstance(dataset, IterableDataset):
        first = next(iter(itertools.islice(dataset, 1)), None)
        names = first and list(first)
    return set(names) if names else None


def _check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """The PRM reads the policy's token ids: a single different id mis-scores silently."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in ours if theirs.get(token) != ours[token])
    if not different:
        return  # the PRM knows tokens that the policy never writes
    raise ValueError(
        f"The PRM's tokenizer differs from the policy's: {len(different)} of {len(ours)} tokens have another id or none, "
        f"{different[0]!r} first. The PRM reads the policy's token ids, so use one of the same model family."
    )


# --- While a step is made ---


def warn_of_idle_batch(
    passed: torch.Tensor, num_groups: int, args: PRIMEConfig, metrics: dict[str, list[float]], num_rounds: int
) -> None:
    """
    Warn once where no group of a generation batch has passed the prompt filter, with what tells why.

    Args:
        passed (`torch.Tensor`): `(G,)` bool.
        num_groups (`int`): Groups of a training batch.
        args ([`PRIMEConfig`]): The configuration.
        metrics (`dict`): What TRL has measured, by name; the last values of each are the batch's, one for each round.
        num_rounds (`int`): Rounds of generation.
    """
    said = (
        f"0 of {len(passed)} groups passed the prompt filter (accuracy between {args.accuracy_low} and {args.accuracy_high}), but "
        f"a generation batch needs {num_groups}."
    )
    if not passed.any() and said not in _IDLE_BATCHES:
        _IDLE_BATCHES.add(said)  # `warning_once` would take other numbers for another warning
        reward, clipped = (
            statistics.fmean(metrics.get(name, [math.nan])[-num_rounds:])
            for name in ("reward", "completions/clipped_ratio")
        )
        logger.warning(
            f"{said} Their mean reward is {reward:.3g}, and {clipped:.0%} of the completions were cut off at "
            f"max_completion_length={args.max_completion_length}. Nothing is learnt from such batches (filter/pass_rate is 0)."
        )


def check_advantages(advantages: torch.Tensor, mask: torch.Tensor, importance_sampling_level: str, step: int) -> None:
    """
    Refuse advantages that would ruin the policy, or that TRL would average.

    Args:
        advantages (`torch.Tensor`): `(B, T)`.
        mask (`torch.Tensor`): `(B, T)` bool, the tokens that the policy wrote.
        importance_sampling_level (`str`): "token" or "sequence".
        step (`int`): Step of the run.

    Raises:
        FloatingPointError: One is not finite.
        ValueError: Those of a completion differ, and the level is "sequence".
    """
    if not advantages.isfinite().all():
        raise FloatingPointError(f"Advantages are not finite at step {step}; nothing was trained.")
    if importance_sampling_level == "sequence" and vary_within_rows(advantages, mask).any():
        raise ValueError(
            "importance_sampling_level='sequence' gives all tokens of a completion one weight and would average their "
            "advantages, but reward_combination returned advantages that differ within a completion. Use "
            "importance_sampling_level='token'."
        )


def check_loss(losses: torch.Tensor, step: int) -> None:
    """Raise a FloatingPointError unless the `(processes,)` policy losses of a micro-batch are finite."""
    if not losses.isfinite().all():
        raise FloatingPointError(
            f"The policy's loss is not finite at step {step}, so this step was not made: its log-probabilities or those of the "
            "rollouts are broken. Lower learning_rate or max_grad_norm, and resume from the last checkpoint."
        )


def check_grad_norm(norm: float, step: int) -> None:
    """Raise a FloatingPointError unless the norm of the policy's gradient is finite."""
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"The gradient of the policy is {norm} at step {step}, and one step with it would ruin all weights. Lower "
            "learning_rate or max_grad_norm, and resume from the last checkpoint."
        )


# --- The functions that a user passes ---


def checked_reward_func(func: Callable, name: str) -> Callable:
    """
    A reward function whose errors name it.

    Args:
        func (`Callable`): Reward function in TRL's form, plain or async.
        name (`str`): Its name, which metrics have too.

    Returns:
        `Callable`: The same function. What it raises is raised on, with a note. It returns `list[float | None]`.

    Raises:
        TypeError: When called, if the result is no list, or has an entry that is neither a number nor None.
        ValueError: When called, if the result has another length than the completions.
    """

    def checked(rewards: Any, args: tuple, kwargs: dict[str, Any]) -> list[float | None]:
        if isinstance(rewards, (str, dict)) or not isinstance(rewards, Iterable):
            raise TypeError(
                f"The reward function '{name}' returned {rewards!r:.100}; return a list with one number per completion."
            )
        rewards = list(rewards)
        # TRL passes the completions by name. Who calls the function by hand may pass them by position, or leave them out.
        completions = kwargs.get("completions")
        if completions is None and args:
            completions = inspect.signature(func).bind(*args, **kwargs).arguments.get("completions")
        if completions is not None and len(rewards) != len(completions):
            raise ValueError(
                f"The reward function '{name}' returned {len(rewards)} rewards for {len(completions)} completions; return "
                "one per completion, None for one that it cannot judge."
            )
        return [number(reward, i) for i, reward in enumerate(rewards)]

    def number(reward: Any, i: int) -> float | None:
        try:
            if not isinstance(reward, str):
                return None if reward is None else float(reward)
        except (TypeError, ValueError, RuntimeError):
            pass
        raise TypeError(
            f"The reward function '{name}' returned {reward!r:.100} for completion {i}; return a number, or None for a "
            "completion that it cannot judge."
        )

    @contextlib.contextmanager
    def naming() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            note = f"This was raised in the reward function '{name}'."
            if hasattr(error, "add_note"):
                error.add_note(note)
            else:  # Python 3.10
                logger.error(note)
            raise

    if inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(func.__call__):

        @functools.wraps(func)
        async def wrapper(*args: Any, **kwargs: Any) -> list[float | None]:
            with naming():
                rewards = await func(*args, **kwargs)
            return checked(rewards, args, kwargs)
    else:

        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> list[float | None]:
            with naming():
                rewards = func(*args, **kwargs)
            return checked(rewards, args, kwargs)

    return wrapper


def checked_rollout_func(func: Callable) -> Callable:
    """
    A rollout function that is told when a completion has no token: TRL looks at the last token of each.

    Args:
        func (`Callable`): Rollout function in TRL's form.

    Returns:
        `Callable`: The same function.

    Raises:
        ValueError: When called, if a completion is empty.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> dict[str, Any]:
        output = func(*args, **kwargs)
        lengths = [len(ids) for ids in output.get("completion_ids", [])]
        if 0 in lengths:
            raise ValueError(
                f"The rollout function '{getattr(func, '__name__', type(func).__name__)}' returned no tokens for completion "
                f"{lengths.index(0)} ({lengths.count(0)} of {len(lengths)} are empty). End every completion with the "
                "tokenizer's eos token."
            )
        return output

    return wrapper


def checked_combination(hook: RewardCombination, rewards: RolloutRewards) -> torch.Tensor:
    """
    Advantages from a user's hook, refused when they could harm the run.

    Args:
        hook (`Callable`): Takes [`RolloutRewards`], returns `(B, T)` advantages.
        rewards ([`RolloutRewards`]): The batch.

    Returns:
        `torch.Tensor`: `(B, T)` advantages, zero where masked.

    Raises:
        TypeError: The hook returned no tensor.
        ValueError: The hook returned another shape, or NaN or infinity at an unmasked token.
    """
    function = getattr(hook, "func", hook)  # of a functools.partial
    name = getattr(function, "__qualname__", type(function).__qualname__)
    advantages = hook(rewards)
    if not isinstance(advantages, torch.Tensor):
        raise TypeError(
            f"The reward combination '{name}' returned {type(advantages).__name__}; return a (B, T) tensor of advantages."
        )
    expected = tuple(rewards.completion_mask.shape)
    if tuple(advantages.shape) != expected:
        raise ValueError(
            f"The reward combination '{name}' returned shape {tuple(advantages.shape)}, but one advantage per token was "
            f"expected: {expected}, as `rewards.completion_mask`."
        )
    advantages = advantages.detach().to(rewards.process_rewards.device, torch.float32)
    advantages = advantages.masked_fill(~rewards.completion_mask, 0.0)
    if not advantages.isfinite().all():
        row, token = (~advantages.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"The reward combination '{name}' returned {advantages[row, token].item()} for completion {row}, token {token}. "
            "Outcomes that could not be judged are NaN: leave them out of every mean, or call `rewards.combine()`."
        )
    return advantages
