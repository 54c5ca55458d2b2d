"""One optimizer step of the PRM is the step of the whole batch, however it is cut; replay, schedule, resuming."""

import copy
import dataclasses
import io
import math
import types

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model, distance, same, slow_log_probs, weights
from helpers import lora, ragged_batch

from trl_prime import ImplicitPRM
from trl_prime.implicit_prm.backends import make_backend
from trl_prime.implicit_prm.batch import PRMBatch
from trl_prime.implicit_prm.losses import COMPARING_LOSSES, LOSS_TYPES, group_rows, prm_loss
from trl_prime.implicit_prm.updater import PRMUpdater

K, LR = 4, 0.5
LENGTHS = ((3, 5), (3, 2), (3, 6), (3, 1), (2, 6), (2, 3), (2, 4), (2, 2))
NAN = float("nan")
LABELS = (1.0, 0.0, 0.25, 0.0, 1.0, 1.0, NAN, 0.0)


@pytest.fixture
def setup(make_config, tokenizer):
    """A PRM far from its reference, its updater, and the function that makes its batches."""

    def build(num_rollout_batches=10, model=None, **settings):
        reference = build_model(2, scale=4.0).requires_grad_(False)
        prm = ImplicitPRM(model or build_model(1, scale=4.0), reference, tokenizer, beta=0.5)
        args = make_config(**{"prm_optim": "sgd", "prm_learning_rate": LR, "prm_max_grad_norm": 0.0, **settings})
        return prm, PRMUpdater(make_backend(prm, Accelerator(cpu=True)), args, num_rollout_batches)

    return build


def make_batch(prm, labels=LABELS, seed=0):
    inputs = ragged_batch(LENGTHS, seed=seed)
    mask = inputs[3].bool().clone()
    mask[0, 2] = False  # a token that a tool wrote
    ref_logps = prm.reference_log_probs(*inputs)
    scores = prm.beta * ((prm.log_probs(*inputs) - ref_logps) * mask).sum(1)
    labels = torch.tensor(labels)
    return PRMBatch(*inputs, mask, ref_logps, labels, group_rows(labels, K), group_rows(scores, K))


def expected_step(prm, batch, loss_type="ce", max_norm=None, rows=slice(None)):
    """Weights after `prm - lr * grad` by hand for some rows, the loss and the gradient norm."""
    model = copy.deepcopy(prm.model)
    log_ratios = slow_log_probs(model, *batch.inputs) - batch.ref_logps
    if loss_type == "calibrated_ce":
        # On the first token, which the policy wrote in every row: a score is a sum
        shift = torch.logit(batch.labels.nanmean()) / prm.beta
        log_ratios = torch.cat([log_ratios[:, :1] + shift, log_ratios[:, 1:]], dim=1)
    values = (log_ratios[rows], batch.labels[rows], batch.policy_mask[rows])
    loss = prm_loss(*values, prm.beta, loss_type=loss_type, num_generations=K)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    scale = min(1.0, max_norm / norm.item()) if max_norm else 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LR * scale * parameter.grad
    return weights(model), loss.item(), norm.item()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_step_is_that_of_the_whole_batch(setup, loss_type, micro_batch_size, clip):
    max_norm = 0.05 if clip else 0.0
    prm, updater = setup(prm_loss_type=loss_type, prm_micro_batch_size=micro_batch_size, prm_max_grad_norm=max_norm)
    batch = make_batch(prm)
    expected, loss, norm = expected_step(prm, batch, loss_type, max_norm)
    assert norm > 0.05
    before = weights(prm.model)
    result = updater.update(batch).metrics
    assert distance(weights(prm.model), expected) < min(2e-5, 0.01 * distance(before, expected))
    assert result == pytest.approx(
        {"loss": loss, "grad_norm": norm, "learning_rate": LR, "skipped_steps": 0}, rel=1e-3
    )


MINI_BATCHES = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_mini_batches_are_steps_on_whole_groups(setup, loss_type):
    prm, updater = setup(
        prm_loss_type=loss_type, prm_lr_scheduler_type="linear", num_rollout_batches=5, **MINI_BATCHES
    )
    by_hand, _ = setup()
    batch = make_batch(prm)
    losses, norms = [], []
    for number in range(2):
        group = slice(number * K, (number + 1) * K)
        before = weights(by_hand.model)
        after, loss, norm = expected_step(by_hand, batch, loss_type, rows=group)
        # The rate falls from 1 to 0 over the two steps on each of five batches
        moved = {name: before[name] + (1 - number / 10) * (after[name] - before[name]) for name in before}
        by_hand.model.load_state_dict(moved)
        losses.append(loss)
        norms.append(norm)
    assert not updater.can_score
    update = updater.update(batch)
    assert distance(weights(prm.model), weights(by_hand.model)) < 5e-5
    assert update.metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-3)
    assert update.metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)
    if loss_type not in COMPARING_LOSSES:  # which need an opponent
        assert update.first_logps.any(1).tolist() == batch.labels.isfinite().tolist()


def test_mini_batches_of_several_processes_keep_groups_together(setup):
    """Three processes have 4 rows each of 6 groups of 2: every second group is in one mini-batch."""
    prm, updater = setup(num_generations=2, **MINI_BATCHES)
    found = []
    for process_index in range(3):
        updater.accelerator = types.SimpleNamespace(process_index=process_index)
        batch = types.SimpleNamespace(labels=torch.zeros(4))
        found.append([rows.tolist() for rows in updater._mini_batches(batch)])
    assert found == [[[True, True, False, False], [False, False, True, True]]] * 3
    updater.accelerator = types.SimpleNamespace(process_index=1)
    # A group that is split between two processes: rows 3, 4 and 5
    batch = types.SimpleNamespace(labels=torch.zeros(3))
    assert [rows.tolist() for rows in updater._mini_batches(batch)] == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("kept_labels", "guess_rate", "rate"),
    [
        (None, 0.0, 3.25 / 7),
        ((0.0,) * 7 + (NAN,), 0.0, 3.25 / 14),
        ((0.0,) * 8, 0.0, 3.25 / 15),
        # A tenth of the wrong ones is right by luck: 3.25 / 7 = 0.1 + 0.9 * rate
        (None, 0.1, (3.25 / 7 - 0.1) / 0.9),
    ],
)
def test_intercept_is_the_log_odds_of_the_mean_label_and_no_part_of_the_score(setup, kept_labels, guess_rate, rate):
    prm, updater = setup(prm_loss_type="calibrated_ce", prm_replay_batches=1, prm_guess_rate=guess_rate)
    if kept_labels is not None:
        updater.replay.append(make_batch(prm, (NAN,) * 8, seed=1))
        updater.replay[0] = dataclasses.replace(updater.replay[0], labels=torch.tensor(kept_labels))
        updater._step = lambda replayed, *args, step=updater._step, **kwargs: (
            step(replayed, *args, **kwargs) if replayed is batch else (None, None)
        )
    batch = make_batch(prm)
    model = copy.deepcopy(prm.model)
    seen = slow_log_probs(model, *batch.inputs)
    scores = prm.beta * ((seen - batch.ref_logps) * batch.policy_mask).sum(1)
    judged = ~batch.labels.isnan()
    chances = guess_rate + (1 - guess_rate) * torch.sigmoid(scores + math.log(rate / (1 - rate)))[judged]
    labels = batch.labels[judged]
    loss = -(labels * chances.log() + (1 - labels) * (1 - chances).log()).mean()
    loss.backward()
    first_logps = updater.update(batch).first_logps
    assert updater.intercept == pytest.approx(math.log(rate / (1 - rate)), abs=1e-6)
    for parameter, trained in zip(model.parameters(), prm.model.parameters(), strict=True):
        assert torch.allclose(parameter - LR * parameter.grad, trained, atol=2e-5)
    assert torch.allclose(first_logps[judged], seen[judged], atol=1e-4) and not first_logps[~judged].any()


@pytest.mark.parametrize("guess_rate", [0.0, 0.25])
@pytest.mark.parametrize(("labels", "rate"), [((1.0,) * 8, 0.98), ((0.0,) * 8, 0.02), ((NAN,) * 8, 0.5)])
def test_intercept_stays_finite_where_all_labels_are_alike(setup, labels, rate, guess_rate):
    prm, updater = setup(prm_loss_type="calibrated_ce", prm_guess_rate=guess_rate)
    updater.update(make_batch(prm, labels))
    assert updater.intercept == pytest.approx(math.log(rate / (1 - rate)), abs=1e-6)
    _, resumed = setup(prm_loss_type="calibrated_ce")
    resumed.load_state_dict(updater.state_dict())
    assert resumed.intercept == updater.intercept


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_second_epoch_compares_with_the_present_scores_but_reverse_keeps_the_first(setup, loss_type):
    """Two epochs are two updates one after the other, except that "reverse" keeps the peers' scores of the first."""
    results = {}
    for mode in ("after", "reverse", "before"):
        prm, updater = setup(prm_loss_type=loss_type, prm_update=mode, prm_num_epochs=2)
        batch = make_batch(prm)
        updater.update(batch)
        results[mode] = weights(prm.model)
    prm, updater = setup(prm_loss_type=loss_type)
    for _ in range(2):
        updater.update(make_batch(prm))
    assert distance(results["after"], weights(prm.model)) < 2e-5
    assert distance(results["before"], results["after"]) < 2e-5
    moved = distance(results["after"], results["reverse"])
    assert moved > 1e-4 if loss_type in COMPARING_LOSSES else moved < 2e-5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_without_label_have_no_influence(setup, loss_type):
    results = []
    for noise in (0, 5):
        prm, updater = setup(prm_loss_type=loss_type)
        batch = make_batch(prm)
        unjudged = batch.labels.isnan()
        batch.completion_ids[unjudged] = (batch.completion_ids[unjudged] - 3 + noise) % 40 + 3
        batch.group_scores[K:, unjudged[K:]] += noise
        before = weights(prm.model)
        updater.update(batch)
        results.append(weights(prm.model))
    assert distance(*results) < 1e-6 < distance(before, results[0])


@pytest.mark.parametrize("labels", [(NAN,) * 8, (1.0,) * 8])
def test_nothing_to_learn_makes_no_step(setup, labels):
    """No row is judged, or no completion has a peer to be compared with."""
    prm, updater = setup(prm_loss_type="dpo", prm_lr_scheduler_type="linear", num_rollout_batches=4)
    before = weights(prm.model)
    result = updater.update(make_batch(prm, labels)).metrics
    assert same(weights(prm.model), before)
    assert result["loss"] != result["loss"] and result["grad_norm"] != result["grad_norm"]


@pytest.mark.parametrize(("epochs", "replay"), [(1, 0), (3, 0), (1, 2), (2, 2)])
def test_epochs_and_replay_train_on_the_right_batches_oldest_first(setup, epochs, replay):
    prm, updater = setup(prm_num_epochs=epochs, prm_replay_batches=replay, prm_micro_batch_size=8)
    steps, seen = [], []
    updater.backend.optimizer.register_step_post_hook(lambda *_: steps.append(seen[-1]))
    prm.model.model.embed_tokens.register_forward_hook(lambda _, args, output: seen.append(args[0][0, 0].item()))
    for number in range(4):
        batch = make_batch(prm)
        batch.prompt_ids[:, -3:] = 10 + number  # the longest prompt, cut to, has three tokens
        steps.clear()
        updater.update(batch)
        kept = list(range(max(number - replay, 0), number))
        assert steps == [10 + i for i in [*kept, number]] * epochs


def test_replay_steps_are_distinct_batches_drawn_from_all_that_are_kept(setup):
    prm, updater = setup(prm_num_epochs=2, prm_replay_batches=6, prm_replay_steps=2)
    steps = []
    updater._step = lambda batch, rows, keep_scores: (
        steps.append(int(batch.prompt_ids[0, 0])) or updater.scheduler.step(),
        torch.zeros(()),
    )
    drawn = set()
    for number in range(30):
        batch = make_batch(prm)
        batch.prompt_ids[:] = number
        steps.clear()
        updater.update(batch)
        kept = range(max(number - 6, 0), number)
        size = min(len(kept), 2) + 1
        assert len(steps) == 2 * size
        for epoch in (steps[:size], steps[size:]):
            *old, new = epoch
            assert new == number and set(old) <= set(kept) and old == sorted(set(old))
        drawn |= {number - old for old in steps}
    assert drawn == set(range(7))


def test_schedule_counts_the_steps_that_are_made(setup):
    prm, updater = setup(
        num_rollout_batches=4, prm_lr_scheduler_type="linear", prm_replay_batches=2, prm_replay_steps=1
    )
    # One step on the first batch, two on each of the others, of eight that were planned for
    rates = [updater.update(make_batch(prm)).metrics["learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([LR * (1 - done / 8) for done in (0, 1, 3, 5)])


def test_a_gradient_that_is_not_finite_is_left_out(setup):
    prm, updater = setup(prm_optim="adamw_torch", prm_weight_decay=0.1)
    batch, before = make_batch(prm), weights(prm.model)
    broken = dataclasses.replace(batch, ref_logps=batch.ref_logps.clone())
    broken.ref_logps[0, 0] = NAN
    updater.update(broken)
    assert updater.skipped_steps == 1
    assert same(weights(prm.model), before) and not updater.backend.optimizer.state
    assert all(p.grad is None or not p.grad.any() for p in prm.model.parameters())
    result = updater.update(batch).metrics
    assert result["loss"] == result["loss"] and not same(weights(prm.model), before)
    assert all(p.isfinite().all() for p in prm.model.parameters())


def test_optimizer_weight_decay_reaches_matrices_only(setup):
    prm, updater = setup(prm_weight_decay=0.1)
    decays = {
        id(p): group["weight_decay"] for group in updater.backend.optimizer.param_groups for p in group["params"]
    }
    assert len(decays) == len(list(prm.model.parameters()))
    for name, parameter in prm.model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name or "bias" in name else 0.1), name


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [("constant", 0, [1, 1, 1, 1]), ("linear", 0, [1, 0.75, 0.5, 0.25]), ("constant_with_warmup", 2, [0, 0.5, 1, 1])],
)
@pytest.mark.parametrize("epochs", [1, 2])
def test_schedule(setup, schedule, warmup, expected, epochs):
    prm, updater = setup(
        num_rollout_batches=4,
        prm_lr_scheduler_type=schedule,
        prm_warmup_steps=warmup * epochs,
        prm_num_epochs=epochs,
    )
    rates = [updater.update(make_batch(prm)).metrics["learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([LR * factor for factor in expected])


@pytest.mark.parametrize(
    ("loss_type", "more"),
    [("ce", {}), ("bon_rm", {}), ("calibrated_ce", {"prm_replay_steps": 1, "prm_num_epochs": 3})],
)
def test_resumed_updater_goes_on_bit_identically(setup, loss_type, more):
    settings = {
        **more,
        "prm_optim": "adamw_torch",
        "prm_learning_rate": 1e-2,
        "prm_lr_scheduler_type": "cosine",
        "prm_replay_batches": 2,
        "prm_loss_type": loss_type,
    }
    prm, updater = setup(**settings)
    for seed in range(3):
        updater.update(make_batch(prm, seed=seed))
    saved, model = io.BytesIO(), copy.deepcopy(prm.model)
    torch.save(updater.state_dict(), saved)
    saved.seek(0)
    resumed_prm, resumed = setup(model=model, **settings)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    expected = updater.update(make_batch(prm, seed=3)).metrics
    assert resumed.update(make_batch(resumed_prm, seed=3)).metrics == expected
    assert same(weights(prm.model), weights(resumed_prm.model))


def test_only_the_adapter_of_a_lora_prm_is_optimized(setup, make_config, tokenizer):
    prm = ImplicitPRM.from_policy(build_model(scale=4.0), tokenizer, peft_config=lora(), beta=0.5)
    args = make_config()
    updater = PRMUpdater(make_backend(prm, Accelerator(cpu=True)), args, 10)
    before, batch = weights(prm.model), make_batch(prm)
    for _ in range(2):
        updater.update(batch)
    after = weights(prm.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and moved == {name for name in before if "lora_" in name}


def test_learning_makes_right_completions_score_higher(setup):
    prm, updater = setup(prm_optim="adamw_torch", prm_learning_rate=3e-3)
    losses = [updater.update(make_batch(prm)).metrics["loss"] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
    scores, labels = make_batch(prm).group_scores[::K].flatten(), torch.tensor(LABELS)
    assert scores[labels == 1].min() > scores[labels == 0].max()
