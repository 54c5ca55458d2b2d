"""Functions that a user passes to the trainer: errors name them, and results that could harm a run are refused."""

import fractions
import math
import traceback

import numpy
import pytest
import torch
from conftest import build_model, build_tokenizer, logged, parity_reward, row_rewards, same, weights
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from helpers import MIXED, lora, rollouts_of
from peft import get_peft_model
from trl import GRPOConfig

from trl_prime import PRIMETrainer
from trl_prime.checks import checked_combination

NAN = float("nan")


# --- Reward functions ---


def broken(completions, **kwargs):
    return [1 / 0]


async def broken_async(completions, **kwargs):
    return [1 / 0]


class BrokenObject:
    def __call__(self, completions, **kwargs):
        return [1 / 0]

    __name__ = "broken_object"


@pytest.mark.parametrize("func", [broken, broken_async, BrokenObject()], ids=lambda func: func.__name__)
def test_what_a_reward_function_raises_reaches_the_user_with_its_name(train, caplog, func):
    with pytest.raises(ZeroDivisionError) as info:
        train(reward_funcs=[row_rewards(MIXED), func])
    text = "".join(traceback.format_exception(info.value)) + caplog.text
    assert f"in the reward function '{func.__name__}'" in text and "1 / 0" in text


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0] * 7, ValueError, "returned 7 rewards for 8 completions"),
        ([1.0] * 9, ValueError, "returned 9 rewards for 8 completions"),
        ([], ValueError, "returned 0 rewards for 8 completions"),
        (torch.ones(4), ValueError, "returned 4 rewards for 8 completions"),
        (None, TypeError, "returned None; return a list with one number per completion"),
        (1.0, TypeError, "returned 1.0; return a list"),
        ("11110000", TypeError, "returned '11110000'; return a list"),
        (dict.fromkeys(range(8), 1.0), TypeError, "returned {.*; return a list"),
        ([1.0, "good"] * 4, TypeError, "returned 'good' for completion 1; return a number, or None"),
        (["1.0"] * 8, TypeError, "returned '1.0' for completion 0"),
        ([[1.0, 0.0]] * 8, TypeError, r"returned \[1.0, 0.0\] for completion 0"),
        (torch.ones(8, 2), TypeError, r"returned tensor\(\[1., 1.\]\) for completion 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_what_is_no_list_of_rewards_is_refused_with_the_functions_name(
    make_trainer, is_async, returned, error, message
):
    def style(completions, **kwargs):
        return returned

    async def style_async(completions, **kwargs):
        return returned

    trainer = make_trainer(reward_funcs=style_async if is_async else style)
    with pytest.raises(error, match=f"The reward function 'style(_async)?' {message}"):
        trainer.train()
    assert same(weights(trainer.model), weights(build_model()))


def test_a_reward_function_of_the_trainer_can_be_called_by_hand(make_trainer):
    def by_completion(prompts, completions, **kwargs):
        return [float(len(completion)) for completion in completions][: kwargs.get("keep")]

    def by_ids(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    first, second = make_trainer(reward_funcs=[by_completion, by_ids]).reward_funcs
    assert first(["p", "p"], ["a", "bcd"]) == first(["p", "p"], completions=["a", "bcd"]) == [1.0, 3.0]
    assert second(completion_ids=[[1, 2]]) == second([[1, 2]]) == [2.0]
    with pytest.raises(ValueError, match="returned 1 rewards for 2 completions"):
        first(["p", "p"], ["a", "bcd"], keep=1)


@pytest.mark.parametrize(
    "form",
    [
        lambda values: [bool(value) for value in values],
        lambda values: [int(value) for value in values],
        lambda values: torch.tensor(values),
        lambda values: torch.tensor(values)[:, None],
        lambda values: list(torch.tensor(values, requires_grad=True)),
        lambda values: numpy.array(values),
        lambda values: tuple(numpy.float16(value) for value in values),
        lambda values: [fractions.Fraction(value) for value in values],
        lambda values: (value for value in values),
    ],
    ids=["bool", "int", "tensor", "column", "tensors", "array", "float16", "fraction", "generator"],
)
def test_rewards_may_be_numbers_of_any_kind(train, form):
    def reward(completions, **kwargs):
        return form(MIXED)

    runs = [train(reward_funcs=func, max_steps=1) for func in (row_rewards(MIXED), reward)]
    assert torch.equal(*(run.outputs[0]["advantages"] for run in runs)) and runs[0].outputs[0]["advantages"].any()
    assert same(*(weights(run.model) for run in runs))


def test_nan_means_not_judged_as_none_does(train):
    runs = [
        train(reward_funcs=row_rewards([unjudged, *MIXED[1:]]), accuracy_low=0.1, accuracy_high=0.9)
        for unjudged in (None, NAN)
    ]
    for run in runs:
        assert not run.outputs[0]["advantages"][0].any() and run.outputs[0]["advantages"][1].any()
        assert logged(run, "filter/judged") == [7 / 8] * 2
    assert same(*(weights(run.model) for run in runs))
    assert same(*(weights(run.implicit_prm.model) for run in runs))


# --- Rollout functions ---


def test_a_completion_without_tokens_is_refused_with_its_row(make_trainer):
    completion_ids = [[5, 1], [6, 1], [], [7, 8, 1], [], [5, 1], [6, 1], [7, 1]]
    trainer = make_trainer(rollout_func=rollouts_of(completion_ids))
    with pytest.raises(
        ValueError, match=r"'rollout' returned no tokens for completion 2 \(2 of 8 are empty\).*eos token"
    ):
        trainer.train()


# --- The combination of rewards ---


def test_checked_combination_passes_good_advantages_on_as_float32_and_zero_where_masked(rollout_rewards):
    weight = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)

    def hook(rewards):
        return (2 * weight).masked_fill(~rewards.completion_mask, NAN)

    advantages = checked_combination(hook, rollout_rewards)
    assert advantages.dtype == torch.float32 and not advantages.requires_grad
    assert torch.equal(advantages, 2.0 * rollout_rewards.completion_mask)
    assert torch.equal(
        checked_combination(lambda rewards: rewards.combine(), rollout_rewards), rollout_rewards.combine()
    )


def my_hook(rewards):
    return my_hook.result


class HookWithState:
    def __init__(self, result):
        self.result = result

    def __call__(self, rewards):
        return self.result


@pytest.mark.parametrize(
    "result, error, message",
    [
        (None, TypeError, r"returned NoneType.*\(B, T\)"),
        ([[0.0] * 4] * 4, TypeError, "returned list"),
        (torch.zeros(4), ValueError, r"shape \(4,\).*\(4, 4\)"),
        (torch.zeros(4, 5), ValueError, r"shape \(4, 5\).*\(4, 4\)"),
        (torch.zeros(4, 1), ValueError, r"shape \(4, 1\)"),
        (
            torch.tensor([[0.0] * 4, [0.0, NAN, 0, 0], [0.0] * 4, [0.0] * 4]),
            ValueError,
            "nan for completion 1, token 1",
        ),
        (torch.tensor([[0.0] * 4] * 2 + [[0, 0, math.inf, 0]] * 2), ValueError, "inf for completion 2, token 2"),
    ],
)
def test_checked_combination_refuses_bad_results_and_names_the_function(rollout_rewards, result, error, message):
    my_hook.result = result
    with pytest.raises(error, match=r"'my_hook'.*" + message):
        checked_combination(my_hook, rollout_rewards)
    with pytest.raises(error, match=r"'HookWithState'.*" + message):
        checked_combination(HookWithState(result), rollout_rewards)


# --- Rewards and labels ---


def test_unknown_label_gets_the_nearest_match(make_trainer):
    with pytest.raises(ValueError, match=r"prm_label is 'corect'.*Did you mean 'correct'"):
        make_trainer(reward_funcs=row_rewards(MIXED, "correct"), prm_label="corect")


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


def test_further_rounds_of_generation_need_a_data_set_that_can_be_drawn_from(make_trainer):
    rows = Dataset.from_list([{"prompt": f"{i}="} for i in range(8)]).to_iterable_dataset()
    settings = {"filter_max_rounds": 3, "accuracy_low": 0.2, "accuracy_high": 0.8}
    with pytest.raises(
        ValueError, match="filter_max_rounds is 3, but the training data set is streamed.*streaming=False"
    ):
        make_trainer(model="a/model-that-is-not-there", train_dataset=rows, **settings)


def test_a_stream_that_ends_before_the_first_generation_batch_is_an_error(make_trainer):
    rows = Dataset.from_list([{"prompt": f"{i}="} for i in range(3)]).to_iterable_dataset()
    trainer = make_trainer(train_dataset=rows, gradient_accumulation_steps=2, max_steps=1)
    with pytest.raises(RuntimeError, match="ended before a generation batch of 4 prompts was full"):
        trainer.train()
    assert same(weights(trainer.model), weights(build_model()))


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


def test_a_reward_function_without_kwargs_is_refused_before_a_model_is_loaded(make_trainer):
    rows = Dataset.from_list([{"prompt": "1="}] * 2)
    with pytest.raises(ValueError, match=r"'<lambda>' takes no 'completion_ids'.*Add \*\*kwargs"):
        make_trainer(model="no/such-model", train_dataset=rows, reward_funcs=lambda prompts, completions: [1.0])


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_are_refused_before_a_model_is_loaded(make_trainer, streaming):
    def refuse(match, rows, **kwargs):
        dataset = Dataset.from_list(rows * 2)
        if streaming:
            dataset = IterableDataset.from_generator(lambda: iter(rows))
        with pytest.raises(ValueError, match=match):
            make_trainer(model="no/such-model", train_dataset=dataset, **kwargs)

    refuse("no column 'prompt'.*question.*load_prime_dataset", [{"question": "1="}])
    refuse(r"'gsm8k': load it by `trl_prime.load_prime_dataset\(name, 'gsm8k'\)`", [{"question": "1=", "answer": "1"}])
    for func in (needs_solution, needs_solution_async, NeedsSolution()):
        refuse(
            "needs a column 'solution'.*Did you mean 'solutions'",
            [{"prompt": "1=", "solutions": "1"}],
            reward_funcs=func,
        )
    refuse("'needs_solution'", [{"prompt": "1="}], reward_funcs=[parity_reward, needs_solution])


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_for_a_tokenizer_without_chat_template_are_refused(make_trainer, tokenizer, streaming, monkeypatch):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "1="}]}] * 4)
    rows = rows.to_iterable_dataset() if streaming else rows
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template, but the prompts are messages.*plain_prompts: true"):
        make_trainer(model="no/such-model", processing_class=tokenizer, train_dataset=rows)
    make_trainer(chat_template_kwargs={"chat_template": "{{ messages[0].content }}"}, train_dataset=rows)
    make_trainer(train_dataset=Dataset.from_list([{"prompt": "1="}] * 4))


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict, dict])
def test_all_splits_at_once_are_refused(make_trainer, kind):
    splits = {name: Dataset.from_list([{"prompt": "1="}] * 4) for name in ("validation", "train")}
    if kind is IterableDatasetDict:
        splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
    with pytest.raises(
        ValueError, match=rf"is a {kind.__name__} with the splits validation, train: pass one.*'validation'"
    ):
        make_trainer(model="no/such-model", train_dataset=kind(splits))


def test_arguments_of_a_model_that_is_not_loaded_are_refused(make_trainer, model_path, random_prm):
    kwargs = {"prm_model_init_kwargs": {"dtype": "float32"}}
    for prm_model in (None, build_model(), random_prm()):
        with pytest.raises(ValueError, match="prm_model_init_kwargs is .*float32.*or use model_init_kwargs"):
            make_trainer(model="no/such-model", prm_model=prm_model, **kwargs)
    make_trainer(prm_model=model_path, **kwargs)


def test_other_bad_input(make_trainer, random_prm, tokenizer):
    with pytest.raises(TypeError, match="PRIMEConfig"):
        PRIMETrainer(build_model(), parity_reward, GRPOConfig("unused", use_cpu=True, bf16=False))
    with pytest.raises(TypeError, match="reward_combination"):
        make_trainer(reward_combination="not.loaded")
    with pytest.raises(ValueError, match="PeftModel already: leave prm_peft_config out"):
        adapted = get_peft_model(build_model(), lora())
        make_trainer(model="no/such-model", prm_model=adapted, prm_peft_config=lora(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="prm_peft_config"):
        make_trainer(prm_model=random_prm(), prm_peft_config=lora())
    with pytest.raises(ValueError, match="PeftModel already"):
        make_trainer(prm_model=get_peft_model(build_model(), lora()), prm_peft_config=lora())
