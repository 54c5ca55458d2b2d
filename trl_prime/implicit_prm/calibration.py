"""The reference's own confidence as a part of the score, weighted by what it has been worth.

A PRM that has learned nothing gives every completion the score 0, though its reference may well be surer of right completions than
of wrong ones. Here the log-odds of a right outcome are `q + w * C + b`: q is the PRM's score, C the confidence of the reference
summed over the completion, w and b are fitted to outcomes. The reward of a token, `beta * log(pi_phi / pi_ref) + w * c_t`, is then
the implicit reward against a tempered reference, `beta * log pi_phi - (beta - w) * log pi_ref`. Ours; w = 0 is PRIME.

Covered: fitting, and the completions that it goes by. Not covered: where confidences come from (`logps.py`, `batch.py`).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from .losses import base_rate_log_odds, label_log_odds

# Batches that weight and intercept are fitted to
_NUM_BATCHES = 16
# Precision of the normal prior of both: of the weight about 0, per standard deviation of C, of the intercept about the base rate
_RIDGE = 1.0
_NEWTON_STEPS = 20


def fit_reference_weight(
    scores: torch.Tensor,
    confidences: torch.Tensor,
    labels: torch.Tensor,
    weight: float | None = None,
    guess_rate: float = 0.0,
) -> tuple[float, float]:
    """
    Weight w and intercept b under which `q + w * C + b` explains the outcomes best: a logistic regression with q as its offset.

    Args:
        scores (`torch.Tensor`): `(N,)` scores q, in log-odds. NaN rows are left out.
        confidences (`torch.Tensor`): `(N,)` confidences C of the reference, in nats.
        labels (`torch.Tensor`): `(N,)` outcomes between 0 and 1; NaN rows are left out.
        weight (`float`, *optional*): Fixed w: only b is fitted.
        guess_rate (`float`): Share of wrong completions that are right by luck, see [`label_log_odds`].

    Returns:
        `tuple[float, float]`: w, at least 0 and in log-odds per nat, and b, in log-odds. 0, or the fixed weight, and 0 without rows.
    """
    known = ~(scores.isnan() | labels.isnan())
    scores, confidences, labels = (values[known].double() for values in (scores, confidences, labels))
    if not len(labels):
        return weight or 0.0, 0.0
    centre, scale = confidences.mean(), confidences.std(correction=0)
    features = torch.ones(len(labels), 1, dtype=scores.dtype, device=scores.device)
    offset = scores + base_rate_log_odds(labels.mean().item(), guess_rate)
    if weight is not None:
        offset = offset + weight * (confidences - centre)
    elif scale > 1e-6:
        features = torch.cat([features, ((confidences - centre) / scale)[:, None]], dim=1)
    found = features.new_zeros(features.shape[1])
    prior = _RIDGE * torch.eye(len(found), dtype=found.dtype, device=found.device)
    for _ in range(_NEWTON_STEPS):
        log_odds = offset + features @ found
        of_label = label_log_odds(log_odds, guess_rate=guess_rate)
        p = of_label.sigmoid()
        # Derivative of the label's log-odds by those of a right completion; 1 without luck
        share = (log_odds - of_label).exp()
        slope = share + (1 - share) * log_odds.sigmoid()
        gradient = features.T @ ((labels - p) * slope) - prior @ found
        information = (features * (p * (1 - p) * slope**2)[:, None]).T @ features + prior
        step = torch.linalg.solve(information, gradient)
        found = found + step / step.norm().clamp(min=1.0)
    if weight is None:
        weight = (found[1] / scale).item() if len(found) > 1 else 0.0
        if weight < 0:
            return fit_reference_weight(scores, confidences, labels, 0.0, guess_rate)
    return weight, (offset - scores + found[0]).mean().item() - weight * centre.item()


class ReferenceCalibration:
    """
    Weight and intercept of the reference's confidence, by the outcomes of the last batches.

    Args:
        weight (`float`, *optional*): Fixed weight; fitted if not given.
        guess_rate (`float`): Share of wrong completions that are right by luck.

    Attributes:
        weight (`float`): w, 0 before the first batch if it is fitted.
        intercept (`float`): b.
    """

    def __init__(self, weight: float | None = None, guess_rate: float = 0.0):
        self._fixed, self._guess_rate = weight, guess_rate
        self.weight, self.intercept = weight or 0.0, 0.0
        self._batches: deque[torch.Tensor] = deque(maxlen=_NUM_BATCHES)

    def add(self, scores: torch.Tensor, confidences: torch.Tensor, labels: torch.Tensor) -> None:
        """Fit to one more batch: `(B,)` scores of a PRM that has not seen it, confidences and labels of all processes."""
        self._batches.append(torch.stack([scores, confidences, labels.to(scores)]))
        self.weight, self.intercept = fit_reference_weight(
            *torch.cat(list(self._batches), dim=1), self._fixed, self._guess_rate
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"weight": self.weight, "intercept": self.intercept, "batches": list(self._batches)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a state."""
        self.weight, self.intercept = state["weight"], state["intercept"]
        self._batches.extend(batch.to(device) for batch in state["batches"])
