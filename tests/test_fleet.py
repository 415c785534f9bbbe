"""Several whole workers on one message system: who serves what, and that nothing is lost."""

from __future__ import annotations

import msgspec
import pytest
import trio
from support.fleet_rig import SETTLED_S, Fleet, codes, running_fleet, served_by
from support.worker_rig import Reply, running_worker
from trio.testing import MockClock

from trio_worker.ports import Message
from trio_worker.wire import native

SLOTS = "worker.continuous_batching.max_batch_size="
DEPTH = "worker.request_queue.max_depth="


# --- where there is room ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
async def test_a_burst_finds_the_room_that_there_is(autojump_clock: MockClock, seed: int) -> None:
    """3 x 8 slots and 3 x 8 places in queues, and 30 at once: chance would overfill one."""
    async with running_fleet(f"{DEPTH}8", seed=seed) as fleet:
        replies = await fleet.ask_many(30, prompt="x", max_tokens=20)
        assert codes(replies) == {"ok": 30}
        assert max(served_by(replies).values()) <= 16
        assert fleet.counted("requests").total() == 30


async def test_a_burst_as_large_as_the_fleet_fills_all_of_it(autojump_clock: MockClock) -> None:
    async with running_fleet(f"{DEPTH}8") as fleet:
        replies = await fleet.ask_many(48, prompt="x", max_tokens=200, timeout_ms=600_000)
        assert codes(replies) == {"ok": 48}
        assert set(served_by(replies).values()) == {16}


@pytest.mark.parametrize("seed", range(5))
async def test_queue_full_is_said_only_when_nobody_has_room(
    autojump_clock: MockClock, seed: int
) -> None:
    """Room for 3 x 3 and 14 at once: whoever is refused has been to all, and to none for long."""
    async with running_fleet(f"{DEPTH}2", f"{SLOTS}1", seed=seed) as fleet:
        replies = await fleet.ask_many(14, prompt="x", max_tokens=50, timeout_ms=600_000)
        assert codes(replies) == {"ok": 9, "QUEUE_FULL": 5}
        assert set(served_by(replies).values()) == {3}
        assert fleet.handed_on().total() <= 14 * 6
        refused_at = [reply.times[-1] for reply in replies if reply.code == "QUEUE_FULL"]
        assert max(refused_at) < min(reply.times[-1] for reply in replies if reply.code == "ok")


async def test_a_worker_that_is_asked_itself_never_passes_it_on(
    autojump_clock: MockClock,
) -> None:
    async with running_fleet(f"{DEPTH}2", f"{SLOTS}1") as fleet:
        replies: list[Reply] = []

        async def one() -> None:
            replies.append(await fleet["w1"].ask(prompt="x", max_tokens=50, timeout_ms=600_000))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        assert codes(replies) == {"ok": 2, "QUEUE_FULL": 3}
        assert fleet.handed_on() == {}


async def test_without_hand_on_a_worker_keeps_what_it_gets(autojump_clock: MockClock) -> None:
    """As before there was any: a burst overfills one while others have room."""
    async with running_fleet(f"{DEPTH}8", f"{SLOTS}8", "fleet.hand_on=false") as fleet:
        replies = await fleet.ask_many(40, prompt=LONG, max_tokens=20)
        assert codes(replies)["QUEUE_FULL"] > 0
        assert fleet.handed_on() == {}
        assert [each for each in fleet.server._subscriptions if ".fwd." in each._pattern] == []
        # The fleet is shown all the same.
        assert [member.id for member in fleet["w1"].observed.fleet()] == ["w1", "w2", "w3"]


# --- where the prefix is ----------------------------------------------------------------------

LONG = "word " * 400


def conversation(number: int, turns: int) -> list[dict[str, str]]:
    """How it stands before its next turn: a tenant's system prompt, questions and answers."""
    messages = [{"role": "system", "content": f"tenant {number % 4} " + LONG}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {turn} of {number}"})
        messages.append({"role": "assistant", "content": f"answer {turn} " + "so " * 50})
    return [*messages, {"role": "user", "content": f"question {turns} of {number}"}]


@pytest.mark.parametrize(("hand_on", "least", "most"), [("true", 1.0, 1.0), ("false", 2.0, 3.0)])
async def test_a_conversation_stays_at_one_worker_while_there_is_room(
    autojump_clock: MockClock, hand_on: str, least: float, most: float
) -> None:
    served: dict[int, list[Reply]] = {}

    async def talk(fleet: Fleet, number: int) -> None:
        for turn in range(6):
            messages = conversation(number, turn)
            reply = await fleet.ask(messages=messages, max_tokens=5)
            served.setdefault(number, []).append(reply)
            await trio.sleep(2)

    async with running_fleet(f"fleet.hand_on={hand_on}") as fleet:
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(talk, fleet, number)
                await trio.sleep(0.3)
    workers = [len(served_by(replies)) for replies in served.values()]
    assert least <= sum(workers) / len(workers) <= most
    later = [reply.usage for replies in served.values() for reply in replies[1:]]
    prompt = sum(usage["prompt_tokens"] for usage in later)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in later)
    if hand_on == "true":
        assert cached / prompt > 0.9
        # All are at work, since each tenant has two homes of three.
        assert len(served_by([each for replies in served.values() for each in replies])) == 3


async def test_a_conversation_goes_next_door_while_its_home_is_full_and_comes_back(
    autojump_clock: MockClock,
) -> None:
    async with running_fleet(f"{SLOTS}1") as fleet:
        messages = conversation(1, 0)
        (home,) = served_by([await fleet.ask(messages=messages, max_tokens=2)])
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: fleet.workers[home].ask(prompt="x", max_tokens=500))
            await trio.sleep(1)
            (other,) = served_by([await fleet.ask(messages=messages, max_tokens=2)])
            assert other != home
        await trio.sleep(1)
        assert list(served_by([await fleet.ask(messages=messages, max_tokens=2)])) == [home]


# --- who goes, and who is slow ----------------------------------------------------------------


async def test_a_dead_worker_shows_itself_and_the_next_takes_the_request(
    autojump_clock: MockClock,
) -> None:
    """Its beats are not out of date yet: the server's word is what tells."""
    async with running_fleet() as fleet:
        messages = conversation(1, 0)
        (home,) = served_by([await fleet.ask(messages=messages, max_tokens=2)])
        await trio.sleep(SETTLED_S)
        fleet[home].kill()
        replies = await fleet.ask_many(10, gap_s=0.01, messages=messages, max_tokens=2)
        assert codes(replies) == {"ok": 10}
        assert home not in served_by(replies)
        returned = fleet.counted("returned")
        assert 1 <= returned.total() <= 2
        assert returned[home] == 0


async def test_a_killed_worker_loses_at_most_what_it_ran(autojump_clock: MockClock) -> None:
    async with running_fleet(f"{DEPTH}20") as fleet, trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: fleet.ask_many(100, gap_s=0.02, prompt="x", max_tokens=40, timeout_ms=20_000)
        )
        await trio.sleep(1)
        ran = len(fleet["w2"].observed.parts.admission.in_flight)
        fleet["w2"].kill()
        await trio.sleep(60)
        found = codes(fleet.replies)
        assert found["ok"] == 100 - found["REQUEST_TIMEOUT"]
        assert 0 < found["REQUEST_TIMEOUT"] <= ran + 1


async def test_a_frozen_worker_is_sent_nothing_once_its_beats_are_missing(
    autojump_clock: MockClock,
) -> None:
    async with running_fleet() as fleet:
        frozen = fleet["w2"]
        frozen.broker.freeze()
        await trio.sleep(3.1)
        # The server does not know, so the group still gives it a third of what comes.
        waiting_there = len(frozen.broker.held)
        await fleet.ask_many(
            60, gap_s=0.05, messages=conversation(1, 0), max_tokens=5, timeout_ms=5000
        )
        swallowed = [
            each for each in frozen.broker.held if each.subscription._pattern == "inference.w2"
        ]
        assert swallowed == []
        assert len(frozen.broker.held) > waiting_there
        assert codes(fleet.replies)["ok"] >= 30
        frozen.broker.thaw()
        await trio.sleep(SETTLED_S)
        assert codes(await fleet.ask_many(20, prompt="x", max_tokens=5)) == {"ok": 20}


async def test_a_slow_worker_gets_what_it_can_take(autojump_clock: MockClock) -> None:
    """At 0.4 of the speed, and the whole fleet at 90 % of what it can do."""
    async with running_fleet(
        f"{SLOTS}4", f"{DEPTH}8", apart={"w3": ["worker.simulated.turn_ms=50"]}
    ) as fleet:
        # 100 tokens take 2 s, or 5 s: 2.4 x 2 a second.
        replies = await fleet.ask_many(
            200, gap_s=1 / 4.3, prompt="x", max_tokens=100, timeout_ms=60_000
        )
        assert codes(replies) == {"ok": 200}
        share = served_by(replies)["w3"] / 200
        assert 0.1 < share < 0.25


@pytest.mark.parametrize("stream", [False, True])
async def test_a_drain_loses_nothing_and_passes_on_what_still_comes(
    autojump_clock: MockClock,
    stream: bool,  # noqa: FBT001
) -> None:
    async with running_fleet() as fleet, trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: fleet.ask_many(200, gap_s=0.01, prompt="x", max_tokens=20, stream=stream)
        )
        await trio.sleep(0.5)
        fleet["w2"].stop()
        await fleet["w2"].finished.wait()
        await trio.sleep(30)
        assert codes(fleet.replies) == {"ok": 200}
        assert {len(reply.text.split()) for reply in fleet.replies} == {20}
        assert fleet.handed_on()["draining"] > 0


async def test_a_drain_says_goodbye_first(autojump_clock: MockClock) -> None:
    async with running_fleet() as fleet:
        said: list[Message] = []
        for subject in ("worker.w2.beat", "inference.w1", "inference.w3"):
            await fleet.caller.subscribe(subject, said.append)
        fleet["w2"].stop()
        await trio.sleep(0.01)
        assert msgspec.json.decode(said[0].body)["leaving"] is True
        assert all(
            member.leaving
            for rig in (fleet["w1"], fleet["w3"])
            for member in rig.observed.fleet()
            if member.id == "w2"
        )


async def test_a_rolling_restart_of_all_loses_nothing(autojump_clock: MockClock) -> None:
    async with running_fleet(ids=("w1", "w2", "w3")) as fleet, trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: fleet.ask_many(300, gap_s=0.04, prompt="x", max_tokens=30, timeout_ms=20_000)
        )
        for worker_id in ("w1", "w2", "w3"):
            await trio.sleep(1)
            fleet[worker_id].stop()
            await fleet[worker_id].finished.wait()
            await nursery.start(_again, fleet, worker_id)
        await trio.sleep(30)
        assert codes(fleet.replies) == {"ok": 300}
        nursery.cancel_scope.cancel()


async def _again(
    fleet: Fleet, worker_id: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    async with running_worker(server=fleet.server, worker_id=worker_id):
        task_status.started()
        await trio.sleep_forever()


async def test_each_side_of_a_split_serves_its_own(autojump_clock: MockClock) -> None:
    async with running_fleet(f"{SLOTS}2", f"{DEPTH}8") as fleet:
        server = fleet.server
        server.split(fleet["w3"].broker)
        await trio.sleep(3.5)
        assert [each.id for each in fleet["w1"].observed.fleet()] == ["w1", "w2"]
        assert [each.id for each in fleet["w3"].observed.fleet()] == ["w3"]
        replies = await fleet.ask_many(20, messages=conversation(1, 0), max_tokens=20)
        assert codes(replies) == {"ok": 20}
        assert set(served_by(replies)) == {"w1", "w2"}
        server.heal()
        await trio.sleep(1.2)
        assert [each.id for each in fleet["w3"].observed.fleet()] == ["w1", "w2", "w3"]


async def test_in_the_first_seconds_of_a_split_the_server_tells(
    autojump_clock: MockClock,
) -> None:
    async with running_fleet() as fleet:
        messages = conversation(1, 0)
        (home,) = served_by([await fleet.ask(messages=messages, max_tokens=2)])
        fleet.server.split(fleet[home].broker)
        replies = await fleet.ask_many(10, messages=messages, max_tokens=2)
        assert codes(replies) == {"ok": 10}
        assert home not in served_by(replies)


# --- who is cancelled on the way ----------------------------------------------------------------


async def test_a_cancel_reaches_a_request_on_its_way(autojump_clock: MockClock) -> None:
    """Sent when the first worker has just passed it on: it gets there before the request does."""
    async with running_fleet() as fleet:
        messages = conversation(1, 0)
        (home,) = served_by([await fleet.ask(messages=messages, max_tokens=2)])
        first = next(worker_id for worker_id in fleet.workers if worker_id != home)
        rig = fleet[first]
        got: list[Message] = []
        inbox = fleet.caller.new_inbox()
        await fleet.caller.subscribe(inbox, got.append)
        body = msgspec.json.encode(
            {"messages": messages, "request_id": "r1", "max_tokens": 500, "stream": False}
        )
        # What goes to its home is slow, so the cancel message overtakes the request.
        hop = {"Route": "w9", "Reply-To": inbox}
        fleet.caller.publish(
            Message(
                subject=f"inference.{first}", body=body, reply="inference.w9.fwd.1", headers=hop
            )
        )
        fleet.caller.publish(Message(subject="inference.cancel", body=native.cancel_by_id("r1")))
        await trio.sleep(2)
        assert rig.observed.parts.counters.metrics.handed_on.total() == 1
        assert [each.headers["Worker-Id"] for each in got] == [home]
        assert msgspec.json.decode(got[0].body)["error"]["code"] == "CANCELLED"


# --- a fleet of several kinds ---------------------------------------------------------------------


async def test_another_model_is_no_place_to_go(autojump_clock: MockClock) -> None:
    async with running_fleet(
        f"{DEPTH}2", f"{SLOTS}1", ids=("w1", "w2"), apart={"w2": ["worker.model_name=other"]}
    ) as fleet:
        model = fleet["w1"].observed.parts.config.model_name
        replies = await fleet.ask_many(5, prompt="x", max_tokens=20, model=model)
        assert codes(replies) == {"ok": 2, "QUEUE_FULL": 3}
        assert fleet.handed_on() == {}
        assert {each.model for each in fleet["w1"].observed.fleet()} == {model, "other"}


async def test_a_worker_without_beats_shares_the_group(autojump_clock: MockClock) -> None:
    """An older one: it is never handed anything, and gets its share from the group."""
    async with running_fleet(ids=("w1", "w2", "old"), apart={"old": ["fleet.hand_on=false"]}) as (
        fleet
    ):
        real = fleet["old"].broker.publish
        fleet["old"].broker.publish = lambda message: (  # type: ignore[method-assign]
            None if message.subject.endswith(".beat") else real(message)
        )
        await trio.sleep(3.5)
        assert [each.id for each in fleet["w1"].observed.fleet()] == ["w1", "w2"]
        replies = await fleet.ask_many(60, gap_s=0.1, messages=conversation(1, 0), max_tokens=2)
        assert codes(replies) == {"ok": 60}
        assert 10 <= served_by(replies)["old"] <= 30
        assert fleet.counted("taken_over")["old"] == 0


@pytest.mark.parametrize(("beat_s", "longest_ms"), [(0.1, 100), (1.0, 400)])
async def test_eight_choosers_do_not_run_in_a_herd(
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    beat_s: float,
    longest_ms: float,
) -> None:
    """Between two beats each knows only itself and what it has sent. By chance it is 700 ms."""
    monkeypatch.setattr("trio_worker.stages.beat.CHANGE_S", beat_s)
    ids = [f"w{number}" for number in range(8)]
    async with running_fleet(f"{SLOTS}2", f"{DEPTH}8", ids=ids) as fleet:
        # Two slots of 0.4 s each, eight times: 40 a second, and 30 are asked for.
        replies = await fleet.ask_many(300, gap_s=1 / 30, prompt="x", max_tokens=20)
        assert codes(replies) == {"ok": 300}
        waits = sorted(reply.worker["queue_ms"] for reply in replies)
        assert waits[285] < longest_ms
