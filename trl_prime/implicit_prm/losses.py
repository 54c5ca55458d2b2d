"""Losses of the implicit PRM (PRIME, arXiv 2502.01456, Eq 4 and section 5; arXiv 2412.01981).

Covered: cross-entropy, plain and calibrated to the base rate and to lucky guesses; the detached DPO loss and its two best-of-N
weightings; DPO on pairs and KTO, for training offline. Not covered: where scores come from (`logps.py`) and training on them
(`updater.py`, `offline_prm_trainer.py`). A score q is the process reward summed over a completion, that is the log-odds of a
right outcome. B = completions, K = completions per prompt.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Losses that compare the completions of a group with each other
COMPARING_LOSSES = ("dpo", "bon_acc", "bon_rm")
LOSS_TYPES = ("ce", "calibrated_ce", *COMPARING_LOSSES)
# Losses of the offline trainer. Its "dpo" trains on both completions of a given pair; the online "dpo" compares a completion
# with the detached mean of its peers.
OFFLINE_LOSS_TYPES = ("ce", "dpo", "kto")


def outcome_scores(log_ratios: torch.Tensor, mask: torch.Tensor, beta: float) -> torch.Tensor:
    """`(B,)` scores q: `beta` times the `(B, T)` log-ratios in nats, summed over the unmasked tokens, at least float32."""
    log_ratios = log_ratios.to(torch.promote_types(log_ratios.dtype, torch.float32))
    return beta * log_ratios.masked_fill(~mask.bool(), 0.0).sum(-1)


def label_log_odds(scores: torch.Tensor, intercept: float = 0.0, guess_rate: float = 0.0) -> torch.Tensor:
    """
    Log-odds that a completion is labelled right, where some wrong ones are too: of `g + (1 - g) * sigmoid(q + b)`, the
    three-parameter logistic model of item response theory. Ours; with `g = b = 0` those of Eq 4.

    Args:
        scores (`torch.Tensor`): scores q, of any shape.
        intercept (`float`): b, the log-odds of being right where the PRM tells nothing.
        guess_rate (`float`): g, the share of wrong completions that are right by luck; from 0 to below 1.

    Returns:
        `torch.Tensor`: like `scores`. Never below the log-odds of `guess_rate`.
    """
    scores = scores + intercept
    if not guess_rate:
        return scores
    return torch.logaddexp(scores, math.log(guess_rate / (1 - guess_rate)) + F.softplus(scores))


def base_rate_log_odds(mean_label: float, guess_rate: float = 0.0) -> float:
    """
    Log-odds of the share of right completions, lucky guesses taken off. The share is taken to be between 0.02 and 0.98.

    Args:
        mean_label (`float`): Share of completions that are labelled right.
        guess_rate (`float`): g of [`label_log_odds`].
    """
    rate = min(max((mean_label - guess_rate) / (1 - guess_rate), 0.02), 0.98)
    return math.log(rate / (1 - rate))


def _opponents(labels: torch.Tensor, peer_labels: torch.Tensor) -> torch.Tensor:
    """`(B, K)`: peers with a lower label for a right completion, with a higher one for a wrong completion."""
    own = labels[:, None]
    return torch.where(own > 0.5, peer_labels < own, peer_labels > own)


def counted_rows(
    labels: torch.Tensor, mask: torch.Tensor, loss_type: str = "ce", peer_labels: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Which rows a loss is the mean of: judged, not empty and, for losses that compare, with a peer to compare with.

    Args:
        labels (`torch.Tensor`): `(B,)`; NaN = could not be judged.
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.
        loss_type (`str`): as in [`prm_loss`].
        peer_labels (`torch.Tensor`, *optional*): `(B, K)` labels of each row's group, needed by losses that compare.

    Returns:
        `torch.Tensor`: `(B,)` bool.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}; choose one of {LOSS_TYPES}.")
    counted = ~labels.isnan() & mask.bool().any(dim=1)
    if loss_type in COMPARING_LOSSES:
        counted &= _opponents(labels, peer_labels).any(dim=1)
    return counted


def prm_row_losses(
    scores: torch.Tensor,
    labels: torch.Tensor,
    loss_type: str = "ce",
    peer_scores: torch.Tensor | None = None,
    peer_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Loss of each completion. Only rows of [`counted_rows`] mean anything; the others are finite.

    Args:
        scores (`torch.Tensor`): `(B,)` scores q, with gradient; for `"calibrated_ce"` what [`label_log_odds`] makes of them.
        labels (`torch.Tensor`): `(B,)` outcomes between 0 and 1; NaN = could not be judged.
        loss_type (`str`): as in [`prm_loss`].
        peer_scores, peer_labels (`torch.Tensor`, *optional*): `(B, K)` scores and labels of each row's whole group, itself
            included. Scores are taken as constants.

    Returns:
        `torch.Tensor`: `(B,)`.
    """
    labels = labels.to(scores.dtype)
    if loss_type not in COMPARING_LOSSES:
        return F.binary_cross_entropy_with_logits(scores, labels.nan_to_num(0.5), reduction="none")
    peer_scores, peer_labels = peer_scores.detach().to(scores.dtype), peer_labels.to(scores.dtype)
    opponents = _opponents(labels, peer_labels)
    opponent_mean = peer_scores.masked_fill(~opponents, 0.0).sum(1) / opponents.sum(1).clamp(min=1)
    sign = torch.where(labels > 0.5, 1.0, -1.0)
    losses = -F.logsigmoid(sign * (scores - opponent_mean))
    if loss_type == "dpo":
        return losses
    # The density of being the best of K draws from the group: K * P(peer <= own)^(K-1)
    judged = ~peer_labels.isnan()
    count = judged.sum(1)
    if loss_type == "bon_acc":
        not_better = peer_labels <= labels[:, None]
    else:
        # A row's own score among its peers comes from another forward pass and may differ by rounding
        not_better = peer_scores <= scores.detach()[:, None] + 1e-4
    share = (not_better & judged).sum(1) / count.clamp(min=1)
    return losses * count * share ** (count - 1).clamp(min=0)


def prm_loss(
    log_ratios: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    beta: float,
    *,
    loss_type: str = "ce",
    num_generations: int | None = None,
    peer_scores: torch.Tensor | None = None,
    peer_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Loss that trains the implicit PRM on outcome labels only: a mean over the rows that count ([`counted_rows`]).

    Args:
        log_ratios (`torch.Tensor`): `(B, T)` `log pi_phi - log pi_ref` in nats, with gradient.
        labels (`torch.Tensor`): `(B,)` outcomes between 0 and 1; NaN = could not be judged.
        mask (`torch.Tensor`): `(B, T)`, non-zero where the policy wrote the token.
        beta (`float`): Reward scale.
        loss_type (`str`):
            `"ce"` (Eq 4): binary cross-entropy of `sigmoid(q)` against the label, on logits, so that it keeps its gradient
            where the PRM is sure and wrong. `"calibrated_ce"`: the same here, since intercept and guess rate come in before the
            loss, by [`label_log_odds`]; see [`prm_row_losses`]. `"dpo"`: `-log sigmoid(q - mean q of the peers with a lower
            label)` for a label above 1/2, `-log sigmoid(mean q of the peers with a higher label - q)` for others, the peers
            detached.
            `"bon_acc"`, `"bon_rm"`: the same, each completion weighted by K * P(a peer is not better)^(K-1), the density of
            being the best of K draws, by outcome or by score.
        num_generations (`int`, *optional*): K, when the rows are whole groups: peers are then taken from the batch itself.
        peer_scores, peer_labels (`torch.Tensor`, *optional*): `(B, K)` scores and labels of each row's group, when the rows
            are not whole groups (micro-batches) or the scores are those of an earlier PRM.

    Returns:
        `torch.Tensor`: scalar; zero with zero gradient when no row counts.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}; choose one of {LOSS_TYPES}.")
    if (peer_scores is None) != (peer_labels is None):
        raise ValueError("Give `peer_scores` and `peer_labels` together, or neither.")
    scores = outcome_scores(log_ratios, mask, beta)
    if loss_type in COMPARING_LOSSES and peer_scores is None:
        if num_generations is None:
            raise ValueError(f"loss_type={loss_type!r} compares completions: give `num_generations` or `peer_scores`.")
        peer_scores = group_rows(scores.detach(), num_generations)
        peer_labels = group_rows(labels, num_generations)
    counted = counted_rows(labels, mask, loss_type, peer_labels)
    losses = prm_row_losses(scores, labels, loss_type, peer_scores, peer_labels)
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def dpo_pair_losses(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """
    DPO (arXiv 2305.18290, Eq 7) on pairs of completions of one prompt: `-log sigmoid(q_chosen - q_rejected)`.

    Only the difference of the two is trained: scores of different prompts stay incomparable.

    Args:
        chosen_scores, rejected_scores (`torch.Tensor`): `(N,)` scores q, both with gradient.

    Returns:
        `torch.Tensor`: `(N,)`.
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


def kto_reference_point(mismatched_scores: torch.Tensor) -> torch.Tensor:
    """
    KTO's estimate of the divergence of PRM and reference (arXiv 2402.01306, section 4.1), in log-odds like a score.

    Args:
        mismatched_scores (`torch.Tensor`): `(M,)` scores q of completions after prompts that they do not belong to.

    Returns:
        `torch.Tensor`: scalar without gradient: their mean, at least 0; 0 if there are none.
    """
    return (mismatched_scores.detach().sum() / max(len(mismatched_scores), 1)).clamp(min=0)


def kto_row_losses(
    scores: torch.Tensor,
    labels: torch.Tensor,
    reference_point: torch.Tensor | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """
    KTO (arXiv 2402.01306, Eq 7): `w_d * (1 - sigmoid(q - z))` of a right completion, `w_u * (1 - sigmoid(z - q))` of others.

    Args:
        scores (`torch.Tensor`): `(B,)` scores q, with gradient.
        labels (`torch.Tensor`): `(B,)` outcomes; above 1/2 is right.
        reference_point (`torch.Tensor`): scalar z, see [`kto_reference_point`].
        desirable_weight, undesirable_weight (`float`): w_d and w_u, against an unequal number of right and wrong
            completions.

    Returns:
        `torch.Tensor`: `(B,)`, between 0 and the larger weight.
    """
    desirable = labels > 0.5
    margins = scores - reference_point
    weights = torch.where(desirable, desirable_weight, undesirable_weight).to(scores.dtype)
    return weights * torch.where(desirable, -margins, margins).sigmoid()


def group_rows(values: torch.Tensor, num_generations: int) -> torch.Tensor:
    """`(B, K)`: for each of the `(B,)` rows the values of its whole group, groups contiguous."""
    return values.view(-1, num_generations).repeat_interleave(num_generations, dim=0)
