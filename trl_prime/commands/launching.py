"""Commands that train, on several processes: the same command line with flags of `accelerate launch` beside its own.

As `trl` does it: what is no field of the command is handed to accelerate's launcher, which starts the command again in each
process. `--accelerate_config` is a file or the name of one in `trl_prime/accelerate_configs/`. All of it can stand in the
YAML file too. Fields of the command win over flags of the launcher that have the same name.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..specs import nearest
from .arguments import ArgumentReader, parse_arguments, show_help

CONFIGS = Path(__file__).parent.parent / "accelerate_configs"
EPILOG = (
    "On several processes: --accelerate_config "
    f"{'|'.join(sorted(path.stem for path in CONFIGS.glob('*.yaml')))}|FILE.yaml --num_processes N,\n"
    "and every other flag of `accelerate launch`."
)
# It is set in the launched processes, which find the launcher's fields in the same YAML file and must not launch again
_LAUNCHED = "TRL_PRIME_LAUNCHED"


def launch_if_asked(dataclass_types: Sequence[type], argv: Sequence[str], prog: str) -> int | None:
    """
    Start the command on several processes, if its file or flags ask for it, and wait for them.

    Args:
        dataclass_types (`list[type]`): Dataclasses with the fields that the command takes.
        argv (`list[str]`): The words after the command's name.
        prog (`str`): `trl-prime` and the command's name.

    Returns:
        `int`, *optional*: the exit code of the process that failed first, 0 if none did, or None if the command is to run
        in this process.

    Raises:
        ValueError: See [`parse_arguments`]; or a flag of the launcher is wrong.
    """
    show_help(dataclass_types, argv, prog, EPILOG)
    if _was_launched():
        return None
    reader = ArgumentReader(dataclass_types, prog=prog, allow_abbrev=False, add_help=False)
    flags, others = reader.read_file(argv)
    words = reader.parse_known_args(flags)[1]
    if not others and not words:
        return None
    launcher = _launcher()
    launch_words = [*_flags_of(others, launcher, reader), *words]
    names = {option.split("=")[0].removeprefix("--").replace("-", "_") for option in launcher._option_string_actions}
    for word in launch_words:
        if word.startswith("--") and word.split("=")[0] not in launcher._option_string_actions:
            raise ValueError(reader.unknown(word, sorted(names)))
    command = ["-m", "trl_prime.cli", prog.split()[-1], *_without(argv, words)]
    args = launcher.parse_args([*launch_words, *command])
    if args.training_script != "trl_prime.cli":
        raise ValueError(reader.unknown(args.training_script))
    args.config_file = str(_config_path(args.config_file or "ddp"))
    return _launch(args)


def parse_launched_arguments(dataclass_types: Sequence[type], argv: Sequence[str], prog: str) -> tuple[Any, ...]:
    """[`parse_arguments`] in the process that runs the command. Fields of the launcher in the file have had their effect."""
    ignore = {action.dest for action in _launcher()._actions} | {"accelerate_config"}
    return parse_arguments(dataclass_types, argv, prog, ignore=ignore, epilog=EPILOG)


def check_launch(world_size: int, bf16: bool) -> None:
    """
    Refuse a launch that does not do what the recipe says.

    Args:
        world_size (`int`): Processes that train together.
        bf16 (`bool`): Whether the recipe wants mixed precision.

    Raises:
        ValueError: More processes were started, which would train the same model several times over; or the launcher would
            turn on a mixed precision that the recipe turns off.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != world_size:
        raise ValueError(
            f"{started} processes were started, but this one trains in a group of {world_size}: they would each train a model of "
            "their own and save it over the others'. Without GPUs, set use_cpu: true."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and not bf16:
        raise ValueError(
            f"bf16 is false, but the launcher says mixed_precision: {precision}, which the trainer would follow. Give "
            "--mixed_precision no, or set bf16: true."
        )


def check_report_to(report_to: list[str]) -> None:
    """
    Refuse trackers that are not installed before a model is loaded.

    Args:
        report_to (`list[str]`): Names of trackers, as `TrainingArguments` has them.

    Raises:
        ValueError: One is not installed, or unknown.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    installed = get_available_reporting_integrations()
    for name in report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to has {name!r}, which is unknown. {nearest(name, INTEGRATION_TO_CALLBACK)}")
        if name not in installed:
            raise ValueError(f"report_to has {name!r}, which is not installed. Install it, or set report_to: none.")


def _was_launched() -> bool:
    # The second is set by torchrun and by accelerate, where a user has called them
    return _LAUNCHED in os.environ or "LOCAL_RANK" in os.environ


def _launcher() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    # The launcher's own name for it, `--config_file`, is taken too
    parser.add_argument("--accelerate_config", "--accelerate-config", dest="config_file")

    def refuse(message: str) -> None:
        raise ValueError(f"accelerate's launcher: {message}.")

    parser.error = refuse
    return parser


def _flags_of(settings: dict[str, Any], launcher: argparse.ArgumentParser, reader: ArgumentReader) -> list[str]:
    """The settings of the YAML file for the launcher, as flags."""
    words = []
    for name, value in settings.items():
        action = launcher._option_string_actions.get(f"--{name}")
        if action is None:
            raise ValueError(reader.unknown(name, sorted(action.dest for action in launcher._actions)))
        if action.nargs != 0:
            words += [f"--{name}", str(value)]
        elif value:
            words.append(f"--{name}")
    return words


def _without(words: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """The words without a subsequence of them."""
    kept, rest = [], list(left_out)
    for word in words:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            kept.append(word)
    return kept


def _config_path(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if not (CONFIGS / f"{name}.yaml").is_file():
        names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
        raise ValueError(f"accelerate_config is {name!r}, which is no file. {nearest(name, names)}")
    return CONFIGS / f"{name}.yaml"


def _launch(args: argparse.Namespace) -> int:
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(args)
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode)
    except SignalException as error:
        return 128 + error.sigval
    finally:
        del os.environ[_LAUNCHED]
    return 0


def _exit_code(code: int) -> int:
    # A process that was killed by a signal has its negative number
    return code if code >= 0 else 128 - code
