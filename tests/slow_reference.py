"""Slow references for the arithmetic: loops over Python floats, from the equations of arXiv 2502.01456."""

import dataclasses
import math
import random
import statistics

import torch

NAN = float("nan")
GRANULARITIES = ("token", "step", "turn", "whole")
ESTIMATORS = ("rloo", "rloo_reference_code", "grpo", "reinforce", "reinforce_plus_plus", "value")


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


@dataclasses.dataclass
class Batch:
    outcomes: list
    rewards: list
    mask: list
    steps: list
    num_generations: int


def random_batch(seed, num_generations, num_groups=5, num_tokens=7, scale=1.0):
    """Ragged rows with holes, empty and one-token rows, unjudged rows and groups; garbage where masked."""
    rng = random.Random(seed)
    outcomes, rewards, mask, steps = [], [], [], []
    for group in range(num_groups):
        palette = rng.choice([(0.0, 1.0), (0.0, 1.0), (0.0, 0.25, 0.7, 1.0), (0.5,)])
        labels = [rng.choice(palette) for _ in range(num_generations)]
        unjudged = [[], [0], range(num_generations), range(1, num_generations), []][(seed + group) % 5]
        for i in unjudged:
            labels[i] = NAN
        rng.shuffle(labels)
        outcomes += labels
    for _ in outcomes:
        length = rng.choice([0, 1, num_tokens, rng.randint(1, num_tokens)])
        kept = [t < length and (length == 1 or rng.random() < 0.8) for t in range(num_tokens)]
        mask.append([int(flag) for flag in kept])
        rewards.append([rng.gauss(0, scale) if flag else rng.choice([NAN, 77.0, -1e6]) for flag in kept])
        numbers = [0]
        while len(numbers) < num_tokens:
            numbers.append(numbers[-1] + rng.choice([0, 0, 1, 2]))
        steps.append(numbers)
    return Batch(outcomes, rewards, mask, steps, num_generations)


def spots(row):
    return [t for t, flag in enumerate(row) if flag]


def slow_turns(row):
    """For each token, how many runs of unmasked tokens have begun up to it."""
    begun, before, result = 0, 0, []
    for flag in row:
        begun += bool(flag and not before)
        before = flag
        result.append(begun)
    return result


def slow_positions(mask, granularity, steps):
    """Last unmasked token of each unit."""
    result = []
    for row, numbers in zip(mask, steps, strict=True):
        last, turns = {}, slow_turns(row)
        for t in spots(row):
            last[{"token": t, "step": numbers[t], "turn": turns[t], "whole": "all"}[granularity]] = t
        result.append([int(t in last.values()) for t in range(len(row))])
    return result


def slow_aggregate(rewards, mask, granularity, steps):
    result = []
    for values, row, numbers in zip(rewards, mask, steps, strict=True):
        sums, last, turns = {}, {}, slow_turns(row)
        for t in spots(row):
            unit = {"token": t, "step": numbers[t], "turn": turns[t], "whole": "all"}[granularity]
            sums[unit] = sums.get(unit, 0.0) + values[t]
            last[unit] = t
        out = [0.0] * len(row)
        for unit, t in last.items():
            out[t] = sums[unit]
        result.append(out)
    return result


def slow_returns(rewards, positions, gamma):
    """Sum over the positions s >= t of gamma^(number of positions between t and s) * r_s."""
    result = []
    for values, row in zip(rewards, positions, strict=True):
        later = [[s for s in spots(row) if s >= t] for t in range(len(row))]
        result.append([sum(gamma**k * values[s] for k, s in enumerate(found)) for found in later])
    return result


def slow_terms(
    outcomes, rewards, mask, num_generations, estimator, weights=(1.0, 1.0), gammas=(1.0, 1.0), positions=None
):
    """Outcome term, process term and active tokens of every estimator, Eq 5, 7 and 8."""
    positions = mask if positions is None else positions
    spot = [spots(row) for row in positions]
    mean = [statistics.fmean(rewards[j][t] for t in spot[j]) if spot[j] else None for j in range(len(mask))]
    outcome_term = [[0.0] * len(row) for row in mask]
    process_term = [[0.0] * len(row) for row in mask]
    active = [[False] * len(row) for row in mask]
    for i, outcome in enumerate(outcomes):
        first = i // num_generations * num_generations
        judged = [j for j in range(first, first + num_generations) if not math.isnan(outcomes[j])]
        peers = [j for j in judged if j != i]
        if math.isnan(outcome) or (not peers and estimator in ESTIMATORS[:3]):
            continue
        group_means = [mean[j] for j in judged if spot[j]]
        peer_means = [mean[j] for j in peers if spot[j] and spot[i]]
        centre = {t: rewards[i][t] for t in spot[i]}
        if estimator in ("rloo", "rloo_reference_code"):
            outcome -= statistics.fmean(outcomes[j] for j in peers)
            if peer_means and estimator == "rloo":
                centre = {t: r - statistics.fmean(peer_means) for t, r in centre.items()}
            elif peer_means:
                k = len(group_means)
                centre = {t: r * k / (k - 1) - sum(group_means) / (k - 1) for t, r in centre.items()}
        elif estimator == "grpo":
            group = [outcomes[j] for j in judged]
            spread = statistics.stdev(group)
            outcome = (outcome - statistics.fmean(group)) / spread if spread else 0.0
            if peer_means:
                average, spread = statistics.fmean(group_means), statistics.stdev(group_means)
                centre = {t: (r - average) / spread for t, r in centre.items()}
        if not peer_means and estimator in ESTIMATORS[:3]:
            centre = None
        own = spots(mask[i])
        for t in own:
            active[i][t] = True
            left = sum(s > t for s in own)
            outcome_term[i][t] = weights[0] * gammas[0] ** left * outcome
            if not centre:
                continue
            if estimator == "value":
                process = -sum(r for s, r in centre.items() if s < t)
            else:
                process = sum(gammas[1] ** k * centre[s] for k, s in enumerate(s for s in spot[i] if s >= t))
            process_term[i][t] = weights[1] * process
    return outcome_term, process_term, active


def slow_whiten(values, active):
    flat = [v for row, flags in zip(values, active, strict=True) for v, flag in zip(row, flags, strict=True) if flag]
    if len(flat) < 2:
        return [[0.0] * len(row) for row in values]
    mean, spread = statistics.fmean(flat), statistics.pstdev(flat)
    return [
        [(v - mean) / spread if flag and spread else 0.0 for v, flag in zip(row, flags, strict=True)]
        for row, flags in zip(values, active, strict=True)
    ]


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def slow_scores(log_ratios, mask, beta):
    return [beta * sum(values[t] for t in spots(row)) for values, row in zip(log_ratios, mask, strict=True)]


def slow_opponents(label, peer_labels):
    """Indices of the peers that a completion is compared with: worse ones if it is right, better ones if wrong."""
    return [j for j, other in enumerate(peer_labels) if (other < label if label > 0.5 else other > label)]


def slow_prm_loss(log_ratios, labels, mask, beta, loss_type, peer_scores, peer_labels):
    """Mean loss over the rows that count; peers are the lists of each row's whole group."""
    losses = []
    for i, score in enumerate(slow_scores(log_ratios, mask, beta)):
        label = labels[i]
        if math.isnan(label) or not any(mask[i]):
            continue
        if loss_type in ("ce", "calibrated_ce"):
            losses.append(label * softplus(-score) + (1 - label) * softplus(score))
            continue
        opponents = slow_opponents(label, peer_labels[i])
        if not opponents:
            continue
        margin = score - statistics.fmean(peer_scores[i][j] for j in opponents)
        weight = 1.0
        if loss_type != "dpo":
            judged = [j for j, other in enumerate(peer_labels[i]) if not math.isnan(other)]
            if loss_type == "bon_acc":
                beaten = sum(peer_labels[i][j] <= label for j in judged)
            else:
                beaten = sum(peer_scores[i][j] <= score for j in judged)
            weight = len(judged) * (beaten / len(judged)) ** (len(judged) - 1)
        losses.append(weight * softplus(-margin if label > 0.5 else margin))
    return statistics.fmean(losses) if losses else 0.0


def slow_dpo_pair_losses(chosen, rejected):
    return [math.log1p(math.exp(-abs(c - r))) + max(r - c, 0.0) for c, r in zip(chosen, rejected, strict=True)]


def slow_kto(scores, labels, mismatched, weights):
    """Losses of the rows, from the probabilities themselves."""
    reference_point = max(0.0, statistics.fmean(mismatched)) if mismatched else 0.0
    losses = []
    for score, label in zip(scores, labels, strict=True):
        above = 1 / (1 + math.exp(reference_point - score))
        losses.append(weights[0] * (1 - above) if label > 0.5 else weights[1] * above)
    return losses


def slow_ragged_pairwise(scores, labels, groups):
    """Share of the pairs of one group with different labels that are in the right order."""
    pairs = [
        (scores[i], scores[j])
        for i in range(len(scores))
        for j in range(len(scores))
        if groups[i] == groups[j] and labels[i] > labels[j]
    ]
    return statistics.fmean(0.5 if a == b else float(a > b) for a, b in pairs) if pairs else NAN


def groups_of(values, k):
    """For each row, the values of its whole group."""
    return [values[i // k * k : i // k * k + k] for i in range(len(values))]
