"""The step of Algorithm 1 inside TRL's step: what reaches the policy loss, what reaches the PRM, and what never may."""

import copy
import dataclasses
import inspect
import math

import numpy
import pandas
import pytest
import torch
from conftest import (
    build_model,
    build_tokenizer,
    distance,
    logged,
    parity_reward,
    row_rewards,
    same,
    slow_log_probs,
    weights,
)
from datasets import Dataset, IterableDataset
from helpers import fixed_rollouts, lora, make_trained, metrics, storages
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import create_model_from_path, selective_log_softmax

from trl_prime import ImplicitPRM, PRIMETrainer
from trl_prime.advantages import ESTIMATORS, combine_rewards
from trl_prime.implicit_prm.accuracies import pairwise_accuracy
from trl_prime.implicit_prm.logps import FUSED_LM_HEAD, can_fuse_lm_head, unwrapped
from trl_prime.implicit_prm.losses import LOSS_TYPES
from trl_prime.implicit_prm.updater import PRMUpdater
from trl_prime.prime_config import UPDATE_MODES
from trl_prime.process_rewards import GRANULARITIES, NORMALIZATIONS

NAN = float("nan")
MIXED = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


class Recorder:
    """A hook that changes nothing, and a reward function that sees the PRM before each batch."""

    def __init__(self, reward_func=parity_reward):
        self.rewards, self.before, self.after, self.trainer, self.reward_func = [], [], [], None, reward_func

    def hook(self, rewards):
        self.rewards.append(rewards)
        self.after.append(copy.deepcopy(self.trainer.implicit_prm.model))
        return rewards.combine()

    def reward(self, **kwargs):
        self.before.append(copy.deepcopy(self.trainer.implicit_prm.model))
        return self.reward_func(**kwargs)


@pytest.fixture
def record(make_trainer):
    def run(reward_func=parity_reward, extra_reward_funcs=(), **kwargs):
        recorder = Recorder(reward_func)
        trainer = make_trainer(
            reward_funcs=[recorder.reward, *extra_reward_funcs],
            reward_combination=recorder.hook,
            **{"process_reward_norm": "none", **kwargs},
        )
        recorder.trainer = trainer
        trainer.train()
        return recorder

    return run


@pytest.fixture
def updates(monkeypatch):
    """The batches that the PRM is updated on."""
    seen, update = [], PRMUpdater.update

    def recorded(self, batch):
        seen.append(batch)
        return update(self, batch)

    monkeypatch.setattr(PRMUpdater, "update", recorded)
    return seen


@torch.no_grad()
def slow_process_rewards(prm_model, reference, output, beta=0.5):
    batch = [output[key] for key in INPUTS]
    return beta * (slow_log_probs(prm_model, *batch) - slow_log_probs(reference, *batch))


def loss_mask(output):
    return output["completion_mask"] * output.get("tool_mask", 1)


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
    checked = 3  # rows of `check_scoring`, once a run
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


@pytest.mark.skipif(not can_fuse_lm_head(build_model()), reason="TRL before 1.15 has no fused head")
@pytest.mark.parametrize("prm_peft", [None, lora()], ids=["full", "lora"])
def test_a_fused_head_trains_the_same(train, prm_peft):
    settings = {"prm_peft_config": prm_peft, "reward_funcs": row_rewards(MIXED), "rollout_func": fixed_rollouts()}
    plain, fused = train(**settings), train(**settings, prm_fused_lm_head=True)
    for model in (fused.implicit_prm.model, fused.implicit_prm.reference):
        assert FUSED_LM_HEAD in vars(unwrapped(model))
    assert FUSED_LM_HEAD not in vars(unwrapped(plain.implicit_prm.model))  # on a CPU it is slower
    assert distance(weights(plain.implicit_prm.model), weights(fused.implicit_prm.model)) < 2e-5
    for name in ("prm/loss", "prm/pairwise_accuracy", "prm/process_reward"):
        assert logged(fused, name) == pytest.approx(logged(plain, name), rel=1e-3, abs=1e-6)


def test_a_fused_head_that_cannot_be_is_refused(make_trainer, monkeypatch):
    with pytest.raises(ValueError, match="prm_fused_lm_head.*prm_reference='policy'"):
        make_trainer(prm_fused_lm_head=True, prm_reference="policy")
    monkeypatch.setattr("trl_prime.implicit_prm.logps.add_fused_lm_head", None)
    with pytest.raises(ValueError, match="prm_fused_lm_head=True needs TRL from 1.15"):
        make_trainer(prm_fused_lm_head=True)
    make_trainer()


def test_qlora_trains_two_adapters_on_one_quantized_base(train, model_path, monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    # On processors that have these instructions, a forward pass in evaluation mode rewrites the weights to another layout,
    # which is made for inference and fails for narrow matrices
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    trainer = train(
        model=model_path,
        peft_config=lora(),
        prm_peft_config=lora(),
        quantization_config=quantization,
        reward_funcs=row_rewards(MIXED),
    )
    prm, policy = trainer.implicit_prm, trainer.model
    quantized = [p for p in prm.reference.parameters() if p.dtype == torch.uint8]
    assert len(quantized) == 14  # all matrices of both layers
    num_base, num_adapter = len(storages(prm.reference)), len([n for n, _ in policy.named_parameters() if "lora" in n])
    assert len(storages(policy, prm.model, prm.reference)) == num_base + 2 * num_adapter
    for model in (policy, prm.model):
        assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    fresh = AutoModelForCausalLM.from_pretrained(model_path, quantization_config=quantization)
    assert same(weights(prm.reference), weights(fresh))


@pytest.mark.parametrize("is_lora", [False, True])
def test_prm_of_an_earlier_run_by_its_folder(make_trainer, tokenizer, tmp_path, is_lora):
    """It keeps its own reference: taken for a plain model it would start from zero rewards again."""
    saved = ImplicitPRM.from_model(build_model(4), tokenizer, peft_config=lora() if is_lora else None, beta=0.5)
    make_trained(saved.model)
    saved.save_pretrained(tmp_path / "prm")
    prm = make_trainer(prm_model=str(tmp_path / "prm")).implicit_prm
    assert same(weights(prm.model), weights(saved.model)) and same(weights(prm.reference), weights(build_model(4)))
    assert any(parameter.requires_grad for parameter in prm.model.parameters())


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


@pytest.mark.parametrize("unjudged", [(1,), (4, 5, 6, 7), tuple(range(8))], ids=str)
def test_rows_without_reward_train_nothing(record, updates, random_prm, unjudged):
    """Fault 17."""
    values = [None if i in unjudged else value for i, value in enumerate(MIXED)]
    prm = random_prm()
    recorder = record(row_rewards(values), prm_model=prm, beta=0.0, max_steps=1)
    output, rewards = recorder.trainer.outputs[0], recorder.rewards[0]
    rows = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(unjudged), True)
    assert torch.equal(rewards.outcome_rewards.isnan(), rows) and torch.equal(updates[0].labels.isnan(), rows)
    assert not output["advantages"][rows].any() and not loss_mask(output)[rows].any()
    assert not updates[0].policy_mask[rows].any()
    assert loss_mask(output).sum() == output["completion_mask"][~rows].sum()
    assert output["num_items_in_batch"] == max(loss_mask(output).sum(), 1)
    if not rows.all():
        assert output["advantages"][~rows].any(dim=1).sum() >= 3
    moved = [not same(weights(recorder.trainer.model), weights(build_model()))]
    moved += [not same(weights(prm.model), weights(random_prm().model))]
    assert moved == [not rows.all()] * 2
    assert logged(recorder.trainer, "filter/judged")[0] == pytest.approx(1 - len(unjudged) / 8)
    # The others' baseline leaves them out
    for row in (~rows).nonzero().flatten().tolist():
        peers = [values[i] for i in range(row // 4 * 4, row // 4 * 4 + 4) if i != row and values[i] is not None]
        expected = values[row] - sum(peers) / len(peers)
        only_outcome = rewards.combine(process_weight=0.0, whiten=False)[row]
        torch.testing.assert_close(only_outcome[rewards.completion_mask[row]].unique(), torch.tensor([expected]))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
@pytest.mark.parametrize("cause", ["none", "filter", "truncated"])
def test_content_of_dropped_rows_reaches_neither_policy_nor_prm(train, model_path, cause, loss_type):
    """Not even through the KL term or the entropy bonus: two runs that differ only there end alike."""
    values = {"none": (1.0, 0.0, 0.0, 1.0, None, None, None, None), "filter": (1, 0, 0, 1, 0, 0, 0, 0)}
    settings = {
        "model": model_path,
        "prm_loss_type": "dpo" if loss_type == "dapo" else "ce",
        "loss_type": loss_type,
        "beta": 0.1,
        "entropy_coef": 0.1,
        "optim": "sgd",
        "learning_rate": 0.05,
        "prm_optim": "sgd",
        "prm_learning_rate": 0.05,
        "accuracy_low": 0.2,
        "accuracy_high": 0.8,
        "filter_truncated": cause == "truncated",
    }
    lengths = (5, 7, 3, 6, 7, 2, 4, 8 if cause == "truncated" else 7)
    results = {}
    for change in ((), (4, 5, 6, 7), (1,)):
        trainer = train(
            reward_funcs=row_rewards(values.get(cause, MIXED)),
            rollout_func=fixed_rollouts(change=change, lengths=lengths),
            **settings,
        )
        results[change] = {
            **{f"policy.{k}": v for k, v in weights(trainer.model).items()},
            **{f"prm.{k}": v for k, v in weights(trainer.implicit_prm.model).items()},
        }
        assert logged(trainer, "filter/pass_rate") == [0.5, 0.5]
    assert distance(results[()], results[(4, 5, 6, 7)]) < 1e-6
    for part in ("policy.", "prm."):  # while the content of the others does
        first, second = ({k: v for k, v in results[c].items() if k.startswith(part)} for c in ((), (1,)))
        assert distance(first, second) > 1e-4


async def async_reward(completions, **kwargs):
    return [0.25 * (i % 2) for i in range(len(completions))]


def test_several_reward_functions(train, updates):
    """Weighted sum by default, one of them by name; a row counts when all functions judged it."""
    seen = []
    correct = row_rewards((1.0, 0.0, None, 1.0, None, 0.0, 1.0, 0.0), "correct")
    style = row_rewards((None, 0.5, 1.0, 0.5, None, None, None, None), "style")
    # Of the second prompt style judged nothing: it is for the first
    outcomes = [NAN, 0.125 + 0.25, NAN, 0.5 + 0.125 + 0.25, NAN, 0.25, 0.5, 0.25]
    expected = {"reward": outcomes, "correct": [NAN, 0.0, NAN, 1.0, NAN, 0.0, 1.0, 0.0]}
    for label in ("reward", "correct"):
        updates.clear()
        seen.clear()
        train(
            reward_funcs=[correct, style, async_reward],
            reward_weights=[0.5, 0.25, 1.0],
            prm_label=label,
            reward_combination=lambda rewards: seen.append(rewards) or rewards.combine(),
            max_steps=1,
        )
        assert [*seen[0].reward_func_names] == ["correct", "style", "async_reward"]
        assert seen[0].outcome_rewards_per_func.shape == (8, 3)
        numpy.testing.assert_allclose(seen[0].outcome_rewards.numpy(), expected["reward"])
        numpy.testing.assert_allclose(updates[0].labels.numpy(), expected[label])


def test_labels_outside_zero_to_one_are_refused_with_the_fix(train):
    with pytest.raises(ValueError, match=r"label 2 is outside \[0, 1\].*prm_label.*row_reward.*reward_weights"):
        train(reward_funcs=row_rewards((0.0, 2.0)))
    with pytest.raises(ValueError, match=r"-0\.5 is outside"):
        train(reward_funcs=row_rewards((0.0, -0.5)))
    with pytest.raises(ValueError, match=r"'row_reward' returned infinity"):
        train(reward_funcs=row_rewards((0.0, math.inf)))
    # The fix works
    funcs = [row_rewards(MIXED, "correct"), row_rewards((0.0, 2.0), "bonus")]
    trainer = train(reward_funcs=funcs, prm_label="correct")
    assert not same(weights(trainer.implicit_prm.model), weights(build_model()))
    train(reward_funcs=funcs, reward_weights=[0.5, 0.25])


def test_unknown_label_gets_the_nearest_match(make_trainer):
    with pytest.raises(ValueError, match=r"prm_label is 'corect'.*Did you mean 'correct'"):
        make_trainer(reward_funcs=row_rewards(MIXED, "correct"), prm_label="corect")


# --- Prompt filter and oversampling ---

PASSES = (1.0, 0.0, 0.0, 1.0)
FAILS = (0.0, 0.0, 0.0, 0.0)
BAND = {"accuracy_low": 0.2, "accuracy_high": 0.8}


def test_a_group_of_equal_partial_credit_fails_the_filter(train):
    """Fault 12."""
    trainer = train(reward_funcs=row_rewards((0.5,) * 4 + PASSES), **BAND)
    assert not loss_mask(trainer.outputs[0])[:4].any() and loss_mask(trainer.outputs[0])[4:].any()


@pytest.mark.parametrize(
    ("groups", "kept"),
    [((FAILS, PASSES, FAILS, PASSES), (1, 3)), ((PASSES,) * 4, (0, 1)), ((FAILS, FAILS, PASSES, FAILS), (0, 2))],
)
@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_oversampling_keeps_whole_groups_that_pass_first(record, groups, kept, steps_per_generation):
    """Fault 11."""
    values = [value for group in groups for value in group]
    prompts = []
    recorder = record(
        lambda prompts_=prompts, **kwargs: prompts_.append(kwargs["prompts"]) or values,
        oversample_factor=2,
        per_device_train_batch_size=8 // steps_per_generation,
        steps_per_generation=steps_per_generation,
        log_completions=True,
        max_steps=2,
        **BAND,
    )
    trainer, rewards = recorder.trainer, recorder.rewards[0]
    output = trainer.outputs[0]
    assert len(prompts[0]) == 16 and len(prompts) == 2 // steps_per_generation
    rows = [group * 4 + i for group in kept for i in range(4)]
    assert [*rewards.prompts] == [prompts[0][row] for row in rows]
    assert len({*rewards.prompts}) == 2
    num_rows, num_tokens = output["completion_ids"].shape
    assert num_rows == 8 and output["advantages"].shape == output["completion_mask"].shape == (8, num_tokens)
    trained = [values[row] if sum(groups[row // 4]) else NAN for row in rows]
    numpy.testing.assert_equal(rewards.outcome_rewards.tolist(), trained)
    passing = ~torch.tensor(trained).isnan()
    assert torch.equal(loss_mask(output).any(1), passing) and not output["advantages"][~passing].any()
    decoded = trainer.processing_class.batch_decode(output["prompt_ids"], skip_special_tokens=True)
    assert decoded == [prompts[0][row] for row in rows]
    assert output["num_items_in_batch"] == loss_mask(output).sum()
    assert logged(trainer, "filter/pass_rate")[0] == sum(map(sum, groups)) / 2 / 4
    assert logged(trainer, "filter/trained")[0] == passing.float().mean()

    table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    assert len(table) == 16 and [*table["prompt"]] == prompts[0] and [*table["prime/outcome"]] == values
    expected = numpy.zeros(16, dtype=bool)
    expected[rows] = passing.numpy()
    assert [*table["prime/trained"]] == [*expected]
    mean = (output["advantages"] * loss_mask(output)).sum(1) / loss_mask(output).sum(1).clamp(min=1)
    numpy.testing.assert_allclose(table["advantage"][rows], mean, atol=1e-6)
    assert not table["advantage"][~expected].any() and not table["prime/process_reward"][~expected].any()


def test_oversampling_by_half_and_longer_prompts_of_dropped_groups(record):
    recorder = record(
        row_rewards(PASSES + FAILS + PASSES), oversample_factor=1.5, steps_per_generation=1, max_steps=3, **BAND
    )
    for output in recorder.trainer.outputs:
        assert output["completion_ids"].shape[0] == 8
        assert output["prompt_mask"].any(0).all()  # no column that only dropped rows needed
        assert loss_mask(output).any(1).all()
    assert logged(recorder.trainer, "filter/pass_rate") == pytest.approx([2 / 3] * 3)


def test_a_batch_without_any_group_leaves_everything_where_it_is(train):
    trainer = train(reward_funcs=row_rewards(FAILS), max_steps=1, logging_steps=1, **BAND)
    assert same(weights(trainer.model), weights(build_model()))
    assert same(weights(trainer.implicit_prm.model), weights(build_model()))
    assert metrics(trainer)[0]["loss"] == 0 and metrics(trainer)[0]["filter/pass_rate"] == 0


# --- Masks ---


def test_tokens_that_the_policy_did_not_write_get_nothing(record, updates, random_prm):
    recorder = record(
        row_rewards(MIXED), prm_model=random_prm(), rollout_func=fixed_rollouts(env_mask=(1, 3)), max_steps=1
    )
    output, rewards = recorder.trainer.outputs[0], recorder.rewards[0]
    written = output["completion_mask"].bool().clone()
    written[:, [1, 3]] = False
    assert torch.equal(rewards.completion_mask, written) and torch.equal(updates[0].policy_mask, written)
    assert torch.equal(loss_mask(output).bool(), written)
    assert not rewards.process_rewards[~written].any() and not output["advantages"][~written].any()
    assert rewards.process_rewards[written].all()
    assert output["num_items_in_batch"] == written.sum()
    reference = random_prm().reference
    expected = slow_process_rewards(random_prm().model, reference, output) * written
    torch.testing.assert_close(rewards.process_rewards, expected, atol=2e-5, rtol=1e-4)


def test_masked_truncated_completions_teach_nothing(record, updates, random_prm):
    labels = (1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    recorder = record(
        row_rewards(labels),
        prm_model=random_prm(),
        rollout_func=fixed_rollouts(),
        mask_truncated_completions=True,
        max_steps=1,
    )
    output, rewards = recorder.trainer.outputs[0], recorder.rewards[0]
    truncated = torch.tensor([1, 4])  # those of 8 tokens
    assert not loss_mask(output)[truncated].any() and not output["advantages"][truncated].any()
    assert not updates[0].policy_mask[truncated].any() and output["advantages"].isfinite().all()
    # A completion that has no tokens has no score, and is in no pair
    scores, judged = rewards.process_rewards.sum(1), torch.tensor(labels).index_fill(0, truncated, NAN)
    expected = pairwise_accuracy(scores, judged, 4)
    assert expected != pairwise_accuracy(scores, torch.tensor(labels), 4)
    assert logged(recorder.trainer, "prm/pairwise_accuracy") == [pytest.approx(expected)]


def test_filter_truncated_drops_the_group(train):
    trainer = train(
        reward_funcs=row_rewards(PASSES * 2),
        rollout_func=fixed_rollouts(lengths=(5, 8, 3, 6, 2, 2, 4, 7)),
        filter_truncated=True,
    )
    assert loss_mask(trainer.outputs[0]).any(1).tolist() == [False] * 4 + [True] * 4
    trainer = train(reward_funcs=row_rewards(PASSES * 2), rollout_func=fixed_rollouts())
    assert loss_mask(trainer.outputs[0]).any(1).all()


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
    recorder = record(row_rewards(MIXED), prm_model=random_prm(), max_steps=1, prm_guess_rate=guess_rate)
    entry, rewards = metrics(recorder.trainer)[0], recorder.rewards[0]
    scores, labels = rewards.process_rewards.sum(1), torch.tensor(MIXED)
    assert entry["prm/process_reward"] == pytest.approx(
        rewards.process_rewards[rewards.completion_mask].mean().item(), rel=1e-4
    )
    chances = guess_rate + (1 - guess_rate) * torch.sigmoid(scores)
    assert entry["prm/accuracy"] == ((chances > 0.5) == (labels > 0.5)).float().mean()
    wins = [
        float(scores[i] > scores[j]) for i in range(8) for j in range(8) if i // 4 == j // 4 and labels[i] > labels[j]
    ]
    assert entry["prm/pairwise_accuracy"] == pytest.approx(sum(wins) / len(wins))
    loss = torch.nn.functional.binary_cross_entropy(chances, labels)
    assert entry["prm/loss"] == pytest.approx(loss.item(), rel=1e-3)


def test_accuracy_after_the_update_is_that_of_the_last_epoch(record, random_prm):
    """Of its pass, in which all steps but the last one are made: what a run with an epoch less ends with."""
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


def test_precision_is_not_measured_where_it_says_nothing(train, random_prm):
    assert not logged(train(prm_model=random_prm(), bf16=False), "prm/precision")
    # A PRM that equals its reference has process rewards of 0 in float32
    assert {*logged(train(bf16=True, prm_update="none"), "prm/precision")} <= {None}


def test_process_rewards_that_are_rounding_are_warned_of(train, monkeypatch, caplog):
    monkeypatch.setattr("trl_prime.implicit_prm.precision._UPDATES", 0)
    monkeypatch.setattr("trl_prime.implicit_prm.precision.correlation", lambda *args: 0.125)
    train(bf16=True, prm_learning_rate=1e-6)
    assert "mostly rounding" in caplog.text and "by 0.12 with" in caplog.text and "which is 1e-06" in caplog.text


# --- Fewer prompts than a generation batch ---


@pytest.mark.parametrize(
    "settings, needed",
    [
        ({"gradient_accumulation_steps": 2}, 4),
        ({"oversample_factor": 2, "accuracy_low": 0.2, "accuracy_high": 0.8}, 4),
    ],
    ids=["accumulation", "oversampled"],
)
def test_fewer_prompts_than_a_generation_batch_are_refused_before_a_model_is_loaded(make_trainer, settings, needed):
    rows = [{"prompt": f"{i}="} for i in range(needed - 1)]
    message = f"has {needed - 1} prompts, but one generation batch takes {needed}: .*Lower per_device_train_batch_size"
    with pytest.raises(ValueError, match=message):
        make_trainer(model="a/model-that-is-not-there", train_dataset=Dataset.from_list(rows), **settings)
    trainer = make_trainer(train_dataset=Dataset.from_list([*rows, {"prompt": "7="}]), max_steps=1, **settings)
    trainer.train()
    assert trainer.state.global_step == 1 and len({*trainer._logs["prompt"]}) == needed


def test_a_stream_that_ends_before_the_first_generation_batch_is_an_error(make_trainer):
    rows = Dataset.from_list([{"prompt": f"{i}="} for i in range(3)]).to_iterable_dataset()
    trainer = make_trainer(train_dataset=rows, gradient_accumulation_steps=2, max_steps=1)
    with pytest.raises(RuntimeError, match="ended before a generation batch of 4 prompts was full"):
        trainer.train()
    assert same(weights(trainer.model), weights(build_model()))


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


# --- Which PRM ---


def test_prm_from_a_path(make_trainer, model_path):
    prm = make_trainer(prm_model=model_path).implicit_prm
    expected = weights(AutoModelForCausalLM.from_pretrained(model_path))
    assert same(weights(prm.model), expected) and same(weights(prm.reference), expected)


def test_prm_init_kwargs(make_trainer, model_path):
    trainer = make_trainer(prm_model=model_path, prm_model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.implicit_prm.model.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32


def test_prm_from_an_instance_is_trained_in_place(train):
    instance = build_model(3)
    trainer = train(prm_model=instance)
    assert trainer.implicit_prm.model is instance and not same(weights(instance), weights(build_model(3)))
    assert same(weights(trainer.implicit_prm.reference), weights(build_model(3)))


def test_the_policy_instance_as_prm_is_not_trained_twice(make_trainer):
    policy = build_model()
    try:
        trainer = make_trainer(model=policy, prm_model=policy)
    except ValueError as error:
        assert "prm_model" in str(error)
        return
    trained = {parameter.data_ptr() for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert not trained & {p.data_ptr() for p in trainer.implicit_prm.model.parameters() if p.requires_grad}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("is_lora", [False, True])
def test_prm_of_an_earlier_run(train, tokenizer, tmp_path, is_lora, trainable):
    """It goes on from where it was, against its own reference, and only what is its own is trained."""
    saved = ImplicitPRM.from_model(build_model(4), tokenizer, peft_config=lora() if is_lora else None, beta=0.5)
    make_trained(saved.model)
    saved.save_pretrained(tmp_path / "prm")
    prm = ImplicitPRM.from_pretrained(tmp_path / "prm", trainable=trainable)
    before = weights(prm.model)
    trainer = train(prm_model=prm)
    assert trainer.implicit_prm.model is prm.model
    assert same(weights(prm.reference), weights(build_model(4)))
    moved = {name for name, value in weights(prm.model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name or not is_lora}
    trainer.save_model(str(tmp_path / "run"))
    loaded = ImplicitPRM.from_pretrained(tmp_path / "run")
    assert same(weights(loaded.model), weights(prm.model))


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


def test_another_tokenizer_is_refused(make_trainer, tmp_path, random_prm):
    """Fault 14."""
    other = build_tokenizer("9876543210+=:\nabcdefghijklmnopqrstuvwxyz ")
    build_model().save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer differs.*'0'"):
        make_trainer(prm_model=str(tmp_path))
    prm = random_prm()
    prm.tokenizer = other
    with pytest.raises(ValueError, match="tokenizer differs"):
        make_trainer(prm_model=prm)
    with pytest.raises(ValueError, match=r"embeds 20 tokens, but the policy's tokenizer has 44"):
        make_trainer(prm_model=build_model(vocab_size=20))


def needs_solution(completions, solution, **kwargs):
    return [1.0] * len(completions)


async def needs_solution_async(completions, solution, **kwargs):
    return [1.0] * len(completions)


class NeedsSolution:
    __name__ = "needs_solution_object"

    def __call__(self, completions, solution, **kwargs):
        return [1.0] * len(completions)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_are_refused_before_a_model_is_loaded(make_trainer, streaming):
    def refuse(match, rows, **kwargs):
        dataset = Dataset.from_list(rows * 2)
        if streaming:
            dataset = IterableDataset.from_generator(lambda: iter(rows))
        with pytest.raises(ValueError, match=match):
            make_trainer(model="no/such-model", train_dataset=dataset, **kwargs)

    refuse("no column 'prompt'.*question", [{"question": "1="}])
    for func in (needs_solution, needs_solution_async, NeedsSolution()):
        refuse(
            "needs a column 'solution'.*Did you mean 'solutions'",
            [{"prompt": "1=", "solutions": "1"}],
            reward_funcs=func,
        )
    refuse("'needs_solution'", [{"prompt": "1="}], reward_funcs=[parity_reward, needs_solution])


def test_other_bad_input(make_trainer, random_prm, tokenizer):
    with pytest.raises(TypeError, match="PRIMEConfig"):
        PRIMETrainer(build_model(), parity_reward, GRPOConfig("unused", use_cpu=True, bf16=False))
    with pytest.raises(TypeError, match="reward_combination"):
        make_trainer(reward_combination="not.loaded")
    with pytest.raises(ValueError, match="prm_peft_config"):
        make_trainer(prm_model=random_prm(), prm_peft_config=lora())
    with pytest.raises(ValueError, match="PeftModel already"):
        make_trainer(prm_model=get_peft_model(build_model(), lora()), prm_peft_config=lora())


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


@pytest.mark.parametrize("norm", NORMALIZATIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_and_norm(train, random_prm, estimator, norm):
    trainer = train(
        prm_model=random_prm(),
        reward_funcs=row_rewards(MIXED),
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prm_replay_batches": 2, "prm_lr_scheduler_type": "linear", "prm_trust_weighting": True},
        {"peft_config": lora(), "prm_peft_config": lora(), "prm_replay_batches": 1},
        {"prm_peft_config": lora()},
        {"oversample_factor": 2, "reward_funcs": row_rewards(MIXED + FAILS + PASSES), **BAND},
        {"prm_reference": "policy", "prm_update": "before"},
        {"prm_update": "none"},
    ],
    ids=["full", "replay", "two adapters", "lora prm", "oversampled", "policy reference", "none"],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(train, tmp_path, settings):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **settings}
    whole = train(output_dir=str(tmp_path / "whole"), **settings)
    resumed = train(str(tmp_path / "whole" / "checkpoint-2"), output_dir=str(tmp_path / "resumed"), **settings)
    assert len(whole.outputs) == 4 and len(resumed.outputs) == 2
    for first, second in zip(whole.outputs[2:], resumed.outputs, strict=True):
        assert torch.equal(first["completion_ids"], second["completion_ids"])
        assert torch.equal(first["advantages"], second["advantages"])
    assert same(weights(whole.model), weights(resumed.model))
    assert same(weights(whole.implicit_prm.model), weights(resumed.implicit_prm.model))
    if whole.implicit_prm.reference is not None:
        assert same(weights(whole.implicit_prm.reference), weights(resumed.implicit_prm.reference))
    assert not same(weights(whole.model), weights(build_model()))


def test_a_policy_that_is_saved_where_it_came_from_does_not_change_the_reference(train, tokenizer, tmp_path):
    """The folder that the reference was loaded from now holds the trained policy."""
    build_model(7, scale=4.0).save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    trainer = train(model=str(tmp_path / "run"), max_steps=1)
    trainer.save_model()
    assert same(weights(ImplicitPRM.from_pretrained(tmp_path / "run").reference), weights(build_model(7, scale=4.0)))


def test_resuming_from_a_checkpoint_without_prm_state_is_refused(train, tmp_path):
    train(max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "prm_state_0.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"prm_state_0\.pt"):
        train(str(checkpoint))


@pytest.mark.parametrize(
    ("policy_peft", "prm_peft"), [(None, None), (lora(), lora()), (lora(), None)], ids=["full", "lora", "lora policy"]
)
def test_saved_policy_and_prm_load_again(train, tmp_path, policy_peft, prm_peft):
    trainer = train(peft_config=policy_peft, prm_peft_config=prm_peft, max_steps=1)
    trainer.save_model()
    folder = tmp_path / "run"
    policy = PeftModel.from_pretrained(build_model(), folder) if policy_peft else None
    policy = policy or AutoModelForCausalLM.from_pretrained(folder)
    saved = {name: value for name, value in weights(trainer.model).items() if "lora_" in name or not policy_peft}
    assert same({name: value for name, value in weights(policy).items() if name in saved}, saved)
    prm = ImplicitPRM.from_pretrained(folder)
    batch = [trainer.outputs[-1][key] for key in INPUTS]
    with torch.no_grad():
        assert torch.equal(prm.log_probs(*batch), trainer.implicit_prm.log_probs(*batch))
        assert torch.equal(prm.reference_log_probs(*batch), trainer.implicit_prm.reference_log_probs(*batch))
    assert prm.beta == 0.5 and prm.score(["1+1="], ["2"])[0].token_rewards.shape == (2,)


def test_the_best_model_brings_its_prm(train, tmp_path):
    trainer = train(
        eval_dataset=Dataset.from_list([{"prompt": "1="}]),
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_prm/process_reward",
    )
    best = trainer.state.best_model_checkpoint
    assert same(weights(trainer.implicit_prm.model), weights(AutoModelForCausalLM.from_pretrained(f"{best}/prm")))
    assert same(weights(trainer.model), weights(AutoModelForCausalLM.from_pretrained(best)))
