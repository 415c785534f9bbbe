"""The fleet for real: nats-server, three workers as processes, two gateways on loopback."""

from __future__ import annotations

import json
import signal
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from support.commands import RunningCommand, running_command, until
from support.gateway_loopback import Door, open_door
from support.gateway_rig import events, say, send, text_of
from support.http_calls import Heard
from support.nats_fixtures import NatsServer, private_server_fixture  # noqa: F401 - a fixture

from trio_worker.gateway.forward import SILENT_S
from trio_worker.nats.broker import open_nats_broker

pytestmark = [pytest.mark.nats, pytest.mark.process, pytest.mark.thorough]

STREAMS, WHOLE = 64, 16
TOKENS = 100
SETTINGS = (
    *("--engine", "simulated", "--set", "nats.embedded=never"),
    *("--set", "worker.continuous_batching.max_batch_size=32"),
    *("--set", "worker.simulated.turn_ms=40", "--set", "worker.drain_timeout_ms=1000"),
)


def question(number: int, *, stream: bool) -> dict[str, Any]:
    return say(f"question {number}", max_tokens=TOKENS, timeout_ms=120_000, stream=stream)


def ending_of(heard: Heard, expected: str, *, stream: bool) -> str:
    """How a request has ended; what it was told of its answer has to be true."""
    if heard.status != 200:
        return f"{heard.status} {json.loads(heard.body)['error']['code']}"
    if not stream:
        assert text_of_whole(heard) == expected
        return "whole"
    said = events(heard.body)
    if said[-1] == "[DONE]":
        assert text_of(said) == expected
        return "whole"
    error = said.pop()["error"]
    assert expected.startswith(text_of(said))
    return f"broken {error['code']}"


def text_of_whole(heard: Heard) -> str:
    return str(json.loads(heard.body)["choices"][0]["message"]["content"])


async def test_one_worker_is_killed_and_one_stops_under_64_streams(
    private_server: NatsServer, tmp_path: Path
) -> None:
    endings: Counter[tuple[str, str]] = Counter()
    async with AsyncExitStack() as stack:
        workers: list[RunningCommand] = []
        for name in ("killed", "stopped", "stays"):
            command = running_command(
                tmp_path, *SETTINGS, "--set", f"worker.id={name}", url=private_server.url
            )
            workers.append(await stack.enter_async_context(command))
        for worker in workers:
            await worker.wait_ready()
        killed, stopped, stays = workers
        doors: list[Door] = []
        for number in range(2):
            broker = await stack.enter_async_context(
                open_nats_broker(private_server.url, name=f"gateway-{number}")
            )
            doors.append(await stack.enter_async_context(open_door(broker)))
        texts = await learn(doors[0])

        has_begun: set[int] = set()
        many_have_begun = trio.Event()

        async def call(number: int) -> None:
            stream = number < STREAMS
            caller = await doors[number % 2].connect()
            async with caller.stream:
                await send(caller, question(number, stream=stream), headers={"Connection": "close"})
                if await caller.wait_for(b'"content":"'):
                    has_begun.add(number)
                if len(has_begun) > 3 / 4 * STREAMS:
                    many_have_begun.set()
                heard = await caller.hear("POST")
            kind = "stream" if stream else "whole"
            endings[kind, ending_of(heard, texts[number], stream=stream)] += 1

        began_at = trio.current_time()
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for number in range(STREAMS + WHOLE):
                    nursery.start_soon(call, number)
                await many_have_begun.wait()
                killed.process.kill()
                stopped.process.send_signal(signal.SIGTERM)
                assert await stopped.wait_exit(20) == 0
        took_s = trio.current_time() - began_at

        async def is_at_rest() -> bool:
            in_flight = (await stays.stats())["requests"]["in_flight"]
            return not in_flight and all(door.is_at_rest for door in doors)

        await until(is_at_rest, within_s=5)
    told = f"{took_s:.1f} s: {dict(sorted(endings.items()))}"
    print(told)  # noqa: T201 - figures, with `-s`
    assert sum(endings.values()) == STREAMS + WHOLE
    assert endings["whole", "whole"] == WHOLE, told
    assert endings["stream", "whole"] > STREAMS / 8, told
    assert endings["stream", "broken internal"], "the killed worker had begun with some"
    assert endings["stream", "broken worker_draining"], "the stopped worker had begun with some"
    assert set(endings) <= {
        ("whole", "whole"),
        ("stream", "whole"),
        ("stream", "broken internal"),
        ("stream", "broken worker_draining"),
    }
    assert took_s > SILENT_S, told


async def learn(door: Door) -> list[str]:
    """What is said to every question when nothing is wrong."""
    texts = [""] * (STREAMS + WHOLE)
    busy = trio.CapacityLimiter(32)

    async def ask(number: int) -> None:
        async with busy:
            texts[number] = text_of_whole(await door.ask(question(number, stream=False)))

    async with trio.open_nursery() as nursery:
        for number in range(len(texts)):
            nursery.start_soon(ask, number)
    return texts
