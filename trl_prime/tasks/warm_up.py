"""The supervised warm-up of a task's base model, by TRL's `SFTTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Dataset,
    output_dir: str | Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    peft_config: PeftConfig | None = None,
    **settings: Any,
) -> float:
    """Fine-tune a model on demonstrations and save it with its tokenizer.

    Args:
        model: Model to train, in place; may end up on another device.
        tokenizer: Its tokenizer.
        demonstrations: Rows with a `prompt` and a `completion`; the loss is on the completion.
        output_dir: Where the trained model goes, an ordinary checkpoint folder.
        steps: Optimizer steps.
        batch_size: Demonstrations per step and device.
        learning_rate: Peak learning rate, from which it falls linearly to zero.
        seed: Seed of the data order and of an adapter's initial weights.
        peft_config: Adapter to train in the place of all weights; it is merged into the model.
        **settings: Further fields of `SFTConfig`.

    Returns:
        Loss in nats per completion token at the last logged step.

    Raises:
        ValueError: If `steps` or `batch_size` is less than 1.
    """
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from ..reports.progress import MetricsProgressCallback

    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    # The seed is set before the trainer is made, because making it draws an adapter's weights
    set_seed(seed)
    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        completion_only_loss=True,
        gradient_checkpointing=False,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=seed,
        **{"bf16": False, **settings},
    )
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=demonstrations, processing_class=tokenizer, peft_config=peft_config
    )
    MetricsProgressCallback.replace_default(trainer, "warm-up", {"loss": "loss"})
    trainer.train()
    trained = trainer.model if peft_config is None else trainer.model.merge_and_unload()
    trained.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return next(row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row)
