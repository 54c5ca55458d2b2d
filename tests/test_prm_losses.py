"""Losses of the implicit PRM, online and offline."""

import itertools
import math
import random

import pytest
import torch
from slow_reference import (
    NAN,
    groups_of,
    random_batch,
    slow_dpo_pair_losses,
    slow_kto,
    slow_opponents,
    slow_prm_loss,
    slow_scores,
    softplus,
    tensor,
)

from trl_prime.implicit_prm.losses import (
    LOSS_TYPES,
    counted_rows,
    dpo_pair_losses,
    group_rows,
    kto_reference_point,
    kto_row_losses,
    label_log_odds,
    outcome_scores,
    prm_loss,
    prm_row_losses,
)

BATCHES = [(seed, k) for seed in range(8) for k in (2, 3, 4, 5)]


def assert_same(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, tensor(expected, actual.dtype), rtol=tolerance, atol=tolerance)


def test_loss_types_are_those_of_the_paper_and_one_of_ours():
    assert set(LOSS_TYPES) == {"ce", "dpo", "bon_acc", "bon_rm", "calibrated_ce"}


def test_scores_and_groups_against_the_slow_reference():
    for seed, k in BATCHES:
        batch = random_batch(seed, k)
        expected = slow_scores(batch.rewards, batch.mask, 0.3)
        for dtype in (torch.bool, torch.long, torch.float32):
            assert_same(outcome_scores(tensor(batch.rewards), tensor(batch.mask, dtype), 0.3), expected)
        assert group_rows(tensor(expected), k).tolist() == groups_of(expected, k)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_of_whole_groups_against_the_slow_reference(loss_type):
    # The share of beaten peers may be a float32: 1e-6 for the weights made of it
    tolerance = 1e-6 if "bon" in loss_type else 1e-10
    for seed, k in BATCHES:
        batch = random_batch(seed, k)
        scores = slow_scores(batch.rewards, batch.mask, 0.7)
        peers = groups_of(scores, k), groups_of(batch.outcomes, k)
        expected = slow_prm_loss(batch.rewards, batch.outcomes, batch.mask, 0.7, loss_type, *peers)
        for dtype, within in ((torch.float64, tolerance), (torch.float32, 1e-4)):
            given = tensor(batch.rewards, dtype), tensor(batch.outcomes, dtype), tensor(batch.mask)
            loss = prm_loss(*given, 0.7, loss_type=loss_type, num_generations=k)
            assert loss.shape == () and loss.dtype == dtype
            assert_same(loss, expected, within)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_of_rows_with_given_peers_against_the_slow_reference(loss_type):
    """Micro-batches that cut groups, and scores of an earlier PRM."""
    for seed, k in BATCHES:
        batch, rng = random_batch(seed, k), random.Random(seed)
        earlier = groups_of([rng.gauss(0, 1) for _ in batch.outcomes], k)
        labels = groups_of(batch.outcomes, k)
        rows = rng.sample(range(len(batch.outcomes)), 4)
        given = [[column[i] for i in rows] for column in (batch.rewards, batch.outcomes, batch.mask, earlier, labels)]
        expected = slow_prm_loss(*given[:3], 0.7, loss_type, *given[3:])
        peers = {"peer_scores": tensor(given[3]), "peer_labels": tensor(given[4])}
        loss = prm_loss(*map(tensor, given[:3]), 0.7, loss_type=loss_type, **peers)
        assert_same(loss, expected, 1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_counted_rows_against_the_slow_reference(loss_type):
    for seed, k in BATCHES:
        batch = random_batch(seed, k)
        peers = groups_of(batch.outcomes, k)
        counted = counted_rows(tensor(batch.outcomes), tensor(batch.mask), loss_type, tensor(peers))
        expected = [
            not math.isnan(label) and any(row) and ("ce" in loss_type or bool(slow_opponents(label, peers[i])))
            for i, (label, row) in enumerate(zip(batch.outcomes, batch.mask, strict=True))
        ]
        assert counted.tolist() == expected


def test_row_losses_are_finite_for_rows_that_do_not_count_and_mean_to_the_loss():
    for loss_type, (seed, k) in itertools.product(LOSS_TYPES, BATCHES):
        batch = random_batch(seed, k)
        log_ratios, labels, mask = tensor(batch.rewards), tensor(batch.outcomes), tensor(batch.mask)
        scores = outcome_scores(log_ratios, mask, 0.7)
        peers = group_rows(scores, k), group_rows(labels, k)
        losses = prm_row_losses(scores, labels, loss_type, *peers)
        assert losses.isfinite().all()
        counted = counted_rows(labels, mask, loss_type, peers[1])
        loss = prm_loss(log_ratios, labels, mask, 0.7, loss_type=loss_type, num_generations=k)
        assert_same(loss, losses[counted].mean().item() if counted.any() else 0.0)


def test_examples():
    # Scores ln 3 and -ln 3, that is probabilities 3/4 and 1/4
    log_ratios, mask = tensor([[math.log(3), 0.0], [0.0, -math.log(3)]]) / 0.05, torch.ones(2, 2)
    right, wrong = tensor([1.0, 0.0]), tensor([0.0, 1.0])
    assert_same(prm_loss(log_ratios, right, mask, 0.05), -math.log(3 / 4))
    assert_same(prm_loss(log_ratios, wrong, mask, 0.05), -math.log(1 / 4))
    # Difference ln 9; a soft label is an expectation
    assert_same(prm_loss(log_ratios, right, mask, 0.05, loss_type="dpo", num_generations=2), -math.log(9 / 10))
    assert_same(prm_loss(log_ratios, wrong, mask, 0.05, loss_type="dpo", num_generations=2), -math.log(1 / 10))
    soft = prm_loss(log_ratios[:1], tensor([0.25]), mask[:1], 0.05)
    assert_same(soft, -0.25 * math.log(3 / 4) - 0.75 * math.log(1 / 4))
    # Best of 2: weights 2 * (2/2)^1 for the right or higher, 2 * (1/2)^1 for the other
    for labels, loss_type, weights in (
        (right, "bon_acc", (2, 1)),
        (wrong, "bon_acc", (1, 2)),
        (right, "bon_rm", (2, 1)),
        (wrong, "bon_rm", (2, 1)),
    ):
        single = softplus(-math.log(9)) if labels is right else softplus(math.log(9))
        loss = prm_loss(log_ratios, labels, mask, 0.05, loss_type=loss_type, num_generations=2)
        assert_same(loss, single * sum(weights) / 2)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_half_precision_log_ratios(loss_type):
    torch.manual_seed(0)
    log_ratios, labels = torch.randn(4, 6), torch.tensor([1.0, 0.0, 0.0, 1.0])
    given = labels, torch.ones(4, 6), 0.5
    loss = prm_loss(log_ratios.bfloat16(), *given, loss_type=loss_type, num_generations=4)
    expected = prm_loss(log_ratios.bfloat16().float(), *given, loss_type=loss_type, num_generations=4)
    torch.testing.assert_close(loss.float(), expected, rtol=2e-2, atol=1e-3)


# Gradients


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_gradient_against_finite_differences(loss_type, seed):
    batch, rng = random_batch(seed, 3), random.Random(seed)
    labels, mask = tensor(batch.outcomes), tensor(batch.mask)
    log_ratios = tensor(batch.rewards).masked_fill(mask == 0, 9.0).requires_grad_()
    # Peers are constants here, so that a difference quotient does not move them
    peers = {
        "peer_scores": group_rows(tensor([rng.gauss(0, 1) for _ in batch.outcomes]), 3),
        "peer_labels": group_rows(labels, 3),
    }

    def loss(x):
        return prm_loss(x, labels, mask, 0.7, loss_type=loss_type, **peers)

    assert torch.autograd.gradcheck(loss, (log_ratios,))
    (grad,) = torch.autograd.grad(loss(log_ratios), log_ratios)
    assert grad.any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_gradient_from_masked_tokens_or_rows_that_do_not_count(loss_type):
    for seed, k in BATCHES:
        batch = random_batch(seed, k)
        log_ratios, labels, mask = tensor(batch.rewards).requires_grad_(), tensor(batch.outcomes), tensor(batch.mask)
        prm_loss(log_ratios, labels, mask, 0.7, loss_type=loss_type, num_generations=k).backward()
        counted = counted_rows(labels, mask, loss_type, group_rows(labels, k))
        live = (mask * counted[:, None]).bool()
        assert log_ratios.grad.isfinite().all() and not log_ratios.grad[~live].any()
        if loss_type != "bon_rm":  # whose weight is zero for no row of whole groups, but tiny for some
            assert (log_ratios.grad[live] != 0).all()


@pytest.mark.parametrize("loss_type", ["dpo", "bon_acc", "bon_rm"])
def test_peers_are_detached(loss_type):
    scores, labels = tensor([0.3, -0.2, 0.1, 0.4]).requires_grad_(), tensor([1.0, 0.0, 0.0, 1.0])
    losses = prm_row_losses(scores, labels, loss_type, group_rows(scores, 4), group_rows(labels, 4))
    for i in range(4):
        (grad,) = torch.autograd.grad(losses[i], scores, retain_graph=True)
        assert grad.nonzero().flatten().tolist() == [i]
    log_ratios = scores.detach()[:, None].requires_grad_()
    prm_loss(log_ratios, labels, torch.ones(4, 1), 1.0, loss_type=loss_type, num_generations=4).backward()
    (expected,) = torch.autograd.grad(losses.mean(), scores)
    assert_same(log_ratios.grad[:, 0], expected.tolist())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("labels, mask", [([NAN, NAN], [1, 1]), ([1.0, 0.0], [0, 0])])
def test_when_no_row_counts_the_loss_and_its_gradient_are_zero(loss_type, labels, mask):
    log_ratios = torch.randn(2, 2).requires_grad_()
    mask = torch.tensor(mask)[:, None].expand(2, 2)
    loss = prm_loss(log_ratios, tensor(labels, torch.float32), mask, 0.05, loss_type=loss_type, num_generations=2)
    loss.backward()
    assert loss.item() == 0.0 and log_ratios.grad is not None and not log_ratios.grad.any()


# The points of the published implementations


def test_point_5_losses_that_compare_say_what_they_need():
    given = torch.zeros(2, 3), tensor([1.0, 0.0], torch.float32), torch.ones(2, 3), 0.05
    for loss_type in ("dpo", "bon_acc", "bon_rm"):
        assert prm_loss(*given, loss_type=loss_type, num_generations=2).isfinite()
        with pytest.raises(ValueError, match=r"num_generations.*peer_scores"):
            prm_loss(*given, loss_type=loss_type)
    with pytest.raises(ValueError, match=r"'mse'.*ce.*dpo"):
        prm_loss(*given, loss_type="mse", num_generations=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("score", [50.0, 200.0, 1000.0])
def test_point_7_saturated_and_wrong_keeps_loss_and_gradient(score, dtype):
    for label, sign in ((0.0, 1.0), (1.0, -1.0)):
        log_ratios = tensor([[sign * score]], dtype).requires_grad_()
        loss = prm_loss(log_ratios, tensor([label], dtype), torch.ones(1, 1), 1.0)
        loss.backward()
        assert_same(loss.detach(), score)
        assert_same(log_ratios.grad, [[sign]])


@pytest.mark.parametrize("loss_type", ["dpo", "bon_acc", "bon_rm"])
def test_point_7_losses_that_compare_do_not_overflow(loss_type):
    log_ratios = torch.tensor([[-500.0], [500.0]]).requires_grad_()
    loss = prm_loss(
        log_ratios, torch.tensor([1.0, 0.0]), torch.ones(2, 1), 1.0, loss_type=loss_type, num_generations=2
    )
    loss.backward()
    mean_weight = 1.0 if loss_type == "dpo" else 1.5
    assert_same(loss.detach(), 1000.0 * mean_weight)
    assert (log_ratios.grad[0] < 0).all() and (log_ratios.grad[1] > 0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_point_9_a_completion_without_tokens_is_in_no_mean(loss_type):
    log_ratios, labels = torch.randn(3, 4, dtype=torch.float64), tensor([1.0, 0.0, 1.0])
    mask = tensor([[1] * 4, [1] * 4, [0] * 4])
    loss = prm_loss(log_ratios, labels, mask, 0.5, loss_type=loss_type, num_generations=3)
    scores = outcome_scores(log_ratios, mask, 0.5)
    rows = prm_row_losses(scores, labels, loss_type, group_rows(scores, 3), group_rows(labels, 3))
    assert_same(loss, rows[:2].mean().item())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_point_17_an_unjudged_completion_is_as_if_it_had_not_been_sampled(loss_type):
    torch.manual_seed(0)
    log_ratios, labels, mask = torch.randn(4, 3), torch.tensor([1.0, NAN, 0.0, 1.0]), torch.ones(4, 3)
    kept = [0, 2, 3]
    loss = prm_loss(log_ratios, labels, mask, 0.5, loss_type=loss_type, num_generations=4)
    without = prm_loss(log_ratios[kept], labels[kept], mask[kept], 0.5, loss_type=loss_type, num_generations=3)
    torch.testing.assert_close(loss, without)


@pytest.mark.parametrize("loss_type", ["dpo", "bon_rm"])
def test_rounding_between_a_score_and_its_copy_among_the_peers_does_not_matter(loss_type):
    """Peer scores come from another forward pass: the best of a group must not lose against its own copy."""
    scores, labels = tensor([2.0, 1.0, 0.0, -1.0]), tensor([1.0, 0.0, 1.0, 0.0])
    exact, above = (
        prm_row_losses(scores, labels, loss_type, group_rows(scores + e, 4), group_rows(labels, 4)) for e in (0, 1e-6)
    )
    torch.testing.assert_close(exact, above, rtol=1e-3, atol=1e-3)


# --- Log-odds of the label ---


@pytest.mark.parametrize("guess_rate", [0.0, 0.1, 0.25, 0.9])
def test_label_log_odds_against_the_chances(guess_rate):
    intercept, scores = -1.5, [-30.0, -4.0, -0.3, 0.0, 0.7, 5.0, 20.0]
    chances = [guess_rate + (1 - guess_rate) / (1 + math.exp(-(score + intercept))) for score in scores]
    expected = [math.log(chance / (1 - chance)) for chance in chances]
    assert_same(label_log_odds(tensor(scores), intercept, guess_rate), expected, 1e-6)


def test_a_lucky_answer_does_not_move_a_score_that_is_surely_wrong():
    scores = tensor([-1000.0, 1000.0], torch.float32).requires_grad_()
    losses = prm_row_losses(label_log_odds(scores, 0.0, 0.25), tensor([1.0, 0.0], torch.float32))
    losses.sum().backward()
    # By chance one of four; a completion that is surely right and found wrong has the slope of plain cross-entropy
    assert losses[0].item() == pytest.approx(-math.log(0.25))
    assert scores.grad.tolist() == pytest.approx([0.0, 1.0])


# --- Losses of the offline trainer ---


def test_dpo_of_pairs_against_the_slow_reference():
    rng = random.Random(0)
    chosen, rejected = ([rng.gauss(0, 3) for _ in range(50)] for _ in range(2))
    assert_same(dpo_pair_losses(tensor(chosen), tensor(rejected)), slow_dpo_pair_losses(chosen, rejected))
    # Odds of 9 to 1
    assert_same(dpo_pair_losses(tensor([math.log(3)]), tensor([-math.log(3)])), [-math.log(9 / 10)])


def test_dpo_of_pairs_trains_both_and_is_finite_where_it_is_sure_and_wrong():
    chosen, rejected = tensor([0.5, -1e5]).requires_grad_(), tensor([0.2, 1e5]).requires_grad_()
    losses = dpo_pair_losses(chosen, rejected)
    assert losses[1].item() == 2e5
    losses.sum().backward()
    share = 1 / (1 + math.exp(0.3))
    assert_same(chosen.grad, [-share, -1.0])
    assert_same(rejected.grad, [share, 1.0])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.25)])
def test_kto_against_the_slow_reference(weights):
    for seed in range(8):
        rng = random.Random(seed)
        scores, mismatched = ([rng.gauss(0, 2) for _ in range(n)] for n in (20, seed))
        labels = [rng.choice([0.0, 0.3, 0.8, 1.0]) for _ in scores]
        reference_point = kto_reference_point(tensor(mismatched))
        losses = kto_row_losses(tensor(scores), tensor(labels), reference_point, *weights)
        assert_same(losses, slow_kto(scores, labels, mismatched, weights))


def test_the_reference_point_of_kto_is_not_negative_and_has_no_gradient():
    scores = tensor([1.0, 2.0, -9.0]).requires_grad_()
    assert kto_reference_point(scores[:2]).item() == 1.5
    assert kto_reference_point(scores).item() == 0.0
    assert not kto_reference_point(scores[:2]).requires_grad
