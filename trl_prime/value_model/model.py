"""The value model: a causal LM that starts from the policy and has a linear head of two outputs in the place of its own.

Covered: building it on the policy's start, as a whole or as an adapter on the policy's base; the values of a batch. Not covered:
what values should be and the loss (`values.py`), training (`learner.py`).

As the head takes the place of the language model's, whatever runs or distributes a causal LM runs and distributes this.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..implicit_prm.build import build_prm, warn_of_rounding
from ..implicit_prm.logps import evaluating, fill_by_micro_batches, micro_batch_inputs, unwrapped
from ..implicit_prm.tiled_head import Float32Head
from ..values import SOURCES

if TYPE_CHECKING:
    from ..prime_config import PRIMEConfig

# Of an adapter like the policy's: it begins as the identity, and leaves the base alone
_ADAPTER = {"init_lora_weights": True, "bias": "none", "modules_to_save": None, "inference_mode": False}


class ValueModel:
    """
    Values of states, of the outcome and of the process rewards that are to come.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): With the head of [`with_value_head`].
        micro_batch_size (`int`): Completions of one forward pass.
    """

    # For the backends, as of a PRM without one
    reference = None

    def __init__(self, model: PreTrainedModel | PeftModel, micro_batch_size: int):
        self.model = model
        self.micro_batch_size = micro_batch_size

    def values(self, *batch: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """
        Values of a whole batch, without gradient, in the order of its rows.

        Args:
            *batch (`torch.Tensor`): Prompt ids and mask `(B, P)` padded on the left, completion ids and mask `(B, T)` padded on
                the right.
            **kwargs: `rows` and `num_passes` of [`~trl_prime.implicit_prm.logps.batch_completion_logps`].

        Returns:
            `torch.Tensor`: `(B, T, 2)` float32, see [`completion_values`]; zero in rows that are not wanted.
        """
        completion_ids = batch[2]
        values = torch.zeros(*completion_ids.shape, len(SOURCES), device=completion_ids.device)
        with torch.no_grad(), evaluating(self.model):
            fill_by_micro_batches(values, completion_values, self.model, batch, self.micro_batch_size, **kwargs)
        return values


def build_value_model(
    policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: PRIMEConfig
) -> ValueModel:
    """
    The value model of a run, trainable. It starts from the policy as it is; of a policy that is an adapter it is another adapter of
    the same kind, on the same base.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Stays as it is.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): That of the rollouts.
        args ([`PRIMEConfig`]): Configuration of the run.

    Returns:
        [`ValueModel`]
    """
    peft_config = None
    if isinstance(policy, PeftModel):
        peft_config = copy.deepcopy(policy.active_peft_config)
        for name, value in _ADAPTER.items():
            if hasattr(peft_config, name):
                setattr(peft_config, name, value)
    # It starts as a PRM without a reference does: from a copy of the policy, or with an adapter on the policy's base
    start = build_prm(
        None,
        tokenizer,
        policy=policy,
        peft_config=peft_config,
        frozen_reference=False,
        disable_dropout=args.disable_dropout,
        seed=args.seed,
        micro_batch_size=args.prm_micro_batch_size,
    )
    remedy = "model_init_kwargs={'dtype': 'float32'}"
    warn_of_rounding(start.model, "value model", "value_learning_rate", args.value_learning_rate, remedy)
    return ValueModel(with_value_head(start.model), args.prm_micro_batch_size)


def with_value_head(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """
    Put a linear head of two outputs, trained and in float32, in the place of a language-model head. All values begin at zero.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Shares no module with another; is changed.

    Returns:
        The same model.

    Raises:
        NotImplementedError: The model has no head that could be replaced.
    """
    base = unwrapped(model)
    old = base.get_output_embeddings()
    if old is None:
        raise NotImplementedError(
            f"{type(base).__name__} has no language-model head that a value head could take the place of. Use an "
            "advantage_estimator without a value model, such as 'rloo'."
        )
    head = Float32Head(old.weight.shape[1], len(SOURCES), device=old.weight.device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    base.set_output_embeddings(head)
    # Nothing may tie it to the embeddings, as the head was whose place it has
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
    name = next(name for name, module in base.named_modules() if module is head)
    tied = getattr(base, "all_tied_weights_keys", {})  # of transformers from 5
    base.all_tied_weights_keys = {key: source for key, source in tied.items() if not key.startswith(f"{name}.")}
    return model


def completion_values(model: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
    """
    Values of the states before each completion token was written, of one micro-batch, with gradient.

    Args:
        model (`nn.Module`): Causal LM with a value head.
        *batch (`torch.Tensor`): Prompt ids and mask `(b, P)` padded on the left, completion ids and mask `(b, T)` padded on the
            right.

    Returns:
        `torch.Tensor`: `(b, T, 2)` float32, in the order of [`~trl_prime.values.SOURCES`]; zero at padding.
    """
    completion_mask = batch[3]
    inputs, completion_len = micro_batch_inputs(model, *batch)
    # At the position that predicts a token
    values = model(**inputs).logits[:, -completion_len - 1 : -1].float()
    values = values.masked_fill(completion_mask[:, :completion_len, None] == 0, 0.0)
    return nn.functional.pad(values, (0, 0, 0, completion_mask.shape[1] - completion_len))
