"""Beats: when a worker says how it is, and what it makes of the others'."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from support.fleet_rig import peer_of
from support.worker_rig import Rig, running_worker
from trio.testing import MockClock

from trio_worker.ports import Message
from trio_worker.stages.beat import OwnBeat
from trio_worker.wire import beats
from trio_worker.wire.beats import Beat


class Heard:
    """What a worker says, and when."""

    def __init__(self) -> None:
        self.beats: list[Beat] = []
        self.times: list[float] = []

    def __call__(self, message: Message) -> None:
        beat = beats.decode(message.subject, message.body)
        assert beat is not None
        self.beats.append(beat)
        self.times.append(trio.current_time())

    def clear(self) -> None:
        self.beats, self.times = [], []


async def listen(rig: Rig) -> Heard:
    heard = Heard()
    await rig.caller.subscribe("worker.w1.beat", heard)
    return heard


async def test_one_that_is_alone_says_so_once_a_second(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        heard = await listen(rig)
        await rig.ask(prompt="x", max_tokens=20)
        await trio.sleep(10)
        gaps = [after - before for before, after in zip(heard.times, heard.times[1:], strict=False)]
        assert all(gap == pytest.approx(1.0, abs=0.02) for gap in gaps)
        assert 9 <= len(heard.beats) <= 11


async def test_the_interval_is_configured(autojump_clock: MockClock) -> None:
    async with running_worker("fleet.beat_interval_ms=5000", "fleet.forget_after_ms=10000") as rig:
        await trio.sleep(0.5)
        heard = await listen(rig)
        await trio.sleep(20)
        assert len(heard.beats) == 4


async def test_a_change_is_told_soon_and_at_most_ten_times_a_second(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig, peer_of(rig) as peer, trio.open_nursery() as nursery:
        await trio.sleep(0.5)
        heard = await listen(rig)
        for _ in range(12):
            nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=10))
        await trio.sleep(0.15)
        (beat,) = heard.beats
        assert (beat.in_flight, beat.queued, beat.accepting) == (12, 4, True)
        for _ in range(3):
            peer.beat()
            await trio.sleep(0.25)
        gaps = [after - before for before, after in zip(heard.times, heard.times[1:], strict=False)]
        assert min(gaps) >= 0.0999
        assert heard.beats[-1].in_flight == 0


async def test_a_newcomer_hears_of_everybody_soon(autojump_clock: MockClock) -> None:
    async with running_worker("fleet.beat_interval_ms=30000", "fleet.forget_after_ms=60000") as (
        rig
    ):
        heard = await listen(rig)
        await trio.sleep(5)
        heard.clear()
        came_at = trio.current_time()
        async with peer_of(rig) as peer:
            await trio.sleep(0.2)
            assert [at - came_at for at in heard.times] == [pytest.approx(0.1, abs=0.02)]
            peer.beat()
            await trio.sleep(1)
            assert len(heard.beats) == 1


async def test_it_says_nothing_before_requests_reach_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[bool] = []
    say = OwnBeat.say

    def note(own: OwnBeat) -> None:
        listening = {each._pattern for each in rig.server._subscriptions}
        reached.append("inference.w1" in listening)
        say(own)

    monkeypatch.setattr(OwnBeat, "say", note)
    async with running_worker(load_s=10, wait_ready=False) as rig:
        heard = await listen(rig)
        await trio.sleep(9.9)
        assert heard.beats == []
        await trio.sleep(0.5)
        assert [beat.accepting for beat in heard.beats] == [True]
        assert reached == [True]


async def test_the_goodbye_comes_at_once_and_stands(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        heard = await listen(rig)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(rig.ask, prompt="x", max_tokens=200, stream=True))
            await trio.sleep(1.5)
            heard.clear()
            rig.stop()
            await trio.sleep(0.001)
            assert [(beat.leaving, beat.accepting) for beat in heard.beats] == [(True, False)]
            await trio.sleep(1.5)
            assert len(heard.beats) > 1
            assert all(beat.leaving for beat in heard.beats)


async def test_without_a_connection_no_beats_pile_up(autojump_clock: MockClock) -> None:
    async with running_worker("worker.monitoring.report_interval_ms=3600000") as rig:
        await trio.sleep(0.5)
        rig.broker.disconnect()
        await trio.sleep(30)
        assert rig.broker.statistics().unpublished_bytes == 0
        heard = await listen(rig)
        rig.broker.reconnect()
        await trio.sleep(1.5)
        assert heard.beats


async def test_others_are_listed_and_forgotten(autojump_clock: MockClock) -> None:
    async with running_worker() as rig:
        async with peer_of(rig, in_flight=2, leaving=True):
            rig.caller.publish(Message(subject="worker.w3.beat", body=b"no beat"))
            await trio.sleep(2)
            (own, other) = rig.observed.fleet()
            assert (own.id, own.age_s) == ("w1", 0.0)
            assert (other.id, other.in_flight, other.leaving) == ("w2", 2, True)
            assert other.age_s == pytest.approx(2.0, abs=0.1)
            assert rig.snapshot().fleet.others == 1
            await trio.sleep(1.1)
            assert [member.id for member in rig.observed.fleet()] == ["w1"]
