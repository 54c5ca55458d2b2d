"""The implicit PRM trained offline: data, tokens, losses, checkpoints, the command, and the way online."""

import itertools
import json
import random
import statistics
from pathlib import Path

import pytest
import torch
from conftest import build_model, logged, same, weights
from datasets import Dataset
from helpers import assert_close, make_trained, scaled
from huggingface_hub import ModelCard
from peft import LoraConfig
from slow_reference import slow_dpo_pair_losses, slow_kto, slow_ragged_pairwise, softplus
from transformers import RwkvConfig

from trl_prime import ImplicitPRM, OfflinePRMConfig, OfflinePRMTrainer
from trl_prime.cli import main
from trl_prime.data.splits import split_by_prompt
from trl_prime.implicit_prm.losses import OFFLINE_LOSS_TYPES
from trl_prime.offline_prm.data import (
    adapt_outcomes,
    load_outcome_dataset,
    pairs_of_labelled,
    to_labelled,
    to_pairs,
)
from trl_prime.offline_prm.examples import mismatched_rows

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("prm/*.yaml"))
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def labelled_rows(num_prompts=6, seed=0):
    """Ragged groups of completions that differ in length, some of them empty."""
    rng = random.Random(seed)
    rows = []
    for i in range(num_prompts):
        for _ in range(1 + (i + 2) % 4):
            text = "".join(rng.choice("0123456789") for _ in range(rng.randint(0, 6)))
            rows.append({"prompt": f"{i}+{i}=", "completion": text, "label": rng.random() < 0.5})
    rng.shuffle(rows)
    return rows


def pair_rows(num_rows=6, seed=0):
    rng = random.Random(seed)
    texts = ["".join(rng.choice("0123456789") for _ in range(rng.randint(1, 6))) for _ in range(2 * num_rows)]
    return [{"prompt": f"{i % 3}+{i}=", "chosen": texts[2 * i], "rejected": texts[2 * i + 1]} for i in range(num_rows)]


@pytest.fixture
def make_offline(tmp_path, tokenizer):
    """An OfflinePRMTrainer from settings and trainer arguments."""

    def make(**kwargs):
        names = ("model", "train_dataset", "eval_dataset", "peft_config", "processing_class")
        arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 100,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "beta": 0.5,
            "logging_steps": 1,
            "report_to": [],
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            **kwargs,
        }
        arguments.setdefault("model", build_model(7, scale=4.0))
        rows = arguments.pop("train_dataset", labelled_rows())
        arguments["train_dataset"] = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return OfflinePRMTrainer(args=OfflinePRMConfig(**settings), **{"processing_class": tokenizer, **arguments})

    return make


def test_a_model_that_reads_padding_is_refused(make_offline):
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64}
    model = scaled(RwkvConfig(vocab_size=44, bos_token_id=2, eos_token_id=1, pad_token_id=0, **settings))
    trainer = make_offline(model=model, train_dataset=Dataset.from_list(labelled_rows()))
    with pytest.raises(NotImplementedError, match="ignores the attention mask"):
        trainer.train()


# --- Data ---


def test_pairs_are_all_right_with_all_wrong_of_a_prompt():
    rows = [{**row, "index": i} for i, row in enumerate(labelled_rows(12))]
    expected = [
        (a["prompt"], a["completion"], b["completion"])
        for a, b in itertools.product(rows, rows)
        if a["prompt"] == b["prompt"] and a["label"] and not b["label"]
    ]
    pairs = pairs_of_labelled(Dataset.from_list(rows))
    found = list(zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True))
    assert sorted(found) == sorted(expected) and len(found) > 10


def test_pairs_are_capped_a_prompt_by_a_seeded_draw():
    rows = [{"prompt": p, "completion": str(i), "label": i < 4} for p in ("a", "b") for i in range(8)]
    rows.append({"prompt": "a", "completion": "unjudged", "label": None})
    draws = [pairs_of_labelled(Dataset.from_list(rows), 5, seed).to_list() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for pairs in draws:
        assert [pair["prompt"] for pair in pairs] == ["a"] * 5 + ["b"] * 5
        assert len({tuple(pair.values()) for pair in pairs}) == 10
        assert all(int(pair["chosen"]) < 4 <= int(pair["rejected"]) for pair in pairs)


def test_pairs_go_by_order_of_soft_labels_and_need_different_ones():
    rows = [{"prompt": "a", "completion": str(label), "label": label} for label in (0.2, 0.9, 0.5, 0.5)]
    pairs = pairs_of_labelled(Dataset.from_list(rows))
    assert {(p["chosen"], p["rejected"]) for p in pairs} == {("0.9", "0.2"), ("0.9", "0.5"), ("0.5", "0.2")}
    with pytest.raises(ValueError, match="no pairs"):
        pairs_of_labelled(Dataset.from_list(rows[2:]))


def test_preferences_with_a_prompt_inside_become_either_form():
    ask = {"role": "user", "content": "1+1"}
    chosen, rejected = ([ask, {"role": "assistant", "content": text}] for text in ("2", "3"))
    data = Dataset.from_list([{"chosen": chosen, "rejected": rejected}])
    assert to_pairs(data)[0] == {"prompt": [ask], "chosen": chosen[1:], "rejected": rejected[1:]}
    assert to_labelled(data).to_list() == [
        {"prompt": [ask], "completion": chosen[1:], "label": True},
        {"prompt": [ask], "completion": rejected[1:], "label": False},
    ]


def test_published_layouts_of_labelled_completions(tmp_path):
    rows = [
        {
            "question": "2 times 3?",
            "ground_truth": "6",
            "small": {"solution": "2*3=<<2*3=6>>6", "is_correct": True},
            "large": {"solution": "5", "is_correct": False},
        },
        {"question": "1?", "ground_truth": "1", "small": {"solution": "1", "is_correct": True}, "large": None},
    ]
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_outcome_dataset(str(path), "gsm8k_solutions", system_prompt="count")
    assert data["completion"][0] == [{"role": "assistant", "content": "2*3=6"}]
    assert data["prompt"][1] == [{"role": "system", "content": "count"}, {"role": "user", "content": "2 times 3?"}]
    assert data["label"][:] == [1.0, 0.0, 1.0]
    lists = Dataset.from_list([{"problem": "1+1", "responses": ["2", "3"], "correctness": [1, 0]}])
    assert adapt_outcomes(lists, "labelled")["label"][:] == [1.0, 0.0]
    named = Dataset.from_list([{"q": "1+1", "a": "2", "ok": None}])
    adapted = adapt_outcomes(named, "labelled(prompt='q', completion='a', label='ok')")
    assert adapted[0]["prompt"] == "1+1" and adapted[0]["completion"] == "2" and adapted[0]["label"] is None
    with pytest.raises(ValueError, match="Row 0 .*no column 'prompt' or 'question'"):
        adapt_outcomes(named, "labelled")
    with pytest.raises(ValueError, match="'labelled'"):
        adapt_outcomes(named, "labeled")
    with pytest.raises(ValueError, match="'label'"):
        adapt_outcomes(named, "labelled(lable='ok')")


def test_mismatched_rows_take_the_next_row_of_another_prompt():
    for seed in range(20):
        rng = random.Random(seed)
        groups = [rng.randint(0, 2) for _ in range(rng.randint(1, 7))]
        expected = []
        for i in range(len(groups)):
            others = [j % len(groups) for j in range(i + 1, i + len(groups)) if groups[j % len(groups)] != groups[i]]
            expected += [[i, others[0]]] if others else []
        assert mismatched_rows(torch.tensor(groups)[:, None]).tolist() == expected


def test_rows_that_are_too_long_are_dropped_and_told(make_offline, caplog, propagated):
    rows = [{"prompt": "1+1=", "completion": "2" * n, "label": True} for n in (0, 3, 4, 9)]
    rows += [{"prompt": "1" * 9, "completion": "2", "label": True}, {**rows[0], "label": None}]
    data = make_offline(train_dataset=rows, max_length=8).train_dataset
    # Prompts of four tokens leave room for four, of which one is the end
    assert [[len(ids) for ids in example["completion_ids"]] for example in data] == [[1], [4]]
    assert "Left out 3 of 6 train rows that are longer than max_length=8" in caplog.text
    assert "Left out 1 of 6 train rows that have no label" in caplog.text
    with pytest.raises(ValueError, match="None of the 6 train rows"):
        make_offline(train_dataset=rows, max_length=4)


@pytest.fixture
def propagated(monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("trl_prime"), "propagate", True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1", "completion": "2"}], "has the columns completion, prompt"),
        ([{"prompt": "1", "completion": "2", "label": 3.0}], "Row 0 has the label 3.0"),
        ([{"prompt": "1", "completion": None, "label": 1.0}], "Row 0 has no prompt or no completion"),
        (
            [{"prompt": "1", "completion": [{"role": "user", "content": "2"}], "label": 1.0}],
            "Row 0 cannot be tokenized",
        ),
    ],
)
def test_bad_rows_are_refused_before_a_model_is_loaded(make_offline, rows, message):
    with pytest.raises(ValueError, match=message):
        make_offline(train_dataset=rows, model="/no/model/there")


def test_data_is_not_streamed(make_offline):
    with pytest.raises(ValueError, match="without streaming"):
        make_offline(train_dataset=Dataset.from_list(labelled_rows()).to_iterable_dataset())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "nca"}, "loss_type is 'nca'"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"desirable_weight": 2.0}, "loss_type='ce' has no weights"),
        ({"loss_type": "kto", "undesirable_weight": -1.0}, "undesirable_weight is -1.0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, but must be at least 1"),
        ({"learning_rate": -1e-5}, "learning_rate is -1e-05, but must be zero"),
        ({"loss_type": "kto", "per_device_train_batch_size": 1}, "Set both to 2 or more"),
        ({"max_pairs_per_prompt": 3}, "makes no pairs"),
        ({"max_length": 0}, "max_length is 0"),
        ({"step_delimiter": ""}, "step_delimiter is empty"),
        ({"remove_unused_columns": True}, "remove_unused_columns is True"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        OfflinePRMConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


# --- Losses: from text to the number that is logged ---


@pytest.mark.parametrize("as_messages", [False, True])
def test_losses_and_accuracies_from_the_scores_of_the_same_text(make_offline, random_prm, as_messages):
    """The PRM sees the same tokens offline as where it scores text."""

    def form(text, role):
        return [{"role": role, "content": text}] if as_messages else text

    rows = [
        {
            "prompt": form(row["prompt"], "user"),
            "completion": form(row["completion"], "assistant"),
            "label": float(row["label"]),
        }
        for row in labelled_rows()
    ]
    pairs = [
        {
            "prompt": form(row["prompt"], "user"),
            **{name: form(row[name], "assistant") for name in ("chosen", "rejected")},
        }
        for row in pair_rows()
    ]
    prm = random_prm()

    def scores_of(*columns):
        return [scored.reward for scored in prm.score(*columns)]

    def evaluated(data, **settings):
        return make_offline(model=prm, eval_dataset=Dataset.from_list(data), **settings).evaluate()

    prompts, completions, labels = ([row[name] for row in rows] for name in ("prompt", "completion", "label"))
    scores = scores_of(prompts, completions)
    metrics = evaluated(rows)
    losses = [softplus(-s) if label else softplus(s) for s, label in zip(scores, labels, strict=True)]
    assert metrics["eval_loss"] == pytest.approx(statistics.fmean(losses), rel=1e-4)
    right = [float((s > 0) == (label > 0.5)) for s, label in zip(scores, labels, strict=True)]
    assert metrics["eval_accuracy"] == pytest.approx(statistics.fmean(right))
    keys = [str(prompt) for prompt in prompts]
    assert metrics["eval_pairwise_accuracy"] == pytest.approx(slow_ragged_pairwise(scores, labels, keys))

    following = [
        next(j % len(rows) for j in range(i + 1, i + len(rows)) if keys[j % len(rows)] != keys[i])
        for i in range(len(rows))
    ]
    mismatched = scores_of(prompts, [completions[j] for j in following])
    weights = (1.5, 0.5)
    metrics = evaluated(rows, loss_type="kto", desirable_weight=weights[0], undesirable_weight=weights[1])
    expected = statistics.fmean(slow_kto(scores, labels, mismatched, weights))
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)

    prompts, chosen, rejected = ([row[name] for row in pairs] for name in ("prompt", "chosen", "rejected"))
    better, worse = scores_of(prompts, chosen), scores_of(prompts, rejected)
    metrics = evaluated(pairs, train_dataset=pairs, loss_type="dpo")
    assert metrics["eval_loss"] == pytest.approx(statistics.fmean(slow_dpo_pair_losses(better, worse)), rel=1e-4)
    wins = statistics.fmean(float(b > w) for b, w in zip(better, worse, strict=True))
    assert metrics["eval_pairwise_accuracy"] == pytest.approx(wins)


def test_the_reference_point_of_kto_counts(make_offline, random_prm):
    """Its value is above 0 in one of the two cases of the PRM's sign, so that the test above does not test 0 only."""
    prm = random_prm()
    points = []
    for model, reference in ((prm.model, prm.reference), (prm.reference, prm.model)):
        turned = ImplicitPRM(model, reference, prm.tokenizer, beta=0.5)
        trainer = make_offline(model=turned, loss_type="kto", max_steps=1)
        trainer.train()
        points += logged(trainer, "reference_point")
    assert min(points) >= 0 and max(points) > 0


@pytest.mark.parametrize("loss_type", OFFLINE_LOSS_TYPES)
def test_training_moves_the_prm_alone_and_learns(make_offline, loss_type):
    rng = random.Random(0)
    texts = ["".join(rng.choice("0123456789") for _ in range(5)) for _ in range(160)]
    rows = [{"prompt": f"{i // 4}=", "completion": text, "label": text[0] < "5"} for i, text in enumerate(texts)]
    train, held_out = split_by_prompt(Dataset.from_list(rows), 0.25)
    trainer = make_offline(
        train_dataset=train,
        eval_dataset=held_out,
        loss_type=loss_type,
        max_steps=30,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
    )
    reference = weights(trainer.implicit_prm.reference)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_pairwise_accuracy"] == 0.5  # it equals its reference
    assert after["eval_pairwise_accuracy"] > 0.8 and after["eval_loss"] < 0.9 * before["eval_loss"]
    assert same(reference, weights(trainer.implicit_prm.reference))
    key = "pairwise_accuracy" if loss_type == "dpo" else "accuracy"
    assert len(logged(trainer, key)) == 30


def test_accumulated_micro_batches_make_the_step_of_the_whole_batch(make_offline):
    rows = [{"prompt": f"{i}=", "completion": "1" * (i % 5), "label": i % 2} for i in range(16)]
    trained = [
        make_offline(train_dataset=rows, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps)
        for steps in (1, 4)
    ]
    for trainer in trained:
        trainer.train()
    whole, parts = (weights(trainer.model) for trainer in trained)
    assert_close({"prm": whole}, {"prm": parts}, atol=2e-5)
    assert (
        max((whole[name] - parameter).abs().max() for name, parameter in build_model(7, scale=4.0).named_parameters())
        > 1e-3
    )
    first, second = (logged(trainer, "loss") for trainer in trained)
    assert first == pytest.approx(second, rel=1e-4)


def test_with_lora_the_reference_is_the_shared_base(make_offline):
    trainer = make_offline(peft_config=LORA, max_steps=3, gradient_checkpointing=True)
    prm = trainer.implicit_prm
    base = {p.data_ptr() for p in prm.model.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in prm.reference.parameters()} <= base
    before = weights(prm.reference)
    trainer.train()
    assert same(before, weights(prm.reference))
    assert max(p.abs().max() for name, p in prm.model.named_parameters() if "lora_B" in name) > 1e-3


# --- Saving, resuming, going online ---


@pytest.mark.parametrize("loss_type", OFFLINE_LOSS_TYPES)
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(make_offline, tmp_path, loss_type, peft_config):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "loss_type": loss_type}
    whole = make_offline(peft_config=peft_config, **settings)
    whole.train()
    resumed = make_offline(peft_config=peft_config, model=build_model(7, scale=4.0), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same(weights(whole.model), weights(resumed.model))
    assert logged(whole, "loss") == logged(resumed, "loss")


def test_the_best_checkpoint_is_loaded_at_the_end(make_offline, tmp_path):
    trainer = make_offline(
        peft_config=LORA,
        eval_dataset=Dataset.from_list(labelled_rows()),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        learning_rate=0.05,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=False,  # so that it is unlikely to be the last
    )
    trainer.train()
    best = ImplicitPRM.from_pretrained(trainer.state.best_model_checkpoint)
    saved = {name: p for name, p in best.model.named_parameters() if "lora" in name}
    loaded = {name: p.detach() for name, p in trainer.model.named_parameters() if "lora" in name}
    assert same(saved, loaded)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_what_is_saved_scores_alike_and_goes_on_offline_and_online(
    make_offline, make_trainer, model_path, tmp_path, peft_config
):
    trainer = make_offline(model=model_path, peft_config=peft_config, beta=0.25, processing_class=None)
    trainer.train()
    trainer.save_model()
    folder = str(tmp_path / "run")
    texts = ["1+1=", "2+"], ["2", "34"]
    expected = [scored.reward for scored in trainer.implicit_prm.score(*texts)]
    assert max(map(abs, expected)) > 1e-4
    loaded = ImplicitPRM.from_pretrained(folder)
    assert [scored.reward for scored in loaded.score(*texts)] == pytest.approx(expected, rel=1e-4)
    reference = weights(loaded.reference)

    further = make_offline(model=folder, beta=0.25, processing_class=None)
    assert [scored.reward for scored in further.implicit_prm.score(*texts)] == pytest.approx(expected, rel=1e-4)
    assert any(p.requires_grad for p in further.model.parameters())
    with pytest.raises(ValueError, match="leave peft_config out"):
        make_offline(model=folder, peft_config=LORA, processing_class=None)

    online = make_trainer(model=model_path, prm_model=folder, prm_beta=None, max_steps=1)
    assert [scored.reward for scored in online.implicit_prm.score(*texts)] == pytest.approx(expected, rel=1e-4)
    online.train()
    assert same(reference, weights(online.implicit_prm.reference))
    assert not same(weights(loaded.model), weights(online.implicit_prm.model))


@pytest.mark.parametrize("peft_config, rate", [(None, 5e-7), (LORA, 1e-4)], ids=["full", "lora"])
def test_an_unset_rate_follows_what_is_trained(make_offline, peft_config, rate):
    trainer = make_offline(learning_rate=None, peft_config=peft_config)
    trainer.create_optimizer()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rate}


def test_a_pushed_prm_is_loaded_by_its_name(make_offline, hub, tmp_path):  # noqa: F811
    trainer = make_offline(
        peft_config=LORA,
        push_to_hub=True,
        hub_model_id="me/offline-prm",
        hub_strategy="every_save",
        save_strategy="steps",
        save_steps=1,
    )
    make_trained(trainer.model)
    trainer.train()
    trainer.push_to_hub(dataset_name="me/rollouts")
    hub.clean_cache()
    pushed = ImplicitPRM.from_pretrained("me/offline-prm")
    texts = ["1+1="], ["two"]
    expected = trainer.implicit_prm.score(*texts)[0].reward
    assert pushed.score(*texts)[0].reward == pytest.approx(expected, rel=1e-4) and abs(expected) > 1e-3
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.datasets == "me/rollouts" and "implicit-prm" in card.data.tags
    assert "offline" in card.text and "2412.01981" in card.text and "`loss_type` | ce" in card.text


# --- The command ---


def prm_flags(tmp_path, **settings):
    settings = {
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": "true",
        "bf16": "false",
        "dtype": "float32",
        "report_to": "none",
        "disable_tqdm": "true",
        "gradient_checkpointing": "false",
        "save_strategy": "no",
        **settings,
    }
    return ["prm", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def test_the_command_trains_on_a_local_file(tmp_path, model_path, capsys):
    rows = [
        {"question": f"{i}+1", **{m: {"solution": f"{i}{m}", "is_correct": m == "a"} for m in ("a", "b")}}
        for i in range(10)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"model_name_or_path": model_path, "dataset_name": data, "dataset_format": "gsm8k_solutions"}
    flags = prm_flags(tmp_path, **recipe, use_peft="true", lora_target_modules="all-linear", eval_split_size=0.2)
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "ranks the better of two completions higher" in printed and "PRM:" in printed
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert 0 <= metrics["eval_pairwise_accuracy"] <= 1
    ImplicitPRM.from_pretrained(tmp_path / "run").score([[{"role": "user", "content": "1+1"}]], ["2"])


def test_the_command_says_what_is_missing(tmp_path, model_path, capsys):
    assert main(prm_flags(tmp_path, eval_split_size=1)) == 2
    assert "eval_split_size is 1. Give" in capsys.readouterr().err
    assert main(prm_flags(tmp_path)) == 2
    assert "dataset_name" in capsys.readouterr().err
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n")
    assert main(prm_flags(tmp_path, model_name_or_path=model_path, dataset_name=data)) == 2
    assert "dataset_format, one of: labelled" in capsys.readouterr().err
