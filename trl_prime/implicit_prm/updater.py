"""Training the implicit PRM on rollout batches: mini-batches of whole groups, one optimizer step each, and replay.

Covered: which batches and rows an update takes, the loss of a row, the intercept; state for resuming. Not covered: one optimizer
step (`second_model.py`); when to update (`learner.py`).
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from ..processes import local_rows
from .batch import PRMBatch
from .logps import completion_logps, has_dropout
from .losses import (
    COMPARING_LOSSES,
    base_rate_log_odds,
    counted_rows,
    group_rows,
    label_log_odds,
    outcome_scores,
    prm_row_losses,
)
from .second_model import SecondModelUpdater

if TYPE_CHECKING:
    from ..prime_config import PRIMEConfig
    from .backends import DataParallel


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


class PRMUpdater(SecondModelUpdater):
    """
    Optimizer, schedule and replay of an implicit PRM.

    Args:
        backend ([`~trl_prime.implicit_prm.backends.DataParallel`]): Of the PRM; its models have been placed.
        args ([`PRIMEConfig`]): The `prm_*` fields are read.
        num_rollout_batches (`int`): Generation batches of the whole run, for the schedule.
    """

    kind = "PRM"
    remedy = "Lower prm_learning_rate or prm_beta"

    def __init__(self, backend: DataParallel, args: PRIMEConfig, num_rollout_batches: int):
        super().__init__(backend, args, num_rollout_batches)
        self.prm = backend.second
        self.replay: deque[PRMBatch] = deque(maxlen=args.prm_replay_batches)
        # Log-odds added to the scores inside the loss "calibrated_ce", as of the last update
        self.intercept = 0.0
        # Weight of the reference's confidence, which is added too
        self.reference_weight = 0.0

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
            self.replay.append(batch.for_replay())
        return PRMUpdate(self._metrics(results, learning_rate), seen_logps[0], seen_logps[-1])

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

        def row_losses(index: torch.Tensor, counts: bool) -> torch.Tensor:
            with self.accelerator.autocast(), batch.around(index):
                logps = completion_logps(self.backend.model, *(tensor[index] for tensor in batch.inputs))
            if counts:
                seen_logps[index] = logps.detach()
            scores = outcome_scores(logps - batch.ref_logps[index], batch.policy_mask[index], self.prm.beta)
            if self.reference_weight:
                scores = scores + self.reference_weight * batch.confidences[index].sum(1)
            return prm_row_losses(
                label_log_odds(scores, self.intercept, args.prm_guess_rate),
                batch.labels[index],
                args.prm_loss_type,
                None if peer_scores is None else peer_scores[index],
                None if peer_labels is None else peer_labels[index],
            )

        return self._optimize(batch, counted, row_losses), seen_logps

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
            **super().state_dict(),
            "replay": [batch.saved_fields for batch in self.replay],
            "intercept": self.intercept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.replay.clear()
        self.replay.extend(PRMBatch.from_saved(fields, self.accelerator.device) for fields in state["replay"])
        self.intercept = state["intercept"]
