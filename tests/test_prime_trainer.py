"""The step of Algorithm 1 inside TRL's step: what reaches the policy loss, what reaches the PRM, and what never may."""

import copy
import dataclasses
import inspect
import itertools
import math
import statistics

import numpy
import pandas
import pytest
import torch
from conftest import (
    build_model,
    distance,
    logged,
    parity_reward,
    row_rewards,
    same,
    weights,
)
from datasets import Dataset, IterableDataset
from helpers import (
    BAND,
    FAILS,
    MIXED,
    PASSES,
    fixed_rollouts,
    lora,
    loss_mask,
    make_trained,
    metrics,
    slow_process_rewards,
)
from peft import PeftModel, get_peft_model
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import create_model_from_path, selective_log_softmax

import trl_prime.advantages
from trl_prime import PRIMETrainer
from trl_prime.advantages import ESTIMATORS, combine_rewards
from trl_prime.implicit_prm.accuracies import pairwise_accuracy
from trl_prime.implicit_prm.losses import LOSS_TYPES
from trl_prime.prime_config import UPDATE_MODES
from trl_prime.process_rewards import GRANULARITIES, NORMALIZATIONS

NAN = float("nan")


# --- What TRL must offer ---

PRIVATE_API = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "get_train_dataloader": ["self"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_save_rng_state": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_best_model": ["self"],
    "_issue_warnings_after_load": ["self", "load_result"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_finish_current_push": ["self"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "_compute_loss": ["self", "model", "inputs"],
    "get_off_policy_mask": [
        "advantages",
        "per_token_logps",
        "sampling_per_token_logps",
        "mask",
        "off_policy_threshold",
    ],
}


@pytest.mark.parametrize("name", PRIVATE_API)
def test_private_methods_of_trl_are_as_expected(name):
    assert [*inspect.signature(getattr(GRPOTrainer, name)).parameters] == PRIVATE_API[name]
    if name in PRIMETrainer.__dict__:
        assert [*inspect.signature(getattr(PRIMETrainer, name)).parameters] == PRIVATE_API[name]


def test_other_internals_of_trl_are_as_expected(make_trainer):
    positional = ["self", "model", "reward_funcs", "args", "train_dataset"]
    assert [*inspect.signature(GRPOTrainer.__init__).parameters][:5] == positional
    assert [*inspect.signature(PRIMETrainer.__init__).parameters][:5] == positional
    assert [*inspect.signature(selective_log_softmax).parameters][:2] == ["logits", "index"]
    assert [*inspect.signature(create_model_from_path).parameters][0] == "model_id"
    source = inspect.getsource(GRPOTrainer._compute_loss)
    for contract in ('inputs["tool_mask"]', "advantages.dim() == 1", 'inputs["num_items_in_batch"]'):
        assert contract in source
    trainer = make_trainer()
    assert {"images", "prompt", "completion", "rewards", "advantages", "extra"} == {*trainer._logs}
    assert set(trainer._metrics) <= {"train", "eval"} and trainer.temperature == 1.0
    # Before 1.16, TRL knows the tokenizer's end token only
    assert getattr(trainer, "eos_token_ids", [1]) and trainer.num_generations == trainer.num_generations_eval == 4
    assert trainer._tokenizer.pad_token_id == 0 and trainer._train_batch_size == 8
    assert trainer.reward_func_names == ["parity_reward"] and trainer.reward_weights.tolist() == [1.0]


# --- One PRM state per batch, and when it moves ---


def test_prm_does_not_touch_the_policy_when_its_rewards_do_not_count(train):
    """Neither through shared parameters nor through random numbers."""
    for peft in (None, lora()):
        states = []
        for mode in ("none", "after"):
            trainer = train(
                peft_config=peft, prm_peft_config=peft, prm_update=mode, process_weight=0.0, prm_learning_rate=0.1
            )
            states.append(weights(trainer.model))
        assert same(*states)
        assert not same(states[0], weights(get_peft_model(build_model(), peft) if peft else build_model()))


@pytest.mark.parametrize("prm_peft", [None, lora()], ids=["full", "lora"])
def test_without_process_rewards_it_is_rloo_by_trl(train, tokenizer, tmp_path, prm_peft):
    """
    GRPO's advantage r - mean(r) is RLOO's times (K - 1) / K. Building and training the PRM moves no random numbers.
    """
    settings = {
        "whiten_advantages": False,
        "process_weight": 0.0,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.5,
    }
    ours = train(prm_peft_config=prm_peft, **settings)
    names = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    values = {name: getattr(ours.args, name) for name in names if not name.startswith("_")}
    values.update(steps_per_generation=None, reward_weights=[4 / 3], output_dir=str(tmp_path / "grpo"))
    theirs = GRPOTrainer(
        model=build_model(),
        reward_funcs=parity_reward,
        args=GRPOConfig(**values),
        train_dataset=ours.train_dataset,
        processing_class=tokenizer,
    )
    theirs.train()
    assert distance(weights(ours.model), weights(theirs.model)) < 1e-6
    assert distance(weights(ours.model), weights(build_model())) > 1e-3


# --- Advantages ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"process_reward_norm": "batch_norm"},
        {"process_reward_norm": "std", "process_gamma": 0.5},
        {"outcome_weight": 0.5, "process_weight": 2.0, "outcome_gamma": 0.9, "whiten_advantages": False},
        {"process_reward_granularity": "whole", "advantage_estimator": "grpo"},
        {"process_reward_granularity": "step", "process_reward_step_delimiter": "a"},
        {"advantage_estimator": "value", "whiten_advantages": False},
    ],
    ids=str,
)
def test_advantages_are_combine_rewards_of_what_the_hook_sees(record, train, random_prm, settings):
    recorder = record(prm_model=random_prm(), **settings)
    plain = train(prm_model=random_prm(), reward_funcs=parity_reward, **{"process_reward_norm": "none", **settings})
    args = plain.args
    for step, rewards in enumerate(recorder.rewards):
        output = recorder.trainer.outputs[step]
        expected = combine_rewards(
            rewards.outcome_rewards,
            rewards.process_rewards,
            output["completion_mask"],
            4,
            estimator=args.advantage_estimator,
            outcome_weight=args.outcome_weight,
            process_weight=args.process_weight,
            outcome_gamma=args.outcome_gamma,
            process_gamma=args.process_gamma,
            whiten=args.whiten_advantages,
            reward_mask=rewards.reward_mask,
        )
        assert expected.abs().max() > 0.1
        assert torch.equal(output["advantages"], expected)
        assert torch.equal(plain.outputs[step]["advantages"], expected)
        assert torch.equal(rewards.completion_mask, output["completion_mask"].bool())
        assert torch.equal(rewards.completion_ids, output["completion_ids"])
        ids = [
            row[mask.bool()].tolist()
            for row, mask in zip(rewards.completion_ids, rewards.completion_mask, strict=True)
        ]
        assert rewards.outcome_rewards.tolist() == parity_reward(ids)
        # Every written token has a process reward, the last one too (fault 3)
        if args.process_reward_granularity == "token":
            assert torch.equal(rewards.process_rewards != 0, rewards.completion_mask)


def turns_of(output):
    """For each row, the places of the tokens of each of its turns."""
    turns = []
    for row in loss_mask(output).tolist():
        runs, before = [], 0
        for t, written in enumerate(row):
            if written and not before:
                runs.append([])
            if written:
                runs[-1].append(t)
            before = written
        turns.append(runs)
    return turns


@pytest.mark.parametrize("norm", ["none", "group_std", "softmax"])
def test_a_turn_has_the_sum_of_its_tokens_at_its_last_one(record, random_prm, norm):
    recorder = record(
        row_rewards(MIXED),
        prm_model=random_prm(),
        rollout_func=fixed_rollouts(env_mask=(1, 3)),
        process_reward_granularity="turn",
        process_reward_norm=norm,
        process_gamma=0.0,
        prm_trust_weighting=False,
        whiten_advantages=False,
        max_steps=1,
    )
    output, rewards = recorder.trainer.outputs[0], recorder.rewards[0]
    turns = turns_of(output)
    assert {len(runs) for runs in turns} == {1, 2, 3}
    by_token = slow_process_rewards(random_prm().model, random_prm().reference, output)
    sums = [[by_token[i, run].sum().item() for run in runs] for i, runs in enumerate(turns)]
    if norm == "softmax":
        shares = [[math.exp(s) / sum(map(math.exp, row)) for s in row] for row in sums]
        sums = [[outcome * share for share in row] for outcome, row in zip(MIXED, shares, strict=True)]
    if norm == "group_std":
        spreads = [statistics.pstdev(s for row in sums[first : first + 4] for s in row) for first in (0, 4)]
        sums = [[s / spreads[i // 4] for s in row] for i, row in enumerate(sums)]
    expected = torch.zeros_like(rewards.process_rewards)
    for i, runs in enumerate(turns):
        for run, total in zip(runs, sums[i], strict=True):
            expected[i, run[-1]] = total
    torch.testing.assert_close(rewards.process_rewards, expected, atol=2e-5, rtol=1e-4)
    # iStar: every token of a turn has the advantage of the outcome and that of its own turn
    for i, runs in enumerate(turns):
        peers = [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        for run, total in zip(runs, sums[i], strict=True):
            outcome = MIXED[i] - statistics.fmean(MIXED[j] for j in peers)
            process = total - statistics.fmean(statistics.fmean(sums[j]) for j in peers)
            advantages = output["advantages"][i, run]
            torch.testing.assert_close(
                advantages, torch.full_like(advantages, outcome + process), atol=1e-4, rtol=1e-4
            )


def test_advantage_terms_are_computed_once_a_step(train, monkeypatch):
    calls, compute = [], trl_prime.advantages.advantage_terms
    monkeypatch.setattr(
        trl_prime.advantages, "advantage_terms", lambda *args, **kwargs: calls.append(1) or compute(*args, **kwargs)
    )
    trainer = train(max_steps=2)
    assert len(calls) == 2 == len(logged(trainer, "advantage/process_share"))


def test_outcome_and_process_weights_matter(train, random_prm):
    """Fault 1: the ratio changes the advantage, also when whitening removes a common factor."""

    def advantages(outcome_weight, process_weight):
        trainer = train(
            prm_model=random_prm(),
            reward_funcs=row_rewards(MIXED),
            outcome_weight=outcome_weight,
            process_weight=process_weight,
            max_steps=1,
        )
        return trainer.outputs[0]["advantages"]

    equal = advantages(1.0, 1.0)
    torch.testing.assert_close(advantages(2.0, 2.0), equal)
    for weights_ in ((1.0, 0.3), (1.0, 0.0), (0.0, 1.0), (0.3, 1.0)):
        assert (advantages(*weights_) - equal).abs().max() > 0.05
    mask = advantages(1.0, 0.0) != 0
    outcome_only = advantages(1.0, 0.0)
    assert all(len(row[m].unique()) == 1 for row, m in zip(outcome_only, mask, strict=True))


def test_hook_gets_rollouts_and_decides(record, make_trainer):
    recorder = record()
    rewards = recorder.rewards[0]
    assert len(rewards.prompts) == len(rewards.completions) == 8 and rewards.num_generations == 4
    assert rewards.prompts[0] == rewards.prompts[3] and rewards.prompts[4] == rewards.prompts[7]
    tokenizer = recorder.trainer.processing_class
    assert rewards.completions == tokenizer.batch_decode(rewards.completion_ids, skip_special_tokens=True)
    assert rewards.trainer_state is recorder.trainer.state
    trainer = make_trainer(reward_combination=lambda rewards: torch.full(rewards.completion_mask.shape, 3.0))
    trainer.train()
    assert torch.equal(trainer.outputs[0]["advantages"], 3.0 * trainer.outputs[0]["completion_mask"])


def wrong_shape(rewards):
    return rewards.outcome_rewards


def not_a_number(rewards):
    return torch.full(rewards.completion_mask.shape, NAN)


def not_a_tensor(rewards):
    return rewards.combine().tolist()


@pytest.mark.parametrize("hook", [wrong_shape, not_a_number, not_a_tensor])
def test_a_bad_hook_is_named(train, hook):
    with pytest.raises((ValueError, TypeError), match=f"'{hook.__name__}'"):
        train(reward_combination=hook)


# --- Rewards and labels ---


# --- TRL's own options go on working ---


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
def test_policy_losses_of_trl(train, loss_type):
    trainer = train(loss_type=loss_type, reward_funcs=row_rewards(MIXED[:4] + FAILS), **BAND)
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in metrics(trainer))
    assert distance(weights(trainer.model), weights(build_model())) > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2, "max_steps": 4},
        {"importance_sampling_level": "sequence", "process_weight": 0.0},
        {"top_entropy_quantile": 0.5},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"disable_dropout": True, "shuffle_dataset": False},
        {"off_policy_mask_threshold": 0.5},
    ],
    ids=str,
)
def test_options_of_trl(train, settings):
    trainer = train(**settings)
    assert all(math.isfinite(entry["loss"]) for entry in metrics(trainer))
    assert distance(weights(trainer.model), weights(build_model())) > 1e-4
    assert distance(weights(trainer.implicit_prm.model), weights(build_model())) > 1e-4


def test_gradient_checkpointing_changes_nothing(train):
    runs = [train(gradient_checkpointing=value, prm_optim="sgd", optim="sgd") for value in (False, True)]
    assert distance(*(weights(run.implicit_prm.model) for run in runs)) < 1e-6
    assert distance(*(weights(run.model) for run in runs)) < 1e-6


def stream():
    for i in range(1000):
        yield {"prompt": f"{i % 10}+{i % 7}=", "target": i % 2}


@pytest.mark.parametrize(
    "dataset",
    [
        IterableDataset.from_generator(stream),
        Dataset.from_list([*stream()][:40]).to_iterable_dataset(),
    ],
)
@pytest.mark.parametrize("factor", [1, 2])
def test_streaming(train, dataset, factor):
    def reward(completions, target, **kwargs):
        assert len(target) == len(completions) == 8 * factor
        return [(t + i) % 2 for i, t in enumerate(target)]

    trainer = train(train_dataset=dataset, reward_funcs=reward, oversample_factor=factor, **BAND)
    assert all(output["completion_ids"].shape[0] == 8 for output in trainer.outputs)
    assert distance(weights(trainer.implicit_prm.model), weights(build_model())) > 1e-4


def test_conversational_prompts(record, tokenizer):
    messages = [[{"role": "user", "content": f"{i}+1="}] for i in range(10)]
    recorder = record(train_dataset=Dataset.from_list([{"prompt": m} for m in messages]))
    rewards, output = recorder.rewards[0], recorder.trainer.outputs[0]
    rendered = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
    # TRL logs messages; 1.9 logs their text
    if isinstance(rewards.prompts[0], str):
        expected = rewards.prompts
    else:
        expected = [rendered[messages.index(prompt)] for prompt in rewards.prompts]
        assert all(completion[0]["role"] == "assistant" for completion in rewards.completions)
    assert {*expected} <= {*rendered}
    assert tokenizer.batch_decode(output["prompt_ids"], skip_special_tokens=True) == expected
    assert recorder.rewards[1].process_rewards.any()


# --- Evaluation ---


@pytest.mark.parametrize("num_generations_eval", [1, 2])
@pytest.mark.parametrize("reference", ["frozen", "policy"])
def test_evaluation_moves_nothing(make_trainer, updates, num_generations_eval, reference):
    trainer = make_trainer(
        eval_dataset=Dataset.from_list([{"prompt": f"{i}="} for i in range(4)]),
        per_device_eval_batch_size=2,
        num_generations_eval=num_generations_eval,
        prm_reference=reference,
        log_completions=True,
        oversample_factor=2,
        filter_max_rounds=2,
        **BAND,
    )
    before = trainer.evaluate()
    trainer.train()
    num_updates, state = len(updates), weights(trainer.implicit_prm.model)
    trust = dataclasses.replace(trainer.prm_learner.trust)
    result = trainer.evaluate()
    assert len(updates) == num_updates == 2 and same(weights(trainer.implicit_prm.model), state)
    assert trainer.prm_learner.trust == trust
    assert not same(state, weights(build_model()))
    assert before["eval_prm/accuracy"] == 0.5 and before["eval_prm/process_reward"] == 0.0
    assert 0 <= result["eval_prm/accuracy"] <= 1 and result["eval_prm/process_reward"] != 0
    assert ("eval_prm/pairwise_accuracy" in result) == (num_generations_eval > 1)
    assert not any(key.startswith("eval_filter") for key in result)


def test_evaluation_during_training(train):
    settings = {"eval_dataset": Dataset.from_list([{"prompt": "1="}] * 2), "per_device_eval_batch_size": 4}
    trainer = train(eval_strategy="steps", eval_steps=1, max_steps=3, **settings)
    assert len(logged(trainer, "eval_prm/accuracy")) == 3
    assert distance(weights(trainer.implicit_prm.model), weights(build_model())) > 1e-3


# --- Logging ---


def test_metrics_are_in_range_and_averaged(train, random_prm):
    settings = {"reward_funcs": row_rewards(MIXED), "max_steps": 4, "prm_trust_weighting": True}
    single = metrics(train(prm_model=random_prm(), **settings))
    double = metrics(train(prm_model=random_prm(), logging_steps=2, **settings))
    assert len(single) == 4 and len(double) == 2
    shares = ("prm/pairwise_accuracy", "prm/accuracy", "prm/trust")
    shares += ("filter/pass_rate", "filter/judged", "filter/trained", "advantage/process_share")
    others = ("prm/loss", "prm/grad_norm", "prm/learning_rate", "prm/process_reward", "prm/skipped_steps")
    for entry in single:
        assert all(0 <= entry[name] <= 1 for name in shares)
        assert all(math.isfinite(entry[name]) for name in others) and entry["prm/grad_norm"] > 0
    for i, entry in enumerate(double):
        for name in shares + others:
            assert entry[name] == pytest.approx((single[2 * i][name] + single[2 * i + 1][name]) / 2, abs=1e-6), name
    assert single[0]["filter/judged"] == single[0]["filter/pass_rate"] == 1.0
    assert single[0]["prm/learning_rate"] == 1e-3


# With a guess rate, the chance of a right outcome is above 1/2 from lower scores on
@pytest.mark.parametrize("guess_rate", [0.0, 0.2])
def test_metrics_say_what_they_mean(record, random_prm, guess_rate):
    settings = {"prm_loss_type": "calibrated_ce", "prm_guess_rate": guess_rate} if guess_rate else {}
    # So few right ones that the intercept changes what the PRM believes
    outcomes = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    recorder = record(row_rewards(outcomes), prm_model=random_prm(), max_steps=1, **settings)
    entry, rewards = metrics(recorder.trainer)[0], recorder.rewards[0]
    scores, labels = rewards.process_rewards.sum(1), torch.tensor(outcomes)
    assert entry["prm/process_reward"] == pytest.approx(
        rewards.process_rewards[rewards.completion_mask].mean().item(), rel=1e-4
    )
    base_rate = (labels.mean() - guess_rate) / (1 - guess_rate)
    intercept = torch.logit(base_rate) if guess_rate else 0.0
    chances = guess_rate + (1 - guess_rate) * torch.sigmoid(scores + intercept)
    assert entry["prm/accuracy"] == ((chances > 0.5) == (labels > 0.5)).float().mean()
    wins = [
        float(scores[i] > scores[j]) for i in range(8) for j in range(8) if i // 4 == j // 4 and labels[i] > labels[j]
    ]
    assert entry["prm/pairwise_accuracy"] == pytest.approx(sum(wins) / len(wins))
    loss = torch.nn.functional.binary_cross_entropy(chances, labels)
    assert entry["prm/loss"] == pytest.approx(loss.item(), rel=1e-3)


def test_accuracy_after_the_update_is_that_of_the_last_epoch(record, random_prm):
    """The last pass sees the PRM after all steps but the last one: that of a run with an epoch less."""
    settings = {"prm_model": random_prm(), "prm_learning_rate": 1e-2, "max_steps": 1, "rollout_func": fixed_rollouts()}
    shorter = record(row_rewards(MIXED), prm_num_epochs=2, **settings)
    settings["prm_model"] = random_prm()
    entry = metrics(record(row_rewards(MIXED), prm_num_epochs=3, **settings).trainer)[0]
    rewards = slow_process_rewards(shorter.after[0], random_prm().reference, shorter.trainer.outputs[0])
    expected = pairwise_accuracy(rewards.sum(1), torch.tensor(MIXED), 4)
    assert entry["prm/pairwise_accuracy_after_update"] == pytest.approx(expected) != entry["prm/pairwise_accuracy"]
    assert "prm/pairwise_accuracy_after_update" not in metrics(record(max_steps=1).trainer)[0]


def test_completions_table(record):
    notes = [f"completion {i}" for i in range(8)]

    def judge(log_extra, **kwargs):
        log_extra("outcome", notes)
        return [None, *MIXED[1:]]

    recorder = record(judge, log_completions=True, max_steps=1)
    output, rewards = recorder.trainer.outputs[0], recorder.rewards[0]
    table = pandas.read_parquet(f"{recorder.trainer.args.output_dir}/completions/completions_00001.parquet")
    assert len(table) == 8
    assert {"step", "prompt", "completion", "advantage"} <= {*table.columns}
    numpy.testing.assert_allclose(table["prime/outcome"], rewards.outcome_rewards)
    numpy.testing.assert_allclose(table["prime/process_reward"], rewards.process_rewards.sum(1), atol=1e-6)
    mean = (output["advantages"] * loss_mask(output)).sum(1) / loss_mask(output).sum(1).clamp(min=1)
    numpy.testing.assert_allclose(table["advantage"], mean, atol=1e-6)
    assert [*table["prime/trained"]] == [False] + [True] * 7
    assert [*table["completion"]] == [*rewards.completions]
    assert [*table["outcome"]] == notes, "a user's own column keeps its name"


def test_completions_table_shows_the_rewards_of_turns(record, random_prm, make_trainer):
    settings = {"log_completions": True, "max_steps": 1, "prm_model": random_prm(), **BAND}
    # The second group does not pass the filter, and the third fills up the batch that the first one begins
    rewards = (*PASSES, *FAILS, *PASSES, *FAILS)
    recorder = record(
        row_rewards(rewards), rollout_func=fixed_rollouts(env_mask=(1, 3)), oversample_factor=2.0, **settings
    )
    table = pandas.read_parquet(f"{recorder.trainer.args.output_dir}/completions/completions_00001.parquet")
    output = recorder.trainer.outputs[0]
    by_token = slow_process_rewards(random_prm().model, random_prm().reference, output)
    shown = [[float(number) for number in text.split()] for text in table["prime/turn_rewards"]]
    assert [bool(numbers) for numbers in shown] == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
    for i, (numbers, runs) in enumerate(zip([*shown[:4], *shown[8:12]], turns_of(output), strict=True)):
        sums = [by_token[i, run].sum().item() for run in runs]
        numpy.testing.assert_allclose(numbers, sums, atol=6e-4)
    plain = record(row_rewards(rewards), rollout_func=fixed_rollouts(), **settings).trainer
    table = pandas.read_parquet(f"{plain.args.output_dir}/completions/completions_00001.parquet")
    assert "prime/turn_rewards" not in table.columns
    # Held-out completions stand in the same table
    evaluated = make_trainer(
        rollout_func=fixed_rollouts(env_mask=(1, 3)),
        eval_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(8)]),
        log_completions=True,
        prm_model=random_prm(),
    )
    evaluated.evaluate()
    table = pandas.read_parquet(f"{evaluated.args.output_dir}/completions/completions_00000.parquet")
    assert {len(text.split()) for text in table["prime/turn_rewards"]} <= {1, 2, 3} and len(table) == 8


def test_completions_table_of_an_evaluation_before_training(make_trainer):
    def reward(completion_ids, log_extra, **kwargs):
        log_extra("trained", ["no"] * len(completion_ids))
        return parity_reward(completion_ids)

    rows = Dataset.from_list([{"prompt": "1+1="}])
    trainer = make_trainer(reward_funcs=reward, eval_dataset=rows, log_completions=True, per_device_eval_batch_size=4)
    trainer.evaluate()
    table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_00000.parquet")
    assert [*table["trained"]] == ["no"] * 4 and [*table["prime/trained"]] == [False] * 4
    numpy.testing.assert_equal([*table["prime/outcome"]], [*table["reward"]])


# --- Which PRM ---


@pytest.mark.parametrize("prm_peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("policy_peft", [None, lora(), lora(lora_dropout=0.3)], ids=["full", "lora", "dropout"])
def test_adapters_learn_and_bases_stay(train, policy_peft, prm_peft):
    trainer = train(peft_config=policy_peft, prm_peft_config=prm_peft, reward_funcs=row_rewards(MIXED), max_steps=3)
    base = weights(build_model())
    assert same(weights(trainer.implicit_prm.reference), base)
    for model, peft in ((trainer.model, policy_peft), (trainer.implicit_prm.model, prm_peft)):
        assert isinstance(model, PeftModel) == bool(peft)
        named = dict(model.named_parameters())
        if peft:
            assert any("lora_B" in name and parameter.abs().max() > 1e-3 for name, parameter in named.items())
            frozen = [parameter for name, parameter in named.items() if "lora_" not in name]
            assert all(torch.equal(*pair) for pair in zip(frozen, base.values(), strict=True))
        else:
            assert distance(weights(model), base) > 1e-3


def test_policy_with_a_trained_adapter_and_kl(train, record):
    """TRL adds a copy of the adapter as its KL reference; the PRM starts from base and adapter merged."""
    policy = make_trained(get_peft_model(build_model(scale=4.0), lora()))
    with torch.no_grad():
        start = copy.deepcopy(policy).merge_and_unload()
    recorder = record(model=policy, beta=0.05, prm_learning_rate=0.0)
    for rewards in recorder.rewards:
        assert rewards.process_rewards.abs().max() == 0
    prm = recorder.trainer.implicit_prm
    assert distance(weights(prm.reference), weights(start)) < 1e-5


# --- Bad input ---


# --- Every accepted combination runs ---


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("mode", UPDATE_MODES)
def test_every_update_loss_and_granularity(train, random_prm, mode, loss_type, granularity):
    """Faults 4 and 5."""
    trainer = train(
        prm_model=random_prm(),
        reward_funcs=row_rewards(MIXED),
        prm_update=mode,
        prm_loss_type=loss_type,
        process_reward_granularity=granularity,
        process_reward_step_delimiter="a",
    )
    assert_learns(trainer, random_prm, moves=mode != "none")


REFUSED = {("grpo", "group_std"), ("value", "softmax")}


@pytest.mark.parametrize(
    ("estimator", "norm"), [pair for pair in itertools.product(ESTIMATORS, NORMALIZATIONS) if pair not in REFUSED]
)
def test_every_estimator_and_norm(train, random_prm, estimator, norm):
    trainer = train(
        prm_model=random_prm(),
        reward_funcs=row_rewards(MIXED),
        rollout_func=fixed_rollouts(env_mask=(1, 3)) if norm == "softmax" else None,
        process_reward_granularity="turn" if norm == "softmax" else "token",
        advantage_estimator=estimator,
        process_reward_norm=norm,
        prm_reference="policy" if norm == "std" else "frozen",
    )
    assert_learns(trainer, random_prm)


def assert_learns(trainer, random_prm, moves=True):
    assert distance(weights(trainer.model), weights(build_model())) > 1e-4
    assert (distance(weights(trainer.implicit_prm.model), weights(random_prm().model)) > 1e-4) == moves
    for entry in metrics(trainer):
        assert all(math.isfinite(value) for value in entry.values() if value is not None)
        assert entry["grad_norm"] > 0
        assert 0 < entry["advantage/process_share"] < 1
        assert ("prm/loss" in entry) == moves
    for output in trainer.outputs:
        assert output["advantages"].isfinite().all()
        assert not output["advantages"][output["completion_mask"] == 0].any()


# --- Saving and resuming ---
