"""`/v1/files` and `/v1/batches` of a gateway, before a queue whose worker has a script."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from msgspec.structs import replace
from openai.types import Batch, FileDeleted, FileObject
from support.batch_rig import (
    CHAT,
    MODEL,
    Http,
    ScriptedWorker,
    line,
    lines_of,
    open_queue,
    text_of,
)
from support.openai_types import check
from trio.testing import MockClock

from trio_worker.config import GatewayConfig, JetStreamConfig
from trio_worker.gateway import batch_store, batch_tasks
from trio_worker.gateway.serve import open_api
from trio_worker.simulated.broker import MemoryServer, open_memory_broker
from trio_worker.simulated.jetstream import MemoryJetStream

ENABLED = JetStreamConfig(enabled=True)


class World:
    def __init__(self) -> None:
        self.server = MemoryServer(random=random.Random(3))
        self.jetstream = MemoryJetStream(self.server)
        self.numbers = itertools.count()

    @asynccontextmanager
    async def queue(self, **more: Any) -> AsyncIterator[ScriptedWorker]:
        async with (
            open_memory_broker(self.server, name="worker") as broker,
            open_queue(broker, **more) as worker,
        ):
            yield worker

    @asynccontextmanager
    async def gateway(
        self, jetstream: JetStreamConfig | None = ENABLED, **config: Any
    ) -> AsyncIterator[Http]:
        async with (
            # By its name it is told where its answers come.
            open_memory_broker(self.server, name=f"gateway-{next(self.numbers)}") as broker,
            open_api(
                broker,
                replace(GatewayConfig(), **config),
                jetstream,
                wall_clock=lambda: 1_700_000_000 + trio.current_time(),
            ) as api,
        ):
            await trio.sleep(0.01)
            yield Http(api)


async def test_a_batch_is_done_and_its_files_are_as_openai_has_them(
    autojump_clock: MockClock,
) -> None:
    world = World()
    lines = [line("a"), line("b", "fail this"), line("c", temperature=0.5, max_tokens=9)]
    async with world.queue() as worker, world.gateway() as http:
        uploaded = await http.upload(text_of(lines))
        check(FileObject, uploaded.body)
        batch = await http.begin(text_of(lines), metadata={"night": "1"})
        assert batch["status"] == "validating"
        batch = await http.until_over(batch)
        check(Batch, json.dumps(batch))
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
        assert batch["metadata"] == {"night": "1"}
        assert batch["usage"]["total_tokens"] == 10
        answers = await http.lines(batch["output_file_id"])
        (failure,) = await http.lines(batch["error_file_id"])
        for key in ("output_file_id", "error_file_id"):
            told = await http.call("GET", f"/v1/files/{batch[key]}")
            check(FileObject, told.body)
    assert [each["custom_id"] for each in answers] == ["a", "c"]
    first = answers[0]
    assert first["error"] is None
    assert first["response"]["status_code"] == 200
    assert first["response"]["request_id"] == f"{batch['id']}-1"
    assert first["response"]["body"]["choices"][0]["message"]["content"].startswith("answer to")
    assert failure["custom_id"] == "b"
    assert failure["response"]["status_code"] == 400
    assert failure["response"]["body"]["error"]["code"] == "context_length_exceeded"
    request = worker.requests[f"{batch['id']}-3"]
    assert (request["temperature"], request["max_tokens"]) == (0.5, 9)
    assert (request["priority"], request["stream"], request["model"]) == ("low", False, MODEL)


async def test_a_file_with_wrong_lines_fails_its_batch_and_says_where(
    autojump_clock: MockClock,
) -> None:
    wrong = text_of([line("a"), line("a"), line("b", stream=True), line("c", temperatur=1)])
    world = World()
    async with world.queue() as worker, world.gateway() as http:
        batch = await http.until_over(await http.begin(wrong + b"nonsense\n"))
        check(Batch, json.dumps(batch))
        assert (await http.upload(b" \n\n")).status == 400, "an empty one is not even taken"
    assert batch["status"] == "failed"
    assert [each["line"] for each in batch["errors"]["data"]] == [2, 3, 4, 5]
    places = [each["param"] for each in batch["errors"]["data"]]
    assert places == ["custom_id", "body.stream", "body.temperatur", None]
    assert batch["output_file_id"] is batch["error_file_id"] is None
    assert not worker.runs, "nothing of a wrong file is done"


async def test_the_same_request_again_is_the_same_batch(autojump_clock: MockClock) -> None:
    world = World()
    async with world.queue() as worker, world.gateway() as http, world.gateway() as other:
        batch = await http.begin(text_of([line("a"), line("b")]))
        wanted = {
            "endpoint": CHAT,
            "completion_window": "24h",
            "input_file_id": batch["input_file_id"],
        }
        again = await other.said("POST", "/v1/batches", wanted)
        await other.until_over(again)
        late = await http.said("POST", "/v1/batches", wanted)
        different = await http.said("POST", "/v1/batches", {**wanted, "metadata": {"run": "2"}})
        await http.until_over(different)
    assert batch["id"] == again["id"] == late["id"] != different["id"]
    assert set(worker.runs.values()) == {1}
    assert len(worker.runs) == 4


async def test_a_gateway_that_goes_is_followed_by_another_and_nothing_is_run_twice(
    autojump_clock: MockClock,
) -> None:
    world = World()
    lines = [line(f"c{number}") for number in range(200)]
    async with world.queue(job_s=0.01, max_msgs=50) as worker:
        async with world.gateway() as first:
            batch = await first.begin(text_of(lines))
            await trio.sleep(1)
        assert 0 < len(worker.done) < 200, "it was in the middle of it"
        async with world.gateway() as second:
            told = await second.until_over(batch)
            answers = await second.lines(told["output_file_id"])
    assert told["request_counts"] == {"total": 200, "completed": 200, "failed": 0}
    assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in lines]
    assert set(worker.runs.values()) == {1}


async def test_a_gateway_that_dies_without_a_word_is_followed_by_another(
    autojump_clock: MockClock,
) -> None:
    world = World()
    lines = [line(f"c{number}") for number in range(200)]
    async with world.queue(job_s=0.01, max_msgs=50) as worker:
        with trio.CancelScope() as life:
            async with world.gateway() as first:
                batch = await first.begin(text_of(lines))
                await trio.sleep(0.5)
                first.api.broker.disconnect()  # type: ignore[attr-defined]
                life.cancel()
        began = trio.current_time()
        async with world.gateway() as second:
            told = await second.until_over(batch)
    assert told["request_counts"]["completed"] == 200
    assert trio.current_time() - began > batch_store.TASK_S / 2
    assert set(worker.runs.values()) == {1}


async def test_a_batch_waits_for_the_first_worker(autojump_clock: MockClock) -> None:
    world = World()
    async with world.gateway() as http:
        batch = await http.begin(text_of([line("a")]))
        await trio.sleep(1000)
        heard = await http.call("GET", f"/v1/batches/{batch['id']}")
        assert heard.status == 503
        assert b"the stream is missing" in heard.body, "no worker has ever been there to make it"
        async with world.queue():
            assert (await http.until_over(batch))["status"] == "completed"


async def test_a_batch_for_which_no_worker_comes_expires(autojump_clock: MockClock) -> None:
    world = World()
    async with world.gateway(replace(ENABLED, keep_results_s=100)) as http:
        batch = await http.begin(text_of([line("a")]))
        await trio.sleep(1000)
        async with world.queue() as worker:
            told = await http.until_over(batch)
            (failure,) = await http.lines(told["error_file_id"])
        await trio.sleep(60)
        assert not worker.runs
    assert told["status"] == "expired"
    assert failure["error"]["code"] == "batch_expired"


async def test_a_task_that_lasts_is_one_gateways_alone(autojump_clock: MockClock) -> None:
    world = World()
    lines = [line(f"c{number}") for number in range(60)]
    async with (
        world.queue(job_s=3.0, max_msgs=5),
        world.gateway() as first,
        world.gateway() as second,
    ):
        batch = await first.begin(text_of(lines))
        await trio.sleep(4 * batch_store.TASK_S)
        consumer = world.jetstream.streams["BATCHES"].consumers[batch_store.CONSUMER]
        (task,) = consumer.under_way.values()
        assert task.delivered == 1
        assert (await second.until_over(batch))["request_counts"]["completed"] == 60


async def test_a_batch_that_nobody_was_told_to_begin_is_begun_when_it_is_asked_for(
    autojump_clock: MockClock,
) -> None:
    world = World()
    async with world.queue(), world.gateway() as http:
        file = json.loads((await http.upload(text_of([line("a")]))).body)
        wanted = {
            "endpoint": CHAT,
            "completion_window": "24h",
            "input_file_id": file["id"],
        }
        # Whoever kept the batch has gone before it could tell anybody.
        world.jetstream.denied.add("batches.task.>")
        assert (await http.call("POST", "/v1/batches", wanted)).status == 503
        world.jetstream.denied.clear()
        await trio.sleep(60)
        (batch,) = (await http.said("GET", "/v1/batches"))["data"]
        assert batch["status"] == "validating"
        assert (await http.until_over(batch))["status"] == "completed"


async def test_a_cancelled_batch_leaves_the_queue(autojump_clock: MockClock) -> None:
    world = World()
    lines = [line(f"c{number}") for number in range(200)]
    async with world.queue(job_s=0.5) as worker, world.gateway() as http:
        batch = await http.begin(text_of(lines))
        await trio.sleep(10)
        other = await http.begin(text_of([line("x"), line("y")]))
        await trio.sleep(1)
        told = await http.said("POST", f"/v1/batches/{batch['id']}/cancel")
        assert told["status"] == "cancelling"
        told = await http.until_over(batch)
        await trio.sleep(2)
        (late,) = (await http.said("GET", "/v1/batches?limit=1&after=" + other["id"]))["data"]
        answers = await http.lines(late["output_file_id"])
        failures = await http.lines(late["error_file_id"])
        await trio.sleep(300)
        assert len(worker.runs) <= len(answers) + 4
        heard = await http.call("POST", f"/v1/batches/{batch['id']}/cancel")
        assert heard.status == 409
        told_other = await http.until_over(other)
    check(Batch, json.dumps(told))
    assert told["status"] == "cancelled"
    assert 10 < len(answers) < 60
    assert len(answers) + len(failures) == 200
    assert late["request_counts"]["completed"] == len(answers)
    assert {each["error"]["code"] for each in failures} == {"batch_cancelled"}
    assert told_other["status"] == "completed"
    assert told_other["request_counts"]["completed"] == 2, "nothing of others is taken out"


async def test_a_batch_is_cancelled_while_it_is_put_into_the_queue(
    autojump_clock: MockClock,
) -> None:
    world = World()
    lines = [line(f"c{number}") for number in range(200)]
    async with world.queue(job_s=2.0, max_msgs=20) as worker, world.gateway() as http:
        batch = await http.begin(text_of(lines))
        await trio.sleep(10)
        await http.said("POST", f"/v1/batches/{batch['id']}/cancel")
        with trio.fail_after(30):
            told = await http.until_over(batch)
        assert told["status"] == "cancelled"
        in_queue = world.jetstream.streams["INFERENCE"].messages
        assert len(in_queue) <= 1, "but for what runs"
        runs = worker.runs.total()
        await trio.sleep(200)
        assert worker.runs.total() <= runs + 1, "nothing is put there any more"
        file = {"input_file_id": batch["input_file_id"]}
        wanted = {"endpoint": CHAT, "completion_window": "24h", **file}
        again = await http.said("POST", "/v1/batches", wanted)
        assert again["id"] != batch["id"], "what was cancelled may be asked for again"
        assert again["status"] == "validating"


async def test_nothing_of_a_batch_is_done_that_was_cancelled_before(
    autojump_clock: MockClock,
) -> None:
    world = World()
    async with world.queue() as worker, world.gateway() as http:
        # Until now no gateway is given anything to do.
        world.jetstream.denied.add("$JS.API.CONSUMER.MSG.NEXT.BATCHES.*")
        await trio.sleep(60)
        batch = await http.begin(text_of([line("a")]))
        await http.said("POST", f"/v1/batches/{batch['id']}/cancel")
        world.jetstream.denied.clear()
        told = await http.until_over(batch)
        (failure,) = await http.lines(told["error_file_id"])
    assert told["status"] == "cancelled"
    assert failure["error"]["code"] == "batch_cancelled"
    assert not worker.runs


async def test_what_is_not_done_in_time_expires(autojump_clock: MockClock) -> None:
    world = World()
    config = replace(ENABLED, keep_results_s=100)
    lines = [line(f"c{number}") for number in range(150)]
    async with world.queue(job_s=1.0) as worker, world.gateway(config) as http:
        batch = await http.begin(text_of(lines))
        assert batch["expires_at"] == batch["created_at"] + 100
        told = await http.until_over(batch)
        failures = await http.lines(told["error_file_id"])
        await trio.sleep(300)
        runs = len(worker.runs)
    assert told["status"] == "expired"
    assert {each["error"]["code"] for each in failures} == {"batch_expired"}
    assert runs <= 103, "what waits leaves the queue with its batch"


async def test_a_key_sees_its_own_alone(autojump_clock: MockClock, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    names = ("anna", "ben")
    keys.write_text(
        "".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n" for name in names)
    )
    world = World()
    async with world.queue() as worker, world.gateway(keys_file=str(keys)) as http:
        anna = Http(http.api, {"Authorization": "Bearer anna"})
        ben = Http(http.api, {"Authorization": "Bearer ben"})
        batch = await anna.until_over(await anna.begin(text_of([line("a")])))
        for path in (
            f"/v1/batches/{batch['id']}",
            f"/v1/files/{batch['input_file_id']}",
            f"/v1/files/{batch['input_file_id']}/content",
            f"/v1/files/{batch['output_file_id']}",
            f"/v1/files/{batch['output_file_id']}/content",
            "/v1/files/file-.>.*",
        ):
            heard = await ben.call("GET", path)
            assert heard.status == 404, path
            assert json.loads(heard.body)["error"]["code"] == "no_such_object"
        wanted = {"endpoint": CHAT, "completion_window": "24h"}
        wanted["input_file_id"] = batch["input_file_id"]
        assert (await ben.call("POST", "/v1/batches", wanted)).status == 404
        assert (await ben.call("DELETE", f"/v1/files/{batch['input_file_id']}")).status == 404
        assert (await ben.said("GET", "/v1/files"))["data"] == []
        assert (await ben.said("GET", "/v1/batches"))["data"] == []
        assert (await http.call("GET", "/v1/batches")).status == 401
        listed = await anna.said("GET", "/v1/files")
        assert {each["purpose"] for each in listed["data"]} == {"batch", "batch_output"}
    assert worker.requests[f"{batch['id']}-1"]["caller"] == "anna"


async def test_lists_come_in_pages(autojump_clock: MockClock) -> None:
    world = World()
    async with world.queue(), world.gateway() as http:
        ids = []
        for number in range(5):
            ids.append((await http.begin(text_of([line(f"a{number}")])))["id"])
            await trio.sleep(2)
        first = await http.said("GET", "/v1/batches?limit=2")
        rest = await http.said("GET", f"/v1/batches?limit=4&after={first['last_id']}")
        files = await http.said("GET", "/v1/files?order=asc&purpose=batch&limit=10000")
        assert (await http.call("GET", "/v1/batches?limit=101")).status == 400
    assert [each["id"] for each in (*first["data"], *rest["data"])] == ids[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert first["data"][0]["status"] == "completed"
    assert len(files["data"]) == 5


async def test_a_file_comes_back_as_it_was_sent_until_it_is_deleted(
    autojump_clock: MockClock,
) -> None:
    content = random.Random(5).randbytes(3 * batch_store.PART_BYTES + 17)
    world = World()
    async with world.queue(), world.gateway(max_file_bytes=len(content) + 1000) as http:
        told = json.loads((await http.upload(content)).body)
        assert (told["bytes"], told["filename"]) == (len(content), "my.jsonl")
        heard = await http.call("GET", f"/v1/files/{told['id']}/content")
        assert heard.body == content
        deleted = await http.call("DELETE", f"/v1/files/{told['id']}")
        check(FileDeleted, deleted.body)
        assert (await http.call("GET", f"/v1/files/{told['id']}")).status == 404
        assert not world.jetstream.streams["BATCHES"].messages, "and its parts are gone, too"
        heard = await http.upload(content + b"x" * 1000)
        assert heard.status == 413
        assert (await http.upload(b"{}", purpose="fine-tune")).status == 400


async def test_without_jetstream_it_says_what_to_enable(autojump_clock: MockClock) -> None:
    world = World()
    async with world.gateway(None) as http:
        heard = await http.call("GET", "/v1/batches")
        assert heard.status == 501
        assert "cluster.nats.jetstream.enabled" in json.loads(heard.body)["error"]["message"]
        assert heard.headers["x-should-retry"] == "false"
    world.jetstream.is_on = False
    async with world.gateway() as http:
        heard = await http.call("GET", "/v1/batches")
        assert heard.status == 503
        assert "JetStream" in json.loads(heard.body)["error"]["message"]
        assert (await http.call("GET", "/v1/models")).status == 200


async def test_a_page_of_another_origin_may_not_send_files(autojump_clock: MockClock) -> None:
    world = World()
    async with world.queue(), world.gateway() as http:
        foreign = Http(http.api, {"Origin": "https://elsewhere.example"})
        assert (await foreign.upload(b"{}\n")).status == 403
        own = Http(http.api, {"Origin": "http://localhost"})
        assert (await own.upload(b"{}\n")).status == 200


async def test_a_request_for_a_batch_that_is_wrong_says_where(autojump_clock: MockClock) -> None:
    world = World()
    async with world.queue(), world.gateway() as http:
        file = json.loads((await http.upload(b"{}\n")).body)
        right = {
            "endpoint": CHAT,
            "completion_window": "24h",
            "input_file_id": file["id"],
        }
        for change, field in (
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": {"a": 1}}, "metadata"),
        ):
            heard = await http.call("POST", "/v1/batches", {**right, **change})
            assert heard.status == 400
            assert str(json.loads(heard.body)["error"]["param"]).startswith(field)
        heard = await http.call("POST", "/v1/batches", right, headers={"X-Priority": "soon"})
        assert heard.status == 400
        assert (await http.call("GET", "/v1/files/a/b")).status == 404
        assert (await http.call("PUT", "/v1/batches")).status == 405


def test_constants_agree() -> None:
    """A task is said to be worked on well before it would be given to somebody else."""
    assert batch_tasks.AGAIN_S < batch_store.TASK_S / 2
    assert lines_of(text_of([line("a")])) == [line("a")]
