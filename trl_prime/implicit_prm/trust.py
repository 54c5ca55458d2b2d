"""How far the implicit PRM may be believed: a running count of pairs of completions that it ranks right, and one formula."""

from __future__ import annotations

import dataclasses
import math

# How much of the past is kept with each batch
_DECAY = 0.9
# As how many pairs, half of them won, the count starts: the PRM starts out guessing
_PRIOR_PAIRS = 16.0
# By how many standard errors the accuracy is taken to be worse than measured
_STANDARD_ERRORS = 1.5


@dataclasses.dataclass
class Trust:
    """
    The weight of process rewards, from the pairwise accuracy on rollouts that the PRM had not been trained on.

    Attributes:
        wins (`float`): Pairs that the PRM ranked right, those of earlier batches discounted.
        pairs (`float`): All pairs, discounted alike.
    """

    wins: float = _PRIOR_PAIRS / 2
    pairs: float = _PRIOR_PAIRS

    def add(self, wins: float, pairs: int) -> None:
        """Count the pairs of one batch, see [`~trl_prime.implicit_prm.accuracies.pairwise_wins`]; none leave all as it was."""
        if pairs:
            self.wins = _DECAY * self.wins + wins
            self.pairs = _DECAY * self.pairs + pairs

    @property
    def weight(self) -> float:
        """`max(0, 2 * a - 1)`, a being 1.5 standard errors below the accuracy: 0 while the PRM guesses, below 1 always."""
        accuracy = self.wins / self.pairs
        # With few pairs, a PRM that knows nothing can win most of them by luck. The variance is at least that of an accuracy
        # of 0.9, so that a few pairs that were all won leave a doubt too.
        standard_error = math.sqrt(max(accuracy * (1 - accuracy), 0.09) / self.pairs)
        return max(0.0, 2 * (accuracy - _STANDARD_ERRORS * standard_error) - 1)
