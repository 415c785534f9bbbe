"""`trio-worker jobs status`: where jobs are."""

from __future__ import annotations

import sys
from collections import Counter

import msgspec

from trio_worker.cli.job_files import JobFile, Place
from trio_worker.core.priority import NAMES
from trio_worker.errors import ExitStatus
from trio_worker.gateway.batch_queue import answers_to, slices, waiting_jobs
from trio_worker.jetstream import api
from trio_worker.jetstream.api import ConsumerInfo, Fault, JetStreamError
from trio_worker.jetstream.client import JetStream
from trio_worker.wire import native, subjects


class _Consumers(msgspec.Struct):
    consumers: list[ConsumerInfo] = []


async def show_file_status(place: Place, file: JobFile) -> int:
    """How many of a file's requests are where; returns the status. Raises `JetStreamError`."""
    request_ids = list(file.custom_ids())
    async with place.open() as jetstream:
        waiting = await waiting_jobs(jetstream, place.streams.jobs, [subjects.JOBS])
        outcomes: Counter[str] = Counter()
        unanswered = 0
        for some in slices(request_ids):
            found = await answers_to(jetstream, place.streams.results, some)
            outcomes.update(
                "with an error" if each.headers.get(native.Header.TERMINAL) == "error" else "done"
                for each in found.values()
            )
            unanswered += sum(
                request_id in waiting
                for request_id in some
                if waiting is not None and request_id not in found
            )
    rest = len(request_ids) - outcomes.total()
    rows: dict[str, int | None] = {
        "answered": outcomes["done"],
        "answered with an error": outcomes["with an error"],
    }
    if waiting is None:
        rows["not answered"] = rest
    else:
        rows |= {"waiting or running": unanswered, "not in the queue": rest - unanswered}
    rows["together"] = len(request_ids)
    _show({f"batch {file.batch_id}": None, **rows})
    return ExitStatus.OK


async def show_streams(place: Place) -> int:
    """How much all streams of jobs hold; returns the status. Raises `JetStreamError`."""
    rows: dict[str, int | None] = {}
    async with place.open() as jetstream:
        running = await _running(jetstream, place.streams.jobs)
        held = await _held(jetstream, place.streams.jobs)
        for level in NAMES:
            if running is None:
                rows[f"waiting or running, {level}"] = held[level]
            else:
                rows[f"waiting, {level}"] = max(0, held[level] - running[level])
                rows[f"running, {level}"] = running[level]
        rows["answered and kept"] = await _messages(jetstream, place.streams.results)
        dead = place.config.nats.jetstream.dead
        rows["given up"] = await _messages(jetstream, dead)
    _show(rows)
    return ExitStatus.OK


async def _held(jetstream: JetStream, stream: str) -> Counter[str]:
    """The jobs in the queue, by level."""
    info = await jetstream.stream_info(stream, subjects=subjects.JOBS)
    held: Counter[str] = Counter()
    for subject, count in (info.state.subjects or {}).items():
        if (job := subjects.read_job(subject)) is not None:
            held[job.level] += count
    return held


async def _running(jetstream: JetStream, stream: str) -> Counter[str] | None:
    """The jobs that workers have, by level; None where that may not be asked.

    Of the first 256 consumers, which is as many as the server tells at a time.
    """
    try:
        reply = await jetstream.request(api.consumer_list(stream))
    except JetStreamError:
        return None
    running: Counter[str] = Counter()
    for each in msgspec.json.decode(reply, type=_Consumers).consumers:
        running[str(each.config.get("name")).partition("-")[0]] += each.num_ack_pending
    return running


async def _messages(jetstream: JetStream, stream: str) -> int:
    """0 for a stream that nobody has made yet."""
    try:
        return (await jetstream.stream_info(stream)).state.messages
    except JetStreamError as error:
        if error.fault is not Fault.STREAM_MISSING:
            raise
        return 0


def _show(rows: dict[str, int | None]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        sys.stdout.write(f"{name}\n" if value is None else f"{name:<{width}}  {value}\n")
