"""Training an implicit PRM offline, on completions with outcome labels or on pairs ("Free Process Rewards without Process
Labels", arXiv 2412.01981).

Covered: the three losses, accuracies on held-out completions, checkpoints and the Hub. The loop, distribution, resuming and
logging are Trainer's; examples and batches are made in `examples.py`. n = examples of a batch, C = completions of an example.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.utils import logging

from ..hub import hub_dataset, settings_table
from ..implicit_prm.accuracies import absolute_accuracy, pad_groups, pairwise_accuracy
from ..implicit_prm.backends import make_backend
from ..implicit_prm.build import build_prm, kind_of_start, warn_of_rounding
from ..implicit_prm.files import (
    CONFIG_NAME,
    downloaded_prm,
    is_saved_prm,
    save_prm,
    saved_prm_card,
    saved_text_format,
    saved_weights,
)
from ..implicit_prm.logps import check_scoring, completion_logps
from ..implicit_prm.losses import dpo_pair_losses, kto_reference_point, kto_row_losses, outcome_scores, prm_row_losses
from ..implicit_prm.model import ImplicitPRM, end_token_ids
from ..implicit_prm.optimizer import SUITS_ADAPTERS, with_defaults
from ..process_exit import let_threads_finish_at_exit
from ..texts import TextFormat
from .examples import OutcomeCollator, completion_rows, mismatched_rows, prepare_dataset
from .offline_prm_config import OfflinePRMConfig

logger = logging.get_logger(__name__)

CARD_SETTINGS = (
    "loss_type",
    "beta",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
)
_PAPER_LINK = "[Free Process Rewards without Process Labels](https://huggingface.co/papers/2412.01981)"


class OfflinePRMTrainer(Trainer):
    """
    Trainer of an implicit PRM on completions that exist already.

    A [`~transformers.Trainer`] whose model is the PRM and whose loss is made of the same log-probabilities and scores as the
    PRM's loss in [`PRIMETrainer`], so that a PRM trained here goes on there: `PRIMETrainer(prm_model=output_dir)`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`ImplicitPRM`]): What the PRM starts from,
            which is its reference too; or a PRM that was trained before, by its folder, Hub id or as an instance, which keeps
            the reference that it has.
        args ([`OfflinePRMConfig`], *optional*): Settings.
        train_dataset ([`~datasets.Dataset`], *optional*): Labelled completions, `prompt`, `completion` and `label`, or pairs,
            `prompt`, `chosen` and `rejected` (TRL's unpaired preference and preference). Where the loss needs the other
            form, it is made. Rows without a label are left out.
        eval_dataset ([`~datasets.Dataset`] or `dict`, *optional*): The same, held out.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): Tokenizer; the model's own if not given.
        peft_config ([`~peft.PeftConfig`], *optional*): Train an adapter. The reference is then its bare base and costs no
            memory.
        **kwargs: `callbacks`, `optimizers` and what else [`~transformers.Trainer`] takes.

    Attributes:
        implicit_prm ([`ImplicitPRM`]): The PRM with its reference.

    Raises:
        ValueError: The data has no known form, or nothing of it is left; the model brings its own adapter and `peft_config` is
            given too.
    """

    # Losses are means over a micro-batch
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel | ImplicitPRM,
        args: OfflinePRMConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            args = OfflinePRMConfig("implicit-prm")
        if isinstance(model, str) and not os.path.isdir(model):
            model = downloaded_prm(model) or model
        rate = (1e-4, SUITS_ADAPTERS) if kind_of_start(model, peft_config)[0] else (5e-7, "")
        args = with_defaults(args, {"learning_rate": rate})
        if isinstance(model, ImplicitPRM):
            processing_class = model.tokenizer
        elif processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.name_or_path)
        # Before the model is loaded, so that malformed data is told at once
        text_format = _text_format(model, processing_class, train_dataset)
        prepare = functools.partial(prepare_dataset, args=args, tokenizer=processing_class, text_format=text_format)
        train_dataset = None if train_dataset is None else prepare(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(dataset, name) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, "eval")

        self.implicit_prm = prm = _build_prm(model, args, processing_class, peft_config)
        prm.text_format = text_format
        if args.gradient_checkpointing and isinstance(prm.model, PeftModel):
            prm.model.enable_input_require_grads()
        super().__init__(
            model=prm.model,
            args=args,
            data_collator=OutcomeCollator(processing_class.pad_token_id or 0),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=_held_out_metrics,
            **kwargs,
        )
        let_threads_finish_at_exit()
        # The same for versions of transformers that do not know `loss_is_scaled_for_ga`
        self.model_accepts_loss_kwargs = False
        if args.push_to_hub:
            prm.reference_name = prm.portable_reference_name()
        self._backend = make_backend(prm, self.accelerator)
        self._backend.place_reference()
        # Sum and count of what is logged with the next training loss
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, device=self.accelerator.device))
        self._card_dataset: str | None = None

    # --- Loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Mean loss of a batch of [`OutcomeCollator`] and, with `return_outputs`, its `(n, C)` scores."""
        args = self.args
        # Before the pass with gradient, which no other may come between and its backward pass
        reference_point = self._reference_point(model, inputs) if args.loss_type == "kto" else None
        scores, labels = self._scores(model, inputs), inputs["labels"]
        if args.loss_type == "ce":
            losses = prm_row_losses(scores, labels)
        elif args.loss_type == "dpo":
            losses = dpo_pair_losses(scores[:, 0], scores[:, 1])
        else:
            losses = kto_row_losses(scores, labels, reference_point, args.desirable_weight, args.undesirable_weight)
            self._record("reference_point", reference_point.item())
        if args.loss_type == "dpo":
            self._record("pairwise_accuracy", pairwise_accuracy(scores.detach().flatten(), labels.flatten(), 2))
        else:
            self._record("accuracy", absolute_accuracy(scores.detach(), labels))
        loss = losses.mean()
        return (loss, scores.detach()) if return_outputs else loss

    def _scores(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(n, C)` scores q of the completions of a batch."""
        mask, rows = inputs["completion_mask"], completion_rows(inputs)
        logps = completion_logps(model, *rows)
        # Under the same autocast as the PRM: both must round alike
        with torch.no_grad(), self.accelerator.autocast():
            check_scoring(self.implicit_prm.reference)
            ref_logps = completion_logps(self.implicit_prm.reference, *rows)
        return outcome_scores(logps - ref_logps, mask.flatten(0, 1), self.implicit_prm.beta).view(mask.shape[:2])

    @torch.no_grad()
    def _reference_point(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """KTO's reference point, over all processes, from each prompt with the completion of another."""
        rows, donors = mismatched_rows(inputs["groups"]).unbind(1)
        if len(rows) == 0:
            # The forward pass is a joint act where weights are sharded
            rows = donors = torch.zeros(1, dtype=torch.long, device=rows.device)
        mismatched = {name: inputs[name][rows] for name in ("prompt_ids", "prompt_mask")}
        mismatched |= {name: inputs[name][donors] for name in ("completion_ids", "completion_mask")}
        scores = self._scores(model, mismatched).flatten()[rows != donors]
        sum_and_count = torch.stack([scores.sum(), scores.new_tensor(float(len(scores)))])
        total, count = self.accelerator.reduce(sum_and_count, "sum")
        return kto_reference_point(total.view(1) / count.clamp(min=1))

    def _record(self, name: str, value: float) -> None:
        if self.model.training and value == value:  # NaN where there was nothing to measure
            self._sums[name] += torch.tensor([value, 1.0], device=self.accelerator.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name in ("accuracy", "pairwise_accuracy", "reference_point"):
                total, count = self.accelerator.reduce(self._sums[name], "sum").tolist()
                if count:
                    logs[name] = total / count
            self._sums.clear()
        super().log(logs, *args, **kwargs)

    # --- Held-out completions ---

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, scores, (inputs["labels"], inputs["groups"])

    # --- Saving and loading ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        save_prm(self.implicit_prm, self._backend, folder, self.args.should_save)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer does not find an adapter in its folder. It has files of its own for FSDP.
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, checkpoint: str) -> None:
        if not os.path.isfile(os.path.join(checkpoint, CONFIG_NAME)):
            raise ValueError(f"'{checkpoint}' has no {CONFIG_NAME}: it was not saved by OfflinePRMTrainer.")
        self._backend.load_weights(saved_weights(self.implicit_prm.model, checkpoint))

    # --- The Hub ---

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the PRM's card, see [`~trl_prime.hub.prm_card`]; `dataset_name` is the Hub id of the training data."""
        if not self.is_world_process_zero():
            return
        # Trainer writes the card anew at every push, and only the last one may be told the data set
        if isinstance(dataset_name, str):
            self._card_dataset = hub_dataset(dataset_name) or self._card_dataset
        folder = Path(self.args.output_dir)
        data = "pairs of completions" if self.args.loss_type == "dpo" else "completions with outcome labels"
        card = saved_prm_card(
            folder,
            self.hub_model_id or model_name or folder.name,
            trained=f"It was trained offline, on {data} only ({_PAPER_LINK}).",
            settings=settings_table(self.args, CARD_SETTINGS),
            datasets=self._card_dataset,
            revision=self.args.hub_revision,
        )
        card.save(folder / "README.md")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        self.implicit_prm.reference_name = self.implicit_prm.portable_reference_name()
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the files of a plain model only
        if self.is_world_process_zero():
            shutil.copy(os.path.join(checkpoint_folder, CONFIG_NAME), self.args.output_dir)
            for name in ("adapter", "reference"):
                if os.path.isdir(os.path.join(checkpoint_folder, name)):
                    source, target = (
                        os.path.join(folder, name) for folder in (checkpoint_folder, self.args.output_dir)
                    )
                    shutil.copytree(source, target, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)


def _build_prm(
    model: Any, args: OfflinePRMConfig, tokenizer: PreTrainedTokenizerBase, peft_config: PeftConfig | None
) -> ImplicitPRM:
    if (is_saved_prm(model) or isinstance(model, ImplicitPRM)) and peft_config is not None:
        raise ValueError("model is an implicit PRM, which is full or LoRA already: leave peft_config out.")
    prm = build_prm(
        model,
        tokenizer,
        peft_config=peft_config,
        init_kwargs=args.model_init_kwargs,
        disable_dropout=args.disable_dropout,
        seed=args.seed,
        beta=args.beta,
        step_delimiter=args.step_delimiter,
        micro_batch_size=args.per_device_eval_batch_size,
    )
    if prm.reference is None:
        raise ValueError("The implicit PRM has no reference to be measured against. Pass one with a reference.")
    warn_of_rounding(prm.model, "PRM", "learning_rate", args.learning_rate, "dtype='float32'")
    return prm


def _text_format(model: Any, tokenizer: PreTrainedTokenizerBase, dataset: Dataset | None) -> TextFormat:
    """How the data is written: as a PRM has learnt it, else as the model's chat template and generation have it."""
    text_format = model.text_format if isinstance(model, ImplicitPRM) else None
    if isinstance(model, str):
        text_format = saved_text_format(model)
    if text_format is None:
        text_format = TextFormat.of(tokenizer, end_token_ids(model))
    if isinstance(dataset, Dataset) and len(dataset) and "prompt" in dataset.column_names:
        text_format = dataclasses.replace(text_format, messages=not isinstance(dataset[0]["prompt"], str))
    return text_format


def _held_out_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """How often the PRM ranks the better completion of a group higher, and how often it tells right from wrong."""
    scores, labels, groups = (torch.as_tensor(array) for array in (prediction.predictions, *prediction.label_ids))
    groups = groups.expand_as(scores).flatten()
    grouped = [pad_groups(values.flatten(), groups) for values in (scores, labels)]
    pairwise = pairwise_accuracy(*(values.flatten() for values in grouped), grouped[0].shape[1])
    metrics = {"accuracy": absolute_accuracy(scores.flatten(), labels.flatten())}
    return metrics if pairwise != pairwise else {"pairwise_accuracy": pairwise, **metrics}
