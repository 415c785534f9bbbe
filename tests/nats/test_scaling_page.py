"""The files for nats-server in docs/scaling.md: what the page says of them holds."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import RunningCommand, command, running_command, until
from support.nats_fixtures import NatsServer, running_server
from support.paths import DOCS
from support.ports import free_port

from trio_worker.client import Client, open_client
from trio_worker.nats.broker import open_nats_broker
from trio_worker.ports import Message

pytestmark = pytest.mark.nats

FILES = re.findall(r"```conf\n(.*?)```", (DOCS / "scaling.md").read_text("utf-8"), re.DOTALL)
ALONE, CENTRE, SITE = FILES
SETTINGS = ("--engine", "simulated", "--set", "nats.embedded=never")
LONG = "why " * 400


@pytest.fixture(name="alone")
def alone_fixture(tmp_path: Path) -> Iterator[NatsServer]:
    text = ALONE.replace("/var/lib/nats", str(tmp_path / "streams"))
    assert text != ALONE
    with running_server(config=text) as server:
        yield server


async def test_the_server_takes_the_file_and_has_jetstream(alone: NatsServer) -> None:
    answers: list[Message] = []
    async with open_nats_broker(alone.url, name="test") as broker:
        assert broker.max_payload == 2**20
        inbox = broker.new_inbox()
        await broker.subscribe(inbox, answers.append)
        broker.publish(Message(subject="$JS.API.INFO", reply=inbox))

        async def came() -> bool:
            return bool(answers)

        await until(came, within_s=5)
    assert json.loads(answers[0].body)["type"] == "io.nats.jetstream.api.v1.account_info_response"


# --- a site with a leaf node -------------------------------------------------------------------


@dataclass
class Sites:
    site: NatsServer
    far: RunningCommand
    near: RunningCommand
    client: Client
    """At the site."""

    async def who_serves(self, count: int, *, prompt: str) -> Counter[str]:
        """The workers that serve so many requests, one after the other, no two alike."""
        found: Counter[str] = Counter()
        for number in range(count):
            messages = [{"role": "user", "content": f"{number} {prompt}"}]
            chunk = await self.client.complete({"messages": messages, "max_tokens": 2})
            assert chunk.worker is not None
            found[chunk.worker["id"]] += 1
        return found


@asynccontextmanager
async def two_sites(tmp_path: Path) -> AsyncIterator[Sites]:
    """A worker at the centre, one at the site, and a caller there; each has heard of the other."""
    port = free_port()
    centre_file = CENTRE.replace("0.0.0.0:7422", f"127.0.0.1:{port}")
    site_file = SITE.replace("nats.example:7422", f"127.0.0.1:{port}")
    assert centre_file != CENTRE
    assert site_file != SITE
    with running_server(config=centre_file) as centre, running_server(config=site_file) as site:
        async with (
            running_command(tmp_path, *SETTINGS, url=centre.url) as far,
            running_command(tmp_path, *SETTINGS, "--set", "worker.id=w2", url=site.url) as near,
            open_client(site.url) as client,
        ):
            for worker in (far, near):
                await worker.wait_ready()
                await worker.until_stats(lambda stats: stats["fleet"]["others"] == 1, within_s=10)
            yield Sites(site, far, near, client)


async def test_short_requests_stay_at_the_site_and_long_ones_go_where_they_are_known(
    tmp_path: Path,
) -> None:
    async with two_sites(tmp_path) as sites:
        assert await sites.who_serves(10, prompt="why") == {"w2": 10}
        assert (await sites.who_serves(20, prompt=LONG)).keys() == {"w1", "w2"}
        seen = await command("fleet", "--json", "--url", sites.site.url)
        ids = [json.loads(line)["id"] for line in seen.stdout.splitlines()]
        assert ids == ["w1", "w2"]


async def test_a_site_without_a_worker_of_its_own_is_served_from_the_centre(
    tmp_path: Path,
) -> None:
    async with two_sites(tmp_path) as sites:
        sites.near.process.send_signal(signal.SIGTERM)
        assert await sites.near.wait_exit(20) == 0
        assert await sites.who_serves(10, prompt="why") == {"w1": 10}


async def test_what_was_handed_to_a_worker_beyond_the_leaf_that_was_killed_comes_back(
    tmp_path: Path,
) -> None:
    """The server's word that nobody listens crosses the leaf, too: nothing waits for a deadline."""
    async with two_sites(tmp_path) as sites:
        assert (await sites.who_serves(20, prompt=LONG)).keys() == {"w1", "w2"}
        sites.far.process.kill()
        await sites.far.wait_exit(5)
        assert await sites.who_serves(20, prompt=LONG) == {"w2": 20}
