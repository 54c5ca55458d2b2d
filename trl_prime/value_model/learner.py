"""The value model while it learns beside a policy: it values each rollout batch, and is trained on the returns.

Covered: its loss in an optimizer step, what is logged as `value/...`, weights and state in a checkpoint. Not covered: the step itself
(`implicit_prm/second_model.py`), returns and loss as formulas (`values.py`), advantages (`advantages.py`).
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import torch

from ..implicit_prm.files import trained_weights
from ..implicit_prm.second_model import SecondModelLearner, SecondModelUpdater
from ..processes import gather_padded, local_rows
from ..values import explained_variance, value_row_losses
from .model import ValueModel, build_value_model, completion_values

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..advantages import RolloutRewards
    from ..implicit_prm.batch import PRMBatch
    from ..prime_config import PRIMEConfig

# In a checkpoint: the weights of the value model that are trained
WEIGHTS_NAME = "value_model.pt"
# What is logged of the values of each source of reward
_EXPLAINED = ("explained_variance", "process_explained_variance")


class ValueUpdater(SecondModelUpdater):
    """Optimizer and schedule of a value model, see [`~trl_prime.implicit_prm.second_model.SecondModelUpdater`]."""

    kind = "value model"
    remedy = "Lower value_learning_rate"

    def update(self, batch: PRMBatch, values: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        """
        Train on a rollout batch. The loss is a mean over the tokens that the policy wrote, of all processes.

        Args:
            batch ([`~trl_prime.implicit_prm.batch.PRMBatch`]): The rollouts of this process.
            values, targets (`torch.Tensor`): `(B, T, 2)`: what the model gave before the update, and what it should give.

        Returns:
            `dict[str, float]`: `loss`, `grad_norm`, `learning_rate` and `skipped_steps`, as of the PRM.
        """
        learning_rate = self.scheduler.get_last_lr()[0]

        def row_losses(index: torch.Tensor, counts: bool) -> torch.Tensor:
            with self.accelerator.autocast():
                present = completion_values(self.backend.model, *(tensor[index] for tensor in batch.inputs))
            rows = (values[index], targets[index], batch.policy_mask[index])
            return value_row_losses(present, *rows, self.args.value_clip_range)

        results = []
        for _ in range(self.args.value_num_epochs):
            for rows in self._mini_batches(batch):
                counted = rows & batch.has_tokens
                results.append(self._optimize(batch, counted, row_losses, batch.policy_mask[counted].sum()))
        return self._metrics(results, learning_rate)


class ValueLearner(SecondModelLearner):
    """
    A value model with its optimizer.

    Args:
        value_model ([`~trl_prime.value_model.model.ValueModel`]): The model, trainable.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        args ([`PRIMEConfig`]): Configuration of the run.
    """

    name = "value"
    updater: ValueUpdater | None

    def __init__(self, value_model: ValueModel, accelerator: Accelerator, args: PRIMEConfig):
        super().__init__(value_model, accelerator, args.for_value_model())
        self.value_model = value_model

    def start(self, num_rollout_batches: int) -> None:
        """
        Begin to learn, with a new learning-rate schedule; an optimizer that there is already stays.

        Args:
            num_rollout_batches (`int`): Generation batches of the whole run.
        """
        self.place()
        if self.updater is not None:
            self.updater.start_schedule(num_rollout_batches)
        else:
            self.updater = ValueUpdater(self.backend, self.args, num_rollout_batches)

    def value_and_learn(
        self, batch: PRMBatch, rewards: RolloutRewards, step: int
    ) -> tuple[RolloutRewards, dict[str, float]]:
        """
        Value a rollout batch and learn from its returns. Values and what they explain are those of the model before it has seen
        the batch.

        Args:
            batch ([`~trl_prime.implicit_prm.batch.PRMBatch`]): This process's rows.
            rewards ([`~trl_prime.advantages.RolloutRewards`]): Rewards of the rows of all processes.
            step (`int`): Step of the run, for errors.

        Returns:
            `tuple[RolloutRewards, dict[str, float]]`: the rewards with `values`, and what is logged as `value/<name>`.

        Raises:
            FloatingPointError: A value is not finite.
        """
        rows = batch.has_tokens
        with self.accelerator.autocast():
            values = self.value_model.values(*batch.inputs, rows=rows, num_passes=self.backend.num_passes(rows))
        rewards = dataclasses.replace(rewards, values=gather_padded(values, self.accelerator))
        if not rewards.values.isfinite().all():
            raise FloatingPointError(
                f"The value model gave values that are not finite at step {step}. Look at value/grad_norm of the last steps, lower "
                "value_learning_rate, and resume from the last checkpoint."
            )
        # A source without weight teaches nothing: its value stays where it began, at zero
        is_used = torch.tensor([self.args.outcome_weight, self.args.process_weight], device=values.device) != 0
        targets = torch.where(is_used, rewards.value_targets(self.args.gae_lambda), rewards.values)
        metrics = self.updater.update(batch, values, local_rows(targets, self.accelerator)[:, : values.shape[1]])
        # By the rewards that came: returns of a smaller lambda hold the values themselves
        returns, mask = rewards.value_targets(gae_lambda=1.0), rewards.completion_mask
        for i, name in enumerate(_EXPLAINED):
            if is_used[i]:
                metrics[name] = explained_variance(rewards.values[..., i], returns[..., i], mask)
        return rewards, metrics

    def save_state(self, checkpoint: str, should_save: bool) -> None:
        """Save the value model and its optimizer in a checkpoint; all processes call this."""
        weights = trained_weights(self.backend)
        self._save_state(checkpoint, should_save)  # makes the folder
        if should_save:
            torch.save(weights, os.path.join(checkpoint, WEIGHTS_NAME))

    def load(self, checkpoint: str) -> None:
        """Load weights, optimizer and schedule; the learner has been started."""
        path = os.path.join(checkpoint, WEIGHTS_NAME)
        self.backend.load_weights(torch.load(path, map_location="cpu", weights_only=True))
        self._load_state(checkpoint)


def make_value_learner(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, args: PRIMEConfig
) -> ValueLearner | None:
    """
    The value model of a run with its learner, if its estimator needs one.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model starts from it as it is.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): That of the rollouts.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        args ([`PRIMEConfig`]): Configuration of the run.

    Returns:
        [`ValueLearner`], *optional*.
    """
    if not args.needs_value_model:
        return None
    return ValueLearner(build_value_model(policy, tokenizer, args), accelerator, args)
