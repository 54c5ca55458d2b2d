"""Log-probabilities from the head in tiles: their values and gradients, what is held, and which models go without."""

import contextlib

import pytest
import torch
from conftest import build_model, slow_log_probs
from helpers import LENGTHS, lora, make_trained, ragged_batch, scaled
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM, PhiConfig

from trl_prime import ImplicitPRM
from trl_prime.implicit_prm import tiled_head
from trl_prime.implicit_prm.copies import compute_head_in_float32
from trl_prime.implicit_prm.logps import batch_completion_logps, completion_logps, unwrapped
from trl_prime.implicit_prm.tiled_head import can_tile

VOCABULARY = 44
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# Models, and the settings of the adapter that is trained where it is not the whole model
MODELS = {
    "trained": (lambda: build_model(1, scale=4.0), None),
    "frozen": (lambda: build_model(1, scale=4.0), {}),
    "trained with bias": (lambda: with_bias(scaled(PhiConfig(**TINY))), None),
    "frozen with bias": (lambda: with_bias(scaled(PhiConfig(**TINY))), {}),
    "tied": (lambda: scaled(LlamaConfig(**TINY, tie_word_embeddings=True), 2.0), None),
    "trained in float32": (lambda: in_float32(build_model(1, scale=4.0)), None),
    "frozen in float32": (lambda: in_float32(build_model(1, scale=4.0)), {}),
    "adapter on the head": (lambda: build_model(1, scale=4.0), {"target_modules": ["q_proj", "lm_head"]}),
    "saved head": (lambda: build_model(1, scale=4.0), {"modules_to_save": ["lm_head"]}),
}


def with_bias(model):
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def in_float32(model):
    compute_head_in_float32(model)
    return model


def autocast(enabled):
    return torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of seven tokens."""
    monkeypatch.setattr(tiled_head, "_TILE", 7 * VOCABULARY)


@pytest.fixture
def make_prm(tokenizer):
    def make(name):
        build, adapter = MODELS[name]
        config = None if adapter is None else lora(**adapter)
        torch.manual_seed(0)
        return ImplicitPRM.from_model(build(), tokenizer, peft_config=config)

    return make


def log_probs_and_gradients(compute, model, batch):
    generator = torch.Generator().manual_seed(0)
    logps = compute(model, *batch)
    loss = (logps * torch.randn(logps.shape, generator=generator)).sum()
    return [logps.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_a_slow_loop(make_prm, small_tiles, name, bf16):
    model, batch = make_trained(make_prm(name).model), ragged_batch((*LENGTHS, (3, 0)))
    expected = log_probs_and_gradients(slow_log_probs, model, batch)
    assert can_tile(unwrapped(model))
    with autocast(bf16):
        tiled = log_probs_and_gradients(completion_logps, model, batch)
        setattr(unwrapped(model), tiled_head._NUM_LOGITS, 0)
        plain = log_probs_and_gradients(completion_logps, model, batch)
    for ours, theirs, right in zip(tiled, plain, expected, strict=True):
        if bf16:  # which rounds by up to 0.4 % at every step
            assert (ours - right).norm() < 0.06 * right.norm() and (ours - theirs).norm() < 0.03 * right.norm()
        else:
            torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prm_at_its_start_and_its_reference_round_alike(make_prm, small_tiles, name, bf16):
    prm, batch = make_prm(name), ragged_batch()
    # In the order in which rows are scored
    order = (batch[1].sum(1) + batch[3].sum(1)).argsort(descending=True, stable=True)
    batch = [tensor[order] for tensor in batch]
    with autocast(bf16):
        with_gradient = completion_logps(prm.model, *batch)
        reference = batch_completion_logps(prm.reference, *batch, len(LENGTHS))
        without_gradient = batch_completion_logps(prm.model, *batch, len(LENGTHS))
    assert with_gradient.requires_grad and reference.any()
    assert torch.equal(with_gradient.detach(), reference) and torch.equal(without_gradient, reference)


class Largest(TorchDispatchMode):
    """The most elements that any tensor has which an operation gives and which has a value for each entry of the vocabulary."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and VOCABULARY in tensor.shape:
                self.numel = max(self.numel, tensor.numel())
        return outputs


@pytest.mark.parametrize("name", MODELS)
def test_no_logits_larger_than_a_tile_are_made_or_kept(make_prm, monkeypatch, name):
    def keep(tensor):
        if VOCABULARY in tensor.shape:
            kept[-1][tensor.data_ptr()] = tensor.numel()
        return tensor

    tile, kept = 2000, []
    monkeypatch.setattr(tiled_head, "_TILE", tile)
    prm, batch = make_prm(name), ragged_batch(((3, 60), (5, 50), (2, 60)))
    models = (prm.model, prm.reference)
    for model in models:
        assert can_tile(unwrapped(model))
    largest = []
    for _ in range(2):
        kept.append({})
        with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            completion_logps(prm.model, *batch).sum().backward()
            with torch.no_grad():
                completion_logps(prm.reference, *batch)
        largest.append(seen.numel)
        for model in models:
            setattr(unwrapped(model), tiled_head._NUM_LOGITS, 0)
    assert largest[0] <= tile and largest[1] >= 170 * VOCABULARY
    tiled, plain = (sum(sizes.values()) for sizes in kept)  # with weights, of less than a tile in all
    assert tiled <= 2 * tile and plain >= 170 * VOCABULARY


class CutLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :-1]
        return output


class DoublingLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits *= 2
        return output


class TwiceLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


OTHERS = {
    "softcap": lambda: scaled(Gemma2Config(**TINY), 1.0),
    "scale": lambda: scaled(CohereConfig(**TINY, logit_scale=0.5), 1.0),
    "divisor": lambda: scaled(GraniteConfig(**TINY, logits_scaling=1.5), 1.0),
    "cut": lambda: CutLlama(LlamaConfig(**TINY)).eval(),
    "in place": lambda: DoublingLlama(LlamaConfig(**TINY)).eval(),
    "two calls": lambda: TwiceLlama(LlamaConfig(**TINY)).eval(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_changes_its_logits_goes_without_tiles(small_tiles, name):
    # Small weights, whose logits a cap of 30 hardly changes
    model, batch = OTHERS[name](), ragged_batch()
    batch[2].clamp_(max=VOCABULARY - 2)
    assert not can_tile(model)
    for ours, right in zip(
        *(log_probs_and_gradients(function, model, batch) for function in (completion_logps, slow_log_probs)),
        strict=True,
    ):
        torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


def test_finding_out_takes_no_random_numbers(make_prm):
    model = make_prm("frozen").model.get_base_model().train()
    model.model.layers[0].self_attn.q_proj.lora_dropout["default"] = torch.nn.Dropout(0.5)
    state = torch.get_rng_state()
    assert can_tile(model) and model.training and torch.equal(torch.get_rng_state(), state)


def test_settings_that_change_nothing_go_with_tiles():
    assert can_tile(scaled(Gemma2Config(**TINY, final_logit_softcapping=None)))
    assert can_tile(scaled(CohereConfig(**TINY, logit_scale=1.0)))


def test_a_head_that_was_sharded_goes_without_tiles():
    model = build_model()
    model.lm_head.weight.ds_id = 0
    assert not can_tile(model)
    del model.lm_head.weight.ds_id  # as within a forward pass
    assert not can_tile(model)
    model = build_model()
    assert can_tile(model)
    model.lm_head.weight.ds_id = 0
    assert not can_tile(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_without_tokens_has_gradients_that_are_zero(make_prm, name):
    model = make_prm(name).model
    completion_logps(model, *ragged_batch(((3, 0),))).sum().backward()  # DDP waits for all of them
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_the_head_is_itself_again(small_tiles):
    model, batch = build_model(), ragged_batch()
    completion_logps(model, *batch)
    assert "forward" not in vars(model.lm_head)
    model.lm_head.forward = doubled = lambda hidden: 2 * torch.nn.functional.linear(hidden, model.lm_head.weight)
    torch.testing.assert_close(completion_logps(model, *batch), slow_log_probs(model, *batch), atol=1e-4, rtol=1e-4)
    model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        completion_logps(model, *batch)
    assert model.lm_head.forward is doubled
