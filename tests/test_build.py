"""The PRM that a run starts with: from the policy, a path, an instance or an earlier run, full or as an adapter."""

import pytest
import torch
import transformers
from conftest import build_model, distance, logged, row_rewards, same, weights
from helpers import MIXED, fixed_rollouts, lora, make_trained, storages
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_prime import ImplicitPRM
from trl_prime.implicit_prm.build import build_prm, fuse_lm_heads
from trl_prime.implicit_prm.logps import FUSED_LM_HEAD, can_fuse_lm_head, unwrapped

NAN = float("nan")


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


def test_a_new_adapter_depends_on_its_seed_only_and_leaves_random_numbers_alone(tokenizer):
    """Processes that are seeded differently start from the same PRM."""

    def build(process, seed):
        base = build_model()
        torch.manual_seed(process)
        return weights(build_prm(base, tokenizer, peft_config=lora(), seed=seed).model), torch.rand(1)

    (first, drawn), (second, _), (other, _) = build(0, seed=3), build(1, seed=3), build(0, seed=4)
    assert same(first, second) and not same(first, other)
    torch.manual_seed(0)
    assert drawn == torch.rand(1)


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


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_an_adapter_that_was_loaded_to_be_read_is_trained(train, tmp_path, modules_to_save):
    make_trained(get_peft_model(build_model(4), lora(modules_to_save=modules_to_save))).save_pretrained(
        tmp_path / "old"
    )
    prm_model = PeftModel.from_pretrained(build_model(4), tmp_path / "old")
    assert not any(parameter.requires_grad for parameter in prm_model.parameters())
    before = weights(prm_model)
    prm = train(prm_model=prm_model, max_steps=1).implicit_prm
    moved = {name for name, value in weights(prm.model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert same(weights(prm.reference), weights(build_model(4)))


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


@pytest.mark.parametrize(
    ("settings", "option"),
    [({}, "model_init_kwargs"), ({"prm_model": "a path"}, "prm_model_init_kwargs")],
)
def test_weights_that_round_updates_away_are_told_with_the_option_that_loads_them(
    make_trainer, model_path, caplog, settings, option
):
    transformers.utils.logging.enable_propagation()
    settings = dict.fromkeys(settings, model_path)
    kwargs = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True}
    make_trainer(model=model_path, **settings, **kwargs)
    assert f"rounded away. Load it in float32 ({option}={{'dtype': 'float32'}})" in caplog.text
    caplog.clear()
    make_trainer(model=model_path, prm_update="none", **settings, **kwargs)
    transformers.utils.logging.disable_propagation()
    assert "rounded away" not in caplog.text


@pytest.mark.skipif(not can_fuse_lm_head(build_model()), reason="TRL from 1.15 has a fused head")
def test_heads_are_fused_on_a_gpu_unless_the_policy_is_the_reference(tokenizer):
    def fused(wanted, on_gpu, frozen_reference=True):
        prm = ImplicitPRM.from_model(build_model(), tokenizer, frozen_reference=frozen_reference)
        fuse_lm_heads(prm, wanted, on_gpu)
        return [FUSED_LM_HEAD in vars(model) for model in (prm.model, prm.reference) if model is not None]

    assert fused(None, True) == fused(True, False) == [True, True]
    assert fused(None, False) == fused(False, True) == [False, False]
    assert fused(None, True, frozen_reference=False) == [False]
