"""`trl-prime COMMAND`: the console script. A command is a module of `trl_prime.commands` and is imported when it is called."""

from __future__ import annotations

import importlib
import sys
import warnings

from .specs import nearest
from .version import __version__

# Each command has a module and a summary
COMMANDS = {
    "train": ("train", "Train a policy and its implicit PRM by a recipe."),
    "prm": ("prm", "Train an implicit PRM offline, on labelled completions or preference pairs."),
    "eval": ("evaluate", "Measure a policy and its PRM on benchmarks."),
    "score": ("score", "Show what an implicit PRM thinks of completions, token by token."),
    "report": ("report", "Write a page about a run, or about several to compare."),
    "data": ("data", "show, check or convert: a data set as the trainer reads it."),
    "env": ("env", "Versions, devices and sandbox of this machine, for bug reports."),
}
HELP = "`trl-prime COMMAND --help` lists the fields of a command, `trl-prime --version` tells the version."
EXIT_CODES = """
exit codes:
  0   all went well
  1   it failed on the way
  2   the command line, the recipe or the data are wrong, or something is not installed: nothing was started
  130 it was interrupted
"""


def usage() -> str:
    lines = ["usage: trl-prime COMMAND [--config FILE.yaml|RECIPE] [--FIELD VALUE ...]", ""]
    lines += [f"  {name:<8}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", HELP, EXIT_CODES.rstrip()])


def main(argv: list[str] | None = None) -> int:
    """
    Entry point of `trl-prime`.

    Args:
        argv (`list[str]`, *optional*): The words of the command line; those of the process if not given.

    Returns:
        `int`: the exit code. Errors that were foreseen are a sentence on stderr.

    Raises:
        Exception: An error that was not foreseen keeps its traceback, and the process ends with exit code 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"trl-prime {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"trl-prime: {argv[0]!r} is no command. {nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    # Hide deprecation warnings of dependencies: a recipe cannot mend them
    warnings.filterwarnings("ignore", category=FutureWarning)
    job = None
    try:
        job = importlib.import_module(f".commands.{COMMANDS[argv[0]][0]}", __package__).prepare(argv[1:])
        exit_code = job()
        _leave_process_group()
        return exit_code
    except KeyboardInterrupt:
        print("trl-prime: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        exit_code = _exit_code(error, is_prepared=job is not None)
        if exit_code is None:
            raise
        print(f"trl-prime: {_sentence(error)}", file=sys.stderr)
        return exit_code


def _leave_process_group() -> None:
    """
    Destroy the process group, as PyTorch asks for, after its threads have finished, see `process_exit.py`.

    An engine of vLLM in this process destroys its groups and this one at the end of the interpreter, and raises where they are gone.
    """
    vllm_groups = sys.modules.get("vllm.distributed.parallel_state")
    if vllm_groups is not None and vllm_groups.model_parallel_is_initialized():
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        from .process_exit import let_threads_finish

        let_threads_finish()
        torch.distributed.destroy_process_group()


def _exit_code(error: Exception, is_prepared: bool) -> int | None:
    """The exit code of an error whose message says it all; None for one that needs its traceback."""
    from huggingface_hub.errors import HfHubHTTPError

    from .sandbox.limits import SandboxUnavailable

    # An ImportError of the import system has a name; one with a sentence about what to install has none
    is_not_installed = isinstance(error, ImportError) and error.name is None
    is_refusal = is_not_installed or isinstance(error, (ValueError, NotImplementedError, SandboxUnavailable))
    if is_refusal and not is_prepared:
        return 2
    foreseen = (HfHubHTTPError, FloatingPointError, OSError, SandboxUnavailable)
    return 1 if isinstance(error, foreseen) or _is_out_of_memory(error) else None


def _sentence(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return f"the Hub refused: {error}"
    if _is_out_of_memory(error):
        return (
            f"out of memory: {error}\nLower per_device_train_batch_size (and raise gradient_accumulation_steps), "
            "prm_micro_batch_size, max_completion_length or vllm_gpu_memory_utilization, or spread the models by "
            "--accelerate_config zero3."
        )
    return str(error) or type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    # Code that raises it has imported torch
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


if __name__ == "__main__":
    raise SystemExit(main())
