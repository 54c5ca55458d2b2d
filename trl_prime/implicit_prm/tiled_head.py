"""Log-probabilities from the head of a causal LM in tiles of tokens, so that the logits of a micro-batch are never held whole.

Covered: heads that are linear layers, trained or frozen, and all others, such as those with an adapter; whether a model's
logits are what its head gives. Not covered: TRL's fused head, and which tokens of which rows (`logps.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

# Logits of a tile: on a CPU as few as cost no time, on other devices as many as TRL's fused head takes
_TILE, _DEVICE_TILE = 2**23, 2**27
# Attribute of a model: how many logits a token has where they are what the head gives, else 0
_NUM_LOGITS = "prime_num_logits"


class Float32Head(nn.Linear):
    """A language-model head that computes in float32 whatever its own dtype and the autocast."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden_states.float(), self.weight.float(), bias)


def can_tile(model: nn.Module) -> bool:
    """
    Whether the log-probabilities of a model follow from its head alone: its weights are whole on this process, and the forward
    of the model gives the head's logits as they are, neither scaled nor capped nor cut.

    Args:
        model (`nn.Module`): Hugging Face model, without wrappers. The first call makes a forward pass over two tokens.
    """
    head = model.get_output_embeddings()
    is_whole = head is not None and not any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in head.parameters())
    if _NUM_LOGITS not in vars(model):
        # A head that was sharded once is whole only as long as FSDP2 or ZeRO-3 needs it
        setattr(model, _NUM_LOGITS, _num_logits(model, head) if is_whole else 0)
    return is_whole and getattr(model, _NUM_LOGITS) > 0


@torch.no_grad()
def _num_logits(model: nn.Module, head: nn.Module) -> int:
    own, calls = head.forward, []

    def forward(hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        logits = own(hidden, *args, **kwargs)
        # Values that nothing leaves as they are which is done to logits. A copy, because it may be done in place.
        ramp = torch.linspace(-100, 100, logits.numel(), device=logits.device).view_as(logits).to(logits)
        calls.append((hidden.shape, ramp.clone()))
        return ramp

    ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    was_training = model.training
    model.eval()  # dropout would take random numbers from the run
    try:
        with replaced_forward(head, forward), _uncached_autocast(ids.device.type):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        model.train(was_training)
    if len(calls) != 1:
        return 0
    shape, given = calls[0]
    as_given = logits.shape == given.shape and shape[:-1] == ids.shape and torch.equal(logits.to(given), given)
    return logits.shape[-1] if as_given else 0


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """For so long a module computes something else; its hooks, which may bring its weights, are called as before."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def head_gives_logps(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, entropies: bool = False
) -> Iterator[None]:
    """
    Around a forward pass of a model for which [`can_tile`] is true: instead of logits it gives log-probabilities, `(b, T, 1)`
    in float32, of tokens that end one position before its last.

    Args:
        model (`nn.Module`): Hugging Face model. What is called may be a wrapper around it.
        ids, mask (`torch.Tensor`): `(b, T)`, the tokens and which of them are wanted; the others get 0.
        entropies (`bool`): Give the entropies of the distributions of these tokens instead, without gradient.
    """
    head = model.get_output_embeddings()
    own, num_logits, num_tokens = head.forward, getattr(model, _NUM_LOGITS), ids.shape[1]
    is_linear = type(head) in (nn.Linear, Float32Head) and "forward" not in vars(head)

    def forward(hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        wanted, device = mask.to(hidden.device).bool(), hidden.device
        states, targets = hidden[:, -num_tokens - 1 : -1][wanted], ids.to(device)[wanted]
        tile = max((_TILE if device.type == "cpu" else _DEVICE_TILE) // num_logits, 1)
        # At least one, though without tokens, so that weights are in the graph: DDP waits for their gradients
        num_tiles = max(-(-len(states) // tile), 1)
        if entropies:
            with torch.no_grad():
                tiles = (_log_softmax(own(tile.unsqueeze(0))[0]) for tile in states.tensor_split(num_tiles))
                logps = torch.cat([torch.special.entr(tile.exp()).sum(-1) for tile in tiles])
        elif is_linear:
            logps = _linear_logps(head, states, targets, num_tiles)
        else:
            logps = _other_logps(lambda h: own(h, *args, **kwargs), states, targets, num_tiles)
        logps = torch.zeros(wanted.shape, device=device).masked_scatter(wanted, logps.to(device))
        return logps.unsqueeze(-1)

    with replaced_forward(head, forward):
        yield


def _other_logps(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor, num_tiles: int
) -> torch.Tensor:
    """`(n,)` log-probabilities by any head; the backward pass computes it again."""
    device = hidden.device.type
    # Each tile casts weights for itself: in a cast that all share, their gradients would be added up in low precision
    autocast = _uncached_autocast(device)

    def tile_logps(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with autocast:
            logits = head(hidden.unsqueeze(0))[0]
        return _log_softmax(logits).gather(1, targets.to(logits.device)[:, None])[:, 0]

    if torch.is_grad_enabled() and num_tiles > 1:
        parts = [
            checkpoint(tile_logps, *tile, use_reentrant=False)
            for tile in zip(hidden.tensor_split(num_tiles), targets.tensor_split(num_tiles), strict=True)
        ]
    else:
        parts = map(tile_logps, hidden.tensor_split(num_tiles), targets.tensor_split(num_tiles))
    return torch.cat(list(parts))


def _uncached_autocast(device: str) -> torch.autocast:
    """
    The present autocast without its cache of casted weights. A cast without gradient must not stay there: torch 2.7 gives
    it to passes with gradient too.
    """
    return torch.autocast(
        device,
        enabled=torch.is_autocast_enabled(device),
        dtype=torch.get_autocast_dtype(device),
        cache_enabled=False,
    )


def _linear_logps(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """`(n,)` log-probabilities by a linear head, in the dtype in which it would compute its logits."""
    device = hidden.device.type
    if isinstance(head, Float32Head):
        dtype = torch.float32
    else:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    hidden, has_gradient = hidden.to(dtype), torch.is_grad_enabled()
    if num_tiles == 1 and has_gradient and any(p.requires_grad for p in head.parameters()):
        return _all_logps(hidden, weight, bias).gather(1, targets[:, None])[:, 0]  # nothing need be computed again
    return _LinearLogps.apply(hidden, weight, bias, targets, num_tiles, has_gradient)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    # float32 whatever the autocast: PRM and reference must round alike, or their difference is noise
    return logits.log_softmax(-1, dtype=torch.float32)


def _all_logps(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`(n, V)` log-probabilities of all tokens."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _log_softmax(nn.functional.linear(hidden, weight, bias))


class _LinearLogps(torch.autograd.Function):
    """
    Log-probabilities of targets by a linear head, `log softmax(W h + b)[y]`.

    Their gradient by the logits is `onehot(y) - p`. Where the head is frozen, all that a backward pass needs of it is that
    times W, of the size of the hidden states, and the forward pass computes it while it has p. Where the head is trained, the
    backward pass computes p again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, num_tiles, has_gradient):
        is_trained = any(ctx.needs_input_grad[1:3])
        keeps_gradient = has_gradient and not is_trained and ctx.needs_input_grad[0]
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        by_hidden = torch.empty_like(hidden if keeps_gradient else hidden[:0])
        tiles = (tensor.tensor_split(num_tiles) for tensor in (hidden, targets[:, None], result, by_hidden))
        for states, target, logp, by_states in zip(*tiles, strict=True):
            logps = _all_logps(states, weight, bias)
            logp.copy_(logps.gather(1, target)[:, 0])
            if keeps_gradient:
                by_logits = logps.exp_().neg_()
                by_logits.scatter_add_(1, target, torch.ones_like(target, dtype=torch.float32))
                by_states.copy_(by_logits.to(weight.dtype) @ weight)
        ctx.num_tiles = num_tiles
        ctx.save_for_backward(*((hidden, weight, bias, targets) if is_trained else (by_hidden,)))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if len(ctx.saved_tensors) == 1:
            return (gradient[:, None] * ctx.saved_tensors[0], *[None] * 5)
        hidden, weight, bias, targets = ctx.saved_tensors
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight, dtype=torch.float32)
        by_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        columns = (hidden, targets[:, None], gradient[:, None], by_hidden)
        tiles = (tensor.tensor_split(ctx.num_tiles) for tensor in columns)
        for states, target, by_logp, by_states in zip(*tiles, strict=True):
            by_logits = _all_logps(states, weight, bias).exp_().mul_(-by_logp)
            by_logits.scatter_add_(1, target, by_logp)
            by_states.copy_(by_logits.to(weight.dtype) @ weight)
            # Sums over tiles in float32, as those within one
            by_weight.addmm_(by_logits.t(), states.float())
            if bias is not None:
                by_bias += by_logits.sum(0)
        return (
            by_hidden,
            by_weight.to(weight.dtype),
            None if bias is None else by_bias.to(bias.dtype),
            None,
            None,
            None,
        )
