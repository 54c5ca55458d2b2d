"""The costs of a PRIME step on paper: FLOPs, bytes of generation, and memory, from the shape of the model.

Pure arithmetic, no torch: dense decoders with grouped-query attention and a gated MLP (Qwen2, Llama). `step.py` compares it
with what it measures. `docs/performance.md` explains the formulas and shows the tables that this file prints:

    python benchmarks/cost_model.py

Symbols: N = weights of the layers, V x h = output head, S = tokens of a row with its prompt, C = completion tokens.
Covered: one GPU, and sharding by FSDP or ZeRO-3 over D of them. Not covered: communication, vLLM's own memory, rewards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from common import markdown_table

GB = 1e9
# A head in tiles holds this at once on a GPU, TRL's and the PRM's own: two or three of 4096 times 32768 float32 numbers
_TILE = 4096 * 32768 * 4 * 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of a dense decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the matrices of a layer."""
        q, kv, h, m = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        return [(h, q), (h, kv), (h, kv), (q, h), (h, m), (h, m), (m, h)]

    @property
    def body(self) -> int:
        """N: weights of the layers that a token is multiplied with; norms and biases are too few to count."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """All weights, the embedding too, which is looked up and costs no FLOPs."""
        return self.body + self.head * (1 if self.tied else 2)

    def last(self, layers: int | None) -> Shape:
        """The last layers and the head, which is what a PRM on a shared trunk computes; `None` for all layers."""
        return dataclasses.replace(self, layers=layers or self.layers)

    def adapter(self, rank: int) -> int:
        """Weights of a LoRA adapter on all matrices of the layers."""
        return self.layers * rank * sum(i + o for i, o in self.linears)


QWEN2_5_7B = Shape(28, 3584, 18944, 28, 4, 128, 152064)


# --- FLOPs ---


def forward_flops(shape: Shape, prompt: int, completion: int, *, rank: int = 0, causal: bool = True) -> float:
    """
    One forward pass over a row: 2 N a token, attention, and the head for the completion only.

    Args:
        rank (`int`): Rank of the LoRA adapter, 0 without one.
        causal (`bool`): Whether attention leaves out the upper triangle (flash kernels do; with a mask tensor, none does).
    """
    body, attention, head, adapter = _parts(shape, prompt, completion, rank, causal)
    return body + attention + head + adapter


def train_flops(
    shape: Shape,
    prompt: int,
    completion: int,
    *,
    rank: int = 0,
    checkpointing: bool = True,
    fused_head: bool = False,
    causal: bool = True,
    to_input: bool = True,
) -> float:
    """
    Forward and backward pass over a row: 6 N a token, 4 N with LoRA, whose frozen matrices need no gradient of their own.

    Args:
        to_input (`bool`): Whether gradients reach what goes into the lowest layer, as where transformers' checkpoints ask for it.
        checkpointing (`bool`): Layers are computed again in the backward pass: nearly 2 N more.
        fused_head (`bool`): The same for the head, as TRL's policy does to hold no logits. (The PRM's own tiles do so only
            where the head is trained.)
    """
    body, attention, head, adapter = _parts(shape, prompt, completion, rank, causal)
    factor = 2 if rank else 3
    flops = factor * (body + head) + 3 * (attention + adapter)
    if checkpointing:
        flops += body + attention + adapter
        if not rank:
            # torch stops when it has what the backward pass needs: the result of a layer's last matrix is not
            flops -= 2 * shape.layers * shape.intermediate * shape.hidden * (prompt + completion)
    if rank and not to_input:
        # Queries, keys and values are the first matrices of a layer
        flops -= 2 * sum(i * o for i, o in shape.linears[:3]) * (prompt + completion)
    if fused_head:
        flops += head
    return flops


def _parts(shape: Shape, prompt: int, completion: int, rank: int, causal: bool) -> tuple[float, float, float, float]:
    tokens = prompt + completion
    attention = 4 * shape.layers * shape.heads * shape.head_dim * tokens**2
    return (
        2 * shape.body * tokens,
        attention / 2 if causal else attention,
        2 * shape.head * completion,
        2 * shape.adapter(rank) * tokens if rank else 0,
    )


def padded(lengths: Sequence[int], micro_batch: int) -> list[int]:
    """Tokens that each row costs when rows of like length share a micro-batch and are padded to its longest."""
    ordered = sorted(lengths, reverse=True)
    return [ordered[row // micro_batch * micro_batch] for row in range(len(ordered))]


def step_flops(
    shape: Shape,
    prompt: int,
    completions: Sequence[int],
    *,
    update: str = "after",
    reference: str = "frozen",
    epochs: int = 1,
    replay: int = 0,
    kl: bool = False,
    rank: int = 0,
    prm_rank: int = 0,
    prm_layers: int | None = None,
    micro_batch: int = 8,
    checkpointing: bool = True,
    fused_head: bool = True,
    prm_fused_head: bool = True,
    causal: bool = True,
    oversample: float = 1.0,
) -> dict[str, float]:
    """
    FLOPs of the passes of a step by name; generation is in [`decode_seconds`].

    Args:
        prompt (`int`): Prompt tokens.
        completions (`list[int]`): Tokens of each completion that is trained on.
        update, reference, epochs, replay, oversample: `prm_update` (or `"grpo"`: no PRM), `prm_reference`,
            `prm_num_epochs`, `prm_replay_batches` and `oversample_factor`. Oversampled completions are generated and not
            trained on, so that of the passes here only GRPO's KL reference would see them: they cost nothing.
        kl (`bool`): TRL's own KL term with its own reference pass (`beta` above 0).
        rank, prm_rank (`int`): LoRA ranks of policy and PRM, 0 = full.
        prm_layers (`int`, *optional*): Last layers that the PRM's adapter is on (`prm_lora_layers`); the others are computed by
            the reference's pass only.
        micro_batch (`int`): `prm_micro_batch_size`.
    """
    longest, lengths = max(completions), padded(completions, micro_batch)
    policy = {"rank": rank, "checkpointing": checkpointing, "fused_head": fused_head, "causal": causal}
    prm = {"rank": prm_rank, "checkpointing": checkpointing, "fused_head": prm_fused_head, "causal": causal}
    prm["to_input"], top = prm_layers is None, shape.last(prm_layers)
    # TRL pads all rows of a generation batch to its longest
    flops = {"policy": len(completions) * train_flops(shape, prompt, longest, **policy)}
    if kl:
        flops["policy reference"] = len(completions) * forward_flops(shape, prompt, longest, causal=causal)
    if update == "grpo":
        return flops
    scoring = sum(forward_flops(top, prompt, length, rank=prm_rank, causal=causal) for length in lengths)
    reference_rank = 0 if reference == "frozen" else rank
    flops["reference"] = sum(
        forward_flops(shape, prompt, length, rank=reference_rank, causal=causal) for length in lengths
    )
    if update == "none" or replay:
        flops["scoring"] = scoring  # otherwise the PRM's own training pass gives the scores
    if update != "none":
        flops["prm"] = epochs * (1 + replay) * sum(train_flops(top, prompt, length, **prm) for length in lengths)
    if update == "before":
        flops["scoring again"] = scoring
    return flops


def decode_seconds(
    shape: Shape,
    rows: int,
    prompt: int,
    completion: int,
    *,
    weight_bytes: float = 2,
    bandwidth: float,
    flops_per_second: float,
    processes: int = 1,
) -> float:
    """
    Time to generate: each new token of all rows together reads all weights and the key-value cache once, or is bound by
    its 2 N FLOPs, whichever is longer; the prompts are one forward pass.

    Args:
        rows (`int`): Completions of all processes that are generated at the same time.
        completion (`int`): Tokens of the longest of them: a batch goes on until it is done.
        weight_bytes (`float`): Bytes of a weight and of an entry of the cache.
        bandwidth, flops_per_second (`float`): Measured rates of one process; a data sheet promises more.
        processes (`int`): Each generates its share of the rows with a whole copy of the weights.
    """
    rows = rows / processes
    weights = (shape.body + shape.head) * weight_bytes
    cache = rows * kv_bytes(shape, prompt + completion / 2, weight_bytes)
    token_flops = rows * 2 * (shape.body + shape.head)
    token = max((weights + cache) / bandwidth, token_flops / flops_per_second)
    return completion * token + rows * forward_flops(shape, prompt, 1) / flops_per_second


def kv_bytes(shape: Shape, tokens: float, dtype_bytes: float = 2) -> float:
    """Key-value cache of one row."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * dtype_bytes


# --- Memory ---


def activation_bytes(
    shape: Shape,
    rows: int,
    tokens: int,
    *,
    dtype_bytes: float = 2,
    checkpointing: bool = True,
    fp32_residual: bool = True,
) -> float:
    """
    A forward pass keeps this for its backward pass, the head left out; counted on Qwen2 of transformers 5 with torch's
    attention. With checkpointing a layer keeps its input only, and one layer is whole.

    Args:
        fp32_residual (`bool`): Whether the sums between the layers are float32, as they are under autocast from float32
            weights.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Two norms, each with its input and its result, are float32 whatever the rest is
    hidden = 24 if dtype_bytes == 4 else 26
    token = hidden * shape.hidden + dtype_bytes * (2 * q + 2 * kv + 4 * shape.intermediate)
    layer = rows * tokens * token
    if checkpointing:
        return layer + shape.layers * rows * tokens * shape.hidden * (4 if fp32_residual else dtype_bytes)
    return shape.layers * layer


def logits_bytes(shape: Shape, rows: int, completion: int, *, fused: bool = False, copies: float = 3) -> float:
    """
    Logits of a micro-batch and what their backward pass adds.

    Args:
        fused (`bool`): In tiles.
        copies (`float`): float32 tensors of `(b, C, V)` that are alive at the peak: 3 with gradient, also under autocast,
            1.25 without (1.75 under autocast); counted.
    """
    full = 4 * copies * rows * completion * shape.vocab
    return min(_TILE, full) if fused else full


def memory(
    shape: Shape,
    *,
    method: str = "prime",
    rank: int = 0,
    prm_rank: int = 0,
    prm_layers: int | None = None,
    shared_base: bool = False,
    reference: str = "frozen",
    rows: int = 1,
    prompt: int = 1024,
    completion: int = 3072,
    weight_bytes: float = 4,
    frozen_bytes: float = 2,
    reference_bytes: float = 4,
    dtype_bytes: float = 2,
    checkpointing: bool = True,
    fused_head: bool = True,
    prm_fused_head: bool = True,
    processes: int = 1,
) -> dict[str, float]:
    """
    Bytes on one device by what they are for.

    Args:
        method (`str`): `"prime"`, or `"grpo"`: without PRM and reference.
        rank, prm_rank (`int`): LoRA ranks, 0 = full.
        prm_layers (`int`, *optional*): Last layers that the PRM's adapter is on; all if not given.
        shared_base (`bool`): Policy, PRM and reference on one copy of the base.
        rows (`int`): Rows of a micro-batch.
        weight_bytes (`float`): Bytes of a trained weight; its gradient and Adam's two moments are as large.
        frozen_bytes (`float`): Bytes of a weight under an adapter (0.6 in 4 bits).
        reference_bytes (`float`): Bytes of a weight of a reference that is a copy of the PRM's start.
        dtype_bytes (`float`): Bytes of an activation.
        fused_head, prm_fused_head (`bool`): Whether the heads of policy and PRM are in tiles, TRL's or the PRM's own.
        processes (`int`): D; weights, gradients and moments are divided by it (FSDP2, ZeRO-3).
    """

    def trained(adapter_rank: int, layers: int | None = None) -> float:
        # Adapters are kept in float32 whatever the base is
        return 4 * (shape.last(layers).adapter(adapter_rank) * 4 if adapter_rank else shape.weights * weight_bytes)

    base = shape.weights * frozen_bytes
    parts = {"policy": trained(rank) + (base if rank else 0)}
    if method == "prime":
        parts["prm"] = trained(prm_rank, prm_layers) + (base if prm_rank and not shared_base else 0)
        if reference == "frozen" and not (shared_base or prm_rank):
            # A PRM with an adapter has its own base as reference
            parts["reference"] = shape.weights * reference_bytes
    parts = {name: value / processes for name, value in parts.items()}
    if processes > 1:
        # While a layer computes it is whole, the next one is being fetched, and the root keeps embedding and head
        parts["gathered"] = (2 * shape.body / shape.layers + shape.weights - shape.body) * dtype_bytes
    tokens = prompt + completion
    # Policy and PRM take turns: what counts is the larger of the two
    parts["activations"] = activation_bytes(
        shape,
        rows,
        tokens,
        dtype_bytes=dtype_bytes,
        checkpointing=checkpointing,
        fp32_residual=not rank or frozen_bytes == 4,
    )
    heads = [fused_head] if method == "grpo" else [fused_head, prm_fused_head]
    parts["logits"] = max(logits_bytes(shape, rows, completion, fused=is_fused) for is_fused in heads)
    return parts


# --- Worked examples ---


def seven_b_steps(
    *,
    rows: int = 1024,
    prompt: int = 256,
    mean: int = 1024,
    longest: int = 3072,
    devices: int = 8,
    peak: float = 312e12,
    utilisation: float = 0.4,
    bandwidth: float = 2.0e12 * 0.5,
) -> list[tuple[str, dict[str, float]]]:
    """Seconds of the parts of a step of Qwen2.5-7B, 256 prompts and K = 4, by setting."""
    rate = peak * utilisation
    generation = decode_seconds(
        QWEN2_5_7B, rows, prompt, longest, bandwidth=bandwidth, flops_per_second=rate, processes=devices
    )
    # Lengths are not known on paper, so all rows have the mean length, and TRL's padding to the longest is left out
    settings = {
        "GRPO": {"update": "grpo"},
        "GRPO with KL": {"update": "grpo", "kl": True},
        "PRIME, after": {},
        "PRIME, before": {"update": "before"},
        "PRIME, policy as reference": {"reference": "policy"},
        "PRIME, 4 PRM epochs": {"epochs": 4},
        "PRIME, LoRA of rank 16 on one base": {"rank": 16, "prm_rank": 16},
        "the same, the PRM's in the last 4 of 28 layers": {"rank": 16, "prm_rank": 16, "prm_layers": 4},
        "GRPO, LoRA of rank 16": {"update": "grpo", "rank": 16},
    }
    result = []
    for name, options in settings.items():
        flops = step_flops(QWEN2_5_7B, prompt, [mean] * rows, **options)
        seconds = {part: value / (devices * rate) for part, value in flops.items()}
        result.append((name, {"generation": generation, **seconds}))
    return result


def seven_b_memory() -> list[tuple[str, dict[str, float]]]:
    """Bytes on each device for Qwen2.5-7B, 1024 + 3072 tokens, one row in a micro-batch, by setting."""
    shape, lora = QWEN2_5_7B, {"rank": 16, "prm_rank": 16, "shared_base": True}
    return [
        ("8 x 80 GB, GRPO, FSDP", memory(shape, method="grpo", processes=8)),
        ("8 x 80 GB, PRIME, FSDP, frozen reference", memory(shape, processes=8)),
        (
            "8 x 80 GB, PRIME, FSDP, policy as reference",
            memory(shape, reference="policy", prm_fused_head=False, processes=8),
        ),
        ("1 x 24 GB, GRPO, LoRA", memory(shape, method="grpo", rank=16)),
        ("1 x 24 GB, PRIME, LoRA on one base", memory(shape, **lora)),
        ("the same, the PRM's in the last 4 layers", memory(shape, **lora, prm_layers=4)),
        ("1 x 24 GB, PRIME, LoRA on one base in 4 bits", memory(shape, **lora, frozen_bytes=0.6)),
    ]


def markdown(rows: list[tuple[str, dict[str, float]]], unit: float, digits: int) -> str:
    """A table with a column for each part and the sum."""
    columns = list(dict.fromkeys(name for _, parts in rows for name in parts))
    cells = [
        [
            name,
            *(f"{parts[c] / unit:.{digits}f}" if c in parts else "" for c in columns),
            f"{sum(parts.values()) / unit:.{digits}f}",
        ]
        for name, parts in rows
    ]
    return markdown_table(["", *columns, "sum"], cells)


if __name__ == "__main__":
    print(markdown(seven_b_steps(), 1, 0))
    print()
    print(markdown(seven_b_memory(), GB, 1))
