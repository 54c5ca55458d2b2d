"""Models and adapters from files, as the class that a checkpoint names and without a weight left out.

Covered: the architecture of a checkpoint, which need not be the one that `AutoModelForCausalLM` takes (Gemma 3 and Qwen3.5
come as `...ForConditionalGeneration`); adapters, all of whose weights have to find their place. Not covered: which data
type and which model (`model.py`).
"""

from __future__ import annotations

import os
from typing import Any

import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import create_model_from_path

# Arguments that say where a checkpoint is: its configuration needs them as its weights do
_PLACE = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code")


def load_model(name_or_path: str | os.PathLike, architecture: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """
    Load a model as the class that its checkpoint names, which is the class that TRL trains.

    Args:
        name_or_path (`str`): Folder or Hub id.
        architecture (`str`, *optional*): Name of the class of transformers that it was trained as, where that is known.
        **kwargs: Passed to `from_pretrained`. `dtype` defaults to `"auto"`, that of the checkpoint.

    Returns:
        [`~transformers.PreTrainedModel`]
    """
    known = getattr(transformers, architecture or "", None)
    if known is None:
        place = {name: kwargs[name] for name in _PLACE if name in kwargs}
        architectures = AutoConfig.from_pretrained(name_or_path, **place).architectures
        # For the class of a remote-code checkpoint, which is none of transformers, TRL looks by itself
        known = getattr(transformers, architectures[0], None) if architectures else AutoModelForCausalLM
    return create_model_from_path(str(name_or_path), known, **{"device_map": None, "dtype": "auto", **kwargs})


def load_adapter(base: PreTrainedModel, folder: str | os.PathLike, trainable: bool = False) -> PeftModel:
    """
    Put a saved adapter on its base model.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model, which the adapter is put into.
        folder (`str`): Where the adapter is saved.
        trainable (`bool`): Whether it is loaded for training on.

    Returns:
        [`~peft.PeftModel`]

    Raises:
        ValueError: Not all weights of the adapter fit the base model. PEFT would leave them out, and the result would be the
            base model without a change.
    """
    model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    saved = load_peft_weights(str(folder), device="cpu").keys()
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    # Embeddings that were saved along are the base model's own
    missing, unknown = sorted(wanted - saved), sorted(saved - wanted - model.state_dict().keys())
    if missing or unknown:
        raise ValueError(
            f"The adapter in '{folder}' does not fit its base model, a {type(base).__name__}: of its weights {len(unknown)} "
            f"have no place in the model {unknown[:2]}, and {len(missing)} of the model's are not in it {missing[:2]}. Load it on "
            "the model that it was trained on, as the same class."
        )
    return model


def load_adapted_model(folder: str | os.PathLike, **kwargs: Any) -> PeftModel:
    """The adapter in a folder on the base model that it names; `kwargs` are those of [`load_model`], for the base."""
    config = PeftConfig.from_pretrained(str(folder))
    base = load_model(config.base_model_name_or_path, **{**kwargs, "revision": config.revision})
    return load_adapter(base, folder)
