"""Rows that a long evaluation writes as it goes, and reads again where it was interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Files of a model's folder that its completions or scores depend on, beside the weights
_MODEL_SETTINGS = {
    "adapter_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "implicit_prm.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


class ResumableRows:
    """
    A JSONL file of rows with the settings that made them beside it, in `<stem>.settings.json`.

    Opening it reads the rows of an earlier run. A last line that was only half written is cut off.

    Args:
        path (`str`): The file; its folder is made if needed.
        settings (`dict`): All that the rows depend on, of types that JSON has.
        overwrite (`bool`): Start anew.

    Raises:
        ValueError: There are rows made by other settings, of which the message names the first that differs, or by unknown ones.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], overwrite: bool = False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self._settings_path = self.path.with_suffix(".settings.json")
        if overwrite:
            self.path.unlink(missing_ok=True)
        if not self.path.exists():
            self._settings_path.write_text(json.dumps(settings, indent=2) + "\n")
        else:
            check_has_settings(self.path)
            self._check(json.loads(self._settings_path.read_text()), settings)
            self._read()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows to the end of the file and close it."""
        rows = list(rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.rows += rows

    def cut(self, num_rows: int) -> None:
        """Keep the first rows only."""
        if num_rows < len(self.rows):
            self.rows = self.rows[:num_rows]
            kept = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
            unfinished = self.path.with_suffix(".tmp")
            unfinished.write_text(kept, encoding="utf-8")
            unfinished.replace(self.path)

    def _check(self, earlier: dict[str, Any], settings: Mapping[str, Any]) -> None:
        changed = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{name} is {settings.get(name)!r}, but '{self.path}' was made with {earlier.get(name)!r}. Give another "
                "output_dir, or start anew by overwrite: true."
            )

    def _read(self) -> None:
        size = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    if not line.endswith(b"\n"):
                        break
                    self.rows.append(json.loads(line))
                except ValueError:
                    break
                size += len(line)
        with self.path.open("r+b") as file:
            file.truncate(size)


def check_has_settings(path: Path) -> None:
    """Raise a ValueError unless the settings that made the rows of a file are beside it, and can be read."""
    settings_path = path.with_suffix(".settings.json")
    try:
        known = isinstance(json.loads(settings_path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"'{path}' exists, but no readable '{settings_path.name}', which tells what made it. Give another output_dir, or "
            "start anew by overwrite: true."
        )


def digest(value: Any) -> str:
    """Short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_version(name_or_path: str, revision: str | None = None) -> str | None:
    """
    A mark that tells apart two states of a model by one name: a hash of the names, sizes and times of a folder's weights and
    settings, or the commit on the Hub.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(
            file
            for file in folder.rglob("*")
            if file.suffix in (".safetensors", ".bin", ".gguf") or file.name in _MODEL_SETTINGS
        )
        # The checkpoints beside a run's last state do not count
        files = [file for file in files if not file.relative_to(folder).parts[0].startswith("checkpoint-")]
        return digest([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    from transformers.utils import cached_file

    for filename in ("config.json", "adapter_config.json", "implicit_prm.json"):
        # The file is downloaded if need be: without it, a first run and its continuation would not know the same
        found = cached_file(
            name_or_path,
            filename,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            return Path(found).parent.name
    return None
