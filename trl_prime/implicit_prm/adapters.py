"""Adapters that the PRM may be trained as: the base model under them is the reference, and stays as it is."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .copies import fingerprints, share_parameters

QUANTIZED = (
    "The PRM would be trained as a whole, but its start is quantized, and only an adapter can be trained on that. Pass "
    "prm_peft_config, or an unquantized prm_model."
)


def no_virtual_tokens(config: PeftConfig) -> str:
    """Why prompt and prefix tuning are no adapters of a PRM."""
    return (
        f"The PRM's adapter is a {type(config).__name__}, whose virtual tokens make it differ from its reference before it has "
        "learnt anything. Use an adapter of the weights, such as LoraConfig."
    )


def with_adapter(model: PreTrainedModel, config: PeftConfig, **kwargs: Any) -> PeftModel:
    """
    Put a new adapter on a base model whose weights others use too.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        config ([`~peft.PeftConfig`]): The adapter.
        **kwargs: Of `get_peft_model`.

    Returns:
        [`~peft.PeftModel`]

    Raises:
        ValueError: The adapter is one of virtual tokens, or has rewritten the base, which is of no use any more then.
    """
    if config.is_prompt_learning:
        raise ValueError(no_virtual_tokens(config))
    weights, before = list(model.parameters()), fingerprints(model)
    shared = share_parameters(model)
    adapted = get_peft_model(model.requires_grad_(False), config, **kwargs)
    kept, after = {id(p) for p in adapted.parameters()}, fingerprints(shared)
    changed = [name for name in before if before[name] != after[name]]
    if changed or not all(id(p) in kept for p in weights):
        raise ValueError(
            f"The PRM's adapter with init_lora_weights={getattr(config, 'init_lora_weights', None)!r} rewrites weights of the base "
            f"model ({', '.join(changed[:1]) or 'by others'}), which is the reference too, and the policy's base where that has an "
            "adapter. Use an initialisation that leaves the base alone: init_lora_weights=True, 'gaussian' or 'orthogonal'."
        )
    return adapted


def check_base_frozen(base: PreTrainedModel) -> None:
    """Raise a ValueError if an adapter trains weights of the base model too, biases for instance."""
    trainable = next((name for name, p in base.named_parameters() if p.requires_grad), None)
    if trainable is not None:
        raise ValueError(
            f"The PRM's adapter trains {trainable!r} of the base model, which is the reference too and would move along. Use "
            "bias='none'."
        )


def below_last_layers(config: PretrainedConfig, num_layers: int) -> str:
    """
    What an adapter of the last layers leaves out, for `exclude_modules` of a [`~peft.LoraConfig`] that targets `"all-linear"` or
    modules by their last name. In a model that sees images that is its vision tower, too, which is below all layers.

    Args:
        config ([`~transformers.PretrainedConfig`]): Of the model.
        num_layers (`int`): How many of the last layers the adapter is on.

    Returns:
        `str`: regular expression of the modules below these layers.

    Raises:
        ValueError: The model has no more layers than that.
    """
    in_all = config.get_text_config().num_hidden_layers
    if not 0 < num_layers < in_all:
        raise ValueError(
            f"prm_lora_layers is {num_layers}, but must be from 1 to {in_all - 1}: the model has {in_all} layers. Leave it out for "
            "an adapter of all of them."
        )
    below = rf"\D*\.({'|'.join(map(str, range(in_all - num_layers)))})\..*"
    return below if config.get_text_config() is config else rf"{below}|(?!.*\b(language_model|text_model)\.).*"


def rewrites_base(config: PeftConfig) -> bool:
    """Whether making such an adapter changes the layer it is put on, by making one on a small layer."""
    init = getattr(config, "init_lora_weights", None)
    if not isinstance(init, str):
        return False
    small = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    before = fingerprints(small)["layer.weight"]
    try:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=init), small)
    except (AttributeError, KeyError, TypeError, ValueError):
        return True  # it looks at data first, which is done to find a better base
    return fingerprints(small)["layer.base_layer.weight"] != before


def check_adapter(model: PeftModel) -> None:
    """
    Raise unless the base model under an adapter that somebody else has made can be the PRM's reference.

    Args:
        model ([`~peft.PeftModel`]): Start of a PRM.

    Raises:
        ValueError: The adapter has virtual tokens, trains biases of the base, or has rewritten it.
    """
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(no_virtual_tokens(model.active_peft_config))
    if any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values()):
        raise ValueError(
            "prm_model is a PeftModel that trains biases of its base model, so that the base is not what it was and no "
            "reference. Use bias='none'."
        )
    if any(map(rewrites_base, model.peft_config.values())):
        raise ValueError(
            f"prm_model is a PeftModel with init_lora_weights={model.active_peft_config.init_lora_weights!r}, which has "
            "rewritten its base model, so that the base is not what it was and no reference. Merge the adapter "
            "(merge_and_unload) and pass the result."
        )
