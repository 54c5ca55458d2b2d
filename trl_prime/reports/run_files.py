"""The files in the folder of a run: their names, the checkpoints among them, and the settings that are written there.

Not covered: models and the states of optimizers (`implicit_prm/files.py`).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

SETTINGS_NAME = "prime_config.json"
RESULTS_NAME = "results.json"
CURVE_NAME = "learning_curve.png"
REPORT_NAME = "report.html"
PRM_FOLDER = "prm"
# The names of PRIME's columns in the table of `log_completions` begin with it
TABLE_PREFIX = "prime/"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the last one first."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True)]


def save_settings(output_dir: Path, *arguments: Any) -> None:
    """
    Write all settings of a run as one JSON object, which `trl-prime report` shows. It may be pushed along with the run:
    what is secret by its name is masked.

    Args:
        output_dir (`Path`): Folder of the run, made if needed.
        *arguments: Dataclasses or dicts with settings; of a name that two of them have, the later one counts.
    """
    settings: dict[str, Any] = {}
    for part in arguments:
        if not isinstance(part, dict):
            part = part.to_dict() if hasattr(part, "to_dict") else asdict(part)
        settings |= part
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / SETTINGS_NAME).write_text(
        json.dumps(_masked(settings), indent=2, sort_keys=True, default=str) + "\n"
    )


def _masked(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _masked(item, str(key)) for key, item in value.items()}
    secret = isinstance(value, str) and re.search(r"(token|key|password|secret)$", name, re.IGNORECASE)
    return f"<{name.upper()}>" if secret else value
