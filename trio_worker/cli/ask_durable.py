"""`trio-worker ask --durable`: a job that is done even if nobody waits for its answer."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from trio_worker.cli.job_files import Place
from trio_worker.cli.show_answer import show_stored
from trio_worker.errors import ExitStatus
from trio_worker.gateway.batch_queue import TRIES, open_collector
from trio_worker.jetstream.api import MESSAGE_ID
from trio_worker.wire import subjects


async def ask_durable(
    place: Place,
    *,
    request: Mapping[str, Any],
    level: str,
    caller: str | None,
    as_json: bool,
) -> int:
    """Put one job into the queue and wait for its answer; returns the status of the command.

    `request` has the model. Raises `JetStreamError` if it cannot be put there, and
    `trio.TooSlowError` if there is no server. Cancelled: the job goes on once it is in the queue,
    and that has been said.
    """
    request_id = secrets.token_hex(16)
    subject = subjects.job(level=level, caller=caller, model=request["model"])
    body = msgspec.json.encode({**request, "request_id": request_id})
    async with (
        place.open() as jetstream,
        open_collector(jetstream, place.streams.results, [request_id]) as collector,
    ):
        await jetstream.publish(subject, body, {MESSAGE_ID: request_id}, tries=TRIES)
        sys.stderr.write(
            f"Job {request_id} is in the queue. It is done whether or not this command waits; "
            f"later: trio-worker jobs results {request_id}\n"
        )
        sys.stderr.flush()
        with trio.move_on_after(place.timeout_s):
            answer = (await collector.more())[request_id]
            if as_json:
                sys.stdout.write(answer.body.decode() + "\n")
                return ExitStatus.OK
            return show_stored(answer)
    sys.stderr.write(f"No answer within {place.timeout_s:g} s; the job goes on.\n")
    return ExitStatus.UNAVAILABLE
