"""Log-probabilities of completions under a causal LM, in memory that grows with the micro-batch and not with the batch.

Covered: micro-batches of rows of like length, each cut to its own longest prompt and completion; temperature 1; that a row's
result does not depend on the rows beside it. Not covered: the head in tiles (`tiled_head.py`), token ids of text (`texts.py`),
which model (`model.py`), gradient accumulation (`updater.py`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from .tiled_head import Float32Head, can_tile, head_gives_logps

try:
    from trl.trainer.utils import add_fused_lm_head
except ImportError:  # TRL before 1.15
    add_fused_lm_head = None

if TYPE_CHECKING:
    from ..images import RowImages

# Attribute of a model whose forward gives log-probabilities without logits
FUSED_LM_HEAD = "prime_fused_lm_head"
# Attribute of a model: with which heads, fused or not, it has passed `check_scoring`
_CHECKED = "prime_scoring_checked"
# By how many nats a row's log-probabilities may differ between two ways of computing them, in float32 and below it
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 0.02, 0.5


def rope_boundary(model: nn.Module) -> int | None:
    """
    The length in tokens from which LongRoPE (Phi-3) takes other position embeddings for a whole micro-batch, if its longest row
    has more.

    Args:
        model (`nn.Module`): Causal LM, PeftModel or wrapper.

    Returns:
        `int`, *optional*: Rows longer than that and others must not share a forward pass. `None` for all other models.
    """
    return next(
        (rope["original_max_position_embeddings"] for rope in _ropes(model) if rope["rope_type"] == "longrope"), None
    )


def _ropes(model: nn.Module) -> list[dict]:
    """The parameters of rotary position embeddings; some models have a set for each type of layer."""
    parameters = getattr(unwrapped(model).config.get_text_config(), "rope_parameters", None) or {}
    return [rope for rope in (parameters, *parameters.values()) if isinstance(rope, dict) and "rope_type" in rope]


def length_sorted_chunks(
    prompt_mask: torch.Tensor, completion_mask: torch.Tensor, size: int, boundary: int | None = None
) -> Iterator[torch.Tensor]:
    """
    Row indices in chunks of at most `size`, rows of like length together, so that little is spent on padding.

    Args:
        prompt_mask, completion_mask (`torch.Tensor`): `(B, P)` and `(B, T)`.
        size (`int`): Largest number of rows of a chunk.
        boundary (`int`, *optional*): Rows of more tokens than that are in other chunks than the rest, see [`rope_boundary`].

    Returns:
        `Iterator[torch.Tensor]`: [`num_chunks`] chunks at most.
    """
    lengths = prompt_mask.sum(1) + completion_mask.sum(1)
    order = lengths.argsort(descending=True, stable=True)
    num_long = 0 if boundary is None else int((lengths > boundary).sum())
    for part in (order[:num_long], order[num_long:]):
        if len(part):  # splitting nothing would give one empty chunk
            yield from part.split(size)


def num_chunks(num_rows: int, size: int, boundary: int | None = None) -> int:
    """How many chunks [`length_sorted_chunks`] makes of so many rows at most, whatever their lengths."""
    return -(-num_rows // size) + (boundary is not None and num_rows > 1)


def completion_logps(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    images: RowImages | None = None,
    *,
    entropies: bool = False,
) -> torch.Tensor:
    """
    Log-probabilities of the completion tokens at temperature 1, of one micro-batch, with gradient.

    TRL's policy forward divides by the sampling temperature and must not be used here: the implicit reward is a ratio of
    the models' own distributions.

    Args:
        model (`nn.Module`): Causal LM.
        prompt_ids, prompt_mask (`torch.Tensor`): `(b, P)`, padded on the left.
        completion_ids, completion_mask (`torch.Tensor`): `(b, T)`, padded on the right.
        images ([`~trl_prime.images.RowImages`], *optional*): What the model sees in each of the b rows.
        entropies (`bool`): Give the entropies of the distributions of these tokens instead, in nats. Without gradient.

    Returns:
        `torch.Tensor`: `(b, T)` float32, zero at padding.
    """
    num_tokens = completion_ids.shape[1]
    inputs, completion_len = micro_batch_inputs(
        model, prompt_ids, prompt_mask, completion_ids, completion_mask, images
    )
    completion_ids, completion_mask = completion_ids[:, :completion_len], completion_mask[:, :completion_len]
    base = unwrapped(model)
    if FUSED_LM_HEAD in vars(base) and not entropies:
        inputs.pop("logits_to_keep", None)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :-completion_len] = -100
        logps = model(**inputs, labels=labels, fused_lm_head=True).log_probs[:, -completion_len:].float()
    else:
        if can_tile(base):
            with head_gives_logps(base, completion_ids, completion_mask, entropies):
                logps = model(**inputs).logits.squeeze(-1)
        else:
            logits = model(**inputs).logits[:, -completion_len - 1 : -1]
            # float32 whatever the autocast: PRM and reference must round alike, or their difference is noise
            logits = logits.float()
            logps = entropy_from_logits(logits) if entropies else selective_log_softmax(logits, completion_ids)
    logps = logps.masked_fill(completion_mask == 0, 0.0)
    return nn.functional.pad(logps, (0, num_tokens - completion_len))


def micro_batch_inputs(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    images: RowImages | None = None,
) -> tuple[dict[str, torch.Tensor | int | bool], int]:
    """
    What the forward pass over a micro-batch takes, cut to its longest prompt and its longest completion. The head need not compute
    more than the completion and the position before it.

    Args:
        model (`nn.Module`): Causal LM.
        prompt_ids, prompt_mask (`torch.Tensor`): `(b, P)`, padded on the left.
        completion_ids, completion_mask (`torch.Tensor`): `(b, T)`, padded on the right.
        images ([`~trl_prime.images.RowImages`], *optional*): What the model sees in each of the b rows.

    Returns:
        `tuple[dict, int]`: keyword arguments of the model, and tokens of the longest completion, 1 at least.
    """
    # At least one column each, so that shapes stay those of a batch
    prompt_len = max(int(prompt_mask.sum(1).amax()), 1)
    completion_len = max(int(completion_mask.sum(1).amax()), 1)
    masks = (prompt_mask[:, -prompt_len:], completion_mask[:, :completion_len])
    input_ids = torch.cat([prompt_ids[:, -prompt_len:], completion_ids[:, :completion_len]], dim=1)
    attention_mask = torch.cat(masks, dim=1)
    _check_lengths(model, attention_mask)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    inputs |= {} if images is None else images.inputs(*masks)
    parameters = inspect.signature(unwrapped(model).forward).parameters
    # Patches have places in time, height and width, which models that know them by a grid find by the attention mask
    if "position_ids" in parameters and "image_grid_thw" not in inputs:
        # Explicit, so that a row's result does not depend on how far its neighbours pad it
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = completion_len + 1
    return inputs, completion_len


def _check_lengths(model: nn.Module, attention_mask: torch.Tensor) -> None:
    """Refuse rows whose position embeddings depend on other rows."""
    boundary = rope_boundary(model)
    limit = unwrapped(model).config.get_text_config().max_position_embeddings if _has_dynamic_rope(model) else None
    if boundary is None and limit is None:
        return
    lengths = attention_mask.sum(1)
    if limit is not None and (lengths > limit).any():
        raise NotImplementedError(
            f"A row of {int(lengths.max())} tokens is longer than max_position_embeddings={limit}, from where on the model's "
            "dynamic position embeddings depend on the rows scored before. Lower max_completion_length, or use another rope_type."
        )
    if boundary is not None and (lengths > boundary).any() and not (lengths > boundary).all():
        raise NotImplementedError(
            f"The model's position embeddings (LongRoPE) change for rows of more than {boundary} tokens, and rows of "
            f"{int(lengths.min())} and {int(lengths.max())} tokens share a batch, where the long ones would change the scores of "
            "the others. Use per_device_train_batch_size=1, or leave out the longer rows."
        )


def _has_dynamic_rope(model: nn.Module) -> bool:
    return any("dynamic" in rope["rope_type"] for rope in _ropes(model))


@torch.no_grad()
def check_scoring(model: nn.Module) -> None:
    """
    Compare [`completion_logps`] once with a plain forward pass of one row by itself: padding, the cut of the logits and a fused
    head must not change a row's log-probabilities. What a model passed once it need not pass again.

    Args:
        model (`nn.Module`): Causal LM or PeftModel, in evaluation mode.

    Raises:
        NotImplementedError: They do. Recurrent models that ignore the attention mask, such as RWKV and xLSTM, read the padding
            before a prompt; some heads do more than TRL's fused one knows.
    """
    base = unwrapped(model)
    is_fused, passed = FUSED_LM_HEAD in vars(base), vars(base).get(_CHECKED, set())
    if is_fused in passed:
        return
    batch = prompt_ids, _, completion_ids, _ = example_rows(base)
    ids = torch.cat([prompt_ids[:1, 3:], completion_ids[:1, :3]], dim=1)
    try:
        padded = completion_logps(model, *batch)[0, :3]
    except AttributeError as error:
        if not is_fused:
            raise
        raise NotImplementedError(
            f"TRL's fused head does not run on {type(base).__name__} ({error}). Set prm_fused_lm_head=False."
        ) from error
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 1:-1]
    alone = selective_log_softmax(logits.float(), ids[:, 2:])[0]
    rounds = (
        any(parameter.dtype != torch.float32 for parameter in base.parameters())
        or torch.is_autocast_enabled(ids.device.type)
        or (ids.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32)
    )
    error = (padded - alone).abs().amax().item()
    if error > (_LOW_PRECISION_TOLERANCE if rounds else _TOLERANCE):
        if is_fused:
            raise NotImplementedError(
                f"The log-probabilities of {type(base).__name__} by TRL's fused head differ from the plain ones by {error:.2g} "
                "nats: it leaves out a part of this model's head. Set prm_fused_lm_head=False."
            )
        raise NotImplementedError(
            f"The log-probabilities that {type(base).__name__} gives a completion change by {error:.2g} nats with the padding "
            "around it: the model ignores the attention mask, and prompts of different lengths cannot share a batch. Use a "
            "model of another architecture."
        )
    setattr(base, _CHECKED, {*passed, is_fused})


def check_sees(model: nn.Module) -> None:
    """
    Refuse a model that takes no images: it would read the text, and pass over what the policy was shown.

    Args:
        model (`nn.Module`): Causal LM or PeftModel.

    Raises:
        ValueError: Its forward has no argument for them.
    """
    base = unwrapped(model)
    # By name: most text models take any further arguments, and ignore them
    if "pixel_values" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"Prompts have images, but {type(base).__name__}, the implicit PRM or its reference, reads text only. Leave prm_model out, "
            "or set it to a vision-language model of the policy's family."
        )


def example_rows(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    A micro-batch to try a model on: a short row beside a longer one, so that it is padded before its prompt and after its
    completion.

    Args:
        model (`nn.Module`): Causal LM.

    Returns:
        `tuple[torch.Tensor, ...]`: prompt ids and mask `(2, 5)`, completion ids and mask `(2, 6)`.
    """
    config = model.config.get_text_config()
    ids = torch.arange(22, device=model.get_input_embeddings().weight.device).view(2, 11) * 7 + 3
    ids %= config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[0, 8:] = 0
    ids[mask == 0] = config.pad_token_id or 0
    return ids[:, :5], mask[:, :5], ids[:, 5:], mask[:, 5:]


def has_dropout(modules: Iterable[nn.Module]) -> bool:
    """Whether a training pass differs from an evaluation pass by chance: dropout as a module or as a rate of attention."""
    return any(
        isinstance(value, float) and value > 0
        for module in modules
        for name, value in vars(module).items()
        if "dropout" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout))
    )


def can_fuse_lm_head(model: nn.Module) -> bool:
    """Whether [`fuse_lm_head`] would work: with TRL from 1.15, and no adapter on the head, which it goes past."""
    return add_fused_lm_head is not None and type(unwrapped(model).get_output_embeddings()) in (nn.Linear, Float32Head)


def fuse_lm_head(model: nn.Module) -> None:
    """
    Let TRL's fused head compute the log-probabilities of a model in tiles: its logits, of tokens times vocabulary, are never
    held. Made for Triton; on a CPU it is slower.

    Args:
        model (`nn.Module`): Causal LM or PeftModel. Its forward stays as it was for all other callers.
    """
    base = unwrapped(model)
    in_float32 = isinstance(base.get_output_embeddings(), Float32Head)
    add_fused_lm_head(base, temperature=1.0, cast_lm_head_to_fp32=in_float32)
    setattr(base, FUSED_LM_HEAD, True)


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """
    Around forward passes that compute in float32, outside of an autocast context.

    Args:
        model (`nn.Module`): Causal LM or PeftModel with float32 weights. Its instance may have a forward of its own, an autocast
            that accelerate has put on it or TRL's fused head: the class's forward takes its place for so long.
    """
    own = [(module, module.__dict__) for module in {model, unwrapped(model)}]
    hidden = [(module, {k: d.pop(k) for k in ("forward", FUSED_LM_HEAD) if k in d}) for module, d in own]
    try:
        yield
    finally:
        for module, attributes in hidden:
            module.__dict__.update(attributes)


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
    images: RowImages | None = None,
    *,
    rows: torch.Tensor | None = None,
    num_passes: int = 0,
    around: Callable[[torch.Tensor], AbstractContextManager] = contextlib.nullcontext,
    entropies: bool = False,
) -> torch.Tensor:
    """
    [`completion_logps`] of a whole batch without gradient, in the order of its rows whatever the micro-batches.

    Args:
        micro_batch_size (`int`): Rows of one forward pass. The other arguments are those of [`completion_logps`], `(B, ...)`.
        rows (`torch.Tensor`, *optional*): `(B,)` bool, rows that are wanted; the others stay zero.
        num_passes (`int`): Least number of forward passes. Where weights are sharded a pass is a joint act of all
            processes, and one with fewer rows must not leave the others waiting.
        around (`Callable[[torch.Tensor], AbstractContextManager]`): Makes the context of the pass over `(b,)` rows, such as
            [`~trl_prime.implicit_prm.trunk.TrunkStates.keep`].
        entropies (`bool`): As in [`completion_logps`].

    Returns:
        `torch.Tensor`: `(B, T)` float32.
    """
    inputs = (prompt_ids, prompt_mask, completion_ids, completion_mask, *([] if images is None else [images]))
    logps = torch.zeros(completion_ids.shape, dtype=torch.float32, device=completion_ids.device)
    with evaluating(model):
        check_scoring(model)
        compute = functools.partial(completion_logps, entropies=entropies)
        fill_by_micro_batches(
            logps, compute, model, inputs, micro_batch_size, rows=rows, num_passes=num_passes, around=around
        )
    return logps


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """For so long a model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def fill_by_micro_batches(
    result: torch.Tensor,
    compute: Callable[..., torch.Tensor],
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    micro_batch_size: int,
    *,
    rows: torch.Tensor | None = None,
    num_passes: int = 0,
    around: Callable[[torch.Tensor], AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """
    Compute something of the completions of a batch, rows of like length together.

    Args:
        result (`torch.Tensor`): `(B, T, ...)`, is filled.
        compute (`Callable`): Gives the `(b, T, ...)` of the model and the inputs of a micro-batch.
        model (`nn.Module`): Causal LM.
        inputs (`tuple[torch.Tensor, ...]`): Prompt ids and mask, completion ids and mask, `(B, ...)`.
        micro_batch_size, rows, num_passes, around: As in [`batch_completion_logps`].
    """
    wanted = torch.arange(len(result), device=result.device)
    wanted = wanted if rows is None else wanted[rows]
    masks, boundary = (inputs[1][wanted], inputs[3][wanted]), rope_boundary(model)
    chunks = [wanted[i] for i in length_sorted_chunks(*masks, micro_batch_size, boundary)]
    for chunk in chunks:
        with around(chunk):
            result[chunk] = compute(model, *(tensor[chunk] for tensor in inputs))
    for _ in range(num_passes - len(chunks)):
        compute(model, *(tensor[:1] for tensor in inputs))
