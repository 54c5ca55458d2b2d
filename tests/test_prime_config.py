"""Every knob: the paper's value by default, documented, parsed from the command line, refused when it cannot work."""

import dataclasses
import importlib.util
import inspect
import re
import types

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from trl import GRPOConfig, TrlParser

from trl_prime import PRIMEConfig
from trl_prime.implicit_prm.optimizer import make_schedule
from trl_prime.prime_config import trl_choices

OWN_FIELDS = [
    field for field in dataclasses.fields(PRIMEConfig) if field.name in PRIMEConfig.__dict__.get("__annotations__", {})
]


def config(**settings):
    return PRIMEConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **settings})


def test_defaults_are_those_of_the_paper():
    expected = {
        "learning_rate": 5e-7,
        "lr_scheduler_type": "constant",
        "num_generations": 4,
        "max_completion_length": 3072,
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "dapo",
        "scale_rewards": "none",
        "num_iterations": 1,
        "prm_learning_rate": 1e-5,  # ours: 1e-6 in the paper
        "prm_max_grad_norm": 10.0,
        "prm_beta": 0.05,
        "prm_loss_type": "ce",
        "prm_update": "after",
        "prm_reference": "frozen",
        "prm_lr_scheduler_type": "constant",
        "prm_warmup_steps": 0,
        "prm_weight_decay": 0.0,
        "prm_num_epochs": 1,
        "prm_replay_batches": 0,
        "prm_replay_steps": None,
        "prm_guess_rate": 0.0,
        "prm_reference_weight": 0.0,
        "prm_reference_centred": True,
        "prm_label": "reward",
        "process_reward_granularity": "token",
        "process_reward_step_delimiter": "\n",
        "process_reward_norm": "batch_norm",
        "advantage_estimator": "rloo",
        "outcome_weight": 1.0,
        "process_weight": 1.0,
        "outcome_gamma": 1.0,
        "process_gamma": 1.0,
        "whiten_advantages": True,
        "accuracy_low": 0.2,
        "accuracy_high": 0.8,
        "filter_truncated": False,
        "oversample_factor": 1.0,
        "filter_max_rounds": 1,
        "prm_trust_weighting": True,
    }
    args = config().for_models(policy_is_adapter=False, prm_is_adapter=False, trained_beta=None)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    "policy_is_adapter, prm_is_adapter, rates", [(True, False, (1e-5, 1e-5)), (False, True, (5e-7, 1e-4))]
)
def test_rates_follow_what_is_trained(caplog, policy_is_adapter, prm_is_adapter, rates):
    args = config()
    with caplog.at_level("WARNING", logger="trl_prime"):
        found = args.for_models(policy_is_adapter, prm_is_adapter, None)
    assert (found.learning_rate, found.prm_learning_rate) == rates
    (message,) = [record.getMessage() for record in caplog.records]
    name = "learning_rate" if policy_is_adapter else "prm_learning_rate"
    assert message == f"{name} is not set: {max(rates):.3g} is used, which suits an adapter."
    assert args.learning_rate is args.prm_learning_rate is args.prm_beta is None
    given = config(learning_rate=3e-4, prm_learning_rate=0.0, prm_beta=0.7)
    found = given.for_models(True, True, 0.3)
    assert (found.learning_rate, found.prm_learning_rate, found.prm_beta) == (3e-4, 0.0, 0.7)


@pytest.mark.parametrize(
    "tokens, beta", [(None, 0.05), (3072, 0.05), (1000, 0.05), (500, 0.1), (200, 0.25), (100, 0.5), (8, 0.5)]
)
def test_the_reward_scale_follows_the_length(caplog, tokens, beta):
    with caplog.at_level("WARNING", logger="trl_prime"):
        assert config(max_completion_length=tokens).for_models(False, False, None).prm_beta == pytest.approx(beta)
    said = [f"prm_beta is not set: {beta} is used, for completions of at most {tokens} tokens."]
    assert [record.getMessage() for record in caplog.records] == (said if beta > 0.05 else [])
    assert config(max_completion_length=tokens).for_models(False, False, 0.3).prm_beta == 0.3


def test_the_policy_loss_of_the_paper_is_trls_default():
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    said = "TRL's defaults have moved: declare the paper's in PRIMEConfig"
    assert (defaults["loss_type"], defaults["beta"]) == ("dapo", 0.0), said


def test_micro_batch_defaults_to_that_of_the_policy():
    assert config(per_device_train_batch_size=4).prm_micro_batch_size == 4
    assert config(per_device_train_batch_size=4, prm_micro_batch_size=3).prm_micro_batch_size == 3


@pytest.mark.parametrize("field", OWN_FIELDS, ids=lambda field: field.name)
def test_every_field_is_typed_and_documented(field):
    assert field.type not in (None, "")
    assert len(field.metadata.get("help", "")) > 10
    if field.name.startswith(("prm_", "process_", "outcome_")) or not hasattr(GRPOConfig, field.name):
        assert re.search(rf"^ +{field.name} \(`", PRIMEConfig.__doc__, re.MULTILINE), "no docstring entry"
    else:
        assert f"`{field.name}`" in PRIMEConfig.__doc__, "a changed default is not mentioned"


@pytest.mark.parametrize("field", OWN_FIELDS, ids=lambda field: field.name)
def test_documented_default_is_the_default(field):
    entry = re.search(rf"^ +{field.name} \((.*?)\):\n", PRIMEConfig.__doc__, re.MULTILINE | re.DOTALL)
    if entry and "defaults to" in entry.group(1):
        text = re.search(r"defaults to `(.*)`", entry.group(1)).group(1)
        assert eval(text, {}) == field.default


def test_docstring_and_fields_are_in_the_same_order():
    documented = re.findall(r"^ +(\w+) \(`", PRIMEConfig.__doc__, re.MULTILINE)
    assert documented == [field.name for field in OWN_FIELDS if not hasattr(GRPOConfig, field.name)]
    groups = r"> Parameters that control (.*)"
    in_the_code = re.findall(r"^    # Parameters that control (.*)$", inspect.getsource(PRIMEConfig), re.MULTILINE)
    assert re.findall(groups, PRIMEConfig.__doc__) == in_the_code and in_the_code[0] == "the core of PRIME"


def test_fields_do_not_clash_with_the_parser():
    names = {field.name for field in dataclasses.fields(PRIMEConfig)}
    assert "config" not in names
    assert len(OWN_FIELDS) > 30


def test_parser_reads_every_kind_of_field_and_prints_help():
    parser = TrlParser((PRIMEConfig,))
    flags = {
        "output_dir": "unused",
        "use_cpu": "true",
        "bf16": "false",
        "prm_beta": "0.5",
        "prm_update": "before",
        "prm_num_epochs": "3",
        "prm_micro_batch_size": "2",
        "prm_trust_weighting": "false",
        "whiten_advantages": "false",
        "prm_model_init_kwargs": '{"dtype": "float32"}',
        "accuracy_low": "0.1",
        "lr_scheduler_type": "cosine",
    }
    (args,) = parser.parse_args_and_config([part for name, value in flags.items() for part in (f"--{name}", value)])
    assert (args.prm_beta, args.prm_update, args.prm_num_epochs, args.prm_micro_batch_size) == (0.5, "before", 3, 2)
    assert args.prm_trust_weighting is False and args.whiten_advantages is False
    assert args.prm_model_init_kwargs == {"dtype": "float32"}
    assert args.accuracy_low == 0.1 and args.lr_scheduler_type == "cosine"
    text = parser.format_help()
    assert all(f"--{field.name}" in text for field in OWN_FIELDS)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"num_generations": 1}, ["num_generations", "1", "2 or more"]),
        ({"num_generations": None}, ["num_generations", "None"]),
        ({"fp16": True}, ["fp16", "bf16"]),
        ({"temperature": 0.0}, ("temperature is 0.0", "positive")),
        ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size", "0", "at least 1"]),
        ({"learning_rate": -1e-5}, ["learning_rate", "-1e-05", "positive"]),
        ({"prm_beta": 0.0}, ["prm_beta", "0.0", "positive"]),
        ({"prm_beta": -1.0}, ["prm_beta", "-1.0", "positive"]),
        ({"prm_beta": float("nan")}, ["prm_beta", "nan"]),
        ({"prm_beta": float("inf")}, ["prm_beta", "inf"]),
        ({"accuracy_low": 0.8, "accuracy_high": 0.2}, ["accuracy_low", "0.8", "accuracy_high", "0.2"]),
        ({"accuracy_low": 0.5, "accuracy_high": 0.5}, ["accuracy_low", "0.5"]),
        ({"accuracy_low": -0.1}, ["accuracy_low", "-0.1"]),
        ({"accuracy_high": 1.5}, ["accuracy_high", "1.5"]),
        ({"oversample_factor": 0.5}, ["oversample_factor", "0.5", "at least 1"]),
        ({"oversample_factor": 1.25}, ["oversample_factor", "1.25", "num_generations=4"]),
        ({"oversample_factor": 1.3}, ["oversample_factor", "1.3"]),
        ({"oversample_factor": 2, "accuracy_low": 0, "accuracy_high": 1}, ["oversample_factor", "filter is off"]),
        ({"oversample_factor": float("nan")}, ["oversample_factor", "nan"]),
        ({"filter_max_rounds": 0}, ["filter_max_rounds", "0", "at least 1"]),
        ({"filter_max_rounds": 1.5}, ["filter_max_rounds", "1.5", "whole number"]),
        ({"filter_max_rounds": 2, "accuracy_low": 0, "accuracy_high": 1}, ["filter_max_rounds is 2", "filter is off"]),
        ({"prm_learning_rate": -1e-6}, ["prm_learning_rate", "-1e-06"]),
        ({"prm_max_grad_norm": -1.0}, ["prm_max_grad_norm", "-1.0"]),
        ({"prm_weight_decay": float("nan")}, ["prm_weight_decay", "nan"]),
        ({"outcome_weight": -1.0}, ["outcome_weight", "-1.0"]),
        ({"process_weight": float("inf")}, ["process_weight", "inf"]),
        ({"outcome_gamma": 1.1}, ["outcome_gamma", "1.1"]),
        ({"process_gamma": -0.1}, ["process_gamma", "-0.1"]),
        ({"prm_num_epochs": 0}, ["prm_num_epochs", "0"]),
        ({"prm_replay_batches": -1}, ["prm_replay_batches", "-1"]),
        ({"prm_replay_steps": 0, "prm_replay_batches": 2}, ["prm_replay_steps", "0"]),
        ({"prm_replay_steps": 3, "prm_replay_batches": 2}, ["prm_replay_steps is 3", "prm_replay_batches=2"]),
        ({"prm_guess_rate": 0.25}, ["prm_guess_rate=0.25", "prm_loss_type='ce'", "'calibrated_ce'"]),
        ({"prm_guess_rate": 0.25, "prm_loss_type": "dpo"}, ["prm_guess_rate=0.25", "'dpo'", "'calibrated_ce'"]),
        ({"prm_guess_rate": 1.0}, ["prm_guess_rate is 1.0", "four options"]),
        ({"prm_guess_rate": -0.1}, ["prm_guess_rate is -0.1"]),
        ({"prm_guess_rate": float("nan")}, ["prm_guess_rate is nan"]),
        ({"prm_reference_weight": "fit"}, ["prm_reference_weight is 'fit'", "'fitted'"]),
        ({"prm_reference_weight": -0.1}, ["prm_reference_weight is -0.1", "'fitted'"]),
        (
            {"prm_reference_weight": "fitted"},
            ["prm_reference_weight='fitted'", "prm_loss_type='ce'", "'calibrated_ce'"],
        ),
        ({"prm_warmup_steps": -1}, ["prm_warmup_steps", "-1"]),
        ({"prm_micro_batch_size": 0}, ["prm_micro_batch_size", "0"]),
        ({"process_reward_step_delimiter": ""}, ["process_reward_step_delimiter", "empty"]),
        ({"outcome_weight": 0.0, "process_weight": 0.0}, ["outcome_weight", "process_weight"]),
        ({"scale_rewards": "group"}, ["scale_rewards is 'group'", "advantage_estimator='grpo'"]),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            ["multi_objective_aggregation is 'normalize_then_sum'", "reward_weights"],
        ),
        ({"reward_weights": [0.0, 0.0]}, ["reward_weights are all 0", "outcome_weight=0"]),
        ({"importance_sampling_level": "sequence"}, ["importance_sampling_level='sequence'", "process_weight is 1.0"]),
        (
            {"importance_sampling_level": "sequence", "process_weight": 0.0, "outcome_gamma": 0.9},
            ["importance_sampling_level='sequence'", "0.9"],
        ),
        (
            {"advantage_estimator": "value", "process_reward_granularity": "whole"},
            ["advantage_estimator", "'value'", "process_reward_granularity", "'whole'"],
        ),
        ({"process_reward_norm": "softmax"}, ["process_reward_norm='softmax'", "granularity is 'token'", "'turn'"]),
        (
            {"process_reward_norm": "softmax", "process_reward_granularity": "whole"},
            ["process_reward_norm='softmax'", "granularity is 'whole'", "'turn'"],
        ),
        (
            {
                "process_reward_norm": "softmax",
                "process_reward_granularity": "turn",
                "advantage_estimator": "value",
            },
            ["process_reward_norm='softmax'", "advantage_estimator='value'", "'rloo'"],
        ),
        (
            {"process_reward_norm": "group_std", "advantage_estimator": "grpo"},
            ["process_reward_norm='group_std'", "advantage_estimator='grpo'", "'rloo'"],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_with_option_and_value(settings, parts):
    with pytest.raises(ValueError) as error:
        config(**settings)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("option", "typo", "meant"),
    [
        ("prm_reference", "frozn", "frozen"),
        ("prm_update", "affter", "after"),
        ("prm_loss_type", "bon_ac", "bon_acc"),
        ("prm_optim", "adamw_torhc", "adamw_torch"),
        ("prm_lr_scheduler_type", "cosin", "cosine"),
        ("process_reward_granularity", "tokens", "token"),
        ("process_reward_norm", "batchnorm", "batch_norm"),
        ("advantage_estimator", "rlo", "rloo"),
        ("loss_type", "dapoo", "dapo"),
        ("importance_sampling_level", "tokens", "token"),
        ("vllm_importance_sampling_mode", "token_masks", "token_mask"),
    ],
)
def test_unknown_names_get_the_nearest_match(option, typo, meant):
    with pytest.raises(ValueError, match=rf"{option} is '{typo}'.*Did you mean '{meant}'"):
        config(**{option: typo})


def test_a_policy_loss_that_a_newer_trl_adds_is_accepted(monkeypatch, tmp_path):
    path = tmp_path / "grpo_trainer.py"
    path.write_text(
        'class GRPOTrainer:\n    def loss(self):\n        return self.loss_type in ["dapo", "next_loss"]\n'
    )
    find_spec, newer = importlib.util.find_spec, types.SimpleNamespace(origin=str(path))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: newer if name.startswith("trl.") else find_spec(name, *args)
    )
    trl_choices.cache_clear()
    try:
        assert config(loss_type="next_loss").loss_type == "next_loss"
        with pytest.raises(ValueError, match="loss_type is 'last_loss'"):
            config(loss_type="last_loss")
    finally:
        trl_choices.cache_clear()


@pytest.mark.parametrize("band", [(0.0, 1.0), (0.0, 0.8), (0.2, 1.0)])
def test_edges_of_the_band_are_accepted(band):
    args = config(accuracy_low=band[0], accuracy_high=band[1])
    assert (args.accuracy_low, args.accuracy_high) == band


@pytest.mark.parametrize("factor", [1, 1.5, 2.0, 3])
def test_factors_that_make_whole_groups_are_accepted(factor):
    assert config(oversample_factor=factor).oversample_factor == factor


SCHEDULE_ARGUMENTS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize("schedule", [schedule.value for schedule in SchedulerType])
def test_every_schedule_of_the_prm_is_made_or_refused_by_the_configuration(schedule):
    name, arguments = "prm_lr_scheduler_type", SCHEDULE_ARGUMENTS.get(schedule)
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(ValueError, match=f"{name} is '{schedule}', which follows a metric"):
            config(**{name: schedule})
        return
    if arguments:
        with pytest.raises(ValueError, match=f"{name} is '{schedule}'.*prm_lr_scheduler_kwargs"):
            config(**{name: schedule})
    args = config(**{name: schedule, "prm_lr_scheduler_kwargs": arguments, "prm_warmup_steps": 2})
    parameter = torch.nn.Parameter(torch.zeros(1))
    made = make_schedule(torch.optim.SGD([parameter], lr=1.0), args, 8)
    expected = get_scheduler(schedule, torch.optim.SGD([parameter], lr=1.0), 2, 8, arguments)
    for _ in range(8):
        assert made.get_last_lr() == expected.get_last_lr()
        made.optimizer.step(), expected.optimizer.step(), made.step(), expected.step()


def test_arguments_of_the_schedule_that_it_does_not_know_or_take_are_refused():
    assert config(
        prm_lr_scheduler_type="polynomial", prm_lr_scheduler_kwargs='{"power": 2.0}'
    ).prm_lr_scheduler_kwargs == {"power": 2.0}
    with pytest.raises(ValueError, match=r"prm_lr_scheduler_kwargs=\{'powr': 2\}.*powr"):
        config(prm_lr_scheduler_type="polynomial", prm_lr_scheduler_kwargs={"powr": 2})
    with pytest.raises(ValueError, match="'constant' takes no arguments"):
        config(prm_lr_scheduler_kwargs={"power": 2})
