"""Folders on disk of local sandboxes, and the sweeping of those that a killed process has left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from .inside.scratch import OPEN_FOLDER, remove_tree

_PREFIX = "trl-prime-sandbox-"


class ScratchFolder:
    """
    A folder in the machine's folder for temporary files. Its owner holds a lock on it, which ends with the last process
    that has it open; a new one first removes those of this user that nobody holds.

    Attributes:
        path (`str`): The folder.
    """

    def __init__(self):
        sweep()
        while True:
            self.path = tempfile.mkdtemp(prefix=_PREFIX)
            try:
                self._fd = os.open(self.path, OPEN_FOLDER)
            except FileNotFoundError:
                continue  # another process has swept it before it was locked
            with contextlib.suppress(BlockingIOError):
                _lock(self._fd)
                if os.path.exists(self.path):
                    return
            os.close(self._fd)

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        remove_tree(self.path)
        self.release()

    def release(self) -> None:
        """Hold the folder no longer."""
        os.close(self._fd)


def sweep() -> None:
    """Remove the folders of this user whose owner has ended."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is held, has gone, or belongs to somebody else
            fd = os.open(path, OPEN_FOLDER)
            try:
                if os.fstat(fd).st_uid == os.getuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(str(path))
            finally:
                os.close(fd)


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # the file system knows no locks, so no folder on it is ever swept
