"""Copies of a model that stay apart from it: PRM and reference start from the policy, and then all three go their own ways.

`copy.deepcopy` copies weights, modules, bound methods and objects, but not what a plain function has closed over. A forward
or hook that TRL put on an instance of the policy so goes on using the policy's weights in the copy. Here is what copies a
model without such functions, what shares weights that nobody trains, and what tells whether weights were changed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .logps import FUSED_LM_HEAD, unwrapped
from .tiled_head import Float32Head

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def copied(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """
    A copy that computes with its own weights only.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model, patched by TRL or not.

    Returns:
        The same type as `model`, with the class's own forward.
    """
    return _with_own_functions(copy.deepcopy(model))


def share_parameters(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """
    A second module tree over the same parameters and buffers: another adapter can be put on it at no cost in memory.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model to share.

    Returns:
        The same type as `model`, with the class's own forward.
    """
    memo = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return _with_own_functions(copy.deepcopy(model, memo))


def _with_own_functions(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Take from a fresh copy every forward and hook that belongs to the original, TRL's above all."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Where gradient checkpointing needs this hook, who trains the copy asks for it again
    base.disable_input_require_grads()
    base.__dict__.pop(FUSED_LM_HEAD, None)
    for module in model.modules():
        for name in _HOOKS:
            hooks = getattr(module, name)
            for key in [key for key, hook in hooks.items() if not _is_copied(hook)]:
                del hooks[key]
        forward = module.__dict__.get("forward")
        # TRL's fused forward of the whole model may close over nothing, but answers with log-probabilities
        if forward is None or (module is not base and _is_copied(forward)):
            continue
        del module.__dict__["forward"]
        if hasattr(module, "_hf_hook"):  # accelerate's, which moves inputs between devices, is under or over it
            if not _is_copied(module.__dict__.get("_old_forward")):
                del module.__dict__["_old_forward"]
            add_hook_to_module(module, module._hf_hook)
    return model


def _is_copied(function: Any) -> bool:
    """Whether `copy.deepcopy` has copied all that a function reaches: it leaves a plain function's closure and defaults."""
    if isinstance(function, functools.partial):
        return _is_copied(function.func)
    if isinstance(function, types.MethodType):
        return _is_copied(function.__func__)
    if not isinstance(function, types.FunctionType):
        return True
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return all(map(_is_constant, [*(cell.cell_contents for cell in function.__closure__ or ()), *defaults]))


def _is_constant(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        return _is_copied(value)
    constants = (
        int,
        float,
        str,
        type(None),
        torch.dtype,
        torch.device,
        type,
        types.ModuleType,
        types.BuiltinFunctionType,
    )
    return isinstance(value, constants)


def bare_base(model: PeftModel) -> PreTrainedModel:
    """
    The frozen base model without its adapter. It shares the weights that the adapter leaves alone; biases that the adapter
    trains are copied. `model` stays as it is.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    memo = {id(tensor): tensor for tensor in itertools.chain(frozen, model.buffers())}
    clone = _with_own_functions(copy.deepcopy(model, memo))
    for name, module in list(clone.named_modules()):
        # PEFT would put the trained copy of a module in the place of the original
        if isinstance(module, AuxiliaryTrainingWrapper):
            clone.set_submodule(name, module.original_module)
    base = clone.base_model.unload() if hasattr(clone.base_model, "unload") else clone.get_base_model()
    return base.requires_grad_(False)


def is_fresh(model: PeftModel) -> bool:
    """
    Whether the adapter still is the identity, as right after `get_peft_model`, or one of virtual tokens, which no weights
    of the base can hold.
    """
    if model.active_peft_config.is_prompt_learning:
        return True
    last_factors = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_A" in name]
    return bool(last_factors) and not any(p.any() for p in last_factors) and not any(map(_is_changed, model.modules()))


def _is_changed(module: nn.Module) -> bool:
    """Whether a wrapper of PEFT around a whole module computes something else than the original."""
    if isinstance(module, ModulesToSaveWrapper):
        original = module.original_module.state_dict()
        return any(
            not torch.equal(tensor, original[name])
            for trained in module.modules_to_save.values()
            for name, tensor in trained.state_dict().items()
        )
    if isinstance(module, TrainableTokensWrapper):
        layer, weight = module.token_adapter, module.original_module.weight
        return any(
            not torch.equal(rows, weight[layer.token_indices[name]].to(rows))
            for name, rows in layer.trainable_tokens_delta.items()
        )
    return False


def fingerprints(model: nn.Module) -> dict[str, tuple[int, int]]:
    """
    Of each parameter where it lies and the sum of its bits, which change when its weights do, in whatever way.

    Args:
        model (`nn.Module`): The model; parameters without plain memory on this process are left out.
    """
    return {name: (p.data_ptr(), _sum_of_bits(p.detach())) for name, p in model.named_parameters() if _has_memory(p)}


def _has_memory(parameter: nn.Parameter) -> bool:
    return parameter.numel() > 0 and not parameter.is_meta and not is_traceable_wrapper_subclass(parameter)


def _sum_of_bits(tensor: torch.Tensor) -> int:
    octets = tensor.contiguous().flatten().view(torch.uint8)
    octets = octets.clone() if octets.storage_offset() % 8 else octets
    whole = len(octets) // 8 * 8
    # As integers of 8 bytes, because a sum of single bytes would need eight times the memory
    return int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum())


def check_apart(policy: nn.Module | None, prm: nn.Module, reference: nn.Module | None) -> None:
    """
    Raise unless what one of the models trains is in none of the others.

    Raises:
        ValueError: Two of them share a weight that one of them trains.
    """
    models = {"the policy": policy, "the PRM": prm, "the PRM's reference": reference}
    models = {name: model for name, model in models.items() if model is not None}
    for trained, other in itertools.permutations(models, 2):
        of_other = {pointer for p in models[other].parameters() if (pointer := _address(p))}
        for name, parameter in models[trained].named_parameters():
            if parameter.requires_grad and _address(parameter) in of_other:
                raise ValueError(
                    f"{trained.capitalize()} trains {name!r}, which {other} holds too and would move along. Pass models that "
                    "share no weights, or leave prm_model out: the PRM then starts as a copy of the policy."
                )


def _address(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage().data_ptr() if _has_memory(parameter) else 0


def _heads(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """The linear layers that make up the head: the original and those trained in its place, without an adapter on them."""
    head = unwrapped(model).get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper):
        return [head.original_module, *getattr(head, "modules_to_save", {}).values()]
    return [head.get_base_layer() if isinstance(head, BaseTunerLayer) else head]


def has_float32_head(model: PreTrainedModel | PeftModel) -> bool:
    """Whether [`compute_head_in_float32`] was called for this model."""
    return any(isinstance(linear, Float32Head) for linear in _heads(model))


def compute_head_in_float32(model: PreTrainedModel | PeftModel) -> None:
    """
    Do for one model what TRL's `cast_lm_head_to_fp32` does for the policy, without casting a weight that it may share.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model; only the class of its head is changed.

    Raises:
        ValueError: The head is not a plain linear layer.
    """
    for linear in _heads(model):
        if type(linear) not in (nn.Linear, Float32Head):
            raise ValueError(
                f"cast_lm_head_to_fp32=True needs a plain linear head, but that of PRM or reference is a {type(linear).__name__}. "
                "Leave it out."
            )
        linear.__dict__.pop("forward", None)  # TRL's, where this is the policy
        linear.__class__ = Float32Head
