"""What do tiles save where TRL's fused head is not used, and what do they cost?

A model of SmolLM2-135M's width and vocabulary with fewer layers, on one CPU core: forward and backward pass of
`completion_logps` and a pass without gradient, with the logits of the micro-batch held whole and with the head in tiles.
Each is a process of its own, and they take turns.

    lora        the head is frozen
    full        the head is trained, and tied to the embedding
    lora-head   an adapter on the head

    python benchmarks/head.py --rounds 5

Seconds are those of the processor, which other programs on the machine change less than the clock's. Memory is the largest
resident size during the forward and backward pass above that before it, the gradients of the weights among it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import markdown_table, parser
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from trl_prime.implicit_prm import tiled_head
from trl_prime.implicit_prm.logps import completion_logps, unwrapped

TARGETS = {"lora": ["q_proj", "v_proj"], "full": None, "lora-head": ["q_proj", "v_proj", "lm_head"]}
PROMPT = 16


def make_model(kind: str, layers: int) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if TARGETS[kind] is None:
        return model
    return get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS[kind], task_type="CAUSAL_LM"))


def resident(name: str) -> int:
    """Megabytes: `VmRSS` now, `VmHWM` at most since the last reset."""
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def work(connection: Connection, kind: str, is_tiled: bool, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = make_model(kind, options.layers)
    if not is_tiled:
        setattr(unwrapped(model), tiled_head._NUM_LOGITS, 0)
    ids = torch.randint(3, 40000, (options.rows, PROMPT + options.tokens))
    mask, weight = torch.ones_like(ids), torch.randn(options.rows, options.tokens)
    batch = (ids[:, :PROMPT], mask[:, :PROMPT], ids[:, PROMPT:], mask[:, PROMPT:])
    while connection.recv():
        model.zero_grad()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before, start = resident("VmRSS"), time.process_time()
        (completion_logps(model, *batch) * weight).sum().backward()
        trained, memory = time.process_time() - start, resident("VmHWM") - before
        start = time.process_time()
        with torch.no_grad():
            completion_logps(model, *batch)
        connection.send((trained, time.process_time() - start, memory))


def measure(kind: str, options: argparse.Namespace) -> list[list[str]]:
    context, children = multiprocessing.get_context("spawn"), []
    for is_tiled in (False, True):
        connection, other = context.Pipe()
        process = context.Process(target=work, args=(other, kind, is_tiled, options))
        process.start()
        children.append((connection, process))
    rounds: list[list[tuple[float, float, int]]] = [[], []]
    for _ in range(options.rounds + 1):
        for results, (connection, _) in zip(rounds, children, strict=True):
            connection.send(True)
            results.append(connection.recv())
    for connection, process in children:
        connection.send(False)
        process.join()
    rows = []
    for name, results in zip(("whole", "tiles"), rounds, strict=True):
        trained, scored, memory = zip(*results[1:], strict=True)  # the first warms up
        spread = f"{statistics.median(trained):.2f} s ({min(trained):.2f} to {max(trained):.2f})"
        rows.append([kind, name, spread, f"{statistics.median(scored):.2f} s", f"{max(memory)} MB"])
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kinds", nargs="+", choices=TARGETS, default=[*TARGETS])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--layers", type=int, default=6, help="SmolLM2-135M has 30.")
    arguments.add_argument("--rows", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=256, help="Tokens of each completion.")
    options = arguments.parse_args()
    rows = [row for kind in options.kinds for row in measure(kind, options)]
    print(markdown_table(["model", "logits", "forward and backward (range)", "forward", "memory"], rows))


if __name__ == "__main__":
    main()
