"""Optimizer and learning-rate schedule of the PRM, as `Trainer` would make them under the `prm_*` settings, and default rates."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import logging

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from ..prime_config import PRIMEConfig

logger = logging.get_logger(__name__)

Settings = TypeVar("Settings", bound=TrainingArguments)
SUITS_ADAPTERS = "which suits an adapter"


def with_defaults(args: Settings, defaults: dict[str, tuple[float, str]]) -> Settings:
    """
    Settings with defaults that depend on the models.

    Args:
        args ([`~transformers.TrainingArguments`]): Stays as it is.
        defaults (`dict[str, tuple[float, str]]`): By field its value where there is `None`, and the reason, which is logged, or an
            empty text for the value that users expect.

    Returns:
        [`~transformers.TrainingArguments`]: a copy.
    """
    args = copy.copy(args)
    for name, (value, reason) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
            if reason:
                logger.warning(f"{name} is not set: {value:.3g} is used, {reason}.")
    return args


def make_schedule(optimizer: torch.optim.Optimizer, args: PRIMEConfig, num_training_steps: int) -> LRScheduler:
    """
    The learning-rate schedule of the PRM.

    Args:
        optimizer (`torch.optim.Optimizer`): Whose learning rates follow it.
        args ([`PRIMEConfig`]): `prm_lr_scheduler_type`, `prm_lr_scheduler_kwargs` and `prm_warmup_steps` are read.
        num_training_steps (`int`): Optimizer steps of the PRM in the whole run.

    Returns:
        `torch.optim.lr_scheduler.LRScheduler`
    """
    return get_scheduler(
        args.prm_lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.prm_warmup_steps,
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=args.prm_lr_scheduler_kwargs,
    )


def make_optimizer(model: torch.nn.Module, args: PRIMEConfig) -> torch.optim.Optimizer:
    """The optimizer that `Trainer` would make for this model under the `prm_*` settings."""
    prm_args = copy.copy(args)
    prm_args.optim, prm_args.learning_rate = args.prm_optim, args.prm_learning_rate
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(prm_args, model)
    # Reads nothing of the trainer it is a method of
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": args.prm_weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    return optimizer_class([group for group in groups if group["params"]], **kwargs)
