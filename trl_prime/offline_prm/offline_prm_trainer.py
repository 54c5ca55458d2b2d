"""Training an implicit PRM offline, on completions with outcome labels or on pairs ("Free Process Rewards without Process
Labels", arXiv 2412.01981).

Covered: tokens as the PRM sees them online, the three losses, accuracies on held-out completions, checkpoints and the Hub.
The loop, distribution, resuming and logging are Trainer's. An example is a prompt with C completions: one, or the two of a
pair. n = examples of a batch, P = prompt tokens, T = completion tokens.
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
from torch.utils.data import DataLoader, SequentialSampler
from tqdm.auto import tqdm
from transformers import AutoTokenizer, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.utils import logging
from trl.trainer.utils import pad

from ..hub import hub_dataset, settings_table
from ..implicit_prm.accuracies import absolute_accuracy, pad_groups, pairwise_accuracy
from ..implicit_prm.backends import make_backend
from ..implicit_prm.build import build_prm, warn_of_rounding
from ..implicit_prm.copies import check_apart
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
from ..process_exit import let_threads_finish_at_exit
from ..texts import TextFormat, tokenize
from .data import group_by_prompt, to_labelled, to_pairs
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
        if isinstance(model, ImplicitPRM):
            processing_class = model.tokenizer
        elif processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.name_or_path)
        # Before the model is loaded, so that malformed data is told at once
        text_format = _text_format(model, processing_class, train_dataset)
        prepare = functools.partial(_prepare_dataset, args=args, tokenizer=processing_class, text_format=text_format)
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
        if args.precompute_ref_log_probs:
            self.train_dataset = self._with_ref_logps(self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {name: self._with_ref_logps(data) for name, data in self.eval_dataset.items()}
            else:
                self.eval_dataset = self._with_ref_logps(self.eval_dataset)

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
        scores, labels = self._scores(model, inputs, inputs.get("ref_logps")), inputs["labels"]
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

    def _scores(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], ref_logps: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(n, C)` scores q of the completions of a batch."""
        mask = inputs["completion_mask"]
        batch = _rows(inputs)
        logps = completion_logps(model, *batch)
        ref_logps = self._ref_logps(batch) if ref_logps is None else ref_logps.flatten(0, 1)
        return outcome_scores(logps - ref_logps, mask.flatten(0, 1), self.implicit_prm.beta).view(mask.shape[:2])

    @torch.no_grad()
    def _ref_logps(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # Under the same autocast as the PRM: both must round alike
        with self.accelerator.autocast():
            check_scoring(self.implicit_prm.reference)
            return completion_logps(self.implicit_prm.reference, *batch)

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

    # --- Reference ---

    def _with_ref_logps(self, dataset: Dataset | None) -> Dataset | None:
        """The data set with the `(C, t)` reference log-probabilities of every example."""
        if dataset is None:
            return None
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            sampler=SequentialSampler(dataset),
        )
        loader, column = self.accelerator.prepare(loader), []
        hidden = self.args.disable_tqdm or not self.accelerator.is_main_process
        for batch in tqdm(loader, desc="log-probabilities of the reference", disable=hidden):
            mask = batch["completion_mask"]
            logps = self._ref_logps(_rows(batch)).view(mask.shape)
            logps, mask = self.accelerator.pad_across_processes((logps, mask), dim=2)
            logps, mask = self.accelerator.gather_for_metrics((logps, mask))
            for values, lengths in zip(logps.cpu(), mask.sum(2).tolist(), strict=True):
                column.append([row[:length].tolist() for row, length in zip(values, lengths, strict=True)])
        return dataset.add_column("ref_logps", column)

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


# ---------------------------------------------------------------------------------------------------------------------
# Model


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
    check_apart(None, prm.model, prm.reference)
    warn_of_rounding(prm, "learning_rate", args.learning_rate, "dtype='float32'")
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


# ---------------------------------------------------------------------------------------------------------------------
# Data


def _prepare_dataset(
    dataset: Dataset,
    name: str,
    args: OfflinePRMConfig,
    tokenizer: PreTrainedTokenizerBase,
    text_format: TextFormat,
) -> Dataset:
    """
    Examples as token ids: `prompt_ids`, `completion_ids` (a list of C), `labels` (of each) and `group`.

    A group holds what is compared: the completions of a prompt or, as preferences of different pairs need not be
    comparable, of a pair.
    """
    with args.main_process_first(desc=f"preparing the {name} data"):
        if args.loss_type == "dpo":
            dataset = to_pairs(dataset, args.max_pairs_per_prompt, args.seed)
        else:
            dataset = to_labelled(dataset)
        num_rows = len(dataset)
        # The version is there for the cache of `map`, which tells functions apart by their name only
        from ..version import __version__

        encode = functools.partial(
            _encode,
            tokenizer=tokenizer,
            text_format=text_format,
            max_length=args.max_length if args.overlong == "truncate" else None,
            version=__version__,
        )
        options = {"num_proc": args.dataset_num_proc}
        dataset = dataset.map(
            encode, with_indices=True, remove_columns=dataset.column_names, desc=f"Tokenizing {name} data", **options
        )
        judged = dataset.filter(_is_judged, input_columns="labels", desc=f"Unjudged {name} rows", **options)
        fits = functools.partial(_fits, max_length=args.max_length)
        columns = ["prompt_ids", "completion_ids"]
        dataset = judged.filter(fits, input_columns=columns, desc=f"Overlong {name} rows", **options)
    if num_rows > len(judged):
        logger.warning(f"Left out {num_rows - len(judged)} of {num_rows} {name} rows that have no label.")
    if len(judged) > len(dataset):
        logger.warning(
            f"Left out {len(judged) - len(dataset)} of {num_rows} {name} rows that are longer than max_length="
            f"{args.max_length} tokens."
        )
    if len(dataset) == 0:
        raise ValueError(
            f"None of the {num_rows} {name} rows is left: they have no label, or max_length is too short."
        )
    groups = list(range(len(dataset)))
    if args.loss_type != "dpo":
        for group, rows in enumerate(group_by_prompt(dataset["prompt_ids"][:])):
            for row in rows:
                groups[row] = group
    return dataset.add_column("group", groups)


def _encode(
    row: dict[str, Any],
    i: int,
    tokenizer: PreTrainedTokenizerBase,
    text_format: TextFormat,
    max_length: int | None,
    version: str,
) -> dict[str, Any]:
    labels = [1.0, 0.0]
    completions = [row.get("chosen"), row.get("rejected")]
    if "completion" in row:
        completions = [row["completion"]]
        labels = [float("nan") if row["label"] is None else float(row["label"])]
        if labels[0] < 0 or labels[0] > 1:
            raise ValueError(f"Row {i} has the label {row['label']}, but labels are outcomes between 0 and 1.")
    if row["prompt"] is None or None in completions:
        raise ValueError(f"Row {i} has no prompt or no completion: leave such rows out.")
    try:
        encoded = [
            tokenize(tokenizer, row["prompt"], completion, text_format, bool(row.get("truncated")))
            for completion in completions
        ]
    except ValueError as error:
        raise ValueError(f"Row {i} cannot be tokenized: {error}") from error
    prompt_ids = encoded[0][0]
    room = None if max_length is None else max(max_length - len(prompt_ids), 0)
    return {"prompt_ids": prompt_ids, "completion_ids": [ids[:room] for _, ids in encoded], "labels": labels}


def _is_judged(labels: list[float | None]) -> bool:
    return all(label is not None and label == label for label in labels)


def _fits(prompt_ids: list[int], completion_ids: list[list[int]], max_length: int | None) -> bool:
    if not all(completion_ids):
        return False  # nothing was left of it
    return max_length is None or all(len(prompt_ids) + len(ids) <= max_length for ids in completion_ids)


class OutcomeCollator:
    """
    Examples into a batch: `prompt_ids`, `prompt_mask` `(n, P)` padded on the left, `completion_ids`, `completion_mask`
    `(n, C, T)` padded on the right, `labels` `(n, C)`, `groups` `(n, 1)` and, where they were computed, `ref_logps`
    `(n, C, T)`.

    Args:
        pad_token_id (`int`): Fills up.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [torch.tensor(example["prompt_ids"], dtype=torch.long) for example in examples]
        completions = [
            torch.tensor(ids, dtype=torch.long) for example in examples for ids in example["completion_ids"]
        ]
        size = (len(examples), -1)
        batch = {
            "prompt_ids": pad(prompts, self.pad_token_id, "left"),
            "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
            "completion_ids": pad(completions, self.pad_token_id).unflatten(0, size),
            "completion_mask": pad([torch.ones_like(ids) for ids in completions], 0).unflatten(0, size),
            "labels": torch.tensor([example["labels"] for example in examples], dtype=torch.float32),
            "groups": torch.tensor([[example["group"]] for example in examples]),
        }
        if "ref_logps" in examples[0]:
            logps = [torch.tensor(row, dtype=torch.float32) for example in examples for row in example["ref_logps"]]
            batch["ref_logps"] = pad(logps, 0.0).unflatten(0, size)
        return batch


def _rows(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt ids and mask `(n * C, P)`, completion ids and mask `(n * C, T)`: a row for each completion."""
    num_completions = batch["completion_ids"].shape[1]
    prompts = (batch[name].repeat_interleave(num_completions, dim=0) for name in ("prompt_ids", "prompt_mask"))
    return (*prompts, batch["completion_ids"].flatten(0, 1), batch["completion_mask"].flatten(0, 1))


def mismatched_rows(groups: torch.Tensor) -> torch.Tensor:
    """
    For each row the next one, around the end, that belongs to another prompt.

    Args:
        groups (`torch.Tensor`): `(n, 1)` numbers of the prompts.

    Returns:
        `torch.Tensor`: `(m, 2)` indices of the row and of the other; rows without one are left out.
    """
    n = len(groups)
    rows = torch.arange(n, device=groups.device)
    distance = (rows[None, :] - rows[:, None]) % n
    nearest = torch.where(groups == groups.T, n, distance).min(dim=1)
    return torch.stack([rows, nearest.indices], dim=1)[nearest.values < n]


def _held_out_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """How often the PRM ranks the better completion of a group higher, and how often it tells right from wrong."""
    scores, labels, groups = (torch.as_tensor(array) for array in (prediction.predictions, *prediction.label_ids))
    groups = groups.expand_as(scores).flatten()
    grouped = [pad_groups(values.flatten(), groups) for values in (scores, labels)]
    pairwise = pairwise_accuracy(*(values.flatten() for values in grouped), grouped[0].shape[1])
    metrics = {"accuracy": absolute_accuracy(scores.flatten(), labels.flatten())}
    return metrics if pairwise != pairwise else {"pairwise_accuracy": pairwise, **metrics}
