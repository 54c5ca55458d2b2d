"""Labelled completions and pairs as token ids, and batches of them.

An example is a prompt with C completions: one, or the two of a pair. n = examples of a batch, P = prompt tokens, T =
completion tokens. Not covered: the forms of the data (`data.py`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging
from trl.trainer.utils import pad

from ..texts import TextFormat, tokenize
from ..version import __version__
from .data import group_by_prompt, to_labelled, to_pairs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from .offline_prm_config import OfflinePRMConfig

logger = logging.get_logger(__name__)


def prepare_dataset(
    dataset: Dataset,
    name: str,
    args: OfflinePRMConfig,
    tokenizer: PreTrainedTokenizerBase,
    text_format: TextFormat,
) -> Dataset:
    """
    Examples as token ids: `prompt_ids`, `completion_ids` (a list of C), `labels` (of each) and `group`.

    A group holds what is compared: the completions of a prompt or, as preferences of different pairs need not be
    comparable, of a pair.
    """
    with args.main_process_first(desc=f"preparing the {name} data"):
        if args.loss_type == "dpo":
            dataset = to_pairs(dataset, args.max_pairs_per_prompt, args.seed)
        else:
            dataset = to_labelled(dataset)
        num_rows = len(dataset)
        # The version is there for the cache of `map`, which tells functions apart by their name only
        encode = functools.partial(
            _encode,
            tokenizer=tokenizer,
            text_format=text_format,
            version=__version__,
        )
        options = {"num_proc": args.dataset_num_proc}
        dataset = dataset.map(
            encode, with_indices=True, remove_columns=dataset.column_names, desc=f"Tokenizing {name} data", **options
        )
        judged = dataset.filter(_is_judged, input_columns="labels", desc=f"Unjudged {name} rows", **options)
        fits = functools.partial(_fits, max_length=args.max_length)
        columns = ["prompt_ids", "completion_ids"]
        dataset = judged.filter(fits, input_columns=columns, desc=f"Overlong {name} rows", **options)
    if num_rows > len(judged):
        logger.warning(f"Left out {num_rows - len(judged)} of {num_rows} {name} rows that have no label.")
    if len(judged) > len(dataset):
        logger.warning(
            f"Left out {len(judged) - len(dataset)} of {num_rows} {name} rows that are longer than max_length="
            f"{args.max_length} tokens."
        )
    if len(dataset) == 0:
        raise ValueError(
            f"None of the {num_rows} {name} rows is left: they have no label, or max_length is too short."
        )
    groups = list(range(len(dataset)))
    if args.loss_type != "dpo":
        for group, rows in enumerate(group_by_prompt(dataset["prompt_ids"][:])):
            for row in rows:
                groups[row] = group
    return dataset.add_column("group", groups)


def _encode(
    row: dict[str, Any],
    i: int,
    tokenizer: PreTrainedTokenizerBase,
    text_format: TextFormat,
    version: str,
) -> dict[str, Any]:
    labels = [1.0, 0.0]
    completions = [row.get("chosen"), row.get("rejected")]
    if "completion" in row:
        completions = [row["completion"]]
        labels = [float("nan") if row["label"] is None else float(row["label"])]
        if labels[0] < 0 or labels[0] > 1:
            raise ValueError(f"Row {i} has the label {row['label']}, but labels are outcomes between 0 and 1.")
    if row["prompt"] is None or None in completions:
        raise ValueError(f"Row {i} has no prompt or no completion: leave such rows out.")
    try:
        encoded = [
            tokenize(tokenizer, row["prompt"], completion, text_format, bool(row.get("truncated")))
            for completion in completions
        ]
    except ValueError as error:
        raise ValueError(f"Row {i} cannot be tokenized: {error}") from error
    return {"prompt_ids": encoded[0][0], "completion_ids": [ids for _, ids in encoded], "labels": labels}


def _is_judged(labels: list[float | None]) -> bool:
    return all(label is not None and label == label for label in labels)


def _fits(prompt_ids: list[int], completion_ids: list[list[int]], max_length: int | None) -> bool:
    if not all(completion_ids):
        return False  # it was cut off before its first token
    return max_length is None or all(len(prompt_ids) + len(ids) <= max_length for ids in completion_ids)


class OutcomeCollator:
    """
    Examples into a batch: `prompt_ids`, `prompt_mask` `(n, P)` padded on the left, `completion_ids`, `completion_mask`
    `(n, C, T)` padded on the right, `labels` `(n, C)` and `groups` `(n, 1)`.

    Args:
        pad_token_id (`int`): Fills up.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [torch.tensor(example["prompt_ids"], dtype=torch.long) for example in examples]
        completions = [
            torch.tensor(ids, dtype=torch.long) for example in examples for ids in example["completion_ids"]
        ]
        size = (len(examples), -1)
        return {
            "prompt_ids": pad(prompts, self.pad_token_id, "left"),
            "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
            "completion_ids": pad(completions, self.pad_token_id).unflatten(0, size),
            "completion_mask": pad([torch.ones_like(ids) for ids in completions], 0).unflatten(0, size),
            "labels": torch.tensor([example["labels"] for example in examples], dtype=torch.float32),
            "groups": torch.tensor([[example["group"]] for example in examples]),
        }


def completion_rows(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt ids and mask `(n * C, P)`, completion ids and mask `(n * C, T)`: a row for each completion."""
    num_completions = batch["completion_ids"].shape[1]
    prompts = (batch[name].repeat_interleave(num_completions, dim=0) for name in ("prompt_ids", "prompt_mask"))
    return (*prompts, batch["completion_ids"].flatten(0, 1), batch["completion_mask"].flatten(0, 1))


def mismatched_rows(groups: torch.Tensor) -> torch.Tensor:
    """
    For each row the next one, around the end, that belongs to another prompt.

    Args:
        groups (`torch.Tensor`): `(n, 1)` numbers of the prompts.

    Returns:
        `torch.Tensor`: `(m, 2)` indices of the row and of the other; rows without one are left out.
    """
    n = len(groups)
    rows = torch.arange(n, device=groups.device)
    distance = (rows[None, :] - rows[:, None]) % n
    nearest = torch.where(groups == groups.T, n, distance).min(dim=1)
    return torch.stack([rows, nearest.indices], dim=1)[nearest.values < n]
