"""`PRIMETrainer`: Algorithm 1 of PRIME (arXiv 2502.01456) inside TRL's GRPO step. The only file that touches TRL's private API.

These methods are overridden. The step: `_generate_and_score_completions` (filter, implicit PRM and advantages after TRL has
generated and judged), `_tokenize_prompts` (prompts without images beside others), `_calculate_rewards` (keeps the rewards of each
function), `training_step` (starts the PRM). The batch: `get_train_dataloader` (oversampling). The policy loss: `_compute_loss`
(rows that were left out change neither its scale nor its metrics), `get_off_policy_mask` and `get_gamma_weights` (which decide by
completion), `_get_grad_norm` (nothing that is not finite reaches the optimizer). The PRM beside the policy in files and on the Hub:
`train` and ten methods that save, load and push. All else, generation and the policy loss above all, is TRL's.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import HubStrategy
from transformers.utils import get_json_schema, logging
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from .advantages import RewardCombination, RolloutRewards
from .checks import (
    check_advantages,
    check_before_loading,
    check_grad_norm,
    check_loss,
    check_prm_label,
    check_sharded_heads,
    check_trained,
    checked_combination,
    checked_reward_func,
    checked_rollout_func,
    warn_of_idle_batch,
    warn_of_uneven_saving,
)
from .hub import PAPER, POLICY_TAGS, add_policy_section, hub_dataset, warn_of_failed_pushes
from .images import images_by_row, in_trl_form, without_empty_images
from .implicit_prm.build import build_prm, fuse_lm_heads, kind_of_start, warn_of_rounding
from .implicit_prm.files import check_loaded_policy, check_states, downloaded_prm, name_base, whole_checkpoint
from .implicit_prm.learner import PRMLearner, PRMScores
from .implicit_prm.model import ImplicitPRM
from .policy_loss import loss_scales, sequence_advantages
from .prime_config import PRIMEConfig
from .process_exit import let_threads_finish_at_exit
from .process_rewards import aggregate_process_rewards, normalize_process_rewards, reward_positions
from .processes import gather_padded, local_rows
from .prompt_filter import select_groups
from .reports.run_files import TABLE_PREFIX
from .rollouts import Rollouts, draw_rows, is_truncated, log_gold_answers, outcomes_and_labels, policy_mask, table_room
from .texts import TextFormat
from .value_model.learner import make_value_learner

if TYPE_CHECKING:
    from peft import PeftConfig

    from .implicit_prm.batch import PRMBatch

logger = logging.get_logger(__name__)


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
        prm_learner ([`~trl_prime.implicit_prm.learner.PRMLearner`]): Its optimizer, replay and trust.
        value_learner ([`~trl_prime.value_model.learner.ValueLearner`]): Value model and optimizer, if the estimator needs them.
    """

    _tag_names = POLICY_TAGS
    _name = "PRIME"
    _paper = PAPER
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
        check_before_loading(grpo, prm_model, prm_peft_config, reward_combination)
        has_adapter = grpo.get("peft_config") is not None or isinstance(model, PeftModel)
        args = grpo["args"] = args.for_models(has_adapter, *kind_of_start(prm_model, prm_peft_config))

        super().__init__(**grpo)
        let_threads_finish_at_exit()
        check_prm_label(args.prm_label, self.reward_func_names)
        self.reward_funcs = [
            func if isinstance(func, torch.nn.Module) else checked_reward_func(func, name)
            for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.rollout_func is not None:
            self.rollout_func = checked_rollout_func(self.rollout_func)
        self.reward_combination = reward_combination
        self.implicit_prm = self._build_prm(prm_model, prm_peft_config, grpo["model"])
        check_sharded_heads(self.model, self.implicit_prm.model, self.accelerator.distributed_type)
        self.prm_learner = PRMLearner(self.implicit_prm, self.accelerator, args)
        policy = self.accelerator.unwrap_model(self.model)
        self.value_learner = make_value_learner(policy, self._tokenizer, self.accelerator, args)
        self._learners = [self.prm_learner] + ([self.value_learner] if self.value_learner else [])
        self._prm_is_started = False  # whether the learner has the schedule of the present `train()`
        self._rewards_per_func: torch.Tensor | None = None
        warn_of_uneven_saving(args)

    def _build_prm(self, start: Any, peft_config: PeftConfig | None, policy_start: Any) -> ImplicitPRM:
        args, policy = self.args, self.accelerator.unwrap_model(self.model)
        init_kwargs = dict((args.prm_model_init_kwargs if start is not None else None) or args.model_init_kwargs or {})
        if args.distributed_state.distributed_type != DistributedType.NO:
            init_kwargs["device_map"] = None
        prm = build_prm(
            start,
            self._tokenizer,
            policy=policy,
            policy_name=policy_start if isinstance(policy_start, str) else None,
            peft_config=peft_config,
            frozen_reference=args.prm_reference == "frozen",
            init_kwargs={"trust_remote_code": args.trust_remote_code, **init_kwargs},
            float32_head=args.cast_lm_head_to_fp32,
            disable_dropout=args.disable_dropout,
            seed=args.seed,
            beta=args.prm_beta,
            step_delimiter=args.process_reward_step_delimiter,
            micro_batch_size=args.prm_micro_batch_size,
        )
        prm.text_format = self._text_format()
        prm.processor = self.processing_class if isinstance(self.processing_class, ProcessorMixin) else None
        if args.prm_update != "none":
            option = "model_init_kwargs" if start is None else "prm_model_init_kwargs"
            warn_of_rounding(
                prm.model, "PRM", "prm_learning_rate", args.prm_learning_rate, f"{option}={{'dtype': 'float32'}}"
            )
        name_base(policy, to_hub=args.push_to_hub)
        if args.push_to_hub:
            prm.reference_name = prm.portable_reference_name()
        fuse_lm_heads(prm, args.prm_fused_lm_head, self.accelerator.device.type == "cuda")
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
        self._start_prm()
        return super().training_step(model, inputs, num_items_in_batch)

    def _start_prm(self) -> None:
        # Not in __init__: the policy is distributed first, and Trainer frees what was there before when training starts
        if not self._prm_is_started:
            num_rollout_batches = self.args.num_generation_batches(self.state.max_steps)
            self.prm_learner.start(num_rollout_batches, measure_every=max(int(self.state.logging_steps), 1))
            if self.value_learner:
                self.value_learner.start(num_rollout_batches)
            self._prm_is_started = True

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        # TRL gives processors None for a prompt without images beside others, which they do not take
        return prompt_ids, images and [shown or [] for shown in images], fields

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs):
        for learner in self._learners:
            learner.place()
        self.implicit_prm.text_format.messages = not isinstance(inputs[0]["prompt"], str)
        # The policy generates, and the outcome rewards judge
        if not self.model.training:
            output, outcomes, labels, _ = self._generate_round(inputs)
            self._evaluate_prm(output, outcomes, labels)
            return in_trl_form(output)
        rollouts = self._generate_and_filter(inputs)
        # The PRM scores the batch and learns from it
        policy, rows = self.accelerator.unwrap_model(self.model), (rollouts.output, rollouts.labels, rollouts.trains)
        batch = self.prm_learner.make_batch(*rows, self.num_generations, policy)
        prm = self.prm_learner.score_and_learn(batch, rollouts.labels, self.state.global_step)
        self._log_all("prm", prm.metrics)
        # Outcome and process rewards become one advantage per token
        rewards = self._rollout_rewards(rollouts, batch, prm)
        if self.value_learner:
            rewards, metrics = self.value_learner.value_and_learn(batch, rewards, self.state.global_step)
            self._log_all("value", metrics)
        advantages = self._advantages(rollouts, rewards)
        output = self._for_policy_loss(rollouts, advantages)
        if self.log_completions:
            mean_advantages = sequence_advantages(advantages, policy_mask(output)).squeeze(1)
            columns = rollouts.table_columns(prm.token_rewards, mean_advantages, self.accelerator)
            Rollouts.log_rows(self._logs, TABLE_PREFIX, *columns)
        return output

    def _generate_round(self, inputs: list[dict[str, Any]]) -> tuple[Any, ...]:
        """This process's rows; `(B,)` outcomes and labels (NaN = not judged) and `(B, F)` rewards of all processes."""
        output = images_by_row(super()._generate_and_score_completions(inputs))
        log_gold_answers(self._logs, TABLE_PREFIX + "gold", inputs)
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        outcomes, labels = outcomes_and_labels(
            self._rewards_per_func, self.reward_weights, self.reward_func_names, self.args.prm_label, num_generations
        )
        if num_generations > 1:
            # TRL has logged sums in which a missing reward counts as 0
            self._metrics[mode]["reward"][-1] = outcomes.nanmean().item()
            self._metrics[mode]["reward_std"][-1] = nanstd(outcomes).item()
        return output, outcomes, labels, self._rewards_per_func

    def _generate_and_filter(self, inputs: list[dict[str, Any]]) -> Rollouts:
        """Groups that pass the prompt filter, of several rounds if need be; then others, whose rows carry no gradient."""
        args, num_groups = self.args, self.args.generation_batch_size // self.num_generations
        rounds, passed = [], torch.tensor([], dtype=torch.bool, device=self.accelerator.device)
        while len(rounds) < args.filter_max_rounds and passed.sum() < num_groups:
            if rounds:
                # The tokens seen so far differ between rounds and not between processes, and checkpoints have them
                seed = f"{args.seed} {self.state.num_input_tokens_seen}"
                dataset = self._remove_unused_columns(self.train_dataset)
                inputs = draw_rows(dataset, len(inputs), self.num_generations, seed, self.accelerator)
            with table_room(self._logs, len(inputs) * self.accelerator.num_processes, len(rounds)):
                rounds.append(self._generate_round(inputs))
            passed = torch.cat([passed, self._passed_groups(*rounds[-1])])
        warn_of_idle_batch(passed, num_groups, args, self._metrics["train"], len(rounds))
        rollouts = Rollouts.of_rounds(
            rounds, passed, num_groups, self.num_generations, self.accelerator, self._tokenizer.pad_token_id
        )
        self._log("filter/pass_rate", passed.float().mean())
        self._log("filter/judged", 1 - rollouts.generated_outcomes.isnan().float().mean())
        self._log("filter/trained", rollouts.trains.float().mean())
        if args.filter_max_rounds > 1:
            self._log("filter/rounds", len(rounds))
        return rollouts

    def _passed_groups(self, output, outcomes, labels, rewards_per_func) -> torch.Tensor:
        args, truncated = self.args, None
        if args.filter_truncated:
            # Before 1.16, TRL knows the tokenizer's end token only
            ends = [*getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id]), self._tokenizer.pad_token_id]
            truncated = self.accelerator.gather(is_truncated(output, ends))
        band = {"low": args.accuracy_low, "high": args.accuracy_high}
        return select_groups(labels, self.num_generations, truncated=truncated, **band)

    def _rollout_rewards(self, rollouts: Rollouts, batch: PRMBatch, prm: PRMScores) -> RolloutRewards:
        """Outcomes and process rewards of the rows of all processes."""
        args, mask, granularity = self.args, batch.policy_mask, self.args.process_reward_granularity
        step_ids = self.implicit_prm.step_ids(batch.completion_ids) if granularity == "step" else None
        process_rewards = aggregate_process_rewards(prm.token_rewards, mask, granularity, step_ids)
        positions = reward_positions(mask, granularity, step_ids)
        all_process, all_positions, all_mask = (
            gather_padded(tensor, self.accelerator) for tensor in (process_rewards, positions, mask)
        )
        groups = {"outcomes": rollouts.outcomes, "num_generations": self.num_generations}
        return RolloutRewards(
            outcome_rewards=rollouts.outcomes,
            process_rewards=normalize_process_rewards(
                all_process, all_positions, args.process_reward_norm, gamma=args.process_gamma, **groups
            ),
            completion_mask=all_mask,
            reward_mask=all_positions,
            num_generations=self.num_generations,
            settings=args.combination_settings(prm.trust),
            outcome_rewards_per_func=rollouts.rewards_per_func,
            reward_func_names=self.reward_func_names,
            trainer_state=self.state,
        )

    def _advantages(self, rollouts: Rollouts, rewards: RolloutRewards) -> torch.Tensor:
        """`(B, T)` advantages of this process's rows, computed over the rows of all; zero in rows that are not trained on."""
        if self.reward_combination is None:
            advantages, share = rewards.combine_with_share()
            self._log("advantage/process_share", share)
        else:
            shown = (self._logs, self.accelerator, self._tokenizer.pad_token_id)
            advantages = checked_combination(self.reward_combination, rollouts.shown_to_hook(rewards, *shown))
        advantages = advantages.masked_fill(~rollouts.trains[:, None], 0.0)
        check_advantages(advantages, rewards.completion_mask, self.importance_sampling_level, self.state.global_step)
        num_tokens = rollouts.output["completion_ids"].shape[1]
        return local_rows(advantages, self.accelerator)[:, :num_tokens]

    def _for_policy_loss(self, rollouts: Rollouts, advantages: torch.Tensor) -> dict[str, Any]:
        """This process's rows with their advantages, and with what TRL's loss divides by."""
        output, trains = in_trl_form(rollouts.output), rollouts.trains
        if not trains.all():
            # `tool_mask` is what TRL leaves out of every term of the loss, of KL and entropy too, while attention still
            # sees the tokens
            tool_mask = output.get("tool_mask", torch.ones_like(output["completion_mask"]))
            output["tool_mask"] = tool_mask * local_rows(trains, self.accelerator)[:, None].to(tool_mask.dtype)
        mask = policy_mask(output)
        num_tokens, num_trained = self.accelerator.reduce(torch.stack([mask.sum(), mask.any(1).sum()]), "sum")
        output["num_items_in_batch"] = num_tokens.clamp(min=1)
        output["rows_per_trained_row"] = len(trains) / num_trained.clamp(min=1)
        if self.importance_sampling_level == "sequence":
            advantages = sequence_advantages(advantages, mask).squeeze(1)
        output["advantages"] = advantages
        return output

    # --- Evaluation and logging ---

    def _evaluate_prm(self, output: dict[str, Any], outcomes: torch.Tensor, labels: torch.Tensor) -> None:
        """Score held-out completions; nothing is trained."""
        num_generations, judged = self.num_generations_eval, ~labels.isnan()
        policy = self.accelerator.unwrap_model(self.model)
        batch = self.prm_learner.make_batch(output, labels, judged, num_generations, policy)
        prm = self.prm_learner.score(batch, labels, num_generations, self.state.global_step)
        self._log_all("prm", prm.metrics)
        if self.log_completions:
            columns = Rollouts.evaluation_columns(output, outcomes, prm.token_rewards, self.accelerator)
            Rollouts.log_rows(self._logs, TABLE_PREFIX, columns)

    def _log(self, name: str, value: float | torch.Tensor) -> None:
        # TRL averages over the logging interval and leaves NaN out
        self._metrics["train" if self.model.training else "eval"][name].append(float(value))

    def _log_all(self, of: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._log(f"{of}/{name}", value)

    # --- The policy loss: TRL's, of advantages that differ from token to token and of rows that may be left out ---

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        mask = policy_mask(inputs)
        weight, policy_factor = loss_scales(mask, inputs["rows_per_trained_row"], self.loss_type)
        # The policy's term is linear in the advantages, the KL term in beta; what is divided by all tokens keeps its scale
        inputs = {
            **without_empty_images(inputs),
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
        check_loss(losses, self.state.global_step)
        # An entropy or a KL of no token is no measurement
        if num_tokens.any():
            for name, values in self._metrics["train"].items():
                metrics[name] += values
        self._metrics["train"] = metrics
        return loss

    @staticmethod
    def get_off_policy_mask(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold):
        advantages = sequence_advantages(advantages, mask)
        rest = (per_token_logps, sampling_per_token_logps, mask, off_policy_threshold)
        return GRPOTrainer.get_off_policy_mask(advantages, *rest)

    @staticmethod
    def get_gamma_weights(advantages, log_ratio_per_token, mask, importance_sampling_ratio, **parameters):
        advantages = sequence_advantages(advantages, mask)
        rest = (log_ratio_per_token, mask, importance_sampling_ratio)
        return GRPOTrainer.get_gamma_weights(advantages, *rest, **parameters)

    def _get_grad_norm(self, model, grad_norm=None):
        # The last thing that Trainer calls before the optimizer's step; the norm is the same on all processes
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if grad_norm is None:
            return grad_norm
        norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
        check_grad_norm(norm, self.state.global_step)
        if norm == 0:
            # No completion had anything to teach: without gradients the optimizer does not follow its momentum either
            model.zero_grad()  # sets them to None; a DeepSpeed engine takes no argument
        self._log("filter/skipped_steps", norm == 0)
        return grad_norm

    # --- Saving and loading ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        if resume_from_checkpoint:
            resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
            check_states(resume_from_checkpoint, self.accelerator, self.args)
        self._prm_is_started = False
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        check_trained(self.state, self.args)
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        # First, because super pushes the folder at its end
        self.prm_learner.save(os.path.join(folder, "prm"), self.args.should_save)
        super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for learner in self._learners:
            learner.save_state(output_dir, self.args.should_save)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process writes trainer_state.json next: where it is, all that a process has to save is there too
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._start_prm()
        for learner in self._learners if checkpoint is not None else ():
            learner.load(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        check_loaded_policy(self.model, load_result)  # Trainer only warns

    def _load_best_model(self):
        super()._load_best_model()
        self.prm_learner.load_weights(self.state.best_model_checkpoint)

    # --- The Hub ---

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        # Trainer writes the card anew at every push, and only the last one may be told the data set
        self._card_dataset = hub_dataset(dataset_name) or self._card_dataset
        super().create_model_card(model_name, self._card_dataset, tags)
        if not self.is_world_process_zero():
            return
        prm, path = self.implicit_prm, Path(self.args.output_dir, "README.md")
        add_policy_section(
            path,
            self.args,
            self.hub_model_id or model_name or path.parent.name,
            is_adapter=isinstance(self.accelerator.unwrap_model(self.model), PeftModel),
            prm_needs_reference=prm.reference is None and prm.reference_name is None,
            messages=prm.text_format.messages,
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        name_base(self.accelerator.unwrap_model(self.model), to_hub=True)
        self.implicit_prm.reference_name = self.implicit_prm.portable_reference_name()
        try:
            return super().push_to_hub(*args, **kwargs)
        except (HfHubHTTPError, RuntimeError):
            logger.error(
                f"The push failed, but policy and PRM are saved in output_dir='{self.args.output_dir}'. See below for the reason, "
                "and push again by `trainer.push_to_hub()`, or by `hf upload` from that folder."
            )
            raise

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

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        warn_of_failed_pushes(getattr(self, "push_in_progress", None))
        self.push_in_progress = None
