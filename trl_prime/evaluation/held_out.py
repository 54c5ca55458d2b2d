"""Measures of a policy and its PRM on the held-out problems of a run.

Covered: accuracy by greedy decoding and by sampling; the PRM's accuracy on those samples, and how well it finds the first
wrong step where a task knows the truth of each step. Not covered: pass@k, best-of-N, benchmarks (`end_to_end.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from ..implicit_prm.accuracies import absolute_accuracy, pairwise_accuracy
from .judging import as_completions, judge
from .sampling import SamplingSettings, TransformersSampler
from .statistics import first_error_auc

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..implicit_prm import ImplicitPRM
    from ..texts import TextFormat


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
    text_format: TextFormat | None = None,
) -> list[Any]:
    """
    One completion for each prompt, in the prompts' format.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (`list[str]` or `list[list[dict]]`): Text, or messages that the chat template renders.
        max_new_tokens (`int`): Longest completion in tokens.
        temperature (`float`): 0 is greedy.
        batch_size (`int`): Prompts at a time.
        seed (`int`): Seed of the one random stream that all samples are drawn from.
        text_format ([`~trl_prime.texts.TextFormat`], *optional*): How the run renders messages.

    Returns:
        `list[str]` or `list[list[dict]]`: as `prompts`.
    """
    sampler = TransformersSampler(model, tokenizer, SamplingSettings(max_new_tokens, temperature or 1.0), text_format)
    stream = torch.Generator(model.device).manual_seed(seed)
    completions: list[Any] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        samples = sampler(batch, stream if temperature else [None] * len(batch))
        completions += as_completions(batch, [sample.text for sample in samples])
    return completions


def outcomes(reward_func: Callable, dataset: Dataset, completions: Sequence[Any]) -> torch.Tensor:
    """`(N,)` rewards of one completion for each row of a data set; NaN where the function could not judge."""
    rewards, _ = judge(reward_func, dataset, completions)
    return torch.tensor([float("nan") if reward is None else reward for reward in rewards])


def measure_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_func: Callable,
    *,
    max_new_tokens: int,
    num_samples: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    text_format: TextFormat | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[dict[str, float], Dataset, list[Any], torch.Tensor]:
    """
    Accuracy on held-out problems.

    Args:
        model, tokenizer, max_new_tokens, batch_size, seed, text_format: as in [`generate`].
        dataset ([`~datasets.Dataset`]): N problems with a `prompt` column and those that `reward_func` reads.
        reward_func (`Callable`): Outcome reward; a completion that it cannot judge counts as wrong.
        num_samples (`int`): Completions per problem at temperature 1.
        accelerator ([`~accelerate.Accelerator`], *optional*): Its processes, all of which have to call this with the same
            arguments, share the problems. Each gets the result of all.

    Returns:
        `tuple`: `{"greedy", "sampled"}` accuracies between 0 and 1; the problems, each repeated `num_samples` times; a
        sampled completion and its reward for each of those rows.
    """
    rank, num_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    # Each process has as many problems, some twice if need be, because reward functions may wait for those of the others
    num_mine = math.ceil(len(dataset) / num_processes)
    mine = [(rank + i * num_processes) % len(dataset) for i in range(num_mine)]
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed + rank}
    settings["text_format"] = text_format
    problems, repeated = dataset.select(mine), dataset.select(_repeat(mine, num_samples))
    greedy = outcomes(reward_func, problems, generate(model, tokenizer, problems["prompt"][:], **settings))
    samples = generate(model, tokenizer, repeated["prompt"][:], temperature=1.0, **settings)
    sampled = outcomes(reward_func, repeated, samples)
    if num_processes > 1:
        found = {
            row: (greedy[i], samples[i * num_samples : (i + 1) * num_samples], sampled.view(num_mine, -1)[i])
            for i, row in enumerate(mine)
        }
        found = dict(gather_object(list(found.items())))
        everything = [found[row] for row in range(len(dataset))]
        repeated = dataset.select(_repeat(range(len(dataset)), num_samples))
        greedy, sampled = torch.stack([row[0] for row in everything]), torch.cat([row[2] for row in everything])
        samples = [sample for row in everything for sample in row[1]]
    accuracies = {"greedy": greedy.nan_to_num().mean().item(), "sampled": sampled.nan_to_num().mean().item()}
    return accuracies, repeated, samples, sampled


def _repeat(rows: Iterable[int], times: int) -> list[int]:
    return [row for row in rows for _ in range(times)]


def measure_prm(
    prm: ImplicitPRM,
    dataset: Dataset,
    completions: Sequence[Any],
    rewards: torch.Tensor,
    num_samples: int,
    step_labels: Callable[[str, str], list[bool]] | None = None,
) -> dict[str, float]:
    """
    Accuracy of the PRM on completions whose outcome is known.

    Args:
        prm ([`ImplicitPRM`]): The PRM.
        dataset ([`~datasets.Dataset`]): A row for each completion; the `num_samples` of one problem stand together.
        completions (`list`): N completions.
        rewards (`torch.Tensor`): `(N,)` outcomes; NaN = could not be judged.
        num_samples (`int`): Completions per problem.
        step_labels (`Callable`, *optional*): Maps prompt and completion to whether each step is right.

    Returns:
        `dict[str, float]`: `pairwise_accuracy`, `accuracy` and, with `step_labels`, `first_error_auc`.
    """
    prompts = dataset["prompt"][:]
    scored = prm.score(prompts, completions)
    scores = torch.tensor([completion.reward for completion in scored])
    result = {
        "pairwise_accuracy": pairwise_accuracy(scores, rewards, num_samples),
        "accuracy": absolute_accuracy(scores, rewards),
    }
    if step_labels is not None:
        truth = [step_labels(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        result["first_error_auc"] = first_error_auc([completion.step_rewards for completion in scored], truth)
    return result
