"""A fault of the batch loop costs the requests aboard a pause, or at most an `INTERNAL` each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import trio
from support.log_records import logged
from support.metric_values import counter_of, histogram_of
from support.worker_rig import Reply, Rig, running_worker
from trio.testing import MockClock

from trio_worker.core.batching import Batching
from trio_worker.core.scheduler import Scheduler
from trio_worker.errors import WorkerFault
from trio_worker.flow import serving
from trio_worker.flow.answer import Choice
from trio_worker.flow.request_channel import PrioritySendChannel, open_priority_channel
from trio_worker.monitoring.metrics import BATCH_LOOP_RESTARTS, TURN_SECONDS
from trio_worker.ports import Turn
from trio_worker.protocol.turn import Work
from trio_worker.simulated.engine import SimulatedEngine
from trio_worker.stages.batcher import _Batcher, run_batcher
from trio_worker.worker import tasks

ONE_SLOT = "worker.continuous_batching.max_batch_size=1"
PROMPTS = ("one fish", "two fish", "red fish")


class PlantedError(Exception):
    """A fault of ours."""


@contextmanager
def failing(
    owner: type, name: str, *, when: Callable[..., bool], after: bool = False
) -> Iterator[list[float]]:
    """Let a method raise while `when` holds; yields the times of the faults."""
    real = getattr(owner, name)
    faults: list[float] = []

    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        if after:
            result = real(self, *args, **kwargs)
        if when(self, *args, **kwargs):
            faults.append(trio.current_time())
            raise PlantedError(f"in {name}")
        return result if after else real(self, *args, **kwargs)

    with mock.patch.object(owner, name, faulty):
        yield faults


def once(at_call: int) -> Callable[..., bool]:
    """True at one call only, counted from 1."""
    calls = 0

    def when(*_: Any, **__: Any) -> bool:
        nonlocal calls
        calls += 1
        return calls == at_call

    return when


async def ask_all(rig: Rig, *, max_tokens: int = 12) -> dict[str, Reply]:
    replies: dict[str, Reply] = {}

    async def ask(prompt: str) -> None:
        replies[prompt] = await rig.ask(
            prompt=prompt, max_tokens=max_tokens, seed=5, stream=True, request_id=prompt[:3]
        )

    async with trio.open_nursery() as nursery:
        for prompt in PROMPTS:
            nursery.start_soon(ask, prompt)
    return replies


async def undisturbed() -> dict[str, str]:
    async with running_worker() as rig:
        return {prompt: reply.text for prompt, reply in (await ask_all(rig)).items()}


def restarts(rig: Rig) -> int:
    return counter_of(rig.observed, BATCH_LOOP_RESTARTS).total()


@pytest.fixture
def errors() -> Iterator[list[Any]]:
    """What is logged as an error meanwhile."""
    with logged("ERROR") as records:
        yield records


@pytest.mark.parametrize("at_call", [1, 2, 7])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Scheduler, "plan"), (Scheduler, "book"), (Scheduler, "enter"), (Batching, "fill")],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
async def test_after_a_fault_every_request_goes_on_where_it_was(
    autojump_clock: MockClock, errors: list[Any], owner: type, name: str, at_call: int
) -> None:
    """Whatever was half done: also who was just between the queue and the batch."""
    expected = await undisturbed()
    with failing(owner, name, when=once(at_call)) as faults:
        async with running_worker() as rig:
            replies = await ask_all(rig)
            assert {prompt: reply.text for prompt, reply in replies.items()} == expected
            assert restarts(rig) == len(faults)
            assert rig.snapshot().engine.restarts == len(faults)
            assert rig.engine.residents == frozenset()
    assert len(faults) == (0 if (name, at_call) == ("enter", 7) else 1)
    assert [repr(record["exception"].value) for record in errors] == [
        f"PlantedError('in {name}')" for _ in faults
    ]


async def test_whose_tokens_were_not_handed_out_is_answered_internal(
    autojump_clock: MockClock,
) -> None:
    expected = await undisturbed()
    real = _Batcher._hand_out
    interrupted = once(4)

    def careless(self: Any, deliveries: list[Any], now: float) -> None:
        if interrupted():
            real(self, deliveries[:1], now)
            raise PlantedError("in the middle")
        real(self, deliveries, now)

    with mock.patch.object(_Batcher, "_hand_out", careless):
        async with running_worker() as rig:
            replies = await ask_all(rig)
            later = await rig.ask(prompt=PROMPTS[0], max_tokens=12, seed=5)
    whole = [prompt for prompt, reply in replies.items() if reply.code == "ok"]
    broken = [reply.error for prompt, reply in replies.items() if prompt not in whole]
    assert len(whole) == 1
    assert replies[whole[0]].text == expected[whole[0]]
    assert [(error.code, error.retryable) for error in broken if error] == [("INTERNAL", True)] * 2
    assert later.text == expected[PROMPTS[0]]


async def test_whoever_has_its_whole_answer_is_not_computed_again(
    autojump_clock: MockClock,
) -> None:
    """The fault comes in the turn with the last tokens, which are handed out all the same."""
    expected = await undisturbed()

    first = once(1)

    def is_last(_self: Any, report: Any, **_times: float) -> bool:
        return any(output.finish is not None for output in report.outputs) and first()

    with failing(_Batcher, "_count", when=is_last) as faults:
        async with running_worker() as rig:
            replies = await ask_all(rig)
            assert len(faults) == 1
            assert rig.snapshot().requests.completed == len(PROMPTS)
            await trio.sleep(5)
            assert rig.snapshot().batch.running == 0
    assert {prompt: reply.text for prompt, reply in replies.items()} == expected
    assert min(reply.worker["resumed"] for reply in replies.values()) == 0


async def test_a_request_that_causes_faults_causes_two_and_the_others_are_served(
    autojump_clock: MockClock,
) -> None:
    def is_there(self: Scheduler, _report: Any, *, now: float) -> bool:
        return "red" in self.running

    with failing(Scheduler, "book", when=is_there) as faults:
        async with running_worker(ONE_SLOT) as rig:
            replies = await ask_all(rig)
            assert restarts(rig) == 2
    assert {prompt: reply.code for prompt, reply in replies.items()} == {
        "one fish": "ok",
        "two fish": "ok",
        "red fish": "INTERNAL",
    }
    assert len(faults) == 2


async def test_a_spent_budget_ends_the_worker_and_every_caller_is_told(
    autojump_clock: MockClock,
) -> None:
    codes: list[str] = []

    async def ask(rig: Rig) -> None:
        codes.append((await rig.ask(prompt="x", max_tokens=50)).code)

    with failing(Scheduler, "plan", when=lambda *_, **__: True) as faults:
        with pytest.raises(WorkerFault, match="failed 2 times within 60 s") as raised:
            async with running_worker("worker.engine.max_restarts=1") as rig:
                async with trio.open_nursery() as nursery:
                    for _ in range(3):
                        nursery.start_soon(ask, rig)
                    # The caller outlives the worker in reality; here one nursery holds both.
                    with trio.CancelScope(shield=True):
                        await rig.finished.wait()
                        await trio.sleep(1)
    assert len(faults) == 2
    assert codes == ["WORKER_DRAINING"] * 3
    assert str(raised.value).endswith("at last: PlantedError: in plan")
    assert isinstance(raised.value.__cause__, PlantedError)


async def test_when_the_queue_ends_the_loop_does(autojump_clock: MockClock) -> None:
    """Whatever is in it is served first."""
    codes: list[str] = []
    ends: list[PrioritySendChannel] = []
    returned: list[float] = []

    def opened(*args: Any, **kwargs: Any) -> Any:
        send, receive = open_priority_channel(*args, **kwargs)
        ends.append(send)
        return send, receive

    async def run(*args: Any, **kwargs: Any) -> None:
        await run_batcher(*args, **kwargs)
        returned.append(trio.current_time())

    async def ask(rig: Rig) -> None:
        codes.append((await rig.ask(prompt="x", max_tokens=50)).code)

    with (
        mock.patch.object(serving, "open_priority_channel", opened),
        mock.patch.object(tasks, "run_batcher", run),
    ):
        async with running_worker(ONE_SLOT) as rig:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, rig)
                nursery.start_soon(ask, rig)
                await trio.sleep(0.1)
                ends[0].close()
            assert codes == ["ok", "ok"]
            await trio.sleep(1)
            assert len(returned) == 1


async def test_faults_far_apart_do_not_add_up(autojump_clock: MockClock) -> None:
    with ExitStack() as stack:
        faults = [
            stack.enter_context(failing(Scheduler, "plan", when=once(at))) for at in (1, 30, 60)
        ]
        async with running_worker("worker.engine.max_restarts=1") as rig:
            for _ in range(8):
                assert {reply.code for reply in (await ask_all(rig)).values()} == {"ok"}
                await trio.sleep(61)
    assert [len(each) for each in faults] == [1, 1, 1]


async def test_the_wait_for_the_fresh_engine_is_no_formation_of_a_batch(
    autojump_clock: MockClock,
) -> None:
    with failing(Scheduler, "book", when=once(7)):
        async with running_worker(restart_s=10.0) as rig:
            replies = await ask_all(rig)
            assert rig.snapshot().batch.last_formation_ms == 0
    assert [reply.worker["resumed"] for reply in replies.values()] == [1, 1, 1]


async def test_a_cancelled_or_late_request_ends_at_once_while_the_loop_starts_again(
    autojump_clock: MockClock,
) -> None:
    with failing(Scheduler, "book", when=once(3)):
        async with running_worker(restart_s=20.0) as rig:
            began_at = trio.current_time()
            reply = await rig.ask(prompt="one", max_tokens=500, timeout_ms=2000)
            assert reply.code == "REQUEST_TIMEOUT"
            assert trio.current_time() - began_at < 2.1
            assert (await rig.ask(prompt="two", max_tokens=5)).code == "ok"


async def test_the_next_turn_is_under_way_before_tokens_are_handed_out(
    autojump_clock: MockClock,
) -> None:
    steps: list[str] = []
    begin, take = SimulatedEngine.begin, Choice.take

    def begun(self: SimulatedEngine, work: Work) -> Turn:
        steps.append("begin")
        return begin(self, work)

    def taken(self: Choice, output: Any) -> None:
        steps.append("take")
        take(self, output)

    with (
        mock.patch.object(SimulatedEngine, "begin", begun),
        mock.patch.object(Choice, "take", taken),
    ):
        async with running_worker() as rig:
            assert (await rig.ask(prompt="one fish", max_tokens=3)).code == "ok"
    # The prompt, and then a token in each turn; nothing is begun after the last one.
    assert steps == ["begin", "begin", "begin", "take", "begin", "take", "take"]


async def test_a_turn_that_began_behind_others_took_the_time_since_they_were_reported(
    autojump_clock: MockClock,
) -> None:
    short = ("worker.simulated.turn_ms=2", "worker.engine.lead_ms=100")
    async with running_worker(*short) as rig:
        began_at = trio.current_time()
        assert (await rig.ask(prompt="one fish", max_tokens=100)).code == "ok"
        took = histogram_of(rig.observed, TURN_SECONDS)
        assert took.sums[()] == pytest.approx(trio.current_time() - began_at, abs=0.005)
        assert sum(took.counts[()]) >= 100
