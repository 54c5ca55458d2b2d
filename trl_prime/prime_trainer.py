"""`PRIMETrainer`: Algorithm 1 of PRIME (arXiv 2502.01456) inside TRL's GRPO step. The only file that touches TRL's private API.

What of `GRPOTrainer` is overridden: `_calculate_rewards` (keeps the rewards of each function),
`_generate_and_score_completions` (filter, implicit PRM and advantages after TRL has generated and verified),
`get_train_dataloader` (oversampling), `training_step` (builds the PRM's optimizer late), `_compute_loss` (rows that were left
out change neither the scale of the loss nor its metrics), `get_off_policy_mask` and `get_gamma_weights` (which decide by
completion), `_get_grad_norm` (as in `_compute_loss`, nothing that is not finite reaches the optimizer), and saving and loading.
All else, generation and the policy loss above all, is TRL's.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import os
import shutil
from collections import defaultdict, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import get_json_schema, logging
from trl import GRPOTrainer
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, nanstd

from .advantages import RewardCombination, RolloutRewards
from .checks import checked_combination, checked_reward_func, checked_rollout_func
from .hub import (
    PAPER,
    POLICY_TAGS,
    cached_commit,
    create_repo,
    hub_dataset,
    policy_section,
    pushed_gitignore,
    settings_table,
    upload,
    with_ignored_prm,
    with_section,
)
from .implicit_prm.accuracies import absolute_accuracy, pairwise_accuracy, pairwise_wins
from .implicit_prm.backends import DataParallel, make_backend, unshared
from .implicit_prm.copies import check_apart, compute_head_in_float32
from .implicit_prm.logps import (
    batch_completion_logps,
    can_fuse_lm_head,
    fuse_lm_head,
    in_float32,
    num_chunks,
    rope_boundary,
)
from .implicit_prm.losses import label_log_odds, outcome_scores
from .implicit_prm.model import (
    CONFIG_NAME,
    QUANTIZED,
    ImplicitPRM,
    downloaded_prm,
    is_adapter,
    no_virtual_tokens,
    saved_prm_card,
    saved_weights,
    with_adapter,
)
from .implicit_prm.updater import PRMBatch, PRMUpdater
from .policy_loss import loss_scales, sequence_advantages, vary_within_rows
from .prime_config import TABLE_PREFIX, PRIMEConfig
from .process_exit import let_threads_finish_at_exit
from .process_rewards import (
    aggregate_process_rewards,
    correlation,
    implicit_process_rewards,
    normalize_process_rewards,
    reward_positions,
)
from .prompt_filter import select_groups
from .rollouts import combine_outcomes
from .specs import nearest
from .texts import TextFormat

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.get_logger(__name__)

# In a checkpoint, where all processes hold the same: the optimizer of the PRM
PRM_OPTIMIZER_NAME = "prm_optimizer.pt"
# Keyword arguments that TRL gives to every reward function beside the columns of the data set
_REWARD_KWARGS = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
    "self",
}
# What TRL adds to rollouts with images, beside keys that begin with pixel_ or image_
_VISION_KEYS = {"num_images", "num_tiles", "spatial_shapes"}
# The PRM's running pairwise accuracy: how much of the past is kept with each batch, and as how many even pairs it starts
_TRUST_DECAY = 0.9
_TRUST_PRIOR_PAIRS = 16
# By how many standard errors the accuracy is taken to be worse than measured
_TRUST_STANDARD_ERRORS = 1.5
# Completions whose process rewards are compared with those in float32, and updates before a low precision is warned of
_PRECISION_ROWS = 2
_PRECISION_UPDATES = 10


class PRIMETrainer(GRPOTrainer):
    """
    Trainer for PRIME: online RL with outcome rewards and the dense process rewards of an implicit PRM that is trained
    along with the policy, on outcome labels only.

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_prime import PRIMEConfig, PRIMETrainer

    trainer = PRIMETrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=PRIMEConfig("Qwen2.5-0.5B-PRIME", per_device_train_batch_size=8),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The policy.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*): Outcome rewards, as for [`~trl.GRPOTrainer`].
        args ([`PRIMEConfig`], *optional*): Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*): Must have a `prompt` column.
        *grpo_args: Further positional arguments of [`~trl.GRPOTrainer`].
        prm_model (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`ImplicitPRM`], *optional*):
            Start of the implicit PRM and its reference. `None`: the policy as it is at the start, as in the paper. An
            [`ImplicitPRM`], or the folder that one was saved in, brings its own reference and keeps it: an earlier run's
            PRM, or one trained offline.
        prm_peft_config ([`~peft.PeftConfig`], *optional*):
            Train the PRM as an adapter. If the policy has an adapter too, both share one base model, which is also the
            reference.
        reward_combination (`Callable[[RolloutRewards], torch.Tensor]`, *optional*):
            Hook that replaces the advantage computation: takes [`~trl_prime.advantages.RolloutRewards`], returns `(B, T)`
            advantages.
        **grpo_kwargs: Every other argument of [`~trl.GRPOTrainer`], unchanged.

    Attributes:
        implicit_prm ([`ImplicitPRM`]): The PRM: `.model` is trained, `.reference` is frozen, or `None` when its
            log-probabilities come from the policy.
    """

    _tag_names = POLICY_TAGS
    _name = "PRIME"
    _paper = PAPER
    prm_hub_model_id: str | None = None
    _card_dataset: str | None = None

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: PRIMEConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *grpo_args: Any,
        prm_model: str | PreTrainedModel | ImplicitPRM | None = None,
        prm_peft_config: PeftConfig | None = None,
        reward_combination: RewardCombination | None = None,
        **grpo_kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PRIMEConfig(f"{name.split('/')[-1] or 'model'}-PRIME")
        bound = inspect.signature(GRPOTrainer.__init__).bind_partial(
            self, model, reward_funcs, args, train_dataset, *grpo_args, **grpo_kwargs
        )
        grpo = dict(list(bound.arguments.items())[1:])
        if isinstance(prm_model, str) and not os.path.isdir(prm_model):
            prm_model = downloaded_prm(prm_model) or prm_model
        _check_before_loading(grpo, prm_model, prm_peft_config, reward_combination)

        super().__init__(**grpo)
        let_threads_finish_at_exit()

        if args.prm_label != "reward" and args.prm_label not in self.reward_func_names:
            raise ValueError(
                f"prm_label is {args.prm_label!r}, but no reward function has that name. "
                f"{nearest(args.prm_label, ['reward', *self.reward_func_names])}"
            )
        self.reward_funcs = [
            func if isinstance(func, torch.nn.Module) else checked_reward_func(func, name)
            for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.rollout_func is not None:
            self.rollout_func = checked_rollout_func(self.rollout_func)
        self.reward_combination = reward_combination
        self.implicit_prm = self._build_implicit_prm(prm_model, prm_peft_config, grpo["model"])
        self.implicit_prm.text_format = self._text_format()
        start = grpo["model"] if prm_model is None else prm_model
        if isinstance(start, str) and not os.path.isfile(os.path.join(start, CONFIG_NAME)):
            self.implicit_prm.reference_name = start
            kwargs = (args.prm_model_init_kwargs if prm_model is not None else None) or args.model_init_kwargs or {}
            self.implicit_prm.reference_revision = cached_commit(
                start, kwargs.get("revision"), kwargs.get("cache_dir")
            )
        if args.push_to_hub:
            self.implicit_prm.reference_name = self.implicit_prm.portable_reference_name()
        self._fuse_lm_heads()
        self._prm_backend = make_backend(self.implicit_prm, self.accelerator)
        self._prm_is_placed = False
        self._prm_updater: PRMUpdater | None = None
        # Whether the updater's schedule is that of an earlier `train()`
        self._prm_schedule_is_over = False
        # The next step at which process rewards are compared with those in float32
        self._precision_step = 0
        # The PRM starts out guessing
        self._prm_wins, self._prm_pairs = _TRUST_PRIOR_PAIRS / 2, float(_TRUST_PRIOR_PAIRS)
        self._rewards_per_func: torch.Tensor | None = None
        micro_batches_per_generation = args.steps_per_generation * args.num_iterations
        if (
            args.save_strategy == "steps"
            and args.save_steps * args.gradient_accumulation_steps % micro_batches_per_generation
        ):
            logger.warning(
                f"save_steps={args.save_steps} ends between two generations (one lasts {micro_batches_per_generation} "
                f"micro-batches, a step has {args.gradient_accumulation_steps}): a run resumed from such a checkpoint generates "
                "anew and will not repeat the one that was stopped to the bit."
            )
        # TRL sizes the completions table to one generation batch
        if args.oversample_factor > 1:
            size = int(args.generation_batch_size * args.oversample_factor)
            for column in ("images", "prompt", "completion", "advantages"):
                self._logs[column] = deque(maxlen=size)
            for column in ("rewards", "extra"):
                self._logs[column].default_factory = lambda: deque(maxlen=size)

    def _build_implicit_prm(self, prm_model: Any, peft_config: PeftConfig | None, policy_start: Any) -> ImplicitPRM:
        args = self.args
        settings = {
            "beta": args.prm_beta,
            "step_delimiter": args.process_reward_step_delimiter,
            "micro_batch_size": args.prm_micro_batch_size,
        }
        policy = self.accelerator.unwrap_model(self.model)
        frozen_reference = args.prm_reference == "frozen"
        # Engines of ZeRO-3 fetch and release weights each for itself, so that nothing can be shared between them
        zero3 = is_deepspeed_zero3_enabled()
        # TRL has seeded each process differently by now: PRM adapters must start alike on all of them, and the policy's
        # random numbers must be those of a run without PRM
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            build = {"peft_config": peft_config, "frozen_reference": frozen_reference, **settings}
            if isinstance(prm_model, str) and os.path.isfile(os.path.join(prm_model, CONFIG_NAME)):
                # An earlier run's PRM: as a plain model it would become its own reference and forget what it learnt
                prm_model = ImplicitPRM.from_pretrained(
                    prm_model, trainable=True, **{"dtype": "float32", "device_map": None, **self._prm_init_kwargs()}
                )
            if isinstance(prm_model, ImplicitPRM):
                prm = prm_model
                prm.use_settings(**settings)
                prm.reference = prm.reference if frozen_reference else None
                if isinstance(prm.model, PeftModel):
                    prm.model.set_adapter(prm.model.active_adapter)  # makes it trainable, and nothing else
                else:
                    prm.model.requires_grad_(True)
            elif prm_model is None and not (zero3 and isinstance(policy_start, str)):
                prm = ImplicitPRM.from_policy(unshared(policy) if zero3 else policy, self._tokenizer, **build)
            elif zero3 and isinstance(prm_model or policy_start, str):
                # Sharded while it is loaded: no process ever holds all of it
                model, reference = (self._load_prm(prm_model or policy_start) for _ in range(2))
                if peft_config is not None:
                    model = with_adapter(model, peft_config, autocast_adapter_dtype=False)
                prm = ImplicitPRM(model, reference if frozen_reference else None, self._tokenizer, **settings)
                zero3 = False
            else:
                prm_model = self._load_prm(prm_model) if isinstance(prm_model, str) else prm_model
                prm = ImplicitPRM.from_model(prm_model, self._tokenizer, **build)
            if zero3 and prm.reference is not None:
                prm.reference = unshared(prm.reference)
        needed = max(self._tokenizer.get_vocab().values()) + 1
        embeddings = prm.model.get_input_embeddings()
        rows = getattr(embeddings, "num_embeddings", embeddings.weight.shape[0])  # ZeRO-3 shows an empty weight
        if rows < needed:
            raise ValueError(
                f"The implicit PRM embeds {rows} tokens, but the policy's tokenizer has {needed}: it belongs to another "
                "tokenizer. Use a PRM of the policy's model family."
            )
        trainable = [p for p in prm.model.parameters() if p.requires_grad]
        if args.prm_update != "none" and any(p.dtype in (torch.bfloat16, torch.float16) for p in trainable):
            logger.warning(
                f"The trainable weights of the PRM are {trainable[0].dtype}: updates of the size of prm_learning_rate="
                f"{args.prm_learning_rate} are rounded away. Load it in float32 (prm_model_init_kwargs={{'dtype': "
                "'float32'}}); bf16=True still computes in bfloat16."
            )
        if args.disable_dropout:
            disable_dropout_in_model(prm.model)
        if prm.reference is not None:
            prm.reference.eval()
        if args.cast_lm_head_to_fp32:
            # The policy's too where it is the reference: TRL's does not compute in float32 under autocast
            for model in (prm.model, policy if prm.reference is None else prm.reference):
                compute_head_in_float32(model)
        check_apart(policy, prm.model, prm.reference)
        return prm

    def _text_format(self) -> TextFormat:
        """How TRL writes prompts and ends completions; whether they are messages is seen with the first of them."""
        kwargs = dict(self.chat_template_kwargs)
        is_processor = isinstance(self.processing_class, ProcessorMixin)
        template = self.processing_class.chat_template if is_processor else self.chat_template
        if template is not None:
            kwargs["chat_template"] = template
        if self.tools:
            kwargs["tools"] = [get_json_schema(tool) for tool in self.tools]
        # Before 1.16, TRL ends completions at the tokenizer's end token only
        ends = getattr(self, "eos_token_ids", [])
        return TextFormat.of(self._tokenizer, ends, chat_template_kwargs=kwargs, content_blocks=is_processor)

    def _fuse_lm_heads(self) -> None:
        prm, wanted = self.implicit_prm, self.args.prm_fused_lm_head
        models = [model for model in (prm.model, prm.reference) if model is not None]
        possible = all(can_fuse_lm_head(model) for model in models)
        if wanted and not possible:
            raise ValueError(
                "prm_fused_lm_head=True needs TRL from 1.15, and a PRM without an adapter on its head. Leave it out."
            )
        if wanted is None:
            wanted = possible and self.args.prm_reference == "frozen" and self.accelerator.device.type == "cuda"
        if wanted:
            for model in models:
                fuse_lm_head(model)

    def _prm_init_kwargs(self) -> dict[str, Any]:
        args = self.args
        kwargs = dict(args.prm_model_init_kwargs or args.model_init_kwargs or {})
        if args.distributed_state.distributed_type != DistributedType.NO:
            kwargs["device_map"] = None
        kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        return kwargs

    def _load_prm(self, name: str) -> PreTrainedModel:
        return create_model_from_path(name, **self._prm_init_kwargs())

    # --- Oversampling: more prompts in a generation batch, so that enough of them pass the filter ---

    def get_train_dataloader(self):
        factor = self.args.oversample_factor
        if factor == 1:
            return super().get_train_dataloader()
        # TRL derives the rows of each process from the first and the prompts of a batch from the second
        train_batch_size, generation_batch_size = self._train_batch_size, self.args.generation_batch_size
        try:
            self._train_batch_size = int(train_batch_size * factor)
            self.args.generation_batch_size = int(generation_batch_size * factor)
            return super().get_train_dataloader()
        finally:
            self._train_batch_size, self.args.generation_batch_size = train_batch_size, generation_batch_size

    # --- One step of Algorithm 1 ---

    def training_step(self, model, inputs, num_items_in_batch):
        self._ensure_prm()
        return super().training_step(model, inputs, num_items_in_batch)

    def _place_prm(self) -> None:
        # Not in __init__: the policy is distributed first, and Trainer frees what was there before when training starts
        if not self._prm_is_placed:
            self._prm_backend.place()
            self._prm_is_placed = True

    def _ensure_prm(self) -> None:
        self._place_prm()
        if self.args.prm_update == "none" or (self._prm_updater is not None and not self._prm_schedule_is_over):
            return
        args = self.args
        micro_batches = self.state.max_steps * args.gradient_accumulation_steps
        num_rollout_batches = -(-micro_batches // (args.steps_per_generation * args.num_iterations))
        if self._prm_updater is None:
            self._prm_updater = PRMUpdater(self._prm_backend, args, num_rollout_batches, self.num_generations)
        else:
            self._prm_updater.start_schedule(num_rollout_batches)
        self._prm_schedule_is_over = False

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        weight, policy_factor = loss_scales(mask, inputs["rows_per_trained_row"], self.loss_type)
        # The policy's term is linear in the advantages, the KL term in beta; what is divided by all tokens keeps its scale
        inputs = {
            **inputs,
            "advantages": inputs["advantages"] * policy_factor,
            "num_items_in_batch": inputs["num_items_in_batch"] * weight,
        }
        beta, entropy_control = self.beta, (self.entropy_coef, self._last_world_entropy)
        metrics, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        self.beta = beta * policy_factor if beta else beta
        loss = super()._compute_loss(model, inputs) * weight
        self.beta = beta
        if self._last_world_entropy == 0:
            # That is a mean over no token, by which TRL's adaptive entropy bonus must not steer
            self.entropy_coef, self._last_world_entropy = entropy_control

        # On all processes alike, and before the backward pass, in which DeepSpeed steps
        losses, num_tokens = self.accelerator.gather(torch.stack([loss.detach().float(), mask.sum().float()])[None]).T
        if not losses.isfinite().all():
            raise FloatingPointError(
                f"The policy's loss is not finite at step {self.state.global_step}, so this step was not made: its "
                "log-probabilities or those of the rollouts are broken. Lower learning_rate or max_grad_norm, and resume from "
                "the last checkpoint."
            )
        # An entropy or a KL of no token is no measurement
        if num_tokens.any():
            for name, values in self._metrics["train"].items():
                metrics[name] += values
        self._metrics["train"] = metrics
        return loss

    @staticmethod
    def get_off_policy_mask(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold):
        advantages = sequence_advantages(advantages, mask)
        return GRPOTrainer.get_off_policy_mask(
            advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold
        )

    @staticmethod
    def get_gamma_weights(advantages, log_ratio_per_token, mask, importance_sampling_ratio, **parameters):
        advantages = sequence_advantages(advantages, mask)
        return GRPOTrainer.get_gamma_weights(
            advantages, log_ratio_per_token, mask, importance_sampling_ratio, **parameters
        )

    def _get_grad_norm(self, model, grad_norm=None):
        # The last thing that Trainer calls before the optimizer's step; the norm is the same on all processes
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if grad_norm is None:
            return grad_norm
        norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of the policy is {norm} at step {self.state.global_step}, and one step with it would ruin all "
                "weights. Lower learning_rate or max_grad_norm, and resume from the last checkpoint."
            )
        if norm == 0:
            # No completion had anything to teach: without gradients the optimizer does not follow its momentum either
            model.zero_grad(set_to_none=True)
        self._log("filter/skipped_steps", norm == 0)
        return grad_norm

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs):
        self._place_prm()
        self.implicit_prm.text_format.messages = not isinstance(inputs[0]["prompt"], str)
        output = super()._generate_and_score_completions(inputs)
        _check_text_only(output)
        rewards_per_func = self._rewards_per_func
        outcomes, labels = self._outcomes_and_labels(rewards_per_func)
        mode = "train" if self.model.training else "eval"
        if mode == "eval":
            self._evaluate_prm(output, outcomes, labels)
            return output

        # Prompt filter: rows that fail it, or that could not be judged, carry no gradient
        all_outcomes, num_rows = outcomes, outcomes.shape[0]
        truncated = self.accelerator.gather(self._is_truncated(output))
        passed = select_groups(
            labels,
            self.num_generations,
            low=self.args.accuracy_low,
            high=self.args.accuracy_high,
            truncated=truncated if self.args.filter_truncated else None,
        )
        rows = self._rows_to_train_on(passed)
        self._log("filter/pass_rate", passed.float().mean())
        self._log("filter/judged", 1 - outcomes.isnan().float().mean())
        trains = passed.repeat_interleave(self.num_generations) & ~outcomes.isnan()
        output = self._select_rows(output, rows)
        self._log("filter/trained", trains[rows].float().mean())
        outcomes, labels = outcomes.masked_fill(~trains, torch.nan)[rows], labels.masked_fill(~trains, torch.nan)[rows]
        trains = trains[rows]

        # Implicit PRM: score with one state, update, advantages
        batch = self._prm_batch(output, labels, trains)
        prm_logps, updated_logps, scores = self._score_and_update(batch)
        wins, pairs = pairwise_wins(scores, labels, self.num_generations)
        self._log("prm/pairwise_accuracy", wins / pairs if pairs else float("nan"))
        self._log("prm/accuracy", absolute_accuracy(self._label_log_odds(scores), labels))
        if self.args.prm_update == "before":
            prm_logps = updated_logps = self._prm_logps(batch)
        if updated_logps is not None:
            updated = pairwise_accuracy(self._scores(batch, updated_logps), labels, self.num_generations)
            self._log("prm/pairwise_accuracy_after_update", updated)
        trust = self._update_trust(wins, pairs)
        advantages, process_rewards = self._advantages(
            output, batch, prm_logps, outcomes, trains, rewards_per_func[rows], rows, num_rows, trust
        )

        local = self._local(trains)
        output["advantages"] = advantages
        if not trains.all():
            # `tool_mask` is what TRL leaves out of every term of the loss, of KL and entropy too, while attention still
            # sees the tokens
            tool_mask = output.get("tool_mask", torch.ones_like(output["completion_mask"]))
            output["tool_mask"] = tool_mask * local[:, None].to(tool_mask.dtype)
        loss_mask = output["completion_mask"] * output.get("tool_mask", 1)
        num_tokens, num_trained = self.accelerator.reduce(
            torch.stack([loss_mask.sum(), loss_mask.any(1).sum()]), "sum"
        )
        output["num_items_in_batch"] = num_tokens.clamp(min=1)
        output["rows_per_trained_row"] = len(trains) / num_trained.clamp(min=1)
        if self.importance_sampling_level == "sequence":
            output["advantages"] = sequence_advantages(advantages, loss_mask).squeeze(1)
        self._log_rows(rows, all_outcomes, trains, process_rewards, advantages, loss_mask)
        return output

    def _outcomes_and_labels(self, rewards_per_func: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B,)` weighted sums of the rewards and `(B,)` labels of the PRM, of all processes; NaN = not judged."""
        if rewards_per_func.isinf().any():
            column = rewards_per_func.isinf().any(0).nonzero()[0].item()
            raise ValueError(
                f"The reward function '{self.reward_func_names[column]}' returned infinity. Return None for a completion that "
                "it cannot judge."
            )
        label = self.args.prm_label
        column = None if label == "reward" else self.reward_func_names.index(label)
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        outcomes, applies = combine_outcomes(rewards_per_func, self.reward_weights, num_generations, column)
        labels = outcomes if column is None else rewards_per_func[:, column]
        if num_generations > 1:
            # TRL has logged sums in which a missing reward counts as 0
            self._metrics[mode]["reward"][-1] = outcomes.nanmean().item()
            self._metrics[mode]["reward_std"][-1] = nanstd(outcomes).item()
            self._warn_of_partial_sums(applies[~outcomes.isnan()])
        outside = (labels < -1e-6) | (labels > 1 + 1e-6)
        if outside.any():
            raise ValueError(
                f"The outcome label {labels[outside][0].item():g} is outside [0, 1], but the implicit PRM is trained on "
                f"probabilities of success. prm_label is {label!r}: set it to the name of the reward function that says "
                f"right or wrong (one of {self.reward_func_names}), or choose reward_weights so that the sum stays between 0 "
                "and 1."
            )
        return outcomes, labels.clamp(0, 1)

    def _warn_of_partial_sums(self, applies: torch.Tensor) -> None:
        """Say once which functions were left out of outcomes: `applies` is `(B, F)`, of the completions that have one."""
        left_out = (~applies).any(0) & (self.reward_weights != 0).to(applies.device)
        if self.args.prm_label == "reward" and left_out.any():
            names = [name for name, is_out in zip(self.reward_func_names, left_out.tolist(), strict=True) if is_out]
            logger.warning_once(
                f"{names} returned None for all completions of a prompt, so that its outcome is the sum of the other reward "
                "functions. That is right where a function is not for that prompt. If it says right or wrong and could not "
                "judge, set prm_label to its name, and such prompts are left out."
            )

    def _is_truncated(self, output: dict[str, Any]) -> torch.Tensor:
        """`(B,)` bool of this process: the completion ran into the length limit."""
        completion_ids, mask = output["completion_ids"], output["completion_mask"]
        # Before 1.16, TRL knows the tokenizer's end token only
        eos_token_ids = getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id])
        ends = torch.tensor([*eos_token_ids, self._tokenizer.pad_token_id], device=mask.device)
        last = (mask.sum(1) - 1).clamp(min=0)
        last_ids = completion_ids.gather(1, last[:, None]).squeeze(1)
        # An empty mask is a completion that TRL has masked because it was truncated
        return ~torch.isin(last_ids, ends) | (mask.sum(1) == 0)

    def _rows_to_train_on(self, passed: torch.Tensor) -> torch.Tensor:
        """Rows of the generated batch that make up the training batch: whole groups, those that passed first."""
        size = self.args.generation_batch_size // self.num_generations
        num_passed = int(passed.sum())
        if num_passed < size:
            message = (
                f"{num_passed} of {len(passed)} groups passed the prompt filter (accuracy between {self.args.accuracy_low} and "
                f"{self.args.accuracy_high}), but a generation batch needs {size}."
            )
            if self.args.filter_shortfall == "error":
                raise RuntimeError(
                    f"{message} Widen the band, raise oversample_factor or set filter_shortfall='mask' to train on fewer."
                )
            if num_passed == 0:
                logger.warning_once(f"{message} Nothing is learnt from such batches (filter/pass_rate is 0).")
        order = torch.cat([passed.nonzero().flatten(), (~passed).nonzero().flatten()])[:size].sort().values
        offsets = torch.arange(self.num_generations, device=order.device)
        return (order[:, None] * self.num_generations + offsets).flatten()

    def _local(self, values: torch.Tensor) -> torch.Tensor:
        """This process's rows of values of all processes."""
        size = values.shape[0] // self.accelerator.num_processes
        return values[self.accelerator.process_index * size : (self.accelerator.process_index + 1) * size]

    def _select_rows(self, output: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
        """Keep the given rows of all processes' output, spread evenly over the processes."""
        num_local = output["completion_ids"].shape[0]
        if len(rows) == num_local * self.accelerator.num_processes:
            return output
        selected = {}
        for key, value in output.items():
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                if value.ndim > 1:
                    value = self.accelerator.pad_across_processes(
                        value,
                        dim=1,
                        pad_index=self._tokenizer.pad_token_id if key.endswith("_ids") else 0,
                        pad_first=key.startswith("prompt_"),
                    )
                value = self._local(self.accelerator.gather(value)[rows])
            selected[key] = value
        # Cut what only the dropped rows needed
        prompt_len = int(selected["prompt_mask"].sum(1).amax())
        num_tokens = selected["completion_ids"].shape[1]
        completion_len = max(int((selected["completion_ids"] != self._tokenizer.pad_token_id).sum(1).amax()), 1)
        completion_len = max(int(selected["completion_mask"].sum(1).amax()), completion_len)
        for key, value in selected.items():
            if not isinstance(value, torch.Tensor) or value.ndim < 2:
                continue
            if key.startswith("prompt_"):
                selected[key] = value[:, -prompt_len:]
            elif value.shape[1] == num_tokens:
                selected[key] = value[:, :completion_len]
        return selected

    def _prm_batch(self, output: dict[str, Any], labels: torch.Tensor, trains: torch.Tensor) -> PRMBatch:
        """This process's rows as the PRM sees them, with the reference's log-probabilities."""
        prm, local = self.implicit_prm, self._local(trains)
        inputs = tuple(output[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
        mask = (output["completion_mask"] * output.get("tool_mask", 1)).bool() & local[:, None]
        # Rows that do not train are not scored either. The PRM scores the same rows: in other micro-batches it would round apart.
        rows = mask.any(1)
        chosen = {"rows": rows, "num_passes": self._num_passes(rows)}
        with self.accelerator.autocast():
            if prm.reference is not None:
                ref_logps = prm.reference_log_probs(*inputs, **chosen)
            else:
                policy = self.accelerator.unwrap_model(self.model)
                ref_logps = batch_completion_logps(policy, *inputs, prm.micro_batch_size, **chosen)
        # A completion without tokens has no score to be compared with
        return PRMBatch(*inputs, mask, ref_logps, self._local(labels).masked_fill(~mask.any(1), torch.nan))

    def _score_and_update(self, batch: PRMBatch) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Update the PRM. Its `(B, T)` log-probabilities from before, those that its last epoch saw if it had several, and all
        processes' scores from before.
        """
        updater = self._prm_updater
        exact = self._exact_log_ratios(batch)
        # Single forward: the passes of the update give the scores, but for rows that it does not train on
        single = updater is not None and updater.can_score
        prm_logps = self._prm_logps(batch, batch.labels.isnan() if single else True)
        scores = None if single else self._scores(batch, prm_logps)
        if updater is None:
            self._log_precision(batch, prm_logps, exact)
            return prm_logps, None, scores
        if not single:
            batch.scores = self._local(scores).nan_to_num()
        last_logps = torch.zeros_like(prm_logps) if self.args.prm_num_epochs > 1 else None
        for name, value in updater.update(batch, prm_logps if single else None, last_logps).items():
            self._log(f"prm/{name}", value)
        self._log("prm/skipped_steps", updater.skipped_steps)
        self._log_precision(batch, prm_logps, exact)
        return prm_logps, last_logps, self._scores(batch, prm_logps) if single else scores

    def _exact_log_ratios(self, batch: PRMBatch) -> torch.Tensor | None:
        """
        `(B, T)` log-ratios of the present PRM in float32, in a few rows of the main process once every `logging_steps` steps.
        `None` between, and where float32 is what the run computes in or cannot be had.
        """
        prm, step = self.implicit_prm, self.state.global_step
        if (
            step < self._precision_step
            or self.accelerator.mixed_precision != "bf16"
            or type(self._prm_backend) is not DataParallel
            or not self.is_world_process_zero()
            or prm.reference is None
            or any(p.dtype != torch.float32 for model in (prm.model, prm.reference) for p in model.parameters())
        ):
            return None
        self._precision_step = step + max(int(self.state.logging_steps), 1)
        rows = batch.reward_mask.any(1)
        rows &= rows.cumsum(0) <= _PRECISION_ROWS
        with in_float32(prm.model), in_float32(prm.reference):
            return prm.log_probs(*batch.inputs, rows=rows) - prm.reference_log_probs(*batch.inputs, rows=rows)

    def _log_precision(self, batch: PRMBatch, prm_logps: torch.Tensor, exact: torch.Tensor | None) -> None:
        """Compare the process rewards of a batch with those in float32, where these were computed."""
        if exact is None:
            return
        seen = batch.reward_mask & (exact != 0).any(1, keepdim=True)
        precision = correlation((prm_logps - batch.ref_logps)[seen], exact[seen])
        self._log("prm/precision", precision)
        num_updates = 0 if self._prm_updater is None else self._prm_updater.scheduler.last_epoch
        if num_updates > _PRECISION_UPDATES and precision < 0.5:
            logger.warning_once(
                f"After {num_updates} updates of the PRM its process rewards are mostly rounding: in bfloat16 they correlate by "
                f"{precision:.2f} with those in float32 (prm/precision). The PRM has moved too little: raise prm_learning_rate, "
                f"which is {self.args.prm_learning_rate:g} (1e-5 for all weights, 1e-4 or more with prm_peft_config)."
            )

    def _label_log_odds(self, scores: torch.Tensor) -> torch.Tensor:
        intercept = self._prm_updater.intercept if self._prm_updater else 0.0
        return label_log_odds(scores, intercept, self.args.prm_guess_rate)

    def _prm_logps(self, batch: PRMBatch, among: torch.Tensor | bool = True) -> torch.Tensor:
        """`(B, T)` log-probabilities under the present PRM of the rows that have any to score; zero elsewhere."""
        rows = batch.reward_mask.any(1) & among
        with self.accelerator.autocast():
            return self.implicit_prm.log_probs(*batch.inputs, rows=rows, num_passes=self._num_passes(rows))

    def _scores(self, batch: PRMBatch, prm_logps: torch.Tensor) -> torch.Tensor:
        """`(B,)` scores of the completions of all processes; NaN where there was nothing to score."""
        scores = outcome_scores(prm_logps - batch.ref_logps, batch.reward_mask, self.implicit_prm.beta)
        # On all processes alike: the others would wait for one that has stopped
        all_scores, scored = self.accelerator.gather(scores), self.accelerator.gather(batch.reward_mask.any(1))
        if not all_scores.isfinite().all():
            raise FloatingPointError(
                f"The implicit PRM gave {all_scores[~all_scores.isfinite()][0].item()} for a completion at step "
                f"{self.state.global_step}. Its weights, the reference or the rollouts are broken: look at prm/grad_norm of the "
                "last steps, lower prm_learning_rate, and resume from the last checkpoint."
            )
        return all_scores.masked_fill(~scored, torch.nan)

    def _num_passes(self, rows: torch.Tensor) -> int:
        """Forward passes for the rows of the process that has the most of them, where weights are sharded."""
        if not self._prm_backend.collective:
            return 0
        num_rows = int(self.accelerator.gather(rows.sum().view(1)).max())
        return num_chunks(num_rows, self.implicit_prm.micro_batch_size, rope_boundary(self.implicit_prm.model))

    def _update_trust(self, wins: float, pairs: int) -> float:
        """Weight of the process rewards: how much better than chance the PRM ranks rollouts that it was not trained on."""
        if pairs:
            self._prm_wins = _TRUST_DECAY * self._prm_wins + wins
            self._prm_pairs = _TRUST_DECAY * self._prm_pairs + pairs
        accuracy = self._prm_wins / self._prm_pairs
        # Of few pairs most may be won by luck, and the policy would follow a PRM that knows nothing. The variance is at
        # least that of an accuracy of 0.9: a few pairs that were all won leave a doubt too
        standard_error = math.sqrt(max(accuracy * (1 - accuracy), 0.09) / self._prm_pairs)
        sure = accuracy - _TRUST_STANDARD_ERRORS * standard_error
        trust = max(0.0, 2 * sure - 1) if self.args.prm_trust_weighting else 1.0
        self._log("prm/trust", trust)
        return trust

    def _advantages(
        self,
        output: dict[str, Any],
        batch: PRMBatch,
        prm_logps: torch.Tensor,
        outcomes: torch.Tensor,
        trains: torch.Tensor,
        rewards_per_func: torch.Tensor,
        rows: torch.Tensor,
        num_rows: int,
        trust: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, T)` advantages and process rewards of this process, computed over the rows of all processes."""
        args = self.args
        mask, granularity = batch.reward_mask, args.process_reward_granularity
        step_ids = self.implicit_prm.step_ids(batch.completion_ids) if granularity == "step" else None
        token_rewards = implicit_process_rewards(prm_logps, batch.ref_logps, mask, self.implicit_prm.beta)
        self._log("prm/process_reward", self._masked_mean(token_rewards, mask))
        process_rewards = aggregate_process_rewards(token_rewards, mask, granularity, step_ids)
        positions = reward_positions(mask, granularity, step_ids)

        # Not as bool: accelerate's padding makes that another type, on those processes alone that pad
        all_process, all_positions, all_mask = (
            self.accelerator.gather(self.accelerator.pad_across_processes(tensor, dim=1))
            for tensor in (process_rewards, positions.int(), mask.int())
        )
        all_positions, all_mask = all_positions.bool(), all_mask.bool()
        all_process = normalize_process_rewards(
            all_process, all_positions, args.process_reward_norm, gamma=args.process_gamma
        )
        settings = {
            "estimator": args.advantage_estimator,
            "outcome_weight": args.outcome_weight,
            "process_weight": args.process_weight * trust,
            "outcome_gamma": args.outcome_gamma,
            "process_gamma": args.process_gamma,
            "whiten": args.whiten_advantages,
        }
        rewards = RolloutRewards(
            outcome_rewards=outcomes,
            process_rewards=all_process,
            completion_mask=all_mask,
            reward_mask=all_positions,
            num_generations=self.num_generations,
            settings=settings,
            outcome_rewards_per_func=rewards_per_func,
            reward_func_names=self.reward_func_names,
            trainer_state=self.state,
        )
        if self.reward_combination is None:
            advantages, share = rewards.combine_with_share()
            self._log("advantage/process_share", share)
        else:
            advantages = checked_combination(
                self.reward_combination, self._with_rollouts(rewards, output, rows, num_rows)
            )
        advantages = advantages.masked_fill(~trains[:, None], 0.0)
        if not advantages.isfinite().all():
            raise FloatingPointError(
                f"Advantages are not finite at step {self.state.global_step}; nothing was trained."
            )
        if self.importance_sampling_level == "sequence" and vary_within_rows(advantages, all_mask).any():
            raise ValueError(
                "importance_sampling_level='sequence' gives all tokens of a completion one weight and would average their "
                "advantages, but reward_combination returned advantages that differ within a completion. Use "
                "importance_sampling_level='token'."
            )
        return self._local(advantages)[:, : mask.shape[1]], process_rewards

    def _with_rollouts(
        self, rewards: RolloutRewards, output: dict[str, Any], rows: torch.Tensor, num_rows: int
    ) -> RolloutRewards:
        """Add what only a hook needs: the rollouts as ids and as TRL has just logged them."""
        completion_ids = self.accelerator.pad_across_processes(
            output["completion_ids"], dim=1, pad_index=self._tokenizer.pad_token_id
        )
        texts = {}
        for column in ("prompt", "completion"):
            logged = list(self._logs[column])[-num_rows:]
            texts[f"{column}s"] = [logged[row] for row in rows.tolist()]
        return dataclasses.replace(rewards, completion_ids=self.accelerator.gather(completion_ids), **texts)

    # --- Evaluation and logging ---

    def _evaluate_prm(self, output: dict[str, Any], outcomes: torch.Tensor, labels: torch.Tensor) -> None:
        """Score held-out completions; nothing is trained."""
        judged = ~labels.isnan()
        batch = self._prm_batch(output, labels, judged)
        prm_logps = self._prm_logps(batch)
        scores = self._scores(batch, prm_logps)
        if self.num_generations_eval > 1:
            self._log("prm/pairwise_accuracy", pairwise_accuracy(scores, labels, self.num_generations_eval))
        self._log("prm/accuracy", absolute_accuracy(self._label_log_odds(scores), labels))
        mask = batch.reward_mask
        process_rewards = implicit_process_rewards(prm_logps, batch.ref_logps, mask, self.implicit_prm.beta)
        self._log("prm/process_reward", self._masked_mean(process_rewards, mask))
        if self.log_completions:
            self._log_columns(outcomes, self.accelerator.gather(process_rewards.sum(1)), torch.zeros_like(judged))

    def _masked_mean(self, values: torch.Tensor, mask: torch.Tensor) -> float:
        """Mean over the unmasked tokens of all processes; NaN if there are none."""
        total, count = self.accelerator.reduce(torch.stack([values[mask].sum(), mask.sum().float()]), "sum").tolist()
        return total / count if count else float("nan")

    def _log(self, name: str, value: float | torch.Tensor) -> None:
        # TRL averages over the logging interval and leaves NaN out
        self._metrics["train" if self.model.training else "eval"][name].append(float(value))

    def _log_rows(
        self,
        rows: torch.Tensor,
        all_outcomes: torch.Tensor,
        trains: torch.Tensor,
        process_rewards: torch.Tensor,
        advantages: torch.Tensor,
        loss_mask: torch.Tensor,
    ) -> None:
        """Complete the rows of TRL's completions table that this batch has added, one for each of `all_outcomes`."""
        if not self.log_completions:
            return
        num_rows = len(all_outcomes)
        mean_advantages = (advantages * loss_mask).sum(1) / loss_mask.sum(1).clamp(min=1)
        # The rows that were generated and not trained on have no process reward and no advantage
        columns = {"process_reward": process_rewards.sum(1), "advantage": mean_advantages}
        for name, values in columns.items():
            column = torch.zeros(num_rows, device=rows.device)
            column[rows] = self.accelerator.gather(values.float())
            columns[name] = column
        trained = torch.zeros(num_rows, dtype=torch.bool, device=rows.device)
        trained[rows] = trains
        for _ in range(num_rows):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(columns["advantage"].tolist())
        self._log_columns(all_outcomes, columns["process_reward"], trained)

    def _log_columns(self, outcomes: torch.Tensor, process_rewards: torch.Tensor, trained: torch.Tensor) -> None:
        """Add PRIME's columns, `(B,)` each, to the completions table. Reward functions may log columns of any other name."""
        for name, values in (("outcome", outcomes), ("process_reward", process_rewards), ("trained", trained)):
            self._logs["extra"][TABLE_PREFIX + name].extend(values.tolist())

    # --- Saving and loading ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        if resume_from_checkpoint:
            resume_from_checkpoint = _whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
            self._check_prm_state(resume_from_checkpoint)
        self._prm_schedule_is_over = self._prm_updater is not None
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.state.max_steps and not self.state.global_step:
            # The length of a streamed data set is not known before
            raise RuntimeError(
                f"The training data set ended before a generation batch of {self.args.prompts_per_generation} prompts was full, so "
                "that nothing was trained. Lower per_device_train_batch_size, steps_per_generation or oversample_factor, or give "
                "more prompts."
            )
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        # First, because super pushes the folder at its end
        prm, prm_folder = self.implicit_prm, os.path.join(folder, "prm")
        weights = self._prm_backend.full_weights(prm.model)
        reference_weights = None
        if prm.reference_is_saved_in(prm_folder):
            reference_weights = self._prm_backend.full_weights(prm.reference)
        if self.args.should_save:
            prm.save_pretrained(prm_folder, weights, reference_weights)
        super().save_model(output_dir, _internal_call)

    def _prm_state_path(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"prm_state_{self.accelerator.process_index}.pt")

    def _check_prm_state(self, checkpoint: str) -> None:
        """Refuse a checkpoint that lacks this process's state, or that other processes have parts of."""
        path = self._prm_state_path(checkpoint)
        found = [path] if os.path.isfile(path) else sorted(map(str, Path(checkpoint).glob("prm_state_*.pt")))
        if found:
            state = torch.load(found[0], map_location="cpu", weights_only=True, mmap=True)
            before, now = state["num_processes"], self.accelerator.num_processes
            if before != now:
                raise ValueError(
                    f"resume_from_checkpoint is '{checkpoint}', which {before} processes saved, but this run has {now}: each has "
                    f"its own part of the replayed batches and random numbers. Resume with --num_processes {before}, or start a "
                    "new run with model= and prm_model= set to its weights."
                )
            if state["updater"] is None and self.args.prm_update != "none":
                raise ValueError(
                    f"resume_from_checkpoint is '{checkpoint}', which a run with prm_update='none' saved, but prm_update is "
                    f"{self.args.prm_update!r}: there is no optimizer of the PRM to go on with. Start a new run with model= and "
                    "prm_model= set to its weights."
                )
        if path not in found:
            raise FileNotFoundError(
                f"'{checkpoint}' has no {os.path.basename(path)}: it was not saved by PRIMETrainer, or with save_only_model=True, "
                "and the PRM could not go on where it stopped. Resume from another checkpoint, or start a new run with model= and "
                "prm_model= set to its weights."
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        updater = self._prm_updater and self._prm_updater.state_dict()
        state = {
            "num_processes": self.accelerator.num_processes,
            "wins": self._prm_wins,
            "pairs": self._prm_pairs,
            "updater": updater,
        }
        os.makedirs(output_dir, exist_ok=True)
        if updater is not None and not self._prm_backend.optimizer_is_sharded:
            # All processes hold the same, twice the size of the trained weights: one file is enough
            optimizer = updater.pop("optimizer")
            if self.args.should_save:
                torch.save(optimizer, os.path.join(output_dir, PRM_OPTIMIZER_NAME))
        torch.save(state, self._prm_state_path(output_dir))
        if self._prm_updater is not None:
            self._prm_backend.save_checkpoint(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process writes trainer_state.json next: where it is, all that a process has to save is there too
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._ensure_prm()
        if checkpoint is None:
            return
        self._load_prm_weights(checkpoint)
        state = torch.load(self._prm_state_path(checkpoint), map_location="cpu", weights_only=True)
        self._prm_wins, self._prm_pairs = state["wins"], state["pairs"]
        if self._prm_updater is not None:
            if not self._prm_backend.optimizer_is_sharded:
                path = os.path.join(checkpoint, PRM_OPTIMIZER_NAME)
                state["updater"]["optimizer"] = torch.load(path, map_location="cpu", weights_only=True)
            self._prm_updater.load_state_dict(state["updater"])

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse what Trainer warns of: weights whose names in the file are others than the model's would stay those of the start."""
        weights = self.model.state_dict(keep_vars=True)
        missing = set(load_result.missing_keys) - set(self.model._keys_to_ignore_on_save or ())
        # Tied weights are saved under one of their names
        loaded = {id(weight) for name, weight in weights.items() if name not in missing}
        missing = sorted(name for name in missing if name in weights and id(weights[name]) not in loaded)
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the policy: {missing[:3]} are not in it, and {load_result.unexpected_keys[:3]} of it "
                "are not in the model. If the model's class saves its weights under other names (mixtures of experts, Gemma 3), a "
                "run cannot be resumed: start a new one with model= and prm_model= set to the checkpoint's weights, and leave "
                "load_best_model_at_end out."
            )

    def _load_best_model(self):
        super()._load_best_model()
        self._load_prm_weights(self.state.best_model_checkpoint)

    def _load_prm_weights(self, checkpoint: str) -> None:
        if self._prm_updater is not None and self._prm_backend.load_checkpoint(checkpoint):
            return
        self._prm_backend.load_weights(saved_weights(self.implicit_prm.model, os.path.join(checkpoint, "prm")))

    # --- The Hub ---

    def init_hf_repo(self, token: str | None = None, **kwargs: Any) -> None:
        super().init_hf_repo(token, **kwargs)
        args, private = self.args, kwargs.get("private")
        if not self.is_world_process_zero():
            return
        if args.prm_hub_model_id is not None:
            self.prm_hub_model_id = create_repo(
                args.prm_hub_model_id,
                token=args.hub_token if token is None else token,
                private=args.hub_private_repo if private is None else private,
                revision=args.hub_revision,
            )
            if self.prm_hub_model_id == self.hub_model_id:
                raise ValueError(
                    f"prm_hub_model_id='{args.prm_hub_model_id}' is the policy's repo too, where one model would overwrite the "
                    "other. Leave it out to have the PRM in the folder prm/ of that repo, or set hub_model_id."
                )
        # Trainer uploads all of output_dir
        path = Path(args.output_dir, ".gitignore")
        before = path.read_text() if path.is_file() else pushed_gitignore(self.hub_model_id, token or args.hub_token)
        after = with_ignored_prm(before, self.prm_hub_model_id is not None)
        if after != before:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(after)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ):
        # Trainer writes the card anew at every push, and only the last one may be told the data set
        self._card_dataset = hub_dataset(dataset_name) or self._card_dataset
        super().create_model_card(model_name, self._card_dataset, tags)
        if not self.is_world_process_zero():
            return
        prm, path = self.implicit_prm, Path(self.args.output_dir, "README.md")
        policy = self.accelerator.unwrap_model(self.model)
        section = policy_section(
            self.args,
            self.hub_model_id or model_name or path.parent.name,
            prm_repo_id=self.prm_hub_model_id,
            revision=self.args.hub_revision,
            bare_base=isinstance(policy, PeftModel) and ModelCard.load(path).data.base_model is None,
            prm_needs_reference=prm.reference is None and prm.reference_name is None,
            messages=prm.text_format.messages,
        )
        path.write_text(with_section(path.read_text(encoding="utf-8"), section), encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ):
        self.implicit_prm.reference_name = self.implicit_prm.portable_reference_name()
        try:
            result = super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
            if self.prm_hub_model_id is not None and self.is_world_process_zero():
                self._upload_prm(commit_message, blocking, token, revision)
        except (HfHubHTTPError, RuntimeError):
            logger.error(
                f"The push failed, but policy and PRM are saved in output_dir='{self.args.output_dir}'. See below for the reason, "
                "and push again by `trainer.push_to_hub()`, or by `hf upload` from that folder."
            )
            raise
        return result

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        running = getattr(self, "push_in_progress", None)
        is_busy = running is not None and not running.is_done()
        if (
            not self.is_world_process_zero()
            or self.args.hub_strategy == HubStrategy.END
            or (is_busy and not self.args.hub_always_push)
        ):
            return
        self._finish_current_push()  # it reads the files that are overwritten next
        # Trainer copies the policy's files out of the checkpoint, which may be deleted while they are uploaded
        prm_folder = os.path.join(self.args.output_dir, "prm")
        shutil.copytree(os.path.join(checkpoint_folder, "prm"), prm_folder, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)
        if self.prm_hub_model_id is not None:
            message = f"Training in progress, step {self.state.global_step}"
            self.push_in_progress.jobs.append(self._upload_prm(message, blocking=False))

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        # Trainer looks at no result of an upload in the background
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", []):
            if job.exception() is not None:
                logger.warning(
                    f"A push to the Hub failed; training goes on, and the checkpoint is on disk. {job.exception()}"
                )
        self.push_in_progress = None

    def _upload_prm(
        self, commit_message: str, blocking: bool, token: str | None = None, revision: str | None = None
    ) -> Any:
        """Push the PRM that is saved in `output_dir` to its own repo, with its card."""
        folder, revision = os.path.join(self.args.output_dir, "prm"), revision or self.args.hub_revision
        card = saved_prm_card(
            folder,
            self.prm_hub_model_id,
            policy=self.hub_model_id,
            settings=settings_table(self.args),
            datasets=self._card_dataset,
            revision=revision,
        )
        card.save(os.path.join(folder, "README.md"))
        return upload(
            folder,
            self.prm_hub_model_id,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision,
            blocking=blocking,
        )


def _whole_checkpoint(checkpoint: str | bool, output_dir: str) -> str:
    """
    The checkpoint to resume from: the given one, or with True the last in `output_dir` that was saved to its end.

    Raises:
        ValueError: There is none, or the given one was not saved to its end.
    """

    def is_whole(folder: str) -> bool:
        try:
            TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
        except (OSError, ValueError, TypeError):
            return False
        return True

    if checkpoint is not True:
        if not is_whole(checkpoint):
            raise ValueError(
                f"resume_from_checkpoint is '{checkpoint}', which has no readable {TRAINER_STATE_NAME}: it is no checkpoint, "
                "or the run was stopped while it was saved. Resume from an earlier one, or set it to True to take the last "
                "whole one."
            )
        return checkpoint
    found = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()
    ]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if is_whole(str(path)):
            return str(path)
        logger.warning(f"'{path}' was not saved to its end; resuming from the one before.")
    raise ValueError(
        f"resume_from_checkpoint is True, but there is no whole checkpoint in output_dir='{output_dir}'. Leave it out to start "
        "from the beginning."
    )


def _check_before_loading(grpo: dict[str, Any], prm_model: Any, prm_peft_config: Any, reward_combination: Any) -> None:
    """Refuse what cannot work before any model is loaded."""
    args, train_dataset = grpo["args"], grpo.get("train_dataset")
    if not isinstance(args, PRIMEConfig):
        raise TypeError(
            f"args is a {type(args).__name__}, but PRIMETrainer needs a PRIMEConfig: it has the PRM's settings."
        )
    if args.prm_reference == "policy" and args.deepspeed_plugin and args.deepspeed_plugin.zero_stage == 3:
        raise NotImplementedError(
            "prm_reference='policy' does not go with DeepSpeed ZeRO-3, which cannot mix the policy's own forward pass with the "
            "fused one that TRL trains by. Use prm_reference='frozen', ZeRO-2 or FSDP2."
        )
    if args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
        raise NotImplementedError(
            "use_liger_kernel=True makes this version of TRL compute the policy's loss by Liger, which takes one advantage for "
            "each completion, not for each token. Leave it out, or use a TRL whose GRPOTrainer has no loss by Liger (1.16)."
        )
    if reward_combination is not None and not callable(reward_combination):
        raise TypeError(
            f"reward_combination is {reward_combination!r}; pass a callable that takes RolloutRewards. In YAML, give its dotted "
            "path."
        )
    is_saved = isinstance(prm_model, str) and os.path.isfile(os.path.join(prm_model, CONFIG_NAME))
    if (is_saved or isinstance(prm_model, ImplicitPRM)) and prm_peft_config is not None:
        raise ValueError(
            "prm_model is an ImplicitPRM or the folder of one, which is full or LoRA already: leave prm_peft_config out."
        )
    if isinstance(prm_model, ImplicitPRM) and prm_model.reference is None and args.prm_reference == "frozen":
        raise ValueError(
            "prm_model is an ImplicitPRM without a reference, but prm_reference is 'frozen'. Pass one with a reference, or set "
            "prm_reference='policy' to measure it against the policy."
        )

    policy, tokenizer = grpo["model"], grpo.get("processing_class")
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    if prm_model is not None and not isinstance(prm_model, str) and prm_model is policy:
        raise ValueError(
            "prm_model is the policy itself, but they are trained apart. Leave prm_model out: the PRM then starts as a copy."
        )
    for option, name in (("model", policy), ("prm_model", prm_model)):
        if isinstance(name, str) and is_adapter(name):
            raise ValueError(
                f"{option} is '{name}', which holds an adapter only. Load it with its base: pass "
                "peft.AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True)."
            )
    _check_prm_is_trainable(grpo, prm_model, prm_peft_config)
    prm_tokenizer = _tokenizer_of(prm_model, args.trust_remote_code)
    if prm_tokenizer is not None:
        tokenizer = tokenizer or _tokenizer_of(policy, args.trust_remote_code)
        if tokenizer is not None:
            _check_same_tokenizer(tokenizer, prm_tokenizer)

    if isinstance(train_dataset, Dataset):
        _check_enough_prompts(len(train_dataset), args)
    if train_dataset is None or grpo.get("environment_factory") is not None:
        return
    columns = _columns(train_dataset)
    if columns is None:
        return
    if "prompt" not in columns:
        raise ValueError(
            f"The training data set has no column 'prompt'; its columns are {sorted(columns)}. Rename one "
            "(`dataset.rename_column`), or map the rows to TRL's prompt format."
        )
    if grpo.get("rollout_func") is not None:
        return  # which may add columns of its own
    reward_funcs = grpo.get("reward_funcs")
    for func in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if not callable(func) or isinstance(func, torch.nn.Module):
            continue
        for name, parameter in inspect.signature(func).parameters.items():
            required = parameter.default is parameter.empty and parameter.kind in (
                parameter.KEYWORD_ONLY,
                parameter.POSITIONAL_OR_KEYWORD,
            )
            if required and name not in _REWARD_KWARGS and name not in columns:
                raise ValueError(
                    f"The reward function '{getattr(func, '__name__', type(func).__name__)}' needs a column {name!r}, but the "
                    f"training data set has {sorted(columns)}. {nearest(name, sorted(columns))}"
                )


def _check_enough_prompts(num_prompts: int, args: PRIMEConfig) -> None:
    """TRL drops an incomplete generation batch: a run without a whole one would end without a step."""
    needed = args.prompts_per_generation
    if num_prompts < needed:
        raise ValueError(
            f"The training data set has {num_prompts} prompts, but one generation batch takes {needed}: "
            f"generation_batch_size={args.generation_batch_size} completions, num_generations={args.num_generations} of each "
            f"prompt, oversample_factor={args.oversample_factor:g}. Not a single step could be made. Lower "
            "per_device_train_batch_size, steps_per_generation or oversample_factor, or give more prompts."
        )


def _check_prm_is_trainable(grpo: dict[str, Any], prm_model: Any, prm_peft_config: PeftConfig | None) -> None:
    """Refuse a PRM that would be trained as a whole on a quantized start, and adapters that no PRM can have."""
    args, policy = grpo["args"], grpo["model"]
    if prm_peft_config is not None:
        if prm_peft_config.is_prompt_learning:
            raise ValueError(no_virtual_tokens(prm_peft_config))
    elif prm_model is None or isinstance(prm_model, str):
        kwargs = (args.prm_model_init_kwargs if prm_model is not None else None) or args.model_init_kwargs or {}
        quantized = kwargs.get("quantization_config") is not None
        if prm_model is None:
            quantized |= isinstance(policy, str) and grpo.get("quantization_config") is not None
        if quantized and not (isinstance(prm_model, str) and os.path.isfile(os.path.join(prm_model, CONFIG_NAME))):
            raise ValueError(QUANTIZED)
    policy_config = grpo.get("peft_config")
    if policy_config is None and isinstance(policy, PeftModel):
        policy_config = policy.active_peft_config
    if policy_config is not None and policy_config.is_prompt_learning and args.prm_reference == "policy":
        raise ValueError(
            f"prm_reference='policy' does not go with a {type(policy_config).__name__}: the PRM starts without the policy's virtual "
            "tokens and would differ from it from the beginning. Use prm_reference='frozen'."
        )


def _tokenizer_of(model: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer that belongs to a model given in any form; None where an instance does not say where it came from."""
    if isinstance(model, ImplicitPRM):
        return model.tokenizer
    if isinstance(model, str):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = getattr(base, "name_or_path", None)
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None  # an instance need not have come with a tokenizer; its size is checked later


def _columns(dataset: Dataset | IterableDataset) -> set[str] | None:
    """Column names, of a streamed data set by its first row; None where they cannot be known."""
    names = getattr(dataset, "column_names", None)
    if names is None and isinstance(dataset, IterableDataset):
        first = next(iter(itertools.islice(dataset, 1)), None)
        names = first and list(first)
    return set(names) if names else None


def _check_text_only(output: dict[str, Any]) -> None:
    """Refuse rollouts with pictures: the policy would see them, and PRM and reference would not."""
    found = [
        key
        for key, value in output.items()
        if value is not None and (key in _VISION_KEYS or key.startswith(("pixel_", "image_")))
    ]
    if found:
        raise NotImplementedError(
            f"The rollouts hold images ({', '.join(sorted(found))}), which the policy sees, but the implicit PRM and its "
            "reference score text only so far. Take the images out of the data set: columns 'image' and 'images', and "
            "blocks of type 'image' in the prompts. A multimodal model can be trained on text."
        )


def _check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """The PRM reads the policy's token ids: a single different id mis-scores silently."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in ours if theirs.get(token) != ours[token])
    if not different:
        return  # the PRM knows tokens that the policy never writes
    raise ValueError(
        f"The PRM's tokenizer differs from the policy's: {len(different)} of {len(ours)} tokens have another id or none, "
        f"{different[0]!r} first. The PRM reads the policy's token ids, so use one of the same model family."
    )
