"""Settings of training an implicit PRM offline, validated before any model is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available

from ..implicit_prm.losses import OFFLINE_LOSS_TYPES
from ..specs import check_installed, nearest


@dataclass
class OfflinePRMConfig(TrainingArguments):
    # docstyle-ignore
    r"""
    Configuration class for the [`OfflinePRMTrainer`].

    This class includes only the parameters that are specific to training an implicit PRM offline. For a full list of
    training arguments, please refer to the [`~transformers.TrainingArguments`] documentation.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`] when the model is given as a
            string. It is loaded in float32 unless `dtype` says otherwise.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout: scores are differences of two models, which dropout would blur.
        beta (`float`, *optional*, defaults to `0.05`):
            Scale of the process reward, in reward per nat: `beta * (log pi_phi - log pi_ref)`. The score of a completion is
            a sum over its tokens, so beta should scale with one over the completion length: 0.05 is for thousands of
            tokens, 0.5 to 1 for tens. An online run that goes on with this PRM keeps it unless `prm_beta` is set.
        step_delimiter (`str`, *optional*, defaults to `"\n"`):
            What ends a reasoning step; saved with the PRM, not used in training.

        > Parameters that control the data

        max_length (`int`, *optional*, defaults to `8192`):
            Largest number of tokens of a prompt and its completion together; longer rows and pairs are left out. `None` for
            no limit.
        max_pairs_per_prompt (`int`, *optional*):
            With `loss_type="dpo"` on labelled completions, which are paired right with wrong: at most so many pairs a
            prompt, drawn by `seed`. All by default.
        dataset_num_proc (`int`, *optional*):
            Number of processes that tokenize.

        > Parameters that control the loss

        loss_type (`str`, *optional*, defaults to `"ce"`):
            `"ce"`: cross-entropy of `sigmoid(q)` against the label (PRIME, Eq 4). `"dpo"`: `-log sigmoid(q_chosen -
            q_rejected)`. `"kto"`: the KTO loss, with a reference point from completions after prompts of other rows. q is the
            score of a completion.
        desirable_weight, undesirable_weight (`float`, *optional*, defaults to `1.0`):
            With `loss_type="kto"`: weights of right and of wrong completions, against an unequal number of them.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]; the learning rate, beta, a single
    > epoch and the length are those of the published runs of arXiv 2412.01981 (which had 64 rows a step, for an 8B model):
    > - `learning_rate`: Defaults to `5e-7` instead of `5e-5`, and for an adapter to `1e-4`.
    > - `num_train_epochs`: Defaults to `1` instead of `3`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float | None = field(
        default=None, metadata={"help": "The initial learning rate. Defaults to 5e-7, and to 1e-4 for an adapter."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Whether to recompute activations in the backward pass to save memory."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Whether to compute in bfloat16. Defaults to True if fp16 is not set."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every X steps; below 1, a share of all steps of the run."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the data has columns that are no arguments of the model."}
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` when the model is a string."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout."})
    beta: float = field(
        default=0.05,
        metadata={
            "help": "Scale of the process reward in reward per nat. Should scale with one over the completion length: 0.05 "
            "is for thousands of tokens, 0.5 to 1 for tens."
        },
    )
    step_delimiter: str = field(
        default="\n", metadata={"help": "What ends a reasoning step; saved with the PRM, not used in training."}
    )

    # Parameters that control the data
    max_length: int | None = field(
        default=8192, metadata={"help": "Leave out rows and pairs whose prompt and completion have more tokens."}
    )
    max_pairs_per_prompt: int | None = field(
        default=None,
        metadata={
            "help": "With loss_type 'dpo' on labelled completions: at most so many pairs a prompt, drawn by seed."
        },
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Number of processes that tokenize."})

    # Parameters that control the loss
    loss_type: str = field(
        default="ce",
        metadata={
            "help": "'ce': cross-entropy against the label. 'dpo': on pairs of a better and a worse completion. 'kto': the KTO "
            "loss on labels.",
            "choices": list(OFFLINE_LOSS_TYPES),
        },
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "With 'kto': weight of right completions."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "With 'kto': weight of wrong completions."})

    def __post_init__(self):
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        check_installed("deepspeed", self.deepspeed, is_deepspeed_available(), "deepspeed")
        super().__post_init__()
        if self.loss_type not in OFFLINE_LOSS_TYPES:
            raise ValueError(
                f"loss_type is {self.loss_type!r}, which is unknown. {nearest(self.loss_type, OFFLINE_LOSS_TYPES)}"
            )
        if not self.beta > 0 or not math.isfinite(self.beta):
            raise ValueError(f"beta is {self.beta}, but the reward scale must be positive. The paper uses 0.05.")
        if self.per_device_train_batch_size < 1:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}, but must be at least 1."
            )
        if self.learning_rate is not None and (not self.learning_rate >= 0 or not math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be zero or a positive number.")
        for name in ("desirable_weight", "undesirable_weight"):
            weight = getattr(self, name)
            if not weight > 0 or not math.isfinite(weight):
                raise ValueError(f"{name} is {weight}, but must be a positive number.")
            if weight != 1 and self.loss_type != "kto":
                raise ValueError(f"{name} is {weight}, but loss_type={self.loss_type!r} has no weights. Use 'kto'.")
        for name in ("max_length", "max_pairs_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1, or left out for no limit.")
        if self.max_pairs_per_prompt is not None and self.loss_type != "dpo":
            raise ValueError(
                f"max_pairs_per_prompt is {self.max_pairs_per_prompt}, but loss_type={self.loss_type!r} makes no pairs. Leave it "
                "out, or use 'dpo'."
            )
        if not self.step_delimiter:
            raise ValueError("step_delimiter is empty; give the text that ends a step, such as a newline.")
        if self.loss_type == "kto" and min(self.per_device_train_batch_size, self.per_device_eval_batch_size) < 2:
            raise ValueError(
                "loss_type='kto' compares the rows of a batch, but per_device_train_batch_size or per_device_eval_batch_size "
                "is 1. Set both to 2 or more."
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is True, which would remove the completions. Leave it out.")
