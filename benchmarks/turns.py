"""Credit by turn, by token and by outcome alone, on the game of recipes/letter-search.yaml.

python benchmarks/turns.py --runs runs/turns            # trains what is not there yet, minutes a run on a CPU
python benchmarks/turns.py --runs runs/turns --seeds 1  # fewer seeds

A run is `trl-prime train --config letter-search` with the flags of its method in METHODS. Prints the table of benchmarks/turns.md, and
writes docs/images/turns.png and benchmarks/results/turns.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS, draw_curves, machine, markdown_table, parser, write

METHODS = {
    "outcome": ["--process_weight", "0"],
    "token": ["--process_reward_granularity", "token"],
    "turn": [],
    "softmax": ["--process_reward_norm", "softmax"],
}
# Each number is the mean of so many steps
WINDOW = 10
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "turns.png"


def train(folder: Path, seed: int, flags: list[str]) -> None:
    """Run the recipe, unless its log is there."""
    if (folder / "trainer_state.json").is_file():
        return
    start = time.perf_counter()
    words = ["--config", "letter-search", "--output_dir", str(folder), "--seed", str(seed), "--disable_tqdm", "true"]
    subprocess.run([sys.executable, "-m", "trl_prime.cli", "train", *words, *flags], check=True)
    print(f"{folder}: {time.perf_counter() - start:.0f} s", flush=True)


def read(folder: Path) -> dict[str, list[float]]:
    """Rewards and PRM accuracies of a run as means of `WINDOW` steps, and the median time of a step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = {}
    for name in ("reward", "prm/pairwise_accuracy", "entropy"):
        values = [row[name] for row in history if row.get(name) is not None]
        found[name] = [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values), WINDOW)]
    found["step_time"] = [statistics.median(row["step_time"] for row in history if "step_time" in row)]
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=Path, required=True, help="Folder of the runs.")
    arguments.add_argument("--seeds", type=int, default=3, help="Runs of each method.")
    options = arguments.parse_args()
    about = machine("trl", "transformers", "torch")
    runs: dict[str, list[dict[str, list[float]]]] = {}
    for seed in range(options.seeds):
        for method, flags in METHODS.items():
            folder = options.runs / f"{method}-{seed}"
            train(folder, seed, flags)
            runs.setdefault(method, []).append(read(folder))
    num_windows = len(runs["outcome"][0]["reward"])
    header = [
        "method",
        *(f"steps {WINDOW * i + 1} to {WINDOW * (i + 1)}" for i in range(num_windows)),
        "last, by seed",
    ]
    rows = []
    for method, seeds in runs.items():
        curves = [run["reward"] for run in seeds]
        means = [f"{statistics.fmean(at):.1%}" for at in zip(*curves, strict=True)]
        rows.append([f"`{method}`", *means, ", ".join(f"{curve[-1]:.1%}" for curve in curves)])
    print(markdown_table(header, rows).replace("%", " %"))
    curves = {method: [run["reward"] for run in seeds] for method, seeds in runs.items()}
    draw_curves(curves, WINDOW, f"games won, means of {WINDOW} steps", IMAGE)
    write({"machine": about, "runs": runs}, RESULTS / "turns.json")


if __name__ == "__main__":
    main()
