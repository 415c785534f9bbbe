"""Exception groups: letting out the one exception that a group is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sole_exceptions() -> Iterator[None]:
    """Let an exception that leaves the block inside groups of one leave it bare.

    For context managers that hold a nursery their users know nothing of. A group of several
    passes as it is.
    """
    sole: BaseException | None = None
    try:
        yield
    except BaseExceptionGroup as group:
        sole = group
        while isinstance(sole, BaseExceptionGroup) and len(sole.exceptions) == 1:
            sole = sole.exceptions[0]
    if sole is not None:
        context = sole.__context__
        try:
            raise sole
        finally:
            # Raising it here made the group its context: true, and of no use to a reader.
            sole.__context__ = context
            del sole, context
