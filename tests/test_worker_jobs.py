"""Durable jobs in whole workers, in virtual time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
import trio.lowlevel
from loguru import logger
from support.jobs_rig import JOBS_ON, open_jobs_world
from support.worker_rig import Rig, make_config

from trio_worker.core.jobs import seed_of
from trio_worker.errors import QueueFull
from trio_worker.jetstream import streams
from trio_worker.monitoring.snapshot import JobsReading
from trio_worker.ports import Message
from trio_worker.simulated.broker import MemoryBroker
from trio_worker.simulated.engine import Faults
from trio_worker.wire import native, subjects

MODEL = "smollm2-135m-instruct"
ONE_SLOT = "worker.continuous_batching.max_batch_size=1"
QUICK_LEASE = "nats.jetstream.ack_wait_ms=5000"


def jobs_of(rig: Rig) -> JobsReading:
    reading = rig.snapshot().jobs
    assert reading is not None
    return reading


def events(rig: Rig) -> dict[str, int]:
    return {what: count for what, count in jobs_of(rig).events.items() if count}


async def until_trouble(rig: Rig, *, is_there: bool = True) -> str:
    with trio.fail_after(120):
        while (jobs_of(rig).trouble is not None) is not is_there:  # noqa: ASYNC110
            await trio.sleep(0.1)
    return jobs_of(rig).trouble or ""


# --- what a job is answered ----------------------------------------------------------------


async def test_a_job_is_answered_once_and_is_gone(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker() as rig:
        await world.submit("j1", prompt="one", max_tokens=5, caller="me")
        answer = await world.result("j1")
        assert answer.code == "ok"
        assert len(answer.text.split()) == 5
        assert answer.worker_id == "w1"
        assert answer.stored.headers["Terminal"] == "done"
        assert answer.body["worker"]["priority"] == "high"
        await world.until_empty()
        await trio.sleep(60)
        assert [each.subject for each in world.heard] == ["answers.inference.j1"]
        assert events(rig) == {"taken": 1, "answered": 1}
        assert (jobs_of(rig).trouble, jobs_of(rig).beside) == (None, 0)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"max_tokens": 0}, "INVALID_REQUEST"),
        ({"stream": True}, "INVALID_REQUEST"),
        ({"model": "another"}, "MODEL_NOT_FOUND"),
        ({"max_tokens": 4000, "prompt": "x " * 6000}, "CONTEXT_LENGTH_EXCEEDED"),
        ({"prompt": "fail"}, "ENGINE_FAILED"),
        ({"max_tokens": 1000, "timeout_ms": 1000}, "REQUEST_TIMEOUT"),
    ],
)
async def test_an_error_of_the_jobs_own_is_its_answer(
    autojump_clock: object, fields: dict[str, Any], code: str
) -> None:
    faults = Faults(failing_words=frozenset({"fail"}))
    async with open_jobs_world() as world, world.worker(faults=faults) as rig:
        await world.submit("j1", **({"prompt": "x"} | fields))
        answer = await world.result("j1")
        assert answer.code == code
        assert answer.stored.headers["Terminal"] == "error"
        assert answer.stored.headers["Nats-Service-Error"].startswith(code)
        assert answer.stored.headers["Request-Id"] == "j1"
        await world.until_empty()
        assert events(rig) == {"taken": 1, "answered": 1}


async def test_what_is_no_request_is_answered_under_the_id_it_was_published_with(
    autojump_clock: object,
) -> None:
    subject = subjects.job(level="low", caller=None, model=MODEL)
    async with open_jobs_world() as world, world.worker():
        await world.submit_raw(b"{", subject, {"Nats-Msg-Id": "j1"})
        answer = await world.result("j1")
        assert answer.code == "INVALID_REQUEST"
        assert answer.stored.headers["Request-Id"] == "j1"


async def test_a_job_without_an_id_has_one_of_its_place_in_the_stream(
    autojump_clock: object,
) -> None:
    async with open_jobs_world() as world, world.worker():
        ack = await world.submit(None, prompt="x", max_tokens=2)
        await world.until_empty()
        (found,) = await world.results()
        assert found.subject.startswith(f"results.inference.INFERENCE-{ack.seq}-")


async def test_the_subject_says_how_urgent_it_is_and_who_asks(autojump_clock: object) -> None:
    log: list[str] = []
    sink = logger.add(log.append, level="DEBUG", format="{message}")
    try:
        async with open_jobs_world() as world, world.worker():
            await world.submit(
                "j1", level="low", caller="mallory", prompt="x", priority="high", user="alice"
            )
            answer = await world.result("j1")
            assert answer.body["worker"]["priority"] == "low"
            await world.submit("j2", level="low", prompt="x", user="alice")
            await world.result("j2")
    finally:
        logger.remove(sink)
    callers = [line.partition("caller ")[2].strip() for line in log if "caller " in line]
    assert callers == ["mallory", "alice"]


async def test_a_job_says_the_same_whoever_does_it(autojump_clock: object) -> None:
    texts = []
    for worker_id in ("w1", "w2"):
        async with open_jobs_world() as world, world.worker(worker_id=worker_id):
            await world.submit("j1", prompt="x", max_tokens=20, temperature=1.0)
            answer = await world.result("j1")
            assert answer.body["worker"]["seed"] == seed_of("j1")
            texts.append(answer.text)
    assert texts[0] == texts[1]


async def test_an_id_is_answered_once_however_often_it_is_asked(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker() as rig:
        await world.submit("j1", prompt="x", max_tokens=3)
        await world.result("j1")
        await world.submit("j1", prompt="something else", max_tokens=3)
        await world.until_empty()
        assert len(world.heard) == 1
        assert events(rig) == {"taken": 2, "answered": 1, "found answered": 1}


async def test_a_job_may_be_cancelled_while_it_runs(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker():
        await world.submit("j1", prompt="x", max_tokens=2000)
        await trio.sleep(1)
        world.broker.publish(Message(subject=subjects.CANCEL, body=native.cancel_by_id("j1")))
        assert (await world.result("j1")).code == "CANCELLED"
        await world.until_empty()


async def test_an_answer_that_is_too_large_for_the_server_says_so(autojump_clock: object) -> None:
    async with open_jobs_world(max_payload=12_000) as world, world.worker():
        await world.submit("j1", prompt="x", max_tokens=3000)
        answer = await world.result("j1")
        assert answer.code == "PAYLOAD_TOO_LARGE"
        await world.until_empty()


async def test_a_long_job_is_given_to_nobody_else(autojump_clock: object) -> None:
    async with (
        open_jobs_world() as world,
        world.worker(QUICK_LEASE) as first,
        world.worker(QUICK_LEASE, worker_id="w2") as second,
    ):
        await world.submit("j1", prompt="x", max_tokens=2000)  # 40 s
        await world.result("j1")
        await world.until_empty()
        assert events(first).get("taken", 0) + events(second).get("taken", 0) == 1
        assert not events(first).get("redelivered")
        assert not events(second).get("redelivered")


# --- which jobs are taken, and when --------------------------------------------------------


async def test_the_urgent_go_first_and_nobody_waits_for_ever(autojump_clock: object) -> None:
    async with open_jobs_world() as world:
        async with world.worker(ONE_SLOT):
            await trio.sleep(1)
            await world.submit("first", prompt="x", max_tokens=50)
            await trio.sleep(0.1)
            for number in range(40):
                await world.submit(f"low{number}", level="low", max_tokens=2)
                await world.submit(f"medium{number}", level="medium", max_tokens=2)
                await world.submit(f"high{number}", level="high", max_tokens=2)
            await world.until_empty()
        order = [each.subject.rpartition(".")[2] for each in world.heard]
    assert order[0] == "first"
    high = [place for place, name in enumerate(order) if name.startswith("high")]
    assert high[-1] <= 56, "six of eight are of the highest level"
    for level in ("medium", "low"):
        for number in range(4):
            assert order.index(f"{level}{number}") <= 8 * (number + 1) + 1
        # Within a level, who came first goes first.
        own = [name for name in order if name.startswith(level)]
        assert own == [f"{level}{number}" for number in range(40)]


async def test_what_comes_at_once_on_all_levels_is_given_back_but_for_one(
    autojump_clock: object,
) -> None:
    async with open_jobs_world() as world, world.worker(ONE_SLOT) as rig:
        await trio.sleep(1)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for level in ("low", "medium", "high"):
                nursery.start_soon(lambda level=level: world.submit(level, level=level))  # type: ignore[misc]
        await world.until_empty()
        assert trio.current_time() - began < 20, "nothing waits for its lease to run out"
        assert events(rig) == {"taken": 3, "given back": 2, "redelivered": 2, "answered": 3}


async def test_a_slot_that_is_taken_while_the_levels_are_asked_is_waited_for(
    autojump_clock: object,
) -> None:
    async with open_jobs_world() as world, world.worker(ONE_SLOT) as rig:
        await trio.sleep(1)
        world.server.delay_s = 0.2
        asked = trio.Event()

        def hear(message: Message) -> None:
            if b"no_wait" in message.body:
                asked.set()

        high = streams.consumer_name("high", MODEL)
        await world.broker.subscribe(f"$JS.API.CONSUMER.MSG.NEXT.INFERENCE.{high}", hear)
        async with trio.open_nursery() as nursery:
            await asked.wait()
            # It comes while a lower level is asked, and so does a job of the highest.
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=100))
            await trio.sleep(0.1)
            nursery.start_soon(lambda: world.submit("high"))
            await trio.sleep(1)
            assert rig.snapshot().requests.in_flight == 1
            assert events(rig) == {}
        await world.until_empty()


async def test_no_more_jobs_are_taken_than_there_are_slots(autojump_clock: object) -> None:
    async with (
        open_jobs_world() as world,
        world.worker("worker.continuous_batching.max_batch_size=3") as rig,
    ):
        for number in range(9):
            await world.submit(f"j{number}", max_tokens=200)
        await trio.sleep(2)
        assert events(rig)["taken"] == 3
        info = await world.js.consumer_info("INFERENCE", streams.consumer_name("high", MODEL))
        assert info.num_ack_pending == 3
        await world.until_empty()
        assert len(world.heard) == 9


async def test_a_worker_that_is_busy_with_requests_takes_no_jobs(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker(ONE_SLOT) as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=250))  # 5 s
            await trio.sleep(1)
            await world.submit("j1", max_tokens=2)
            await trio.sleep(2)
            assert events(rig) == {}
        answer = await world.result("j1")
        assert answer.body["worker"]["queue_ms"] < 500
        assert events(rig) == {"taken": 1, "answered": 1}


async def test_jobs_go_to_the_freest(autojump_clock: object) -> None:
    async with (
        open_jobs_world() as world,
        world.worker(worker_id="w1") as busy,
        world.worker(worker_id="w2") as free,
        trio.open_nursery() as nursery,
    ):
        for _ in range(3):
            nursery.start_soon(lambda: busy.ask(prompt="x", max_tokens=1000))  # 20 s
        await trio.sleep(12)  # the pulls are asked anew
        for number in range(3):
            await world.submit(f"j{number}", max_tokens=200)
            await trio.sleep(0.2)
        assert (events(busy), events(free)["taken"]) == ({}, 3)


async def test_jobs_for_another_model_wait_for_their_worker(autojump_clock: object) -> None:
    async with open_jobs_world(model="other") as world, world.worker() as rig:
        await world.submit("j1", max_tokens=2)
        await trio.sleep(30)
        assert (events(rig), await world.waiting()) == ({}, 1)
        async with world.worker("worker.model_name=other", worker_id="w2"):
            assert (await world.result("j1")).worker_id == "w2"


async def test_many_jobs_are_shared_and_each_answered_once(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker(), world.worker(worker_id="w2"):
        for number in range(100):
            level = ("high", "medium", "low")[number % 3]
            await world.submit(f"j{number}", level=level, max_tokens=1 + number % 7)
        await world.until_empty()
        stored = await world.results()
        assert sorted(each.subject for each in stored) == sorted(
            subjects.result(f"j{number}") for number in range(100)
        )
        assert len(world.heard) == 100
        by_worker = {each.headers["Worker-Id"] for each in stored}
        assert by_worker == {"w1", "w2"}


# --- what may happen to a worker -----------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.05, 1.0, 2.0, 2.03])
async def test_the_job_of_a_killed_worker_is_done_by_another(
    autojump_clock: object, after_s: float
) -> None:
    """Before it looks, while it computes, and about when it stores."""
    async with open_jobs_world() as world:
        async with world.worker(QUICK_LEASE) as first:
            await trio.sleep(1)
            await world.submit("j1", prompt="x", max_tokens=100)  # 2 s
            await trio.sleep(after_s)
            first.kill()
            async with world.worker(QUICK_LEASE, worker_id="w2"):
                answer = await world.result("j1")
                await world.until_empty()
        assert answer.code == "ok"
        assert len(world.heard) == 1


async def test_a_worker_that_was_away_for_too_long_does_not_answer_twice(
    autojump_clock: object,
) -> None:
    """As one that was frozen: what it says comes late, and the job has been done meanwhile."""
    async with open_jobs_world() as world, world.worker(QUICK_LEASE) as first:
        await trio.sleep(1)
        await world.submit("j1", prompt="x", max_tokens=500)  # 10 s
        await trio.sleep(1)
        first.broker.disconnect()
        async with world.worker(QUICK_LEASE, worker_id="w2"):
            assert (await world.result("j1")).worker_id == "w2"
            first.broker.reconnect()
            await trio.sleep(30)
            assert events(first) == {"taken": 1, "found answered": 1}
            assert len(world.heard) == 1
            assert await world.waiting() == 0


async def test_a_job_that_kills_its_workers_is_put_among_the_dead(autojump_clock: object) -> None:
    async with open_jobs_world() as world:
        for number in range(3):
            async with world.worker(QUICK_LEASE, worker_id=f"w{number}") as rig:
                if not number:
                    await world.submit(
                        "j1",
                        caller="me",
                        prompt="x",
                        max_tokens=1000,
                        headers={"Trace": "t1", "Nats-TTL": "9999", "Dead-Reason": "forged"},
                    )
                with trio.fail_after(60):
                    while not rig.snapshot().requests.in_flight:  # noqa: ASYNC110
                        await trio.sleep(0.1)
                rig.kill()
        async with world.worker(QUICK_LEASE, worker_id="w9") as rig:
            answer = await world.result("j1")
            await world.until_empty()
            assert events(rig) == {"redelivered": 1, "dead": 1}
        assert answer.code == "INTERNAL"
        assert answer.body["error"]["retryable"] is False
        assert answer.body["error"]["details"] == {"deliveries": 3}
        (dead,) = await world.dead()
        assert dead.subject == f"dead.inference.high.me.{MODEL}"
        assert msgspec.json.decode(dead.body)["request_id"] == "j1"
        assert dead.headers["Trace"] == "t1"
        assert dead.headers["Request-Id"] == "j1"
        assert dead.headers["Dead-Reason"].startswith("delivered 3 times without an answer")


async def test_a_job_that_no_worker_may_send_on_is_buried_without_its_body(
    autojump_clock: object,
) -> None:
    async with open_jobs_world(max_payload=20_000) as world:
        body = msgspec.json.encode({"request_id": "j1", "prompt": "x" * 19_900})
        subject = subjects.job(level="high", caller=None, model=MODEL)
        limit = "nats.jetstream.max_deliver=1"
        async with world.worker(QUICK_LEASE, limit) as rig:
            await trio.sleep(1)
            await world.submit_raw(body, subject)
            await trio.lowlevel.checkpoint()
            with trio.fail_after(60):
                while not events(rig):  # noqa: ASYNC110
                    await trio.sleep(0.001)
            rig.kill()
        async with world.worker(QUICK_LEASE, limit, worker_id="w2"):
            assert (await world.result("j1")).code == "INTERNAL"
            await world.until_empty()
        (dead,) = await world.dead()
        assert dead.body == b""
        assert dead.headers["Dead-Omitted"] == f"a body of {len(body)} bytes"


async def test_a_drain_lets_a_running_job_finish_and_takes_no_other(
    autojump_clock: object,
) -> None:
    async with open_jobs_world() as world:
        async with world.worker(ONE_SLOT) as rig:
            for number in range(3):
                await world.submit(f"j{number}", max_tokens=200)  # 4 s
            await trio.sleep(1)
            rig.stop()
            await rig.finished.wait()
        assert [each.subject for each in world.heard] == ["answers.inference.j0"]
        assert await world.waiting() == 2
        info = await world.js.consumer_info("INFERENCE", streams.consumer_name("high", MODEL))
        assert (info.num_ack_pending, info.num_waiting) == (0, 0)


async def test_at_the_drains_deadline_a_job_goes_back_at_once(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker(worker_id="w2") as other:
        # It is as free as the other, and so whoever asked first is served first.
        other.broker.disconnect()
        async with world.worker("worker.drain_timeout_ms=1000") as rig:
            await world.submit("j1", max_tokens=1000)  # 20 s
            await trio.sleep(1)
            assert events(rig) == {"taken": 1}
            other.broker.reconnect()
            began = trio.current_time()
            rig.stop()
            await rig.finished.wait()
            assert events(rig) == {"taken": 1, "given back": 1}
        answer = await world.result("j1")
        assert answer.worker_id == "w2"
        assert trio.current_time() - began < 1 + 20 + 2
        assert world.heard[0].headers["Worker-Id"] == "w2"


async def test_a_job_without_a_token_goes_back_when_the_drain_begins(
    autojump_clock: object,
) -> None:
    slow = "worker.simulated.prefill_ms_per_token=1000"
    async with open_jobs_world() as world, world.worker(slow) as rig:
        await world.submit("j1", prompt="a b c d e f g h", max_tokens=2)
        await trio.sleep(1)
        began = trio.current_time()
        rig.stop()
        await rig.finished.wait()
        assert trio.current_time() - began < 1
        assert events(rig) == {"taken": 1, "given back": 1}


async def test_a_worker_without_room_keeps_the_job_rather_than_wear_it_out(
    autojump_clock: object,
) -> None:
    """Were it given back each time, it would soon be put among the dead, and nobody had tried."""
    async with (
        open_jobs_world() as world,
        world.worker(
            "nats.jetstream.max_deliver=1", "worker.request_queue.max_depth=1", QUICK_LEASE
        ) as rig,
    ):
        door = rig.observed.parts.door
        refusal = door.admission.refusal
        full: list[bool] = [True]

        def refused(sequence: object) -> object:
            return QueueFull("full") if full else refusal(sequence)  # type: ignore[arg-type]

        door.admission.refusal = refused  # type: ignore[method-assign, assignment]
        await world.submit("j1", max_tokens=2)
        await trio.sleep(30)
        assert (events(rig), jobs_of(rig).beside) == ({"taken": 1}, 1)
        full.clear()
        assert (await world.result("j1")).code == "ok"
        assert events(rig) == {"taken": 1, "answered": 1}


async def test_but_gives_it_back_in_the_end_if_it_has_a_delivery_to_spare(
    autojump_clock: object,
) -> None:
    async with open_jobs_world() as world, world.worker(QUICK_LEASE) as rig:
        admission = rig.observed.parts.admission
        admission.refusal = lambda _sequence: QueueFull("full")  # type: ignore[method-assign, assignment]
        await world.submit("j1", max_tokens=2)
        await trio.sleep(4)
        assert events(rig) == {"taken": 1}
        await trio.sleep(60)
        assert events(rig) == {"taken": 1, "redelivered": 2, "given back": 2}
        assert await world.dead() == []


async def test_a_worker_that_had_better_not_be_asked_takes_no_jobs(autojump_clock: object) -> None:
    quick = "worker.resource_limits.check_interval_ms=100"
    async with open_jobs_world() as world, world.worker(quick) as rig:
        used = rig.probe.used
        rig.probe.used = 20_000 * 2**20
        await trio.sleep(1)
        await world.submit("j1", max_tokens=2)
        await trio.sleep(20)
        assert events(rig) == {}
        rig.probe.used = used
        assert (await world.result("j1")).code == "ok"


async def test_a_job_that_cannot_be_looked_up_goes_back_when_the_drain_begins(
    autojump_clock: object,
) -> None:
    async with open_jobs_world() as world, world.worker() as rig:
        await trio.sleep(1)
        await world.js.request("$JS.API.STREAM.DELETE.RESULTS")
        await world.submit("j1", max_tokens=2)
        await until_trouble(rig)
        began = trio.current_time()
        rig.stop()
        await rig.finished.wait()
        assert trio.current_time() - began < 1
        assert events(rig) == {"taken": 1, "given back": 1}


async def test_an_answer_that_is_there_at_the_end_of_a_drain_is_tried_once_more(
    autojump_clock: object,
) -> None:
    async with open_jobs_world() as world, world.worker("worker.drain_timeout_ms=9000") as rig:
        await trio.sleep(1)
        results = world.jetstream.streams["RESULTS"]
        await world.submit("j1", max_tokens=2)
        await world.result("j1")
        results.config["max_msgs"] = 1
        await world.submit("j2", max_tokens=2)
        await until_trouble(rig)
        await trio.sleep(20)  # by now it is tried every five seconds
        rig.stop()
        await trio.sleep(8.99)
        results.config["max_msgs"] = -1
        await rig.finished.wait()
        assert await world.waiting() == 0
        assert len(world.heard) == 2


# --- what may happen to the server ---------------------------------------------------------


async def test_without_jetstream_requests_go_on_and_the_reason_is_shown(
    autojump_clock: object,
) -> None:
    async with open_jobs_world() as world:
        world.jetstream.is_on = False
        async with world.worker() as rig:
            assert "JetStream is off" in await until_trouble(rig)
            assert (await rig.ask(prompt="x", max_tokens=2)).code == "ok"
            assert rig.observed.readiness().ok
            world.jetstream.is_on = True
            await until_trouble(rig, is_there=False)
            await world.submit("j1", max_tokens=2)
            assert (await world.result("j1")).code == "ok"


async def test_a_stream_that_cannot_be_used_is_named(autojump_clock: object) -> None:
    async with open_jobs_world() as world:
        await world.js.ensure_stream(streams.jobs_stream("INFERENCE") | {"retention": "limits"})
        async with world.worker() as rig:
            trouble = await until_trouble(rig)
            assert "the stream INFERENCE cannot be used as it is: retention is limits" in trouble
            await world.js.request("$JS.API.STREAM.DELETE.INFERENCE")
            await world.submit("j1", max_tokens=2)
            assert (await world.result("j1")).code == "ok"
            assert jobs_of(rig).trouble is None


async def test_a_worker_that_may_not_look_at_streams_takes_them_as_they_are(
    autojump_clock: object,
) -> None:
    async with open_jobs_world() as world:
        async with world.worker():
            await trio.sleep(1)
        world.jetstream.denied |= {"$JS.API.STREAM.>", "$JS.API.CONSUMER.CREATE.>"}
        async with world.worker() as rig:
            await world.submit("j1", max_tokens=2)
            assert (await world.result("j1")).code == "ok"
            assert jobs_of(rig).trouble is None


async def test_a_worker_that_may_not_pull_says_so(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker() as rig:
        await trio.sleep(1)
        world.jetstream.denied.add("$JS.API.CONSUMER.MSG.NEXT.>")
        trouble = await until_trouble(rig)
        assert "nothing answered on $JS.API.CONSUMER.MSG.NEXT.INFERENCE.high-" in trouble
        world.jetstream.denied.clear()
        await world.submit("j1", max_tokens=2)
        assert (await world.result("j1")).code == "ok"
        assert jobs_of(rig).trouble is None


async def test_a_consumer_that_is_deleted_is_made_again(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker() as rig:
        await trio.sleep(1)
        name = streams.consumer_name("high", MODEL)
        await world.js.request(f"$JS.API.CONSUMER.DELETE.INFERENCE.{name}")
        began = trio.current_time()
        await world.submit("j1", max_tokens=2)
        assert (await world.result("j1")).code == "ok"
        assert trio.current_time() - began < 3
        assert jobs_of(rig).trouble is None


async def test_a_server_that_forgets_its_pulls_is_asked_again(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker(QUICK_LEASE) as rig:
        await trio.sleep(1)
        await world.submit("j1", prompt="x", max_tokens=100)
        await trio.sleep(0.5)
        rig.broker.disconnect()
        world.jetstream.forget_deliveries()
        await trio.sleep(0.3)
        rig.broker.reconnect()
        began = trio.current_time()
        await world.submit("j2", max_tokens=2)
        assert (await world.result("j2")).code == "ok"
        assert trio.current_time() - began < 2
        await world.result("j1")
        await world.until_empty()
        assert sorted(each.subject for each in world.heard) == [
            "answers.inference.j1",
            "answers.inference.j2",
        ]


async def test_an_answer_is_kept_until_it_can_be_stored(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker(QUICK_LEASE) as rig:
        await trio.sleep(1)
        results = world.jetstream.streams["RESULTS"]
        results.config["max_msgs"] = 1
        await world.submit("j1", max_tokens=2)
        await world.result("j1")
        for number in range(2, 20):
            await world.submit(f"j{number}", max_tokens=2)
        assert "maximum messages exceeded" in await until_trouble(rig)
        await trio.sleep(60)
        assert jobs_of(rig).beside == 8, "no more are taken than there are slots"
        assert (await rig.ask(prompt="x", max_tokens=2)).code == "ok"
        results.config["max_msgs"] = -1
        await world.until_empty()
        assert len(world.heard) == 19
        assert jobs_of(rig).trouble is None
        assert not events(rig).get("redelivered")


async def test_a_lost_receipt_does_not_make_a_second_answer(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker() as rig:
        await trio.sleep(1)
        lost: list[str] = []
        hand_out = world.server.hand_out

        def losing(subject: str, message: Message, sender: MemoryBroker | None = None) -> bool:
            if b'"stream":"RESULTS"' in message.body and not lost:
                lost.append(subject)
                return True
            return hand_out(subject, message, sender)

        world.server.hand_out = losing  # type: ignore[method-assign]
        await world.submit("j1", max_tokens=2)
        await world.until_empty()
        assert (len(lost), len(world.heard)) == (1, 1)
        assert events(rig) == {"taken": 1, "found answered": 1}, "whose it is cannot be known"


async def test_without_a_stream_of_results_no_job_is_worn_out(autojump_clock: object) -> None:
    async with open_jobs_world() as world, world.worker(QUICK_LEASE) as rig:
        await trio.sleep(1)
        await world.js.request("$JS.API.STREAM.DELETE.RESULTS")
        await world.submit("j1", max_tokens=2)
        assert "DIRECT.GET.RESULTS" in await until_trouble(rig)
        await trio.sleep(120)
        await world.js.ensure_stream(streams.results_stream("RESULTS", keep_s=60))
        assert (await world.result("j1")).code == "ok"
        assert events(rig) == {"taken": 1, "answered": 1}


def test_jobs_are_off_unless_they_are_asked_for() -> None:
    assert not make_config().nats.jetstream.enabled
    assert make_config(JOBS_ON).nats.jetstream.enabled


async def test_a_worker_without_jobs_says_nothing_to_jetstream(autojump_clock: object) -> None:
    heard: list[Message] = []
    async with open_jobs_world() as world:
        await world.broker.subscribe("$JS.>", heard.append)
        async with world.worker("nats.jetstream.enabled=false") as rig:
            await trio.sleep(20)
            assert rig.snapshot().jobs is None
        assert heard == []
