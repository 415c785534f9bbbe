"""The worker command under kills, hangs and broken lines, and the ledgers of both sides.

    python -m chaos seconds=120 seed=7

Real processes: nats-server, the worker, its engine with a random model. Two ledgers are kept: what
callers sent and got, and what the worker's own log says of each request. Core NATS delivers at most
once, so what they owe each other depends on whether the line was whole:

* A request is *exposed* if nats-server was away (killed, or not yet reconnected to by both sides)
  at some time between its sending and its end. It may be lost on either way, and so may parts of
  its answer; nothing may come twice, and whatever the worker admitted it must have ended.
* Every other request gets exactly one terminal message, the one that the worker says it sent, and
  every message before it.
"""

# ruff: noqa: T201 - a command

from __future__ import annotations

import json
import random
import secrets
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import trio
from loguru import logger
from support.commands import RunningCommand, running_command, until
from support.nats_fixtures import NatsServer, running_server

from trio_worker.nats.broker import NatsBroker, open_nats_broker
from trio_worker.ports import Message

WORKER = "w1"
CALLERS_PER_LINE = 4
RECONNECT_WAITS_S = (0.05, 0.05, 1.5)
"""One a line. The worker waits for half a second: it comes back after some and before others."""
LONG_RUN_S = 60.0
"""Only such a run meets what takes the worker long to notice."""
PATIENCE_S = 90.0
"""Longer than any deadline."""
LOST_AFTER_S = 3.0
"""What has not come so long after the line was whole again does not come."""
RATHER = ("kill the engine", "kill the engine", "stop the engine for good", "a caller leaves")
"""These happen more often than the others, each of which happens once in a round."""
REFUSALS = {"QUEUE_FULL"}
"""What a caller of a healthy worker may hear."""

SETTINGS = (
    "nats.embedded=never",
    "worker.continuous_batching.max_batch_size=4",
    "worker.continuous_batching.turn_timeout_ms=1500",
    "worker.request_queue.max_depth=6",
    "worker.engine.max_restarts=1000",
    "worker.engine.restart_window_s=2",
)


def templates() -> list[dict[str, Any]]:
    """Requests whose answers are a function of the request, short ones and long ones."""
    return [
        {
            "prompt": "abc " * (1 + 7 * (index % 5)),
            "max_tokens": (3, 40, 120, 300)[index % 4],
            "seed": index,
            "temperature": 1.0 if index % 3 else 0.0,
            "stream": index % 2 == 0,
            "priority": ("high", "medium", "low")[index % 3],
            "timeout_ms": 60_000,
        }
        for index in range(16)
    ]


@dataclass(slots=True, eq=False)
class Call:
    """One request as its caller sees it."""

    request_id: str
    template: int
    subject: str
    sent_at: float
    messages: list[Message] = field(default_factory=list)
    ended_at: float | None = None
    cancelled: bool = False
    nobody_listened: bool = False
    """The server knew of no worker: it has not been sent to anybody, and is sent again."""
    changed: trio.Event = field(default_factory=trio.Event)

    def take(self, message: Message) -> None:
        if message.headers.get("Status") == "503":
            self.nobody_listened = True
        else:
            self.messages.append(message)
            if self.ended_at is None and "Terminal" in message.headers:
                self.ended_at = trio.current_time()
        self.changed.set()

    @property
    def outcome(self) -> str | None:
        for message in self.messages:
            if message.headers.get("Terminal") == "done":
                return "ok"
            if "Terminal" in message.headers:
                return str(json.loads(message.body)["error"]["code"])
        return None

    @property
    def text(self) -> str:
        return "".join(_text(message) for message in self.messages)

    @property
    def numbers(self) -> list[int]:
        return [int(message.headers["Sequence"]) for message in self.messages]


def _text(message: Message) -> str:
    choices = json.loads(message.body).get("choices")
    return (choices[0].get("text") or "") if choices else ""


class WorkerLog:
    """What the worker says of each request, read from its log while it is written."""

    def __init__(self, path: Path) -> None:
        self.admitted: Counter[str] = Counter()
        self.outcomes: defaultdict[str, list[str]] = defaultdict(list)
        self.noticed_at: dict[str, float] = {}
        """When we read that it had ended."""
        self.errors: list[str] = []
        self._path = path
        self._offset = 0

    def read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError):
                self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        message, request_id = str(line.get("message")), str(line.get("request_id"))
        if line.get("level") in {"error", "critical"} and not message.startswith("Request ended"):
            self.errors.append(message)
        if message.startswith("Request admitted"):
            self.admitted[request_id] += 1
        elif message.startswith(("Request ended", "Request refused: ")):
            self._end(request_id, str(line["outcome"]))

    def _end(self, request_id: str, outcome: str) -> None:
        self.outcomes[request_id].append(outcome)
        self.noticed_at.setdefault(request_id, trio.current_time())


class Chaos:
    """One run. Its state: the lines, the calls, when nats-server was away, and the findings."""

    def __init__(
        self, worker: RunningCommand, server: NatsServer, rng: random.Random, prefix: str
    ) -> None:
        self.worker = worker
        self.server = server
        self.rng = rng
        self.log = WorkerLog(worker.log)
        self.expected: list[str] = []
        self.calls: list[Call] = []
        self.happened: Counter[str] = Counter()
        self.left = 0
        """Requests whose callers went away for good."""
        self.away: list[list[float]] = []
        """From when to when; the last one may be open."""
        self.wrong: list[str] = []
        self._prefix = prefix
        self._lines: list[NatsBroker] = []
        self._inboxes: list[str] = []

    @asynccontextmanager
    async def lines(self) -> AsyncIterator[None]:
        """The connections of those callers that stay to the end, and hear everything till then."""
        async with AsyncExitStack() as stack:
            for wait_s in RECONNECT_WAITS_S:
                line = await stack.enter_async_context(
                    open_nats_broker(self.server.url, name="caller", reconnect_wait_s=wait_s)
                )
                inbox = line.new_inbox()
                await line.subscribe(f"{inbox}.>", self._take)
                self._lines.append(line)
                self._inboxes.append(inbox)
            yield

    def _take(self, message: Message) -> None:
        self.calls[int(message.subject.rpartition(".")[2])].take(message)

    # --- callers ----------------------------------------------------------------------------

    async def ask(self, template: int, line: int, *, subject: str = f"inference.{WORKER}") -> Call:
        """Send one request, again while nobody listens; returns at its end or loss."""
        number = len(self.calls)
        call = Call(
            request_id=f"{self._prefix}-{number}",
            template=template,
            subject=subject,
            sent_at=trio.current_time(),
        )
        self.calls.append(call)
        body = {**templates()[template], "request_id": call.request_id}
        message = Message(
            subject=subject,
            body=json.dumps(body).encode(),
            reply=f"{self._inboxes[line]}.{number}",
        )
        self._lines[line].publish(message)
        while call.ended_at is None and not self._is_lost(call):
            call.changed = trio.Event()
            with trio.move_on_after(0.25):
                await call.changed.wait()
            if call.nobody_listened:
                if subject.startswith(f"inference.{WORKER}") and not self.is_exposed(call):
                    self.wrong.append(f"{call.request_id}: nobody listened on {subject}")
                call.nobody_listened = False
                await trio.sleep(0.25)
                self._lines[line].publish(message)
        return call

    def is_exposed(self, call: Call) -> bool:
        end = call.ended_at if call.ended_at is not None else trio.current_time()
        return any(since <= end and until >= call.sent_at for since, until in self.away)

    def _is_lost(self, call: Call) -> bool:
        now = trio.current_time()
        if now > call.sent_at + PATIENCE_S:
            self.wrong.append(f"{call.request_id} was not answered within {PATIENCE_S:g} s")
            return True
        if not self.is_exposed(call) or now < self.away[-1][1] + LOST_AFTER_S:
            return False
        self.log.read()
        request_id = call.request_id
        if self.log.outcomes[request_id]:
            return now > self.log.noticed_at[request_id] + LOST_AFTER_S
        return not self.log.admitted[request_id]

    async def keep_asking(self, line: int, rng: random.Random, until_s: float) -> None:
        while trio.current_time() < until_s:
            subject = f"inference.{WORKER}"
            if rng.random() < 0.2:
                subject = rng.choice(("inference", "inference.model.tiny"))
            async with trio.open_nursery() as nursery:
                if rng.random() < 0.15:
                    nursery.start_soon(
                        self._cancel_soon, line, rng.uniform(0, 0.3), len(self.calls)
                    )
                call = await self.ask(rng.randrange(len(templates())), line, subject=subject)
            if call.outcome not in {"ok", "CANCELLED"}:
                await trio.sleep(rng.uniform(0.05, 0.3))

    async def _cancel_soon(self, line: int, after_s: float, number: int) -> None:
        await trio.sleep(after_s)
        call = self.calls[number]
        call.cancelled = True
        subject = f"inference.{WORKER}.ctl.{call.request_id}"
        self._lines[line].publish(Message(subject=subject, body=b"cancel"))

    # --- happenings ---------------------------------------------------------------------------

    async def happen(self, until_s: float) -> None:
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "kill the engine": self._kill_engine,
            "stop the engine for good": self._stop_engine,
            "stop the engine while it loads": self._stop_loading,
            "stop the engine for a moment": self._pause_engine,
            "kill nats-server": partial(self._restart_server, signal.SIGKILL),
            "restart nats-server": partial(self._restart_server, signal.SIGTERM),
            "stop nats-server for a moment": self._pause_server,
            "a caller leaves": self._leave,
        }
        bag: list[str] = []
        if until_s - trio.current_time() < LONG_RUN_S:
            del kinds["stop the engine while it loads"]
        while trio.current_time() < until_s:
            if not bag:
                bag = [*kinds, *RATHER]
                self.rng.shuffle(bag)
            kind = bag.pop()
            self.happened[kind] += 1
            await kinds[kind]()
            await trio.sleep(self.rng.uniform(0.1, 4))

    def _engine(self) -> psutil.Process | None:
        for child in self.worker.children():
            with suppress(psutil.Error):
                if "trio_worker.engine" in child.cmdline():
                    return child
        return None

    def _send_engine(self, engine: psutil.Process | None, number: signal.Signals) -> None:
        with suppress(psutil.NoSuchProcess):
            if engine is not None:
                engine.send_signal(number)

    async def _kill_engine(self) -> None:
        self._send_engine(self._engine(), signal.SIGKILL)

    async def _stop_engine(self) -> None:
        """Once it is ready: while it loads again, twenty seconds pass before that is noticed."""
        await self.worker.until_stats(
            lambda stats: stats["engine"]["state"] == "ready", within_s=PATIENCE_S
        )
        self._send_engine(self._engine(), signal.SIGSTOP)

    async def _stop_loading(self) -> None:
        self._send_engine(self._engine(), signal.SIGKILL)
        await self.worker.until_stats(
            lambda stats: stats["engine"]["state"] == "restarting", within_s=PATIENCE_S
        )
        await trio.sleep(self.rng.uniform(0, 0.5))
        self._send_engine(self._engine(), signal.SIGSTOP)

    async def _pause_engine(self) -> None:
        engine = self._engine()
        self._send_engine(engine, signal.SIGSTOP)
        await trio.sleep(self.rng.uniform(0, 0.8))
        self._send_engine(engine, signal.SIGCONT)

    async def _restart_server(self, how: signal.Signals) -> None:
        reconnects = (await self.worker.stats())["nats"]["reconnects"]
        away = [trio.current_time(), float("inf")]
        self.away.append(away)
        await trio.to_thread.run_sync(self.server.end, how)
        await trio.sleep(self.rng.choice((0.0, 0.2, 2.0)))
        await trio.to_thread.run_sync(self.server.start)

        async def is_whole() -> bool:
            nats = (await self.worker.stats())["nats"]
            connected = [line.statistics().connected for line in self._lines]
            return nats["reconnects"] > reconnects and all([nats["connected"], *connected])

        await until(is_whole, within_s=30)
        away[1] = trio.current_time()

    async def _pause_server(self) -> None:
        self.server.send(signal.SIGSTOP)
        await trio.sleep(self.rng.uniform(0, 1))
        self.server.send(signal.SIGCONT)

    async def _leave(self) -> None:
        """Some requests, of which the caller does not see the end."""
        with trio.move_on_after(5):
            async with open_nats_broker(self.server.url, name="leaves") as line:
                inbox, arrived = line.new_inbox(), trio.Event()
                await line.subscribe(inbox, lambda _: arrived.set())
                for _ in range(self.rng.randint(1, 4)):
                    self.left += 1
                    body = {**templates()[3], "stream": True, "request_id": f"left-{self.left}"}
                    line.publish(
                        Message(
                            subject=f"inference.{WORKER}",
                            body=json.dumps(body).encode(),
                            reply=inbox,
                        )
                    )
                with trio.move_on_after(self.rng.uniform(0, 1)):
                    await arrived.wait()

    # --- judgement ----------------------------------------------------------------------------

    async def wait_quiet(self) -> None:
        """Return when the worker is whole and has nothing to do."""

        def at_rest(stats: Any) -> bool:
            nats = stats["nats"]
            busy = stats["requests"]["in_flight"] or nats["unpublished_bytes"]
            return stats["worker"]["state"] == "ready" and nats["connected"] and not busy

        await self.worker.until_stats(at_rest, within_s=PATIENCE_S)
        for line in self._lines:
            await line.flush()
        await trio.sleep(0.5)
        self.log.read()

    def judge_calls(self) -> None:
        for call in self.calls:
            self.wrong += [f"{call.request_id}: {each}" for each in self._judge(call)]

    def _judge(self, call: Call) -> Iterable[str]:
        said, exposed = self.log.outcomes[call.request_id], self.is_exposed(call)
        terminals = [at for at, each in enumerate(call.messages) if "Terminal" in each.headers]
        if len(terminals) > 1:
            yield f"{len(terminals)} terminal messages"
        elif terminals and terminals[0] != len(call.messages) - 1:
            yield "messages after the terminal one"
        if any(a >= b for a, b in zip(call.numbers, call.numbers[1:], strict=False)):
            yield f"out of order or twice: {call.numbers}"
        if len(said) > 1 or self.log.admitted[call.request_id] > 1:
            yield f"taken more than once: {said}"
        if self.log.admitted[call.request_id] and not said:
            yield "admitted and never ended"
        if terminals and said != [call.outcome]:
            yield f"the worker says {said}, the caller got {call.outcome}"
        whole = call.numbers == list(range(len(call.messages)))
        if not exposed and not (terminals and whole):
            yield f"got {call.outcome} with the numbers {call.numbers}, the line was whole"
        if call.outcome == "ok" and whole and call.text != self.expected[call.template]:
            yield f"was told {call.text!r} rather than {self.expected[call.template]!r}"
        if call.outcome not in self._may_hear(call, exposed=exposed):
            yield f"got {call.outcome} for no reason"

    def _may_hear(self, call: Call, *, exposed: bool) -> set[str | None]:
        may: set[str | None] = {"ok", *REFUSALS}
        if call.cancelled or exposed:
            # A caller that comes back later than the worker does is taken for gone.
            may.add("CANCELLED")
        if exposed:
            may.add(None)
        if any("engine" in kind for kind in self.happened):
            # Whoever is alone in three crashes in a row is taken to be guilty.
            may.add("ENGINE_FAILED")
        if self.happened["stop the engine while it loads"]:
            may.add("REQUEST_TIMEOUT")
        return may

    async def judge_worker(self) -> None:
        """Its counters against its log, and its parts against what should be there."""
        stats = await self.worker.stats()
        requests, nats = stats["requests"], stats["nats"]
        ended = sum(len(each) for each in self.log.outcomes.values())
        admitted_only = [each for each in self.log.admitted if not self.log.outcomes[each]]
        for what, found, expected in (
            ("answered by its counters", sum(requests["by_outcome"].values()), ended),
            ("admitted and never ended", admitted_only, []),
            ("dropped requests", requests["dropped"], 0),
            ("dropped messages", nats["dropped"], 0),
            ("slow consumers", nats["slow_consumers"], 0),
            ("reconnects", nats["reconnects"], len(self.away)),
            ("queued", stats["queue"]["depth"], 0),
            ("running", stats["batch"]["running"], 0),
            ("errors in its log", self.log.errors, []),
            # The engine, and the process that renders the model's chat template.
            ("children", len(self.worker.children()), 2),
        ):
            if found != expected:
                self.wrong.append(f"the worker: {what}: {found}, not {expected}")

    def summary(self) -> str:
        exposed = [call for call in self.calls if self.is_exposed(call)]
        lost = sum(call.outcome is None for call in exposed)
        outcomes = Counter(str(call.outcome) for call in self.calls if call.outcome is not None)
        return (
            f"{len(self.calls)} requests {dict(sorted(outcomes.items()))}; of {len(exposed)} over "
            f"an outage of NATS {lost} lost on the way; {self.left} of callers that left; "
            f"{dict(sorted(self.happened.items()))}"
        )


async def run_chaos(folder: Path, model: str, *, seed: int, seconds: float) -> str:
    """One run; returns a summary. Raises `AssertionError` with everything that was wrong."""
    rng = random.Random(seed)
    settings = [part for each in SETTINGS for part in ("--set", each)]
    with running_server() as server, trio.fail_after(seconds + 3 * PATIENCE_S):
        async with running_command(
            folder,
            *("--log-format", "json", "--set", f"worker.model={model}"),
            *settings,
            url=server.url,
        ) as worker:
            await worker.wait_ready()
            chaos = Chaos(worker, server, rng, prefix=f"s{seed}")
            async with chaos.lines():
                await _ask_all(chaos, learn=True)
                until_s = trio.current_time() + seconds
                async with trio.open_nursery() as nursery:
                    for line in range(len(RECONNECT_WAITS_S)):
                        for _ in range(CALLERS_PER_LINE):
                            own = random.Random(rng.random())
                            nursery.start_soon(chaos.keep_asking, line, own, until_s)
                    nursery.start_soon(chaos.happen, until_s)
                await chaos.wait_quiet()
                await _ask_all(chaos, learn=False)
                await chaos.wait_quiet()
                chaos.judge_calls()
                await chaos.judge_worker()
                summary = f"seed {seed}, {seconds:g} s: {chaos.summary()}"
                assert not chaos.wrong, "\n".join([summary, *chaos.wrong[:30]])
    return summary


async def _ask_all(chaos: Chaos, *, learn: bool) -> None:
    """Every template once, a few at a time: what it says when nothing is wrong."""
    calls: dict[int, Call] = {}

    async def ask_some(first: int) -> None:
        for template in range(first, len(templates()), 4):
            calls[template] = call = await chaos.ask(template, 0)
            if call.outcome != "ok":
                chaos.wrong.append(f"{call.request_id}: {call.outcome} from a worker at rest")

    async with trio.open_nursery() as nursery:
        for first in range(4):
            nursery.start_soon(ask_some, first)
    if learn:
        chaos.expected = [calls[template].text for template in sorted(calls)]


def main(arguments: list[str]) -> int:
    from support.tiny_model import write_tiny_model  # noqa: PLC0415 - imports mlx

    logger.remove()
    options = dict(each.split("=", 1) for each in arguments)
    seconds, runs = float(options.get("seconds", 120)), int(options.get("runs", 1))
    first = int(options["seed"]) if "seed" in options else secrets.randbelow(10_000)
    failed = 0
    for seed in range(first, first + runs):
        print(f"python -m chaos seconds={seconds:g} seed={seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            model = str(write_tiny_model(Path(folder) / "tiny"))
            try:
                run = partial(run_chaos, Path(folder), model, seed=seed, seconds=seconds)
                print(trio.run(run), flush=True)
            except AssertionError as exc:
                failed += 1
                print(f"FAILED  {exc}", flush=True)
    return 1 if failed else 0
