"""How much of the process rewards is rounding: those of a bfloat16 run beside the same in float32, once in a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from ..process_rewards import correlation
from .backends import DataParallel
from .logps import in_float32

if TYPE_CHECKING:
    from .batch import PRMBatch

logger = logging.get_logger(__name__)

# Completions whose process rewards are compared with those in float32
_ROWS = 2
# Updates after which a low precision is warned of: before, a PRM has not moved yet
_UPDATES = 10


class PrecisionProbe:
    """
    Measures `prm/precision` on the main process, in a few completions of one batch each `every` steps.

    Args:
        backend ([`~trl_prime.implicit_prm.backends.DataParallel`]): Of the PRM.
        learning_rate (`float`): That of the PRM, for the warning.
    """

    def __init__(self, backend: DataParallel, learning_rate: float):
        self.backend = backend
        self.learning_rate = learning_rate
        self.every = 1
        self.next_step = 0

    def start(self, every: int) -> None:
        """Begin a run, whose steps count from zero, with so many steps between two measurements."""
        self.every, self.next_step = every, 0

    def _can_measure(self) -> bool:
        """Whether the run computes in bfloat16 with models that could compute in float32."""
        prm, accelerator = self.backend.second, self.backend.accelerator
        return (
            accelerator.mixed_precision == "bf16"
            and type(self.backend) is DataParallel
            and accelerator.is_main_process
            and prm.reference is not None
            and all(p.dtype == torch.float32 for model in (prm.model, prm.reference) for p in model.parameters())
        )

    def exact_log_ratios(self, batch: PRMBatch, step: int) -> torch.Tensor | None:
        """
        `(B, T)` log-ratios of the present PRM in float32, zero but in a few rows; `None` where nothing is to be measured.

        Args:
            batch ([`~trl_prime.implicit_prm.batch.PRMBatch`]): The rollouts.
            step (`int`): Step of the run.
        """
        if step < self.next_step or not self._can_measure():
            return None
        self.next_step = step + self.every
        prm, rows = self.backend.second, batch.has_tokens
        rows &= rows.cumsum(0) <= _ROWS
        with in_float32(prm.model), in_float32(prm.reference):
            return prm.log_probs(*batch.inputs, rows=rows) - prm.reference_log_probs(*batch.inputs, rows=rows)

    def precision(self, batch: PRMBatch, prm_logps: torch.Tensor, exact: torch.Tensor, num_updates: int) -> float:
        """
        Correlation of the token rewards of a batch with those in float32.

        Args:
            batch ([`~trl_prime.implicit_prm.batch.PRMBatch`]): The rollouts.
            prm_logps (`torch.Tensor`): `(B, T)` log-probabilities by the same PRM as `exact`, in the run's precision.
            exact (`torch.Tensor`): What [`exact_log_ratios`] returned.
            num_updates (`int`): Optimizer steps that the PRM has made.
        """
        seen = batch.policy_mask & (exact != 0).any(1, keepdim=True)
        precision = correlation((prm_logps - batch.ref_logps)[seen], exact[seen])
        if num_updates > _UPDATES and precision < 0.5:
            logger.warning_once(
                f"After {num_updates} updates of the PRM its process rewards are mostly rounding: in bfloat16 they correlate by "
                f"{precision:.2f} with those in float32 (prm/precision). The PRM has moved too little: raise prm_learning_rate, "
                f"which is {self.learning_rate:g} (1e-5 for all weights, 1e-4 or more with prm_peft_config)."
            )
        return precision
