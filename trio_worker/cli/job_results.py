"""`trio-worker jobs results`: the answers to a file as they come, or the one to a single job."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trio_worker.cli.exit_statuses import ANSWERED_WITH_AN_ERROR
from trio_worker.cli.job_files import JobFile, Place, progress_bar
from trio_worker.cli.show_answer import show_stored
from trio_worker.errors import ExitStatus
from trio_worker.gateway.batch_jobs import line_of_answer
from trio_worker.gateway.batch_queue import (
    Collector,
    answers_to,
    open_collector,
    slices,
    waiting_jobs,
)
from trio_worker.jetstream.api import Stored
from trio_worker.jetstream.client import JetStream
from trio_worker.wire import subjects
from trio_worker.wire.batch_file import answered_id


@dataclass(slots=True)
class Output:
    """Where lines of answers go."""

    answers: BinaryIO
    failures: BinaryIO
    """The same one on standard output."""
    failed: int = 0
    """Lines of requests that failed, those of before included."""

    def write(self, stored: Mapping[str, Stored], custom_ids: Mapping[str, str]) -> None:
        """Raises `OSError`, and `BrokenPipeError` if who reads has left."""
        for request_id, answer in stored.items():
            line, is_answered = line_of_answer(
                answer.headers,
                answer.body,
                custom_id=custom_ids[request_id],
                request_id=request_id,
            )
            self.failed += not is_answered
            (self.answers if is_answered else self.failures).write(line)
        # What is on disk then is whole lines, but for a stop in the middle of one.
        self.answers.flush()
        self.failures.flush()


async def collect_file(place: Place, file: JobFile, path: Path | None) -> int:
    """Write the answers to a file's requests; returns the status once all are there.

    Raises `JetStreamError` and `OSError`. Cancelled: what has been written stays, and the same
    call goes on there.
    """
    custom_ids = file.custom_ids()
    async with place.open() as jetstream:
        with _open_output(path) as (output, written):
            missing = [each for each in custom_ids if custom_ids[each] not in written]
            with progress_bar() as bar:
                task = bar.add_task("answers", total=len(custom_ids))
                done = len(custom_ids) - len(missing)
                bar.update(task, completed=done)
                async with open_collector(jetstream, place.streams.results, missing) as collector:
                    while found := await collector.look_over():
                        output.write(found, custom_ids)
                        bar.advance(task, len(found))
                    lost = await _lost(jetstream, place, collector)
                    for request_id in lost:
                        del collector.pending[request_id]
                    while found := await collector.more():
                        output.write(found, custom_ids)
                        bar.advance(task, len(found))
    return _say_end(file, len(custom_ids), output.failed, len(lost), path)


async def _lost(jetstream: JetStream, place: Place, collector: Collector) -> set[str]:
    """Those of its pending jobs that nobody will answer: they are not in the queue."""
    if not collector.pending:
        return set()
    waiting = await waiting_jobs(jetstream, place.streams.jobs, [subjects.JOBS])
    if waiting is None:
        return set()
    lost = collector.pending.keys() - waiting.keys()
    # What has left the queue meanwhile was answered before.
    return lost - (await _answered(jetstream, place, sorted(lost)))


async def _answered(jetstream: JetStream, place: Place, request_ids: list[str]) -> set[str]:
    found: set[str] = set()
    for some in slices(request_ids):
        found.update(await answers_to(jetstream, place.streams.results, some))
    return found


def _say_end(file: JobFile, total: int, failed: int, lost: int, path: Path | None) -> int:
    where = f"; they are in {_failures_path(path)}" if failed and path is not None else ""
    sys.stderr.write(
        f"{total - lost} of {total} requests of {file.batch_id} are answered, {failed} of them "
        f"with an error{where}.\n"
    )
    if lost:
        sys.stderr.write(
            f"{lost} are neither answered nor in the queue: they were not submitted, or waited "
            f"too long. trio-worker jobs submit {file.path}{file.options} puts them there.\n"
        )
    return ANSWERED_WITH_AN_ERROR if failed or lost else ExitStatus.OK


def _failures_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.errors{path.suffix}")


@contextmanager
def _open_output(path: Path | None) -> Iterator[tuple[Output, set[str]]]:
    """Where to write, and which lines are there already, by `custom_id`. Raises `OSError`."""
    if path is None:
        yield Output(sys.stdout.buffer, sys.stdout.buffer), set()
        return
    with _gone_on_with(path) as (answers, answered):
        with _gone_on_with(_failures_path(path)) as (failures, failed):
            yield Output(answers, failures, failed=len(failed)), answered | failed
        if not _failures_path(path).stat().st_size:
            _failures_path(path).unlink()


@contextmanager
def _gone_on_with(path: Path) -> Iterator[tuple[BinaryIO, set[str]]]:
    """A file to add lines to, and the ids of those in it; what was cut off in the middle goes."""
    written: set[str] = set()
    with path.open("a+b") as file:
        file.seek(0)
        end = 0
        for line in file:
            custom_id = answered_id(line) if line.endswith(b"\n") else None
            if custom_id is None:
                break
            written.add(custom_id)
            end += len(line)
        file.truncate(end)
        yield file, written


async def show_one(place: Place, request_id: str) -> int:
    """Show the answer to one job, waiting for it while it is in the queue; returns the status.

    Raises `JetStreamError`.
    """
    async with (
        place.open() as jetstream,
        open_collector(jetstream, place.streams.results, [request_id]) as collector,
    ):
        found = await collector.look_over()
        if not found and not await _may_come(jetstream, place, request_id):
            sys.stderr.write(
                f"There is no job {request_id}: no answer of that id is stored, and it is not in "
                "the queue. A file of this name does not exist, either.\n"
            )
            return ANSWERED_WITH_AN_ERROR
        if not found:
            sys.stderr.write("It waits, or is being done.\n")
            found = await collector.more()
    return show_stored(found[request_id])


async def _may_come(jetstream: JetStream, place: Place, request_id: str) -> bool:
    """Whether a job is in the queue, as far as that can be seen, or has just been answered."""
    waiting = await waiting_jobs(jetstream, place.streams.jobs, [subjects.JOBS])
    if waiting is None or request_id in waiting:
        return True
    return bool(await answers_to(jetstream, place.streams.results, [request_id]))
