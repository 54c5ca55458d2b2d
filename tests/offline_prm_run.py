"""An offline training run of `distributed_run.py`: settings are fields of `OfflinePRMConfig`, and `lora` and `eval`."""

import json
from pathlib import Path

import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig

from trl_prime import OfflinePRMConfig, OfflinePRMTrainer


def train_offline(settings, gathered, save_distribution):
    folder = Path(settings["output_dir"])
    lora, evaluates = settings.pop("lora", False), settings.pop("eval", False)
    rows = [{"prompt": f"{i // 3}=", "completion": f"{37 * i % 101}", "label": i % 3 == 0} for i in range(48)]
    args = OfflinePRMConfig(
        **{
            "use_cpu": True,
            "bf16": False,
            "max_steps": 2,
            "logging_steps": 1,
            "report_to": [],
            "learning_rate": 1e-3,
            "beta": 0.5,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        }
    )
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = OfflinePRMTrainer(
        build_model(7, scale=4.0),
        args,
        Dataset.from_list(rows),
        # Not a multiple of any batch
        Dataset.from_list(rows[:13]) if evaluates else None,
        build_tokenizer(),
        config if lora else None,
    )
    trainer.train()
    if evaluates:
        trainer.evaluate()
    trainer.save_model()
    parts = {"prm": trainer.implicit_prm.model, "reference": trainer.implicit_prm.reference}
    rank = trainer.accelerator.process_index
    torch.save({part: gathered(model) for part, model in parts.items()}, folder / f"result_{rank}.pt")
    save_distribution(folder, trainer, trainer._backend, trainer.model_wrapped)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(trainer.state.log_history))
