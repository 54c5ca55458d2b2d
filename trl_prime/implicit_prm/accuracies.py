"""How well the implicit PRM ranks completions of one prompt and tells right ones from wrong ones.

A score q is the log-odds of a right outcome. B = completions, K = completions per prompt, G = groups.
"""

from __future__ import annotations

import torch

# Log-odds within which scores count as equal. A PRM that still equals its reference differs from it by rounding, which
# depends on the machine and on how rows share a batch, and must not decide who wins.
TIE = 1e-5


def pad_groups(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """
    Rows of groups of different sizes, brought together, for functions that take groups of one size.

    Args:
        values (`torch.Tensor`): `(B,)` floats, in any order.
        group_ids (`torch.Tensor`): `(B,)` integers, equal for the rows of a group.

    Returns:
        `torch.Tensor`: `(G, K)` with K the size of the largest group, in the order of the ids; NaN fills up.
    """
    if not len(values):
        return values.new_empty(0, 1)
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    place = torch.arange(len(values), device=values.device) - (sizes.cumsum(0) - sizes)[group[order]]
    padded = values.new_full((len(sizes), int(sizes.max())), float("nan"))
    padded[group[order], place] = values[order]
    return padded


def pairwise_wins(scores: torch.Tensor, labels: torch.Tensor, num_generations: int) -> tuple[float, int]:
    """
    Pairs of completions of one prompt with different outcomes, and in how many the PRM scores the better one higher.

    Args:
        scores (`torch.Tensor`): `(B,)` scores q, groups contiguous.
        labels (`torch.Tensor`): `(B,)` outcomes; NaN = could not be judged, in no pair.
        num_generations (`int`): K.

    Returns:
        `tuple[float, int]`: wins, of which a tie (scores within `TIE` of each other) is one half, and pairs.
    """
    scores, labels = scores.view(-1, num_generations), labels.view(-1, num_generations)
    better = labels[:, :, None] > labels[:, None, :]
    margin = scores[:, :, None] - scores[:, None, :]
    better &= ~margin.isnan()
    wins = (margin > TIE).double() + 0.5 * (margin.abs() <= TIE).double()
    return wins[better].sum().item(), int(better.sum())


def pairwise_accuracy(scores: torch.Tensor, labels: torch.Tensor, num_generations: int) -> float:
    """
    How often the PRM scores the better of two completions of one prompt higher; a tie counts one half.

    Args:
        scores, labels, num_generations: as in [`pairwise_wins`].

    Returns:
        `float`: between 0 and 1, averaged over all pairs with different outcomes; NaN if there are none.
    """
    wins, pairs = pairwise_wins(scores, labels, num_generations)
    return wins / pairs if pairs else float("nan")


def absolute_accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """
    How often `sigmoid(q) > 1/2` agrees with `label > 1/2`; a score within `TIE` of zero counts one half.

    Args:
        scores (`torch.Tensor`): `(B,)` scores q.
        labels (`torch.Tensor`): `(B,)` outcomes; NaN = could not be judged, left out.

    Returns:
        `float`: between 0 and 1; NaN if nothing was judged.
    """
    judged = ~labels.isnan() & ~scores.isnan()
    scores, right = scores[judged], labels[judged] > 0.5
    agrees = ((scores > 0) == right).double()
    return torch.where(scores.abs() <= TIE, 0.5, agrees).mean().item()
