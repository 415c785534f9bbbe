"""The gateway beside a worker: it comes back when it dies, drains with the worker, and goes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
import trio
from support.commands import alive
from support.log_records import logged, texts
from support.ports import free_port
from trio_util import AsyncValue

from trio_worker.errors import ConfigError
from trio_worker.supervisor import gateway_process
from trio_worker.supervisor.gateway_process import GatewayProcess, GatewaySettings

pytestmark = pytest.mark.process

PATIENCE_S = 20.0
STAND_IN = """
import json, os, select, signal, socket, sys, time

def say(message, level="info"):
    print(json.dumps({"level": level, "message": message}), file=sys.stderr, flush=True)

how = sys.stdin.buffer.readline().decode().strip()
listener = socket.socket(fileno=int(sys.argv[sys.argv.index("--listen-fd") + 1]))
stops = 0

def stop(number, frame):
    global stops
    stops += 1
    say(f"stop {stops}")
    if how == "serve" or (how == "slow" and stops == 2):
        os._exit(0)

signal.signal(signal.SIGTERM, stop)
if how == "die":
    os._exit(3)
say("serving")
while True:
    # Like the worker's, which it is, it does not block.
    select.select([listener], [], [])
    connection, _ = listener.accept()
    connection.sendall(str(os.getpid()).encode())
    connection.close()
"""
"""Tells its number to who connects. At a stop it ends at once, at the second one, or never."""


def make_gateway(how: str, *, port: int = 0, drain_timeout_s: float = 60.0) -> GatewayProcess:
    return GatewayProcess(
        GatewaySettings(
            host="127.0.0.1",
            port=port,
            drain_timeout_s=drain_timeout_s,
            hello=f"{how}\n".encode(),
            program=(sys.executable, "-c", STAND_IN),
        )
    )


async def pid_behind(gateway: GatewayProcess) -> int:
    """Of the process that answers."""
    assert gateway.address is not None
    port = int(gateway.address.rpartition(":")[2])
    with trio.fail_after(PATIENCE_S):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            return int((await stream.receive_some(100)).decode())


async def until_said(records: list[Any], text: str) -> None:
    with trio.fail_after(PATIENCE_S):
        while not any(text in each for each in texts(records)):  # noqa: ASYNC110 - nothing else tells
            await trio.sleep(0.01)


@asynccontextmanager
async def running(gateway: GatewayProcess) -> AsyncIterator[AsyncValue[int]]:
    """It must have ended within a time, once the block is left and it was asked to stop."""
    stops = AsyncValue(0)
    with trio.fail_after(2 * PATIENCE_S):
        async with gateway.running(stops):
            yield stops
            stops.value += 1


async def test_one_that_dies_is_started_again_at_the_same_address() -> None:
    with logged("INFO") as records:
        gateway = make_gateway("serve")
        async with running(gateway):
            address, first = gateway.address, await pid_behind(gateway)
            os.kill(first, signal.SIGKILL)
            # Who connects in between waits for the next one.
            second = await pid_behind(gateway)
            assert second != first
            assert gateway.address == address
            family = [psutil.Process(second)]
        assert not alive(family)
    assert gateway.address is None
    said = texts(records)
    assert said.count("gateway: serving") == 2
    assert "the gateway ended (killed by SIGKILL) and is started again" in said
    assert said[-1] == "gateway: stop 1"


async def test_one_that_dies_again_and_again_is_given_up_and_the_worker_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And callers are refused from then on, instead of waiting for ever."""
    monkeypatch.setattr(gateway_process, "BACKOFF_FIRST_S", 0.001)
    with logged("WARNING") as records:
        gateway = make_gateway("die")
        async with running(gateway):
            address = gateway.address
            assert address is not None
            await until_said(records, "it is not started again")
            assert not gateway.address
            with pytest.raises(OSError, match="connect"):
                await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2]))
    again = "the gateway ended (exit status 3) and is started again"
    assert texts(records).count(again) == gateway_process.MAX_RESTARTS


async def test_the_first_stop_has_it_drain_and_the_second_one_cuts_that_short() -> None:
    """Nobody can connect meanwhile, though the worker goes on until it has ended."""
    with logged("INFO") as records:
        gateway, stops = make_gateway("slow"), AsyncValue(0)
        with trio.fail_after(PATIENCE_S):
            async with gateway.running(stops):
                await pid_behind(gateway)
                stops.value = 1
                await until_said(records, "stop 1")
                assert gateway.address is None
                stops.value = 2
    assert texts(records) == ["gateway: serving", "gateway: stop 1", "gateway: stop 2"]


async def test_one_that_does_not_end_in_time_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_process, "CLOSING_S", 0.1)
    with logged("WARNING") as records:
        gateway = make_gateway("never", drain_timeout_s=0.1)
        async with running(gateway):
            family = [psutil.Process(await pid_behind(gateway))]
        assert not alive(family)
    assert texts(records) == ["the gateway did not end in time and is killed"]


async def test_when_the_worker_ends_by_a_fault_it_is_killed_at_once() -> None:
    family = []
    gateway, stops = make_gateway("never"), AsyncValue(0)
    with trio.fail_after(PATIENCE_S), pytest.raises(ZeroDivisionError):
        async with gateway.running(stops):
            family.append(psutil.Process(await pid_behind(gateway)))
            raise ZeroDivisionError
    assert not alive(family)


async def test_a_port_that_is_taken_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of one configuration: the second one takes over when the first one ends."""
    monkeypatch.setattr(gateway_process, "PORT_RETRY_S", 0.01)
    port = free_port()
    with logged("WARNING") as records:
        (first,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
        gateway = make_gateway("serve", port=port)
        async with running(gateway):
            assert not gateway.address
            await first.aclose()
            with trio.fail_after(PATIENCE_S):
                while gateway.address is None:  # noqa: ASYNC110 - nothing else tells
                    await trio.sleep(0.01)
            await pid_behind(gateway)
    (said,) = texts(records)
    assert said.startswith(f"cluster.gateway.port: {port} is taken on 127.0.0.1; choose another")
    assert said.endswith("Until it is free, this worker serves NATS only")


async def test_a_stop_ends_the_wait_for_a_port() -> None:
    port = free_port()
    (first,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with first, running(make_gateway("serve", port=port)) as stops:
        assert not stops.value


async def test_an_address_that_cannot_be_is_an_error_of_the_configuration() -> None:
    settings = GatewaySettings(host="203.0.113.1", port=0, drain_timeout_s=1.0, hello=b"\n")
    gateway = GatewayProcess(settings)
    with pytest.raises(ConfigError, match=r"cluster\.gateway\.host: cannot listen on"):
        async with gateway.running(AsyncValue(0)):
            pass


def test_what_a_child_is_told_is_not_shown() -> None:
    settings = GatewaySettings(host="h", port=1, drain_timeout_s=1.0, hello=b"a-password\n")
    assert "a-password" not in repr(settings)
