"""Durable jobs while workers and servers die and hang: each is answered once, as if nothing were.

    python -m chaos.jobs jobs=500 trouble=workers seed=7

Real processes: nats-server with a store, three workers, their engines with a random model. What the
trouble is: `workers` are killed every few seconds and started again, `freeze` stops one for longer
than the lease of its jobs, `server` kills nats-server or restarts it.
"""

# ruff: noqa: T201 - a command

from __future__ import annotations

import json
import random
import secrets
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio
from loguru import logger
from support.commands import RunningCommand, running_command, until_gone
from support.nats_fixtures import NatsServer, running_server

from trio_worker.core.priority import NAMES
from trio_worker.jetstream.api import JetStreamError
from trio_worker.jetstream.client import JetStream, open_jetstream
from trio_worker.nats.broker import open_nats_broker
from trio_worker.ports import Message
from trio_worker.wire import subjects

WORKERS = ("w1", "w2", "w3")
LEASE_S = 5.0
TOGETHER = 16
"""Jobs that are published at a time."""
TRIES = 20
PATIENCE_S = 120.0
"""For what is left when the trouble is over."""
SECONDS_PER_JOB = 0.5

SETTINGS = (
    "nats.embedded=never",
    "nats.jetstream.enabled=true",
    f"nats.jetstream.ack_wait_ms={round(1000 * LEASE_S)}",
    "nats.jetstream.max_deliver=100",
    "worker.continuous_batching.max_batch_size=4",
    "worker.prewarm.enabled=false",
)


def body_of(number: int) -> dict[str, Any]:
    """One of 16 jobs, short ones and long ones, whose answers are a function of the job."""
    index = number % 16
    return {
        "prompt": "abc " * (1 + 7 * (index % 5)),
        "max_tokens": (3, 40, 120, 300)[index % 4],
        "seed": index,
        "temperature": 1.0 if index % 3 else 0.0,
        "timeout_ms": 120_000,
    }


@dataclass
class Member:
    """A worker that is started again as often as it is killed."""

    worker_id: str
    command: RunningCommand | None = None
    started: trio.Event = field(default_factory=trio.Event)
    """For the first time."""
    ended: trio.Event = field(default_factory=trio.Event)


class Trouble:
    """One run. Its state: the members, what has happened, what the callers have heard."""

    def __init__(self, folder: Path, model: str, server: NatsServer, rng: random.Random) -> None:
        self.members = [Member(each) for each in WORKERS]
        self.server = server
        self.rng = rng
        self.happened: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        """By job, what came to the subject of its answer."""
        self._folder = folder
        self._settings = [
            part for each in (*SETTINGS, f"worker.model={model}") for part in ("--set", each)
        ]

    async def keep_running(self, member: Member) -> None:
        """Start it, and again whenever it has been killed; stopped as SIGTERM does in the end."""
        while True:
            async with running_command(
                self._folder,
                *self._settings,
                *("--set", f"worker.id={member.worker_id}"),
                url=self.server.url,
            ) as command:
                await command.wait_ready()
                member.command, member.ended = command, trio.Event()
                member.started.set()
                await member.ended.wait()
            member.command = None

    async def kill_a_worker(self) -> None:
        member = self.rng.choice(self.members)
        if (command := member.command) is None:
            return
        family = command.children()
        command.process.kill()
        await command.process.wait()
        await until_gone(family)
        member.ended.set()

    async def freeze_a_worker(self) -> None:
        """For longer than its lease: others do its jobs, and it comes back with answers to them."""
        member = self.rng.choice(self.members)
        if (command := member.command) is None:
            return
        command.process.send_signal(signal.SIGSTOP)
        try:
            await trio.sleep(LEASE_S + self.rng.uniform(1, 3))
        finally:
            command.process.send_signal(signal.SIGCONT)

    async def restart_the_server(self) -> None:
        how = self.rng.choice((signal.SIGKILL, signal.SIGTERM))
        await trio.to_thread.run_sync(self.server.end, how)
        await trio.sleep(self.rng.choice((0.0, 0.3, 2.0)))
        await trio.to_thread.run_sync(self.server.start)

    async def happen(self, kind: str) -> None:
        """Until cancelled."""
        acts: dict[str, Callable[[], Awaitable[None]]] = {
            "workers": self.kill_a_worker,
            "freeze": self.freeze_a_worker,
            "server": self.restart_the_server,
        }
        while kind != "none":
            await trio.sleep(self.rng.uniform(1, 4))
            with trio.CancelScope(shield=True):
                await acts[kind]()
            self.happened[kind] += 1

    def hear(self, message: Message) -> None:
        self.answers[message.subject.rpartition(".")[2]] += 1


async def run_jobs(folder: Path, model: str, *, seed: int, jobs: int, trouble: str) -> str:
    """One run; returns a summary. Raises `AssertionError` with everything that was wrong."""
    rng = random.Random(seed)
    store = folder / "jetstream"
    with (
        running_server(config=f'jetstream {{store_dir: "{store}"}}') as server,
        trio.fail_after(60 + PATIENCE_S + jobs * SECONDS_PER_JOB * 4),
    ):
        run = Trouble(folder, model, server, rng)
        async with trio.open_nursery() as workers:
            for member in run.members:
                workers.start_soon(run.keep_running, member)
            for member in run.members:
                await member.started.wait()
            async with (
                open_nats_broker(server.url, name="caller", reconnect_wait_s=0.1) as broker,
                open_jetstream(broker) as jetstream,
            ):
                await broker.subscribe(f"{subjects.answer('*')}", run.hear)
                summary = await _ask_all(run, jetstream, jobs, trouble, seed)
            workers.cancel_scope.cancel()
    return summary


async def _ask_all(run: Trouble, jetstream: JetStream, jobs: int, trouble: str, seed: int) -> str:
    undisturbed = [f"calm-{number}" for number in range(16)]
    await _publish(jetstream, undisturbed)
    await _wait_stored(jetstream, len(undisturbed))
    asked = [f"s{seed}-{number}" for number in range(jobs)]
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.happen, trouble)
        await _publish(jetstream, asked)
        await _wait_stored(jetstream, len(undisturbed) + jobs)
        nursery.cancel_scope.cancel()
    took_s = trio.current_time() - began
    results = await _results(jetstream)
    wrong = [*_judge(results, undisturbed, asked), *_judge_answers(run, asked, trouble)]
    left = (await jetstream.stream_info("INFERENCE")).state.messages
    dead = (await jetstream.stream_info("DEAD")).state.messages
    if left or dead:
        wrong.append(f"{left} jobs are left in the stream, {dead} are dead")
    summary = (
        f"seed {seed}: {jobs} jobs in {took_s:.0f} s, each answered once; {dict(run.happened)}"
    )
    assert not wrong, "\n".join([summary, *wrong[:30]])
    return summary


async def _publish(jetstream: JetStream, request_ids: list[str]) -> None:
    limit = trio.CapacityLimiter(TOGETHER)

    async def publish(number: int, request_id: str) -> None:
        async with limit:
            body = json.dumps({**body_of(number), "request_id": request_id}).encode()
            subject = subjects.job(level=NAMES[number % 3], caller="chaos", model="tiny")
            await jetstream.publish(subject, body, {"Nats-Msg-Id": request_id}, tries=TRIES)

    async with trio.open_nursery() as nursery:
        for number, request_id in enumerate(request_ids):
            nursery.start_soon(publish, number, request_id)


async def _wait_stored(jetstream: JetStream, count: int) -> None:
    """Return when there are so many results, and nothing is left of the jobs."""
    with trio.fail_after(PATIENCE_S + count * SECONDS_PER_JOB * 3):
        while True:
            with suppress(JetStreamError):  # the server may be away just now
                results = await jetstream.stream_info("RESULTS")
                jobs = await jetstream.stream_info("INFERENCE")
                if results.state.messages >= count and not jobs.state.messages:
                    return
            await trio.sleep(0.2)


async def _results(jetstream: JetStream) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    sequence = 1
    while True:
        batch = await jetstream.read("RESULTS", subject=subjects.result("*"), sequence=sequence)
        if not batch.messages:
            return results
        for stored in batch.messages:
            told = {"headers": dict(stored.headers), **json.loads(stored.body)}
            results[stored.subject.rpartition(".")[2]].append(told)
        sequence = batch.next_sequence


def _judge(
    results: dict[str, list[dict[str, Any]]], undisturbed: list[str], asked: list[str]
) -> list[str]:
    wrong = []
    expected = [_text(results[request_id][0]) for request_id in undisturbed]
    for number, request_id in enumerate(asked):
        found = results.get(request_id, [])
        if len(found) != 1:
            wrong.append(f"{request_id} has {len(found)} results")
        elif "error" in found[0]:
            wrong.append(f"{request_id}: {found[0]['error']}")
        elif _text(found[0]) != expected[number % 16]:
            wrong.append(f"{request_id} says {_text(found[0])!r}, not {expected[number % 16]!r}")
    return wrong


def _judge_answers(run: Trouble, asked: list[str], trouble: str) -> list[str]:
    """Who waits hears it once; what is said while the line is broken has to be looked up."""
    least = 0 if trouble == "server" else 1
    return [
        f"{request_id} was heard {run.answers[request_id]} times"
        for request_id in asked
        if not least <= run.answers[request_id] <= 1
    ]


def _text(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["text"])


def main(arguments: list[str]) -> int:
    from support.tiny_model import write_tiny_model  # noqa: PLC0415 - imports mlx

    logger.remove()
    options = dict(each.split("=", 1) for each in arguments)
    jobs, trouble = int(options.get("jobs", 500)), options.get("trouble", "workers")
    seed = int(options["seed"]) if "seed" in options else secrets.randbelow(10_000)
    print(f"python -m chaos.jobs jobs={jobs} trouble={trouble} seed={seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        model = str(write_tiny_model(Path(folder) / "tiny"))
        try:
            run = partial(run_jobs, Path(folder), model, seed=seed, jobs=jobs, trouble=trouble)
            print(trio.run(run), flush=True)
        except AssertionError as exc:
            print(f"FAILED  {exc}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
