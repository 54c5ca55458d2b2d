"""Removal of what hostile programs leave on disk: on the standard library alone, for inside and outside the sandbox."""

import contextlib
import os

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str) -> None:
    """
    Remove a folder with all that is in it, however deep it is nested, following no link.

    What cannot be removed stays. Folders within folders are moved up before they are removed, so that neither the stack nor
    the descriptors run out.
    """
    with contextlib.suppress(OSError):
        top = os.open(path, OPEN_FOLDER)
        try:
            moved, prefix = 0, f".{os.urandom(8).hex()}."  # no program can have taken such a name
            while _names(top):
                before = moved
                for name in _names(top):
                    moved += _remove(top, name, prefix, moved)
                if moved == before and _names(top):
                    return  # the rest belongs to somebody else
        finally:
            os.close(top)
        os.rmdir(path)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _remove(top: int, name: str, prefix: str, number: int) -> int:
    """Remove an entry of the folder `top`, moving the folders in it to `top`; returns how many moves there were."""
    moves = 0
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=top)
        return moves
    with contextlib.suppress(OSError):
        fd = os.open(name, OPEN_FOLDER, dir_fd=top)
        try:
            for inner in _names(fd):
                try:
                    os.unlink(inner, dir_fd=fd)
                except OSError:
                    os.rename(inner, f"{prefix}{number + moves}", src_dir_fd=fd, dst_dir_fd=top)
                    moves += 1
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=top)
    return moves
