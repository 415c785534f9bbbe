"""How a command ends: what its exceptions say on standard error, and which status they become."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from loguru import logger

from trio_worker.errors import ConfigError, ExitStatus, StopWorker

ANSWERED_WITH_AN_ERROR = 1
"""Of `ask`."""
NOBODY_THERE = ExitStatus.UNAVAILABLE
"""Of `fleet`, when it has listened for a beat's time and no worker was heard."""
INTERRUPTED = 128 + signal.SIGINT
"""As a shell reports it; the next one, too."""
READER_LEFT = 128 + signal.SIGPIPE
"""Standard output was closed by what reads it, as `head` does."""


def exit_status_of(command: Callable[[], int]) -> int:
    """Run the command; returns its status, or that of the exception which ended it.

    Reasons to stop are written to standard error, faults of ours to the log. What is raised
    outside of any nursery, and is no reason to stop, passes.
    """
    try:
        return command()
    except StopWorker as reason:
        _say_why(reason)
        return reason.status
    except BaseExceptionGroup as group:
        return _status_of_group(group)
    except KeyboardInterrupt:
        return INTERRUPTED


def status_without_reader() -> int:
    """The status after a `BrokenPipeError` of standard output; what is in its buffer is dropped."""
    # Otherwise the interpreter would try to write it at its end, and complain.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return READER_LEFT


def _status_of_group(group: BaseExceptionGroup[BaseException]) -> int:
    """The highest status of the reasons to stop; with anything else, that of a fault of ours."""
    reasons, rest = group.split(StopWorker)
    if rest is not None:
        logger.opt(exception=rest).critical("The worker ended by a fault of its own")
        return ExitStatus.SOFTWARE
    assert reasons is not None
    statuses: list[int] = []
    for reason in _leaves(reasons):
        assert isinstance(reason, StopWorker)
        _say_why(reason)
        statuses.append(reason.status)
    return max(statuses)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for each in group.exceptions
        for leaf in (_leaves(each) if isinstance(each, BaseExceptionGroup) else [each])
    ]


def _say_why(reason: StopWorker) -> None:
    lead = "Configuration error: " if isinstance(reason, ConfigError) else ""
    for line in str(reason).splitlines():
        sys.stderr.write(f"{lead}{line}\n")
