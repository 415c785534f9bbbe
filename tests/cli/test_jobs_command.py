"""`trio-worker jobs` and `ask --durable` as a person meets them: on a real nats-server."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.batch_rig import (
    MODEL,
    STREAMS,
    ScriptedWorker,
    answer,
    line,
    lines_of,
    open_queue,
    text_of,
)
from support.commands import THIS_TREE, clean_environment, command, until
from support.nats_fixtures import NatsServer, running_server

from trio_worker.core.priority import NAMES
from trio_worker.gateway.batch_queue import waiting_jobs
from trio_worker.jetstream import streams
from trio_worker.jetstream.client import JetStream, open_jetstream
from trio_worker.nats.broker import open_nats_broker

pytestmark = [pytest.mark.nats, pytest.mark.process]


@asynccontextmanager
async def queue(
    server: NatsServer, *, job_s: float | None = 0.0, **changes: object
) -> AsyncIterator[ScriptedWorker]:
    async with (
        open_nats_broker(server.url, name="worker") as broker,
        open_queue(broker, job_s=job_s, **changes) as worker,
    ):
        yield worker


async def jobs(
    server: NatsServer, action: str, *args: object
) -> subprocess.CompletedProcess[bytes]:
    return await command("jobs", action, *map(str, args), "--url", server.url)


async def started(server: NatsServer, *args: object) -> trio.Process:
    return await trio.lowlevel.open_process(
        [*THIS_TREE, *map(str, args), "--url", server.url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=clean_environment(),
    )


async def in_queue(js: JetStream) -> int:
    found = await waiting_jobs(js, STREAMS.jobs, [f"jobs.inference.{level}.>" for level in NAMES])
    assert found is not None
    return len(found)


def written(path: Path, lines: Sequence[dict[str, object]]) -> Path:
    path.write_bytes(text_of(lines))
    return path


async def test_a_file_is_submitted_and_its_answers_are_written(tmp_path: Path) -> None:
    file = written(
        tmp_path / "my.jsonl",
        [line("a"), line("b", "fail"), *(line(f"c{number}") for number in range(300))],
    )
    out = tmp_path / "out.jsonl"
    with running_server(jetstream=True) as server:
        async with queue(server) as worker:
            submitted = await jobs(server, "submit", file, "--caller", "anna")
            assert submitted.returncode == 0, submitted.stderr
            assert b"302 jobs" in submitted.stderr
            results = await jobs(server, "results", file, "-o", out)
            assert results.returncode == 1, "one of them has failed"
            assert b"302 of 302 requests" in results.stderr
            again = await jobs(server, "submit", file, "--caller", "anna")
            assert b"302 were there already" in again.stderr
            same = await jobs(server, "results", file)
            status = await jobs(server, "status", file)
            other = written(tmp_path / "other.jsonl", [line("slow"), line("waits")])
            worker.job_s = 60
            await jobs(server, "submit", other, "--priority", "high", "--caller", "anna")

            async def one_runs() -> bool:
                return len(worker.requests) == 303

            await until(one_runs, within_s=10)
            whole = await jobs(server, "status")
    answers, (failure,) = (
        lines_of(out.read_bytes()),
        lines_of((tmp_path / "out.errors.jsonl").read_bytes()),
    )
    assert {each["custom_id"] for each in answers} == {"a", *(f"c{n}" for n in range(300))}
    assert len(answers) == 301
    assert failure["custom_id"] == "b"
    assert failure["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert len(lines_of(same.stdout)) == 302, "without -o all go to standard output"
    assert set(worker.runs.values()) == {1}
    assert {each["caller"] for each in worker.requests.values()} == {"anna"}
    rows = dict(each.rsplit(maxsplit=1) for each in status.stdout.decode().splitlines()[1:])
    assert rows == {
        "answered": "301",
        "answered with an error": "1",
        "waiting or running": "0",
        "not in the queue": "0",
        "together": "302",
    }
    rows = dict(each.rsplit(maxsplit=1) for each in whole.stdout.decode().splitlines())
    assert {name: int(count) for name, count in rows.items() if count != "0"} == {
        "waiting, high": 1,
        "running, high": 1,
        "answered and kept": 302,
    }


async def test_a_submission_that_was_killed_goes_on_and_nothing_is_there_twice(
    tmp_path: Path,
) -> None:
    file = written(tmp_path / "my.jsonl", [line(f"c{number}") for number in range(1000)])
    # Without a memory for ids: what keeps from putting in twice is what is seen in the queue.
    forgetful = {"duplicate_window": 100_000_000}
    with running_server(jetstream=True) as server:
        async with (
            queue(server, job_s=None, max_msgs=400, **forgetful) as worker,
            open_jetstream(worker.js.broker) as js,
        ):
            process = await started(server, "jobs", "submit", file)

            async def is_full() -> bool:
                return (await js.stream_info(STREAMS.jobs)).state.messages == 400

            await until(is_full, within_s=30)
            process.kill()
            await process.wait()
            wider = streams.jobs_stream(STREAMS.jobs) | forgetful
            await js.request(f"$JS.API.STREAM.UPDATE.{STREAMS.jobs}", json.dumps(wider).encode())
            again = await jobs(server, "submit", file)
            assert again.returncode == 0, again.stderr
            assert b"(400 were there already)" in again.stderr
            assert (await js.stream_info(STREAMS.jobs)).state.messages == 1000
            assert await in_queue(js) == 1000


async def test_results_that_were_killed_go_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    file = written(tmp_path / "my.jsonl", [line(f"c{number}") for number in range(60)])
    out = tmp_path / "out.jsonl"
    with running_server(jetstream=True) as server:
        async with queue(server, job_s=None) as worker:
            await jobs(server, "submit", file)
            waiting = await waiting_jobs(worker.js, STREAMS.jobs, ["jobs.inference.>"])
            assert waiting is not None
            first, rest = [*waiting][:20], [*waiting][20:]
            for request_id in first:
                await answer(worker.js, request_id)
            process = await started(server, "jobs", "results", file, "-o", out)

            async def are_written() -> bool:
                return out.exists() and out.read_bytes().count(b"\n") == 20

            await until(are_written, within_s=30)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            before = out.read_bytes()
            out.write_bytes(before + b'{"id":"batch_req_half')
            for request_id in rest:
                await answer(worker.js, request_id)
            results = await jobs(server, "results", file, "-o", out)
            assert results.returncode == 0, results.stderr
    assert out.read_bytes().startswith(before)
    assert len(lines_of(out.read_bytes())) == 60
    assert len({each["custom_id"] for each in lines_of(out.read_bytes())}) == 60


async def test_submit_and_wait_is_one_command_also_while_the_queue_is_full(tmp_path: Path) -> None:
    file = written(tmp_path / "my.jsonl", [line(f"c{number}") for number in range(40)])
    with running_server(jetstream=True) as server:
        async with queue(server, job_s=0.02, max_msgs=30):
            done = await jobs(server, "submit", file, "--wait", "--priority", "high")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"The queue is full") == 1
    assert len(lines_of(done.stdout)) == 40


async def test_a_wrong_file_is_not_submitted_and_what_is_missing_is_named(tmp_path: Path) -> None:
    wrong = written(tmp_path / "wrong.jsonl", [line("a"), line("b", top_p="much")])
    right = written(tmp_path / "right.jsonl", [line("a")])
    with running_server(jetstream=True) as server, running_server() as bare:
        async with queue(server, job_s=None) as worker:
            refused = await jobs(server, "submit", wrong)
            assert refused.returncode == 1
            assert b"wrong.jsonl: line 2: top_p" in refused.stderr
            assert await in_queue(worker.js) == 0
            unknown = await jobs(server, "results", right)
            assert unknown.returncode == 1
            assert b"1 are neither answered nor in the queue" in unknown.stderr
            missing = await jobs(server, "submit", tmp_path / "none.jsonl")
            assert missing.returncode == 1
            assert b"none.jsonl cannot be read" in missing.stderr
            nobody = await jobs(server, "results", "a0b1")
            assert b"There is no job a0b1" in nobody.stderr
            nowhere = await jobs(server, "results", right, "-o", tmp_path / "none" / "out.jsonl")
            assert nowhere.returncode == 1
            assert b"out.jsonl cannot be written" in nowhere.stderr
            twice = await jobs(server, "submit", right, "--batch", "night-2")
            assert b"night-2" in twice.stderr
        off = await jobs(bare, "submit", right)
        assert off.returncode == 69
        assert b"JetStream is off" in off.stderr or b"no stream takes" in off.stderr, off.stderr


async def test_ask_durable_waits_for_its_answer_and_leaves_it_where_it_can_be_had(
    tmp_path: Path,
) -> None:
    asked = ("ask", "hello", "--durable", "--model", MODEL)
    with running_server(jetstream=True) as server:
        async with queue(server) as worker:
            answered = await command(
                *asked, "--caller", "anna", "--priority", "high", "--url", server.url
            )
            assert answered.returncode == 0, answered.stderr
            (request_id,) = worker.runs
            assert f"answer to {request_id}".encode() in answered.stdout
            assert worker.requests[request_id]["caller"] == "anna"
            again = await jobs(server, "results", request_id)
            assert again.stdout == answered.stdout
            failed = await command("ask", "fail", *asked[2:], "--url", server.url)
            assert failed.returncode == 1
            assert b"CONTEXT_LENGTH_EXCEEDED: too long" in failed.stderr
            as_json = await command(*asked, "--json", "--url", server.url)
            assert json.loads(as_json.stdout)["model"] == MODEL


async def test_a_durable_question_goes_on_when_its_command_is_interrupted() -> None:
    with running_server(jetstream=True) as server:
        async with queue(server, job_s=None) as worker:
            process = await started(server, "ask", "hello", "--durable", "--model", MODEL)

            async def is_there() -> bool:
                return await in_queue(worker.js) == 1

            await until(is_there, within_s=30)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert await in_queue(worker.js) == 1
            slow = await command(
                *("ask", "hello", "--durable", "--model", MODEL),
                *("--timeout", "0.5", "--url", server.url),
            )
            assert slow.returncode == 69
            assert b"the job goes on" in slow.stderr
            assert await in_queue(worker.js) == 2
