"""Models that a command is given: what cannot be had, or says too little, is refused before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# A model, an adapter or a PRM has one of the first, a tokenizer one of the second
MODEL_FILES = ("config.json", "adapter_config.json", "implicit_prm.json", "prm/implicit_prm.json")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "config.json")


def check_model(
    option: str,
    name: str | None,
    revision: str | None = None,
    filenames: Sequence[str] = MODEL_FILES,
    needs_tokenizer: bool = True,
) -> None:
    """
    Refuse a model that is no folder with a model in it, and cannot be had from the Hub or from its cache.

    Args:
        option (`str`): The option that names it.
        name (`str`, *optional*): Folder or Hub id; an option that was not given is let through.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        filenames (`list[str]`): Files of which it has one.
        needs_tokenizer (`bool`): Whether its tokenizer is used. Of a folder without one transformers makes an empty one.

    Raises:
        ValueError: The message names the option, its value and the remedy.
    """
    if not name:
        return
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "~")) or folder.is_absolute():
            raise ValueError(f"{option} is {name!r}, but there is no such folder.")
        # Not at the top: a task without a model needs no client of the Hub
        from ..hub import check_reachable

        check_reachable(option, name, filenames, revision=revision)
    elif not any((folder / filename).is_file() for filename in filenames):
        from ..reports.run_files import checkpoints

        saved = checkpoints(folder)
        hint = f" Its last checkpoint is '{saved[0]}'." if saved else ""
        raise ValueError(
            f"{option} is {name!r}, a folder without {' or '.join(filenames)}: no model was saved there.{hint} Give the "
            "folder of a model, or the output_dir of a finished run."
        )
    else:
        _check_weights(option, folder)
        names = [path.name for path in folder.iterdir()]
        if needs_tokenizer and "config.json" in names and not re.search("token|vocab|spiece|tekken", " ".join(names)):
            raise ValueError(
                f"{option} is {name!r}, a folder without a tokenizer. Save the model's tokenizer there too: "
                f"`tokenizer.save_pretrained({name!r})`."
            )


def _check_weights(option: str, folder: Path) -> None:
    """Refuse weights that cannot be read. Only their headers are."""
    from safetensors import SafetensorError, safe_open

    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("prm/*.safetensors")]):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{option} is '{folder}', but its weights in '{path.name}' cannot be read ({error}). The file was cut off, or is a "
                "pointer of Git LFS in place of the weights: download it again (`git lfs pull`, `hf download`)."
            ) from error


def check_prm(
    option: str, name: str, revision: str | None = None, *, reference_option: str, reference: str | None = None
) -> None:
    """
    Refuse a PRM that cannot be had, or whose reference model is not known or cannot be had.

    Args:
        option, name, revision: As in [`check_model`].
        reference_option (`str`): The option that names the reference.
        reference (`str`, *optional*): Its value; not given, the PRM has to know its reference.

    Raises:
        ValueError: The message names the option, its value and the remedy.
    """
    from ..implicit_prm.files import saved_settings

    check_model(option, name, revision)
    check_model(reference_option, reference, needs_tokenizer=False)
    if reference is None:
        saved = saved_settings(name, revision=revision)
        known = saved.get("reference")
        if known is None:
            raise ValueError(
                f"{option} is {name!r}, which does not name its reference model. Give {reference_option}, the model that the PRM "
                "started from."
            )
        if known != "reference":
            try:
                check_model("its reference", known, saved.get("reference_revision"), needs_tokenizer=False)
            except ValueError as error:
                raise ValueError(f"{option} is {name!r}, but {error} Or give {reference_option}.") from error
