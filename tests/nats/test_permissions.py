"""docs/nats-permissions.conf on a real nats-server: it grants what is needed, and no more."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from openai import AsyncOpenAI
from support.batch_rig import line, text_of
from support.clients_rig import MODEL
from support.commands import RunningCommand, command, running_command, until
from support.gateway_commands import address_in, ask, running_gateway
from support.jobs_rig import JOBS_ON, jobs_caller
from support.nats_fixtures import NatsServer, running_server
from support.nats_rig import wait_until
from support.paths import DOCS
from support.scripted_controller import running_controller

from trio_worker.client import Client, Login, open_client
from trio_worker.core.priority import NAMES
from trio_worker.errors import ConfigError, RequestCancelled, RequestTimeout
from trio_worker.jetstream import streams
from trio_worker.nats.broker import open_nats_broker
from trio_worker.ports import Broker, Message

pytestmark = pytest.mark.nats

CONFIG = DOCS / "nats-permissions.conf"
WORKER_OPTIONS = (
    *("--engine", "simulated", "--set", "worker.monitoring.report_interval_ms=200"),
    *("--set", "nats.user=worker", "--set", "nats.password=secret-worker"),
)
LONG = {"prompt": "x", "max_tokens": 1000, "stream": True, "timeout_ms": 30_000}


def violations(server: NatsServer) -> list[tuple[str, str, str]]:
    """What the server has refused: Publish or Subscription, whose, and to which subject."""
    log = (server.folder / "log").read_text()
    return [
        (verb, user, subject)
        for user, verb, subject in re.findall(
            r'/user:(\S+)" - (Publish|Subscription) Violation - Subject "([^"]+)"', log
        )
    ]


@pytest.fixture(name="server")
def server_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[NatsServer]:
    text = CONFIG.read_text(encoding="utf-8")
    for variable in re.findall(r"(?m)^ *password: \$(\w+)$", text):
        name = variable.removesuffix("_PASSWORD").lower().replace("_", "-")
        monkeypatch.setenv(variable, f"secret-{name}")
    with running_server(config=text, jetstream=True) as server:
        yield server


@asynccontextmanager
async def client_of(
    server: NatsServer, user: str, *, caller: str | None = None
) -> AsyncIterator[Client]:
    async with open_client(
        server.url,
        login=Login(user=user, password=f"secret-{user}"),
        inbox_prefix=f"_INBOX.{user}",
        timeout_ms=5000,
        attempts=1,
        caller=caller,
    ) as client:
        yield client


@dataclass
class Peer:
    """A connection that is used without the client."""

    broker: Broker
    received: dict[str, list[Message]] = field(default_factory=dict)

    async def listen(self, subject: str) -> list[Message]:
        messages = self.received.setdefault(subject, [])
        await self.broker.subscribe(subject, messages.append)
        return messages

    async def say(self, subject: str, body: bytes = b"", reply: str | None = None) -> None:
        self.broker.publish(Message(subject=subject, body=body, reply=reply))
        await self.broker.flush()


@asynccontextmanager
async def peer_of(server: NatsServer, user: str) -> AsyncIterator[Peer]:
    async with open_nats_broker(
        server.url,
        name=user,
        login=Login(user=user, password=f"secret-{user}"),
        inbox_prefix=f"_INBOX.{user}",
    ) as broker:
        yield Peer(broker)


async def outcomes(worker: RunningCommand) -> dict[str, int]:
    found: dict[str, int] = (await worker.stats())["requests"]["by_outcome"]
    return found


async def test_everybody_does_their_work_and_the_server_refuses_nothing(
    server: NatsServer, tmp_path: Path
) -> None:
    async with running_command(tmp_path, *WORKER_OPTIONS, url=server.url) as worker:
        await worker.wait_ready()
        for user in ("app-a", "app-b"):
            async with client_of(server, user) as client:
                whole = await client.complete({"prompt": "x", "max_tokens": 2})
                model = whole.body["model"]
                again = {"prompt": "x", "max_tokens": 2, "model": model}
                assert (await client.complete(again)).text
                async with client.ask(LONG) as answer:
                    await anext(answer)
                    answer.cancel()
                    with pytest.raises(RequestCancelled):
                        await answer.text()
                async with client.ask(LONG) as answer:
                    await anext(answer)
        async with client_of(server, "app-a") as client:
            request = {"prompt": "x", "max_tokens": 2}
            assert (await client.complete(request, worker_id="w1")).text
            with trio.move_on_after(1):
                await client.complete({**LONG, "stream": False})
        await worker.until_stats(lambda stats: not stats["requests"]["in_flight"], within_s=3)
        assert await outcomes(worker) == {"ok": 5, "CANCELLED": 5}

        async with peer_of(server, "operator") as operator:
            stats = await operator.listen("worker.*.stats")
            inbox = operator.broker.new_inbox()
            answers = await operator.listen(inbox)
            await operator.say("$SRV.INFO.trio-worker", reply=inbox)

            async def both_came() -> bool:
                return bool(stats and answers)

            await until(both_came, within_s=5)
        seen = await command(
            *("fleet", "--json", "--url", server.url, "--set", "nats.user=operator"),
            env={"TRIO_WORKER__NATS__PASSWORD": "secret-operator"},
        )
        assert seen.returncode == 0, seen.stderr
        assert json.loads(seen.stdout)["id"] == "w1"
        snapshot: Any = json.loads(stats[0].body)
        assert snapshot["requests"]["completed"] == 5
        assert json.loads(answers[0].body)["id"] == "w1"

        async with running_command(tmp_path, *WORKER_OPTIONS, url=server.url) as second:
            assert await second.wait_exit(20) == 78
        assert "worker.id" in second.log.read_text()
    assert violations(server) == []


async def test_a_caller_who_is_held_to_its_own_subject_is_nobody_else(
    server: NatsServer, tmp_path: Path
) -> None:
    log_options = ("--log-level", "debug")
    async with running_command(tmp_path, *WORKER_OPTIONS, *log_options, url=server.url) as worker:
        await worker.wait_ready()
        async with client_of(server, "app-c", caller="app-c") as client:
            request = {"prompt": "x", "max_tokens": 2, "caller": "app-a"}
            whole = await client.complete(request)
            assert (await client.complete({**request, "model": whole.body["model"]})).text
            async with client.ask(LONG) as answer:
                await anext(answer)
                answer.cancel()
                with pytest.raises(RequestCancelled):
                    await answer.text()
        assert violations(server) == []
        ask = await command(
            *("ask", "hi", "--url", server.url, "--max-tokens", "2", "--caller", "app-c"),
            *("--set", "nats.user=app-c", "--set", "nats.password=secret-app-c"),
            *("--inbox-prefix", "_INBOX.app-c"),
        )
        assert ask.returncode == 0, ask.stderr
        async with peer_of(server, "app-c") as peer:
            body = b'{"prompt": "x"}'
            for subject in (
                *("inference", "inference.w1", "inference.model.x", "inference.cancel"),
                *("inference.by.app-a", "inference.by.app-c.x", "inference.by.app-a.model.x"),
            ):
                await peer.say(subject, body, reply="_INBOX.app-c.x")
        assert await outcomes(worker) == {"ok": 3, "CANCELLED": 1}
        log = worker.log.read_text()
    assert log.count("caller app-c") == 4
    assert "caller app-a" not in log
    assert [verb for verb, _, _ in violations(server)] == ["Publish"] * 7


CONVERSATION = {"messages": [{"role": "user", "content": "why " * 400}], "max_tokens": 2}


@asynccontextmanager
async def two_workers(server: NatsServer, tmp_path: Path) -> AsyncIterator[list[RunningCommand]]:
    async with (
        running_command(tmp_path, *WORKER_OPTIONS, url=server.url) as first,
        running_command(
            tmp_path, *WORKER_OPTIONS, "--set", "worker.id=w2", url=server.url
        ) as second,
    ):
        for worker in (first, second):
            await worker.wait_ready()
            await worker.until_stats(lambda stats: stats["fleet"]["others"] == 1, within_s=10)
        yield [first, second]


async def test_workers_may_pass_requests_on(server: NatsServer, tmp_path: Path) -> None:
    async with two_workers(server, tmp_path) as workers, client_of(server, "app-b") as client:
        homes = {(await client.complete(CONVERSATION)).headers["Worker-Id"] for _ in range(12)}
        assert len(homes) == 1
        handed_on = [(await worker.stats())["fleet"]["handed_on"]["prefix"] for worker in workers]
        assert sum(handed_on) > 0
    assert violations(server) == []


async def test_who_may_not_pass_requests_on_keeps_them_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The permissions as they are, but for that one: nothing is lost for want of it."""
    text = re.sub(r'(?m)^ *"inference\.\*" +# passes.*\n', "", CONFIG.read_text(encoding="utf-8"))
    assert text != CONFIG.read_text(encoding="utf-8")
    for variable in re.findall(r"(?m)^ *password: \$(\w+)$", text):
        name = variable.removesuffix("_PASSWORD").lower().replace("_", "-")
        monkeypatch.setenv(variable, f"secret-{name}")
    with running_server(config=text) as server:
        async with two_workers(server, tmp_path) as workers, client_of(server, "app-b") as client:
            for _ in range(12):
                assert (await client.complete(CONVERSATION)).text

            async def is_said() -> bool:
                return "does not let us publish to inference.*" in workers[0].log.read_text()

            await until(is_said, within_s=5)
        assert {(verb, user) for verb, user, _ in violations(server)} == {("Publish", "worker")}


async def test_a_gateway_asks_and_cancels_for_whoever_calls_it(
    server: NatsServer, tmp_path: Path
) -> None:
    login = ("--set", "nats.user=gateway", "--set", "nats.password=secret-gateway")
    inboxes = ("--set", "nats.reply_prefixes=[_INBOX.gateway.]")
    async with (
        running_command(tmp_path, *WORKER_OPTIONS, url=server.url) as worker,
        running_gateway(tmp_path, server.url, *login, *inboxes) as (_, log),
    ):
        await worker.wait_ready()
        address = await address_in(log)
        assert (await ask(address))[0] == 200
        with trio.move_on_after(1):
            await ask(address, max_tokens=1000, timeout_ms=500)
        await worker.until_stats(lambda stats: not stats["requests"]["in_flight"], within_s=5)
    assert violations(server) == []


async def test_durable_jobs_are_submitted_done_and_read_and_the_server_refuses_nothing(
    server: NatsServer, tmp_path: Path
) -> None:
    async with running_command(tmp_path, *WORKER_OPTIONS, "--set", JOBS_ON, url=server.url) as w1:
        await w1.wait_ready()
        async with peer_of(server, "batch") as peer, jobs_caller(peer.broker) as batch:
            await batch.submit("j1", caller="batch", max_tokens=2)
            assert (await batch.result("j1")).code == "ok"
            assert len(await batch.results()) == len(batch.heard) == 1
            await batch.until_empty(within_s=5)
            await batch.submit("j2", caller="batch", max_tokens=1000)
            await w1.until_stats(lambda stats: stats["requests"]["in_flight"], within_s=5)
            await peer.say("inference.cancel", b'{"request_id": "j2"}')
            assert (await batch.result("j2")).code == "CANCELLED"
            assert violations(server) == []
            for subject in ("jobs.inference.high.other.m", "results.inference.x", "inference"):
                await peer.say(subject, b"{}")
        assert (await w1.stats())["jobs"]["trouble"] is None
    assert violations(server) == [
        ("Publish", "batch", "jobs.inference.high.other.m"),
        ("Publish", "batch", "results.inference.x"),
        ("Publish", "batch", "inference"),
    ]


async def test_a_file_of_jobs_and_a_batch_are_done_and_the_server_refuses_nothing(
    server: NatsServer, tmp_path: Path
) -> None:
    gateway = ("--set", "nats.user=gateway", "--set", "nats.password=secret-gateway")
    inboxes = ("--set", "nats.reply_prefixes=[_INBOX.gateway.]")
    batch = ("--set", "nats.user=batch", "--set", "nats.password=secret-batch")
    file = tmp_path / "night.jsonl"
    async with (
        running_command(tmp_path, *WORKER_OPTIONS, "--set", JOBS_ON, url=server.url) as worker,
        running_gateway(tmp_path, server.url, *gateway, *inboxes, "--set", JOBS_ON) as (_, log),
    ):
        await worker.wait_ready()
        model = MODEL
        file.write_bytes(text_of([line(f"c{n}", model=model, max_tokens=2) for n in range(5)]))
        base_url = f"{await address_in(log)}/v1"
        with trio.fail_after(60):
            async with AsyncOpenAI(base_url=base_url, api_key="any") as client:
                sent = await client.files.create(file=file, purpose="batch")
                begun = await client.batches.create(
                    input_file_id=sent.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                )
                while begun.status != "completed":
                    await trio.sleep(0.1)
                    begun = await client.batches.retrieve(begun.id)
                    assert begun.status in {"validating", "in_progress", "completed"}, begun
                content = await client.files.content(str(begun.output_file_id))
                assert len(content.text.splitlines()) == 5
                await client.files.delete(sent.id)
        assert violations(server) == []

        ours = ("--url", server.url, *batch, "--inbox-prefix", "_INBOX.batch")
        done = await command("jobs", "submit", str(file), "--wait", "--caller", "batch", *ours)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 5
        others = await command("jobs", "submit", str(file), "--batch", "other", *ours)
        assert others.returncode == 69
        assert b"jobs.inference.low.-." in others.stderr
    refused = {(user, subject) for _, user, subject in violations(server)}
    assert refused == {
        ("batch", "$JS.API.DIRECT.GET.INFERENCE"),
        ("batch", f"jobs.inference.low.-.{model}"),
    }


async def test_a_worker_without_the_rights_to_make_streams_does_the_jobs_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = CONFIG.read_text(encoding="utf-8")
    for variable in re.findall(r"(?m)^ *password: \$(\w+)$", text):
        monkeypatch.setenv(variable, f"secret-{variable.removesuffix('_PASSWORD').lower()}")
    least = re.sub(r'(?m)^ *"\$JS\.API\.(STREAM|CONSUMER)\.(CREATE|INFO)[^"]*"$', "", text)
    assert least != text
    maker = """
    { user: maker, password: maker, permissions: {publish: ">", subscribe: ">"} }
    """
    with running_server(
        config=least.replace("users = [", f"users = [{maker}"), jetstream=True
    ) as server:
        login = Login(user="maker", password="maker")
        async with (
            open_nats_broker(server.url, name="maker", login=login) as broker,
            jobs_caller(broker) as caller,
        ):
            for stream in (
                streams.jobs_stream("INFERENCE"),
                streams.results_stream("RESULTS", keep_s=60),
                streams.dead_stream("DEAD"),
            ):
                await caller.js.ensure_stream(stream)
            for level in NAMES:
                consumer = streams.job_consumer(level, caller.model, ack_wait_s=30)
                await caller.js.ensure_consumer("INFERENCE", consumer)
            options = (*WORKER_OPTIONS, "--set", JOBS_ON)
            async with running_command(tmp_path, *options, url=server.url) as worker:
                await worker.wait_ready()
                await caller.submit("j1", max_tokens=2)
                assert (await caller.result("j1")).code == "ok"
                assert (await worker.stats())["jobs"]["trouble"] is None
        assert {subject.split(".")[2] for _, _, subject in violations(server)} <= {
            "STREAM",
            "CONSUMER",
        }


async def test_a_caller_who_vanishes_is_noticed(server: NatsServer, tmp_path: Path) -> None:
    async with running_command(tmp_path, *WORKER_OPTIONS, url=server.url) as worker:
        await worker.wait_ready()
        async with peer_of(server, "app-b") as caller:
            inbox = caller.broker.new_inbox()
            await caller.listen(inbox)
            await caller.say("inference", json.dumps(LONG).encode(), reply=inbox)
            await worker.until_stats(lambda stats: stats["requests"]["in_flight"], within_s=3)
        await worker.until_stats(lambda stats: not stats["requests"]["in_flight"], within_s=3)
        assert await outcomes(worker) == {"CANCELLED": 1}
    assert violations(server) == []


async def test_ask_uses_the_login_and_the_inboxes_of_the_account(
    server: NatsServer, tmp_path: Path
) -> None:
    async with running_command(tmp_path, *WORKER_OPTIONS, url=server.url) as worker:
        await worker.wait_ready()
        ask = (
            *("ask", "hi", "--url", server.url, "--max-tokens", "2"),
            *("--set", "nats.user=app-b", "--set", "nats.password=secret-app-b"),
        )
        allowed = await command(*ask, "--inbox-prefix", "_INBOX.app-b")
        assert allowed.returncode == 0, allowed.stderr
        assert violations(server) == []
        elsewhere = await command(*ask, "--inbox-prefix", "_INBOX.app-a", "--timeout", "0.3")
    assert elsewhere.returncode == 78
    assert b"_INBOX.app-a" in elsewhere.stderr
    (refused,) = violations(server)
    assert refused[:2] == ("Subscription", "app-b")
    assert refused[2].startswith("_INBOX.app-a.")


async def test_nobody_does_what_is_not_theirs(server: NatsServer, tmp_path: Path) -> None:
    async with running_command(tmp_path, *WORKER_OPTIONS, url=server.url) as worker:
        await worker.wait_ready()
        async with client_of(server, "operator") as operator:
            with pytest.raises(RequestTimeout):
                await operator.complete({"prompt": "x", "timeout_ms": 100})
        async with (
            client_of(server, "app-a") as owner,
            peer_of(server, "app-b") as stranger,
            owner.ask({**LONG, "max_tokens": 50, "request_id": "known"}) as answer,
        ):
            await anext(answer)
            for subject in ("_INBOX.>", "_INBOX.app-a.>", "inference", "inference.>"):
                with pytest.raises(ConfigError):
                    await stranger.listen(subject)
            await stranger.say("inference.cancel", b'{"request_id": "known"}')
            await stranger.say("inference.w1.ctl.known", b"cancel")
            await stranger.say("inference.w1", b'{"prompt": "x"}', reply="_INBOX.app-b.x")
            await stranger.say("_INBOX.app-a.x", b"not from a worker")
            assert len((await answer.text()).split()) == 50
        assert not any(stranger.received.values())
        assert await outcomes(worker) == {"ok": 1}
    assert violations(server) == [
        ("Publish", "operator", "inference"),
        ("Publish", "operator", "inference.cancel"),
        ("Subscription", "app-b", "_INBOX.>"),
        ("Subscription", "app-b", "_INBOX.app-a.>"),
        ("Subscription", "app-b", "inference"),
        ("Subscription", "app-b", "inference.>"),
        ("Publish", "app-b", "inference.cancel"),
        ("Publish", "app-b", "inference.w1.ctl.known"),
        ("Publish", "app-b", "inference.w1"),
        ("Publish", "app-b", "_INBOX.app-a.x"),
    ]


async def test_subjects_that_are_patterns_reach_nobodys_requests(
    server: NatsServer, tmp_path: Path
) -> None:
    """By an account that may publish below `inference.`, and may cancel what it knows the id of."""
    async with running_command(tmp_path, *WORKER_OPTIONS, url=server.url) as worker:
        await worker.wait_ready()
        async with (
            client_of(server, "app-b") as owner,
            peer_of(server, "app-a") as stranger,
            owner.ask({**LONG, "max_tokens": 50}) as answer,
        ):
            await anext(answer)
            for subject in (
                "inference.*",
                "inference.>",
                "inference.w1.ctl.*",
                "inference.*.ctl.>",
            ):
                await stranger.say(subject, b"cancel")
            for named in ("*", ">", answer.request_id[:-1], answer.request_id + "0", ""):
                await stranger.say("inference.cancel", json.dumps({"request_id": named}).encode())
            for reply in ("_INBOX.>", "_INBOX.app-b.*", "_INBOX.*.x", "inference.w1.ctl.x"):
                await stranger.say("inference", b'{"prompt": "x"}', reply=reply)
            assert len((await answer.text()).split()) == 50
        assert await outcomes(worker) == {"ok": 1}


async def test_whoever_has_used_an_id_may_cancel_the_next_request_with_it(
    server: NatsServer, tmp_path: Path
) -> None:
    """What the documentation warns of: an id that others know beforehand protects nothing."""
    async with running_command(tmp_path, *WORKER_OPTIONS, url=server.url) as worker:
        await worker.wait_ready()
        async with client_of(server, "app-a") as owner, peer_of(server, "app-b") as stranger:
            inbox = stranger.broker.new_inbox()
            received = await stranger.listen(inbox)
            known = {"prompt": "x", "max_tokens": 1, "request_id": "nightly"}
            await stranger.say("inference", json.dumps(known).encode(), reply=inbox)

            async def answered() -> bool:
                return bool(received)

            await until(answered, within_s=5)
            async with owner.ask({**LONG, "request_id": "nightly"}) as answer:
                await anext(answer)
                await stranger.say("inference.w1.ctl.nightly", b"cancel")
                with pytest.raises(RequestCancelled):
                    await answer.text()
    assert violations(server) == []


async def test_a_controller_knows_the_workers_and_asks_them(
    server: NatsServer, tmp_path: Path
) -> None:
    both = ("--set", "nats.dialects=[native, mlx-serving]")
    async with (
        peer_of(server, "controller") as peer,
        running_controller(peer.broker, wall_clock=time.time) as controller,
        running_command(tmp_path, *WORKER_OPTIONS, *both, url=server.url) as worker,
    ):
        await worker.wait_ready()
        await controller.until(lambda: bool(controller.members))
        assert (await controller.ask(maxTokens=0)).last["type"] == "error"
        running = await controller.begin(maxTokens=1000)
        await wait_until(lambda: len(running.messages) > 2)
        worker.process.send_signal(signal.SIGTERM)
        await controller.until(lambda: not controller.members)
    assert violations(server) == []
