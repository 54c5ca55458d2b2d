"""The weight of the reference's confidence: fitted to outcomes, and a part of scores, loss and process rewards."""

import pytest
import torch
from helpers import INPUTS, metrics, slow_process_rewards

from trl_prime.implicit_prm.calibration import ReferenceCalibration, fit_reference_weight
from trl_prime.implicit_prm.losses import base_rate_log_odds

NAN = float("nan")


def sample(weight, num=400, seed=0, guess_rate=0.0):
    generator = torch.Generator().manual_seed(seed)
    confidences = 5 * torch.randn(num, generator=generator) - 20
    scores = torch.randn(num, generator=generator)
    right = torch.rand(num, generator=generator) < (scores + weight * (confidences + 20) - 1).sigmoid()
    labels = (right | (torch.rand(num, generator=generator) < guess_rate)).float()
    return scores, confidences, labels


def slow_fit(scores, confidences, labels, guess_rate=0.0):
    """Both by gradient descent on the penalised likelihood, in its plain form."""
    scores, confidences, labels = scores.double(), confidences.double(), labels.double()
    standard = (confidences - confidences.mean()) / confidences.std(correction=0)
    base = base_rate_log_odds(labels.mean().item(), guess_rate)
    u = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([u], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        p = guess_rate + (1 - guess_rate) * (scores + base + u[0] + u[1].clamp(min=0) * standard).sigmoid()
        loss = -(labels * p.log() + (1 - labels) * (1 - p).log()).sum() + 0.5 * (u**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        u[1] = 0.1
    optimizer.step(closure)
    weight = u[1].clamp(min=0).item() / confidences.std(correction=0).item()
    return weight, base + u[0].item() - weight * confidences.mean().item()


@pytest.mark.parametrize(("weight", "guess_rate"), [(0.2, 0.0), (0.2, 0.1), (0.5, 0.0), (0.02, 0.25)])
def test_fit_is_the_penalised_maximum_of_the_likelihood(weight, guess_rate):
    data = sample(weight, guess_rate=guess_rate)
    found = fit_reference_weight(*data, guess_rate=guess_rate)
    assert found == pytest.approx(slow_fit(*data, guess_rate), rel=1e-3, abs=1e-4)


def test_fit_finds_the_truth():
    weight, intercept = fit_reference_weight(*sample(0.3, num=20_000))
    assert weight == pytest.approx(0.3, abs=0.02)
    assert intercept == pytest.approx(0.3 * 20 - 1, abs=0.4)


def test_confidence_that_speaks_against_being_right_has_no_weight():
    weight, intercept = fit_reference_weight(*sample(-0.3, num=4000))
    assert weight == 0
    assert intercept == pytest.approx(slow_fit(*sample(-0.3, num=4000))[1], abs=1e-3)


def test_a_score_that_holds_the_confidence_already_leaves_it_no_weight():
    scores, confidences, labels = sample(0.3, num=4000)
    weight, intercept = fit_reference_weight(scores + 0.3 * (confidences + 20), confidences, labels)
    assert weight == pytest.approx(0, abs=0.02)
    assert intercept == pytest.approx(-1, abs=0.4)


def test_fixed_weight_leaves_the_intercept_to_be_fitted():
    weight, intercept = fit_reference_weight(*sample(0.3, num=20_000), 0.3)
    assert weight == 0.3
    assert intercept == pytest.approx(5, abs=0.05)


def test_what_is_not_known_is_left_out():
    scores, confidences, labels = sample(0.3)
    expected = fit_reference_weight(scores[20:], confidences[20:], labels[20:])
    scores[:10], labels[10:20] = NAN, NAN
    assert fit_reference_weight(scores, confidences, labels) == pytest.approx(expected)
    none = torch.full((3,), NAN)
    assert fit_reference_weight(none, torch.zeros(3), none) == (0, 0)
    assert fit_reference_weight(scores[20:], torch.ones(380), labels[20:])[0] == 0  # all alike


def test_calibration_goes_by_the_last_batches_and_comes_back():
    calibration = ReferenceCalibration()
    batches = [sample(0.3, num=64, seed=seed) for seed in range(20)]
    for batch in batches:
        calibration.add(*batch)
    last = (torch.cat(column) for column in zip(*batches[-16:], strict=True))
    assert (calibration.weight, calibration.intercept) == pytest.approx(fit_reference_weight(*last))
    again = ReferenceCalibration()
    again.load_state_dict(calibration.state_dict(), torch.device("cpu"))
    assert again.weight == calibration.weight
    again.add(*sample(0.1))
    calibration.add(*sample(0.1))
    assert (again.weight, again.intercept) == (calibration.weight, calibration.intercept)


def slow_confidences(reference, output, centred):
    """By the logits of each row by itself."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = (output[key] for key in INPUTS)
    confidences = torch.zeros(completion_ids.shape)
    for row in range(len(completion_ids)):
        prompt, completion = prompt_ids[row][prompt_mask[row] == 1], completion_ids[row][completion_mask[row] == 1]
        with torch.no_grad():
            logps = reference(torch.cat([prompt, completion])[None]).logits[0].log_softmax(-1)
        for t, token in enumerate(completion.tolist()):
            at = logps[len(prompt) + t - 1]
            confidences[row, t] = at[token] - ((at.exp() * at).sum() if centred else 0)
    return confidences


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("weight", ["fitted", 0.2])
def test_process_rewards_hold_the_confidence_by_its_weight(record, random_prm, weight, centred):
    recorder = record(
        prm_model=random_prm(),
        prm_loss_type="calibrated_ce",
        prm_reference_weight=weight,
        prm_reference_centred=centred,
        prm_micro_batch_size=3,
        prm_replay_batches=2,
        max_steps=3,
    )
    prm = recorder.trainer.implicit_prm
    scores, confidences, labels = [], [], []
    for step, rewards in enumerate(recorder.rewards):
        output = recorder.trainer.outputs[step]
        own = slow_process_rewards(recorder.before[step], prm.reference, output)
        of_reference = slow_confidences(prm.reference, output, centred) * output["completion_mask"]
        scores.append((own * output["completion_mask"]).sum(1))
        confidences.append(of_reference.sum(1))
        labels.append(rewards.outcome_rewards)
        fixed = None if weight == "fitted" else weight
        expected, intercept = fit_reference_weight(*map(torch.cat, (scores, confidences, labels)), fixed)
        mask = output["completion_mask"]
        torch.testing.assert_close(
            rewards.process_rewards, (own + expected * of_reference) * mask, atol=1e-4, rtol=1e-3
        )
        logged = metrics(recorder.trainer)[step]
        assert logged["prm/reference_weight"] == pytest.approx(expected, abs=1e-4)
        if step == 0:  # without replay, the PRM as it was
            log_odds = scores[0] + expected * confidences[0] + intercept
            loss = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, labels[0])
            assert logged["prm/loss"] == pytest.approx(loss.item(), rel=1e-3)
