"""Does weighting process rewards by trust in the PRM keep a policy from collapsing while the PRM still guesses?

Runs the built-in task from the same base with and without `prm_trust_weighting`, process rewards at `--process-weight`
times the outcome's, normalised as published (`batch_norm`), and writes the accuracy of the rollouts step by step.

    python benchmarks/trust.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.trainer_callback import PrinterCallback

from trl_prime import PRIMEConfig, PRIMETrainer
from trl_prime.tasks.running_sums import prepare


def run(seed: int, trust: bool, options: argparse.Namespace, folder: Path) -> dict:
    task = prepare(folder / f"base-{seed}", seed=seed)
    args = PRIMEConfig(
        str(folder / f"run-{seed}-{trust}"),
        seed=seed,
        max_steps=options.steps,
        per_device_train_batch_size=256,
        num_generations=8,
        max_completion_length=24,
        learning_rate=options.learning_rate,
        prm_learning_rate=options.prm_learning_rate,
        prm_beta=options.prm_beta,
        prm_replay_batches=options.replay,
        prm_trust_weighting=trust,
        process_weight=options.process_weight,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = PRIMETrainer(
        model=task.model, reward_funcs=task.reward_funcs, args=args, train_dataset=task.train_dataset
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    series = {
        name: [row[key] for row in history]
        for name, key in {
            "reward": "reward",
            "pairwise_accuracy": "prm/pairwise_accuracy",
            "trust": "prm/trust",
            "process_share": "advantage/process_share",
        }.items()
    }
    rewards = series["reward"]
    return {
        "seed": seed,
        "trust_weighting": trust,
        "start": sum(rewards[:3]) / 3,
        "lowest": min(sum(rewards[i : i + 3]) / 3 for i in range(len(rewards) - 2)),
        "end": sum(rewards[-5:]) / 5,
        **series,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--process-weight", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--prm-learning-rate", type=float, default=5e-4)
    parser.add_argument("--prm-beta", type=float, default=0.5)
    parser.add_argument("--replay", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "trust.json")
    parser.add_argument("--folder", type=Path, default=None, help="Where base models are kept between calls.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp())
    rows = []
    for seed in options.seeds:
        for trust in (False, True):
            rows.append(run(seed, trust, options, folder))
            row = rows[-1]
            print(
                f"seed {seed}  trust weighting {'on ' if trust else 'off'}  accuracy {row['start']:.3f} at the start, "
                f"{row['lowest']:.3f} at its lowest, {row['end']:.3f} at the end",
                flush=True,
            )
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("output", "folder")}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": platform.platform(), "torch": torch.__version__, "settings": settings, "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
