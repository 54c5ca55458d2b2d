"""How a PRM starts, for both trainers: from a folder, the Hub, an instance or the policy, and under ZeRO-3.

Covered: which models the PRM and its reference start from, that they fit the tokenizer, and what both are set up with
before they are placed; a PRM that only scores. Not covered: the pair itself (`model.py`), its distribution (`backends.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model

from ..hub import cached_commit
from .adapters import with_adapter
from .backends import unshared
from .copies import check_apart, compute_head_in_float32
from .files import is_saved_prm, local_folder
from .logps import can_fuse_lm_head, fuse_lm_head
from .model import ImplicitPRM

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.get_logger(__name__)


def build_prm(
    start: str | PreTrainedModel | PeftModel | ImplicitPRM | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: PreTrainedModel | PeftModel | None = None,
    policy_name: str | None = None,
    peft_config: PeftConfig | None = None,
    frozen_reference: bool = True,
    init_kwargs: dict[str, Any] | None = None,
    disable_dropout: bool = False,
    float32_head: bool = False,
    seed: int = 0,
    **settings: Any,
) -> ImplicitPRM:
    """
    The PRM of a run, trainable, with its reference frozen and in evaluation mode.

    Args:
        start (`str`, model or [`ImplicitPRM`], *optional*): Folder or Hub id of a model or, as a folder, of a PRM that was
            saved; a model, which becomes the PRM; or a PRM. The last two and a saved PRM go on being trained. `None` starts
            from the policy as it is.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): That of the rollouts.
        policy (model, *optional*): The policy, needed without `start`.
        policy_name (`str`, *optional*): Folder or Hub id that the policy was loaded from.
        peft_config ([`~peft.PeftConfig`], *optional*): Train an adapter.
        frozen_reference (`bool`): False to keep no reference.
        init_kwargs (`dict`, *optional*): Of `from_pretrained`, for models given by name.
        disable_dropout (`bool`): Whether the PRM has no dropout.
        float32_head (`bool`): Whether the heads of PRM and reference compute in float32.
        seed (`int`): Seed of a new adapter, which is thus the same on all processes.
        **settings: `beta`, `step_delimiter` and `micro_batch_size` of [`ImplicitPRM`].

    Returns:
        [`ImplicitPRM`]

    Raises:
        ValueError: The PRM embeds fewer tokens than the tokenizer has, shares trained weights with another model, or cannot
            be trained as asked.
    """
    init_kwargs, name = init_kwargs or {}, policy_name if start is None else start
    from_name = isinstance(name, str) and not is_saved_prm(name)
    zero3 = is_deepspeed_zero3_enabled()
    # Processes may be seeded differently by now, and the policy's random numbers must be those of a run without PRM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"peft_config": peft_config, "frozen_reference": frozen_reference, **settings}
        if is_saved_prm(start):
            # As a plain model it would become its own reference and forget what it has learnt
            start = ImplicitPRM.from_pretrained(start, trainable=True, **{"dtype": "float32", **init_kwargs})
        if isinstance(start, ImplicitPRM):
            prm = start
            prm.use_settings(**settings)
            prm.reference = prm.reference if frozen_reference else None
        elif zero3 and from_name:
            # Sharded while they are loaded: no process ever holds all of a model, and nothing can be copied
            model, reference = (_load(name, init_kwargs) for _ in range(2))
            if peft_config is not None:
                model = with_adapter(model, peft_config, autocast_adapter_dtype=False)
            reference = reference.requires_grad_(False) if frozen_reference else None
            prm = ImplicitPRM(model, reference, tokenizer, **settings)
        elif start is None:
            prm = ImplicitPRM.from_policy(unshared(policy) if zero3 else policy, tokenizer, **options)
        else:
            model = _load(start, init_kwargs) if isinstance(start, str) else start
            prm = ImplicitPRM.from_model(model, tokenizer, **options)
        if zero3 and not from_name and prm.reference is not None:
            # Engines fetch and release weights each for itself, so that nothing can be shared between them
            prm.reference = unshared(prm.reference)
    if isinstance(prm.model, PeftModel):
        prm.model.set_adapter(prm.model.active_adapter)  # makes it trainable, and nothing else
    else:
        prm.model.requires_grad_(True)
    if from_name:
        prm.reference_name = name
        prm.reference_revision = cached_commit(name, init_kwargs.get("revision"), init_kwargs.get("cache_dir"))
    _check_vocabulary(prm, tokenizer)
    if disable_dropout:
        disable_dropout_in_model(prm.model)
    if prm.reference is not None:
        prm.reference.eval()
    if float32_head:
        # The policy's too where it is the reference: TRL's does not compute in float32 under autocast
        for model in (prm.model, policy if prm.reference is None else prm.reference):
            compute_head_in_float32(model)
    check_apart(policy, prm.model, prm.reference)
    return prm


def kind_of_start(start: Any, peft_config: PeftConfig | None) -> tuple[bool, float | None]:
    """
    What is known of a PRM before anything is loaded.

    Args:
        start: As of [`build_prm`].
        peft_config ([`~peft.PeftConfig`], *optional*): Of a new adapter.

    Returns:
        `tuple[bool, float | None]`: whether an adapter will be trained, and the reward scale of a PRM that was trained before.
    """
    if is_saved_prm(start):
        saved = local_folder(start)[1]
        return saved["adapter"], saved["beta"]
    if isinstance(start, ImplicitPRM):
        return isinstance(start.model, PeftModel), start.beta
    return peft_config is not None or isinstance(start, PeftModel), None


def _load(name: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    return create_model_from_path(name, **{"device_map": None, **init_kwargs})


def _check_vocabulary(prm: ImplicitPRM, tokenizer: PreTrainedTokenizerBase) -> None:
    needed = max(tokenizer.get_vocab().values()) + 1
    embeddings = prm.model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", embeddings.weight.shape[0])  # ZeRO-3 shows an empty weight
    if rows < needed:
        raise ValueError(
            f"The implicit PRM embeds {rows} tokens, but the policy's tokenizer has {needed}: it belongs to another "
            "tokenizer. Use a PRM of the policy's model family."
        )


def warn_of_rounding(model: nn.Module, title: str, option: str, learning_rate: float, remedy: str) -> None:
    """
    Warn where a model's trainable weights are so imprecise that small updates are lost.

    Args:
        model (`nn.Module`): The model.
        title (`str`): What it is, in the warning.
        option (`str`): Name of the option with its learning rate.
        learning_rate (`float`): That rate.
        remedy (`str`): The option that loads it in float32.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in trainable):
        logger.warning(
            f"The trainable weights of the {title} are {trainable[0].dtype}: updates of the size of {option}={learning_rate} are "
            f"rounded away. Load it in float32 ({remedy}); bf16=True still computes in bfloat16."
        )


def fuse_lm_heads(prm: ImplicitPRM, wanted: bool | None, on_gpu: bool) -> None:
    """
    Let TRL's fused head compute the log-probabilities of PRM and reference.

    Args:
        prm ([`ImplicitPRM`]): The PRM.
        wanted (`bool`, *optional*): `None`: on a GPU, where it is possible.
        on_gpu (`bool`): Whether the models compute on a GPU.

    Raises:
        ValueError: It is wanted and not possible.
    """
    models = [model for model in (prm.model, prm.reference) if model is not None]
    possible = all(can_fuse_lm_head(model) for model in models)
    if wanted and not possible:
        raise ValueError(
            "prm_fused_lm_head=True needs TRL from 1.15, and a PRM without an adapter on its head. Leave it out."
        )
    # The policy's own fused head divides by the sampling temperature: where the policy is the reference, both do without
    if possible and (wanted or (wanted is None and on_gpu and prm.reference is not None)):
        for model in models:
            fuse_lm_head(model)


def load_prm(name_or_path: str, **kwargs: Any) -> ImplicitPRM:
    """
    A PRM that scores, on the GPUs if there are any: how all commands load one.

    Args:
        name_or_path (`str`): Folder or Hub id.
        **kwargs: As in [`~trl_prime.ImplicitPRM.from_pretrained`].

    Returns:
        [`~trl_prime.ImplicitPRM`]

    Raises:
        OSError: It could not be loaded.
    """
    disable_progress_bar()
    if torch.cuda.is_available():
        kwargs["device_map"] = "auto"
    return ImplicitPRM.from_pretrained(name_or_path, **kwargs)
