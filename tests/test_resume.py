"""Runs that are stopped, killed while they save, or misled about their checkpoints."""

import json
import logging
import shutil
import signal

import peft
import pytest
import torch
from accelerate import Accelerator
from conftest import build_model, logged, row_rewards, same, weights
from datasets import Dataset
from helpers import BAND, FAILS, INPUTS, MIXED, PASSES, assert_close, launch, lora, results
from packaging.version import Version
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_prime import ImplicitPRM
from trl_prime.implicit_prm.backends import DataParallel, make_backend
from trl_prime.implicit_prm.files import saved_weights

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
KILLED_RUN = {**STEPS, "per_device_train_batch_size": 8, "sample": True, "prm_replay_batches": 1}


# The first and the last that TRL writes of a checkpoint
KILLED_IN = ("save_model", "_save_rng_state")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One that was not stopped, and those killed while they saved and resumed; what these had left, by its folder."""
    root = tmp_path_factory.mktemp("runs")
    settings = {name: {"output_dir": str(root / name), **KILLED_RUN} for name in ("whole", *KILLED_IN)}
    left = {}
    for method in KILLED_IN:
        launch(1, [{**settings[method], "killed_at": [method, 4]}], root, exit_code=-signal.SIGKILL)
        left[method] = sorted(path.name for path in (root / method).glob("checkpoint-*"))
    launch(1, [settings["whole"], *({**settings[method], "resume": True} for method in KILLED_IN)], root)
    return root, left


@pytest.mark.parametrize("method", KILLED_IN)
def test_a_run_killed_while_saving_goes_on_from_the_last_whole_checkpoint(runs, method):
    root, left = runs
    begun = [] if method == "save_model" else ["checkpoint-4"]
    assert left[method] == ["checkpoint-2", *begun]
    assert_close(results(root / method, 1)[0], results(root / "whole", 1)[0], atol=0)
    steps = [entry["step"] for entry in json.loads((root / method / "result.json").read_text()) if "prm/loss" in entry]
    assert steps == [1, 2, 3, 4]  # two of them from the checkpoint


def test_a_file_cut_short_does_not_pass_for_a_checkpoint(train, tmp_path, caplog):
    train(**STEPS)
    last = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    last.write_text(last.read_text()[:100])
    with pytest.raises(ValueError, match="resume_from_checkpoint is .*checkpoint-4"):
        train(str(last.parent), **STEPS)
    logging.getLogger("transformers").propagate = True
    trainer = train(True, **STEPS)
    assert "checkpoint-4' was not saved to its end" in caplog.text
    assert len(trainer.outputs) == 2


def test_resuming_where_there_is_nothing_to_resume_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint in output_dir"):
        train(True)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"save_steps": 2}, False),
        ({"save_steps": 1, "steps_per_generation": 2}, True),
        ({"save_steps": 2, "steps_per_generation": 2}, False),
        ({"save_steps": 2, "num_iterations": 3}, True),
        ({"save_steps": 3, "num_iterations": 3}, False),
        ({"save_steps": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, True),
        ({"save_steps": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, False),
    ],
)
def test_checkpoints_between_generations_are_warned_of(make_trainer, caplog, settings, warns):
    logging.getLogger("transformers").propagate = True
    make_trainer(save_strategy="steps", **settings)
    assert ("ends between two generations" in caplog.text) is warns


def test_within_a_generation_a_resumed_run_still_goes_on(train, tmp_path):
    settings = {**STEPS, "save_steps": 1, "steps_per_generation": 2}
    train(**settings)
    trainer = train(str(tmp_path / "run" / "checkpoint-3"), **settings)
    assert trainer.state.global_step == 4
    assert all(torch.isfinite(weight).all() for weight in weights(trainer.implicit_prm.model).values())


def test_the_limit_of_checkpoints_counts_those_with_their_prm(train, tmp_path):
    train(**{**STEPS, "save_steps": 1}, save_total_limit=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    for path in (tmp_path / "run").glob("checkpoint-*"):
        ImplicitPRM.from_pretrained(path)


def test_a_checkpoint_of_weights_alone_has_the_prm_but_is_not_resumed_from(train, tmp_path):
    trainer = train(**STEPS, save_only_model=True)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert not list(checkpoint.glob("*.pt"))
    assert same(weights(ImplicitPRM.from_pretrained(checkpoint).model), weights(trainer.implicit_prm.model))
    with pytest.raises((FileNotFoundError, ValueError), match="save_only_model|optimizer"):
        train(str(checkpoint), **{**STEPS, "max_steps": 6})


def test_a_checkpoint_can_be_moved(train, tmp_path):
    whole = train(**STEPS)
    moved = shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "elsewhere" / "checkpoint-2")
    shutil.rmtree(tmp_path / "run")
    resumed = train(str(moved), **STEPS)
    assert same(weights(whole.implicit_prm.model), weights(resumed.implicit_prm.model))
    assert logged(whole, "prm/loss") == logged(resumed, "prm/loss")


def test_another_number_of_processes_is_refused_before_anything_is_loaded(train, make_trainer, tmp_path, monkeypatch):
    train(**{**STEPS, "max_steps": 2}, prm_replay_batches=1)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    path = checkpoint / "prm_state_0.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["num_processes"] == 1
    torch.save({**saved, "num_processes": 4}, path)
    trainer = make_trainer(**STEPS)
    monkeypatch.setattr(trainer, "_load_from_checkpoint", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="4 processes saved, but this run has 1.*--num_processes 4"):
        trainer.train(str(checkpoint))
    # A process that the earlier run did not have finds no state of its own
    path.rename(checkpoint / "prm_state_3.pt")
    with pytest.raises(ValueError, match="4 processes saved, but this run has 1"):
        trainer.train(str(checkpoint))


def test_a_prm_that_did_not_learn_has_nothing_to_resume_from(train, make_trainer, tmp_path):
    train(prm_update="none", **STEPS)
    trainer = make_trainer(**STEPS)
    with pytest.raises(ValueError, match="prm_update='none' saved, but prm_update is 'after'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.state.global_step == 0
    assert train(str(tmp_path / "run" / "checkpoint-2"), prm_update="none", **STEPS).state.global_step == 4


def test_a_second_training_begins_the_schedule_of_the_prm_anew_and_keeps_its_weights(train):
    trainer = train(max_steps=3, prm_lr_scheduler_type="linear", prm_learning_rate=1e-3)
    rates, moments = logged(trainer, "prm/learning_rate"), trainer.prm_learner.updater.backend.optimizer
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert set(trainer.prm_learner.updater.scheduler.get_last_lr()) == {0.0}
    before = weights(trainer.implicit_prm.model)
    trainer.train()
    assert logged(trainer, "prm/learning_rate") == pytest.approx(rates)
    assert trainer.prm_learner.updater.backend.optimizer is moments
    assert not same(before, weights(trainer.implicit_prm.model))


@pytest.mark.parametrize("settings", [{}, {"prm_update": "none"}], ids=str)
def test_an_optimizer_that_an_earlier_run_left_in_the_folder_is_not_taken(train, tmp_path, monkeypatch, settings):
    """Where each process saves its own part, the file of an optimizer that all hold alike is not of this run."""
    monkeypatch.setattr(DataParallel, "optimizer_is_sharded", True)
    whole = train(**STEPS, **settings)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "prm_optimizer.pt").write_text("of an earlier run")
    resumed = train(str(checkpoint), **STEPS, **settings)
    assert same(weights(whole.implicit_prm.model), weights(resumed.implicit_prm.model))


def test_a_checkpoint_that_lost_its_optimizer_is_refused_by_the_name_of_the_file(train, tmp_path):
    train(**STEPS)
    (tmp_path / "run" / "checkpoint-2" / "prm_optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"prm_optimizer\.pt"):
        train(str(tmp_path / "run" / "checkpoint-2"), **STEPS)


ADAPTERS = {
    "embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "modules_to_save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "single tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj"]),
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_takes_its_own_checkpoint(kind, tokenizer, tmp_path):
    if kind == "VeRA" and Version(peft.__version__) < Version("0.19"):
        pytest.skip("PEFT 0.18 saves projections of VeRA by other names than the model has, which is refused")

    def build(seed):
        model = get_peft_model(build_model(), ADAPTERS[kind])
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        return model, ImplicitPRM(model, build_model(), tokenizer, beta=0.5)

    (saved, prm), (fresh, other) = build(1), build(2)
    prm.save_pretrained(tmp_path / "prm")
    backend = make_backend(other, Accelerator(cpu=True))
    assert not same(weights(saved), weights(fresh))
    backend.load_weights(saved_weights(fresh, tmp_path / "prm"))
    assert same(weights(saved), weights(fresh))


def test_a_policy_that_does_not_take_all_of_its_checkpoint_is_refused(train, tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=44,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    settings = {**STEPS, "max_steps": 2, "max_completion_length": 4}
    train(model=Qwen3MoeForCausalLM(config), **settings)
    with pytest.raises(ValueError, match="does not fit the policy.*experts"):
        train(
            str(tmp_path / "run" / "checkpoint-2"), model=Qwen3MoeForCausalLM(config), **{**settings, "max_steps": 4}
        )


def test_tied_weights_count_as_loaded(train, tmp_path):
    def tied():
        model = build_model()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    trained = train(model=tied(), **STEPS)
    assert trained.model.lm_head.weight is trained.model.model.embed_tokens.weight
    resumed = train(str(tmp_path / "run" / "checkpoint-2"), model=tied(), **STEPS)
    assert same(weights(trained.model), weights(resumed.model))


# --- Saving and resuming ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prm_replay_batches": 2, "prm_lr_scheduler_type": "linear", "prm_trust_weighting": True},
        {"peft_config": lora(), "prm_peft_config": lora(), "prm_replay_batches": 1},
        {"prm_peft_config": lora()},
        {"oversample_factor": 2, "reward_funcs": row_rewards(MIXED + FAILS + PASSES), **BAND},
        # Half of the groups pass, so that some batches take several rounds
        {
            "filter_max_rounds": 3,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 1,
            **BAND,
            "accuracy_low": 0.5,
        },
        {"prm_reference": "policy", "prm_update": "before"},
        {"prm_loss_type": "calibrated_ce", "prm_reference_weight": "fitted", "prm_replay_batches": 1},
        {"prm_update": "none"},
    ],
    ids=[
        "full",
        "replay",
        "two adapters",
        "lora prm",
        "oversampled",
        "rounds",
        "policy reference",
        "calibrated",
        "none",
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(train, tmp_path, settings):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **settings}
    whole = train(output_dir=str(tmp_path / "whole"), **settings)
    resumed = train(str(tmp_path / "whole" / "checkpoint-2"), output_dir=str(tmp_path / "resumed"), **settings)
    half = 4 if "filter_max_rounds" in settings else 2
    assert len(whole.outputs) == 2 * half and len(resumed.outputs) == half
    for first, second in zip(whole.outputs[half:], resumed.outputs, strict=True):
        assert torch.equal(first["completion_ids"], second["completion_ids"])
        assert torch.equal(first["advantages"], second["advantages"])
    if "filter_max_rounds" in settings:
        assert logged(whole, "filter/rounds") == logged(resumed, "filter/rounds")
        assert max(logged(whole, "filter/rounds")[2:]) > 1
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
        metric_for_best_model="eval_num_tokens",  # the first checkpoint has fewest, so that the last is not the best
        greater_is_better=False,
    )
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    assert same(weights(trainer.implicit_prm.model), weights(AutoModelForCausalLM.from_pretrained(f"{best}/prm")))
    assert same(weights(trainer.model), weights(AutoModelForCausalLM.from_pretrained(best)))
