"""Log-probabilities of completions under a causal LM, in memory that grows with the micro-batch and not with the batch.

Covered: micro-batches of rows of like length, each cut to its own longest prompt and completion; temperature 1. Not
covered: token ids of text (`text.py`), which model (`model.py`), gradient accumulation (`updater.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn
from trl.trainer.utils import selective_log_softmax

try:
    from trl.trainer.utils import add_fused_lm_head
except ImportError:  # TRL before 1.15
    add_fused_lm_head = None

# Attribute of a model whose forward gives log-probabilities without logits
FUSED_LM_HEAD = "prime_fused_lm_head"


def length_sorted_chunks(
    prompt_mask: torch.Tensor, completion_mask: torch.Tensor, size: int
) -> Iterator[torch.Tensor]:
    """Row indices in chunks of at most `size`, rows of like length together, so that little is spent on padding."""
    lengths = prompt_mask.sum(1) + completion_mask.sum(1)
    if len(lengths):  # splitting nothing would give one empty chunk
        yield from lengths.argsort(descending=True, stable=True).split(size)


def completion_logps(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> torch.Tensor:
    """
    Log-probabilities of the completion tokens at temperature 1, of one micro-batch, with gradient.

    TRL's policy forward divides by the sampling temperature and must not be used here: the implicit reward is a ratio of
    the models' own distributions.

    Args:
        model (`nn.Module`): Causal LM.
        prompt_ids, prompt_mask (`torch.Tensor`): `(b, P)`, padded on the left.
        completion_ids, completion_mask (`torch.Tensor`): `(b, T)`, padded on the right.

    Returns:
        `torch.Tensor`: `(b, T)` float32, zero at padding.
    """
    num_tokens = completion_ids.shape[1]
    # Cut to the longest row. At least one column each, so that shapes stay those of a batch.
    prompt_len = max(int(prompt_mask.sum(1).amax()), 1)
    completion_len = max(int(completion_mask.sum(1).amax()), 1)
    prompt_ids, prompt_mask = prompt_ids[:, -prompt_len:], prompt_mask[:, -prompt_len:]
    completion_ids, completion_mask = completion_ids[:, :completion_len], completion_mask[:, :completion_len]
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    parameters = inspect.signature(unwrapped(model).forward).parameters
    if "position_ids" in parameters:
        # Explicit, so that a row's result does not depend on how far its neighbours pad it
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    if FUSED_LM_HEAD in vars(unwrapped(model)):
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :prompt_len] = -100
        logps = model(**inputs, labels=labels, fused_lm_head=True).log_probs[:, -completion_len:].float()
    else:
        if "logits_to_keep" in parameters:
            inputs["logits_to_keep"] = completion_len + 1
        logits = model(**inputs).logits[:, -completion_len - 1 : -1]
        # float32 whatever the autocast: PRM and reference must round alike, or their difference is noise
        logps = selective_log_softmax(logits.float(), completion_ids)
    logps = logps.masked_fill(completion_mask == 0, 0.0)
    return nn.functional.pad(logps, (0, num_tokens - completion_len))


def can_fuse_lm_head(model: nn.Module) -> bool:
    """Whether [`fuse_lm_head`] would work: with TRL from 1.15, and no adapter on the head, which it goes past."""
    return add_fused_lm_head is not None and type(unwrapped(model).get_output_embeddings()) is nn.Linear


def fuse_lm_head(model: nn.Module) -> None:
    """
    Let TRL's fused head compute the log-probabilities of a model in tiles: its logits, of tokens times vocabulary, are never
    held. Made for Triton; on a CPU it is slower.

    Args:
        model (`nn.Module`): Causal LM or PeftModel. Its forward stays as it was for all other callers.
    """
    base = unwrapped(model)
    add_fused_lm_head(base, temperature=1.0)
    setattr(base, FUSED_LM_HEAD, True)


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a data-parallel wrapper or a PeftModel."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def batch_completion_logps(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    micro_batch_size: int,
    rows: torch.Tensor | None = None,
    num_passes: int = 0,
) -> torch.Tensor:
    """
    [`completion_logps`] of a whole batch without gradient, in the order of its rows whatever the micro-batches.

    Args:
        micro_batch_size (`int`): Rows of one forward pass. The other arguments are those of [`completion_logps`], `(B, ...)`.
        rows (`torch.Tensor`, *optional*): `(B,)` bool, rows that are wanted; the others stay zero.
        num_passes (`int`): Least number of forward passes. Where weights are sharded a pass is a joint act of all
            processes, and one with fewer rows must not leave the others waiting.

    Returns:
        `torch.Tensor`: `(B, T)` float32.
    """
    inputs = (prompt_ids, prompt_mask, completion_ids, completion_mask)
    logps = torch.zeros(completion_ids.shape, dtype=torch.float32, device=completion_ids.device)
    wanted = torch.arange(len(logps), device=logps.device)
    wanted = wanted if rows is None else wanted[rows]
    chunks = [wanted[i] for i in length_sorted_chunks(prompt_mask[wanted], completion_mask[wanted], micro_batch_size)]
    was_training = model.training
    model.eval()
    try:
        for chunk in chunks:
            logps[chunk] = completion_logps(model, *(tensor[chunk] for tensor in inputs))
        for _ in range(num_passes - len(chunks)):
            completion_logps(model, *(tensor[:1] for tensor in inputs))
    finally:
        model.train(was_training)
    return logps
