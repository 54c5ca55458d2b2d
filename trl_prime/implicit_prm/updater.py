"""Training the implicit PRM on rollout batches: mini-batches of whole groups, one optimizer step each, and replay.

Covered: gradient accumulation over micro-batches that gives the gradient of the whole batch on all processes, whatever the
micro-batch size and wherever rows without label are; optimizer and schedule; state for resuming. Not covered: when to
update (`learner.py`); where weights and gradients are (`backends.py`).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers.utils import logging

from ..processes import local_rows
from .batch import PRMBatch
from .logps import completion_logps, has_dropout, length_sorted_chunks, num_chunks, rope_boundary, unwrapped
from .losses import (
    COMPARING_LOSSES,
    base_rate_log_odds,
    counted_rows,
    group_rows,
    label_log_odds,
    outcome_scores,
    prm_row_losses,
)
from .optimizer import make_optimizer, make_schedule

if TYPE_CHECKING:
    from ..prime_config import PRIMEConfig
    from .backends import DataParallel

logger = logging.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class PRMUpdate:
    """
    What training on a batch has shown.

    Attributes:
        metrics (`dict[str, float]`): `loss` and `grad_norm`, means over the optimizer steps (NaN where there was none), the
            `learning_rate` of the first step, and `skipped_steps`, those that were left out in the whole run.
        first_logps (`torch.Tensor`): `(B, T)` log-probabilities that the first step on the batch saw, zero in rows that it does
            not train on. They are those of the PRM before the update where [`PRMUpdater.can_score`] says so.
        last_logps (`torch.Tensor`): `(B, T)` log-probabilities that the last step saw.
    """

    metrics: dict[str, float]
    first_logps: torch.Tensor
    last_logps: torch.Tensor


class PRMUpdater:
    """
    Optimizer, schedule and replay of an implicit PRM.

    Args:
        backend ([`~trl_prime.implicit_prm.backends.DataParallel`]): Of the PRM; its models have been placed.
        args ([`PRIMEConfig`]): The `prm_*` fields are read.
        num_rollout_batches (`int`): Generation batches of the whole run, for the schedule.
    """

    def __init__(self, backend: DataParallel, args: PRIMEConfig, num_rollout_batches: int):
        self.backend = backend
        self.prm = prm = backend.prm
        self.args = args
        self.accelerator = backend.accelerator
        self.replay: deque[PRMBatch] = deque(maxlen=args.prm_replay_batches)
        self.skipped_steps = 0
        # Log-odds added to the scores inside the loss "calibrated_ce", as of the last update
        self.intercept = 0.0
        # Weight of the reference's confidence, which is added too
        self.reference_weight = 0.0
        if args.gradient_checkpointing:
            prm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
            if isinstance(prm.model, PeftModel):
                if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
                    prm.model.enable_input_require_grads()
                else:
                    # Transformers asks for it, but only reentrant checkpoints need it: gradients would go through layers
                    # below the adapter
                    unwrapped(prm.model).disable_input_require_grads()
        optimizer = backend.prepare(lambda model: make_optimizer(model, args), args.prm_max_grad_norm)
        self._scheduled = optimizer
        self.start_schedule(num_rollout_batches)

    def start_schedule(self, num_rollout_batches: int) -> None:
        """
        Begin the learning-rate schedule of a run, as `Trainer` does for the policy; weights, optimizer and replay stay.

        Args:
            num_rollout_batches (`int`): Generation batches of the whole run.
        """
        args = self.args
        for group in self._scheduled.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        num_passes = num_rollout_batches * args.prm_num_epochs * (1 + self._num_replayed(args.prm_replay_batches))
        self.scheduler = make_schedule(self._scheduled, args, num_passes * args.mini_batches)

    @property
    def can_score(self) -> bool:
        """
        Whether the next update's own forward passes give the log-probabilities of the PRM as it is now: all gradients of a
        step are taken before it moves. A pass of its own is needed for several mini-batches, for losses that compare scores,
        where a replayed batch is trained on first, where scores come into the loss by the weight of the reference, and with
        dropout.
        """
        moves_between = self.args.mini_batches > 1 or self.replay
        compares = self.args.prm_loss_type in COMPARING_LOSSES
        calibrates = self.args.prm_reference_weight != 0
        return not (moves_between or compares or calibrates or has_dropout(self.prm.model.modules()))

    def update(self, batch: PRMBatch) -> PRMUpdate:
        """
        Train on a rollout batch and, before it, on those kept for replay or on `prm_replay_steps` of them, oldest first.

        Args:
            batch ([`~trl_prime.implicit_prm.batch.PRMBatch`]): The rollouts, with `group_scores` unless [`can_score`] is true.

        Returns:
            [`PRMUpdate`]
        """
        args, learning_rate = self.args, self.scheduler.get_last_lr()[0]
        if args.prm_loss_type == "calibrated_ce" and args.prm_reference_weight == 0:
            self.intercept = self._base_rate_log_odds([*self.replay, batch])
        num_replayed = self._num_replayed(len(self.replay))
        # By the place in the schedule: the same on all processes and in a resumed run
        rng = random.Random(f"{args.seed} {self.scheduler.last_epoch}")
        results, seen_logps = [], []
        for epoch in range(args.prm_num_epochs):
            drawn = [self.replay[i] for i in sorted(rng.sample(range(len(self.replay)), num_replayed))]
            for replayed in drawn:
                for rows in self._mini_batches(replayed):
                    results.append(self._step(replayed, rows, keep_scores=args.prm_update == "reverse")[0])
            seen_logps.append(torch.zeros_like(batch.ref_logps))
            for number, rows in enumerate(self._mini_batches(batch)):
                # The scores taken before the update are still those of the present PRM at the very first step
                fresh = epoch == number == 0 and not drawn and args.prm_update != "before"
                result, logps = self._step(batch, rows, keep_scores=fresh or args.prm_update == "reverse")
                results.append(result)
                seen_logps[-1] += logps
        if self.replay.maxlen:
            self.replay.append(batch)
        made = [result for result in results if result is not None]
        loss, grad_norm = torch.tensor(made).mean(0).tolist() if made else (float("nan"), float("nan"))
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_steps": self.skipped_steps,
        }
        return PRMUpdate(metrics, seen_logps[0], seen_logps[-1])

    def _num_replayed(self, num_kept: int) -> int:
        return num_kept if self.args.prm_replay_steps is None else min(num_kept, self.args.prm_replay_steps)

    def _mini_batches(self, batch: PRMBatch) -> list[torch.Tensor]:
        """`(B,)` bool, this process's rows of each mini-batch: every n-th group, so that all processes have a like share."""
        first = self.accelerator.process_index * len(batch.labels)
        rows = torch.arange(first, first + len(batch.labels), device=batch.labels.device)
        number = rows // self.args.num_generations % self.args.mini_batches
        return [number == i for i in range(self.args.mini_batches)]

    def _step(
        self, batch: PRMBatch, rows: torch.Tensor, keep_scores: bool
    ) -> tuple[tuple[float, float] | None, torch.Tensor]:
        """
        One optimizer step on the mean loss over those of the `(B,)` rows that count, on all processes: loss and gradient norm,
        or `None` where none counts, and the `(B, T)` log-probabilities that it saw, zero in rows that do not count.
        """
        args = self.args
        seen_logps = torch.zeros_like(batch.ref_logps)
        peer_scores = peer_labels = None
        if args.prm_loss_type in COMPARING_LOSSES:
            peer_scores = batch.group_scores if keep_scores else self._group_scores(batch, rows)
            peer_labels = batch.group_labels
        counted = rows & counted_rows(batch.labels, batch.policy_mask, args.prm_loss_type, peer_labels)
        num_counted_per_process = self.accelerator.gather(counted.sum().view(1))
        total = int(num_counted_per_process.sum())
        if total == 0:
            return None, seen_logps

        rows = counted.nonzero().flatten()
        masks, boundary = (batch.prompt_mask[rows], batch.completion_mask[rows]), rope_boundary(self.prm.model)
        chunks = [rows[i] for i in length_sorted_chunks(*masks, args.prm_micro_batch_size, boundary)]
        # All processes must run equally many micro-batches, or DDP hangs. One with fewer repeats row 0 with weight 0.
        num_passes = num_chunks(int(num_counted_per_process.max()), args.prm_micro_batch_size, boundary)
        filler = torch.zeros(1, dtype=torch.long, device=rows.device)
        chunks += [None] * (num_passes - len(chunks))
        self.prm.model.train()
        loss_sum = torch.zeros((), device=rows.device)
        for i, chunk in enumerate(chunks):
            index = filler if chunk is None else chunk
            with self.backend.micro_batch(last=i == num_passes - 1):
                with self.accelerator.autocast(), batch.around(index):
                    logps = completion_logps(self.backend.model, *(tensor[index] for tensor in batch.inputs))
                scores = outcome_scores(logps - batch.ref_logps[index], batch.policy_mask[index], self.prm.beta)
                if self.reference_weight:
                    scores = scores + self.reference_weight * batch.confidences[index].sum(1)
                losses = prm_row_losses(
                    label_log_odds(scores, self.intercept, args.prm_guess_rate),
                    batch.labels[index],
                    args.prm_loss_type,
                    None if peer_scores is None else peer_scores[index],
                    None if peer_labels is None else peer_labels[index],
                )
                loss = losses.sum() * (0.0 if chunk is None else 1.0 / total)
                self.backend.backward(loss)
            if chunk is not None:
                seen_logps[chunk] = logps.detach()
            loss_sum += loss.detach()

        # The same on all processes: gradients are exchanged before they are measured
        grad_norm = self.backend.step()
        if not math.isfinite(grad_norm):
            self.skipped_steps += 1
            logger.warning(
                f"The gradient of the PRM is {grad_norm}: this optimizer step is left out ({self.skipped_steps} so "
                "far). Lower prm_learning_rate or prm_beta if it happens again."
            )
        self.scheduler.step()
        return (self.accelerator.reduce(loss_sum, "sum").item(), grad_norm), seen_logps

    def _base_rate_log_odds(self, batches: list[PRMBatch]) -> float:
        """
        [`base_rate_log_odds`] of the completions on all processes; 0 without any label.
        """
        labels = torch.cat([batch.labels for batch in batches])
        total, count = self.accelerator.reduce(torch.stack([labels.nansum(), (~labels.isnan()).sum()]), "sum").tolist()
        if not count:
            return 0.0
        return base_rate_log_odds(total / count, self.args.prm_guess_rate)

    def _group_scores(self, batch: PRMBatch, rows: torch.Tensor) -> torch.Tensor:
        """
        `(B, K)` scores by the present PRM of the whole group of each of the `(B,)` rows, zero in others; a group may be split
        over processes.
        """
        rows = rows & batch.has_tokens
        passes = {"num_passes": self.backend.num_passes(rows), "around": batch.around}
        with self.accelerator.autocast():
            logps = self.prm.log_probs(*batch.inputs, rows=rows, **passes)
        scores = outcome_scores(logps - batch.ref_logps, batch.policy_mask, self.prm.beta)
        return local_rows(group_rows(self.accelerator.gather(scores), self.args.num_generations), self.accelerator)

    def state_dict(self) -> dict[str, Any]:
        """
        The state that a resumed run needs beside the weights: optimizer, schedule and, of this process, replay, without hidden
        states of the trunk.
        """
        return {
            "optimizer": self.backend.optimizer_state(),
            "scheduler": self.scheduler.state_dict(),
            "replay": [batch.saved_fields for batch in self.replay],
            "skipped_steps": self.skipped_steps,
            "intercept": self.intercept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.backend.load_optimizer_state(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.replay.clear()
        device = self.accelerator.device
        for fields in state["replay"]:
            self.replay.append(
                PRMBatch(**{name: value if value is None else value.to(device) for name, value in fields.items()})
            )
        self.skipped_steps, self.intercept = state["skipped_steps"], state["intercept"]
