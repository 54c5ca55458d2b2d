"""Print what `pytest -m gpu` has measured, as tables for docs/performance.md.

python benchmarks/gpu_table.py
"""

from __future__ import annotations

import json

from common import RESULTS, markdown_table


def main() -> None:
    found = json.loads((RESULTS / "gpu.json").read_text())
    about = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['gpu']}, {found['date']}, {versions}\n")
    names = ("time ratio", "time ratio of the cost model", "memory ratio")
    rows = [
        [kind, f"{row['grpo seconds']:.2f} s", *(f"{row[name]:.2f}" for name in names)]
        for kind, row in found.get("step", {}).items()
    ]
    print(markdown_table(["given completions", "GRPO's step", *names], rows))
    pairs = {
        name: ", ".join(f"{key} {value:.3g}" for key, value in found[name].items() if isinstance(value, float))
        for name in ("fused head", "gradient checkpointing", "attention", "4 bits")
        if name in found
    }
    print("\n" + markdown_table(["measured", "result"], [[name, text] for name, text in pairs.items()]))


if __name__ == "__main__":
    main()
