"""Saved PRMs and checkpoints of runs: where the files are, what is in them, and which are whole.

Covered: finding a PRM in a folder or on the Hub, its weights, card and text format; checkpoints of both trainers, and the
state of a learning PRM or value model in them. Not covered: building a PRM (`model.py`, `build.py`), what is pushed (`hub.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import is_offline_mode, snapshot_download
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file, logging

from ..hub import prm_card
from ..texts import TextFormat
from .loading import load_model

if TYPE_CHECKING:
    from accelerate import Accelerator
    from huggingface_hub import ModelCard

    from ..prime_config import PRIMEConfig
    from .backends import DataParallel
    from .model import ImplicitPRM

logger = logging.get_logger(__name__)

# In the folder of a PRM: its settings
CONFIG_NAME = "implicit_prm.json"

# --- Finding a PRM ---


def is_saved_prm(start: Any) -> bool:
    """Whether this is a folder that a PRM was saved in."""
    return isinstance(start, str) and os.path.isfile(os.path.join(start, CONFIG_NAME))


def downloaded_prm(path_or_repo: str) -> str | None:
    """The folder of a PRM that was saved or pushed, downloaded if it is on the Hub; `None` if this is any other model."""
    try:
        return str(local_folder(path_or_repo)[0]) if _has(path_or_repo, CONFIG_NAME) else None
    except OSError:
        return None  # who loads it as a model says why that fails


def is_adapter(path_or_repo: str) -> bool:
    """Whether this is an adapter without its base model."""
    try:
        return _has(path_or_repo, "adapter_config.json") and not _has(path_or_repo, "config.json")
    except OSError:
        return False  # who loads it as a model says why that fails


def _has(path_or_repo: str | os.PathLike, filename: str, **hub: Any) -> bool:
    found = cached_file(
        path_or_repo,
        filename,
        _raise_exceptions_for_missing_entries=False,
        # Without a network a file that was not downloaded before cannot be told from one that does not exist
        _raise_exceptions_for_connection_errors=not is_offline_mode(),
        **hub,
    )
    return found is not None


def local_folder(
    path_or_repo: str | os.PathLike, subfolder: str | None = None, with_reference: bool = True, **hub: Any
) -> tuple[Path, dict[str, Any]]:
    """The folder that holds the PRM itself, downloaded if it is on the Hub, and its settings, empty if it has none."""
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    if _has(path_or_repo, f"{prefix}prm/{CONFIG_NAME}", **hub):
        prefix += "prm/"
    root = Path(path_or_repo)
    if not root.is_dir():
        # The repo of a run holds the policy beside the PRM, and checkpoints of both
        ignored = [] if prefix else ["last-checkpoint/*", "checkpoint-*"]
        ignored += [] if with_reference else [f"{prefix}reference/*"]
        root = Path(
            snapshot_download(str(path_or_repo), allow_patterns=[f"{prefix}*"], ignore_patterns=ignored, **hub)
        )
    settings = root / prefix / CONFIG_NAME
    return settings.parent, json.loads(settings.read_text()) if settings.is_file() else {}


# --- Reading a PRM ---


def saved_weights(model: PreTrainedModel | PeftModel, folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Weights that [`ImplicitPRM.save_pretrained`] wrote, by their names in `model`: all of them, or the adapter's.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The PRM that is to have them.
        folder (`str`): Where they are saved.

    Returns:
        `dict[str, torch.Tensor]`: on the CPU.
    """
    if not isinstance(model, PeftModel):
        return load_model(folder, type(model).__name__.removeprefix("FSDP"), dtype=model.dtype).state_dict()
    # In files the adapter has no name, and each kind of adapter has rules of its own. PEFT applies them and hands the result to
    # the model, which need not be able to load it yet: FSDP2 shards it.
    received: dict[str, torch.Tensor] = {}

    model.load_state_dict = lambda state, **kwargs: received.update(state)
    try:
        saved = load_peft_weights(os.path.join(folder, "adapter"), device="cpu")
        set_peft_model_state_dict(model, saved, adapter_name=model.active_adapter)
    finally:
        del model.load_state_dict
    return received


def saved_prm_card(folder: str | os.PathLike, repo_id: str, **kwargs: Any) -> ModelCard:
    """
    The card of a saved PRM, see [`~trl_prime.hub.prm_card`].

    Args:
        folder (`str`): Where it is saved.
        repo_id (`str`): The repo that it is going to.
        **kwargs: `trained`, `settings`, `datasets`, `revision`.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    saved = json.loads((Path(folder) / CONFIG_NAME).read_text())
    return prm_card(
        repo_id,
        beta=saved["beta"],
        is_adapter=saved["adapter"],
        reference=saved["reference"],
        reference_revision=saved["reference_revision"],
        messages=saved["text_format"]["messages"],
        **kwargs,
    )


def saved_settings(path_or_repo: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """
    The settings of a saved PRM, or of the PRM of a run, whose `prm/` holds it.

    Args:
        path_or_repo (`str`): Folder or Hub id.
        **hub: `revision`, `token`, `cache_dir`.

    Returns:
        `dict`: Content of `implicit_prm.json`; empty if there is no PRM.
    """
    try:
        names = [name for name in (f"prm/{CONFIG_NAME}", CONFIG_NAME) if _has(path_or_repo, name, **hub)]
    except OSError:
        return {}  # who loads it as a model says why that fails
    return json.loads(Path(cached_file(path_or_repo, names[0], **hub)).read_text()) if names else {}


def saved_text_format(path_or_repo: str | os.PathLike, **hub: Any) -> TextFormat | None:
    """How text is written for a saved PRM or the policy of its run, see [`saved_settings`]; `None` if that is not known."""
    saved = saved_settings(path_or_repo, **hub).get("text_format")
    return None if saved is None else TextFormat(**saved)


# --- Adapters ---


def name_base(model: torch.nn.Module, to_hub: bool) -> None:
    """
    Name the base model in the settings that an adapter is saved with.

    A base that was loaded from a local folder is named by its absolute path, so that the adapter finds it from any folder. What
    goes to the Hub has the path as it was given: where it lies on this machine is nobody's business there.

    Args:
        model (`nn.Module`): A model; only the adapters of a [`~peft.PeftModel`] name a base.
        to_hub (`bool`): Whether the files are pushed.
    """
    if not isinstance(model, PeftModel):
        return
    name = model.get_base_model().name_or_path
    if os.path.isdir(name):
        for config in model.peft_config.values():
            config.base_model_name_or_path = name if to_hub else os.path.abspath(name)


# --- Checkpoints ---


def whole_checkpoint(checkpoint: str | bool, output_dir: str) -> str:
    """
    The checkpoint to resume from: the given one, or with True the last in `output_dir` that was saved to its end.

    Args:
        checkpoint (`str` or `bool`): As the trainer was given it.
        output_dir (`str`): Folder of the run.

    Returns:
        `str`: Its folder.

    Raises:
        ValueError: There is none, or the given one was not saved to its end.
    """

    def is_whole(folder: str) -> bool:
        try:
            TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
        except (OSError, ValueError, TypeError):
            return False
        return True

    if checkpoint is not True:
        if not is_whole(checkpoint):
            raise ValueError(
                f"resume_from_checkpoint is '{checkpoint}', which has no readable {TRAINER_STATE_NAME}: it is no checkpoint, "
                "or the run was stopped while it was saved. Resume from an earlier one, or set it to True to take the last "
                "whole one."
            )
        return checkpoint
    found = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()
    ]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if is_whole(str(path)):
            return str(path)
        logger.warning(f"'{path}' was not saved to its end; resuming from the one before.")
    raise ValueError(
        f"resume_from_checkpoint is True, but there is no whole checkpoint in output_dir='{output_dir}'. Leave it out to start "
        "from the beginning."
    )


def save_prm(prm: ImplicitPRM, backend: DataParallel, folder: str, should_save: bool) -> None:
    """
    Save a PRM whose weights may be spread over processes. All of them call this.

    Args:
        prm ([`ImplicitPRM`]): The PRM.
        backend ([`~trl_prime.implicit_prm.backends.DataParallel`]): Collects its weights.
        folder (`str`): Where to.
        should_save (`bool`): Whether this process writes.
    """
    weights, reference_weights = backend.full_weights(prm.model), None
    if prm.reference_is_saved_in(folder):
        reference_weights = backend.full_weights(prm.reference)
    if should_save:
        prm.save_pretrained(folder, weights, reference_weights)


def trained_weights(backend: DataParallel) -> dict[str, torch.Tensor]:
    """The weights that are trained of a model that may be spread over processes, on the CPU; all processes call this."""
    model = backend.second.model
    weights = backend.full_weights(model)
    weights = model.state_dict() if weights is None else weights
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: weight.cpu() for name, weight in weights.items() if name in names}


def _state_path(checkpoint: str, name: str, accelerator: Accelerator) -> str:
    return os.path.join(checkpoint, f"{name}_state_{accelerator.process_index}.pt")


def _optimizer_path(checkpoint: str, name: str) -> str:
    return os.path.join(checkpoint, f"{name}_optimizer.pt")


def save_learner_state(
    checkpoint: str, name: str, state: dict[str, Any], backend: DataParallel, should_save: bool
) -> None:
    """
    Save what a learning model needs beside its weights, of each process in a file of its own.

    Args:
        checkpoint (`str`): Folder of the checkpoint, made if needed.
        name (`str`): Of the model, `"prm"` or `"value"`.
        state (`dict`): State of the learner; `state["updater"]` is that of its updater, or `None`. An optimizer that is the same on
            all processes has a file by itself, because it is twice the size of the trained weights.
        backend ([`~trl_prime.implicit_prm.backends.DataParallel`]): Of the model.
        should_save (`bool`): Whether this process writes that file.
    """
    os.makedirs(checkpoint, exist_ok=True)
    if state["updater"] is not None and not backend.optimizer_is_sharded:
        optimizer = state["updater"].pop("optimizer")
        if should_save:
            torch.save(optimizer, _optimizer_path(checkpoint, name))
    state = {"num_processes": backend.accelerator.num_processes, **state}
    torch.save(state, _state_path(checkpoint, name, backend.accelerator))


def load_learner_state(checkpoint: str, name: str, backend: DataParallel, with_optimizer: bool) -> dict[str, Any]:
    """
    Load the state that [`save_learner_state`] saved of this process, on the CPU.

    Args:
        checkpoint (`str`): Its folder.
        name (`str`): Of the model.
        backend ([`~trl_prime.implicit_prm.backends.DataParallel`]): Of the model.
        with_optimizer (`bool`): Whether the model goes on learning.

    Returns:
        `dict`: As it was given to be saved.

    Raises:
        FileNotFoundError: A file is missing.
    """
    state = torch.load(_state_path(checkpoint, name, backend.accelerator), map_location="cpu", weights_only=True)
    # What lies in the file by itself otherwise is an earlier run's
    if with_optimizer and not backend.optimizer_is_sharded:
        path = _optimizer_path(checkpoint, name)
        state["updater"]["optimizer"] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def check_states(checkpoint: str, accelerator: Accelerator, args: PRIMEConfig) -> None:
    """
    Refuse a checkpoint that a run cannot go on from.

    Args:
        checkpoint (`str`): Its folder.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        args ([`PRIMEConfig`]): The run's configuration.

    Raises:
        ValueError: Another number of processes saved it, it has no optimizer for a PRM that is going to learn, or no value model for
            a run with one.
        FileNotFoundError: It lacks this process's state.
    """
    prm_update, path = args.prm_update, _state_path(checkpoint, "prm", accelerator)
    found = [path] if os.path.isfile(path) else sorted(map(str, Path(checkpoint).glob("prm_state_*.pt")))
    if found:
        state = torch.load(found[0], map_location="cpu", weights_only=True, mmap=True)
        before, now = state["num_processes"], accelerator.num_processes
        if before != now:
            raise ValueError(
                f"resume_from_checkpoint is '{checkpoint}', which {before} processes saved, but this run has {now}: each has "
                f"its own part of the replayed batches and random numbers. Resume with --num_processes {before}, or start a "
                "new run with model= and prm_model= set to its weights."
            )
        if state["updater"] is None and prm_update != "none":
            raise ValueError(
                f"resume_from_checkpoint is '{checkpoint}', which a run with prm_update='none' saved, but prm_update is "
                f"{prm_update!r}: there is no optimizer of the PRM to go on with. Start a new run with model= and "
                "prm_model= set to its weights."
            )
    if path not in found:
        raise FileNotFoundError(
            f"'{checkpoint}' has no {os.path.basename(path)}: it was not saved by PRIMETrainer, or with save_only_model=True, "
            "and the PRM could not go on where it stopped. Resume from another checkpoint, or start a new run with model= and "
            "prm_model= set to its weights."
        )
    if args.needs_value_model and not os.path.isfile(_state_path(checkpoint, "value", accelerator)):
        raise ValueError(
            f"resume_from_checkpoint is '{checkpoint}', which a run without a value model saved, but advantage_estimator is "
            f"{args.advantage_estimator!r}. Resume with the estimator of that run, or start a new run with model= and prm_model= "
            "set to its weights."
        )


def check_loaded_policy(policy: torch.nn.Module, load_result: Any) -> None:
    """
    Refuse weights of a checkpoint that the policy has no place for, or lacks: it would keep those that it started with.

    Args:
        policy (`nn.Module`): The policy.
        load_result: What `load_state_dict` returned, with `missing_keys` and `unexpected_keys`.

    Raises:
        ValueError: Names in the file are others than the model's.
    """
    weights = policy.state_dict(keep_vars=True)
    missing = set(load_result.missing_keys) - set(policy._keys_to_ignore_on_save or ())
    # Tied weights are saved under one of their names
    loaded = {id(weight) for name, weight in weights.items() if name not in missing}
    missing = sorted(name for name in missing if name in weights and id(weights[name]) not in loaded)
    if missing or load_result.unexpected_keys:
        raise ValueError(
            f"The checkpoint does not fit the policy: {missing[:3]} are not in it, and {load_result.unexpected_keys[:3]} of it "
            "are not in the model. If the model's class saves its weights under other names (mixtures of experts, Gemma 3), a "
            "run cannot be resumed: start a new one with model= and prm_model= set to the checkpoint's weights, and leave "
            "load_best_model_at_end out."
        )
