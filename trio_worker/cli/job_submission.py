"""`trio-worker jobs submit`: the requests of a file go into the queue."""

from __future__ import annotations

import sys
import time

from rich.progress import Progress

from trio_worker.cli.exit_statuses import ANSWERED_WITH_AN_ERROR
from trio_worker.cli.job_files import JobFile, Place, progress_bar, say_faults
from trio_worker.errors import ExitStatus
from trio_worker.gateway.batch_jobs import Job, Terms, jobs_of
from trio_worker.gateway.batch_queue import Submission, submit
from trio_worker.gateway.directory import Directory
from trio_worker.gateway.fields import Rules
from trio_worker.gateway.keys import Key
from trio_worker.gateway.shapes import UnknownFields
from trio_worker.wire.batch_file import BadLine


async def submit_file(place: Place, file: JobFile, *, priority: str, caller: str | None) -> int:
    """Put what is missing of a file into the queue; returns the status of the command.

    Nothing is put there if a line of it is wrong. Raises `JetStreamError`. Cancelled: what is in
    the queue stays there.
    """
    async with place.open() as jetstream:
        directory = Directory(time.time)
        await directory.ask_once(jetstream.broker)
        gateway = place.config.gateway
        terms = Terms(
            key=Key(caller=caller),
            rules=Rules(
                body_limit_bytes=gateway.max_body_bytes,
                timeout_ms=gateway.timeout_ms,
                unknown_fields=UnknownFields(gateway.unknown_fields),
            ),
            priority=priority,
            limits_of=directory.limits_of,
            message_bytes=jetstream.broker.max_payload,
            model=file.model,
        )
        jobs: list[Job] = []
        faults: list[BadLine] = []
        for each in jobs_of(file.text, terms, batch_id=file.batch_id):
            if isinstance(each, BadLine):
                faults.append(each)
            else:
                jobs.append(each)
        if faults:
            say_faults(file, faults)
            sys.stderr.write("Nothing was submitted.\n")
            return ANSWERED_WITH_AN_ERROR
        if not jobs:
            sys.stderr.write(f"{file.path}: there is no request in it.\n")
            return ANSWERED_WITH_AN_ERROR
        if not directory.offers:
            sys.stderr.write(
                "No worker is there at the moment: the jobs wait until one that serves their "
                "model takes jobs.\n"
            )
        with progress_bar() as bar:
            show = _Shown(bar, total=len(jobs))
            submission = await submit(jetstream, place.streams, jobs, on_progress=show)
    there = f" ({submission.were_there} were there already)" if submission.were_there else ""
    sys.stderr.write(
        f"{submission.done} jobs of batch {file.batch_id} are in the queue or answered{there}.\n"
        f"Their answers: trio-worker jobs results {file.path}{file.options} -o answers.jsonl\n"
    )
    return ExitStatus.OK


class _Shown:
    """The bar of a submission. Its state: whether it was said that the queue is full."""

    def __init__(self, bar: Progress, *, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("submitted", total=total)
        self._was_held_up = False

    def __call__(self, submission: Submission) -> None:
        self._bar.update(self._task, completed=submission.done)
        if submission.is_held_up and not self._was_held_up:
            self._was_held_up = True
            self._bar.console.print("The queue is full; waiting for room in it.")
