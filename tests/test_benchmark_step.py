"""The cost model against what torch counts, and the tables of the step benchmark."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

PROMPT, COMPLETION = 6, 18


@pytest.fixture(scope="module")
def cost_model(benchmarks):
    import cost_model

    return cost_model


@pytest.fixture(scope="module")
def step(cost_model):
    import step

    return step


@pytest.fixture
def shape(cost_model):
    return cost_model.Shape(layers=3, hidden=32, intermediate=80, heads=4, kv_heads=2, head_dim=12, vocab=200)


def build(shape, **kwargs):
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=False,
        **kwargs,
    )
    return Qwen2ForCausalLM(config)


def counted_flops(model, backward):
    ids = torch.randint(0, 200, (1, PROMPT + COMPLETION))
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, logits_to_keep=COMPLETION, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def test_weights_are_those_of_the_model(cost_model, shape):
    model = build(shape)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert shape.weights == matrices
    assert cost_model.QWEN2_5_7B.weights == pytest.approx(7.616e9, rel=1e-3)  # as its model card says: 7.61B
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.adapter(3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [0, 3])
def test_flops_are_those_that_torch_counts(cost_model, shape, rank):
    # Eager, whose attention is matrix products that are counted
    model = build(shape, attn_implementation="eager")
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
    forward = cost_model.forward_flops(shape, PROMPT, COMPLETION, rank=rank, causal=False)
    with torch.no_grad():
        assert counted_flops(model, backward=False) == pytest.approx(forward, rel=0.01)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train = cost_model.train_flops(shape, PROMPT, COMPLETION, rank=rank, causal=False, checkpointing=checkpointing)
        assert counted_flops(model, backward=True) == pytest.approx(train, rel=0.02)


def test_flops_of_the_last_layers_are_those_that_torch_counts(cost_model, step, shape):
    model = get_peft_model(build(shape, attn_implementation="eager"), step.lora_config(range(1, 3)))
    below = cost_model.dataclasses.replace(shape, layers=1, vocab=0)
    options = {"rank": step.RANK, "causal": False, "checkpointing": False}
    train = cost_model.train_flops(shape.last(2), PROMPT, COMPLETION, to_input=False, **options)
    train += cost_model.forward_flops(below, PROMPT, COMPLETION, causal=False)
    assert counted_flops(model, backward=True) == pytest.approx(train, rel=0.02)
    passes = cost_model.step_flops(shape, PROMPT, [COMPLETION] * 4, prm_rank=step.RANK, prm_layers=2, update="none")
    top = cost_model.forward_flops(shape.last(2), PROMPT, COMPLETION, rank=step.RANK)
    assert passes["scoring"] == 4 * top


def attention_keeps_matrices():
    """Whether torch's attention on a CPU keeps a matrix of all tokens for grouped queries, as it does in torch 2.6."""
    queries, keys = (torch.zeros(1, heads, 8, 8, requires_grad=True) for heads in (2, 1))
    attended = scaled_dot_product_attention(queries, keys, keys, is_causal=True, enable_gqa=True)
    return "FlashAttention" not in attended.grad_fn.name()


@pytest.mark.skipif(
    attention_keeps_matrices(), reason="needs a torch whose attention keeps no matrices for grouped queries"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_keeps(cost_model, shape, dtype):
    kept = {}

    def pack(tensor):
        if tensor.is_floating_point() and 500 in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    sizes = []
    for layers in (2, 3):
        config = cost_model.dataclasses.replace(shape, layers=layers)
        model = build(config)
        kept.clear()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            # A mask, as batches have one
            mask = torch.ones(1, 500, dtype=torch.long)
            model(torch.randint(0, 200, (1, 500)), attention_mask=mask, use_cache=False, logits_to_keep=1)
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
    expected = cost_model.activation_bytes(shape, 1, 500, dtype_bytes=dtype.itemsize, checkpointing=False)
    assert sizes[1] - sizes[0] == pytest.approx(expected / shape.layers, rel=0.05)


def test_passes_of_a_step(cost_model, shape):
    lengths = [20, 4, 4, 12, 4, 4, 4, 4]
    assert cost_model.padded(lengths, 4) == [20] * 4 + [4] * 4

    def flops(**options):
        return cost_model.step_flops(
            shape, PROMPT, lengths, micro_batch=4, checkpointing=False, prm_fused_head=False, **options
        )

    grpo, after, before = flops(update="grpo"), flops(), flops(update="before")
    assert set(grpo) == {"policy"} and grpo["policy"] == after["policy"]
    assert set(after) == {"policy", "reference", "prm"} and set(before) - set(after) == {"scoring again"}
    assert after["reference"] == before["scoring again"] == flops(update="none")["scoring"]
    assert after["prm"] == pytest.approx(3 * after["reference"])
    assert flops(epochs=2, replay=1)["prm"] == 4 * after["prm"] and "scoring" in flops(replay=1)


def test_memory_of_a_shared_base(cost_model, shape):
    grpo = cost_model.memory(shape, method="grpo", rank=4)
    prime = cost_model.memory(shape, rank=4, prm_rank=4, shared_base=True, prm_fused_head=True)
    assert prime.pop("prm") == 16 * shape.adapter(4)
    assert prime == grpo
    full = cost_model.memory(shape, processes=4)
    assert full["policy"] == full["prm"] == 16 * shape.weights / 4
    assert full["reference"] == full["policy"] / 4


def test_generation_is_bound_by_bytes_then_by_flops(cost_model, shape):
    def seconds(rows, bandwidth=1e9):
        return cost_model.decode_seconds(shape, rows, 1, 100, bandwidth=bandwidth, flops_per_second=1e11)

    weights = 2 * (shape.body + shape.head)
    assert seconds(1) == pytest.approx(100 * weights / 1e9, rel=0.2)
    assert seconds(100_000, bandwidth=1e12) == pytest.approx(100_000 * 100 * weights / 1e11, rel=0.2)


def test_tables_and_goals_of_a_result(step):
    row = {
        "setting": "lora-generate",
        "update": "after",
        "kind": "lora",
        "time_ratio": 1.3,
        "time_ratio_min": 1.2,
        "time_ratio_max": 1.4,
        "memory_ratio": 1.02,
        "prime_seconds": 1.3,
        "grpo_seconds": 1.0,
        "generation_share": 0.8,
        "expected_ratio": 1.25,
        "needed_over_grpo": 1.28,
        "needed_ratio": 1.02,
    }
    result = json.loads(json.dumps({"rows": [row, {**row, "update": "before"}], "advantages": []}))
    assert (
        step.steps_table(result)
        .splitlines()[2]
        .startswith("| lora-generate | after | 80% | 1.00 s | 1.30 s | 1.30 (1.20")
    )
    assert step.shortfalls(result) == ["lora-generate, after: time_ratio 1.300 is above 1.2"]
    top = {"rows": [{**row, "setting": "lora-top-train", "kind": "lora-top", "memory_ratio": 1.04, "time_ratio": 1.6}]}
    assert step.shortfalls(top) == ["lora-top-train, after: memory_ratio 1.040 is above 1.03"]


def test_a_top_pass_is_that_of_the_whole_model(step, shape):
    """What the benchmark takes for the needed pass of a PRM of the last layers."""
    model = get_peft_model(build(shape), step.lora_config(range(2, 3))).eval()
    ids = torch.randint(0, 200, (2, 9))
    output = model(ids, output_hidden_states=True, use_cache=False)
    logits = step.top_logits(model, output.hidden_states[2], 5, top=1)
    torch.testing.assert_close(logits, output.logits[:, -5:])
