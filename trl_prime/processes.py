"""Rows of this process and of all processes. The rows of all processes are those of each, one process after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


def local_rows(values: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """This process's `(B, ...)` rows of the `(B * processes, ...)` rows of all."""
    size = values.shape[0] // accelerator.num_processes
    return values[accelerator.process_index * size : (accelerator.process_index + 1) * size]


def gather_padded(
    values: torch.Tensor, accelerator: Accelerator, pad_index: int = 0, pad_first: bool = False
) -> torch.Tensor:
    """
    The rows of all processes, which may be of different lengths.

    Args:
        values (`torch.Tensor`): `(B, T)` rows of this process.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        pad_index (`int`): Value that fills up.
        pad_first (`bool`): Whether it stands before a row.

    Returns:
        `torch.Tensor`: `(B * processes, T)`, with the largest T of all.
    """
    is_bool = values.dtype == torch.bool
    # Padding makes another type of a bool, on those processes alone that pad
    values = values.int() if is_bool else values
    padded = accelerator.pad_across_processes(values, dim=1, pad_index=pad_index, pad_first=pad_first)
    gathered = accelerator.gather(padded)
    return gathered.bool() if is_bool else gathered


def masked_mean(values: torch.Tensor, mask: torch.Tensor, accelerator: Accelerator) -> float:
    """Mean of the `(B, T)` values where the bool mask of the same shape is true, over all processes; NaN if it is nowhere."""
    total, count = accelerator.reduce(torch.stack([values[mask].sum(), mask.sum().float()]), "sum").tolist()
    return total / count if count else float("nan")
