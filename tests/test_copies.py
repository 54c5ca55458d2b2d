"""Policy, PRM and reference are three models and stay three, whatever TRL or PEFT has done to the policy."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import build_model, build_tokenizer, logged, row_rewards, same, slow_log_probs, weights
from helpers import lora, make_trained, ragged_batch
from peft import (
    IA3Config,
    LoHaConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_prime import ImplicitPRM
from trl_prime.implicit_prm.adapters import no_virtual_tokens
from trl_prime.implicit_prm.copies import bare_base, check_apart, copied, fingerprints, share_parameters
from trl_prime.implicit_prm.logps import batch_completion_logps, completion_logps

IA3 = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
KINDS = {
    "embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "tokens": lora(trainable_token_indices=[5, 6]),
    "head": lora(modules_to_save=["lm_head"]),
    "dora": lora(use_dora=True),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "ia3": IA3,
    "vera": VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "loha": LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "oft": OFTConfig(task_type="CAUSAL_LM", oft_block_size=4, target_modules=["q_proj"]),
}
POLICY_KINDS = {**KINDS, "bias": lora(bias="all"), "pissa": lora(init_lora_weights="pissa")}


def build_tied(dtype):
    model = build_model(3, scale=4.0)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.to(dtype)


def logps_of(prm):
    return [batch_completion_logps(model, *ragged_batch(), 4) for model in (prm.model, prm.reference)]


# --- What TRL puts on the policy ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_no_copy_computes_with_the_policy(make_trainer, dtype, tied):
    policy = build_tied(dtype) if tied else build_model(3, scale=4.0).to(dtype)
    trainer = make_trainer(model=policy, cast_lm_head_to_fp32=True)
    prm, before = trainer.implicit_prm, logps_of(trainer.implicit_prm)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(float("nan"))
    assert all(torch.equal(*pair) for pair in zip(before, logps_of(prm), strict=True))
    assert before[0].isfinite().all()
    torch.testing.assert_close(*before, atol=1e-5, rtol=0)  # the same weights elsewhere in memory may round apart
    for module in [*prm.model.modules(), *prm.reference.modules()]:
        assert "forward" not in vars(module)
        # The rounding of TRL's float32 embeddings to the dtype of the other layers is part of the model
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert all(isinstance(module, nn.Embedding) and hook.__name__.startswith("cast_outputs") for hook in hooks)
    completion_logps(prm.model, *ragged_batch()).sum().backward()
    assert prm.model.lm_head.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in [*policy.parameters(), *prm.reference.parameters()])


def closing_over(head):
    return lambda hidden: head.weight @ hidden[0, 0] + hidden


def by_default(head):
    return lambda hidden, head=head: head.weight @ hidden[0, 0] + hidden


def by_keyword(head):
    def forward(hidden, *, head=head):
        return head.weight @ hidden[0, 0] + hidden

    return forward


@pytest.mark.parametrize("patch", [closing_over, by_default, by_keyword], ids=lambda patch: patch.__name__)
def test_a_copy_loses_a_function_that_holds_the_policy_in_whatever_way(patch):
    model = build_model(3, scale=4.0)
    norm = model.model.norm
    square = nn.Linear(32, 32)
    norm.forward = patch(square)
    norm.register_forward_hook(lambda module, args, output, held=square: output)
    expected = batch_completion_logps(build_model(3, scale=4.0), *ragged_batch(), 4)
    for clone in (copied(model), share_parameters(model)):
        assert torch.equal(batch_completion_logps(clone, *ragged_batch(), 4), expected)
        assert not clone.model.norm._forward_hooks
    assert "forward" in vars(norm) and norm._forward_hooks, "the policy keeps its own"


@pytest.mark.parametrize("prm_peft", [None, lora()], ids=["full", "lora"])
def test_a_saved_prm_keeps_its_float32_head(make_trainer, model_path, tmp_path, prm_peft):
    policy = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    prm = make_trainer(model=policy, prm_peft_config=prm_peft, cast_lm_head_to_fp32=True).implicit_prm
    make_trained(prm.model)
    if prm_peft is None:
        prm.model.model.norm.weight.data *= 1.5
    prm.save_pretrained(tmp_path)
    for ours, theirs in zip(logps_of(prm), logps_of(ImplicitPRM.from_pretrained(tmp_path)), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(*logps_of(prm))


@pytest.mark.parametrize("prm_peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("policy_peft", [None, lora()], ids=["full", "lora"])
def test_the_reference_stays_and_heads_learn_apart_with_a_float32_head(train, policy_peft, prm_peft):
    start = build_model(3, scale=4.0)
    with torch.no_grad():
        expected = slow_log_probs(start, *ragged_batch())
    trainer = train(
        model=copy.deepcopy(start),
        peft_config=policy_peft,
        prm_peft_config=prm_peft,
        cast_lm_head_to_fp32=True,
        gradient_checkpointing=True,
        reward_funcs=row_rewards((1.0, 0.0)),
        process_weight=0.0,
        max_steps=3,
    )
    prm = trainer.implicit_prm
    torch.testing.assert_close(prm.reference_log_probs(*ragged_batch()), expected, atol=1e-5, rtol=1e-5)
    assert (
        logged(trainer, "prm/process_reward")[0] == 0
        and prm.log_probs(*ragged_batch()).sub(expected).abs().max() > 1e-4
    )
    moved = [
        not torch.equal(m.get_output_embeddings().weight, start.lm_head.weight) for m in (prm.model, trainer.model)
    ]
    assert moved == [prm_peft is None, policy_peft is None]


def test_a_policy_without_anything_to_learn_gets_no_gradient_from_the_prm(train):
    trainer = train(cast_lm_head_to_fp32=True, reward_funcs=row_rewards((1.0,)), process_weight=0.0)
    assert same(weights(trainer.model), weights(build_model()))
    assert not same(weights(trainer.implicit_prm.model), weights(build_model()))


@pytest.mark.parametrize("reference", ["frozen", "policy"])
@pytest.mark.parametrize("from_path", [False, True])
def test_logits_are_float32_under_autocast(make_trainer, model_path, from_path, reference):
    settings = {"bf16": True, "cast_lm_head_to_fp32": True, "prm_reference": reference}
    trainer = make_trainer(model=model_path, prm_model=model_path if from_path else None, **settings)
    prm, ids = trainer.implicit_prm, torch.tensor([[5, 6, 7]])
    with torch.no_grad(), trainer.accelerator.autocast():
        for model in (prm.model, prm.reference or trainer.accelerator.unwrap_model(trainer.model)):
            hidden = model.model(input_ids=ids).last_hidden_state.float()
            exact = hidden.double() @ model.lm_head.weight.double().T
            assert (model(input_ids=ids).logits.double() - exact).abs().max() < 1e-4


def test_hooks_of_accelerate_stay_under_and_over_a_patch():
    model = build_model()
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    expected = model(input_ids=torch.tensor([[5, 6]])).logits.detach()
    head = model.lm_head
    model.lm_head.forward = lambda hidden: head.weight.new_zeros(1) + nn.functional.linear(hidden, head.weight)
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, output: output + 0 * norm.weight)
    clone = copied(model)
    with torch.no_grad():
        norm.weight.fill_(float("nan"))
        head.weight.fill_(float("nan"))
    assert torch.equal(clone(input_ids=torch.tensor([[5, 6]])).logits, expected)
    assert clone.lm_head.forward.func is not None and clone.lm_head._hf_hook is not model.lm_head._hf_hook


# --- What PEFT does to a base ---


@pytest.mark.parametrize("policy_peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_prm_adapter_that_rewrites_its_base_is_refused(make_trainer, init, policy_peft):
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' rewrites"):
        make_trainer(peft_config=policy_peft, prm_peft_config=lora(init_lora_weights=init))


def test_a_peft_model_that_has_rewritten_its_base_is_refused(tokenizer):
    for init in ("pissa", "pissa_niter_2", "olora", "corda"):
        model = get_peft_model(build_model(), lora())
        model.peft_config["default"].init_lora_weights = init
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*rewritten"):
            ImplicitPRM.from_model(model, tokenizer)
    for init in ("gaussian", "orthogonal"):
        ImplicitPRM.from_model(get_peft_model(build_model(), lora(init_lora_weights=init)), tokenizer)


def test_fingerprints_tell_of_changes_in_place():
    model = build_model()
    before = fingerprints(model)
    assert fingerprints(model) == before
    model.lm_head.weight.data[3, 4] += 1e-6
    assert [name for name, value in fingerprints(model).items() if value != before[name]] == ["lm_head.weight"]


@pytest.mark.parametrize("prm_peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_prm_and_reference_start_as_the_start_model_of_any_policy_adapter(tokenizer, kind, prm_peft):
    start = build_model(3, scale=4.0)
    with torch.no_grad():
        expected = slow_log_probs(start, *ragged_batch())
    policy = get_peft_model(copy.deepcopy(start), copy.deepcopy(POLICY_KINDS[kind]))
    policy.enable_input_require_grads()  # as TRL does for gradient checkpointing
    before = weights(policy)
    prm = ImplicitPRM.from_policy(policy, tokenizer, peft_config=prm_peft)
    first, second = logps_of(prm)
    torch.testing.assert_close(second, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    check_apart(policy, prm.model, prm.reference)
    assert same(weights(policy), before)


@pytest.mark.parametrize("kind", ["head", "tokens"])
def test_an_adapter_that_was_trained_outside_its_factors_is_part_of_the_start_model(tokenizer, kind):
    policy = get_peft_model(build_model(3, scale=4.0), copy.deepcopy(KINDS[kind]))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        expected = slow_log_probs(policy, *ragged_batch())
        assert (slow_log_probs(build_model(3, scale=4.0), *ragged_batch()) - expected).abs().max() > 0.1
    for logps in logps_of(ImplicitPRM.from_policy(policy, tokenizer)):
        torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prm_of_any_adapter_starts_as_its_reference(tokenizer, kind):
    prm = ImplicitPRM.from_policy(build_model(3, scale=4.0), tokenizer, peft_config=copy.deepcopy(KINDS[kind]))
    first, second = logps_of(prm)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    check_apart(None, prm.model, prm.reference)


@pytest.mark.parametrize("kind", ["embeddings", "tokens", "head", "prompt", "prefix"])
def test_policy_adapters_train_with_gradient_checkpointing(train, kind):
    config = {**KINDS, "prompt": PROMPT, "prefix": PREFIX}[kind]
    checkpointing = kind != "prefix"  # which PEFT refuses
    trainer = train(peft_config=copy.deepcopy(config), gradient_checkpointing=checkpointing, max_steps=1)
    assert logged(trainer, "prm/process_reward") == [0.0]
    assert same(weights(trainer.implicit_prm.reference), weights(build_model()))


def test_the_base_of_an_adapter_has_the_original_modules(tokenizer):
    model = make_trained(get_peft_model(build_model(scale=4.0), lora(modules_to_save=["lm_head"])))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    assert same(weights(bare_base(model)), weights(build_model(scale=4.0)))
    # The trained head of the policy is part of the start
    prm = ImplicitPRM.from_policy(model, tokenizer)
    assert torch.equal(prm.reference.lm_head.weight, 2 * build_model(scale=4.0).lm_head.weight)


def test_adapters_that_no_prm_can_have(make_trainer, tokenizer):
    for config in (PROMPT, PREFIX):
        with pytest.raises(ValueError, match="virtual tokens"):
            make_trainer(model="no/such-model", prm_peft_config=config)
        with pytest.raises(ValueError, match="virtual tokens"):
            make_trainer(prm_model=get_peft_model(build_model(), copy.deepcopy(config)))
        with pytest.raises(ValueError, match="prm_reference='policy'.*virtual"):
            make_trainer(peft_config=config, prm_reference="policy")
        assert type(config).__name__ in no_virtual_tokens(config)
    with pytest.raises(ValueError, match="bias='none'"):
        make_trainer(prm_model=get_peft_model(build_model(), lora(bias="all")))


# --- What is passed in ---


def test_models_that_share_weights_are_refused(make_trainer, tokenizer):
    policy = build_model()
    with pytest.raises(ValueError, match="trains .* which the PRM"):
        make_trainer(model=get_peft_model(policy, lora()), prm_model=policy)
    shared = build_model()
    shared.lm_head.weight = policy.lm_head.weight
    with pytest.raises(ValueError, match=r"'lm_head.weight', which the PRM holds"):
        check_apart(policy, shared, None)
    frozen = build_model().requires_grad_(False)
    check_apart(get_peft_model(copy.deepcopy(frozen), lora()), frozen, frozen)


def test_another_tokenizer_is_refused_in_whatever_form_the_prm_comes(make_trainer, model_path, tmp_path, tokenizer):
    build_model().save_pretrained(tmp_path / "b")
    other = build_tokenizer("9876543210+=:\nabcdefghijklmnopqrstuvwxyz ")
    other.save_pretrained(tmp_path / "b")
    load = AutoModelForCausalLM.from_pretrained
    foreign = load(tmp_path / "b")
    for prm_model in (foreign, get_peft_model(copy.deepcopy(foreign), lora()), ImplicitPRM.from_model(foreign, other)):
        for policy in (model_path, load(model_path), get_peft_model(load(model_path), lora())):
            with pytest.raises(ValueError, match="tokenizer differs"):
                make_trainer(model=policy, prm_model=prm_model, processing_class=None)
    make_trainer(model=load(model_path), prm_model=load(model_path), processing_class=None)


def test_what_a_prm_brings_is_not_ignored(make_trainer, tokenizer, tmp_path):
    saved = ImplicitPRM.from_model(build_model(), tokenizer)
    saved.save_pretrained(tmp_path / "prm")
    with pytest.raises(ValueError, match="leave prm_peft_config out"):
        make_trainer(model="no/such-model", prm_model=str(tmp_path / "prm"), prm_peft_config=lora())
    saved.reference = None
    with pytest.raises(ValueError, match="without a reference.*prm_reference='policy'"):
        make_trainer(model="no/such-model", prm_model=saved, processing_class=tokenizer)
    make_trainer(prm_model=saved, prm_reference="policy")
    get_peft_model(build_model(), lora()).save_pretrained(tmp_path / "adapter")
    for names in ({"prm_model": str(tmp_path / "adapter")}, {"model": str(tmp_path / "adapter")}):
        with pytest.raises(ValueError, match="holds an adapter only.*AutoPeftModelForCausalLM"):
            make_trainer(**names)


def test_a_quantized_start_is_not_trained_as_a_whole(make_trainer, model_path):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True)
    for settings in (
        {"quantization_config": config},
        {"model_init_kwargs": {"quantization_config": config}},
        {"model_init_kwargs": {"quantization_config": config}, "prm_model": "no/such-model"},
    ):
        with pytest.raises(ValueError, match="is quantized.*prm_peft_config"):
            make_trainer(model="no/such-model", peft_config=lora(), **settings)
    policy = AutoModelForCausalLM.from_pretrained(model_path, quantization_config=config)
    with pytest.raises(ValueError, match="is quantized.*prm_peft_config"):
        make_trainer(model=policy, peft_config=lora())
