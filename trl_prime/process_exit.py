"""The end of a process that has exchanged tensors with others."""

from __future__ import annotations

import atexit
import time

import torch

# Threads that wait for the interpreter's lock need microseconds of it, and on a busy machine some time until they run
_PAUSE_SECONDS = 0.2


def let_threads_finish() -> None:
    """
    Give the threads of the process group the interpreter's lock once, where there is a group.

    A worker thread of gloo releases the tensors of a collective after the main thread has gone on, and needs the lock for it.
    Python below 3.14 ends a thread that asks for the lock while the interpreter ends, and C++ then aborts the whole process
    ("terminate called without an active exception"), although its work is done. Destroying the group does not help: as long
    as a DDP model holds it, its threads live on. A pause takes no other process into account, so that none can hang.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(_PAUSE_SECONDS)


def let_threads_finish_at_exit() -> None:
    """Have [`let_threads_finish`] called once at the end of the interpreter, however often this is called."""
    atexit.unregister(let_threads_finish)
    atexit.register(let_threads_finish)
