"""`trio-worker gateway`, and the gateway that `trio-worker run` brings along: real processes."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from support.commands import (
    alive,
    command,
    running_command,
    until,
)
from support.gateway_commands import address_in, ask, running_gateway
from support.nats_fixtures import NatsServer, private_server_fixture  # noqa: F401
from support.ports import free_port

pytestmark = pytest.mark.nats

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
SIMULATED = ("--engine", "simulated")


async def run_here(*command_line: str) -> str:
    """What it writes to standard output; an error of its is a failure."""
    with trio.fail_after(60):
        done = await trio.run_process(
            command_line, capture_stdout=True, capture_stderr=True, check=False
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


# --- by itself ------------------------------------------------------------------------------


async def test_a_gateway_by_itself_asks_the_workers_there_are_and_ends_at_a_signal(
    tmp_path: Path,
) -> None:
    async with (
        running_command(tmp_path, *SIMULATED) as worker,
        running_gateway(tmp_path, worker.url) as (process, log),
    ):
        await worker.wait_ready()
        address = await address_in(log)
        status, body = await ask(address)
        assert status == 200
        assert body["worker"]["id"] == "w1"
        process.send_signal(signal.SIGINT)
        with trio.fail_after(10):
            assert await process.wait() == 0


async def test_a_gateway_without_nats_ends_as_a_worker_does() -> None:
    ended = await command(
        *("gateway", "--url", f"nats://127.0.0.1:{free_port()}", "--port", "0"),
        *("--set", "nats.connect_timeout_ms=500"),
    )
    assert ended.returncode == 69
    assert b"127.0.0.1" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "cluster.gateway.host"),
        (["--port", "many"], "cluster.gateway.port"),
        (["--set", "gateway.keys_file=nowhere"], "gateway.keys_file"),
        (["--url", "http://x"], "cluster.nats.url"),
    ],
)
async def test_a_gateway_that_cannot_be_is_an_error_of_the_configuration(
    arguments: list[str], said: str
) -> None:
    ended = await command("gateway", *arguments)
    assert ended.returncode == 78
    assert said in ended.stderr.decode()


async def test_a_taken_port_ends_a_gateway_by_itself(
    private_server: NatsServer,
) -> None:
    (taken,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with taken:
        port = taken.socket.getsockname()[1]
        ended = await command("gateway", "--url", private_server.url, "--port", str(port))
    assert ended.returncode == 78
    assert f"cluster.gateway.port: {port} is taken" in ended.stderr.decode()


async def test_a_second_signal_cuts_the_drain_of_a_gateway_short(tmp_path: Path) -> None:
    async with (
        running_command(tmp_path, *SIMULATED) as worker,
        running_gateway(tmp_path, worker.url) as (process, log),
    ):
        await worker.wait_ready()
        address = await address_in(log)
        async with trio.open_nursery() as nursery:

            async def ask_much() -> None:
                with pytest.raises(OSError, match=r".*"):
                    await ask(address, max_tokens=4000)

            nursery.start_soon(ask_much)
            await worker.until_stats(lambda stats: stats["requests"]["in_flight"], within_s=10)
            process.send_signal(signal.SIGTERM)
            await until(lambda: _says(log, "Draining"), within_s=5)
            process.send_signal(signal.SIGTERM)
            with trio.fail_after(10):
                assert await process.wait() == 0
        # The caller is gone, and so is what was computed for it.
        await worker.until_stats(lambda stats: not stats["requests"]["in_flight"], within_s=5)


# --- beside a worker ------------------------------------------------------------------------


@needs_curl
async def test_what_the_hello_says_about_http_works_as_printed(tmp_path: Path) -> None:
    async with running_command(
        tmp_path, *SIMULATED, "--hello", "--set", "gateway.port=0"
    ) as worker:
        await until(lambda: _says(worker.log, "Ctrl-C stops the worker"), within_s=60)
        said = worker.log.read_text()
        address = await address_in(worker.log)
        (curl,) = [line for line in said.splitlines() if line.startswith("  curl ")]
        assert json.loads(await run_here(*shlex.split(curl), "-s"))["choices"]
        snippet = said[said.index("  from openai") :].split("\n\n")[0].replace("\n  ", "\n").strip()
        assert address in snippet
        assert len(snippet.splitlines()) == 3
        assert await run_here(sys.executable, "-c", snippet)
        # Nothing of it is on a command line.
        assert worker.child("trio_worker.gateway").cmdline()[-2] == "--listen-fd"


@needs_curl
async def test_with_keys_the_hello_says_so_and_a_call_without_one_is_refused(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"app {hashlib.sha256(b'secret').hexdigest()}\n")
    overrides = ("--set", "gateway.port=0", "--set", f"gateway.keys_file={keys}")
    async with running_command(tmp_path, *SIMULATED, "--hello", *overrides) as worker:
        await until(lambda: _says(worker.log, "Ctrl-C stops the worker"), within_s=60)
        said = worker.log.read_text()
        assert f"one whose hash is in {keys}" in said
        (curl,) = [line for line in said.splitlines() if line.startswith("  curl ")]
        asked = curl.replace("$KEY", "secret")
        assert json.loads(await run_here(*shlex.split(asked), "-s"))["choices"]
        assert (await ask(await address_in(worker.log)))[0] == 401


async def test_a_wrong_file_of_keys_ends_run_before_it_starts_anything(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("app secret\n")
    ended = await command(
        "run", *SIMULATED, "--set", "gateway.port=0", "--set", f"gateway.keys_file={keys}"
    )
    assert ended.returncode == 78
    assert b"gateway.keys_file, line 1" in ended.stderr
    assert b"secret" not in ended.stderr


async def test_a_worker_whose_gateway_has_no_port_serves_nats_and_says_how_to_choose_one(
    tmp_path: Path,
) -> None:
    (taken,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with taken:
        port = taken.socket.getsockname()[1]
        async with running_command(
            tmp_path, *SIMULATED, "--hello", "--set", f"gateway.port={port}"
        ) as worker:
            await worker.wait_ready()
            await until(lambda: _says(worker.log, "--set gateway.port="), within_s=20)
            assert (await command("ask", "hi", "--url", worker.url)).returncode == 0
    assert f"cluster.gateway.port: {port} is taken" in worker.log.read_text()


async def test_a_gateway_that_is_killed_comes_back_and_the_worker_goes_on(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED, "--set", "gateway.port=0") as worker:
        await worker.wait_ready()
        address = await address_in(worker.log)
        worker.child("trio_worker.gateway").kill()
        assert await address_in(worker.log, count=2) == address
        assert (await ask(address))[0] == 200
        assert worker.process.poll() is None


async def test_at_a_stop_what_the_gateway_has_under_way_gets_its_answer(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED, "--set", "gateway.port=0") as worker:
        await worker.wait_ready()
        address = await address_in(worker.log)
        async with trio.open_nursery() as nursery:
            answers: list[tuple[int, Any]] = []

            async def ask_for_two_seconds() -> None:
                answers.append(await ask(address, max_tokens=100))

            nursery.start_soon(ask_for_two_seconds)
            await worker.until_stats(lambda stats: stats["batch"]["running"], within_s=10)
            family = worker.children()
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.wait_exit(20) == 0
        assert not alive(family)
    ((status, body),) = answers
    assert status == 200
    assert body["usage"]["completion_tokens"] == 100


async def test_a_worker_that_is_killed_leaves_no_gateway_behind(tmp_path: Path) -> None:
    async with running_command(tmp_path, *SIMULATED, "--set", "gateway.port=0") as worker:
        await worker.wait_ready()
        await address_in(worker.log)
        family = worker.children()
        assert worker.child("trio_worker.gateway") in family
        worker.process.kill()
        await worker.wait_exit(5)

        async def are_gone() -> bool:
            return not alive(family)

        await until(are_gone, within_s=10)


async def _says(log: Path, text: str) -> bool:
    await trio.lowlevel.checkpoint()
    return text in log.read_text()
