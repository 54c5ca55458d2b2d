"""The implicit PRM while it learns beside a policy: when it moves, what its scores are made of, how far it is trusted."""

import numpy
import pytest
import torch
from conftest import build_model, distance, logged, row_rewards, same, weights
from helpers import INPUTS, MIXED, fixed_rollouts, lora, loss_mask, metrics, slow_process_rewards

from trl_prime.prime_config import UPDATE_MODES

NAN = float("nan")


# --- One PRM state per batch, and when it moves ---


@pytest.mark.parametrize(("loss_type", "replay"), [("dpo", 2), ("ce", 0), ("ce", 2)])
@pytest.mark.parametrize("mode", UPDATE_MODES)
def test_all_scores_of_a_batch_come_from_one_prm(record, random_prm, mode, loss_type, replay):
    """Fault 6: before the update in every mode but "before", whatever micro-batches, epochs and replay do."""
    recorder = record(
        prm_model=random_prm(),
        prm_update=mode,
        prm_loss_type=loss_type,
        prm_micro_batch_size=3,
        prm_num_epochs=3,
        prm_replay_batches=replay,
        max_steps=3,
    )
    reference = recorder.trainer.implicit_prm.reference
    assert len(recorder.rewards) == 3
    for step, rewards in enumerate(recorder.rewards):
        output = recorder.trainer.outputs[step]
        prm = recorder.after[step] if mode == "before" else recorder.before[step]
        expected = slow_process_rewards(prm, reference, output)
        torch.testing.assert_close(rewards.process_rewards, expected, atol=2e-5, rtol=1e-4)
        other = recorder.before[step] if mode == "before" else recorder.after[step]
        gap = (slow_process_rewards(other, reference, output) - expected).abs().max()
        assert gap == 0 if mode == "none" else gap > 1e-3
    assert same(weights(reference), weights(random_prm().reference))


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 1),  # single forward: the scores come out of the update
        ({"prm_update": "reverse", "prm_num_epochs": 2}, 2),
        ({"prm_update": "before"}, 2),
        ({"prm_update": "none"}, 1),
        ({"prm_loss_type": "calibrated_ce", "prm_guess_rate": 0.1}, 1),
        ({"prm_loss_type": "dpo"}, 2),
        # The first batch has no other before it and is scored by its update; the second is scored, and both are trained on
        ({"prm_replay_batches": 1}, 1.5),
        ({"dropout": 0.1}, 2),
    ],
    ids=str,
)
def test_passes_of_a_step(make_trainer, settings, passes):
    """How often each completion goes through PRM and reference: what a step costs beside GRPO."""
    prm_model = build_model()
    prm_model.model.layers[0].self_attn.attention_dropout = settings.pop("dropout", 0.0)
    trainer = make_trainer(
        prm_model=prm_model, reward_funcs=row_rewards(MIXED), prm_micro_batch_size=4, max_steps=2, **settings
    )
    rows, prm = {"prm": 0, "reference": 0}, trainer.implicit_prm
    for name, model in (("prm", prm.model), ("reference", prm.reference)):
        model.model.embed_tokens.register_forward_hook(
            lambda _, args, output, name=name: rows.update({name: rows[name] + len(args[0])})
        )
    trainer.train()
    replayed = settings.get("prm_replay_batches", 0)
    checked = 4  # rows of `can_tile` and `check_scoring`, once a run
    assert rows == {"prm": checked + 2 * 8 * passes + 8 * replayed, "reference": checked + 2 * 8}


def test_a_completion_without_label_is_left_out_though_another_function_judged_it(record, random_prm):
    labels = (None, *MIXED[1:])
    recorder = record(
        prm_model=random_prm(),
        reward_weights=[1.0, 1.0],
        prm_label="correct",
        max_steps=1,
        extra_reward_funcs=[row_rewards(labels, "correct")],
    )
    outcomes, output = recorder.rewards[0].outcome_rewards, recorder.trainer.outputs[0]
    assert outcomes.isnan().tolist() == [True] + [False] * 7
    assert not output["advantages"][0].any() and not loss_mask(output)[0].any() and loss_mask(output)[1:].any(1).all()


@pytest.mark.parametrize("prm_peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("policy_peft", [None, lora()], ids=["full", "lora"])
def test_first_process_rewards_are_exactly_zero(record, policy_peft, prm_peft):
    for settings in ({}, {"bf16": True}, {"temperature": 0.7}):
        recorder = record(peft_config=policy_peft, prm_peft_config=prm_peft, prm_micro_batch_size=3, **settings)
        assert not recorder.rewards[0].process_rewards.any()
        assert recorder.rewards[1].process_rewards.any()


@pytest.mark.parametrize(
    ("settings", "num_rollouts"),
    [
        ({}, 4),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 4),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "per_device_train_batch_size": 4}, 8),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 2}, 2),
        ({"num_iterations": 2}, 2),
        ({"generation_batch_size": 16}, 2),
    ],
    ids=str,
)
def test_prm_learns_once_from_each_generation_batch(record, updates, settings, num_rollouts):
    recorder = record(prm_lr_scheduler_type="linear", max_steps=4, **settings)
    assert len(updates) == num_rollouts
    for before, after in zip(recorder.before, recorder.after, strict=True):
        assert distance(weights(before), weights(after)) > 1e-4 * 0.2  # the last of a linear schedule are small
    expected = [1e-3 * (1 - i / num_rollouts) for i in range(num_rollouts)]
    per_log = num_rollouts // 4 or 1
    means = [sum(expected[i : i + per_log]) / per_log for i in range(0, num_rollouts, per_log)]
    values = [v for v in logged(recorder.trainer, "prm/learning_rate") if v is not None]
    assert values == pytest.approx(means)


def test_mode_none_never_moves_the_prm(train, random_prm, updates):
    trainer = train(prm_model=random_prm(), prm_update="none", max_steps=3)
    assert same(weights(trainer.implicit_prm.model), weights(random_prm().model)) and not updates
    assert "prm/loss" not in metrics(trainer)[-1] and metrics(trainer)[-1]["prm/accuracy"] is not None


# --- Process rewards against those in float32 ---


@pytest.mark.parametrize("settings", [{}, {"prm_loss_type": "dpo"}, {"prm_update": "none"}], ids=["ce", "dpo", "none"])
def test_precision_is_the_correlation_with_process_rewards_in_float32(record, random_prm, settings):
    start = random_prm()
    recorder = record(prm_model=random_prm(), bf16=True, **settings)
    output, rewards = recorder.trainer.outputs[0], recorder.rewards[0]
    rows = slice(0, 2)
    exact = slow_process_rewards(start.model, start.reference, {key: output[key][rows] for key in INPUTS})
    used, mask = rewards.process_rewards[rows], rewards.completion_mask[rows]
    assert not torch.allclose(used[mask], exact[mask], atol=1e-4), "bfloat16 rounds"
    expected = numpy.corrcoef(used[mask], exact[mask])[0, 1]
    precisions = logged(recorder.trainer, "prm/precision")
    assert len(precisions) == 2 and 1 - precisions[0] == pytest.approx(1 - expected, rel=0.02) and expected < 1 - 1e-6


@pytest.mark.parametrize(
    "settings, measured",
    [({}, 4), ({"logging_steps": 2}, 2), ({"num_iterations": 2}, 2), ({"logging_steps": 2, "num_iterations": 2}, 2)],
    ids=str,
)
def test_precision_is_measured_once_for_each_entry_of_the_log(train, random_prm, monkeypatch, settings, measured):
    calls = []
    monkeypatch.setattr("trl_prime.implicit_prm.precision.correlation", lambda *args: calls.append(args) or 0.75)
    trainer = train(prm_model=random_prm(), bf16=True, max_steps=4, **settings)
    assert len(calls) == measured and {*logged(trainer, "prm/precision")} == {0.75}


def test_precision_is_measured_again_in_a_second_training(train, random_prm):
    trainer = train(prm_model=random_prm(), bf16=True, logging_steps=3, max_steps=3)
    assert len(logged(trainer, "prm/precision")) == 1
    trainer.train()
    assert len(logged(trainer, "prm/precision")) == 1


def test_precision_is_not_measured_where_it_says_nothing(train, random_prm):
    assert not logged(train(prm_model=random_prm(), bf16=False), "prm/precision")
    # A PRM that equals its reference has process rewards of 0 in float32
    assert {*logged(train(bf16=True, prm_update="none"), "prm/precision")} <= {None}


def test_process_rewards_that_are_rounding_are_warned_of(train, monkeypatch, caplog):
    monkeypatch.setattr("trl_prime.implicit_prm.precision._UPDATES", 0)
    monkeypatch.setattr("trl_prime.implicit_prm.precision.correlation", lambda *args: 0.125)
    train(bf16=True, prm_learning_rate=1e-6)
    assert "mostly rounding" in caplog.text and "by 0.12 with" in caplog.text and "which is 1e-06" in caplog.text


# --- Trust in the PRM ---


@pytest.mark.parametrize(
    "wins, pairs", [(3.0, 10), (5.0, 10), (6.0, 10), (60.0, 100), (9.0, 10), (400.0, 400), (0.0, 0)]
)
def test_process_rewards_count_as_much_as_the_prm_is_better_than_chance(record, random_prm, monkeypatch, wins, pairs):
    monkeypatch.setattr("trl_prime.implicit_prm.learner.pairwise_wins", lambda *args: (wins, pairs))
    recorder = record(
        row_rewards(MIXED), prm_model=random_prm(), prm_trust_weighting=True, process_weight=2.0, max_steps=3
    )
    used = [rewards.settings["process_weight"] for rewards in recorder.rewards]
    won, seen, expected = 8.0, 16.0, []
    for _ in range(3):
        if pairs:
            won, seen = 0.9 * won + wins, 0.9 * seen + pairs
        accuracy = won / seen
        surely = accuracy - 1.5 * (max(accuracy * (1 - accuracy), 0.09) / seen) ** 0.5
        expected.append(2.0 * max(0.0, 2 * surely - 1))
    assert used == pytest.approx(expected)
    assert logged(recorder.trainer, "prm/trust") == pytest.approx([weight / 2 for weight in expected])
    for rewards, output in zip(recorder.rewards, recorder.trainer.outputs, strict=True):
        outcome_only = rewards.combine(process_weight=0.0)
        assert torch.equal(output["advantages"], outcome_only) == (rewards.settings["process_weight"] == 0)
    # Six wins of ten may be luck, 60 of 100 are not
    assert (expected[-1] > 0) == (wins >= 9)


def test_trust_is_measured_on_rollouts_that_were_not_trained_on(record):
    """However well the PRM knows a batch after its update, even in the mode that scores with the updated PRM."""
    recorder = record(
        row_rewards(MIXED), prm_update="before", prm_num_epochs=20, prm_trust_weighting=True, max_steps=1
    )
    entry = metrics(recorder.trainer)[0]
    assert entry["prm/pairwise_accuracy"] == 0.5 < entry["prm/pairwise_accuracy_after_update"]
    assert entry["prm/trust"] == 0.0 and recorder.rewards[0].process_rewards.any()


# --- Temperature and reference ---


@pytest.mark.parametrize("reference", ["frozen", "policy"])
@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 2, "per_device_train_batch_size": 4}], ids=str)
def test_process_rewards_do_not_depend_on_the_sampling_temperature(record, model_path, reference, settings):
    results = []
    for temperature in (0.5, 1.0, 2.0):
        policy = build_model(5, scale=4.0)
        recorder = record(
            row_rewards(MIXED),
            model=policy,
            prm_model=build_model(6, scale=4.0) if reference == "policy" else None,
            prm_reference=reference,
            rollout_func=fixed_rollouts(),
            temperature=temperature,
            learning_rate=0.0,
            prm_learning_rate=3e-2,
            max_steps=4,
            **settings,
        )
        assert (recorder.trainer.implicit_prm.reference is None) == (reference == "policy")
        results.append([rewards.process_rewards for rewards in recorder.rewards])
    pristine = build_model(5, scale=4.0)
    expected = slow_process_rewards(recorder.before[-1], pristine, recorder.trainer.outputs[-1])
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(results[-1][-1], expected, atol=1e-4, rtol=1e-3)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-3)


def test_policy_as_reference_follows_the_policy(record):
    recorder = record(
        prm_model=build_model(6, scale=4.0), prm_reference="policy", learning_rate=1e-2, prm_update="none", max_steps=3
    )
    policies = [build_model()]
    # The policy at the third rollout is not the first any more
    start = slow_process_rewards(recorder.before[2], policies[0], recorder.trainer.outputs[2])
    assert (recorder.rewards[2].process_rewards - start).abs().max() > 1e-2
    first = slow_process_rewards(recorder.before[0], policies[0], recorder.trainer.outputs[0])
    torch.testing.assert_close(recorder.rewards[0].process_rewards, first, atol=1e-4, rtol=1e-3)
