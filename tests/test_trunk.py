"""The layers that PRM and reference share: found, computed once, and skipped without a difference."""

import contextlib
import logging

import pytest
import torch
import transformers as hf
from conftest import logged, row_rewards, same, weights
from helpers import MIXED, lora, make_trained, ragged_batch, scaled
from transformers import BitsAndBytesConfig

from trl_prime import ImplicitPRM
from trl_prime.implicit_prm import learner, trunk
from trl_prime.implicit_prm.logps import batch_completion_logps, completion_logps, fuse_lm_head
from trl_prime.implicit_prm.trunk import TrunkStates, shared_trunk

SHAPE = {
    "vocab_size": 44,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = {**SHAPE, "num_key_value_heads": 1}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "llama": hf.LlamaConfig(**GROUPED),
    "qwen2": hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=3),
    "qwen3": hf.Qwen3Config(**HEADS),
    "mistral": hf.MistralConfig(**HEADS, sliding_window=4),
    "gemma": hf.GemmaConfig(**HEADS),  # scales its embeddings
    "gemma2": hf.Gemma2Config(**HEADS, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3": hf.Gemma3TextConfig(**HEADS, sliding_window=4, query_pre_attn_scalar=8),
    "phi3": hf.Phi3Config(**GROUPED),
    "gpt2": hf.GPT2Config(
        vocab_size=44, n_embd=16, n_layer=4, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "olmo3": hf.Olmo3Config(**GROUPED, sliding_window=4),
    "bloom": hf.BloomConfig(vocab_size=44, hidden_size=16, n_layer=4, n_head=2),  # its layers return tuples
    "qwen3 moe": hf.Qwen3MoeConfig(**HEADS, **EXPERTS),
    "gpt-oss": hf.GptOssConfig(**HEADS, num_local_experts=4, sliding_window=4),
    "lfm2": hf.Lfm2Config(**GROUPED, full_attn_idxs=[1, 3]),  # convolution and attention in turns
    "qwen3 next": hf.Qwen3NextConfig(  # linear attention
        **HEADS,
        **EXPERTS,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=2,
        linear_num_key_heads=1,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}
TARGETS = {
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bloom": ["query_key_value"],
    "lfm2": ["out_proj", "w1"],
    "qwen3 next": ["o_proj", "out_proj"],
}


def make_prm(tokenizer, name="qwen2", first=2, **adapter):
    """A PRM whose adapter begins at layer `first`, and which has learned something."""
    model = scaled(CONFIGS[name], 2.0)
    adapter = {
        "layers_to_transform": [*range(first, 4)],
        "target_modules": TARGETS.get(name, ["q_proj", "v_proj"]),
    } | adapter
    prm = ImplicitPRM.from_model(model, tokenizer, peft_config=lora(**adapter), micro_batch_size=2)
    make_trained(prm.model)
    return prm


def lower_layers(model):
    return trunk._decoder_layers(trunk.unwrapped(model))[:2]


@contextlib.contextmanager
def counted_calls(modules):
    """How often the forward of any of their parts was called."""
    calls = []
    handles = [part.register_forward_hook(lambda *a: calls.append(1)) for m in modules for part in m.children()]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_with_a_skipped_trunk_are_those_of_a_plain_pass(tokenizer, name):
    prm, batch = make_prm(tokenizer, name), ragged_batch()
    shared = shared_trunk(prm)
    assert len(shared.layers) == 2
    plain, ref_plain = prm.log_probs(*batch), prm.reference_log_probs(*batch)
    assert (plain - ref_plain).abs().max() > 0.01
    states = TrunkStates(shared, batch[1], batch[3])
    assert torch.equal(prm.reference_log_probs(*batch, around=states.keep), ref_plain)
    with counted_calls(lower_layers(prm.model)) as calls:
        skipped = prm.log_probs(*batch, around=states.use)
    assert not calls
    torch.testing.assert_close(skipped, plain, atol=1e-6, rtol=0)
    # Rows come back in another order and in other micro-batches than they were kept in
    prm.micro_batch_size = 3
    rows = torch.arange(len(plain)) % 2 == 0
    expected = plain * rows[:, None]
    torch.testing.assert_close(prm.log_probs(*batch, rows=rows, around=states.use), expected, atol=1e-5, rtol=0)
    assert not any("forward" in vars(layer) for layer in lower_layers(prm.model))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", ["plain", "bf16", "fused", "head"])
def test_gradients_with_a_skipped_trunk_are_those_of_a_plain_pass(tokenizer, how, checkpointing):
    """Also those of an adapter on the head, under autocast, and with TRL's fused head."""
    adapter = {"target_modules": ["q_proj", "v_proj", "lm_head"], "layers_to_transform": None} if how == "head" else {}
    if how == "head":
        adapter["exclude_modules"] = r"\D*\.(0|1)\..*"
    prm, batch = make_prm(tokenizer, **adapter), ragged_batch(((3, 5), (2, 6)))
    if how == "fused":
        fuse_lm_head(prm.model)
        fuse_lm_head(prm.reference)
    if checkpointing:
        prm.model.gradient_checkpointing_enable()
        trunk.unwrapped(prm.model).disable_input_require_grads()
    prm.model.train()
    trained = [p for p in prm.model.parameters() if p.requires_grad]
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
        states = TrunkStates(shared_trunk(prm), batch[1], batch[3])
        batch_completion_logps(prm.reference, *batch, 2, around=states.keep)
        for around in (contextlib.nullcontext, states.use):
            with around(torch.tensor([1, 0])):
                logps = completion_logps(prm.model, *(tensor[[1, 0]] for tensor in batch))
            found.append(torch.autograd.grad(logps.sum(), trained))
    assert all(gradient.any() for gradient in found[0])
    for plain, skipped in zip(*found, strict=True):
        torch.testing.assert_close(skipped, plain, atol=1e-6, rtol=1e-5)


def test_a_quantized_base_is_shared(tokenizer, model_path, monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    # Another layout of the weights, made for inference only, which needs wider matrices than a tiny model has
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = hf.AutoModelForCausalLM.from_pretrained(model_path, quantization_config=config)
    prm = ImplicitPRM.from_model(model, tokenizer, peft_config=lora(layers_to_transform=[1]))
    assert len(shared_trunk(prm).layers) == 1


def test_layers_below_the_adapter_are_the_trunk(tokenizer, caplog):
    logging.getLogger("transformers").propagate = True
    assert [len(shared_trunk(make_prm(tokenizer, first=first)).layers) for first in (1, 3)] == [1, 3]
    assert shared_trunk(make_prm(tokenizer, first=0)) is None
    # One module of a lower layer, and the embeddings below all layers
    assert (
        shared_trunk(
            make_prm(tokenizer, target_modules=r".*3.*_proj|.*1.self_attn.v_proj", layers_to_transform=None)
        ).layers[1:]
        == []
    )
    assert shared_trunk(make_prm(tokenizer, modules_to_save=["embed_tokens"])) is None
    assert shared_trunk(make_prm(tokenizer, trainable_token_indices=[3])) is None
    full = ImplicitPRM.from_model(scaled(CONFIGS["qwen2"]), tokenizer)
    assert shared_trunk(full) is None
    # A reference of other weights
    prm = make_prm(tokenizer)
    prm.reference = scaled(CONFIGS["qwen2"], 2.0)
    assert shared_trunk(prm) is None
    assert not caplog.text


def test_a_trunk_that_cannot_be_skipped_is_computed_twice_with_a_warning(tokenizer, caplog, monkeypatch):
    logging.getLogger("transformers").propagate = True
    prm = make_prm(tokenizer)
    lower_layers(prm.model)[0].self_attn.attention_dropout = 0.1
    assert shared_trunk(prm) is None and "because they have dropout" in caplog.text
    # Dropout of the adapter does not reach the trunk
    assert shared_trunk(make_prm(tokenizer, lora_dropout=0.1)) is not None
    # A model that looks back at what came out of its first layer
    prm = make_prm(tokenizer)
    for model in (trunk.unwrapped(prm.model), prm.reference):
        seen = []
        model.model.layers[0].register_forward_hook(lambda m, a, output, seen=seen: seen.append(output))
        model.model.layers[3].register_forward_hook(lambda m, a, output, seen=seen: output + seen.pop())
    assert shared_trunk(prm) is None and "log-probabilities that differ by" in caplog.text
    prm = make_prm(tokenizer)
    monkeypatch.setattr(TrunkStates, "use", lambda *args: (_ for _ in ()).throw(TypeError("another layer")))
    assert shared_trunk(prm) is None and "fails (TypeError: another layer)" in caplog.text


# --- In a run ---

LAST_LAYER = {"layers_to_transform": [1]}
TRUNK_RUN = {
    "prm_peft_config": lora(**LAST_LAYER),
    "reward_funcs": row_rewards(MIXED),
    "prm_learning_rate": 0.05,
    "prm_micro_batch_size": 3,
    "max_steps": 3,
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prm_replay_batches": 2, "prm_num_epochs": 2},
        {"prm_update": "before", "gradient_checkpointing": True},
        {"prm_loss_type": "dpo", "prm_num_epochs": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", ["full", "lora"])
def test_a_run_with_a_trunk_learns_the_same(train, monkeypatch, policy, settings):
    settings = {**TRUNK_RUN, **settings, "peft_config": lora() if policy == "lora" else None}
    trainer = train(**settings)
    assert trainer.prm_learner.trunk is not None
    monkeypatch.setattr(learner, "shared_trunk", lambda *args: None)
    plain = train(**settings)
    assert plain.prm_learner.trunk is None
    for key in ("prm/loss", "prm/process_reward", "loss"):
        values, expected = logged(trainer, key), logged(plain, key)
        assert len(values) == 3 and values == pytest.approx(expected, rel=1e-3, abs=1e-6), key
    torch.testing.assert_close(
        weights(trainer.implicit_prm.model), weights(plain.implicit_prm.model), atol=1e-5, rtol=1e-4
    )


def count_rows(model, counts, name):
    counts[name] = 0
    part = lower_layers(model)[0].self_attn
    part.register_forward_hook(lambda m, args, output: counts.update({name: counts[name] + len(output[0])}))


@pytest.mark.parametrize("share", [trunk.MEMORY_SHARE, 0.0])
def test_the_trunk_is_computed_once_a_batch_where_its_states_fit(make_trainer, monkeypatch, share):
    monkeypatch.setattr(trunk, "MEMORY_SHARE", share)
    trainer = make_trainer(**TRUNK_RUN, prm_num_epochs=2, prm_replay_batches=1)
    counts = {}
    count_rows(trainer.implicit_prm.model, counts, "prm")
    count_rows(trainer.implicit_prm.reference, counts, "reference")
    trainer.train()
    # `can_tile` passes one row, `check_scoring` three, and the comparison two
    probes = {"prm": 1 + 3 + 2, "reference": 1 + 3 + 2}
    # Two epochs on each of three batches, two with another replayed and therefore scored before
    passes = 2 * 3 * 8 + 2 * 2 * 8 + 2 * 8 if share == 0 else 0
    assert counts == {"prm": probes["prm"] + passes, "reference": probes["reference"] + 3 * 8}


@pytest.mark.parametrize("reference", ["frozen", "policy"])
def test_a_resumed_run_computes_the_trunk_of_replayed_batches_again(train, tmp_path, reference):
    # After the last step one of the two kept batches is of the checkpoint
    settings = {**TRUNK_RUN, "prm_replay_batches": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    settings["prm_reference"] = reference  # a policy that learns shares nothing with the PRM
    whole = train(**settings)
    resumed = train(str(tmp_path / "run" / "checkpoint-2"), **settings)
    kept = [batch.trunk is not None for batch in resumed.prm_learner.updater.replay]
    assert kept == [reference == "frozen"] * 2
    assert same(weights(resumed.implicit_prm.model), weights(whole.implicit_prm.model))


def test_gradients_do_not_go_below_the_adapter(make_trainer, monkeypatch):
    """Without states too: transformers makes the embeddings ask for gradients when it checkpoints."""
    monkeypatch.setattr(trunk, "MEMORY_SHARE", 0.0)
    trainer = make_trainer(**{**TRUNK_RUN, "max_steps": 1}, gradient_checkpointing=True)
    asked = []
    lower = lower_layers(trainer.implicit_prm.model)[0]
    lower.register_forward_hook(lambda m, args, output: asked.append(output.requires_grad))
    trainer.train()
    assert asked and not any(asked)
