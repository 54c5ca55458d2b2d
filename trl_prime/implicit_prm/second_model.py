"""A model that is trained beside the policy, on the same rollouts: the implicit PRM, and the value model of GAE.

Covered: what the two have in common when they learn. An optimizer step accumulates gradients over micro-batches that add up to the
gradient of the whole batch on all processes, whatever the micro-batch size and wherever rows that do not count are; mini-batches
are whole groups; optimizer and schedule, gradients that are not finite, state for resuming. Not covered: what a row's loss is,
and what is made of a batch (`updater.py`, `learner.py`, `value_model/learner.py`); where weights and gradients are (`backends.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import PeftModel
from transformers.utils import logging

from .backends import make_backend
from .files import load_learner_state, save_learner_state
from .logps import length_sorted_chunks, num_chunks, rope_boundary, unwrapped
from .optimizer import make_optimizer, make_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from ..prime_config import PRIMEConfig
    from .backends import DataParallel
    from .batch import PRMBatch

logger = logging.get_logger(__name__)


class SecondModel(Protocol):
    """
    What a backend distributes.

    Attributes:
        model (`nn.Module`): Is trained.
        reference (`nn.Module`, *optional*): Is frozen.
        micro_batch_size (`int`): Completions of one forward pass.
    """

    model: nn.Module
    reference: nn.Module | None
    micro_batch_size: int


class SecondModelUpdater:
    """
    Optimizer and schedule of a model beside the policy.

    Args:
        backend ([`~trl_prime.implicit_prm.backends.DataParallel`]): Of the model, which has been placed.
        args ([`PRIMEConfig`]): The `prm_*` fields are read; see [`PRIMEConfig.for_value_model`].
        num_rollout_batches (`int`): Generation batches of the whole run, for the schedule.
    """

    # For messages: the model, and what lowers its gradients
    kind = "model"
    remedy = ""

    def __init__(self, backend: DataParallel, args: PRIMEConfig, num_rollout_batches: int):
        self.backend = backend
        self.args = args
        self.accelerator = backend.accelerator
        self.skipped_steps = 0
        model = backend.second.model
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
            if isinstance(model, PeftModel):
                if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
                    model.enable_input_require_grads()
                else:
                    # Transformers asks for it, but only reentrant checkpoints need it: gradients would go through layers
                    # below the adapter
                    unwrapped(model).disable_input_require_grads()
        self._scheduled = backend.prepare(lambda model: make_optimizer(model, args), args.prm_max_grad_norm)
        self.start_schedule(num_rollout_batches)

    def start_schedule(self, num_rollout_batches: int) -> None:
        """
        Begin the learning-rate schedule of a run, as `Trainer` does for the policy; weights and optimizer stay.

        Args:
            num_rollout_batches (`int`): Generation batches of the whole run.
        """
        args = self.args
        for group in self._scheduled.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        num_passes = num_rollout_batches * args.prm_num_epochs * (1 + self._num_replayed(args.prm_replay_batches))
        self.scheduler = make_schedule(self._scheduled, args, num_passes * args.mini_batches)

    def _num_replayed(self, num_kept: int) -> int:
        return num_kept if self.args.prm_replay_steps is None else min(num_kept, self.args.prm_replay_steps)

    def _mini_batches(self, batch: PRMBatch) -> list[torch.Tensor]:
        """`(B,)` bool, this process's rows of each mini-batch: every n-th group, so that all processes have a like share."""
        first = self.accelerator.process_index * len(batch.labels)
        rows = torch.arange(first, first + len(batch.labels), device=batch.labels.device)
        number = rows // self.args.num_generations % self.args.mini_batches
        return [number == i for i in range(self.args.mini_batches)]

    def _optimize(
        self,
        batch: PRMBatch,
        counted: torch.Tensor,
        row_losses: Callable[[torch.Tensor, bool], torch.Tensor],
        num_terms: torch.Tensor | None = None,
    ) -> tuple[float, float] | None:
        """
        One optimizer step on the mean loss over the rows that count, on all processes.

        Args:
            batch ([`~trl_prime.implicit_prm.batch.PRMBatch`]): The rollouts.
            counted (`torch.Tensor`): `(B,)` bool, the rows that count.
            row_losses (`Callable[[torch.Tensor, bool], torch.Tensor]`): Gives the `(b,)` losses of a micro-batch of `(b,)` rows by
                the model as it is now. Is told whether they count: row 0 is there for one that only fills up.
            num_terms (`torch.Tensor`, *optional*): Scalar, of how many terms the losses of this process's rows are sums: the mean
                is over these. Each row is one by default.

        Returns:
            `tuple[float, float]`: loss and gradient norm; `None` where no row counts.
        """
        num_rows = counted.sum()
        sizes = torch.stack([num_rows, num_rows if num_terms is None else num_terms])
        num_rows_per_process, num_terms_per_process = self.accelerator.gather(sizes[None]).T
        total = int(num_terms_per_process.sum())
        if total == 0:
            return None

        second, rows = self.backend.second, counted.nonzero().flatten()
        masks, boundary = (batch.prompt_mask[rows], batch.completion_mask[rows]), rope_boundary(second.model)
        chunks = [rows[i] for i in length_sorted_chunks(*masks, self.args.prm_micro_batch_size, boundary)]
        # All processes must run equally many micro-batches, or DDP hangs. One with fewer repeats row 0 with weight 0.
        num_passes = num_chunks(int(num_rows_per_process.max()), self.args.prm_micro_batch_size, boundary)
        filler = torch.zeros(1, dtype=torch.long, device=rows.device)
        chunks += [None] * (num_passes - len(chunks))
        second.model.train()
        loss_sum = torch.zeros((), device=rows.device)
        for i, chunk in enumerate(chunks):
            with self.backend.micro_batch(last=i == num_passes - 1):
                losses = row_losses(filler if chunk is None else chunk, chunk is not None)
                loss = losses.sum() * (0.0 if chunk is None else 1.0 / total)
                self.backend.backward(loss)
            loss_sum += loss.detach()

        # The same on all processes: gradients are exchanged before they are measured
        grad_norm = self.backend.step()
        if not math.isfinite(grad_norm):
            self.skipped_steps += 1
            logger.warning(
                f"The gradient of the {self.kind} is {grad_norm}: this optimizer step is left out ({self.skipped_steps} so "
                f"far). {self.remedy} if it happens again."
            )
        self.scheduler.step()
        return self.accelerator.reduce(loss_sum, "sum").item(), grad_norm

    def _metrics(self, results: list[tuple[float, float] | None], learning_rate: float) -> dict[str, float]:
        """Means of loss and gradient norm over the optimizer steps that were made, NaN where none was."""
        made = [result for result in results if result is not None]
        loss, grad_norm = torch.tensor(made).mean(0).tolist() if made else (float("nan"), float("nan"))
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_steps": self.skipped_steps,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs beside the weights: optimizer and schedule."""
        return {
            "optimizer": self.backend.optimizer_state(),
            "scheduler": self.scheduler.state_dict(),
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.backend.load_optimizer_state(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.skipped_steps = state["skipped_steps"]


class SecondModelLearner:
    """
    A model beside the policy with what makes it learn, from the first batch to a checkpoint.

    Args:
        second ([`SecondModel`]): The model, trainable.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        args ([`PRIMEConfig`]): Settings of its updater.

    Attributes:
        backend ([`~trl_prime.implicit_prm.backends.DataParallel`]): How it is distributed.
        updater ([`SecondModelUpdater`], *optional*): `None` before the start, and of a model that does not learn.
    """

    # Of its files in a checkpoint
    name = ""

    def __init__(self, second: SecondModel, accelerator: Accelerator, args: PRIMEConfig):
        self.accelerator = accelerator
        self.args = args
        self.backend = make_backend(second, accelerator)
        self.updater: SecondModelUpdater | None = None
        self._is_placed = False

    def place(self) -> None:
        """Bring the model to where it computes, and its reference, once. The policy is distributed first."""
        if not self._is_placed:
            self.backend.place()
            self._is_placed = True

    def _save_state(self, checkpoint: str, should_save: bool, **more: Any) -> None:
        """Save optimizer, schedule and more that a process has; all processes call this."""
        state = {**more, "updater": None if self.updater is None else self.updater.state_dict()}
        save_learner_state(checkpoint, self.name, state, self.backend, should_save)
        if self.updater is not None:
            self.backend.save_checkpoint(checkpoint)

    def _load_state(self, checkpoint: str) -> dict[str, Any]:
        """Load what [`_save_state`] saved into the updater, if there is one; all of it."""
        state = load_learner_state(checkpoint, self.name, self.backend, with_optimizer=self.updater is not None)
        if self.updater is not None:
            self.updater.load_state_dict(state["updater"])
        return state
