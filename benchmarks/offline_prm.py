"""An implicit PRM learns offline from the same completions by each of the losses: how much does it learn?

Makes the base model of the built-in task (running sums), samples completions of its train problems from it, labels them by
the outcome alone, and trains a PRM on them by cross-entropy, DPO and KTO, from the same start and for the same number of
completions a step. Each is measured on completions of held-out problems: whether it ranks a right one above a wrong one,
whether it tells right from wrong, and how well it finds the first wrong step, of which training never said anything.

    python benchmarks/offline_prm.py --seeds 0 1 2
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import RESULTS, machine, parser, write
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback

from trl_prime import OfflinePRMConfig, OfflinePRMTrainer
from trl_prime.evaluation.held_out import generate, measure_prm, outcomes
from trl_prime.implicit_prm.losses import OFFLINE_LOSS_TYPES
from trl_prime.tasks.running_sums import prepare

SAMPLES = 8


def sample(task, problems, seed: int) -> tuple[Dataset, list[str], torch.Tensor]:
    """The problems, each `SAMPLES` times; a completion of the base model for each; and their outcomes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(task.model), AutoTokenizer.from_pretrained(task.model)
    rows = problems.select([row for row in range(len(problems)) for _ in range(SAMPLES)])
    settings = {"max_new_tokens": 24, "temperature": 1.0, "batch_size": 256, "seed": seed}
    completions = generate(model, tokenizer, rows["prompt"][:], **settings)
    return rows, completions, outcomes(task.reward_funcs[0], rows, completions)


def run(loss_type: str, seed: int, task, train_dataset: Dataset, held_out, options, folder: Path) -> dict:
    """Train a PRM by one loss, and measure it on completions of held-out problems."""
    right = sum(train_dataset["label"][:])
    special = {
        "dpo": {"max_pairs_per_prompt": SAMPLES // 2},
        # Right and wrong completions count alike by default
        "kto": {"desirable_weight": options.desirable_weight or (len(train_dataset) - right) / right},
    }
    args = OfflinePRMConfig(
        str(folder / f"{loss_type}-{seed}"),
        loss_type=loss_type,
        **special.get(loss_type, {}),
        seed=seed,
        beta=options.beta,
        learning_rate=options.learning_rate,
        max_steps=options.steps,
        # A pair is two completions, so every loss sees as many
        per_device_train_batch_size=64 if loss_type == "dpo" else 128,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = OfflinePRMTrainer(task.model, args, train_dataset)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = measure_prm(trainer.implicit_prm, *held_out, SAMPLES, task.step_labels)
    return {"loss_type": loss_type, "seed": seed, **metrics, "train_seconds": round(seconds, 1)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--problems", type=int, default=1024, help="Train problems that are sampled.")
    arguments.add_argument("--steps", type=int, default=200, help="Optimizer steps, of 128 completions.")
    arguments.add_argument("--learning-rate", type=float, default=5e-4)
    arguments.add_argument("--beta", type=float, default=0.5)
    arguments.add_argument(
        "--desirable-weight",
        type=float,
        default=None,
        help="KTO's weight of right completions; wrong over right completions if not given.",
    )
    arguments.add_argument("--output", type=Path, default=RESULTS / "offline_prm.json")
    arguments.add_argument("--folder", type=Path, default=None, help="Folder that keeps base models between calls.")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp())
    rows = []
    for seed in options.seeds:
        task = prepare(folder / f"base-{seed}", seed=seed)
        problems, completions, labels = sample(task, task.train_dataset.select(range(options.problems)), seed)
        train_dataset = Dataset.from_dict(
            {"prompt": problems["prompt"][:], "completion": completions, "label": (labels > 0.5).tolist()}
        )
        held_out = sample(task, task.eval_dataset, seed)
        print(f"seed {seed}  {labels.mean():.1%} of {len(labels)} completions are right", flush=True)
        for loss_type in OFFLINE_LOSS_TYPES:
            rows.append(run(loss_type, seed, task, train_dataset, held_out, options, folder))
            row = rows[-1]
            print(
                f"seed {seed}  {loss_type:<4}  pairs {row['pairwise_accuracy']:.3f}  right or wrong {row['accuracy']:.3f}  "
                f"first wrong step (AUC) {row['first_error_auc']:.3f}  {row['train_seconds']:.0f} s",
                flush=True,
            )
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("output", "folder")}
    write({"machine": machine("torch", "transformers"), "settings": settings, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
