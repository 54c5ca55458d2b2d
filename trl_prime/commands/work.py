"""Where a command stops preparing and starts to work: errors from there on are no fault of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def work() -> Iterator[None]:
    """
    Marks what is raised inside as having happened on the way: exit code 1, also of a `ValueError`.

    Before it, a command only reads its arguments and data and builds what it needs; a `ValueError` there means that they are
    wrong, exit code 2.
    """
    try:
        yield
    except Exception as error:
        error.on_the_way = True
        raise


def is_on_the_way(error: BaseException) -> bool:
    """Whether an error was raised inside [`work`]."""
    return getattr(error, "on_the_way", False)
