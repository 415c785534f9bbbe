"""What the actions of `trio-worker jobs` have in common: a file of requests, and a connection."""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trio_worker.cli.exit_statuses import (
    ANSWERED_WITH_AN_ERROR,
    INTERRUPTED,
    status_without_reader,
)
from trio_worker.cli.interrupting import until_interrupted
from trio_worker.config import Config
from trio_worker.errors import ExitStatus
from trio_worker.gateway.batch_jobs import request_id_of
from trio_worker.gateway.batch_queue import Streams
from trio_worker.jetstream.api import JetStreamError
from trio_worker.jetstream.client import JetStream, open_jetstream
from trio_worker.launch_nats import login_of
from trio_worker.nats.broker import open_nats_broker
from trio_worker.wire.batch_file import BadLine, request_lines

_DIGITS = 24
"""Of the hash in a batch's id: 96 bits."""
FAULTS_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which server, and how it is reached."""

    config: Config
    url: str
    timeout_s: float
    inbox_prefix: str

    @property
    def streams(self) -> Streams:
        jetstream = self.config.nats.jetstream
        return Streams(jobs=jetstream.stream, results=jetstream.results)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[JetStream]:
        """JetStream there. Raises `trio.TooSlowError` if it takes longer than `timeout_s`."""
        with trio.fail_after(self.timeout_s) as connecting:
            async with (
                open_nats_broker(
                    self.url,
                    name="trio-worker jobs",
                    login=login_of(self.config.nats),
                    inbox_prefix=self.inbox_prefix,
                ) as broker,
                open_jetstream(broker) as jetstream,
            ):
                connecting.deadline = math.inf
                yield jetstream


def with_jetstream(
    args: argparse.Namespace,
    config: Config,
    url: str,
    action: Callable[[Place], Awaitable[int]],
) -> int:
    """The status of a command that does `action`, also if it fails or is interrupted."""
    place = Place(config=config, url=url, timeout_s=args.timeout, inbox_prefix=args.inbox_prefix)
    statuses: list[int] = []

    async def act() -> None:
        statuses.append(await action(place))

    try:
        if not trio.run(until_interrupted, act):
            sys.stderr.write("\nStopped. What is in the queue is done all the same.\n")
            return INTERRUPTED
    except JetStreamError as error:
        sys.stderr.write(f"{error}\n")
        return ExitStatus.UNAVAILABLE
    except trio.TooSlowError:
        sys.stderr.write(
            f"NATS could not be reached on {url} within {place.timeout_s:g} s. `just run` starts "
            "it, and a worker.\n"
        )
        return ExitStatus.UNAVAILABLE
    except BrokenPipeError:
        return status_without_reader()
    except OSError as exc:
        sys.stderr.write(f"{exc.filename or 'The output'} cannot be written: {exc.strerror}\n")
        return ANSWERED_WITH_AN_ERROR
    return statuses[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFile:
    """A file of requests."""

    path: Path
    text: bytes
    """All of it: a file is as large as its owner likes, and its jobs are held beside it."""
    batch_id: str
    model: str | None
    options: str
    """Of the command line, that make it this batch; with a blank before each."""

    def custom_ids(self) -> dict[str, str]:
        """What each line is called, by the id of its job. Lines that are wrong have none."""
        return {
            request_id_of(self.batch_id, number): line.custom_id
            for number, line in enumerate(request_lines(self.text), start=1)
            if not isinstance(line, BadLine)
        }


def read_job_file(path: Path, *, batch_id: str | None, model: str | None) -> JobFile:
    """Reads a file of requests. Raises `OSError`.

    Its batch is named after what is in it, and after the model that is asked instead of the file's,
    since other answers come then.
    """
    text = path.read_bytes()
    given = (("--batch", batch_id), ("--model", model))
    options = "".join(f" {name} {value}" for name, value in given if value is not None)
    if batch_id is None:
        digest = hashlib.sha256(text + b"\0" + (model or "").encode())
        batch_id = f"batch_{digest.hexdigest()[:_DIGITS]}"
    return JobFile(path=path, text=text, batch_id=batch_id, model=model, options=options)


def say_faults(file: JobFile, faults: Sequence[BadLine]) -> None:
    """Say what is wrong with a file of which nothing has been done."""
    for fault in faults[:FAULTS_SHOWN]:
        sys.stderr.write(f"{file.path}: {fault.message}\n")
    if len(faults) > FAULTS_SHOWN:
        sys.stderr.write(f"… and {len(faults) - FAULTS_SHOWN} lines more.\n")


def progress_bar() -> Progress:
    """On standard error, and only if that is a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
