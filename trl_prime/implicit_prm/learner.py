"""The implicit PRM while it learns beside a policy: it scores each rollout batch and is trained on it.

Covered: the order of scoring and learning (`prm_update`), trust, what is logged as `prm/...`, state and weights in a
checkpoint. Not covered: one optimizer step (`updater.py`), where weights are (`backends.py`), and what the rewards of
tokens become: steps, scale and advantages (`prime_trainer.py`).
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch

from ..images import IMAGES
from ..process_rewards import implicit_process_rewards
from ..processes import local_rows, masked_mean
from ..rollouts import policy_mask
from .accuracies import absolute_accuracy, pairwise_accuracy, pairwise_wins
from .backends import DataParallel
from .batch import PRMBatch
from .calibration import ReferenceCalibration
from .files import save_prm, saved_weights
from .logps import batch_completion_logps, check_sees
from .losses import group_rows, label_log_odds, outcome_scores
from .precision import PrecisionProbe
from .second_model import SecondModelLearner
from .trunk import SharedTrunk, TrunkStates, fits_in_memory, shared_trunk
from .trust import Trust
from .updater import PRMUpdater

if TYPE_CHECKING:
    from collections import deque

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..images import RowImages
    from ..prime_config import PRIMEConfig
    from .model import ImplicitPRM


@dataclasses.dataclass(frozen=True)
class PRMScores:
    """
    What the PRM says of a batch.

    Attributes:
        token_rewards (`torch.Tensor`): `(B, T)` process rewards (Eq 3) of this process's rows; zero where the policy did not
            write the token, and in rows that are not trained on.
        trust (`float`): Weight of the process rewards, between 0 and 1.
        metrics (`dict[str, float]`): Logged as `prm/<name>`; NaN where there was nothing to measure.
    """

    token_rewards: torch.Tensor
    trust: float
    metrics: dict[str, float]


class PRMLearner(SecondModelLearner):
    """
    An implicit PRM with its optimizer, replay and trust.

    Args:
        prm ([`ImplicitPRM`]): The PRM, trainable.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        args ([`PRIMEConfig`]): The `prm_*` fields are read.
    """

    name = "prm"
    updater: PRMUpdater | None

    def __init__(self, prm: ImplicitPRM, accelerator: Accelerator, args: PRIMEConfig):
        super().__init__(prm, accelerator, args)
        self.prm = prm
        self.trust = Trust()
        self.calibration: ReferenceCalibration | None = None
        if args.prm_reference_weight != 0:
            fixed = None if args.prm_reference_weight == "fitted" else args.prm_reference_weight
            self.calibration = ReferenceCalibration(fixed, args.prm_guess_rate)
        self.precision = PrecisionProbe(self.backend, args.prm_learning_rate)
        self.trunk: SharedTrunk | None = None
        self._is_checked = self._sees = False
        self._compared: set[bool] = set()  # with images or without: what the trunk has been compared on

    def start(self, num_rollout_batches: int, measure_every: int = 1) -> None:
        """
        Begin to learn, with a new learning-rate schedule; an optimizer and replay that there are already stay.

        Args:
            num_rollout_batches (`int`): Generation batches of the whole run.
            measure_every (`int`): Steps between two measurements of `prm/precision`.
        """
        self.place()
        self.precision.start(measure_every)
        if self.updater is not None:
            self.updater.start_schedule(num_rollout_batches)
        elif self.args.prm_update != "none":
            self.updater = PRMUpdater(self.backend, self.args, num_rollout_batches)

    # --- Scoring and learning ---

    def make_batch(
        self,
        output: dict[str, Any],
        labels: torch.Tensor,
        trains: torch.Tensor,
        num_generations: int,
        policy: PreTrainedModel,
    ) -> PRMBatch:
        """
        This process's rows of a generation batch, with the reference's log-probabilities.

        Args:
            output (`dict`): The rows, as TRL returns them.
            labels (`torch.Tensor`): `(B * processes,)` outcomes of the rows of all processes; NaN = not trained on.
            trains (`torch.Tensor`): `(B * processes,)` bool, which rows are scored and trained on.
            num_generations (`int`): K.
            policy ([`~transformers.PreTrainedModel`]): Gives the reference log-probabilities of a PRM without reference.

        Returns:
            [`PRMBatch`]
        """
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", IMAGES)
        inputs = tuple(output[key] for key in keys if key in output)
        images = output.get(IMAGES)
        self._check_images(images, len(inputs[0]), policy)
        mask = policy_mask(output) & local_rows(trains, self.accelerator)[:, None]
        rows = mask.any(1)
        with self.accelerator.autocast():
            states = self._new_trunk_states(inputs, rows)
            ref_logps, ref_entropies = self._reference_logps(inputs, rows, states, policy), None
            if self.calibration is not None and self.args.prm_reference_centred:
                # One more pass of the reference; its head has all that is needed in the first one already
                ref_entropies = self._reference_logps(inputs, rows, None, policy, entropies=True)
        # A completion without tokens has no score to be compared with
        labels = labels.masked_fill(~self.accelerator.gather(rows), torch.nan)
        group_labels = local_rows(group_rows(labels, num_generations), self.accelerator)
        labels = local_rows(labels, self.accelerator)
        more = {"images": images, "trunk": states, "ref_entropies": ref_entropies}
        return PRMBatch(*inputs[:4], mask, ref_logps, labels, group_labels, **more)

    def _check_images(self, images: RowImages | None, num_rows: int, policy: PreTrainedModel) -> None:
        """
        Refuse models that would not see what the policy has seen; and, where the vision tower is sharded, rows without image beside
        rows with one: not all processes would call it.
        """
        if not self._sees and images is not None and images.is_shown.any():
            for model in (self.prm.model, self.prm.reference or policy):
                check_sees(model)
            self._sees = True
        if not self.backend.forward_is_collective:
            return
        shown = torch.zeros(num_rows, dtype=torch.bool) if images is None else images.is_shown
        shown = self.accelerator.gather(shown.to(self.accelerator.device))
        if shown.any() and not shown.all():
            raise NotImplementedError(
                f"{int(shown.sum())} of {len(shown)} rows of a batch have images, and FSDP2 or ZeRO-3 shards the model: a process "
                "whose rows are text would not call the vision tower that the others wait for. Train on rows that all have images, "
                "or take ddp or zero2."
            )

    def _new_trunk_states(self, inputs: tuple[Any, ...], rows: torch.Tensor) -> TrunkStates | None:
        """
        For the hidden states of the `(B,)` rows of a batch, to be kept by the reference's pass. `None` where PRM and reference share
        no trunk, or memory is short beside those of replayed batches.
        """
        shown = rows & inputs[4].is_shown.to(rows.device) if len(inputs) > 4 else torch.zeros_like(rows)
        has_images = bool(shown.any())
        if has_images not in self._compared and (self.trunk is not None or not self._compared):
            self._compared.add(has_images)
            # Deeper layers may read images, too: a row of the run's own, because nobody else has one for this model
            example = tuple(values[shown.nonzero()[0]] for values in inputs) if has_images else None
            reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
            if type(self.backend) is DataParallel and not (self.args.gradient_checkpointing and reentrant):
                self.trunk = shared_trunk(self.prm, example)
        if self.trunk is None:
            return None
        kept = [batch.trunk for batch in self.updater.replay] if self.updater is not None else []
        num_kept = sum(states.num_bytes for states in kept if states is not None)
        num_tokens = int((inputs[1].sum(1) + inputs[3].sum(1))[rows].sum())
        if not fits_in_memory(self.prm.reference, num_tokens, num_kept):
            return None
        return TrunkStates(self.trunk, inputs[1], inputs[3])

    def _reference_logps(
        self,
        inputs: tuple[Any, ...],
        rows: torch.Tensor,
        states: TrunkStates | None,
        policy: PreTrainedModel | None = None,
        entropies: bool = False,
    ) -> torch.Tensor:
        """
        `(B, T)` log-probabilities of the reference, or of the policy where that is the reference, in the `(B,)` wanted rows; or
        entropies.
        """
        # Rows that do not train are not scored either. The PRM scores the same rows: in other micro-batches it would round apart.
        passes: dict[str, Any] = {"rows": rows, "num_passes": self.backend.num_passes(rows), "entropies": entropies}
        if self.prm.reference is None:
            return batch_completion_logps(policy, *inputs[:4], self.prm.micro_batch_size, *inputs[4:], **passes)
        if states is not None:
            passes["around"] = states.keep
        return self.prm.reference_log_probs(*inputs, **passes)

    def score(self, batch: PRMBatch, labels: torch.Tensor, num_generations: int, step: int) -> PRMScores:
        """
        Score held-out completions; nothing moves.

        Args:
            batch ([`PRMBatch`]): This process's rows.
            labels (`torch.Tensor`): `(B * processes,)` outcomes of the rows of all processes; NaN = not judged.
            num_generations (`int`): K.
            step (`int`): Step of the run, for errors.

        Returns:
            [`PRMScores`]: with full trust.
        """
        logps = self._logps(batch)
        scores = self._calibrated(self._scores(batch, logps, step), batch)
        metrics = {"accuracy": absolute_accuracy(self._label_log_odds(scores), labels)}
        if num_generations > 1:
            metrics["pairwise_accuracy"] = pairwise_accuracy(scores, labels, num_generations)
        return self._result(batch, logps, 1.0, metrics)

    def score_and_learn(self, batch: PRMBatch, labels: torch.Tensor, step: int) -> PRMScores:
        """
        Score a rollout batch and learn from it, in the order that `prm_update` says. Accuracies and trust are those of the PRM
        before it has seen the batch.

        Args:
            batch ([`PRMBatch`]): This process's rows.
            labels (`torch.Tensor`): `(B * processes,)` outcomes of the rows of all processes; NaN = not trained on.
            step (`int`): Step of the run, for errors.

        Returns:
            [`PRMScores`]

        Raises:
            FloatingPointError: A score is not finite.
        """
        args, updater, update, log_odds = self.args, self.updater, None, None
        exact = self.precision.exact_log_ratios(batch, step)
        if updater is not None and updater.can_score:
            # Single forward: the update's own passes give the log-probabilities of the PRM as it was before
            self._check_scoring()
            update = updater.update(batch)
            logps = update.first_logps
            scores = self._scores(batch, logps, step)
        else:
            logps = self._logps(batch)
            scores = self._scores(batch, logps, step)
            if self.calibration is not None:
                own_scores, scores = scores, self._calibrated(scores, batch)
                log_odds = self._label_log_odds(scores)
                self._calibrate(own_scores, labels, batch)
            if updater is not None:
                group_scores = local_rows(group_rows(scores.nan_to_num(), args.num_generations), self.accelerator)
                update = updater.update(dataclasses.replace(batch, group_scores=group_scores))
        metrics = {} if update is None else dict(update.metrics)
        if exact is not None:
            num_updates = 0 if updater is None else updater.scheduler.last_epoch
            metrics["precision"] = self.precision.precision(batch, logps, exact, num_updates)
        metrics["accuracy"] = absolute_accuracy(self._label_log_odds(scores) if log_odds is None else log_odds, labels)
        wins, pairs = pairwise_wins(scores, labels, args.num_generations)
        metrics["pairwise_accuracy"] = wins / pairs if pairs else float("nan")
        self.trust.add(wins, pairs)
        metrics["trust"] = self.trust.weight if args.prm_trust_weighting else 1.0

        updated_logps = None
        if args.prm_update == "before":
            logps = updated_logps = self._logps(batch)
        elif update is not None and args.prm_num_epochs > 1:
            updated_logps = update.last_logps
        if updated_logps is not None:
            updated = self._calibrated(self._scores(batch, updated_logps, step), batch)
            metrics["pairwise_accuracy_after_update"] = pairwise_accuracy(updated, labels, args.num_generations)
        return self._result(batch, logps, metrics["trust"], metrics)

    def _result(self, batch: PRMBatch, logps: torch.Tensor, trust: float, metrics: dict[str, float]) -> PRMScores:
        token_rewards = implicit_process_rewards(logps, batch.ref_logps, batch.policy_mask, self.prm.beta)
        if self.calibration is not None:
            token_rewards = token_rewards + self.calibration.weight * batch.confidences
            metrics["reference_weight"] = self.calibration.weight
        mean = masked_mean(token_rewards, batch.policy_mask, self.accelerator)
        return PRMScores(token_rewards, trust, {**metrics, "process_reward": mean})

    def _label_log_odds(self, scores: torch.Tensor) -> torch.Tensor:
        if self.calibration is not None:
            intercept = self.calibration.intercept
        else:
            intercept = self.updater.intercept if self.updater else 0.0
        return label_log_odds(scores, intercept, self.args.prm_guess_rate)

    def _calibrated(self, scores: torch.Tensor, batch: PRMBatch) -> torch.Tensor:
        """`(B * processes,)` scores with the reference's confidence, by its weight as it is now."""
        if self.calibration is None or not self.calibration.weight:
            return scores
        return scores + self.calibration.weight * self.accelerator.gather(batch.confidences.sum(1))

    def _calibrate(self, scores: torch.Tensor, labels: torch.Tensor, batch: PRMBatch) -> None:
        """Fit the reference's weight to one more batch, for the loss and for process rewards."""
        self.calibration.add(scores, self.accelerator.gather(batch.confidences.sum(1)), labels)
        if self.updater is not None:
            self.updater.reference_weight = self.calibration.weight
            self.updater.intercept = self.calibration.intercept

    def _check_scoring(self) -> None:
        """Check the PRM once, as every pass without gradient does; those of an update are not checked."""
        if not self._is_checked:
            with self.accelerator.autocast():
                self.prm.check_scoring()
            self._is_checked = True

    def _logps(self, batch: PRMBatch) -> torch.Tensor:
        """`(B, T)` log-probabilities under the present PRM of the rows that have any to score; zero elsewhere."""
        rows = batch.has_tokens
        passes = {"rows": rows, "num_passes": self.backend.num_passes(rows), "around": batch.around}
        with self.accelerator.autocast():
            return self.prm.log_probs(*batch.inputs, **passes)

    def _scores(self, batch: PRMBatch, prm_logps: torch.Tensor, step: int) -> torch.Tensor:
        """`(B * processes,)` scores of the completions of all processes; NaN where there was nothing to score."""
        scores = outcome_scores(prm_logps - batch.ref_logps, batch.policy_mask, self.prm.beta)
        # On all processes alike: the others would wait for one that has stopped
        scores, scored = self.accelerator.gather(torch.stack([scores, batch.has_tokens.to(scores)], dim=1)).unbind(1)
        if not scores.isfinite().all():
            raise FloatingPointError(
                f"The implicit PRM gave {scores[~scores.isfinite()][0].item()} for a completion at step {step}. Its weights, the "
                "reference or the rollouts are broken: look at prm/grad_norm of the last steps, lower prm_learning_rate, and "
                "resume from the last checkpoint."
            )
        return scores.masked_fill(scored == 0, torch.nan)

    # --- Saving and loading ---

    def save(self, folder: str, should_save: bool) -> None:
        """Save the PRM in `folder`; all processes call this, and those with `should_save` write."""
        save_prm(self.prm, self.backend, folder, should_save)

    def save_state(self, checkpoint: str, should_save: bool) -> None:
        """Save in a checkpoint what [`PRMLearner.load`] needs beside the PRM itself; all processes call this."""
        more = {} if self.calibration is None else {"calibration": self.calibration.state_dict()}
        self._save_state(checkpoint, should_save, wins=self.trust.wins, pairs=self.trust.pairs, **more)

    def load_weights(self, checkpoint: str) -> None:
        """Load the PRM's weights from a checkpoint of this run or of one like it."""
        if self.updater is None or not self.backend.load_checkpoint(checkpoint):
            self.backend.load_weights(saved_weights(self.prm.model, os.path.join(checkpoint, "prm")))

    def load(self, checkpoint: str) -> None:
        """Load weights, optimizer, schedule, replay and trust; the learner has been started."""
        self.load_weights(checkpoint)
        state = self._load_state(checkpoint)
        self.trust = Trust(state["wins"], state["pairs"])
        if self.calibration is not None and "calibration" in state:
            self.calibration.load_state_dict(state["calibration"], self.accelerator.device)
        if self.updater is not None:
            self._restore_trunk_states(self.updater.replay)

    def _restore_trunk_states(self, replay: deque[PRMBatch]) -> None:
        """Compute the hidden states of replayed batches again, which a checkpoint does not hold."""
        for i, batch in enumerate(replay):
            with self.accelerator.autocast():
                states = self._new_trunk_states(batch.inputs, batch.has_tokens)
                if states is not None:
                    self._reference_logps(batch.inputs, batch.has_tokens, states)
                    replay[i] = dataclasses.replace(batch, trunk=states)
