"""The layers that PRM and reference have in common, computed once a batch.

A PRM that is an adapter of the last layers differs from its reference, the frozen base, from the first adapted layer on. What lies
below, the trunk, is the same computation in both and needs no gradient: a pass of the reference keeps the hidden states that leave
it, and the PRM's passes over the same rows begin with these.

Covered: which layers are shared, a comparison that decides whether they may be skipped, hidden states of the rows of a batch, and
how much memory they may take. Not covered: sharded models, whose passes are joint acts of all processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import logging

from .logps import example_rows, has_dropout, unwrapped
from .tiled_head import replaced_forward

if TYPE_CHECKING:
    from .model import ImplicitPRM

logger = logging.get_logger(__name__)

# Kept hidden states, those of replayed batches included, take at most this share of the device's memory
MEMORY_SHARE = 0.05
# Log-probabilities with a skipped trunk may differ by so many nats from plain ones: the order of a sum may change, nothing else
_TOLERANCE = 1e-4


class SharedTrunk:
    """
    The layers below the first adapted one of a PRM, which its reference has too.

    Args:
        layers (`list[nn.Module]`): Of the PRM, from the first to the last shared one.
        reference_layer (`nn.Module`): The reference's counterpart of the last of them.
    """

    def __init__(self, layers: list[nn.Module], reference_layer: nn.Module):
        self.layers = layers
        self.reference_layer = reference_layer
        # A layer returns a tuple of this length, hidden states first; `None` says that it returns them alone
        self._num_outputs: int | None = None

    @contextlib.contextmanager
    def captured(self) -> Iterator[list[torch.Tensor]]:
        """Around a pass of the reference: the hidden states that leave the trunk are put into the list."""
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            in_tuple = isinstance(output, tuple)
            self._num_outputs = len(output) if in_tuple else None
            found.append(output[0] if in_tuple else output)

        handle = self.reference_layer.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    @contextlib.contextmanager
    def skipped(self, hidden: torch.Tensor) -> Iterator[None]:
        """Around a pass of the PRM: its trunk computes nothing and gives these hidden states. All else is the model's own."""
        # Nobody asks for attention weights and router logits, which may come next
        output = hidden if self._num_outputs is None else (hidden, *[None] * (self._num_outputs - 1))
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(replaced_forward(layer, lambda *args, **kwargs: output))
            yield


class TrunkStates:
    """
    Hidden states of the rows of one batch where they leave the trunk, without padding.

    Args:
        trunk ([`SharedTrunk`]): The trunk.
        prompt_mask, completion_mask (`torch.Tensor`): `(B, P)` and `(B, T)`, those of the batch.
    """

    def __init__(self, trunk: SharedTrunk, prompt_mask: torch.Tensor, completion_mask: torch.Tensor):
        self.trunk = trunk
        self._lengths = torch.stack([prompt_mask.sum(1), completion_mask.sum(1)], dim=1).tolist()
        self._rows: dict[int, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that the hidden states take."""
        return sum(hidden.nbytes for hidden in self._rows.values())

    @contextlib.contextmanager
    def keep(self, rows: torch.Tensor) -> Iterator[None]:
        """Around a pass of the reference over `(b,)` rows of the batch: their hidden states are kept."""
        with self.trunk.captured() as found:
            yield
        spans, _ = self._layout(rows)
        for row, hidden in zip(spans, found[0], strict=True):
            self._rows[row] = hidden[spans[row]].clone()

    @contextlib.contextmanager
    def use(self, rows: torch.Tensor) -> Iterator[None]:
        """Around a pass of the PRM over `(b,)` rows of the batch: it begins with their hidden states, if all were kept."""
        spans, length = self._layout(rows)
        if not all(row in self._rows for row in spans):
            yield
            return
        first = self._rows[next(iter(spans))]
        hidden = first.new_zeros(len(spans), length, *first.shape[1:])
        for i, (row, span) in enumerate(spans.items()):
            hidden[i, span] = self._rows[row]
        with self.trunk.skipped(hidden):
            yield

    def _layout(self, rows: torch.Tensor) -> tuple[dict[int, slice], int]:
        """Where the tokens of each row are in a micro-batch that is cut to its longest prompt and completion, and its length."""
        lengths = {row: self._lengths[row] for row in rows.tolist()}
        prompt_len = max(1, *(prompt for prompt, _ in lengths.values()))
        completion_len = max(1, *(completion for _, completion in lengths.values()))
        spans = {
            row: slice(prompt_len - prompt, prompt_len + completion) for row, (prompt, completion) in lengths.items()
        }
        return spans, prompt_len + completion_len


def shared_trunk(prm: ImplicitPRM, batch: tuple[Any, ...] | None = None) -> SharedTrunk | None:
    """
    The trunk that PRM and reference share, if it may be skipped: a short pass that does so must give the log-probabilities of a
    plain one. The log says why it may not.

    Args:
        prm ([`ImplicitPRM`]): The PRM, where it computes.
        batch (`tuple`, *optional*): Rows of that pass, as [`ImplicitPRM.log_probs`] takes them. Defaults to two of any text.

    Returns:
        [`SharedTrunk`], *optional*: `None` for a PRM that is no adapter of the last layers of its reference.
    """
    found = _find_trunk(prm)
    if found is None:
        return None
    trunk, rest = found
    if has_dropout([module for module in unwrapped(prm.model).modules() if module not in rest]):
        return _refused("they have dropout")
    try:
        error = _difference(prm, trunk, example_rows(unwrapped(prm.model)) if batch is None else batch)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as reason:
        return _refused(f"a pass that begins above them fails ({type(reason).__name__}: {reason})")
    if not error <= _TOLERANCE:
        return _refused(f"a pass that begins above them gives log-probabilities that differ by {error:.2g} nats")
    logger.info(f"PRM and reference share their lowest {len(trunk.layers)} layers, which are computed once a batch.")
    return trunk


def _refused(reason: str) -> None:
    logger.warning(
        f"PRM and reference compute the layers below the PRM's adapter twice, because {reason}. Results are right, and slower."
    )


def _find_trunk(prm: ImplicitPRM) -> tuple[SharedTrunk, set[nn.Module]] | None:
    """The layers below the first in which PRM and reference differ, and all modules of the other layers."""
    model, reference = unwrapped(prm.model), prm.reference
    if reference is None or type(model) is not type(reference):
        return None
    weights = {id(parameter) for parameter in model.parameters()}
    layers, reference_layers = _decoder_layers(model), _decoder_layers(reference)
    if layers is None or not all(id(parameter) in weights for parameter in reference.parameters()):
        return None
    layer_of = {module: i for i, layer in enumerate(layers) for module in layer.modules()}
    first, head = len(layers), set(model.get_output_embeddings().modules())
    for module in model.modules():
        if _is_adapted(module) and module not in head:
            # An adapter of the embeddings, or of what is unknown here, is below all layers
            first = min(first, layer_of.get(module, 0))
    if first == 0:
        return None
    rest = {module for module, i in layer_of.items() if i >= first} | head
    return SharedTrunk(list(layers[:first]), reference_layers[first - 1]), rest


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or any(
        parameter.requires_grad for parameter in module.parameters(recurse=False)
    )


def _decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """The layers of a causal LM, or of the language model in one that sees images."""
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = [
        (name.count("."), module)
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    return min(lists, key=lambda found: found[0], default=(0, None))[1]


@torch.no_grad()
def _difference(prm: ImplicitPRM, trunk: SharedTrunk, batch: tuple[Any, ...]) -> float:
    """By how many nats the PRM's log-probabilities of a few rows differ at most, with and without the trunk."""
    states = TrunkStates(trunk, batch[1], batch[3])
    prm.reference_log_probs(*batch, around=states.keep)
    plain = prm.log_probs(*batch)
    skipped = prm.log_probs(*batch, around=states.use)
    return (skipped - plain).abs().amax().item()


def fits_in_memory(model: nn.Module, num_tokens: int, num_kept: int) -> bool:
    """
    Whether hidden states of so many tokens may be kept.

    Args:
        model (`nn.Module`): The reference.
        num_tokens (`int`): Tokens of the batch.
        num_kept (`int`): Bytes that other batches have kept.
    """
    weight = model.get_input_embeddings().weight
    needed = num_tokens * model.config.get_text_config().hidden_size * weight.element_size()
    if weight.device.type == "cpu":
        memory = psutil.virtual_memory().total
    else:
        memory = torch.get_device_module(weight.device).get_device_properties(weight.device).total_memory
    return num_kept + needed <= MEMORY_SHARE * memory
