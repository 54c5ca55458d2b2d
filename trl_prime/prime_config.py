"""Every knob of PRIME, typed, documented and validated before any model is loaded."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import is_deepspeed_available
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import GRPOConfig
from trl.import_utils import is_vllm_available

from .advantages import ESTIMATORS, VALUE_MODEL_ESTIMATORS
from .implicit_prm.losses import LOSS_TYPES
from .implicit_prm.optimizer import SUITS_ADAPTERS, make_schedule, with_defaults
from .process_rewards import GRANULARITIES, NORMALIZATIONS
from .specs import check_installed, nearest

UPDATE_MODES = ("after", "before", "reverse", "none")
REFERENCES = ("frozen", "policy")
# TRL checks these only after the models are loaded and the first batch is generated
TRL_CHOICES = ("loss_type", "importance_sampling_level", "vllm_importance_sampling_mode")
# Options that change nothing without a value model
VALUE_OPTIONS = ("gae_lambda", "value_learning_rate", "value_num_epochs", "value_clip_range")


@functools.cache
def trl_choices(option: str) -> tuple[str, ...]:
    """
    The values of an option that the installed TRL compares it with, read off its source: it has no list of them, and refuses
    others late.

    Args:
        option (`str`): Field of [`~trl.GRPOConfig`].

    Returns:
        `tuple[str, ...]`: The values; empty where TRL compares it in another form, and is left to refuse.
    """
    source = Path(importlib.util.find_spec("trl.trainer.grpo_trainer").origin).read_text(encoding="utf-8")
    compared = re.findall(rf'\.{option} (?:==|!=|in|not in) ("\w+"|[\[({{][^\])}}]*)', source)
    return tuple(dict.fromkeys(re.findall(r'"(\w+)"', " ".join(compared))))


@dataclass
class PRIMEConfig(GRPOConfig):
    # docstyle-ignore
    r"""
    Configuration class for the [`PRIMETrainer`].

    This class includes only the parameters that are specific to PRIME training. For a full list of training arguments,
    please refer to the [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation. Section and equation
    numbers are those of the PRIME paper, arXiv 2502.01456.

    Parameters:
        > Parameters that control the core of PRIME

        prm_beta (`float`, *optional*):
            Scale of the process reward, in reward per nat: `beta * (log pi_phi - log pi_ref)` (Eq 3). The score of a
            completion is a sum over its tokens, so beta should scale with one over the completion length. Defaults to
            `50 / max_completion_length`, but not below 0.05, the paper's, nor above 0.5; a PRM that was trained before keeps
            its own.
        prm_learning_rate (`float`, *optional*):
            Initial learning rate of the PRM. Defaults to 1e-5, and to 1e-4 where it trains an adapter. The paper's is 1e-6, at
            which the first dozens of updates of all weights are lost in the rounding of bfloat16 (`prm/precision`).
        prm_update (`str`, *optional*, defaults to `"after"`):
            When the PRM learns from a rollout batch. `"after"`: after the batch was scored (single forward). `"before"`:
            before, and the batch is scored by the updated PRM (double forward). `"reverse"`: as `"after"`, and losses
            that compare completions use the scores of that single scoring pass through all epochs. `"none"`: never.
        advantage_estimator (`str`, *optional*, defaults to `"rloo"`):
            `"rloo"` (Eq 5), `"rloo_reference_code"` (as the published code computes it), `"grpo"` (Eq 7), `"reinforce"`
            (Eq 8), `"reinforce_plus_plus"` (Eq 8, always whitened), `"value"` (the PRM as value model, section 5.4), `"gae"` (PPO: a
            value model is trained along, see `gae_lambda`).
        process_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the process term of the advantage. 0 trains on outcomes only, while the PRM still learns and reports.
        accuracy_low (`float`, *optional*, defaults to `0.2`):
            Groups whose mean label is lower are not trained on.
        accuracy_high (`float`, *optional*, defaults to `0.8`):
            Groups whose mean label is higher are not trained on. The band from 0 to 1 turns the filter off.
        oversample_factor (`float`, *optional*, defaults to `1.0`):
            Generate this many times `generation_batch_size` completions and keep `generation_batch_size` of them, whole
            groups that pass the filter first. Where too few pass, groups that failed fill the batch up and carry no gradient,
            neither in the policy nor in the PRM.

        > Parameters that control the models of the implicit PRM

        prm_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`] when `prm_model` is given as a
            string. Defaults to `model_init_kwargs`.
        prm_reference (`str`, *optional*, defaults to `"frozen"`):
            What the PRM is measured against. `"frozen"`: the model that it started from. `"policy"`: the policy's
            log-probabilities at rollout time; no reference model is kept.
        prm_micro_batch_size (`int`, *optional*):
            Completions in one forward pass of PRM and reference. Defaults to `per_device_train_batch_size`. Results do not
            depend on it, memory does.
        prm_fused_lm_head (`bool`, *optional*):
            Whether log-probabilities of PRM and reference are computed by TRL's fused head, which never holds the logits of a
            micro-batch. Defaults to whether they run on a GPU, TRL has it (from 1.15) and `prm_reference` is `"frozen"`.

        > Parameters that control the update of the implicit PRM

        prm_loss_type (`str`, *optional*, defaults to `"ce"`):
            `"ce"`: cross-entropy against the outcome (Eq 4). `"calibrated_ce"`, ours: cross-entropy of
            `g + (1 - g) * sigmoid(q + b)`, g being `prm_guess_rate` and b the log-odds of the mean label of the batches that
            are trained on. A score is normalised, so a PRM that has learned nothing gives every completion q = 0 and believes
            that half of them are right. Where far fewer are, Eq 4 spends its first updates on lowering the probability of
            whatever the policy writes; with b only what tells right from wrong is learned. Scores and process rewards hold no
            b. The other losses compare completions of a prompt. `"dpo"`: detached DPO against the mean of the peers with
            another outcome. `"bon_acc"`, `"bon_rm"`: the same, weighted by how likely a completion is the best of K by
            outcome or by score.
        prm_guess_rate (`float`, *optional*, defaults to `0.0`):
            Share g of the wrong completions that the outcome reward finds right by luck, from 0 to below 1: 0.25 where one of
            four options is to be chosen, 0.1 where the answer is a digit. The loss then allows for luck, with b from what is
            left of the mean label, so that a right answer after a wrong step need not be explained by the step. Needs
            `prm_loss_type="calibrated_ce"`.
        prm_reference_weight (`float` or `str`, *optional*, defaults to `0.0`):
            Weight w of the reference's own confidence in the score and in the reward of a token: `w * c_t` is added, c being the
            log-probability of the token under the reference. `"fitted"`: w, at least 0, and the intercept b follow from a logistic
            regression of the outcomes of the last 16 batches with the PRM's scores as offset. Rewards are then
            those against a tempered reference, `beta * log pi_phi - (beta - w) * log pi_ref`. 0 is PRIME. Needs `prm_loss_type="calibrated_ce"`.
        prm_reference_centred (`bool`, *optional*, defaults to `True`):
            Whether c is taken against its expected value under the reference, by adding the entropy of its distribution, so that a
            token of which the reference is sure is worth nothing. Costs a further forward pass of the reference.
        prm_label (`str`, *optional*, defaults to `"reward"`):
            The outcome label: `"reward"`, the weighted sum of all reward functions, or the name of one of them. Labels
            must be between 0 and 1. The prompt filter judges accuracy by the label too.
        prm_optim (`str`, *optional*, defaults to `"adamw_torch"`):
            Optimizer of the PRM, a name of [`~transformers.training_args.OptimizerNames`]. Betas, epsilon and `optim_args`
            are those of the policy.
        prm_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning-rate schedule of the PRM, a name of [`~transformers.SchedulerType`].
        prm_lr_scheduler_kwargs (`dict` or `str`, *optional*):
            Arguments of that schedule, as `lr_scheduler_kwargs` for the policy's: `{"min_lr_rate": 0.1}` for
            `"cosine_with_min_lr"`, `{"num_decay_steps": 100}` for `"warmup_stable_decay"`. Its steps are optimizer steps of
            the PRM.
        prm_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps of the PRM over which its learning rate rises.
        prm_weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of the PRM.
        prm_max_grad_norm (`float`, *optional*, defaults to `10.0`):
            Largest gradient norm of the PRM; the gradient is scaled down to it. 0 to not clip.
        prm_num_epochs (`int`, *optional*, defaults to `1`):
            Passes of the PRM over each rollout batch. Each makes as many optimizer steps as the policy does on the batch, on whole
            groups: one unless `steps_per_generation` is more than `gradient_accumulation_steps`.
        prm_replay_batches (`int`, *optional*, defaults to `0`):
            How many earlier rollout batches are kept and trained on again with each new one, in as many optimizer steps. An
            outcome label does not depend on the policy, so old rollouts stay valid training data for the PRM.
        prm_replay_steps (`int`, *optional*):
            On how many of the kept batches, drawn at random, the PRM is trained with each new one and in each epoch. Defaults
            to all.

        > Parameters that control the process rewards

        process_reward_granularity (`str`, *optional*, defaults to `"token"`):
            `"token"`: each token has its reward. `"step"`: the rewards of a step are summed and sit at its end. `"turn"`: the
            same of a turn, a run of tokens that the policy wrote between those of tools or of an environment. `"whole"`: the
            rewards of a completion are summed and sit on its last token.
        process_reward_step_delimiter (`str`, *optional*, defaults to `"\n"`):
            What ends a step.
        process_reward_norm (`str`, *optional*, defaults to `"batch_norm"`):
            `"batch_norm"`: divide by the largest absolute reward-to-go of the batch over all processes, as in the
            published code. `"std"`: divide by the standard deviation of the centred reward-to-go. `"group_std"`: the same of
            each group by itself; with turns and `process_gamma=0` the scale of iStar (arXiv 2509.19199). `"softmax"`: share the
            outcome out over the turns, or steps, by the softmax of their rewards, as ITPO (arXiv 2603.23550); a larger
            `prm_beta` sharpens the shares. `"none"`: as in Eq 5.
        prm_trust_weighting (`bool`, *optional*, defaults to `True`):
            Multiply `process_weight` by how much better than chance the PRM surely ranks completions,
            `max(0, 2 * a - 1)`, a 1.5 standard errors below its pairwise accuracy on rollouts that it has not been trained on,
            over the pairs of recent batches. Process rewards stay out while the PRM guesses and come in as it learns.

        > Parameters that control the advantages

        outcome_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the outcome term of the advantage.
        outcome_gamma (`float`, *optional*, defaults to `1.0`):
            Discount of the outcome per token before the end.
        process_gamma (`float`, *optional*, defaults to `1.0`):
            Discount of process rewards from one to the next. 0 credits each token or step with its own reward only.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Zero mean and unit variance over all tokens of the batch.

        > Parameters that control the value model

        gae_lambda (`float`, *optional*, defaults to `1.0`):
            How far an advantage trusts the rewards that came (1) rather than the values of the tokens in between (0). With 1 a
            value is a baseline and nothing else, so that a value model which knows nothing yet does no harm.
        value_learning_rate (`float`, *optional*):
            Initial learning rate of the value model. Defaults to 1e-5, and to 1e-4 where it trains an adapter, as it does where the
            policy does. Optimizer, schedule, gradient clip and micro-batches are those of the PRM.
        value_num_epochs (`int`, *optional*, defaults to `1`):
            Passes of the value model over each rollout batch. Each makes as many optimizer steps as the policy does on the batch.
        value_clip_range (`float`, *optional*, defaults to `0.2`):
            How far a value may move on one rollout batch before its loss stops to pull it further, as in PPO. It acts from the
            second optimizer step on a batch on. 0 to not clip.

        > Parameters that control the online prompt filter

        filter_truncated (`bool`, *optional*, defaults to `False`):
            Whether groups with a completion that ran into `max_completion_length` are not trained on.
        filter_max_rounds (`int`, *optional*, defaults to `1`):
            Where fewer groups pass the filter than a batch needs, generate again from other prompts, and stop after this many
            rounds at the latest (dynamic sampling, as in DAPO). The groups that passed in all rounds count; those beyond the batch
            are dropped. 1 generates once.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`], those of the paper:
    > - `learning_rate`: Defaults to `5e-7` instead of `1e-6`, and for an adapter to `1e-5`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `num_generations`: Defaults to `4` instead of `8`.
    > - `max_completion_length`: Defaults to `3072` instead of `512`.
    > - `scale_rewards`: Is `"none"` instead of `"group"`, and nothing else: advantages come from `advantage_estimator`.
    >
    > TRL's defaults of `loss_type` (`"dapo"`, the mean over all tokens of the batch) and `beta` (`0.0`, no KL term) are the
    > paper's.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "prm_model_init_kwargs", "prm_lr_scheduler_kwargs"]

    # Parameters whose default values are overridden from GRPOConfig and TrainingArguments
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "The initial learning rate of the policy. Defaults to 5e-7, and to 1e-5 for an adapter."},
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "Learning-rate schedule of the policy."}
    )
    num_generations: int | None = field(
        default=4, metadata={"help": "Completions per prompt, K. The generation batch must be a multiple of it."}
    )
    max_completion_length: int | None = field(
        default=3072, metadata={"help": "Maximum length of the generated completion, in tokens."}
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Must be 'none': PRIME's advantages come from `advantage_estimator`."},
    )

    # Parameters that control the core of PRIME
    prm_beta: float | None = field(
        default=None,
        metadata={
            "help": "Scale of the process reward in reward per nat (Eq 3). Defaults to 50 / `max_completion_length`, between 0.05 "
            "and 0.5, and to its own for a PRM that was trained before."
        },
    )
    prm_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Initial learning rate of the PRM. Defaults to 1e-5, and to 1e-4 for an adapter. The paper's is 1e-6."
        },
    )
    prm_update: str = field(
        default="after",
        metadata={
            "help": "When the PRM learns from a rollout batch: 'after' it was scored, 'before' (and it is scored by the "
            "updated PRM), 'reverse' (as 'after', and losses that compare completions keep that pass's scores), 'none'."
        },
    )
    advantage_estimator: str = field(
        default="rloo",
        metadata={
            "help": "'rloo' (Eq 5), 'rloo_reference_code', 'grpo' (Eq 7), 'reinforce' (Eq 8), 'reinforce_plus_plus', "
            "'value' (section 5.4) or 'gae' (PPO, with a value model that is trained along)."
        },
    )
    process_weight: float = field(default=1.0, metadata={"help": "Factor of the process term of the advantage."})
    accuracy_low: float = field(default=0.2, metadata={"help": "Groups whose mean label is lower are not trained on."})
    accuracy_high: float = field(
        default=0.8,
        metadata={"help": "Groups whose mean label is higher are not trained on. 0 to 1 turns the filter off."},
    )
    oversample_factor: float = field(
        default=1.0,
        metadata={
            "help": "Generate this many times `generation_batch_size` completions and keep the groups that pass the filter."
        },
    )

    # Parameters that control the models of the implicit PRM
    prm_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` when `prm_model` is a string. "
            "Defaults to `model_init_kwargs`."
        },
    )
    prm_reference: str = field(
        default="frozen",
        metadata={
            "help": "What the PRM is measured against: 'frozen', the model that it started from, or 'policy', the "
            "policy's log-probabilities at rollout time."
        },
    )
    prm_micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions in one forward pass of PRM and reference. Defaults to `per_device_train_batch_size`."
        },
    )
    prm_fused_lm_head: bool | None = field(
        default=None,
        metadata={
            "help": "Compute log-probabilities of PRM and reference by TRL's fused head, which holds no logits. Defaults to "
            "true on a GPU, with TRL from 1.15 and prm_reference 'frozen'."
        },
    )

    # Parameters that control the update of the implicit PRM
    prm_loss_type: str = field(
        default="ce",
        metadata={
            "help": "Loss of the PRM: 'ce' (Eq 4), 'calibrated_ce' (for where far fewer or far more than half of the completions "
            "are right: the log-odds of the mean label are added to the score), 'dpo', 'bon_acc' or 'bon_rm' (best-of-N "
            "weighted DPO)."
        },
    )
    prm_guess_rate: float = field(
        default=0.0,
        metadata={
            "help": "Share of wrong completions that the outcome reward finds right by luck, for example 0.25 where one of four "
            "options is to be chosen: the PRM's loss allows for it. Needs prm_loss_type 'calibrated_ce'."
        },
    )
    prm_reference_weight: float | str | None = field(
        default=0.0,
        metadata={
            "help": "Weight of the reference's log-probabilities in scores and process rewards, or 'fitted' to the outcomes of the "
            "last batches. 0 is PRIME. Needs prm_loss_type 'calibrated_ce'."
        },
    )
    prm_reference_centred: bool = field(
        default=True,
        metadata={
            "help": "Take the reference's log-probabilities against their expected values, its negative entropies. Without "
            "effect where prm_reference_weight is 0."
        },
    )
    prm_label: str = field(
        default="reward",
        metadata={
            "help": "Outcome label of the PRM and of the prompt filter: 'reward', the weighted sum of all reward "
            "functions, or the name of one of them. Must be between 0 and 1."
        },
    )
    prm_optim: str = field(
        default="adamw_torch",
        metadata={"help": "Optimizer of the PRM. Betas, epsilon and `optim_args` are those of the policy."},
    )
    prm_lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule of the PRM."})
    prm_lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the PRM's schedule, for example {'min_lr_rate': 0.1} for 'cosine_with_min_lr'."
        },
    )
    prm_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps of the PRM over which its learning rate rises."}
    )
    prm_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the PRM."})
    prm_max_grad_norm: float = field(
        default=10.0, metadata={"help": "Largest gradient norm of the PRM. 0 to not clip."}
    )
    prm_num_epochs: int = field(
        default=1,
        metadata={
            "help": "Passes of the PRM over each rollout batch, in as many optimizer steps as the policy makes on it: "
            "steps_per_generation / gradient_accumulation_steps, one by default."
        },
    )
    prm_replay_batches: int = field(
        default=0,
        metadata={
            "help": "Earlier rollout batches that the PRM is trained on again with each new one, in as many optimizer steps."
        },
    )
    prm_replay_steps: int | None = field(
        default=None,
        metadata={
            "help": "Of the batches that prm_replay_batches keeps, train the PRM on this many drawn at random with each new "
            "one. Defaults to all."
        },
    )

    # Parameters that control the process rewards
    process_reward_granularity: str = field(
        default="token",
        metadata={
            "help": "Unit of the process reward: 'token', 'step' (summed, at its end), 'turn' (between tool or environment output) "
            "or 'whole' completion."
        },
    )
    process_reward_step_delimiter: str = field(default="\n", metadata={"help": "What ends a step."})
    process_reward_norm: str = field(
        default="batch_norm",
        metadata={
            "help": "'batch_norm': divide process rewards by the largest absolute reward-to-go of the batch, as the "
            "published code. 'std': by the standard deviation of the centred reward-to-go. 'group_std': by that of each group "
            "(iStar). 'softmax': share the outcome out over turns or steps by the softmax of their rewards (ITPO). 'none': as "
            "in Eq 5."
        },
    )
    prm_trust_weighting: bool = field(
        default=True,
        metadata={
            "help": "Multiply `process_weight` by max(0, 2 * a - 1), a 1.5 standard errors below the pairwise accuracy of the "
            "PRM on recent rollouts, so that process rewards stay out while the PRM guesses."
        },
    )

    # Parameters that control the advantages
    outcome_weight: float = field(default=1.0, metadata={"help": "Factor of the outcome term of the advantage."})
    outcome_gamma: float = field(default=1.0, metadata={"help": "Discount of the outcome per token before the end."})
    process_gamma: float = field(
        default=1.0, metadata={"help": "Discount of process rewards from one to the next; 0 is immediate credit."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Zero mean and unit variance of the advantages over all tokens of the batch."}
    )

    # Parameters that control the value model
    gae_lambda: float = field(
        default=1.0,
        metadata={
            "help": "How far an advantage by 'gae' trusts the rewards that came (1) rather than the values of the tokens in between "
            "(0)."
        },
    )
    value_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Initial learning rate of the value model of 'gae'. Defaults to 1e-5, and to 1e-4 for an adapter. All else of "
            "its optimizer is as the PRM's."
        },
    )
    value_num_epochs: int = field(
        default=1, metadata={"help": "Passes of the value model of 'gae' over each rollout batch."}
    )
    value_clip_range: float = field(
        default=0.2,
        metadata={
            "help": "How far a value may move on one rollout batch before its loss stops to pull it further, as in PPO. 0 to not "
            "clip."
        },
    )

    # Parameters that control the online prompt filter
    filter_truncated: bool = field(
        default=False, metadata={"help": "Whether groups with a truncated completion are not trained on."}
    )
    filter_max_rounds: int = field(
        default=1,
        metadata={
            "help": "Generate again, up to this many rounds, until enough groups for a batch have passed the filter (dynamic "
            "sampling, as in DAPO). 1 generates once."
        },
    )

    def __post_init__(self):
        # Checked here, and before the generation batch is derived: TRL's own message speaks of GRPO
        if self.num_generations is None or self.num_generations < 2:
            raise ValueError(
                f"num_generations is {self.num_generations}, but PRIME compares the completions of a prompt with each other: "
                "set it to 2 or more (the paper uses 4)."
            )
        if self.per_device_train_batch_size < 1:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}, but must be at least 1."
            )
        # transformers would end in a traceback, and TRL would refuse when the models are loaded
        check_installed("deepspeed", self.deepspeed, is_deepspeed_available(), "deepspeed")
        check_installed("use_vllm", self.use_vllm, is_vllm_available(), "vllm")
        super().__post_init__()
        if self.fp16:
            raise ValueError(
                "fp16=True is not supported: its loss scaler covers every optimizer of the process, and PRIME has two. Use "
                "bf16=True, or both False for float32."
            )
        self._check_choices()
        self._check_ranges()
        self._check_combinations()
        self._check_schedule()
        if self.prm_micro_batch_size is None:
            self.prm_micro_batch_size = self.per_device_train_batch_size

    def for_models(self, policy_is_adapter: bool, prm_is_adapter: bool, trained_beta: float | None) -> PRIMEConfig:
        """
        A copy with the defaults that depend on what is trained: of an adapter each weight has to move further than of the
        whole model.

        Args:
            policy_is_adapter (`bool`): Whether only an adapter of the policy is trained.
            prm_is_adapter (`bool`): The same of the PRM.
            trained_beta (`float`, *optional*): Reward scale that the PRM was trained with before.

        Returns:
            [`PRIMEConfig`]: with `learning_rate`, `prm_learning_rate`, `prm_beta` and, where there is a value model,
            `value_learning_rate`.
        """
        # Scores are sums over tokens: a larger scale keeps those of short completions from being all near zero
        tokens = self.max_completion_length
        beta = 0.05 if tokens is None else min(0.5, max(0.05, 50 / tokens))
        chosen = {
            "learning_rate": (1e-5, SUITS_ADAPTERS) if policy_is_adapter else (5e-7, ""),
            "prm_learning_rate": (1e-4, SUITS_ADAPTERS) if prm_is_adapter else (1e-5, ""),
            "prm_beta": (beta, f"for completions of at most {tokens} tokens" if beta > 0.05 else ""),
        }
        if self.needs_value_model:
            chosen["value_learning_rate"] = (1e-4, SUITS_ADAPTERS) if policy_is_adapter else (1e-5, "")
        if trained_beta is not None:
            chosen["prm_beta"] = (trained_beta, "with which the PRM was trained")
        return with_defaults(self, chosen)

    @property
    def needs_value_model(self) -> bool:
        """Whether a value model is trained along."""
        return self.advantage_estimator in VALUE_MODEL_ESTIMATORS

    def for_value_model(self) -> PRIMEConfig:
        """A copy whose `prm_*` fields are what the value model is trained by: its own rate and epochs, no replay, else the PRM's."""
        args = copy.copy(self)
        args.prm_learning_rate, args.prm_num_epochs = self.value_learning_rate, self.value_num_epochs
        args.prm_replay_batches, args.prm_replay_steps = 0, None
        return args

    @property
    def prompts_per_generation(self) -> int:
        """Prompts of one generation batch over all processes, those generated on top by `oversample_factor` included."""
        return int(self.generation_batch_size * self.oversample_factor) // self.num_generations

    def num_generation_batches(self, max_steps: int) -> int:
        """Generation batches of a run of so many steps of the policy; the last one may be used in part."""
        micro_batches = max_steps * self.gradient_accumulation_steps
        return -(-micro_batches // (self.steps_per_generation * self.num_iterations))

    @property
    def mini_batches(self) -> int:
        """Optimizer steps on a generation batch, of the policy in each of `num_iterations`, of the PRM in each epoch."""
        return max(1, self.steps_per_generation // self.gradient_accumulation_steps)

    def combination_settings(self, trust: float) -> dict[str, Any]:
        """The keyword arguments of [`~trl_prime.advantages.combine_rewards`], process rewards weighted by the trust in the PRM."""
        return {
            "estimator": self.advantage_estimator,
            "outcome_weight": self.outcome_weight,
            "process_weight": self.process_weight * trust,
            "outcome_gamma": self.outcome_gamma,
            "process_gamma": self.process_gamma,
            "whiten": self.whiten_advantages,
            "gae_lambda": self.gae_lambda,
        }

    def _check_choices(self) -> None:
        for name, choices in {
            "prm_reference": REFERENCES,
            "prm_update": UPDATE_MODES,
            "prm_loss_type": LOSS_TYPES,
            "prm_optim": [optimizer.value for optimizer in OptimizerNames],
            "prm_lr_scheduler_type": [schedule.value for schedule in SchedulerType],
            "process_reward_granularity": GRANULARITIES,
            "process_reward_norm": NORMALIZATIONS,
            "advantage_estimator": (*ESTIMATORS, *VALUE_MODEL_ESTIMATORS),
            **{name: trl_choices(name) for name in TRL_CHOICES},
        }.items():
            value = getattr(self, name)
            value = getattr(value, "value", value)
            if choices and value not in choices:
                raise ValueError(f"{name} is {value!r}, which is unknown. {nearest(value, choices)}")
            setattr(self, name, value)

    def _check_ranges(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, but must be positive: rollouts are sampled.")
        if self.prm_beta is not None and (not self.prm_beta > 0 or not math.isfinite(self.prm_beta)):
            raise ValueError(
                f"prm_beta is {self.prm_beta}, but the reward scale must be positive. The paper uses 0.05."
            )
        for name in (
            "learning_rate",
            "prm_learning_rate",
            "prm_weight_decay",
            "prm_max_grad_norm",
            "outcome_weight",
            "process_weight",
            "value_learning_rate",
            "value_clip_range",
        ):
            value = getattr(self, name)
            if value is not None and (not value >= 0 or not math.isfinite(value)):
                raise ValueError(f"{name} is {value}, but must be zero or a positive number.")
        for name in ("outcome_gamma", "process_gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a discount must be between 0 and 1.")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda is {self.gae_lambda}, but must be between 0 and 1.")
        for name, least in {
            "prm_num_epochs": 1,
            "prm_replay_batches": 0,
            "prm_replay_steps": 1,
            "prm_warmup_steps": 0,
            "prm_micro_batch_size": 1,
            "filter_max_rounds": 1,
            "value_num_epochs": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and (value < least or value != int(value)):
                raise ValueError(f"{name} is {value}, but must be a whole number of at least {least}.")
        if not 0 <= self.accuracy_low < self.accuracy_high <= 1:
            raise ValueError(
                f"The accuracy band is [accuracy_low, accuracy_high] = [{self.accuracy_low}, {self.accuracy_high}], but must "
                "satisfy 0 <= low < high <= 1. The paper uses 0.2 and 0.8; 0 and 1 turn the filter off."
            )
        if not self.process_reward_step_delimiter:
            raise ValueError(
                "process_reward_step_delimiter is empty; give the text that ends a step, such as a newline."
            )

    def _check_schedule(self) -> None:
        """Try the PRM's schedule, which is otherwise built only after the first generation."""
        name, kwargs = self.prm_lr_scheduler_type, self.prm_lr_scheduler_kwargs
        if name in (SchedulerType.REDUCE_ON_PLATEAU.value, "greedy"):
            raise ValueError(
                f"prm_lr_scheduler_type is {name!r}, which follows a metric, but the PRM is not evaluated while it trains. Use a "
                "schedule over steps, such as 'linear' or 'cosine'."
            )
        if kwargs and name in (SchedulerType.CONSTANT.value, SchedulerType.CONSTANT_WITH_WARMUP.value):
            raise ValueError(
                f"prm_lr_scheduler_kwargs is {kwargs}, but prm_lr_scheduler_type={name!r} takes no arguments. Leave one of them "
                "out."
            )
        rate = 1e-5 if self.prm_learning_rate is None else self.prm_learning_rate
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        try:
            make_schedule(optimizer, self, num_training_steps=self.prm_warmup_steps + 1000)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(
                f"prm_lr_scheduler_type is {name!r} with prm_lr_scheduler_kwargs={kwargs}, which makes no schedule: {error} Give "
                "its arguments in prm_lr_scheduler_kwargs, or choose another schedule."
            ) from error

    def _check_combinations(self) -> None:
        if self.scale_rewards != "none":
            raise ValueError(
                f"scale_rewards is {self.scale_rewards!r}, but advantages come from advantage_estimator and not from TRL, so that "
                "it would scale nothing. Leave it out; advantage_estimator='grpo' divides by the standard deviation of the "
                "group, whiten_advantages=True by that of the batch."
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation is {self.multi_objective_aggregation!r}, but advantages come from "
                "advantage_estimator and not from TRL, so that it would change nothing. Leave it out, set the shares of the "
                "reward functions by reward_weights, or combine them in a hook (reward_combination)."
            )
        if self.reward_weights is not None and not any(self.reward_weights):
            raise ValueError(
                "reward_weights are all 0, so that no completion would have an outcome. To train on process rewards only, set "
                "outcome_weight=0."
            )
        if self.importance_sampling_level == "sequence" and (self.process_weight != 0 or self.outcome_gamma != 1):
            raise ValueError(
                "importance_sampling_level='sequence' gives all tokens of a completion one weight, so that their advantages are "
                f"averaged and process rewards vanish: process_weight is {self.process_weight} and outcome_gamma "
                f"{self.outcome_gamma}. Use importance_sampling_level='token' (also with loss_type='luspo'), or process_weight=0 "
                "and outcome_gamma=1."
            )
        if self.importance_sampling_level == "sequence" and self.needs_value_model:
            raise ValueError(
                "importance_sampling_level='sequence' gives all tokens of a completion one weight, so that their advantages are "
                f"averaged, but advantage_estimator={self.advantage_estimator!r} has a value for each token. Use "
                "importance_sampling_level='token' (also with loss_type='luspo'), or another estimator, such as 'rloo'."
            )
        for name in () if self.needs_value_model else VALUE_OPTIONS:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but advantage_estimator={self.advantage_estimator!r} has no value model, so "
                    f"that it would change nothing. Use advantage_estimator='gae', or leave {name} out."
                )
        if self.prm_fused_lm_head and self.prm_reference == "policy":
            raise ValueError(
                "prm_fused_lm_head=True does not go with prm_reference='policy': PRM and reference must round alike, and the "
                "policy's fused head divides by the sampling temperature. Leave prm_fused_lm_head out."
            )
        if self.prm_replay_steps is not None and self.prm_replay_steps > self.prm_replay_batches:
            raise ValueError(
                f"prm_replay_steps is {self.prm_replay_steps}, but prm_replay_batches={self.prm_replay_batches} batches are kept "
                "to draw them from. Raise prm_replay_batches or leave prm_replay_steps out."
            )
        if not 0 <= self.prm_guess_rate < 1:
            raise ValueError(
                f"prm_guess_rate is {self.prm_guess_rate}, but it is a share of the wrong completions: choose one from 0 to below "
                "1, for example 0.25 where one of four options is to be chosen."
            )
        if self.prm_guess_rate and self.prm_loss_type != "calibrated_ce":
            raise ValueError(
                f"prm_guess_rate={self.prm_guess_rate} does not go with prm_loss_type={self.prm_loss_type!r}, which does not "
                "allow for luck. Use prm_loss_type='calibrated_ce' or leave prm_guess_rate out."
            )
        if self.prm_reference_weight != "fitted":
            weight = self.prm_reference_weight
            try:
                # The command line gives text
                self.prm_reference_weight = float(weight)
            except (TypeError, ValueError):
                self.prm_reference_weight = math.nan
            if not self.prm_reference_weight >= 0 or not math.isfinite(self.prm_reference_weight):
                raise ValueError(
                    f"prm_reference_weight is {weight!r}, but must be a number of log-odds per nat, zero or positive, or 'fitted', "
                    "with which it follows from the outcomes."
                )
        if self.prm_reference_weight != 0 and self.prm_loss_type != "calibrated_ce":
            raise ValueError(
                f"prm_reference_weight={self.prm_reference_weight!r} does not go with prm_loss_type={self.prm_loss_type!r}, which "
                "has no intercept. Use prm_loss_type='calibrated_ce' or leave prm_reference_weight out."
            )
        if self.outcome_weight == 0 and self.process_weight == 0:
            raise ValueError("outcome_weight and process_weight are both 0, so that nothing would be learnt.")
        if self.advantage_estimator == "value" and self.process_reward_granularity == "whole":
            raise ValueError(
                "advantage_estimator='value' takes the process reward before a token for its value, but with "
                "process_reward_granularity='whole' all of it sits on the last token. Use 'token' or 'step'."
            )
        if self.process_reward_norm == "softmax":
            if self.process_reward_granularity not in ("turn", "step"):
                raise ValueError(
                    "process_reward_norm='softmax' shares the outcome out over the turns or steps of a completion, but "
                    f"process_reward_granularity is {self.process_reward_granularity!r}. Use 'turn' or 'step'."
                )
            if self.advantage_estimator == "value":
                raise ValueError(
                    "process_reward_norm='softmax' shares out the outcome, which advantage_estimator='value' would take for what "
                    "is known before it. Use another estimator, such as 'rloo'."
                )
        if self.process_reward_norm == "group_std" and self.advantage_estimator == "grpo":
            raise ValueError(
                "process_reward_norm='group_std' would change nothing with advantage_estimator='grpo', which divides by a standard "
                "deviation of the group itself. Use advantage_estimator='rloo', or leave process_reward_norm out."
            )
        is_filter_off = self.accuracy_low <= 0 and self.accuracy_high >= 1 and not self.filter_truncated
        if self.filter_max_rounds > 1 and is_filter_off:
            raise ValueError(
                f"filter_max_rounds is {self.filter_max_rounds}, but the filter is off, so that there is nothing to generate again "
                "for. Narrow accuracy_low/accuracy_high or set filter_max_rounds=1."
            )
        if not self.oversample_factor >= 1:
            raise ValueError(f"oversample_factor is {self.oversample_factor}, but must be at least 1.")
        if self.oversample_factor > 1:
            if is_filter_off:
                raise ValueError(
                    f"oversample_factor is {self.oversample_factor}, but the filter is off, so that what is generated on top "
                    "would be thrown away. Narrow accuracy_low/accuracy_high or set oversample_factor=1."
                )
            num_rows = self.generation_batch_size * self.oversample_factor
            per_device = self.per_device_train_batch_size * self.oversample_factor
            if not float(per_device).is_integer() or num_rows % self.num_generations:
                raise ValueError(
                    f"oversample_factor is {self.oversample_factor}, which makes {num_rows:g} completions in a generation batch, "
                    f"{per_device:g} for each {self.per_device_train_batch_size} of per_device_train_batch_size: not whole "
                    f"groups of num_generations={self.num_generations}. Choose a whole number."
                )
