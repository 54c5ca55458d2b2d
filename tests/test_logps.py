"""Log-probabilities of completions: in micro-batches, with a fused head, and of models that need more than a mask."""

import pytest
import torch
from conftest import build_model, slow_log_probs
from helpers import LENGTHS, lora, make_trained, ragged_batch, scaled
from transformers import LlamaConfig, ModernBertDecoderConfig, Phi3Config, RwkvConfig

from trl_prime import ImplicitPRM
from trl_prime.implicit_prm.copies import share_parameters
from trl_prime.implicit_prm.logps import (
    batch_completion_logps,
    can_fuse_lm_head,
    completion_logps,
    fuse_lm_head,
    length_sorted_chunks,
    num_chunks,
    unwrapped,
)


def test_log_probs_are_those_of_a_full_log_softmax(random_prm):
    prm, batch = random_prm(micro_batch_size=3), ragged_batch()
    for scored, model in ((prm.log_probs, prm.model), (prm.reference_log_probs, prm.reference)):
        with torch.no_grad():
            expected = slow_log_probs(model, *batch)
        torch.testing.assert_close(scored(*batch), expected, atol=1e-5, rtol=1e-5)
    assert not prm.log_probs(*batch).requires_grad


@pytest.mark.skipif(not can_fuse_lm_head(build_model()), reason="TRL before 1.15")
@pytest.mark.parametrize("is_lora", [False, True])
def test_a_fused_head_gives_the_same_log_probs_and_gradients(random_prm, tokenizer, is_lora):
    def gradients(model):
        loss = (completion_logps(model, *batch) * weight).sum()
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    batch = ragged_batch((*LENGTHS, (3, 0)))
    weight = torch.randn(batch[2].shape, generator=torch.Generator().manual_seed(0))
    prm = (
        ImplicitPRM.from_policy(build_model(1, scale=4.0), tokenizer, peft_config=lora()) if is_lora else random_prm()
    )
    make_trained(prm.model)
    models = (prm.model, prm.reference)
    expected, expected_gradients = [slow_log_probs(model, *batch) for model in models], gradients(prm.model)
    logits = []
    for model in models:
        fuse_lm_head(model)
        batch_completion_logps(model, *batch, 3)  # compares itself with plain logits at the first time
        unwrapped(model).lm_head.register_forward_hook(lambda *args: logits.append(args))
    for model, logps in zip(models, expected, strict=True):
        torch.testing.assert_close(batch_completion_logps(model, *batch, 3), logps.detach(), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(prm.model), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert not logits
    # A copy has the class's own forward
    clone = share_parameters(prm.reference)
    clone.lm_head.register_forward_hook(lambda *args: logits.append(args))
    torch.testing.assert_close(completion_logps(clone, *batch), expected[1], atol=1e-5, rtol=1e-5)
    assert logits


def test_a_head_with_an_adapter_is_not_fused(tokenizer):
    config = lora(target_modules=["q_proj", "lm_head"])
    assert not can_fuse_lm_head(ImplicitPRM.from_policy(build_model(), tokenizer, peft_config=config).model)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 100])
def test_scores_do_not_depend_on_micro_batches_or_row_order(random_prm, micro_batch_size):
    prm, batch = random_prm(micro_batch_size=len(LENGTHS)), ragged_batch()
    expected = prm.log_probs(*batch)
    prm.micro_batch_size = micro_batch_size
    torch.testing.assert_close(prm.log_probs(*batch), expected, atol=1e-5, rtol=1e-5)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(micro_batch_size))
    shuffled = prm.log_probs(*(tensor[order] for tensor in batch))
    torch.testing.assert_close(shuffled, expected[order], atol=1e-5, rtol=1e-5)


def test_memory_grows_with_the_micro_batch_only(random_prm):
    prm, batch, seen = random_prm(micro_batch_size=2), ragged_batch(), []
    prm.log_probs(*batch), prm.reference_log_probs(*batch)  # the first passes of a model are checked by others
    for model in (prm.model, prm.reference):
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    prm.log_probs(*batch)
    prm.reference_log_probs(*batch)
    num_tokens = batch[2].shape[1]
    assert len(seen) == 2 * 4  # 7 rows by 2
    assert all(rows <= 2 and positions <= num_tokens + 1 for rows, positions, _ in seen)


TINY = {
    "vocab_size": 44,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TOKENS = {"cls_token_id": 1, "sep_token_id": 1}
HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_model_that_reads_padding_is_refused():
    model = scaled(RwkvConfig(**TINY, attention_hidden_size=32, context_length=64))
    for _ in range(2):  # who tries again is refused again
        with pytest.raises(NotImplementedError, match="RwkvForCausalLM gives a .* ignores the attention mask"):
            batch_completion_logps(model, *ragged_batch(), 4)


def test_rows_beyond_the_limit_of_dynamic_rope_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = scaled(LlamaConfig(**TINY, **HEADS, rope_parameters=rope, max_position_embeddings=14))
    batch = ragged_batch(LENGTHS[:2])
    expected = slow_log_probs(model, *batch).detach()
    torch.testing.assert_close(batch_completion_logps(model, *batch, 2), expected, atol=1e-4, rtol=0)
    with pytest.raises(NotImplementedError, match="A row of 15 tokens is longer than max_position_embeddings=14"):
        batch_completion_logps(model, *ragged_batch(), 2)


@pytest.mark.skipif(not can_fuse_lm_head(build_model()), reason="TRL before 1.15 has no fused head")
def test_a_fused_head_that_leaves_out_a_part_is_refused():
    model = scaled(ModernBertDecoderConfig(**TINY, intermediate_size=64, num_attention_heads=4, **TOKENS))
    expected = slow_log_probs(model, *ragged_batch()).detach()
    torch.testing.assert_close(batch_completion_logps(model, *ragged_batch(), 4), expected, atol=1e-4, rtol=0)
    fuse_lm_head(model)
    with pytest.raises(NotImplementedError, match="by TRL's fused head differ .*prm_fused_lm_head=False"):
        batch_completion_logps(model, *ragged_batch(), 4)


def longrope_model(boundary):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    rope["original_max_position_embeddings"] = boundary
    return scaled(
        Phi3Config(
            **TINY,
            **HEADS,
            rope_parameters=rope,
            original_max_position_embeddings=boundary,
            max_position_embeddings=64,
        )
    )


@pytest.mark.parametrize("micro_batch_size", [2, 100])
def test_scores_under_longrope_do_not_depend_on_longer_rows(micro_batch_size):
    model, batch = longrope_model(boundary=12), ragged_batch()
    lengths = batch[1].sum(1) + batch[3].sum(1)
    assert (lengths > 12).any() and (lengths <= 12).any()
    logps = batch_completion_logps(model, *batch, micro_batch_size)
    torch.testing.assert_close(logps, slow_log_probs(model, *batch).detach(), atol=1e-4, rtol=0)
    with pytest.raises(NotImplementedError, match="LongRoPE.* change for rows of more than 12 tokens"):
        completion_logps(model, *batch)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_chunks_hold_every_row_once_and_are_no_more_than_announced(size):
    for lengths in (LENGTHS, LENGTHS[:1], LENGTHS[:2], ()):
        masks = [torch.arange(9)[None] < torch.tensor([row[i] for row in lengths])[:, None] for i in (0, 1)]
        for boundary in (None, 0, 6, 8, 100):
            chunks = list(length_sorted_chunks(*masks, size, boundary))
            assert sorted(i for chunk in chunks for i in chunk.tolist()) == [*range(len(lengths))]
            assert len(chunks) <= num_chunks(len(lengths), size, boundary) and all(
                len(chunk) <= size for chunk in chunks
            )


def test_scoring_leaves_mode_and_gradients_alone(random_prm):
    prm = random_prm()
    for mode in (True, False):
        prm.model.train(mode)
        prm.log_probs(*ragged_batch())
        assert prm.model.training is mode
    assert all(parameter.grad is None for parameter in prm.model.parameters())


def test_dropout_does_not_reach_scores(tokenizer):
    prm = ImplicitPRM.from_policy(build_model(), tokenizer, peft_config=lora(lora_dropout=0.9))
    make_trained(prm.model).train()
    assert torch.equal(prm.log_probs(*ragged_batch()), prm.log_probs(*ragged_batch()))


def test_a_batch_of_no_rows_and_rows_of_no_tokens(random_prm):
    prm, batch = random_prm(), ragged_batch(((3, 0), (2, 0)))
    assert torch.equal(prm.log_probs(*batch), torch.zeros(2, 2))
    assert prm.log_probs(*(tensor[:0] for tensor in batch)).shape == (0, 2)
