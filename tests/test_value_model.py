"""The value model: its values against passes of single rows, its updates by hand, and runs by `advantage_estimator="gae"`."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model, distance, logged, row_rewards, same, weights
from datasets import Dataset
from helpers import BAND, FAILS, MIXED, PASSES, fixed_rollouts, lora, make_trained, metrics, ragged_batch, storages
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trl_prime.checks import check_before_loading
from trl_prime.implicit_prm.backends import make_backend
from trl_prime.implicit_prm.batch import PRMBatch
from trl_prime.implicit_prm.logps import unwrapped
from trl_prime.value_model.learner import ValueLearner, ValueUpdater
from trl_prime.value_model.model import ValueModel, build_value_model, with_value_head

GAE = {"advantage_estimator": "gae", "value_learning_rate": 1e-2}
LR = 0.5


def random_head(model, seed=0):
    """Let values differ from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unwrapped(model).get_output_embeddings().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def slow_values(model, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """(B, T, 2) values, row by row without padding, from the last hidden states."""
    base = unwrapped(model)
    head = base.get_output_embeddings()
    result = torch.zeros(*completion_ids.shape, 2)
    for row in range(len(prompt_ids)):
        prompt = prompt_ids[row][prompt_mask[row].bool()]
        completion = completion_ids[row][completion_mask[row].bool()]
        if len(completion):
            hidden = base.model(torch.cat([prompt, completion])[None]).last_hidden_state[0]
            values = hidden @ head.weight.T + head.bias
            result[row, : len(completion)] = values[len(prompt) - 1 : -1]
    return result


# --- The model ---


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_value_is_that_of_the_state_before_the_token(is_adapter, micro_batch_size):
    model = build_model(1, scale=4.0)
    model = make_trained(get_peft_model(model, lora())) if is_adapter else model
    model = random_head(with_value_head(model))
    batch = ragged_batch()
    expected = slow_values(model, *batch)
    value_model = ValueModel(model.train(), micro_batch_size)
    torch.testing.assert_close(value_model.values(*batch), expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.5 and model.training
    rows = torch.tensor([True, False, True, True, False, True, True])
    some = value_model.values(*batch, rows=rows, num_passes=9)
    torch.testing.assert_close(some, expected.masked_fill(~rows[:, None, None], 0.0), rtol=0, atol=2e-5)


def test_the_value_head_takes_the_place_of_one_that_was_tied():
    config = LlamaConfig(
        vocab_size=44,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    policy = LlamaForCausalLM(config).to(torch.bfloat16)
    model = with_value_head(copy.deepcopy(policy))
    model.tie_weights()
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear) and head.weight.shape == (2, 32) and head.weight.dtype == torch.float32
    assert not any(parameter.any() for parameter in head.parameters())
    assert model.get_input_embeddings().weight.shape == (44, 32)
    assert policy.config.tie_word_embeddings and policy.lm_head.weight is policy.get_input_embeddings().weight
    ids = torch.arange(8)[None]
    assert model(ids).logits.shape == (1, 8, 2)


@pytest.mark.parametrize("kind", ["full", "adapter", "adapter that was trained", "head in the adapter"])
def test_it_starts_from_the_policy_and_shares_what_nobody_trains(kind, tokenizer, make_config):
    policy = build_model(1, scale=4.0)
    if kind != "full":
        extra = {"modules_to_save": ["lm_head"], "bias": "all"} if kind == "head in the adapter" else {}
        policy = get_peft_model(policy, lora(**extra))
    if kind == "adapter that was trained":
        make_trained(policy)
    before, batch = weights(policy), ragged_batch()
    args = make_config(**GAE).for_models(kind != "full", False, None)
    model = build_value_model(policy, tokenizer, args).model
    assert not ValueModel(model, 8).values(*batch).any()
    hidden = unwrapped(model).model(batch[0]).last_hidden_state
    torch.testing.assert_close(hidden, unwrapped(policy).model(batch[0]).last_hidden_state, rtol=0, atol=2e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if kind == "full":
        assert trained == {name for name, _ in model.named_parameters()}
    else:
        assert all("lora_" in name or "lm_head" in name for name in trained) and len(trained) == 10
    shared = storages(policy) & storages(model)
    assert bool(shared) == (kind in ("adapter", "head in the adapter"))
    for one in (policy, model):
        assert not shared & {p.untyped_storage().data_ptr() for p in one.parameters() if p.requires_grad}
    random_head(model)
    assert same(weights(policy), before) and policy.get_output_embeddings().weight.shape[0] == 44


# --- One update ---


@pytest.fixture
def updater(make_config):
    def build(lr=LR, **settings):
        args = make_config(**{**GAE, "value_learning_rate": lr}, prm_optim="sgd", prm_max_grad_norm=0.0, **settings)
        value_model = ValueModel(random_head(with_value_head(build_model(1, scale=4.0))), 8)
        backend = make_backend(value_model, Accelerator(cpu=True))
        return value_model, ValueUpdater(backend, args.for_value_model(), 10)

    return build


def make_batch():
    """Two groups of four with a tool's token, a row that is left out, and one without tokens."""
    inputs = ragged_batch(((3, 5), (3, 2), (3, 6), (3, 1), (2, 6), (2, 0), (2, 4), (2, 2)))
    mask = inputs[3].bool().clone()
    mask[0, 2] = mask[3] = False
    nothing = torch.full((8,), torch.nan)
    return PRMBatch(*inputs, mask, torch.zeros(mask.shape), nothing, torch.zeros(8, 4))


def expected_step(model, batch, values, targets, clip, rows=slice(None), lr=LR):
    """Weights after one step by hand on the mean over tokens, the loss and the gradient norm."""
    model = copy.deepcopy(model)
    present, mask = slow_values(model, *batch.inputs), batch.policy_mask.clone()
    kept = torch.zeros(8, dtype=torch.bool)
    kept[rows] = True
    mask &= kept[:, None]
    errors = (present - targets) ** 2
    held = values + (present - values).clamp(-clip, clip) if clip else present
    loss = 0.5 * torch.maximum(errors, (held - targets) ** 2)[mask].sum() / mask.sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= lr * parameter.grad
    return model, loss.item(), norm.item()


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_one_step_is_that_of_the_tokens_of_the_whole_batch(updater, micro_batch_size):
    value_model, update = updater(prm_micro_batch_size=micro_batch_size)
    batch = make_batch()
    values = value_model.values(*batch.inputs)
    targets = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    before = weights(value_model.model)
    model, loss, norm = expected_step(value_model.model, batch, values, targets, 0.2)
    result = update.update(batch, values, targets)
    assert distance(weights(value_model.model), weights(model)) < min(5e-5, 0.01 * distance(before, weights(model)))
    expected = {"loss": loss, "grad_norm": norm, "learning_rate": LR, "skipped_steps": 0}
    assert result == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_epochs_and_mini_batches_are_steps_that_clip_by_the_values_before_the_first(updater, clip):
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
    value_model, update = updater(lr=0.02, value_num_epochs=2, value_clip_range=clip, **settings)
    batch = make_batch()
    values = value_model.values(*batch.inputs)
    targets = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    model, norms = value_model.model, []
    for group in (slice(0, 4), slice(4, 8)) * 2:
        model, _, norm = expected_step(model, batch, values, targets, clip, group, lr=0.02)
        norms.append(norm)
    before = weights(value_model.model)
    result = update.update(batch, values, targets)
    assert distance(weights(value_model.model), weights(model)) < 0.01 * distance(before, weights(model))
    assert result["grad_norm"] == pytest.approx(sum(norms) / 4, rel=1e-2)
    unclipped = (slow_values(model, *batch.inputs) - values)[batch.policy_mask].abs().amax()
    assert unclipped > 0.1


def test_tokens_that_do_not_train_have_no_influence(updater):
    results = []
    for noise in (0, 7):
        value_model, update = updater()
        batch = make_batch()
        values = value_model.values(*batch.inputs)
        batch.completion_ids[3] = (batch.completion_ids[3] - 3 + noise) % 40 + 3
        targets = torch.zeros(values.shape).masked_fill(~batch.policy_mask[..., None], float(noise))
        before = weights(value_model.model)
        update.update(batch, values, targets)
        results.append(weights(value_model.model))
    assert distance(*results) < 1e-6 < distance(before, results[0])


def test_nothing_to_learn_makes_no_step_and_a_broken_gradient_none_either(updater):
    value_model, update = updater()
    batch, before = make_batch(), weights(value_model.model)
    values = value_model.values(*batch.inputs)
    empty = dataclasses.replace(batch, policy_mask=torch.zeros_like(batch.policy_mask))
    result = update.update(empty, values, values + 1)
    assert math.isnan(result["loss"]) and same(weights(value_model.model), before)
    result = update.update(batch, values, values + torch.nan)
    assert result["skipped_steps"] == 1 and same(weights(value_model.model), before)


# --- Runs ---


@pytest.fixture
def valued(monkeypatch):
    """What the learner has made of each batch: the value model before it, rewards with values, and metrics."""
    seen, value_and_learn = [], ValueLearner.value_and_learn

    def recorded(self, batch, rewards, step):
        before = copy.deepcopy(self.value_model.model)
        rewards, metrics = value_and_learn(self, batch, rewards, step)
        seen.append((before, batch, rewards, metrics))
        return rewards, metrics

    monkeypatch.setattr(ValueLearner, "value_and_learn", recorded)
    return seen


@pytest.mark.parametrize("granularity", ["token", "turn"])
def test_advantages_are_those_of_the_values_before_the_update(train, valued, random_prm, granularity):
    trainer = train(
        **GAE,
        gae_lambda=0.6,
        outcome_gamma=0.9,
        process_gamma=0.5,
        process_weight=0.5,
        value_num_epochs=2,
        prm_model=random_prm(),
        process_reward_granularity=granularity,
        reward_funcs=row_rewards(MIXED),
        rollout_func=fixed_rollouts(env_mask=(1, 3)),
    )
    for (model, batch, rewards, _), output in zip(valued, trainer.outputs, strict=True):
        expected = slow_values(model.eval(), *batch.inputs)
        mask = batch.policy_mask
        torch.testing.assert_close(rewards.values[mask], expected[mask], rtol=0, atol=2e-5)
        assert rewards.settings["estimator"] == "gae" and rewards.settings["gae_lambda"] == 0.6
        assert torch.equal(output["advantages"], rewards.combine())
        assert output["advantages"][mask].std() == pytest.approx(1, rel=0.05) and not output["advantages"][~mask].any()
    first, second = (model for model, *_ in valued)
    assert distance(weights(first), weights(second)) > 1e-3
    for entry in metrics(trainer):
        assert all(math.isfinite(value) for value in entry.values() if value is not None)
        assert entry["value/grad_norm"] > 0 and entry["value/learning_rate"] == 1e-2
        assert 0 < entry["advantage/process_share"] < 1


@pytest.mark.parametrize("is_adapter", [False, True])
def test_values_learn_what_the_prompt_says_of_the_outcome(train, is_adapter):
    def reward(target, **kwargs):
        return [float(value) for value in target]

    trainer = train(
        **GAE,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": f"{'ab'[i % 2]}{i}=", "target": i % 2} for i in range(40)]),
        peft_config=lora() if is_adapter else None,
        process_weight=0.0,
        prm_update="none",
        value_num_epochs=4,
        max_steps=8,
        per_device_train_batch_size=32,
    )
    explained = logged(trainer, "value/explained_variance")
    assert explained[0] == 0 and min(explained[-3:]) > 0.5, explained
    losses = logged(trainer, "value/loss")
    assert losses[-1] < 0.5 * losses[0]


def test_a_source_without_weight_is_not_learned(train, valued, random_prm):
    trainer = train(**GAE, prm_model=random_prm(), process_weight=0.0, value_num_epochs=2)
    head = trainer.value_learner.value_model.model.get_output_embeddings()
    assert head.weight[0].any() and not head.weight[1].any() and not head.bias[1].any()
    assert not logged(trainer, "value/process_explained_variance")
    assert all(rewards.process_rewards.any() for _, _, rewards, _ in valued)


@pytest.mark.parametrize("config", [None, lora()], ids=["full", "adapters"])
def test_policy_prm_and_value_model_are_trained_apart(make_trainer, config):
    given = {"peft_config": config, "prm_peft_config": config, "rollout_func": fixed_rollouts()}
    results = {}
    rates = {"learning_rate": 1e-3, "prm_learning_rate": 1e-3, "value_learning_rate": 1e-2}
    for still in ("none", *rates):
        torch.manual_seed(0)
        trainer = make_trainer(
            **{**GAE, **rates, still: 0.0} if still in rates else {**GAE, **rates},
            reward_funcs=row_rewards(MIXED),
            **given,
        )
        parts = [trainer.model, trainer.implicit_prm.model, trainer.value_learner.value_model.model]
        before = [weights(part) for part in parts]
        trainer.train()
        results[still] = [weights(part) for part in parts]
        moved = [not same(*pair) for pair in zip(before, results[still], strict=True)]
        assert moved == [name != still for name in rates], still
        if config is not None:
            for part, was in zip(parts, before, strict=True):
                assert all(torch.equal(was[n], p) for n, p in part.named_parameters() if not p.requires_grad)
    # Nor do the others move where one stays: the PRM knows nothing of values, and values nothing of the PRM while it is not trusted
    assert same(results["value_learning_rate"][1], results["none"][1])
    assert same(results["learning_rate"][2], results["none"][2])


def test_rows_that_the_filter_leaves_out_teach_no_values(train, valued):
    trainer = train(**GAE, **BAND, reward_funcs=row_rewards(PASSES + FAILS), max_steps=1)
    _, batch, rewards, _ = valued[0]
    assert batch.policy_mask.any(1).tolist() == [True] * 4 + [False] * 4
    assert not rewards.values[4:].any() and not trainer.outputs[0]["advantages"][4:].any()
    before = weights(trainer.model)
    nothing = train(**GAE, **BAND, reward_funcs=row_rewards(FAILS), max_steps=1)
    assert not logged(nothing, "value/loss") or logged(nothing, "value/loss") == [None]
    assert nothing.state.global_step == 1 and not same(before, weights(nothing.model))
    head = nothing.value_learner.value_model.model.get_output_embeddings()
    assert not head.weight.any()


def test_oversampling_and_rounds_of_generation_with_values(train):
    trainer = train(**GAE, **BAND, oversample_factor=2, filter_max_rounds=2, reward_funcs=row_rewards(MIXED))
    assert all(math.isfinite(value) for value in logged(trainer, "value/loss"))


# --- Saving and resuming ---

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(train, tmp_path, is_adapter):
    settings = {
        **GAE,
        **STEPS,
        "gae_lambda": 0.9,
        "value_num_epochs": 2,
        "prm_lr_scheduler_type": "linear",
        "peft_config": lora() if is_adapter else None,
    }
    whole = train(**settings)
    resumed = train(str(tmp_path / "run" / "checkpoint-2"), **settings)
    for part in ("model", "implicit_prm", "value_learner"):
        first, second = (
            getattr(trainer, part) if part != "value_learner" else trainer.value_learner.value_model
            for trainer in (whole, resumed)
        )
        first, second = (getattr(model, "model", model) if part != "model" else model for model in (first, second))
        assert same(weights(first), weights(second)), part
    names = [name for name in metrics(whole)[-1] if name.startswith("value/")]
    assert "value/loss" in names
    for name in names:
        assert [entry[name] for entry in metrics(whole)[2:]] == [entry[name] for entry in metrics(resumed)[2:]]
    files = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"value_model.pt", "value_optimizer.pt", "value_state_0.pt"} <= files
    saved = torch.load(tmp_path / "run" / "checkpoint-2" / "value_model.pt", weights_only=True)
    trained = {n for n, p in whole.value_learner.value_model.model.named_parameters() if p.requires_grad}
    assert set(saved) == trained


def test_what_is_saved_at_the_end_has_no_value_model(train, tmp_path):
    trainer = train(**GAE)
    trainer.save_model(str(tmp_path / "final"))
    assert not [path for path in (tmp_path / "final").rglob("*") if "value" in path.name]
    assert (tmp_path / "final" / "prm").is_dir()


def test_a_checkpoint_without_a_value_model_is_refused(train, make_trainer, tmp_path):
    train(**STEPS)
    trainer = make_trainer(**GAE, **STEPS)
    with pytest.raises(ValueError, match="without a value model saved, but advantage_estimator is 'gae'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.state.global_step == 0


def test_a_second_training_begins_the_schedule_of_the_value_model_anew(train):
    trainer = train(**GAE, max_steps=2, prm_lr_scheduler_type="linear")
    assert logged(trainer, "value/learning_rate") == pytest.approx([1e-2, 5e-3])
    trainer.train()
    assert logged(trainer, "value/learning_rate") == pytest.approx([1e-2, 5e-3])


# --- What is refused ---


def test_values_that_are_not_finite_stop_the_run(make_trainer):
    trainer = make_trainer(**GAE)
    head = trainer.value_learner.value_model.model.get_output_embeddings()
    nn.init.constant_(head.bias, torch.inf)
    before = weights(trainer.model)
    with pytest.raises(FloatingPointError, match="values that are not finite at step 0.*value_learning_rate"):
        trainer.train()
    assert same(weights(trainer.model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gae_lambda": 0.9}, "gae_lambda is 0.9, but advantage_estimator='rloo' has no value model"),
        ({"value_learning_rate": 1e-4}, "value_learning_rate is 0.0001, but advantage_estimator='rloo'"),
        ({"value_num_epochs": 2}, "value_num_epochs is 2, but"),
        ({"value_clip_range": 0.0}, "value_clip_range is 0.0, but"),
        ({**GAE, "gae_lambda": 1.1}, "gae_lambda is 1.1, but must be between 0 and 1"),
        ({**GAE, "value_clip_range": -1.0}, "value_clip_range is -1.0"),
        ({**GAE, "value_num_epochs": 0}, "value_num_epochs is 0"),
        (
            {**GAE, "importance_sampling_level": "sequence", "process_weight": 0.0},
            "advantage_estimator='gae' has a value for each token",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(make_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


@pytest.mark.parametrize(("is_adapter", "rate"), [(False, 1e-5), (True, 1e-4)])
def test_the_default_rate_suits_what_is_trained(make_config, is_adapter, rate):
    args = make_config(advantage_estimator="gae")
    assert args.for_models(is_adapter, False, None).value_learning_rate == rate
    assert make_config().for_models(is_adapter, False, None).value_learning_rate is None


def test_what_does_not_go_with_a_value_model_is_refused_before_a_model_is_loaded(make_trainer, make_config):
    with pytest.raises(ValueError, match="does not go with reward_combination"):
        make_trainer(**GAE, model="no/such-model", reward_combination=lambda rewards: rewards.combine())
    with pytest.raises(ValueError, match="does not go with a PrefixTuningConfig"):
        prefix = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        make_trainer(**GAE, model="no/such-model", peft_config=prefix)
    args = make_config(**GAE)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    with pytest.raises(NotImplementedError, match="does not run with DeepSpeed"):
        check_before_loading({"args": args, "model": "no/such-model"}, None, None, None)
